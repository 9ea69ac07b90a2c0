"""Build problems from your own rows: any JSON lines, parquet or hub id with a prompt and an answer in each.

    tokalign data problems --source my_rows.jsonl --output_dir runs/mine
    tokalign data problems --source my_rows.jsonl --prompt_column question --answer_column solution \\
        --answer_after '####' --solution_column solution --output_dir runs/mine
    tokalign data problems --source documents.jsonl --schema_column schema --output_dir runs/documents

A prompt is text or messages. An answer is taken as it is, or read out of a longer text: what follows `--answer_after`,
or what `--extract_answers` finds by the rules of docs/answers.md. With `--schema_column` the problems are structured:
answer and schema are JSON, as text or as it stands in a JSON line; `completion` is the answer as a message, for SFT.
What the chat template is to be given besides, the columns `tools` and `chat_template_kwargs`, is kept.

Splits are kept: those of the hub's data set, or the files train, validation and test of a folder; one file is "train".
Dropped and counted in the manifest: rows without a prompt, an answer, or an id where a column names it, and rows whose
answer breaks its schema. For prompts without answers there is `tokalign data ultrafeedback --source …`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import jsonschema_rs
import pyarrow as pa
from datasets import Dataset, Features, Value

from tokalign.data.problems import ProblemArguments, build_problems, open_source, read_files, read_lines, source_files
from tokalign.data.structured import assistant, json_text
from tokalign.prompts import TEMPLATE_COLUMNS
from tokalign.rewards import extract_answer
from tokalign.stage.contract import first_repeated
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

_CHUNK = 1000  # lines in memory at a time


@dataclass
class OwnProblemsArguments(ProblemArguments):
    """What to build, and which column holds what."""

    prompt_style: str = field(
        default="messages", metadata={"help": "Of prompts that are text: 'messages' (one user message) or 'string'."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Text, or messages."})
    answer_column: str = field(default="answer", metadata={"help": "The answer, or a text that ends with it."})
    answer_after: str | None = field(
        default=None, metadata={"help": "The answer is what follows the last of these in its column, e.g. '####'."}
    )
    extract_answers: bool = field(
        default=False, metadata={"help": "The answer is the one that its column's text states (docs/answers.md)."}
    )
    schema_column: str | None = field(default=None, metadata={"help": "JSON Schema of the document that answers."})
    solution_column: str | None = field(default=None, metadata={"help": "Worked solution, for SFT."})
    id_column: str | None = field(default=None, metadata={"help": "Names the row; unset is split and number."})
    licence: str = field(default="unknown", metadata={"help": "The hub's name of the rows' licence, for the card."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_after is not None and self.extract_answers:
            raise ContractError("--answer_after and --extract_answers both say where the answer is; choose one.")

    def columns(self) -> dict[str, str]:
        """The source's column by what it holds; `own_id` is the id, since the builder's rows get one of their own."""
        given = {name: getattr(self, f"{name}_column") for name in ("prompt", "answer", "schema", "solution")}
        return {name: column for name, column in {**given, "own_id": self.id_column}.items() if column is not None}


def _open(args: OwnProblemsArguments) -> dict[str, Dataset]:
    """The source's splits with the columns that the arguments name, called by what they hold."""
    files = source_files(args.source)
    if files and all(file.suffix != ".parquet" for parts in files.values() for file in parts):
        return {split: _from_lines(parts, args) for split, parts in files.items()}
    splits, columns = {}, args.columns()
    opened = {split: read_files(parts) for split, parts in files.items()} or open_source(args.source)
    for split, rows in opened.items():
        _check_columns(columns, rows.column_names, f"Split {split} of {args.source}")
        columns = args.columns() | {name: name for name in TEMPLATE_COLUMNS if name in rows.column_names}
        # not renamed: one column may hold two things, such as the answer at the end of the solution
        splits[split] = rows.map(
            lambda row, columns=columns: {name: row[column] for name, column in columns.items()},
            remove_columns=[name for name in rows.column_names if name not in columns],
        ).select_columns(list(columns))
    return splits


