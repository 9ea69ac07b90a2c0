"""The dataset contract: which columns each stage has, and the checks that stop a run before it trains on nonsense.

Ids are what the model saw; text is for people. No stage decodes and re-tokenises, and a signal is a list of floats
as long as the ids it belongs to. Every stage is a folder of parquet shards beside a `manifest.json` that says which
tokenizer, weights, parameters and package version made it (written by `tokalign.stage.jobs.run_job`); a dataset from
the hub without a manifest is accepted, and then only its rows are checked. See `docs/data_contract.md`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER, BATCH, other_tokenizer
from tokalign.stage.ids import IdReader
from tokalign.stage.manifest import manifest_of

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")  # of a pair; a signal stands in the columns chosen_<signal> and rejected_<signal>
STAGES: dict[str, tuple[str, ...]] = {
    "problems": ("id", "prompt", "answer"),
    "structured": ("id", "prompt", "answer", "schema"),
    "rollouts": (
        "id",
        "prompt",
        "answer",
        "prompt_ids",
        "completion_ids",
        "completion",
        "finish_reason",
        "logprobs",
        "sample",
        "correct",
    ),
    "preferences": ("id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"),
    "sft": ("id", "prompt", "completion", "prompt_ids", "completion_ids", "input_ids", "completion_mask"),
    "step_labels": ("id", "question", "prompt", "completion", "steps", "step_spans", "first_wrong"),
    "routing_labels": ("id", "prompt_ids", "completion_ids", "slm_ids", "label"),
}
_MADE_BY = {
    "problems": "`tokalign data`",
    "structured": "`tokalign data gsm8k-json`, `snips`, `bfcl` or `cooking`, which write a schema a row",
    "rollouts": "`tokalign sample`",
    "preferences": "`tokalign pairs`",
    "sft": "`tokalign pairs`",
    "step_labels": "`tokalign data step-labels`",
    "routing_labels": "`tokalign label`",
}


class SignalRow(Protocol):
    """What the checks read of a signal: its row in the table (`tokalign.signals.registry.get(name)`) has it."""

    @property
    def name(self) -> str: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    @property
    def command(self) -> str: ...


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_TEXTS = {"completion_ids": "completion", **{f"{side}_ids": side for side in SIDES}}  # ids and what they read as
TEXT_ROWS = 32


def check_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | IdReader | None = None,
    *,
    signals: Sequence[str | SignalRow] = (),
    sides: Sequence[str] = SIDES,
    text_rows: int = TEXT_ROWS,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    first: int = 0,
) -> None:
    """Check every row of a preference dataset, a batch at a time (memory does not grow with the dataset).

    Each side's ids must be there, not empty and the tokenizer's; a signal must have one finite number an id, between
    the `low` and `high` of its row. Whether the ids are another tokenizer's, `check_reading` says.

    Args:
        dataset: Preference rows; of their columns only those of ids and signals must be there.
        tokenizer: Whose ids they are (or its `IdReader`); without it nothing is said of that.
        signals: Signals to check: rows of the table of signals, or names, and then no range is checked.
        sides: Sides on which the signals must be present; the ids of both sides are always checked.
        text_rows: Rows whose text is compared; decoding every row would cost more than it finds.
        ranges: Lowest and highest value of a signal by name, where the caller needs others than the signal's own.
        first: Number of the first row, where the dataset is a part of a stream.

    Raises:
        ContractError: naming the first bad row's `id` and index, its column, and what to do.
    """
    check_columns(dataset, "The preference dataset", "preferences", (), needed=IDS)
    allowed = {row.name: (row.low, row.high) for row in signals if not isinstance(row, str)} | dict(ranges or {})
    scored = [(f"{side}_{_name(signal)}", f"{side}_ids", _name(signal)) for signal in signals for side in sides]
    for signal in signals:
        for column in (f"{side}_{_name(signal)}" for side in sides):
            if column not in dataset.column_names:
                there = _signals_in(dataset)
                raise ContractError(f"The preference dataset has no column `{column}`{there}; {_scored_by(signal)}.")
    where = "The preference dataset"
    check_ids(dataset, tokenizer, IDS, where, text_rows=text_rows, scored=scored, allowed=allowed, first=first)


def check_sft(dataset: Dataset, tokenizer: PreTrainedTokenizerBase | IdReader, *, text_rows: int = TEXT_ROWS) -> None:
    """`check_ids` of SFT rows, which `SFTTrainer` trains on as they are where they hold `input_ids`."""
    columns = [column for column in ("prompt_ids", "completion_ids", "input_ids") if column in dataset.column_names]
    check_ids(dataset, tokenizer, columns, "The SFT dataset", text_rows=text_rows)


def check_prompt_ids(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str, *, allow_other_tokenizer: bool = False
) -> None:
    """Check the ids of problems whose prompts are not rendered any more, since they have `prompt_ids`."""
    if "prompt_ids" not in dataset.column_names:
        return
    check_tokenizer(manifest_of(dataset), tokenizer, where, allow=allow_other_tokenizer)
    check_ids(dataset, tokenizer, ["prompt_ids"], where, text_rows=0 if allow_other_tokenizer else TEXT_ROWS)


def check_ids(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | IdReader | None,
    columns: Sequence[str],
    where: str,
    *,
    text_rows: int = TEXT_ROWS,
    scored: Sequence[tuple[str, str, str]] = (),
    allowed: Mapping[str, tuple[float, float]] | None = None,
    first: int = 0,
) -> None:
    """Check columns of ids (and of scores) in every row, and by `check_reading` whose they are.

    Args:
        where: what to call the dataset in errors.
        scored: a column of scores, the ids that it stands beside, and its signal.
        allowed: lowest and highest score of a signal.
        text_rows, first: as for `check_preferences`.

    Raises:
        ContractError: likewise.
    """
    reader = tokenizer if tokenizer is None or isinstance(tokenizer, IdReader) else reader_of(dataset, tokenizer)
    scores = [column for column, _, _ in scored]
    check_lists(dataset, where, columns, "rebuild the rows")
    check_lists(dataset, where, scores, "score these rows again", decimals=True)
    read = [*(["id"] if "id" in dataset.column_names else []), *columns, *scores]
    start = first
    for table in dataset.select_columns(read).with_format("arrow").iter(batch_size=BATCH):
        arrays = {name: _one_array(table.column(name)) for name in read}
        check_values(arrays, start)
        lengths = {name: _check_ids(arrays, name, reader, start) for name in columns}
        for column, beside, signal in scored:
            _check_scores(arrays, column, beside, lengths[beside], start, (allowed or {}).get(signal))
        start += len(table)
    if reader is not None and text_rows:
        check_reading(dataset, reader, columns, text_rows, first)


def check_reading(
    dataset: Dataset, reader: IdReader, columns: Sequence[str], text_rows: int = TEXT_ROWS, first: int = 0
) -> None:
    """Refuse ids that read as another text than the row's, or that end as no answer of this tokenizer's model does.

    Rows of one dataset come from one tokenizer, or from a few that were put one after the other: `text_rows` of them,
    evenly spread, tell as much as all, at a cost that does not grow. Where the manifest names this tokenizer, texts
    alone are compared, since a stage's texts may have been edited; what its messages and ends are, it has settled.

    Raises:
        ContractError: naming the row, the column and what to do.
    """
    texts = {column: _TEXTS[column] for column in columns if _TEXTS.get(column) in dataset.column_names}
    if "prompt_ids" in columns and "prompt" in dataset.column_names and len(columns) == 1:
        texts["prompt_ids"] = "prompt"  # beside a completion it need not be read: they are one tokenizer's
    wanted = {"id", "prompt_ids", *columns, *texts.values()} & {*dataset.column_names}
    rows = dataset.select_columns(sorted(wanted)).with_format(None)
    for index in np.unique(np.linspace(0, len(rows) - 1, min(text_rows, len(rows))).round().astype(int)).tolist():
        try:
            row = rows[index]
        except UnicodeDecodeError:
            raise ContractError(f"Row {first + index}: a text is not UTF-8; rebuild the pairs.") from None
        at = f"Row {first + index}" + (f" (id {row['id']!r})" if "id" in row else "")
        for column in columns:
            text = row.get(texts.get(column, ""))
            if reader.named and not isinstance(text, str):
                continue
            if column == "prompt_ids":
                wrong = column in texts and not reader.reads_prompt(row[column], text)
            else:
                wrong = column in texts and not reader.reads(row[column], text, row.get("prompt_ids") or ())
            if wrong:
                raise ContractError(
                    f"{at}: `{texts[column]}` is not what this tokenizer reads in `{column}`; use the tokenizer that "
                    f"made these ids, rebuild the rows with this one, leave the columns of ids out, {_OVERRIDE}."
                )
            end = None if reader.named or column == "prompt_ids" else reader.wrong_end(row[column])
            if end is not None and not (isinstance(text, str) and text.endswith(end)):
                raise ContractError(
                    f"{at}: `{column}` ends with id {row[column][-1]}, which is {end!r} here and ends no answer of "
                    f"this model; use the tokenizer that made these ids, rebuild the rows with this one, {_OVERRIDE}."
                )


_OVERRIDE = f"or set `{ALLOW_OTHER_TOKENIZER}` if they mean the same"


def check_tokenizer(
    manifest: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, where: str, *, allow: bool = False
) -> None:
    """Refuse ids that another tokenizer has made, by the manifest of their stage; with `allow`, only say it.

    Raises:
        ContractError: naming the dataset, what differs, and what to do.
    """
    reason = other_tokenizer(manifest, tokenizer)
    if reason is None:
        return
    if not allow:
        raise ContractError(
            f"The ids of {where} were made with another tokenizer ({reason}); use the model that they were made for, "
            f"rerun the stages with this one, {_OVERRIDE}."
        )
    logger.warning(f"The ids of {where} were made with another tokenizer ({reason}); it is allowed.")


def reader_of(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> IdReader:
    """What the checks of this dataset's ids read them with."""
    return IdReader(tokenizer, manifest_of(dataset))


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


