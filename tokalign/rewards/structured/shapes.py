"""What a JSON Schema says about keys and types at each place of a document: the shape that a value is graded beside.

A schema is compiled once into a graph of shapes: references and `allOf` are followed, alternatives (`anyOf`, `oneOf`)
become options with everything that stands beside them, a recursive schema becomes a cycle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import jsonschema_rs

from tokalign.rewards.structured import validators

_MAX_OPTIONS = 64  # alternatives of one place in a schema; with more, that place is not graded
_MAX_SHAPES = 10_000
_NAMES = {str: "string", bool: "boolean", int: "integer", dict: "object", list: "array", type(None): "null"}
OBJECT_WORDS = {"properties", "required", "patternProperties", "additionalProperties", "propertyNames"}
ARRAY_WORDS = {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"}
_SCALAR_WORDS = set(
    "enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minLength maxLength pattern format not".split()
)
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name
DATA = ("enum", "const", "default", "examples")  # values, not schemas


@dataclass(eq=False)
class Shape:
    """Keys and types that a place in a document may have.

    Attributes:
        types: JSON types allowed; None allows all.
        properties, required, patterns: known keys, those that must be there, and patterns of further known keys.
        additional: shape of other keys where the schema gives one; None makes them invented.
        items, prefix, min_items, max_items: of an array.
        options: alternatives; a shape with options has nothing else.
        bounds: validator of what the schema says about scalars beyond their type.
        constant: the bounds allow one value alone. Another value of its type has half the credit (`grading.BOUND`), by
            which alternatives are told apart.
        perfect: validator that passes an object or array if and only if it has no fault; None where there is none.
    """

    types: frozenset[str] | None = None
    properties: dict[str, Shape] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    patterns: list[tuple[Any, Shape]] = field(default_factory=list)
    additional: Shape | None = None
    items: Shape | None = None
    prefix: list[Shape] = field(default_factory=list)
    min_items: int = 0
    max_items: int | None = None
    options: list[Shape] = field(default_factory=list)
    bounds: Any = None
    constant: bool = False
    perfect: Any = None

    def known(self, key: str) -> Shape | None:
        """Shape of a key, None for an invented one."""
        if key in self.properties:
            return self.properties[key]
        for pattern, shape in self.patterns:
            if pattern.is_valid(key):
                return shape
        return self.additional

    def item(self, index: int) -> Shape:
        """Shape of an array's item."""
        return self.prefix[index] if index < len(self.prefix) else self.items or ANY


ANY = Shape()
ANY.additional = ANY


