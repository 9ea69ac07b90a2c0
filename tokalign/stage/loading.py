"""Opening a stage: a folder that a job wrote, any folder of parquet files, one file, or a dataset on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from tokalign.internals.datasets import DatasetGenerationError, DatasetNotFoundError, loadable
from tokalign.stage.contract import SignalRow, check_columns, check_tokenizer, remedy_for
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import is_hub_id
from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.stage.shards import CHECKED, job_hash, page_problem, shard_name, shard_problem


def load_stage(
    path_or_id: str | Path,
    *,
    split: str = "train",
    stage: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Sequence[str | SignalRow] = (),
    allow_other_tokenizer: bool = False,
) -> Dataset:
    """Open a stage: a folder written by a job, any folder of parquet files, one file, or a dataset on the hub.

    The rows stay on disk (memory-mapped Arrow). In a folder, `<folder>/<split>/` is used if it exists, then
    `<split>.parquet` and `<split>-*.parquet`, else all `*.parquet` of the folder itself. A folder that a job wrote is
    one split: it opens as "train" or by the name of the folder. A file is one split, "train".

    Args:
        path_or_id: Folder, `.jsonl`, `.json` or `.parquet` file, or hub id.
        split: Split to open.
        stage: one of `STAGES`: its columns must be there.
        tokenizer: Must be the one that made the ids, by the manifest's `tokenizer_hash` and `added_tokens`.
        signals: Names, or rows of the table of signals; each needs a `chosen_<signal>` or `rejected_<signal>` column.
        allow_other_tokenizer: Only warn of another tokenizer's ids: for those that mean the same all the same.

    Returns:
        The dataset; `manifest_of(dataset)` gives the manifest, if there is one.

    Raises:
        ContractError: no such stage, unfinished stage, shard missing, column missing, another tokenizer's ids.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        dataset, manifest = _load_folder(folder, split)
    elif folder.is_file():
        dataset, manifest = _load_file(folder, split), None
    else:
        if folder.suffix in _READERS:
            raise ContractError(f"File {path_or_id} does not exist; {remedy_for(stage)}.")
        if not is_hub_id(str(path_or_id)):
            raise ContractError(f"Folder {path_or_id} does not exist; {remedy_for(stage)}.")
        try:
            dataset, manifest = load_dataset(str(path_or_id), split=split), None
        except (DatasetNotFoundError, ConnectionError) as error:
            raise ContractError(
                f"{path_or_id} is neither a folder here nor a dataset on the hub that can be read "
                f"({type(error).__name__}); {remedy_for(stage)}."
            ) from error
    check_columns(dataset, str(path_or_id), stage, signals)
    if manifest is not None:
        if tokenizer is not None:
            check_tokenizer(manifest, tokenizer, str(path_or_id), allow=allow_other_tokenizer)
        dataset.info.description = json.dumps(manifest, ensure_ascii=False)
    return dataset


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _load_file(file: Path, split: str) -> Dataset:
    if file.suffix not in _READERS:
        raise ContractError(f"{file} is not a file of rows; give one of {', '.join(_READERS)}, or a folder of parquet.")
    if split != "train":
        raise ContractError(f"{file} has no split {split!r}; give the file of that split, and the split 'train'.")
    try:
        return load_dataset(_READERS[file.suffix], data_files=str(file), split=split)
    except (DatasetGenerationError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ContractError(f"{file} cannot be read as rows ({reason}); write one JSON object a line.") from error


def _load_folder(folder: Path, split: str) -> tuple[Dataset, dict[str, Any] | None]:
    if any((folder / split).glob("*.parquet")):
        folder = folder / split
    elif (folder / MANIFEST).exists() and split not in ("train", folder.name):
        # A stage is one split; reading it under another's name would evaluate on the rows that trained the model.
        raise ContractError(f"{folder} has no split {split!r}; pass the folder that holds it, or the split 'train'.")
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest is not None and manifest.get("status", "complete") != "complete":
        raise ContractError(f"{folder} is unfinished, rerun the job that writes it ({manifest.get('name')}).")
    if manifest is not None and manifest.get("rows") == 0:
        raise ContractError(f"{folder} has no rows: all were dropped ({manifest.get('dropped')}).")
    files: list[Path] = []
    if manifest is not None and "shards" in manifest:
        count = manifest["shards"]
        if type(count) is not int or not 1 <= count < 10**9:
            wrong = f"{folder / MANIFEST} counts {str(count)[:40]!r} shards"
            raise ContractError(f"{wrong}; delete the folder and rerun its job.")
        for index in range(count):  # one by one: a wrong count may be any number
            if not (file := folder / shard_name(index, count)).exists():
                raise ContractError(f"{folder} lacks shard {file.name}; rerun the job that writes it.")
            files.append(file)
        if (job := job_hash(manifest)) is not None:
            for index, file in enumerate(files):
                if (problem := shard_problem(file, job, index, pages=False)) is not None:
                    raise _damaged(file, problem)
    else:
        files = sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])
        files = files or sorted(folder.glob("*.parquet"))
    if files:
        names = {split: [str(file) for file in loadable(files)]}
        try:  # pages are checked while they are read
            return load_dataset("parquet", data_files=names, split=split, fragment_scan_options=CHECKED), manifest
        except (DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
            for file in files:
                if (problem := page_problem(file)) is not None:
                    raise _damaged(file, problem) from error
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno is not None:  # the machine's trouble, such as a full disk
                raise
            reason = " ".join(str(cause).split())[:200]
            raise ContractError(
                f"The parquet files in {folder} cannot be read as one dataset ({reason}); rerun the job that writes "
                "the stage."
            ) from error
    if not any(folder.rglob("*.parquet")) and not any(folder.rglob("*.json*")):
        raise ContractError(f"{folder} holds no parquet files; run the job that writes this stage.")
    return load_dataset(str(folder), split=split), manifest  # a clone of a hub dataset, in its own layout


def _damaged(file: Path, problem: str) -> ContractError:
    return ContractError(f"{file} {problem}; delete it and rerun the job that writes the stage.")