def check_problems(dataset: Dataset, where: str) -> None:
    """Refuse problems that cannot be asked, before an engine is loaded: no prompt, no id, or another problem's id.

    Two problems of one id would have one seed, and their rollouts could not be told apart.

    Raises:
        ContractError: naming row, column and remedy.
    """
    check_present(dataset, ("id", "prompt"), where)
    if (pair := first_repeated(dataset, "id")) is not None:
        first, again = pair
        raise ContractError(
            f"Row {again} of {where}: `id` {dataset[again]['id']!r} occurs twice, first in row {first}; give every row "
            "its own."
        )


def first_row(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a dataset or stream; `ContractError` where it has none."""
    row = next(iter(dataset), None)
    if row is None:
        raise ContractError(f"{name} has no rows; check its path and split, and what the job that wrote it dropped.")
    return dict(row)


def check_present(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Refuse a row in which one of these columns is null or an empty list."""
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH):
        for name in columns:
            column = table[name]
            absent = pc.is_null(column)
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                absent = pc.or_(absent, pc.fill_null(pc.equal(pc.list_value_length(column), 0), True))
            if pc.any(absent).as_py():
                row = start + pc.index(absent, True).as_py()
                raise ContractError(f"Row {row} of {where}: `{name}` is missing; write it, or drop the row.")
        start += len(table)


