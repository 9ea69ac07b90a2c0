"""The dataset contract: which columns each stage has, and the checks that stop a run before it trains on nonsense.

Ids are what the model saw; text is for people. No stage decodes and re-tokenises, and a signal is a list of floats
as long as the ids it belongs to. Every stage is a folder of parquet shards beside a `manifest.json` that says which
tokenizer, weights, parameters and package version made it (written by `tokalign.stage.jobs.run_job`); a dataset from
the hub without a manifest is accepted, and then only its rows are checked. See `docs/data_contract.md`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from tokalign.stage.shards import CHECKED, job_hash, page_problem, shard_problem

MANIFEST = "manifest.json"
STAGES: dict[str, tuple[str, ...]] = {
    "problems": ("id", "prompt", "answer"),
    "structured": ("id", "prompt", "answer", "schema"),
    "rollouts": (
        *("id", "prompt", "answer", "prompt_ids", "completion_ids", "completion"),
        *("finish_reason", "logprobs", "sample", "correct"),
    ),
    "preferences": ("id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"),
    "sft": ("id", "prompt", "completion", "prompt_ids", "completion_ids", "input_ids", "completion_mask"),
    "routing_labels": ("id", "prompt_ids", "completion_ids", "slm_ids", "label"),
}
_MADE_BY = {
    "problems": "a dataset builder in data/",
    "structured": "a dataset builder in data/ that writes a schema a row (gsm8k_json.py, bfcl.py, cooking.py)",
    "rollouts": "scripts/sample_rollouts.py",
    "preferences": "scripts/build_pairs.py",
    "sft": "scripts/build_pairs.py",
    "routing_labels": "scripts/label_routing.py",
}
_SCORED_BY = {
    "contrast": "scripts/score_contrast.py",
    "token_reward": "scripts/score_token_rewards.py",
    "logprob": "scripts/score_likelihood.py",
    "entropy": "scripts/score_likelihood.py",
    "implicit_reward": "scripts/score_likelihood.py",
}
# Lowest and highest value of a signal, and what it is
_RANGES = {
    "contrast": (0.0, 1.0, "a contrastive score is a probability"),
    "token_reward": (-0.5, 0.5, "a token reward lies"),
    "implicit_reward": (-0.5, 0.5, "an implicit reward lies"),
}
_BATCH = 1000  # rows in memory at a time while checking or hashing


class ContractError(ValueError):
    """Data that breaks the contract; the message is one sentence with row, column and remedy."""


# ------------------------------------------------------------------------------------------------------- manifests


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
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(Path(path) / MANIFEST, text)


def write_text_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader, or a machine after a power cut, sees the old text or the new one, never half."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with removed_if_it_fails(temporary):
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    fsync_folder(file.parent)


@contextmanager
def removed_if_it_fails(temporary: Path) -> Iterator[None]:
    """Delete a half-written file when its writing fails (a full disk needs its room), and let the error name it."""
    try:
        yield
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(temporary)
        raise


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (the file's own fsync does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_of(dataset: Dataset) -> dict[str, Any] | None:
    """The manifest that `load_stage` put into the dataset's description, None for a dataset from elsewhere."""
    description = dataset.info.description or ""
    if not description.startswith("{"):
        return None
    try:
        return json.loads(description)
    except json.JSONDecodeError:
        return None


