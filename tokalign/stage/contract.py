"""The dataset contract: which columns each stage has, and the checks that stop a run before it trains on nonsense.

Ids are what the model saw; text is for people. No stage decodes and re-tokenises, and a signal is a list of floats
as long as the ids it belongs to. Every stage is a folder of parquet shards beside a `manifest.json` that says which
tokenizer, weights, parameters and package version made it (written by `tokalign.stage.jobs.run_job`); a dataset from
the hub without a manifest is accepted, and then only its rows are checked. See `docs/data_contract.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError

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
    "routing_labels": "`tokalign label`",
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


# ------------------------------------------------------------------------------------------------------- manifests


# ---------------------------------------------------------------------------------------------------------- hashes


# --------------------------------------------------------------------------------------------------------- loading


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
    check_columns(dataset, "The preference dataset", "preferences", ())
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


def remedy_for(stage: str | None) -> str:
    return f"run {_MADE_BY[stage]} first or check the path" if stage else "check the path"


def check_columns(dataset: Dataset, where: str, stage: str | None, signals: Sequence[str]) -> None:
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
