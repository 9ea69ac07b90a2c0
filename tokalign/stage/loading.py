"""Opening a stage: a folder that a job wrote, any folder of data files, one file, or a dataset on the hub.

Which splits a folder has, and what `train[:10%]` or `train+test` mean, is for `datasets` to say; a split that is not
there is never replaced by another one. What is added here is the manifest: a stage that a job wrote is whole, is of one
tokenizer, and is one split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import pyarrow as pa
from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset, load_dataset_builder
from transformers import PreTrainedTokenizerBase

from tokalign.internals.datasets import DatasetGenerationError, DatasetNotFoundError, loadable
from tokalign.stage.contract import SignalRow, check_columns, check_problems, check_tokenizer, remedy_for
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import is_hub_id
from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.stage.shards import CHECKED, job_hash, page_problem, shard_name, shard_problem

Rows: TypeAlias = Dataset | IterableDataset


def load_stage(
    path_or_id: str | Path,
    *,
    split: str = "train",
    stage: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Sequence[str | SignalRow] = (),
    allow_other_tokenizer: bool = False,
) -> Dataset:
    """Open a stage: a folder written by a job, any folder of data files, one file, or a dataset on the hub.

    The rows stay on disk (memory-mapped Arrow). A folder that a job wrote is one split: it opens as "train" or by the
    name of the folder. A folder of such folders has a split for each. Every other folder has the splits that
    `datasets.load_dataset` finds in it. A file is one split, "train".

    Args:
        path_or_id: Folder, `.jsonl`, `.json` or `.parquet` file, or hub id.
        split: Split to open, or slices and sums of splits as in `datasets`: "train[:10%]", "train+test".
        stage: one of `STAGES`: its columns must be there; problems must have a prompt and an id of their own.
        tokenizer: Must be the one that made the ids, by the manifest's `tokenizer_hash` and `added_tokens`.
        signals: Names, or rows of the table of signals; each needs a `chosen_<signal>` or `rejected_<signal>` column.
        allow_other_tokenizer: Only warn of another tokenizer's ids: for those that mean the same all the same.

    Returns:
        The dataset; `manifest_of(dataset)` gives the manifest, if there is one.

    Raises:
        ContractError: no such stage or split, unfinished stage, shard missing, column missing, another tokenizer's
            ids, a problem without a prompt or with another problem's id.
    """
    options: dict[str, Any] = {"tokenizer": tokenizer, "allow_other_tokenizer": allow_other_tokenizer}
    dataset = cast(Dataset, open_rows(path_or_id, split=split, stage=stage, **options))
    check_columns(dataset, str(path_or_id), stage, signals)
    if stage in ("problems", "structured"):
        check_problems(dataset, str(path_or_id))
    return dataset


def open_rows(
    path_or_id: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    stage: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_other_tokenizer: bool = False,
) -> Rows:
    """The rows of a split as `load_stage` opens them, whatever their columns.

    Args:
        config: configuration of a dataset that has several, as `name` of `datasets.load_dataset`.
        streaming: read rows when they are asked for, and write no copy of them to the cache.
        stage: what the path should hold, for the errors.

    Raises:
        ContractError: as `load_stage`, but for columns and rows.
    """
    path = Path(path_or_id)
    manifest = None
    if path.is_dir() and (stages := stages_in(path)):
        if config is not None:
            raise ContractError(
                f"{path} is a stage, which has no configuration {config!r}; leave `dataset_config` out."
            )
        rows, manifest = _load_stages(path, stages, split, streaming)
    elif path.is_dir():
        manifest = complete_manifest(path) if (path / MANIFEST).exists() else None
        rows = _load_folder(path, split, config, streaming)
    elif path.is_file():
        rows = _load_file(path, split, streaming)
    elif path.suffix in _READERS or not is_hub_id(str(path_or_id)):
        kind = "File" if path.suffix in _READERS else "Folder"
        raise ContractError(f"{kind} {path_or_id} does not exist; {remedy_for(stage)}.")
    else:
        try:
            rows = load_dataset(str(path_or_id), config, split=split, streaming=streaming)
        except (DatasetNotFoundError, ConnectionError) as error:
            raise ContractError(
                f"{path_or_id} is neither a folder here nor a dataset on the hub that can be read "
                f"({type(error).__name__}); {remedy_for(stage)}."
            ) from error
    if manifest is not None:
        if tokenizer is not None:
            check_tokenizer(manifest, tokenizer, str(path), allow=allow_other_tokenizer)
        rows.info.description = json.dumps(manifest, ensure_ascii=False)
    return rows


def stages_in(folder: Path) -> dict[str, Path]:
    """By split, the folders that jobs wrote: `folder` itself, and those in it. Empty where no job wrote any."""
    parts = sorted(file.parent for file in folder.glob(f"*/{MANIFEST}"))
    stages = {part.name: part for part in parts if "shards" in read_manifest(part)}
    if (folder / MANIFEST).exists() and "shards" in read_manifest(folder):
        stages = {"train": folder, folder.resolve().name: folder} | stages
    return stages


def complete_manifest(folder: Path) -> dict[str, Any]:
    """A stage's manifest, of which the job has finished and left rows."""
    manifest = read_manifest(folder)
    if manifest.get("status", "complete") != "complete":
        raise ContractError(f"{folder} is unfinished, rerun the job that writes it ({manifest.get('name')}).")
    if manifest.get("rows") == 0:
        raise ContractError(f"{folder} has no rows: all were dropped ({manifest.get('dropped')}).")
    return manifest