# ---------------------------------------------------------------------------------------------------------- hashes


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what the ids mean, equal over save and load, processes and machines.

    Covers vocabulary, merges, added tokens, normaliser, pre-tokeniser, decoder, begin/end/unknown token and chat
    template. Padding, truncation, the padding token and the post-processor are left out on purpose: trainers change
    them (`pad_token = eos_token`) without changing what any id means.
    """
    added = sorted((i, str(t.content), bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items())
    content: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": added,
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
        "chat_template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a slow (pure Python) tokenizer is identified by its vocabulary alone
        serialised = json.loads(backend.to_str())
        content["merges"] = serialised["model"].get("merges")
        content["pipeline"] = [serialised.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_WEIGHTS: dict[tuple[tuple[str, int, int], ...], str] = {}  # hashes computed by this process


def weights_hash(path_or_id: str | Path) -> str:
    """Identity of a model's or adapter's weights.

    A local folder: sha256 over name, size and content of its `*.safetensors` files, read in blocks; kept for the life
    of the process. A hub id: the commit that the local cache resolves it to, or the id itself where nothing is cached.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        for name in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(str(path_or_id), name) if _is_hub_id(str(path_or_id)) else None
            if isinstance(cached, str):
                return Path(cached).parent.name  # …/snapshots/<commit>/config.json
        if not _is_hub_id(str(path_or_id)):
            raise ContractError(f"Model folder {path_or_id} does not exist; check the path.")
        return str(path_or_id)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ContractError(f"Model folder {folder} has no *.safetensors file; save it with save_pretrained.")
    key = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    if key not in _WEIGHTS:
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 22):
                    total.update(block)
        _WEIGHTS[key] = total.hexdigest()
    return _WEIGHTS[key]


def content_hash(dataset: Dataset) -> str:
    """sha256 over every value of a dataset in row order, streamed; the same however the rows are chunked on disk."""
    total = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
        for name, column in zip(table.column_names, table.columns, strict=True):
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            batch = pa.record_batch([array], names=[name])
            total.update(f"{name}\0{array.type}\0{len(array)}\0".encode())
            total.update(batch.serialize())
    return total.hexdigest()


# --------------------------------------------------------------------------------------------------------- loading


