"""All targets by name, and the seeds that are kept for them (`seeds/<target>/`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import files, servers, texts

SEEDS = Path(__file__).parent / "seeds"
TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": files.manifest,
    "shard": files.shard,
    "labels": files.labels,
    "features": files.features,
    "template": files.template,
    "router_config": files.router_config,
    "answers": texts.answers,
    "structured": texts.structured,
    "request": servers.request,
    "answer": servers.answer,
}


def seeds_of(target: str) -> list[Path]:
    """The kept inputs of a target; their names say what they were."""
    return sorted((SEEDS / target).iterdir()) if (SEEDS / target).is_dir() else []
