"""From a problem set to the contract's problem columns: what the builders in `tokalign/data/builders/` share.

A builder opens its source (`open_source`) and turns one row into `answer` and perhaps `solution`; `build_problems` does
the rest: prompts, ids, the validation split by hash of the question, parquet shards with a manifest, the dataset card.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, concatenate_datasets, get_dataset_config_names, load_dataset
from transformers import PreTrainedTokenizerBase

from tokalign.data.card import command_of, write_dataset_card
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
    "completion": "the solution, or the right document, as the model is to write it, for SFT",
    "steps": "the steps of the completion, one a line of it",
    "step_spans": "characters of the completion that each step is, from and to",
    "step_tokens": "of each step the indices of its tokens in `completion_ids`",
    "first_wrong": "number of the first wrong step from 0, −1 where none is wrong",
    "rectified": "the first wrong step as it should be, empty where nobody wrote it",
    "question": "the same for all solutions of one question",
    "generator": "who wrote the solution",
}


@dataclass
class ProblemArguments:
    """Options that every problem builder has."""

    source: str = field(
        metadata={"help": "Hub id, a .jsonl or .parquet file, or a folder with train.jsonl and/or test.jsonl."}
    )
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
    """Splits of a `.jsonl` or `.parquet` file, of a folder of them (`source_files`), or of a dataset on the hub.

    Args:
        source: path or hub id.
        config: the hub dataset's configuration; None takes all of them, one after the other.

    Raises:
        ContractError: nothing there, or a line that is not a JSON object (named with its number).
    """
    if files := source_files(source):
        return {split: read_files(parts) for split, parts in files.items()}
    try:
        configs = [config] if config else get_dataset_config_names(source)
        parts = [load_dataset(source, name) for name in configs]
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ContractError(
            f"{source} is neither a .jsonl or .parquet file, a folder of them, nor a dataset on the hub that can be "
            f"read ({type(error).__name__}); check --source."
        ) from error
    assert all(isinstance(part, DatasetDict) for part in parts)
    names = dict.fromkeys(str(split) for part in parts for split in part)
    return {split: concatenate_datasets([part[split] for part in parts if split in part]) for split in names}


# The words in a file's name that say its split, as `datasets.load_dataset` reads them.
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def source_files(source: str) -> dict[str, list[Path]]:
    """The files of a local source by split; nothing where `source` is neither a file nor a folder with such files.

    A single file may have any name, and is "train" if the name says no split. In a folder the files are splits whose
    names say so; others, such as a set of examples beside the data, are left alone and named on screen.

    Raises:
        ContractError: files of both kinds, or several files, and no name says a split.
    """
    path = Path(source)
    if path.is_file():
        return {_split_of(path) or "train": [path]}
    files = sorted(path.glob("*.jsonl"))
    if parquet := sorted(path.glob("*.parquet")):
        if files:
            raise ContractError(
                f"{source} holds .jsonl and .parquet files, such as {files[0].name} and {parquet[0].name}; keep one "
                "kind in it, or give one file as --source."
            )
        files = parquet
    if len(files) == 1:
        return {_split_of(files[0]) or "train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file) or "", []).append(file)
    others = ", ".join(file.name for file in splits.pop("", []))
    if files and not splits:
        raise ContractError(
            f"No file of {source} says its split by its name ({others}); call them train, validation or test, or give "
            "one file as --source."
        )
    if others and process_state().is_main_process:
        print(f"{source}: left alone, as the name says no split: {others}")
    return splits


def _split_of(file: Path) -> str | None:
    """The split that a file's name says: "gsm8k_train.jsonl", or a hub's "test_prefs-00000-of-00001.parquet"."""
    if part := re.fullmatch(r"(\w+)-\d{5}-of-\d{5}", file.stem):
        return part[1]
    words = set(re.split(r"[-._ \d]+", file.stem.casefold()))
    return next((split for split, known in _SPLITS.items() if words & known), None)


def read_files(files: list[Path], cache_dir: str | None = None) -> Dataset:
    """The rows of a split's files, which are all of one kind."""
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    # `load_dataset` names neither the line nor, for a row that is not an object, the file, and no reason for no row
    if kind == "json" and not sum(1 for file in files for _ in read_lines(file)):
        raise ContractError(f"{' and '.join(map(str, files))} holds no row; check --source.")
    return load_dataset(kind, data_files=[str(file) for file in files], split="train", cache_dir=cache_dir)


def read_lines(file: Path, needed: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; `ContractError` naming a line that is none or lacks a `needed` key."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {file}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fault = f"is not JSON ({error.msg} at column {error.colno})"
                raise ContractError(f"{where} {fault}; repair or remove it.") from None
            if not isinstance(row, dict):
                raise ContractError(f"{where} is not a JSON object; repair or remove it.")
            if missing := [name for name in needed if name not in row]:
                raise ContractError(f"{where} has no `{missing[0]}`; repair or remove it.")
            yield row


def column(rows: Dataset, names: tuple[str, ...], where: str) -> str:
    """The first of `names` that the rows have; `ContractError` naming all of them if there is none."""
    for name in names:
        if name in rows.column_names:
            return name
    there = ", ".join(name for name in rows.column_names if name != "_row")
    raise ContractError(f"{where} has columns {there} but none of {', '.join(names)}; rename one of them.")


def _words(question: Any) -> str:
    """The words of a question, which is text or messages; "" where it is neither."""
    if isinstance(question, list):
        question = " ".join(str(message.get("content") or "") for message in question)
    return " ".join(question.split()) if isinstance(question, str) else ""


def _in_validation(question: Any, share: float) -> bool:
    """Decided by the question's words alone, so that a repeated question is never on both sides."""
    identity = _words(question).casefold().encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "big") < share * 2**64