def _splits_asked(split: str, known: Iterable[str], where: Path, streaming: bool) -> list[str]:
    """The splits of `known` that an expression such as "train[:10%]+test" reads, by the grammar of `datasets`."""
    known = list(known)
    if split in known:
        return [split]
    try:  # the counts of rows stand for any: what is wanted is which splits are named
        parts = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(known, 1000))
    except (AssertionError, ValueError):
        raise ContractError(
            f"{where} has no split {split!r} (it has {', '.join(known)}); name one of these, or give the folder or "
            "the file that holds it."
        ) from None
    if streaming and split not in known:
        raise ContractError(
            f"A stream of {where} is one whole split, and {split!r} is not; name one of {', '.join(known)}, or do not "
            "stream it."
        )
    return list(dict.fromkeys(part.splitname for part in parts))


# ------------------------------------------------------------------------------------------------ what is not a stage

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _load_file(file: Path, split: str, streaming: bool) -> Rows:
    if file.suffix not in _READERS:
        raise ContractError(f"{file} is not a file of rows; give one of {', '.join(_READERS)}, or a folder of parquet.")
    _splits_asked(split, ["train"], file, streaming)
    kind = _READERS[file.suffix]
    try:
        return load_dataset(kind, data_files={"train": str(file)}, split=split, streaming=streaming, **_checks(kind))
    except (DatasetGenerationError, pa.ArrowException, ValueError, StopIteration) as error:
        _refuse_nothing(error, file, split)
        raise ContractError(
            f"{file} cannot be read as rows ({_reason(error)}); write one JSON object a line."
        ) from error


def _load_folder(folder: Path, split: str, config: str | None, streaming: bool) -> Rows:
    """A folder that no job wrote, such as a clone of a hub dataset, as `datasets` reads it."""
    try:
        builder = load_dataset_builder(str(folder), config)
    except FileNotFoundError as error:
        raise ContractError(f"{folder} holds no files of rows; run the job that writes this stage.") from error
    except ValueError as error:  # files of several formats, several configurations
        raise ContractError(
            f"{folder} cannot be read as one dataset ({_reason(error)}); give one file, or a folder of one format."
        ) from error
    splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    _splits_asked(split, splits, folder, streaming)
    files = [Path(str(file)) for files in splits.values() for file in files]
    try:
        return load_dataset(str(folder), config, split=split, streaming=streaming, **_checks(builder.name))
    except (DatasetGenerationError, pa.ArrowException, OSError, ValueError, StopIteration) as error:
        _refuse_nothing(error, folder, split)
        raise _unreadable(folder, [file for file in files if file.suffix == ".parquet"], error) from error


def _checks(kind: str) -> dict[str, Any]:
    """Options of a reader: pages of parquet are compared with their checksums while they are read."""
    return {"fragment_scan_options": CHECKED} if kind == "parquet" else {}


# ------------------------------------------------------------------------------------------------------------- stages


