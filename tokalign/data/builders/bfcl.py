"""Build the Berkeley Function-Calling Leaderboard's `simple_python` (v4, Apache-2.0) as structured problems.

    tokalign data bfcl --source folder --output_dir runs/bfcl
    tokalign data bfcl --questions BFCL_v4_simple_python.json --answers possible_answer/BFCL_v4_simple_python.json \\
        --output_dir runs/bfcl

A row is a request and one function. `schema` is the JSON Schema of the call `{"name": …, "arguments": {…}}`, `answer`
the call with the list of allowed values of each argument, as the leaderboard gives them ("" among them: the argument
may be left out; inside an object every value is such a list too), `completion` the call with the first allowed value of
each that its schema takes. `StructuredReward(output_format="tool_call", references="allowed")` scores it.

The leaderboard's types are mapped at any depth ("dict" object, "float" number, "tuple" array, "any" no type), an object
with properties takes no others, and what JSON Schema does not know ("optional") or what is wrong (a default of another
type) is left out. `--prompt_tools inline` puts the function into the user's message; `column` writes it to the column
`tools` instead (JSON text, OpenAI's form), which sampling, scoring, every training and evaluation hand to the chat
template. Not both: then the model would read it twice.

The source has one split; `--test_share` of it, by hash of the id, is the test. Dropped and counted in the manifest:
rows without an answer, with several turns, functions or calls, with a schema that does not compile, and rows whose own
answer breaks their schema (none of the 400).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs

from tokalign.data.problems import read_lines
from tokalign.data.structured import assistant, json_text, write_structured
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

FILES = ("simple_python.jsonl", "simple_python_answers.jsonl")
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
KEPT = ("description", "enum", "required")
NOTHING = object()  # the argument is left out
CALL = '{"name": …, "arguments": {…}}'
INSTRUCTIONS = {
    "hermes": f"Call this function. Reply with <tool_call>\n{CALL}\n</tool_call> and nothing else.",
    "json": f"Call this function. Reply with one JSON object {CALL} and nothing else.",
}


@dataclass
class BfclArguments:
    """What to build."""

    output_dir: str = field(metadata={"help": "Folder to write to: one folder a split, and the dataset card."})
    source: str | None = field(
        default=None, metadata={"help": "Folder with simple_python.jsonl and simple_python_answers.jsonl."}
    )
    questions: str | None = field(default=None, metadata={"help": "The file of requests, instead of --source."})
    answers: str | None = field(default=None, metadata={"help": "The file of allowed values, instead of --source."})
    test_share: float = field(default=0.5, metadata={"help": "Share of the rows for the test split, by hash of id."})
    call_format: str = field(
        default="hermes", metadata={"help": "'hermes' (the call between <tool_call> tags) or 'json' (the call alone)."}
    )
    prompt_tools: str = field(
        default="inline", metadata={"help": "'inline' (the function in the user's message) or 'column' (`tools`)."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Line before the function; None asks for the call format, '' leaves it out."}
    )

    def __post_init__(self) -> None:
        if self.source is None and (self.questions is None or self.answers is None):
            raise ContractError("There is nothing to read; give --source, or both --questions and --answers.")
        if not 0 <= self.test_share <= 1:
            raise ContractError(f"--test_share is {self.test_share}; use a number from 0 to 1.")
        if self.call_format not in INSTRUCTIONS:
            raise ContractError(f"--call_format is {self.call_format!r}; use 'hermes' or 'json'.")
        if self.prompt_tools not in ("inline", "column"):
            raise ContractError(f"--prompt_tools is {self.prompt_tools!r}; use 'inline' or 'column'.")
        if self.prompt_tools == "column" and self.instruction:
            raise ContractError("--instruction needs --prompt_tools inline; with 'column' the chat template instructs.")


# ------------------------------------------------------------------------------------------------------------- reading


def read_rows(args: BfclArguments) -> Iterator[dict[str, str]]:
    """The requests with their answers, everything but the id as JSON text ("null" where there is no answer)."""
    folder = Path(args.source or "")
    questions = Path(args.questions) if args.questions else folder / FILES[0]
    answers = Path(args.answers) if args.answers else folder / FILES[1]
    for file in (questions, answers):
        if not file.exists():
            raise ContractError(f"{file} does not exist; check --source, or give --questions and --answers.")
    # Not by `load_dataset`: allowed values of many types in one list have no column type.
    truth = {row["id"]: row["ground_truth"] for row in read_lines(answers, ("id", "ground_truth"))}
    for row in read_lines(questions, ("id", "question", "function")):
        made = {"question": row["question"], "function": row["function"], "truth": truth.get(row["id"])}
        yield {"id": str(row["id"]), **{name: json_text(value) for name, value in made.items()}}


def in_test(row_id: str, share: float) -> bool:
    """Decided by the id alone, so that a row stays on its side whatever else the file holds."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "big") < share * 2**64