def prompt_of(question: str | list[dict[str, str]], args: ProblemArguments) -> str | list[dict[str, str]]:
    """The prompt of a question; one that is messages already keeps them, the instruction after the last of them."""
    if isinstance(question, list):
        *before, last = question
        return (
            [*before, {**last, "content": f"{last['content']}\n{args.instruction}"}] if args.instruction else question
        )
    content = f"{question.strip()}\n{args.instruction}" if args.instruction else question.strip()
    return content + "\n" if args.prompt_style == "string" else [{"role": "user", "content": content}]


def written(solution: str, args: ProblemArguments) -> str | list[dict[str, str]]:
    """A worked solution as the model is to write it: a text, or one message where the prompt is messages."""
    return solution if args.prompt_style == "string" else [{"role": "assistant", "content": solution}]


def build_problems(
    name: str,
    splits: Mapping[str, Dataset],
    convert: Callable[[dict[str, Any], str], dict[str, Any] | Dropped],
    args: ProblemArguments,
    *,
    title: str,
    licence: str,
    question: tuple[str, ...] = ("question", "problem"),
    verb: str | None = None,
    notes: str = "",
    split_already: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write every split as a problems stage with its manifest, and the dataset card.

    Args:
        name: prefix of the ids.
        splits: the source's splits.
        convert: source row and split name -> `answer` and further columns, or `Dropped(reason)`.
        args: the builder's arguments; all but `output_dir` are recorded in the manifests.
        title, licence, notes: for the card.
        question: names that the question's column may have.
        verb: of `tokalign data`, where it is not `name`.
        split_already: the builder has taken `validation_share` itself, by something else than the question.
        tokenizer, prompts: whose ids the rows hold, and how prompts were rendered, where they hold ids (`run_job`).

    Returns:
        The manifest of each split. Rows without a question are dropped and counted like those `convert` drops.
    """
    parameters = {key: value for key, value in asdict(args).items() if key != "output_dir"}
    manifests: dict[str, dict[str, Any]] = {}
    columns: dict[str, str] = {}
    for split, rows, source_split in _with_validation(
        splits, question, args, 0.0 if split_already else args.validation_share
    ):
        asked = column(rows, question, f"Split {source_split} of {args.source}")

        def job(
            batch: list[dict[str, Any]], asked: str = asked, source_split: str = source_split
        ) -> Iterator[dict[str, Any] | Dropped]:
            for row in batch:
                made = convert(row, source_split) if _words(row[asked]) else Dropped("no question")
                if isinstance(made, Dropped):
                    yield made
                else:
                    yield {"id": row["id"], "prompt": prompt_of(row[asked], args), **made}

        kept = rows.remove_columns([c for c in ("id",) if c in rows.column_names])
        kept = kept.rename_column("_row", "id")
        kept = kept.map(lambda row, s=source_split: {"id": f"{name}-{s}-{row['id']}"}, desc=f"Ids of {split}")
        manifest = run_job(
            job,
            kept,
            Path(args.output_dir) / split,
            name=f"{name} problems",
            parameters={**parameters, "split": split},
            tokenizer=tokenizer,
            prompts=prompts,
            shard_size=4096,
        )
        manifests[split] = manifest
        for part in sorted((Path(args.output_dir) / split).glob("*.parquet"))[:1]:
            columns |= {c: _COLUMNS.get(c, "as in the source") for c in pq.read_schema(part).names}
    refuse_nothing(manifests, args.source)
    if not process_state().is_main_process:
        return manifests
    write_dataset_card(
        args.output_dir,
        title=title,
        source=args.source,
        licence=licence,
        columns=columns,
        splits={split: manifest["rows"] for split, manifest in manifests.items()},
        command=command_of(f"data {verb or name.replace('_', '-')}", args),
        notes=notes,
    )
    return manifests


def refuse_nothing(manifests: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Raise `ContractError` if a builder kept no row of any split: an empty stage would fail later and elsewhere."""
    if any(manifest["rows"] for manifest in manifests.values()):
        return
    reasons = Counter[str]()
    for manifest in manifests.values():
        reasons.update(manifest.get("dropped", {}))
    why = ", ".join(f"{count} because of {reason!r}" for reason, count in reasons.most_common()) or "there was none"
    raise ContractError(f"No row of {source} was kept ({why}); check the source and the options that say what is read.")


def _with_validation(
    splits: Mapping[str, Dataset], question: tuple[str, ...], args: ProblemArguments, share: float
) -> Iterator[tuple[str, Dataset, str]]:
    """`(split to write, rows with their number in the source as `_row`, split of the source)`."""
    if share and ("train" not in splits or "validation" in splits):
        raise ContractError(
            f"--validation_share needs a train split and no validation split, but {args.source} has "
            f"{', '.join(splits)}; leave the option out."
        )
    for split, rows in splits.items():
        numbered = rows.add_column("_row", [str(i) for i in range(len(rows))])
        if split != "train" or not share:
            yield split, numbered, split
            continue
        asked = column(rows, question, f"Split {split} of {args.source}")
        for name, wanted in (("train", False), ("validation", True)):
            part = numbered.filter(
                lambda question, wanted: _in_validation(question, share) is wanted,
                input_columns=asked,
                fn_kwargs={"wanted": wanted},
            )
            yield name, part, split
