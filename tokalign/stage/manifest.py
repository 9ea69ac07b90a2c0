"""A stage's `manifest.json`: who made it, from what, with which tokenizer, weights and parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_json_atomically

MANIFEST = "manifest.json"


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the stage in folder `path`; `ContractError` if there is none or it is not JSON."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"{path} has no {MANIFEST}; run the job that writes this stage.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
        raise ContractError(f"{file} is not JSON ({error}); delete the folder and rerun its job.") from None
    if not isinstance(manifest, dict):
        raise ContractError(f"{file} is not a JSON object; delete the folder and rerun its job.")
    return manifest


def write_manifest(path: str | Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` into folder `path` atomically."""
    Path(path).mkdir(parents=True, exist_ok=True)
    write_json_atomically(Path(path) / MANIFEST, manifest)


def manifest_of(dataset: Dataset) -> dict[str, Any] | None:
    """The manifest that `load_stage` put into the dataset's description, None for a dataset from elsewhere."""
    description = dataset.info.description or ""
    if not description.startswith("{"):
        return None
    try:
        return json.loads(description)
    except json.JSONDecodeError:
        return None