def _is_hub_id(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")


def load_stage(
    path_or_id: str | Path,
    *,
    split: str = "train",
    stage: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Sequence[str] = (),
) -> Dataset:
    """Open a stage: a folder written by a job, any folder of parquet files, or a dataset on the hub.

    The rows stay on disk (memory-mapped Arrow). In a folder, `<folder>/<split>/` is used if it exists, then
    `<split>.parquet` and `<split>-*.parquet`, else all `*.parquet` of the folder itself. A folder that a job wrote is
    one split: it opens as "train" or by the name of the folder.

    Args:
        path_or_id: Folder, or hub id.
        split: Split to open.
        stage: one of `STAGES`: its columns must be there.
        tokenizer: Must be the one that made the ids, by the manifest's `tokenizer_hash`.
        signals: Each needs a `chosen_<signal>` or `rejected_<signal>` column.

    Returns:
        The dataset; `manifest_of(dataset)` gives the manifest, if there is one.

    Raises:
        ContractError: no such stage, unfinished stage, shard missing, column missing, another tokenizer's ids.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        dataset, manifest = _load_folder(folder, split)
    else:
        if not _is_hub_id(str(path_or_id)):
            raise ContractError(f"Folder {path_or_id} does not exist; {_remedy(stage)}.")
        try:
            dataset, manifest = load_dataset(str(path_or_id), split=split), None
        except (DatasetNotFoundError, ConnectionError) as error:
            raise ContractError(
                f"{path_or_id} is neither a folder here nor a dataset on the hub that can be read "
                f"({type(error).__name__}); {_remedy(stage)}."
            ) from error
    _check_columns(dataset, str(path_or_id), stage, signals)
    if manifest is not None:
        made_with = manifest.get("tokenizer_hash")
        if tokenizer is not None and made_with is not None and made_with != tokenizer_hash(tokenizer):
            raise ContractError(
                f"The ids in {path_or_id} were made with another tokenizer (hash {str(made_with)[:12]}, not "
                f"{tokenizer_hash(tokenizer)[:12]}); use the tokenizer of the model that made this stage, or "
                "rerun the stage with this model."
            )
        dataset.info.description = json.dumps(manifest, ensure_ascii=False)
    return dataset


def _remedy(stage: str | None) -> str:
    return f"run {_MADE_BY[stage]} first or check the path" if stage else "check the path"


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
        names = {split: [str(file) for file in files]}
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


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"part-{index:05d}-of-{count:05d}.parquet"


def _check_columns(dataset: Dataset, where: str, stage: str | None, signals: Sequence[str]) -> None:
    if stage is not None:
        if stage not in STAGES:
            raise ContractError(f"Unknown stage {stage!r}; stages are {', '.join(STAGES)}.")
        missing = [column for column in STAGES[stage] if column not in dataset.column_names]
        if missing:
            raise ContractError(
                f"{where} has no column `{missing[0]}`, which the stage {stage!r} needs (it has "
                f"{', '.join(dataset.column_names)}); make it with {_MADE_BY[stage]}."
            )
    for signal in signals:
        if not {f"chosen_{signal}", f"rejected_{signal}"} & set(dataset.column_names):
            raise ContractError(
                f"{where} has neither `chosen_{signal}` nor `rejected_{signal}`; score it with "
                f"{_SCORED_BY.get(signal, 'the script in scripts/ that makes this signal')}."
            )


# ----------------------------------------------------------------------------------------------------------- rows


def check_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    signals: Sequence[str] = (),
    sides: Sequence[str] = ("chosen", "rejected"),
    text_rows: int = 32,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Check every row of a preference dataset, a batch at a time (memory does not grow with the dataset).

    Each side's ids must be there, not empty and below the vocabulary size; a signal must have one finite number an
    id, and `contrast` must lie in [0, 1], `token_reward` and `implicit_reward` in [−0.5, 0.5]. With a tokenizer, the
    text of the first `text_rows` rows must be `tokenizer.decode(ids, skip_special_tokens=True)`: ids of another
    tokenizer read as other text.

    Args:
        dataset: Preference rows.
        tokenizer: Gives the vocabulary size and the text check; without it both are skipped.
        signals: Signals to check.
        sides: Sides on which the signals must be present; the ids of both sides are always checked.
        text_rows: Rows whose text is compared; decoding every row would cost more than it finds.
        ranges: Lowest and highest value of a signal, where the caller needs others than the signal's own.

    Raises:
        ContractError: naming the first bad row's `id` and index, its column, and what to do.
    """
    _check_columns(dataset, "The preference dataset", "preferences", ())
    allowed = {**_RANGES, **{k: (*limits, "it has to lie") for k, limits in (ranges or {}).items()}}
    scored = [(side, f"{side}_{signal}", signal) for signal in signals for side in sides]
    for _, column, signal in scored:
        if column not in dataset.column_names:
            raise ContractError(
                f"The preference dataset has no column `{column}`; score it with "
                f"{_SCORED_BY.get(signal, 'the script in scripts/ that makes this signal')}."
            )
    ids_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    columns = ["id", *ids_columns, *(column for _, column, _ in scored)]
    check_lists(dataset, "The preference dataset", ids_columns, "rebuild the pairs")
    check_lists(dataset, "The preference dataset", columns[4:], "score these rows again", decimals=True)
    # the highest id, not the count: some vocabularies have holes
    vocabulary = None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    first = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH):
        arrays = {name: _one_array(table.column(name)) for name in columns}
        check_values(arrays, first)
        lengths = {name: _check_ids(arrays, name, vocabulary, first) for name in ids_columns}
        for side, column, signal in scored:
            _check_scores(arrays, column, f"{side}_ids", lengths[f"{side}_ids"], first, allowed.get(signal))
        first += len(table)
    if tokenizer is not None:
        _check_text(dataset, tokenizer, text_rows)


def check_lists(dataset: Dataset, where: str, columns: Sequence[str], remedy: str, *, decimals: bool = False) -> None:
    """Refuse columns whose type is not a list of whole numbers (with `decimals`, of any), before a value is read."""
    schema = dataset.features.arrow_schema
    for column in columns:
        kind = schema.field(column).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        value = kind.value_type if lists else kind
        numbers = lists and (pa.types.is_integer(value) or (decimals and pa.types.is_floating(value)))
        if not numbers and not pa.types.is_null(value):  # a column or its lists may hold nothing but None
            what = "numbers" if decimals else "ids"
            raise ContractError(f"{where}: `{column}` has the type {kind}, not lists of {what}; {remedy}.")


