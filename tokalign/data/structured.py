"""What the builders of structured problems share: how a document is asked for, JSON text, shards and the card.

A structured problem has `id`, `prompt` (messages), `answer` (JSON text of the reference), `schema` (JSON text of the
JSON Schema) and for SFT `completion` (messages). See `docs/data_contract.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from tokalign.data.card import command_of, write_dataset_card
from tokalign.data.problems import refuse_nothing
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.processes import process_state

COLUMNS = {
    "id": "names the row",
    "prompt": "the request, as messages",
    "answer": "the right document, as JSON text",
    "schema": "JSON Schema of the document, as JSON text",
    "completion": "the right answer, as one assistant message, for SFT",
}


@dataclass(kw_only=True)
class SchemaPromptArguments:
    """How a document is asked for."""

    instruction: str = field(
        default="Answer with one JSON document and nothing else.",
        metadata={"help": "Line after the request; '' leaves it out."},
    )
    show_schema: bool = field(default=True, metadata={"help": "Whether a line of the prompt shows the JSON Schema."})


def json_text(value: Any) -> str:
    """A document as every builder writes it: one line, keys in the order they have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def ask(request: str, schema: Mapping[str, Any], args: SchemaPromptArguments) -> str:
    """The request, then the instruction and the schema, each on a line of its own."""
    shown = f"JSON Schema: {json_text(schema)}" if args.show_schema else ""
    return "\n".join(line for line in (request, args.instruction, shown) if line)


def user(content: str) -> list[dict[str, str]]:
    """A prompt of one message."""
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict[str, str]]:
    """A completion of one message."""
    return [{"role": "assistant", "content": content}]


def write_structured(
    name: str,
    splits: Mapping[str, Sequence[dict[str, Any]]],
    convert: Callable[[dict[str, Any]], dict[str, Any] | Dropped],
    args: Any,
    *,
    title: str,
    source: str,
    licence: str,
    columns: Mapping[str, str],
    notes: str = "",
) -> dict[str, dict[str, Any]]:
    """Write every split as a structured stage with its manifest, and the dataset card.

    Args:
        name: of the problems, for the manifest.
        splits: rows with an `id`, by split; a split without rows is not written.
        convert: row -> structured problem, or `Dropped(reason)`.
        args: the builder's arguments; all but `output_dir` are recorded in the manifests.
        title, source, licence, notes: for the card.
        columns: what columns hold that `COLUMNS` does not know, or knows as something else.

    Returns:
        The manifest of each split.
    """
    parameters = {key: value for key, value in asdict(args).items() if key != "output_dir"}
    manifests = {}
    written: dict[str, str] = {}

    def job(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any] | Dropped]:
        return map(convert, batch)

    for split, rows in splits.items():
        if not rows:
            continue
        folder = Path(args.output_dir) / split
        manifests[split] = run_job(
            job,
            Dataset.from_list(list(rows)),
            folder,
            name=f"{name} problems",
            parameters={**parameters, "split": split},
            shard_size=4096,
        )
        names = pq.read_schema(next(iter(sorted(folder.glob("*.parquet"))))).names
        written |= {column: {**COLUMNS, **columns}[column] for column in names}
    refuse_nothing(manifests, source)
    if process_state().is_main_process:
        write_dataset_card(
            args.output_dir,
            title=title,
            source=source,
            licence=licence,
            columns=written,
            splits={split: manifest["rows"] for split, manifest in manifests.items()},
            command=command_of(f"data {name}", args),
            notes=notes,
        )
    return manifests