# ------------------------------------------------------------------------------------------------ schemas and answers


def json_schema(given: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a parameter as the leaderboard describes it."""
    made: dict[str, Any] = {}
    if "type" in given and given["type"] != "any":
        made["type"] = TYPES.get(given["type"], given["type"])
    made |= {key: given[key] for key in KEPT if key in given}
    if "items" in given:
        made["items"] = json_schema(given["items"])
    if "properties" in given:
        made["properties"] = {name: json_schema(inner) for name, inner in given["properties"].items()}
    if made.get("properties"):
        # an object without properties is one whose keys the request decides
        made["additionalProperties"] = False
    if "default" in given and jsonschema_rs.validator_for(made, offline=True).is_valid(given["default"]):
        made["default"] = given["default"]
    return made


def call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a call of the function."""
    # without properties of its own a function takes no arguments
    arguments = {**parameters, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def first_allowed(values: list[Any], schema: dict[str, Any]) -> Any:
    """The first allowed value that the argument's schema takes; if it takes none, nothing where that is allowed."""
    given = [filled(value, schema) for value in values if value != ""]
    validator = jsonschema_rs.validator_for(schema, offline=True)
    return next(filter(validator.is_valid, given), NOTHING if "" in values else given[0])


def filled(value: Any, schema: dict[str, Any]) -> Any:
    """A value with every object in it, whose values are lists of allowed ones, as the object of the first allowed."""
    if isinstance(value, list):
        return [filled(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    return arguments_of(value, schema)


def arguments_of(allowed: dict[str, list[Any]], schema: dict[str, Any]) -> dict[str, Any]:
    """First allowed value of each argument, in the schema's order; unknown ones come last."""
    properties = schema.get("properties", {})
    order = [*(name for name in properties if name in allowed), *(name for name in allowed if name not in properties)]
    made = {name: first_allowed(allowed[name], properties.get(name, {})) for name in order}
    return {name: value for name, value in made.items() if value is not NOTHING}


# ---------------------------------------------------------------------------------------------------------------- rows


def convert(row: dict[str, str], args: BfclArguments) -> dict[str, Any] | Dropped:
    """The structured problem of a row of `read_rows`, or why there is none."""
    turns, functions, truth = (json.loads(row[name]) for name in ("question", "function", "truth"))
    if truth is None:
        return Dropped("no answer")
    if len(turns) != 1 or len(functions) != 1 or len(truth) != 1:
        return Dropped("not one turn, one function and one call")
    (function,), ((called, allowed),) = functions, truth[0].items()
    name = function["name"]
    try:
        parameters = json_schema(function["parameters"])
        schema = call_schema(name, parameters)
        validator = jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ValidationError:
        return Dropped("schema does not compile")
    properties = parameters.get("properties", {})
    call = {"name": called, "arguments": arguments_of(allowed, parameters)}
    error = next(validator.iter_errors(call), None)
    if error is not None:
        return Dropped(f"answer breaks its schema ({error.kind.name})")
    text = json_text(call)
    described = {"name": name, "description": function["description"], "parameters": parameters}
    ordered = {key: allowed[key] for key in properties if key in allowed}
    made = {
        "id": row["id"],
        "prompt": turns[0],
        "answer": json_text({"name": called, "arguments": ordered}),
        "schema": json_text(schema),
        "completion": assistant(f"<tool_call>\n{text}\n</tool_call>" if args.call_format == "hermes" else text),
    }
    if args.prompt_tools == "column":
        return {**made, "tools": json_text([{"type": "function", "function": described}])}
    instruction = INSTRUCTIONS[args.call_format] if args.instruction is None else args.instruction
    *before, request = turns[0]
    lines = (request["content"], instruction, json_text(described))
    return {**made, "prompt": [*before, {**request, "content": "\n".join(filter(None, lines))}]}


def main(args: BfclArguments) -> None:
    """Write both splits, and the card."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for row in read_rows(args):
        splits["test" if in_test(row["id"], args.test_share) else "train"].append(row)
    write_structured(
        "bfcl",
        splits,
        lambda row: convert(row, args),
        args,
        title="BFCL simple_python as tokalign structured problems",
        source=args.source or f"{args.questions} and {args.answers}",
        licence="apache-2.0",
        columns={
            "answer": "the call with the list of allowed values of each argument, as JSON text",
            "schema": "JSON Schema of the call, as JSON text",
            "completion": "the call with the first allowed values, as one assistant message, for SFT",
            "tools": "the function in OpenAI's form, as JSON text, for the chat template",
        },
        notes='Berkeley Function-Calling Leaderboard. An argument with "" among its allowed values may be left out.',
    )