def first_repeated(dataset: Dataset, column: str) -> tuple[int, int] | None:
    """The first row whose value an earlier row has, as (earlier row, row); None where all differ. Nulls do not count.

    Only eight bytes a row are held: digests are compared first, and values where digests are equal.
    """

    def values() -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=BATCH):
            yield from table[column].to_pylist()

    digests = np.fromiter((_digest(value) for value in values()), dtype=np.uint64)
    ordered = np.sort(digests)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[Any, int] = {}
    for row, value in enumerate(values() if twice else ()):
        if value is not None and int(digests[row]) in twice:
            if value in seen:
                return seen[value], row
            seen[value] = row
    return None


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big")


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
    named = f" (id {arrays['id'][row].as_py()!r})" if "id" in arrays else ""
    raise ContractError(f"Row {first + row}{named}: `{column}` {wrong}; {remedy}.")


def _check_ids(arrays: dict[str, pa.Array], column: str, reader: IdReader | None, first: int) -> np.ndarray:
    lengths = _lengths(arrays[column])
    if (bad := np.flatnonzero(lengths <= 0)).size:
        wrong = "is missing" if lengths[bad[0]] < 0 else "is empty"
        _refuse(arrays, bad[0], first, column, wrong, "drop the row, or rebuild the pairs")
    values, rows = _flat(arrays[column])
    if (bad := np.flatnonzero(~(values >= 0))).size:  # also true for NaN, which stands for a null
        wrong = f"holds {values[bad[0]]}, not a token id"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "rebuild the pairs")
    if reader is not None and (bad := reader.unknown(values)).size:
        # One such row is an accident of sampling, which no other tokenizer would mend; many are another tokenizer's
        count = len(np.unique(rows[bad]))
        wrong = f"holds id {int(values[bad[0]])}, but the tokenizer has no token of that number"
        accident = "drop the row (a model whose vocabulary is padded may have drawn the id)"
        remedy = (
            f"{accident}, or use the tokenizer that made these ids"
            if 2 * count <= max(2, len(lengths))
            else (f"use the tokenizer that made these ids ({count} of {len(lengths)} rows hold such)")
        )
        _refuse(arrays, rows[bad[0]], first, column, wrong, remedy)
    return lengths


