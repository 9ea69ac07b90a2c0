"""Build the Berkeley Function-Calling Leaderboard's single-turn categories (v4, Apache-2.0) as structured problems.

    tokalign data bfcl --source folder --output_dir runs/bfcl
    tokalign data bfcl --source folder --categories live_simple live_multiple parallel --output_dir runs/bfcl
    tokalign data bfcl --questions BFCL_v4_simple_python.json --answers possible_answer/BFCL_v4_simple_python.json \\
        --output_dir runs/bfcl

The categories are simple_python, simple_java, simple_javascript, multiple, parallel and parallel_multiple, and of user
requests live_simple, live_multiple, live_parallel and live_parallel_multiple.

A row is a request and one or several functions. `schema` is the JSON Schema of the call `{"name": …, "arguments": {…}}`
(of any of the functions), or of a list of calls where the answer is several. `answer` is what the leaderboard allows,
in the form of `tokalign.rewards.structured.calls`: each argument's allowed values ("" among them: it may be left out;
inside an object every value is such a list too) and the declared types. `completion` is the call, or the calls, with
the first allowed value of each argument that the declared type takes.
`StructuredReward(output_format="tool_call", references="allowed")` scores it, and `tokalign evaluate structured` gives
the leaderboard's AST accuracy as `exact_match`.

The leaderboard's types are mapped at any depth ("dict" object, "float" number, "tuple" array, "any" no type), an object
with properties takes no others, and what JSON Schema does not know ("optional") or what is wrong (a default of another
type) is left out. The functions of `simple_java` and `simple_javascript` take every argument as source text, as the
leaderboard asks for them. Where an allowed value breaks the declared type, null for instance, or its enumeration,
`schema` allows that type, or any value of the type; the function that the model reads stays as declared.

`--prompt_tools inline` puts the functions into the user's message; `column` writes them to the column `tools` instead
(JSON text, OpenAI's form), which sampling, scoring, every training and evaluation hand to the chat template. Not both:
then the model would read them twice.

`irrelevance` and `live_irrelevance` (right without any call) and `live_relevance` (right with any) are refused: the
leaderboard publishes no call for them, so there is no document that a completion could agree with. The categories of
several turns need the leaderboard's own tools to run.

The source has one split; `--test_share` of it, by hash of the id, is the test. Dropped and counted in the manifest:
rows without an answer, with several turns, with a schema that does not compile, and rows that the leaderboard's own
checker can never pass, because the answer calls an unknown function, has an argument that the function does not have,
or lacks one that it requires. An empty list of allowed values (of arrays, in two rows) means an empty array.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs

from tokalign.data.problems import read_lines
from tokalign.data.structured import assistant, json_text, write_structured
from tokalign.rewards.structured.literals import Language, Type, write_literal
from tokalign.rewards.structured.shapes import type_of
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
WITHOUT_CALLS = ("irrelevance", "live_irrelevance", "live_relevance")
# Requests and answers of a category: one folder of JSON lines, or as the leaderboard publishes them.
LAYOUTS = (
    ("{}.jsonl", "{}_answers.jsonl"),
    ("BFCL_v4_{}.json", "possible_answer/BFCL_v4_{}.json"),
)
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
LANGUAGES: dict[str, Language] = {"simple_javascript": "javascript", "simple_java": "java"}
LANGUAGE_NAMES = {"java": "Java", "javascript": "JavaScript"}
KEPT = ("description", "enum", "required")
NOTHING = object()  # the argument is left out
CALL = '{"name": …, "arguments": {…}}'
# By call format, of one call and of several.
REPLIES = {
    "hermes": (
        f"Reply with <tool_call>\n{CALL}\n</tool_call> and nothing else.",
        f"Reply with <tool_call>\n{CALL}\n</tool_call> for each call and nothing else.",
    ),
    "json": (
        f"Reply with one JSON object {CALL} and nothing else.",
        f"Reply with one JSON list of calls {CALL} and nothing else.",
    ),
}


@dataclass
class BfclArguments:
    """What to build."""

    output_dir: str = field(metadata={"help": "Folder to write to: one folder a split, and the dataset card."})
    source: str | None = field(
        default=None,
        metadata={
            "help": "Folder with <category>.jsonl and <category>_answers.jsonl, or with BFCL_v4_<category>.json and "
            "possible_answer/."
        },
    )
    categories: list[str] = field(
        default_factory=lambda: ["simple_python"],
        metadata={
            "help": "Names of the leaderboard's single-turn categories that have answers, e.g. multiple live_simple."
        },
    )
    questions: str | None = field(default=None, metadata={"help": "The file of requests, instead of --source."})
    answers: str | None = field(default=None, metadata={"help": "The file of allowed values, instead of --source."})
    test_share: float = field(default=0.5, metadata={"help": "Share of the rows for the test split, by hash of id."})
    call_format: str = field(
        default="hermes", metadata={"help": "'hermes' (the call between <tool_call> tags) or 'json' (the call alone)."}
    )
    prompt_tools: str = field(
        default="inline", metadata={"help": "'inline' (the functions in the user's message) or 'column' (`tools`)."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Line before the functions; None asks for the call format, '' leaves it out."}
    )

    def __post_init__(self) -> None:
        if self.source is None and (self.questions is None or self.answers is None):
            raise ContractError("There is nothing to read; give --source, or both --questions and --answers.")
        if not self.categories:
            raise ContractError("--categories is empty; name at least one, or leave it out.")
        for category in self.categories:
            if category in WITHOUT_CALLS:
                raise ContractError(
                    f"--categories has {category!r}, for which the leaderboard publishes no call that a completion "
                    "could agree with; leave it out."
                )
            if category not in CATEGORIES:
                raise ContractError(f"--categories has {category!r}; use {', '.join(CATEGORIES)}.")
        if (self.questions or self.answers) and len(self.categories) != 1:
            raise ContractError("--questions and --answers are the files of one category; give --source for several.")
        if not 0 <= self.test_share <= 1:
            raise ContractError(f"--test_share is {self.test_share}; use a number from 0 to 1.")
        if self.call_format not in REPLIES:
            raise ContractError(f"--call_format is {self.call_format!r}; use 'hermes' or 'json'.")
        if self.prompt_tools not in ("inline", "column"):
            raise ContractError(f"--prompt_tools is {self.prompt_tools!r}; use 'inline' or 'column'.")
        if self.prompt_tools == "column" and self.instruction:
            raise ContractError("--instruction needs --prompt_tools inline; with 'column' the chat template instructs.")


# ------------------------------------------------------------------------------------------------------------- reading


def read_rows(args: BfclArguments) -> Iterator[dict[str, str]]:
    """The requests with their answers, everything but the id as JSON text ("null" where there is no answer)."""
    for questions, answers in _files(args):
        # Not by `load_dataset`: allowed values of many types in one list have no column type.
        truth = {row["id"]: row["ground_truth"] for row in read_lines(answers, ("id", "ground_truth"))}
        for row in read_lines(questions, ("id", "question", "function")):
            made = {"question": row["question"], "function": row["function"], "truth": truth.get(row["id"])}
            yield {"id": str(row["id"]), **{name: json_text(value) for name, value in made.items()}}


def _files(args: BfclArguments) -> Iterator[tuple[Path, Path]]:
    if args.source is None:
        pairs = [(Path(args.questions or ""), Path(args.answers or ""))]
    else:
        folder = Path(args.source)
        layout = next(
            (layout for layout in LAYOUTS if (folder / layout[0].format(args.categories[0])).exists()), LAYOUTS[0]
        )
        pairs = [(folder / layout[0].format(each), folder / layout[1].format(each)) for each in args.categories]
        if len(pairs) == 1:
            pairs = [(Path(args.questions or pairs[0][0]), Path(args.answers or pairs[0][1]))]
    for file in (file for pair in pairs for file in pair):
        if not file.exists():
            raise ContractError(f"{file} does not exist; check --source, or give --questions and --answers.")
    yield from pairs


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


def source_schema(given: dict[str, Any], language: Language) -> dict[str, Any]:
    """JSON Schema of the parameters of a Java or JavaScript function: source text each, its type in words."""
    properties = {}
    for name, inner in given["properties"].items():
        outer, items = declared_type(inner), ""
        if isinstance(outer, list):
            outer, items = outer[0], f" of {outer[1]}"
        of_type = "value of any type" if outer == "any" else f"{outer}{items}"
        words = (inner.get("description", ""), f"Written as {LANGUAGE_NAMES[language]} source text: {of_type}.")
        properties[name] = {"type": "string", "description": " ".join(filter(None, words))}
    return {"type": "object", "required": given["required"], "properties": properties, "additionalProperties": False}


def declared_type(given: dict[str, Any]) -> Type:
    """A parameter's type by the leaderboard's name; of an array with the type of its items."""
    inner = given.get("items", {}).get("type")
    return [given["type"], inner] if inner and given["type"] not in ("dict", "HashMap") else str(given["type"])


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


def widened(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The schema, with what it must also take so that all allowed values of its place are valid under it."""
    made = dict(schema)
    values = [value for value in values if value != ""]
    if "type" in made:
        others = [value for value in values if not jsonschema_rs.is_valid({"type": made["type"]}, value)]
        kinds = list(dict.fromkeys([made["type"], *map(type_of, others)]))
        made["type"] = kinds[0] if len(kinds) == 1 else kinds
    if "enum" in made:
        # Only null is added to an enumeration: another value there would tell which one is the answer.
        made["enum"] = [*made["enum"], *([None] if None in values and None not in made["enum"] else [])]
        if not all(value in made["enum"] for value in values):
            del made["enum"]
    if "items" in made:
        made["items"] = widened(made["items"], [item for value in values if isinstance(value, list) for item in value])
    objects = [{key: listed(item) for key, item in value.items()} for value in values if isinstance(value, dict)]
    if "properties" in made and objects:
        made["properties"] = {
            key: widened(inner, [value for one in objects for value in one.get(key, ())])
            for key, inner in made["properties"].items()
        }
        if any(one.keys() - made["properties"].keys() for one in objects):
            made["additionalProperties"] = True
        if "required" in made:
            kept = [all(key in one and "" not in one[key] for one in objects) for key in made["required"]]
            made["required"] = list(itertools.compress(made["required"], kept))
    return made