class ShapeCompiler:
    """Turns a schema and what it refers to into shapes; a recursive schema becomes a cyclic graph of them."""

    def __init__(self, root: dict[str, Any] | bool, closed: jsonschema_rs.ValidatorMap | None):
        self.root = root
        self.perfect = {} if closed is None else {id(part): closed.get(at) for at, part in subschemas(root, "#")}
        self.dialect = {"$schema": root["$schema"]} if isinstance(root, dict) and "$schema" in root else {}
        self.made: dict[tuple[int, ...], Shape] = {}
        self.filling: list[Shape] = []
        self.without_: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}  # kept: a part is known by its id

    def shape(self, schemas: tuple[Any, ...]) -> Shape:
        """Shape of a place that all of `schemas` describe."""
        # Schemas with the same parts describe the same place. A shape is known before it is filled, so that a recursive
        # schema finds itself there and becomes a cycle.
        parts = {id(part): part for schema in schemas for part in self._parts(schema, set())}
        key = tuple(parts)
        if key in self.made:
            return self.made[key]
        # Alternatives below alternatives multiply. A place beyond the bound is not graded: full validation alone judges
        # it.
        if len(self.made) >= _MAX_SHAPES:
            return ANY
        shape = self.made[key] = Shape()
        if len(schemas) == 1:
            shape.perfect = self.perfect.get(id(schemas[0]))
        self.filling.append(shape)
        self._fill(shape, list(parts.values()))
        self.filling.pop()
        return shape

    def _parts(self, schema: Any, seen: set[int]) -> list[Any]:
        """A schema, what it refers to, and the members of its `allOf`: all hold at the same place."""
        if not isinstance(schema, dict):
            return [] if schema is not False else [schema]
        if not schema or id(schema) in seen:
            return []
        seen.add(id(schema))
        parts = [schema]
        if isinstance(schema.get("$ref"), str):
            parts += self._parts(self._target(schema["$ref"]), seen)
        for member in schema.get("allOf", ()):
            parts += self._parts(member, seen)
        return parts

    def _target(self, reference: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            return True  # anchors and embedded resources: the validator follows them, the grade does not
        target: Any = self.root
        for step in unquote(reference[2:]).split("/") if reference != "#" else ():
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdigit() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, dict) and step in target:
                target = target[step]
            else:
                return True
        return target

    def _fill(self, shape: Shape, parts: list[Any]) -> None:
        # `false` holds for nothing, so no type is right here.
        if any(part is False for part in parts):
            shape.types = frozenset()
            return
        for part in parts:
            for word in ("anyOf", "oneOf"):
                branches = part.get(word)
                if isinstance(branches, list) and len(branches) <= _MAX_OPTIONS:
                    # What stands beside the alternatives holds for each of them. References and `allOf` have been
                    # followed into parts of their own already; followed again here they might never end.
                    followed = ("$ref", "allOf")
                    others = [self._without(p, (*followed, word) if p is part else followed) for p in parts]
                    options: list[Shape] = []
                    for branch in branches:
                        option = self.shape((*others, branch))
                        if option not in self.filling:  # an alternative to itself says nothing
                            options += option.options or [option]
                    if len(options) <= _MAX_OPTIONS:
                        shape.options = options
                    else:
                        shape.additional = shape  # anything goes
                    return
        shape.types = _types(parts)
        outer, self.filling = self.filling, []  # below a key or an item, an alternative may well be met again
        self._fill_object(shape, parts)
        self._fill_array(shape, parts)
        self.filling = outer
        # The library judges what remains to be said of scalars, in one validator for all parts.
        if any(_SCALAR_WORDS & part.keys() for part in parts):
            bounds = [{key: item for key, item in part.items() if key in _SCALAR_WORDS} for part in parts]
            try:
                shape.bounds = validators.validator({**self.dialect, "allOf": bounds})
                shape.constant = any("const" in part or len(part.get("enum", ())) == 1 for part in parts)
            except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
                shape.bounds = None  # `not` with a reference: left to the full validation

    def _fill_object(self, shape: Shape, parts: list[Any]) -> None:
        names: dict[str, list[Any]] = {}
        patterns: list[tuple[str, Any]] = []
        for part in parts:
            for name, schema in part.get("properties", {}).items():
                names.setdefault(name, []).append(schema)
            patterns += part.get("patternProperties", {}).items()
            shape.required = tuple(dict.fromkeys((*shape.required, *part.get("required", ()))))
        for part in parts:  # keys that are known under a condition: the full validation says whether they are right
            conditional = [part.get(word) for word in ("if", "then", "else")]
            for word in ("dependentSchemas", "dependencies"):
                conditional += part.get(word, {}).values()
            for schema in conditional:
                for name in schema.get("properties", ()) if isinstance(schema, dict) else ():
                    names.setdefault(name, [True])
        shape.properties = {name: self.shape(tuple(schemas)) for name, schemas in names.items()}
        shape.patterns = [
            (validators.validator({"pattern": pattern}), self.shape((schema,))) for pattern, schema in patterns
        ]
        shape.additional = self._additional(parts)

    def _fill_array(self, shape: Shape, parts: list[Any]) -> None:
        rests = []
        most = [int(part["maxItems"]) for part in parts if "maxItems" in part]
        for part in parts:
            shape.min_items = max(shape.min_items, int(part.get("minItems", 0)))
            prefix, rest = part.get("prefixItems", ()), part.get("items")
            if isinstance(rest, list):  # drafts before 2020-12
                prefix, rest = rest, part.get("additionalItems")
            if prefix and not shape.prefix:
                shape.prefix = [self.shape((item,)) for item in prefix]
            if rest is False:
                most.append(len(prefix))
            elif isinstance(rest, dict):
                rests.append(rest)
        shape.max_items = min(most, default=None)
        shape.items = self.shape(tuple(rests)) if rests else None

    def _without(self, part: Any, words: tuple[str, ...]) -> Any:
        """A part less some words, the same object each time: shapes are found again by the ids of their parts."""
        key = (id(part), words)
        if key not in self.without_:
            self.without_[key] = {k: v for k, v in part.items() if k not in words}
        return self.without_[key]

    def _additional(self, parts: list[Any]) -> Shape | None:
        # JSON Schema allows keys that a schema does not speak of; the grade does not. Else an answer could be padded
        # with keys of its own at no cost. Only a schema that says what further keys hold lets them in.
        given = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
        if any(schema is False for schema in given):
            return None
        if given:
            return self.shape(tuple(given))
        if any("unevaluatedProperties" in part for part in parts):
            return None
        # an object of which no key is named may hold any
        return None if any("properties" in part or "patternProperties" in part for part in parts) else ANY


def _types(parts: list[Any]) -> frozenset[str] | None:
    # All parts hold, so a type must be allowed by each. A part without `type` may still name its type by its other
    # words.
    allowed: frozenset[str] | None = None
    for part in parts:
        types = part.get("type")
        if types is None:
            if "const" in part:
                types = [type_of(part["const"])]
            elif isinstance(part.get("enum"), list):
                types = [type_of(value) for value in part["enum"]]
            elif OBJECT_WORDS & part.keys():
                types = ["object"]
            elif ARRAY_WORDS & part.keys():
                types = ["array"]
            else:
                continue
        now = frozenset([types] if isinstance(types, str) else types)
        if "number" in now:
            now |= {"integer"}
        allowed = now if allowed is None else allowed & now
    return allowed


def type_of(value: Any) -> str:
    """JSON type of a value; a number without a fraction is an integer, as JSON Schema has it."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _NAMES[type(value)]


def subschemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(JSON pointer, schema) of a schema and of every schema within it."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from subschemas(item, f"{pointer}/{index}")
    elif isinstance(schema, dict):
        yield pointer, schema
        for word, item in schema.items():
            if word in NAMED and isinstance(item, dict):
                for name, member in item.items():
                    yield from subschemas(member, f"{pointer}/{word}/{name.replace('~', '~0').replace('/', '~1')}")
            elif word not in DATA:
                yield from subschemas(item, f"{pointer}/{word}")
