"""Made-up routing labels on disk: a finished stage with its features, whose divergent tokens can be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from tokalign.routing.labels.features import write_features
from tokalign.stage.manifest import write_manifest
from tokalign.stage.shards import shard_name


def write_labels(
    folder: Path,
    *,
    rows: int = 40,
    files: int = 4,
    hidden_size: int = 8,
    top_k: int = 5,
    vocab: int = 20,
    seed: int = 0,
    split: str = "train",
    manifest: dict[str, Any] | None = None,
    change: Any = None,
) -> Path:
    """`folder`/labels/<split> in the layout of `tokalign label`; returns it.

    A position is divergent where entropy plus the first hidden unit is high; every ninth has no verdict.

    Args:
        change: called with the records before they are written.
    """
    draw = np.random.default_rng(seed)
    stage, features = folder / "labels" / split, folder / "prefill" / "features"
    prefix = "" if split == "train" else f"{split} "  # problems of one split only
    records: list[dict[str, Any]] = []
    for part in np.array_split(np.arange(rows), files):
        lengths = draw.integers(1, 12, len(part))
        total = int(lengths.sum())
        arrays = {
            "hidden": draw.normal(size=(total, hidden_size)),
            "top_logits": -np.sort(-draw.normal(size=(total, top_k)), axis=1),
            "predicted": draw.integers(0, vocab, total),
            "entropy": draw.exponential(size=total),
        }
        signal = arrays["entropy"] + arrays["hidden"][:, 0] + 0.3 * draw.normal(size=total)
        label = np.where(signal > 2.0, 2, np.where(signal > 1.0, 1, 0))
        label[::9] = -1
        name = write_features(features, [f"{prefix}{row}" for row in part], arrays)
        first = 0
        for row, length in zip(part.tolist(), lengths.tolist(), strict=True):
            own = slice(first, first + length)
            records.append(
                {
                    "id": f"{prefix}{row}",
                    "prompt_ids": [1, 2],
                    "completion_ids": draw.integers(0, vocab, length).tolist(),
                    "slm_ids": arrays["predicted"][own].tolist(),
                    "label": label[own].tolist(),
                    "features_file": name,
                    "features_first": first,
                }
            )
            first += length
    if change is not None:
        change(records)
    stage.mkdir(parents=True)
    Dataset.from_list(records).to_parquet(stage / shard_name(0, 1))
    entries = {"features": "../../prefill/features", "shared_vocab": vocab, **(manifest or {})}
    write_manifest(stage, {"status": "complete", "rows": rows, "shards": 1, **entries})
    return stage


def records_of(stage: Path) -> list[dict[str, Any]]:
    return Dataset.from_parquet(str(stage / shard_name(0, 1))).to_list()
