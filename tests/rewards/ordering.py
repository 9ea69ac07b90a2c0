"""Random schemas with documents for them, and what can be wrong with a document: for the tests of the ordering.

Faults are found by reading the schema here, apart from the code under test: a required key less, a key invented in an
object that is closed, a value of a type that the schema does not allow there. Below a union of objects only what is a
fault for every one of them counts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

COMPONENTS = ("structure", "format", "validity", "schema", "correctness", "length")
TRAILING = (" I hope this helps.", "\n\nLet me know!", "\nThe answer is 7", " // done")
LEADING = ("Sure: ", "Here is the document.\n\n", "Answer = ")
WRONG: tuple[Any, ...] = ("wrong", 7, 1.5, True, None, [], {}, ["wrong"], {"wrong": 1})
INVENTED = ("zz_note", "zz_debug", "zz_" + "long" * 60)


def searching(examples: int):
    """Settings of a search that is the same in every run and keeps nothing on disk."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


# ------------------------------------------------------------------------------------------------------------ schemas

scalars = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "integer", "minimum": 0, "maximum": 9},
        {"type": "number"},
        {"type": "number", "exclusiveMinimum": 0.5},
        {"type": "string"},
        {"type": "string", "minLength": 2},
        {"type": "string", "pattern": "^[a-z]+$"},
        {"type": "boolean"},
        {"type": ["integer", "null"]},
        {"type": ["string", "boolean"]},
        {"enum": ["red", "green"]},
        {"enum": [1, 2, "three"]},
        {"const": "fixed"},
        {"const": 3},
    ]
)


def objects(children: st.SearchStrategy, least_required: int = 0) -> st.SearchStrategy:
    """Objects of some of the keys a to d, with `additionalProperties` of every kind."""

    @st.composite
    def make(draw) -> dict[str, Any]:
        names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
        required = draw(
            st.lists(st.sampled_from(names), min_size=min(least_required, 1), max_size=len(names), unique=True)
        )
        made: dict[str, Any] = {"type": "object", "properties": {name: draw(children) for name in names}}
        additional = draw(st.sampled_from(["absent", "absent", False, False, True, {"type": "integer"}]))
        if additional is not False and required and draw(st.integers(0, 4)) == 0:
            required.append("unnamed")  # among the required keys only
        if required or draw(st.booleans()):
            made["required"] = required
        if additional != "absent":
            made["additionalProperties"] = additional
        if draw(st.integers(0, 5)) == 0:
            made["patternProperties"] = {"^n_": {"type": "integer"}}
        return made

    return make()


def unions(children: st.SearchStrategy) -> st.SearchStrategy:
    """Alternatives of objects that share the keys `kind` and a, b."""

    @st.composite
    def make(draw) -> dict[str, Any]:
        options = []
        for kind in ("one", "two"):
            names = draw(st.lists(st.sampled_from("ab"), max_size=2, unique=True))
            option: dict[str, Any] = {
                "type": "object",
                "properties": {"kind": {"const": kind}, **{name: draw(children) for name in names}},
                "required": ["kind", *draw(st.lists(st.sampled_from(names), unique=True) if names else st.just([]))],
            }
            if draw(st.booleans()):
                option["additionalProperties"] = False
            options.append(option)
        return {draw(st.sampled_from(["anyOf", "oneOf"])): options}

    return make()


def merged(children: st.SearchStrategy) -> st.SearchStrategy:
    """`allOf` of two objects, which describe one."""
    return st.builds(
        lambda a, b: {
            "allOf": [
                {"type": "object", "properties": {"a": a}, "required": ["a"]},
                {"type": "object", "properties": {"b": b}},
            ]
        },
        children,
        children,
    )


def extended(children: st.SearchStrategy) -> st.SearchStrategy:
    arrays = st.builds(
        lambda item, least: {"type": "array", "items": item} | ({"minItems": least} if least else {}),
        children,
        st.integers(0, 2),
    )
    nullable = st.builds(lambda child: {"anyOf": [child, {"type": "null"}]}, children)
    return st.one_of(arrays, nullable, objects(children), unions(scalars), merged(children))


reference = st.just({"$ref": "#/$defs/Node"})
nodes = st.recursive(st.one_of(scalars, scalars, reference), extended, max_leaves=5)


