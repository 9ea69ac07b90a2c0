"""From a public problem set to the contract's problem columns: what the builders in `data/` share.

A builder opens its source (`open_source`) and turns one row into `answer` and perhaps `solution`; `build_problems` does
the rest: prompts, ids, the validation split by hash of the question, parquet shards with a manifest, the dataset card.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, concatenate_datasets, get_dataset_config_names, load_dataset

from tokalign.data.card import write_dataset_card
from tokalign.internals.datasets import DatasetNotFoundError
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.processes import process_state

_COLUMNS = {
    "id": "source, split and row",
    "prompt": "what the model reads",
    "answer": "the final answer, or the right document as JSON text",
    "accepted": "all accepted answers; `answers_match` takes the list",
    "solution": "worked solution, for SFT",
    "schema": "JSON Schema of the document that `answer` is, as JSON text",
    "completion": "the right document as one assistant message, for SFT",
}


@dataclass
class ProblemArguments:
    """Options that every problem builder has."""

    source: str = field(metadata={"help": "Hub id, a .jsonl file, or a folder with train.jsonl and/or test.jsonl."})
    output_dir: str = field(metadata={"help": "Folder to write to: one folder a split, and the dataset card."})
    prompt_style: str = field(
        default="string", metadata={"help": "'string' (question and a newline) or 'messages' (one user message)."}
    )
    instruction: str = field(default="", metadata={"help": "Text put on its own line after the question."})
    validation_share: float = field(
        default=0.0,
        metadata={"help": "Share of train questions for a validation split, by hash of the text."},
    )

    def __post_init__(self) -> None:
        if self.prompt_style not in ("string", "messages"):
            raise ContractError(f"--prompt_style is {self.prompt_style!r}; use 'string' or 'messages'.")
        if not 0 <= self.validation_share < 1:
            raise ContractError(f"--validation_share is {self.validation_share}; use a number from 0 up to 1.")


def open_source(source: str, config: str | None = None) -> dict[str, Dataset]:
    """Splits of a `.jsonl` file (its name gives the split), of a folder of them, or of a dataset on the hub.

    Args:
        source: path or hub id.
        config: the hub dataset's configuration; None takes all of them, one after the other.

    Raises:
        ContractError: nothing there, or a line that is not a JSON object (named with its number).
    """
    path = Path(source)
    if path.is_file() or (path.is_dir() and any(path.glob("*.jsonl"))):
        files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
        for file in files:
            _check_lines(file)
        return {_split_name(file): load_dataset("json", data_files=str(file), split="train") for file in files}
    try:
        configs = [config] if config else get_dataset_config_names(source)
        parts = [load_dataset(source, name) for name in configs]
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ContractError(
            f"{source} is neither a .jsonl file, a folder with .jsonl files, nor a dataset on the hub that can be read "
            f"({type(error).__name__}); check --source."
        ) from error
    assert all(isinstance(part, DatasetDict) for part in parts)
    return {split: concatenate_datasets([part[split] for part in parts if split in part]) for split in parts[0]}


def _split_name(file: Path) -> str:
    return next((split for split in ("train", "validation", "test") if split in file.stem), file.stem)


def _check_lines(file: Path) -> None:
    # `load_dataset` names neither the line nor, for a row that is not an object, the file
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fault = None if isinstance(json.loads(line), dict) else "is not a JSON object"
            except json.JSONDecodeError as error:
                fault = f"is not JSON ({error.msg} at column {error.colno})"
            if fault:
                raise ContractError(f"Line {number} of {file} {fault}; repair or remove it.")


def column(rows: Dataset, names: tuple[str, ...], where: str) -> str:
    """The first of `names` that the rows have; `ContractError` naming all of them if there is none."""
    for name in names:
        if name in rows.column_names:
            return name
    there = ", ".join(name for name in rows.column_names if name != "_row")
    raise ContractError(f"{where} has columns {there} but none of {', '.join(names)}; rename one of them.")


def _in_validation(question: str, share: float) -> bool:
    """Decided by the question's words alone, so that a repeated question is never on both sides."""
    identity = " ".join(question.split()).casefold().encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") < share * 2**64