def check_values(arrays: Mapping[str, pa.Array], first: int) -> None:
    """Refuse what its own type forbids, such as text that is not UTF-8: parquet is read without looking at it."""
    for column, array in arrays.items():
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            last = first + len(array) - 1
            raise ContractError(
                f"Rows {first} to {last}: `{column}` holds a damaged value; rerun the job that writes the stage."
            ) from None


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lengths(array: pa.Array) -> np.ndarray:
    """Length of each list, −1 for a row without a list."""
    if pa.types.is_null(array.type):
        return np.full(len(array), -1)
    return pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column one after the other (a null becomes NaN), and the row each belongs to."""
    values = pc.list_flatten(array).to_numpy(zero_copy_only=False)
    if values.dtype == object:  # list<null>: lists that hold nothing but None
        values = np.full(len(values), np.nan)
    return values, pc.list_parent_indices(array).to_numpy(zero_copy_only=False)


def _refuse(arrays: dict[str, pa.Array], row: int, first: int, column: str, wrong: str, remedy: str) -> None:
    raise ContractError(f"Row {first + row} (id {arrays['id'][row].as_py()!r}): `{column}` {wrong}; {remedy}.")


def _check_ids(arrays: dict[str, pa.Array], column: str, vocabulary: int | None, first: int) -> np.ndarray:
    lengths = _lengths(arrays[column])
    if (bad := np.flatnonzero(lengths <= 0)).size:
        wrong = "is missing" if lengths[bad[0]] < 0 else "is empty"
        _refuse(arrays, bad[0], first, column, wrong, "drop the row, or rebuild the pairs")
    values, rows = _flat(arrays[column])
    if (bad := np.flatnonzero(~(values >= 0))).size:  # also true for NaN, which stands for a null
        wrong = f"holds {values[bad[0]]}, not a token id"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "rebuild the pairs")
    if vocabulary is not None and (bad := np.flatnonzero(values >= vocabulary)).size:
        wrong = f"holds id {int(values[bad[0]])}, but the tokenizer has {vocabulary} tokens"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "use the tokenizer that made these ids")
    return lengths


def _check_scores(
    arrays: dict[str, pa.Array],
    column: str,
    ids_column: str,
    ids_lengths: np.ndarray,
    first: int,
    allowed: tuple[float, float, str] | None,
) -> None:
    lengths = _lengths(arrays[column])
    if (bad := np.flatnonzero(lengths != ids_lengths)).size:
        found = "is missing" if lengths[bad[0]] < 0 else f"has {lengths[bad[0]]} scores"
        wrong = f"{found} for {ids_lengths[bad[0]]} ids in `{ids_column}`"
        _refuse(arrays, bad[0], first, column, wrong, "score these rows again")
    values, rows = _flat(arrays[column])
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        wrong = f"holds {values[bad[0]]}, not a finite number"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "score these rows again, in fp32 if they overflowed")
    if allowed is None:
        return
    low, high, what = allowed
    if (bad := np.flatnonzero((values < low) | (values > high))).size:
        wrong = f"holds {values[bad[0]]}, but {what} in [{low:g}, {high:g}]"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "score these rows again")


def _check_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, text_rows: int) -> None:
    read = dataset.select_columns(["id", "chosen", "rejected", "chosen_ids", "rejected_ids"])
    for index in range(min(text_rows, len(dataset))):
        try:
            row = read[index]
        except UnicodeDecodeError:
            raise ContractError(f"Row {index}: a text is not UTF-8; rebuild the pairs.") from None
        for side in ("chosen", "rejected"):
            text = row[side]
            if isinstance(text, list) and text and isinstance(text[-1], dict):
                text = text[-1].get("content")  # messages: the text that the ids hold is in the last one
            if tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) != text:
                raise ContractError(
                    f"Row {index} (id {row['id']!r}): `{side}` is not what this tokenizer reads in `{side}_ids`; "
                    "use the tokenizer that made these ids, or rebuild the pairs with this one."
                )