@st.composite
def schemas(draw) -> dict[str, Any]:
    """A schema of an object, sometimes of an array or with optional keys only; `$defs/Node` may contain itself."""
    form = draw(st.integers(0, 9))
    if form == 0:
        made = {"type": "array", "items": draw(objects(nodes, 1))}
    elif form == 1:
        made = draw(objects(nodes))
    elif form == 2:
        made = draw(merged(nodes))
    elif form == 3:
        made = draw(unions(nodes))
    else:
        made = draw(objects(nodes, 1))
    node = draw(st.one_of(objects(scalars, 1), objects(scalars, 1), unions(scalars)))
    for option in node.get("anyOf") or node.get("oneOf") or [node]:
        if draw(st.booleans()):
            itself = {"$ref": "#/$defs/Node"}
            option["properties"]["next"] = draw(st.sampled_from([itself, {"anyOf": [itself, {"type": "null"}]}]))
        if draw(st.booleans()):
            option["properties"]["more"] = {"type": "array", "items": {"$ref": "#/$defs/Node"}}
    return {**made, "$defs": {"Node": node}}


# ---------------------------------------------------------------------------------------------------- reading a schema


def resolved(root: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a `$ref` means, and one object for an `allOf`."""
    if "$ref" in schema:
        return resolved(root, root["$defs"]["Node"])
    if "allOf" in schema:
        parts = schema["allOf"]
        properties = {name: child for part in parts for name, child in part["properties"].items()}
        return {"type": "object", "properties": properties, "required": parts[0]["required"]}
    return schema


def options(root: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Alternatives of a place, without `anyOf` and `oneOf`."""
    schema = resolved(root, schema)
    branches = schema.get("anyOf") or schema.get("oneOf")
    return [one for branch in branches for one in options(root, branch)] if branches else [schema]


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return {str: "string", int: "integer", dict: "object", list: "array", type(None): "null"}[type(value)]


def kinds(root: dict[str, Any], schema: dict[str, Any]) -> set[str]:
    """JSON types that a place allows."""
    made: set[str] = set()
    for option in options(root, schema):
        said = option.get("type") or [kind_of(v) for v in option.get("enum", [option.get("const")])]
        made |= {said} if isinstance(said, str) else set(said)
    return made | ({"integer"} if "number" in made else set())


def is_closed(schema: dict[str, Any]) -> bool:
    return schema.get("additionalProperties", False) is False


def child_of(schema: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Schema of a key of an object; None where it says nothing."""
    if key in schema.get("properties", {}):
        return schema["properties"][key]
    if key.startswith("n_") and "patternProperties" in schema:
        return {"type": "integer"}
    additional = schema.get("additionalProperties")
    return additional if isinstance(additional, dict) else None


def is_attempt(root: dict[str, Any], value: Any) -> bool:
    """Whether at least one key or item that is asked for is there with the right type."""
    for option in options(root, root):
        if option.get("type") == "array" and isinstance(value, list):
            return any(kind_of(item) in kinds(root, option["items"]) for item in value)
        if option.get("type") == "object" and isinstance(value, dict):
            for key in option.get("required") or value:
                child = child_of(option, key)
                unsaid = child is None and (bool(option.get("required")) or not is_closed(option))
                if key in value and (unsaid or (child is not None and kind_of(value[key]) in kinds(root, child))):
                    return True
    return False


# ---------------------------------------------------------------------------------------------------- valid documents


@st.composite
def valid(draw, root: dict[str, Any], schema: dict[str, Any] | None = None, depth: int = 0) -> Any:
    """A document that is valid, with keys of its own only where the schema allows them."""
    found = options(root, root if schema is None else schema)
    null = [option for option in found if option.get("type") == "null"]
    option = draw(st.sampled_from(null if null and depth > 3 else found))
    if "const" in option:
        return option["const"]
    if "enum" in option:
        return draw(st.sampled_from(option["enum"]))
    kind = option["type"] if isinstance(option["type"], str) else draw(st.sampled_from(option["type"]))
    if kind == "object":
        required = option.get("required", [])
        made = {}
        for name, child in option["properties"].items():
            if name in required or (depth < 4 and draw(st.booleans())):
                made[name] = draw(valid(root, child, depth + 1))
        made |= {name: draw(st.integers(-9, 9)) for name in required if name not in made}
        if "patternProperties" in option and draw(st.booleans()):
            made["n_1"] = draw(st.integers(-9, 9))
        if not is_closed(option) and draw(st.booleans()):
            made["extra"] = draw(st.integers(-9, 9))
        return made
    if kind == "array":
        length = draw(st.integers(option.get("minItems", 0), 3)) if depth < 4 else option.get("minItems", 0)
        return [draw(valid(root, option["items"], depth + 1)) for _ in range(length)]
    if kind == "string":
        return draw(st.text("abcxyz", min_size=2, max_size=8))
    return draw(
        {
            "integer": st.integers(0, 9),
            "number": st.sampled_from([1, 2.0, 2.5, 1e3]),
            "boolean": st.booleans(),
            "null": st.none(),
        }[kind]
    )


# ------------------------------------------------------------------------------------------------------------- faults


def places(root: dict[str, Any], value: Any, schema: dict[str, Any] | None = None, path: tuple = ()) -> Iterator[tuple]:
    """(path, operation, argument) of every fault that can be made in a document."""
    schema = root if schema is None else schema
    allowed = kinds(root, schema)
    if kind_of(value) not in allowed:
        return
    wrong = [other for other in WRONG if kind_of(other) not in allowed]
    yield from ((path, "type", other) for other in wrong)
    containers = [option for option in options(root, schema) if option.get("type") == kind_of(value)]
    if isinstance(value, dict):
        required = set.intersection(*(set(option.get("required", [])) for option in containers))
        yield from ((path, "remove", key) for key in required & value.keys())
        if all(is_closed(option) for option in containers):
            yield from ((path, "invent", name) for name in INVENTED if name not in value)
        if len(containers) == 1:
            for key, item in value.items():
                child = child_of(containers[0], key)
                if child is not None:
                    yield from places(root, item, child, (*path, key))
        elif "kind" in value:
            yield from (((*path, "kind"), "type", other) for other in (7, None, []) if isinstance(value["kind"], str))
    elif isinstance(value, list) and len(containers) == 1:
        for index, item in enumerate(value):
            yield from places(root, item, containers[0]["items"], (*path, index))


def at(value: Any, path: tuple) -> Any:
    for step in path:
        value = value[step]
    return value


def spoiled(value: Any, path: tuple, operation: str, argument: Any) -> Any:
    """A copy of a document with one fault."""
    value = copy.deepcopy(value)
    if operation == "type":
        if not path:
            return argument
        at(value, path[:-1])[path[-1]] = copy.deepcopy(argument)
    elif operation == "remove":
        del at(value, path)[argument]
    else:
        at(value, path)[argument] = "invented " * 20
    return value


@st.composite
def fault(draw, root: dict[str, Any], value: Any) -> Any:
    """A copy with one fault more; the document itself where none can be made."""
    found = sorted(places(root, value), key=lambda place: (str(place[0]), place[1], str(place[2])))
    if not found:
        return value
    operation = draw(st.sampled_from(sorted({place[1] for place in found})))  # as many removed as of wrong type
    return spoiled(value, *draw(st.sampled_from([place for place in found if place[1] == operation])))


def text_of(value: Any, before: str = "", after: str = "", fence: str = "") -> str:
    text = json.dumps(value)
    return before + (f"```{fence}\n{text}\n```" if fence else text) + after


# -------------------------------------------------------------------------------------------------------------- hacks


def hacks(root: dict[str, Any], value: Any) -> list[str]:
    """Texts that are no attempt at the document, made to look like one; `value` is a perfect one."""
    text = json.dumps(value)
    tops = options(root, root)
    names = sorted({name for top in tops for name in top.get("properties", {})})
    made = ["{}", "[]", "5", "true", "null", "0.5", '"answer"', json.dumps(text), json.dumps(" ".join(names)), "", " "]
    made += [f"The keys are {', '.join(names)}.", " ".join(f'"{name}":' for name in names), *names]
    made += [f"```json\n{text}\n```\n" * 3, "```json\n```" * 5, "```" * 9, f"{text}\n{text}", f"[{text}, {text}"]
    made += [text + after for after in TRAILING] + [before + text for before in LEADING]
    made += [f"// {text}", f"<json>{text}</json>", text[:-1], text[: len(text) // 2], text + "}", "NaN", "[NaN]"]
    made.append("[[]]" if tops[0].get("type") != "array" else '["wrong"]')
    if isinstance(value, dict):
        key = json.dumps(next(iter(value), "a"))
        made.append(f"{{{key}: {json.dumps(next(iter(value.values()), 1))}, {text[1:]}" if value else '{"a":1,"a":1}')
        made += [f"{{{key}: NaN{', ' if len(value) > 1 else ''}{text[text.index(',') + 1 :] if ',' in text else '}'}"]
        candidates = [
            dict.fromkeys(names),
            {"zz_1": 1, "zz_2": text},
            {name: {"zz": [None]} for name in names},
            {"": 1},
        ]
        made += [json.dumps(candidate) for candidate in candidates if not is_attempt(root, candidate)]
    return made