def _prompt(question: str, args: ProblemArguments) -> str | list[dict[str, str]]:
    content = f"{question}\n{args.instruction}" if args.instruction else question
    return content + "\n" if args.prompt_style == "string" else [{"role": "user", "content": content}]


def build_problems(
    name: str,
    splits: Mapping[str, Dataset],
    convert: Callable[[dict[str, Any], str], dict[str, Any] | Dropped],
    args: ProblemArguments,
    *,
    title: str,
    licence: str,
    question: tuple[str, ...] = ("question", "problem"),
    notes: str = "",
) -> dict[str, dict[str, Any]]:
    """Write every split as a problems stage with its manifest, and the dataset card.

    Args:
        name: prefix of the ids.
        splits: the source's splits.
        convert: source row and split name -> `answer` and further columns, or `Dropped(reason)`.
        args: the builder's arguments; all but `output_dir` are recorded in the manifests.
        title, licence, notes: for the card.
        question: names that the question's column may have.

    Returns:
        The manifest of each split. Rows without a question are dropped and counted like those `convert` drops.
    """
    parameters = {key: value for key, value in asdict(args).items() if key != "output_dir"}
    manifests: dict[str, dict[str, Any]] = {}
    columns: dict[str, str] = {}
    for split, rows, source_split in _with_validation(splits, question, args):
        asked = column(rows, question, f"Split {source_split} of {args.source}")

        def job(
            batch: list[dict[str, Any]], asked: str = asked, source_split: str = source_split
        ) -> Iterator[dict[str, Any] | Dropped]:
            for row in batch:
                if not isinstance(row[asked], str) or not row[asked].strip():
                    yield Dropped("no question")
                    continue
                made = convert(row, source_split)
                yield (
                    made
                    if isinstance(made, Dropped)
                    else {
                        "id": row["id"],
                        "prompt": _prompt(row[asked].strip(), args),
                        **made,
                    }
                )

        kept = rows.remove_columns([c for c in ("id",) if c in rows.column_names])
        kept = kept.rename_column("_row", "id")
        kept = kept.map(lambda row, s=source_split: {"id": f"{name}-{s}-{row['id']}"}, desc=f"Ids of {split}")
        manifest = run_job(
            job,
            kept,
            Path(args.output_dir) / split,
            name=f"{name} problems",
            parameters={**parameters, "split": split},
            shard_size=4096,
        )
        manifests[split] = manifest
        part = next(iter(sorted((Path(args.output_dir) / split).glob("*.parquet"))))
        columns |= {c: _COLUMNS.get(c, "as in the source") for c in pq.read_schema(part).names}
    if not process_state().is_main_process:
        return manifests
    write_dataset_card(
        args.output_dir,
        title=title,
        source=args.source,
        licence=licence,
        columns=columns,
        splits={split: manifest["rows"] for split, manifest in manifests.items()},
        command=shlex.join(["python", *sys.argv]),
        notes=notes,
    )
    return manifests


def _with_validation(
    splits: Mapping[str, Dataset], question: tuple[str, ...], args: ProblemArguments
) -> Iterator[tuple[str, Dataset, str]]:
    """`(split to write, rows with their number in the source as `_row`, split of the source)`."""
    if args.validation_share and ("train" not in splits or "validation" in splits):
        raise ContractError(
            f"--validation_share needs a train split and no validation split, but {args.source} has "
            f"{', '.join(splits)}; leave the option out."
        )
    for split, rows in splits.items():
        numbered = rows.add_column("_row", [str(i) for i in range(len(rows))])
        if split != "train" or not args.validation_share:
            yield split, numbered, split
            continue
        asked = column(rows, question, f"Split {split} of {args.source}")
        for name, wanted in (("train", False), ("validation", True)):
            part = numbered.filter(
                lambda text, wanted: _in_validation(text or "", args.validation_share) is wanted,
                input_columns=asked,
                fn_kwargs={"wanted": wanted},
            )
            yield name, part, split
