"""The dataset card that a builder leaves beside its output: content, source, licence, and the command to rebuild it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData


def write_dataset_card(
    output_dir: str | Path,
    *,
    title: str,
    source: str,
    licence: str,
    columns: Mapping[str, str],
    splits: Mapping[str, int],
    command: str,
    notes: str = "",
) -> Path:
    """Write `README.md` into `output_dir`, in the hub's format, so that the folder can be uploaded as it is.

    Args:
        output_dir: the dataset's folder, with one folder of parquet files a split.
        title: name of the dataset for people.
        source: where the rows come from.
        licence: the hub's identifier of the licence of the rows ("mit", "apache-2.0", …).
        columns: what each column holds.
        splits: number of rows of each split.
        command: the command that builds the dataset again.
        notes: anything else worth knowing, in Markdown.

    Returns:
        The path of the card.
    """
    files = [{"split": split, "path": f"{split}/*.parquet"} for split in splits]
    data = DatasetCardData(
        license=licence,
        pretty_name=title,
        tags=["tokalign"],
        configs=[{"config_name": "default", "data_files": files}],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", "", f"Source: {source}. Licence: {licence}.", ""]
    lines += ["| split | rows |", "|---|---|", *(f"| {split} | {rows:,} |" for split, rows in splits.items()), ""]
    lines += ["| column | content |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in columns.items()), ""]
    lines += [
        "Built by",
        "```",
        command,
        "```",
        "What was dropped, and why, is counted in each split's `manifest.json`.",
    ]
    if notes:
        lines += ["", notes]
    path = Path(output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    DatasetCard("\n".join(lines) + "\n").save(path)
    return path


def command_of(verb: str, arguments: Any) -> str:
    """The command that `arguments`, a dataclass, are read from; options at their default are left out."""
    words = ["tokalign", *verb.split()]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if value is None or value == default:
            continue
        texts = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        words += [f"--{option.name}", *([texts[0].lower()] if isinstance(value, bool) else texts)]
    return shlex.join(words)