def _from_lines(files: list[Path], args: OwnProblemsArguments) -> Dataset:
    """JSON lines, all but the prompt as text: `load_dataset` fills every object up with the keys of all the others.

    They are read twice, since what a column holds is known after the last line, and are on disk after that.
    """
    columns, where = args.columns(), " and ".join(map(str, files))
    there: set[str] = set()
    kinds: set[type] = set()
    schemas: list[pa.Schema] = []
    lines = chain.from_iterable(map(read_lines, files))
    while part := list(islice(lines, _CHUNK)):
        there.update(*part)
        kinds |= {type(row.get(args.prompt_column)) for row in part} - {type(None)}
        if len(kinds) > 1:
            raise ContractError(
                f"`{args.prompt_column}` of {where} is text in some rows and not in others; use one kind."
            )
        schemas.append(_arrow([{name: row.get(column) for name, column in _objects(columns)} for row in part], where))
    _check_columns(columns, there, where)
    columns |= {name: name for name in TEMPLATE_COLUMNS if name in there}
    try:
        objects = Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
    except pa.ArrowException as error:
        raise ContractError(f"{where} cannot be read as rows ({error}); write all prompts alike.") from None
    features = Features({name: objects.get(name, Value("string")) for name in columns})
    # what `datasets` made of a file it keeps, by these arguments: so they change with the file
    versions = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    source = {"files": files, "columns": columns, "versions": versions}
    return cast(Dataset, Dataset.from_generator(_rows, features=features, gen_kwargs=source))


def _rows(files: list[Path], columns: dict[str, str], versions: Any) -> Iterator[dict[str, Any]]:
    keep = dict(_objects(columns))
    for row in chain.from_iterable(map(read_lines, files)):
        values = {name: row.get(column) for name, column in columns.items()}
        yield {name: value if name in keep else _text(value) for name, value in values.items()}


def _objects(columns: dict[str, str]) -> list[tuple[str, str]]:
    """The columns, by what they hold, that stay objects."""
    return [("prompt", columns["prompt"]), ("chat_template_kwargs", "chat_template_kwargs")]


def _arrow(rows: list[dict[str, Any]], where: str) -> pa.Schema:
    try:
        return pa.Table.from_pylist(rows).schema
    except pa.ArrowException as error:
        raise ContractError(f"{where} cannot be read as rows ({error}); write all prompts alike.") from None


def _check_columns(columns: dict[str, str], there: Iterable[str], where: str) -> None:
    for name, column in columns.items():
        if column not in (there := sorted(there)):
            option = "id" if name == "own_id" else name
            raise ContractError(f"{where} has columns {', '.join(there)} but no `{column}`; set --{option}_column.")


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json_text(value)


def _check_ids(splits: dict[str, Dataset], column: str) -> None:
    for split, rows in splits.items():
        if (pair := first_repeated(rows, "own_id")) is not None:
            raise ContractError(
                f"Row {pair[1]} of split {split}: `{column}` {rows[pair[1]]['own_id']!r} occurs twice, first in row "
                f"{pair[0]}; give every row its own, or leave --id_column out."
            )


def _structured(schema: str | None, answer: str) -> dict[str, Any] | Dropped:
    """The further columns of a structured problem, or why it is none."""
    if schema is None:
        return Dropped("no schema")
    try:
        validator = jsonschema_rs.validator_for(json.loads(schema), offline=True)
    except (ValueError, jsonschema_rs.ValidationError):
        return Dropped("schema does not compile")
    try:
        document = json.loads(answer)
    except ValueError:
        return Dropped("answer is not JSON")
    if not validator.is_valid(document):
        return Dropped("answer breaks its schema")
    return {"schema": schema, "completion": assistant(answer)}


def main(args: OwnProblemsArguments) -> None:
    """Write every split of the source, and the card."""
    splits = _open(args)
    if args.id_column is not None:
        _check_ids(splits, args.id_column)

    def convert(row: dict, split: str) -> dict | Dropped:
        answer = _text(row["answer"])
        if answer is not None and args.answer_after is not None:
            _, mark, answer = answer.rpartition(args.answer_after)
            answer = answer if mark else None
        elif answer is not None and args.extract_answers:
            answer = extract_answer(answer)
        if answer is None or not answer.strip():
            return Dropped("no answer")
        made: dict[str, Any] = {"answer": answer.strip()}
        made |= {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
        if "own_id" in row:
            if row["own_id"] is None:
                return Dropped("no id")
            made["id"] = str(row["own_id"])
        if "solution" in row:
            made["solution"] = _text(row["solution"])
        if "schema" in row:
            more = _structured(_text(row["schema"]), made["answer"])
            if isinstance(more, Dropped):
                return more
            made |= more
        return made

    build_problems(
        "own",
        splits,
        convert,
        args,
        verb="problems",
        title=f"{Path(args.source).name} as tokalign problems",
        licence=args.licence,
        question=("prompt",),
    )
