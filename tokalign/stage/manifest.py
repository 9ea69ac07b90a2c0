"""A stage's `manifest.json`: who made it, from what, with which tokenizer, weights and parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_json_atomically
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER

MANIFEST = "manifest.json"
SAMPLING = "sampling"  # how rollouts ended, for what is made of them: `stop`, `end_ids`, `end_token_id`, `base_model`


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


def manifest_of(dataset: Dataset | IterableDataset) -> dict[str, Any] | None:
    """The manifest that `load_stage` put into the dataset's description, None for a dataset from elsewhere."""
    description = dataset.info.description or ""
    if not description.startswith("{"):
        return None
    try:
        return json.loads(description)
    except json.JSONDecodeError:
        return None


def note_beside_model(folder: str | Path, trainer: str, data: Dataset | IterableDataset, *, allowed: bool) -> None:
    """Write beside a trained model what its users must know of its data: where its rollouts stopped, and that ids of
    another tokenizer were `allowed`. Writes nothing where there is nothing to know."""
    ours = (SAMPLING, ALLOW_OTHER_TOKENIZER)
    note = {key: value for key, value in (manifest_of(data) or {}).items() if key in ours}
    if allowed:
        note[ALLOW_OTHER_TOKENIZER] = True
    before = read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else {"name": trainer}
    if note or not before.keys().isdisjoint(ours):  # of a former training into the same folder
        write_manifest(folder, {key: value for key, value in before.items() if key not in ours} | note)


def stop_strings(manifest: Mapping[str, Any] | None) -> list[str] | None:
    """The strings that ended the rollouts of which a stage is made; None where its manifest does not say."""
    manifest = manifest or {}
    sampling = manifest.get(SAMPLING)
    if not isinstance(sampling, dict) and manifest.get("name") == "sample_rollouts":  # from before 0.2
        sampling = manifest.get("parameters")
    return list(sampling.get("stop") or []) if isinstance(sampling, dict) else None