def manifest_at(path_or_id: str | Path, split: str = "train") -> dict[str, Any] | None:
    """What the manifests of the stages that `split` names agree on; None where no job wrote these rows.

    Raises:
        ContractError: a stage is unfinished, empty or damaged, or the stages are of different tokenizers.
    """
    path = Path(path_or_id)
    stages = stages_in(path) if path.is_dir() else {}
    return _asked(path, stages, _splits_asked(split, stages, path, False))[0] if stages else None


def folder_of(path: str | Path, split: str = "train") -> Path:
    """The folder of the stage that `split` is of, beside whose rows there may be files of their own.

    Raises:
        ContractError: the split is there in no stage, or is of several.
    """
    folder = Path(path)
    if not (stages := stages_in(folder)):
        return folder
    folders = {stages[name] for name in _splits_asked(split, stages, folder, False)}
    if len(folders) > 1:
        raise ContractError(f"{split!r} of {folder} is of several stages, whose files lie apart; name one of them.")
    return folders.pop()


def _asked(
    folder: Path, stages: Mapping[str, Path], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """What the manifests of these stages agree on, and the shards of each."""
    manifests = [complete_manifest(stages[name]) for name in names]
    files = {name: shards_of(stages[name], manifest) for name, manifest in zip(names, manifests, strict=True)}
    check_one_tokenizer([manifest.get("tokenizer_hash") for manifest in manifests], str(folder))
    return {k: v for k, v in manifests[0].items() if all(m.get(k) == v for m in manifests)}, files


def check_one_tokenizer(hashes: Sequence[str | None], where: str) -> None:
    """Refuse rows that come from stages with different tokenizers' ids; a stage without ids has no hash."""
    if len({*hashes} - {None}) > 1:
        raise ContractError(f"The stages of {where} hold ids of different tokenizers; read stages of one tokenizer.")


def _load_stages(folder: Path, stages: Mapping[str, Path], split: str, streaming: bool) -> tuple[Rows, dict[str, Any]]:
    """The rows of the stages that `split` names, and what their manifests agree on."""
    names = _splits_asked(split, stages, folder, streaming)
    manifest, files = _asked(folder, stages, names)
    data_files = {name: [str(file) for file in loadable(part)] for name, part in files.items()}
    if names == [split]:  # a folder's name may be none that `datasets` takes for a split
        data_files, split = {"train": data_files[split]}, "train"
    try:
        rows = load_dataset("parquet", data_files=data_files, split=split, streaming=streaming, **_checks("parquet"))
    except (DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
        _refuse_nothing(error, folder, split)
        raise _unreadable(folder, [file for part in files.values() for file in part], error) from error
    return rows, manifest


def shards_of(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The shards of a finished stage, each of them there and in its place."""
    count = manifest["shards"]
    if type(count) is not int or not 1 <= count < 10**9:
        wrong = f"{folder / MANIFEST} counts {str(count)[:40]!r} shards"
        raise ContractError(f"{wrong}; delete the folder and rerun its job.")
    files = []
    for index in range(count):  # one by one: a wrong count may be any number
        if not (file := folder / shard_name(index, count)).exists():
            raise ContractError(f"{folder} lacks shard {file.name}; rerun the job that writes it.")
        files.append(file)
    if (job := job_hash(manifest)) is not None:
        for index, file in enumerate(files):
            if (problem := shard_problem(file, job, index, pages=False)) is not None:
                raise _damaged(file, problem)
    return files


def _refuse_nothing(error: Exception, where: Path, split: str) -> None:
    """Say that there are no rows, which `datasets` says in two ways: an empty slice or file, a JSON file of no line."""
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        raise ContractError(
            f"{where} has no rows in {split!r}; check the path and what the job that wrote it dropped."
        ) from None


def _unreadable(folder: Path, files: Iterable[Path], error: Exception) -> Exception:
    """What to say where files cannot be read together: which of them is damaged, or why they do not fit."""
    for file in files:
        if (problem := page_problem(file)) is not None:
            return _damaged(file, problem)
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno is not None:  # the machine's trouble, such as a full disk
        return error
    return ContractError(
        f"The files in {folder} cannot be read as one dataset ({_reason(error)}); rerun the job that writes the stage."
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")


def _damaged(file: Path, problem: str) -> ContractError:
    return ContractError(f"{file} {problem}; delete it and rerun the job that writes the stage.")