def listed(values: Any) -> list[Any]:
    """Allowed values as a list; some objects hold the only allowed value as it is."""
    return values if isinstance(values, list) else [values]


def first_allowed(values: list[Any], schema: dict[str, Any], needed: bool = False) -> Any:
    """The first allowed value that the argument's schema takes; if it takes none, nothing where that is allowed."""
    given = [filled(value, schema) for value in values if value != ""]
    validator = jsonschema_rs.validator_for(schema, offline=True)
    # an argument that is required, though it may be left out, is the empty text or array that the checker takes for it
    empty = ["", []] if "" in values and needed else []
    return next(filter(validator.is_valid, [*given, *empty]), NOTHING if "" in values else given[0])


def filled(value: Any, schema: dict[str, Any]) -> Any:
    """A value with every object in it, whose values are lists of allowed ones, as the object of the first allowed."""
    if isinstance(value, list):
        return [filled(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    return arguments_of({key: listed(values) for key, values in value.items()}, schema)


def arguments_of(allowed: dict[str, list[Any]], schema: dict[str, Any]) -> dict[str, Any]:
    """First allowed value of each argument, in the schema's order; unknown ones come last."""
    properties, needed = schema.get("properties", {}), schema.get("required", ())
    order = [*(name for name in properties if name in allowed), *(name for name in allowed if name not in properties)]
    made = {name: first_allowed(allowed[name], properties.get(name, {}), name in needed) for name in order}
    return {name: value for name, value in made.items() if value is not NOTHING}


# ---------------------------------------------------------------------------------------------------------------- rows


def convert(row: dict[str, str], args: BfclArguments) -> dict[str, Any] | Dropped:
    """The structured problem of a row of `read_rows`, or why there is none."""
    turns, functions, truth = (json.loads(row[name]) for name in ("question", "function", "truth"))
    if truth is None:
        return Dropped("no answer")
    if len(turns) != 1:
        return Dropped("not one turn")
    if not truth or not functions:
        return Dropped("no call or no function")
    language = next((LANGUAGES[name] for name in LANGUAGES if row["id"].startswith(name + "_")), None)
    given = {function["name"]: function for function in functions}
    references: list[dict[str, Any]] = []
    for call in truth:
        ((name, allowed),) = call.items()
        reference = reference_of(given[name], allowed, language) if name in given else "answer calls another function"
        if isinstance(reference, str):
            return Dropped(reference)
        references.append(reference)
    try:
        shown = {
            name: source_schema(function["parameters"], language) if language else json_schema(function["parameters"])
            for name, function in given.items()
        }
        schema = row_schema(shown, references)
        validator = jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ValidationError:
        return Dropped("schema does not compile")
    calls = [call_of(reference, shown[reference["name"]]) for reference in references]
    error = next(validator.iter_errors(calls if len(calls) > 1 else calls[0]), None)
    if error is not None:
        return Dropped(f"answer breaks its schema ({error.kind.name})")
    described = [
        {"name": name, "description": function["description"], "parameters": shown[name]}
        for name, function in given.items()
    ]
    made = {
        "id": row["id"],
        "prompt": turns[0],
        "answer": json_text(references if len(references) > 1 else references[0]),
        "schema": json_text(schema),
        "completion": assistant(written(calls, args.call_format)),
    }
    if args.prompt_tools == "column":
        return {**made, "tools": json_text([{"type": "function", "function": function} for function in described])}
    asked = instruction(args, len(described), len(calls))
    *before, request = turns[0]
    lines = (request["content"], asked, *map(json_text, described))
    return {**made, "prompt": [*before, {**request, "content": "\n".join(filter(None, lines))}]}


def reference_of(function: dict[str, Any], allowed: dict[str, Any], language: Language | None) -> dict[str, Any] | str:
    """An allowed call in the form of `tokalign.rewards.structured.calls`, or why the checker can never pass it."""
    parameters = function["parameters"]["properties"]
    if any(name not in parameters and "" not in values for name, values in allowed.items()):
        return "answer has an argument that its function does not have"
    required = function["parameters"].get("required", [])
    if any(name not in allowed for name in required):
        return "answer lacks an argument that its function requires"
    if any(values == [] and parameters[name]["type"] != "array" for name, values in allowed.items()):
        return "answer allows no value of an argument"
    ordered = {name: allowed[name] or [[], ""] for name in parameters if name in allowed}
    types = {name: declared_type(parameters[name]) for name in ordered}
    needed = [name for name in required if "" in ordered.get(name, ())]
    extra = {"required": needed, "language": language}
    return {"name": function["name"], "arguments": ordered, "types": types} | {k: v for k, v in extra.items() if v}


def row_schema(parameters: dict[str, dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON Schema of a call of any of the functions, or of a list of them, that all allowed calls are valid under."""
    calls = []
    for name, own in parameters.items():
        allowed = [reference["arguments"] for reference in references if reference["name"] == name]
        if allowed and "language" not in references[0]:
            properties = {
                key: widened(inner, [value for one in allowed for value in one.get(key, ())])
                for key, inner in own.get("properties", {}).items()
            }
            own = {**own, **({"properties": properties} if properties else {})}
        calls.append(call_schema(name, own))
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return call if len(references) == 1 else {"type": "array", "items": call, "minItems": 1}


def call_of(reference: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """The call with the first allowed value of each argument."""
    language, types = reference.get("language"), reference["types"]
    if language is None:
        return {"name": reference["name"], "arguments": arguments_of(reference["arguments"], parameters)}
    # the parameters are source text, and the allowed values what it stands for
    arguments = arguments_of(reference["arguments"], {**parameters, "properties": {key: {} for key in types}})
    return {
        "name": reference["name"],
        "arguments": {key: write_literal(value, types[key], language) for key, value in arguments.items()},
    }


def written(calls: list[dict[str, Any]], call_format: str) -> str:
    """The calls as a model shall write them."""
    if call_format == "hermes":
        return "\n".join(f"<tool_call>\n{json_text(call)}\n</tool_call>" for call in calls)
    return json_text(calls if len(calls) > 1 else calls[0])


def instruction(args: BfclArguments, functions: int, calls: int) -> str:
    """The line before the functions."""
    if args.instruction is not None:
        return args.instruction
    if calls == 1:
        asked = "Call this function." if functions == 1 else "Call one of these functions."
    else:
        asked = "Call this function, once for each thing that is asked." if functions == 1 else "Call these functions."
    return f"{asked} {REPLIES[args.call_format][calls > 1]}"


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
        title=f"BFCL {', '.join(args.categories)} as tokalign structured problems",
        source=args.source or f"{args.questions} and {args.answers}",
        licence="apache-2.0",
        columns={
            "answer": "the call or calls with the list of allowed values of each argument, as JSON text",
            "schema": "JSON Schema of the call or of the list of calls, as JSON text",
            "completion": "the calls with the first allowed values, as one assistant message, for SFT",
            "tools": "the functions in OpenAI's form, as JSON text, for the chat template",
        },
        notes='Berkeley Function-Calling Leaderboard. An argument with "" among its allowed values may be left out; of '
        "several calls the order is free.",
    )