def _check_scores(
    arrays: dict[str, pa.Array],
    column: str,
    ids_column: str,
    ids_lengths: np.ndarray,
    first: int,
    allowed: tuple[float, float] | None,
) -> None:
    lengths = _lengths(arrays[column])
    if (bad := np.flatnonzero(lengths != ids_lengths)).size:
        what_is_there = "is missing" if lengths[bad[0]] < 0 else f"has {lengths[bad[0]]} scores"
        wrong = f"{what_is_there} for {ids_lengths[bad[0]]} ids in `{ids_column}`"
        _refuse(arrays, bad[0], first, column, wrong, "score these rows again")
    values, rows = _flat(arrays[column])
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        wrong = f"holds {values[bad[0]]}, not a finite number"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "score these rows again, in fp32 if they overflowed")
    if allowed is None:
        return
    low, high = allowed
    if (bad := np.flatnonzero((values < low) | (values > high))).size:
        wrong = f"holds {values[bad[0]]}, but this signal lies in [{low:g}, {high:g}]"
        _refuse(arrays, rows[bad[0]], first, column, wrong, "score these rows again")


def _name(signal: str | SignalRow) -> str:
    return signal if isinstance(signal, str) else signal.name


def _scored_by(signal: str | SignalRow) -> str:
    return f"score it with {'`tokalign score`' if isinstance(signal, str) else signal.command}"


def remedy_for(stage: str | None) -> str:
    return f"run {_MADE_BY[stage]} first or check the path" if stage else "check the path"


def check_columns(
    dataset: Dataset,
    where: str,
    stage: str | None,
    signals: Sequence[str | SignalRow],
    *,
    needed: Sequence[str] | None = None,
) -> None:
    """Refuse a dataset without the columns of its stage (`needed`: these alone) or without a signal."""
    if stage is not None:
        if stage not in STAGES:
            raise ContractError(f"Unknown stage {stage!r}; stages are {', '.join(STAGES)}.")
        missing = [column for column in needed or STAGES[stage] if column not in dataset.column_names]
        if missing:
            remedy = f"make it with {_MADE_BY[stage]}"
            texts = {"chosen", "rejected"} & {*dataset.column_names} and "rejected_ids" not in dataset.column_names
            if stage == "preferences" and texts:
                remedy = "of pairs as text, give what `tokalign score likelihood` writes, which has their ids"
            raise ContractError(
                f"{where} has no column `{missing[0]}`, which the stage {stage!r} needs (it has "
                f"{', '.join(dataset.column_names)}); {remedy}."
            )
    for signal in signals:
        columns = [f"{side}_{_name(signal)}" for side in ("chosen", "rejected")]
        if not {*columns} & {*dataset.column_names}:
            raise ContractError(
                f"{where} has neither `{columns[0]}` nor `{columns[1]}`{_signals_in(dataset)}; {_scored_by(signal)}."
            )


def _signals_in(dataset: Dataset) -> str:
    """The signals that a dataset has, for the error that misses another one; empty where it has none."""
    rejected = [name.partition("_")[2] for name in dataset.column_names if name.startswith("rejected_")]
    signals = [name for name in rejected if name != "ids" and f"chosen_{name}" in dataset.column_names]
    return f" (its signals are {', '.join(signals)})" if signals else ""
