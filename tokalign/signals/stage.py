"""What scripts that add a signal to a preferences stage share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.stage.contract import check_preferences
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of, read_manifest, write_manifest


def load_pairs(path_or_id: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A preferences stage whose ids are this tokenizer's: by its manifest, or where it has none by its rows' text.

    Raises:
        ContractError: as `load_stage` and `check_preferences`.
    """
    rows = load_stage(path_or_id, split=split, stage="preferences", tokenizer=tokenizer)
    if manifest_of(rows) is None:
        check_preferences(rows, tokenizer)
    return rows


def report_rate(output_dir: str | Path, columns: Sequence[str], model_tokens: str | None = None) -> None:
    """Add the number of scored tokens, and those of a second of work, to a finished stage's manifest, and print them.

    Args:
        columns: the signal's columns, one list a side; several signals of one completion count once.
        model_tokens: column with the tokens that went through the model, if the rows have it.
    """
    manifest = read_manifest(output_dir)
    if not manifest["rows"]:
        return
    rows = load_stage(output_dir).with_format("arrow")
    lists = rows.select_columns(list(columns)).iter(batch_size=1000)
    scored = sum(pc.sum(pc.list_value_length(column)).as_py() for table in lists for column in table.columns)
    counts = {"scored_tokens": scored}
    if model_tokens is not None:
        tables = rows.select_columns([model_tokens]).iter(batch_size=1000)
        counts["model_tokens"] = sum(pc.sum(table[model_tokens]).as_py() for table in tables)
    seconds = max(manifest["seconds"], 1e-3)
    rate = scored / seconds
    write_manifest(output_dir, {**manifest, **counts, "tokens_per_second": round(rate, 1)})
    through = f" ({counts['model_tokens'] / seconds:,.0f} through the model)" if model_tokens is not None else ""
    print(f"{scored:,} tokens scored, {rate:,.0f} a second of work{through}; {output_dir}")
