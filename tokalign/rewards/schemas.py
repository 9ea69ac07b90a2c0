"""JSON Schema for rewards: full validity by jsonschema-rs, and a graded reading of keys and types.

Validity under a schema is yes or no, and a policy that never says yes learns nothing from it. The grade says how far a
value is: every required key that is there counts, more if it has the right type; every invented key and every fault in
an optional part costs. It is made so that no fault pays (`grade`), whatever the schema and the value.

Schemas are compiled once, offline: a remote or file `$ref`, an unknown dialect and an invalid schema are errors at
start-up that name the place. Patterns run in linear time where they can, else with a bounded number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema_rs

PRESENT = 0.25  # credit of a required key that is there, whatever its value
BOUND = 0.5  # credit of a value of the right type that breaks a bound, pattern or enumeration
_MAX_OPTIONS = 64  # alternatives of one place in a schema; with more, that place is not graded
_MAX_SHAPES = 10_000
_NAMES = {str: "string", bool: "boolean", int: "integer", dict: "object", list: "array", type(None): "null"}
_OBJECT_WORDS = {"properties", "required", "patternProperties", "additionalProperties", "propertyNames"}
_ARRAY_WORDS = {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"}
_SCALAR_WORDS = {
    *("enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format", "not"),
}
_IN_PLACE = {"allOf", "anyOf", "oneOf", "if", "not", "$ref", "$dynamicRef", "dependentSchemas", "dependencies"}


class SchemaError(ValueError):
    """A schema that cannot be used; the message is one sentence with the place in it and the remedy."""


class TooManyValues(Exception):
    """A document with more values than a score may visit."""


# --------------------------------------------------------------------------------------------------------- compiling


def load_schema(schema: Any) -> dict[str, Any] | bool:
    """A schema from an object, JSON text, the path of a JSON file, or a Pydantic model class.

    Raises:
        SchemaError: no such file, no JSON, or nothing that can be a schema.
    """
    if hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if isinstance(schema, Path) or (isinstance(schema, str) and not schema.lstrip().startswith(("{", "true", "false"))):
        try:
            schema = Path(schema).read_text(encoding="utf-8")
        except OSError as error:
            raise SchemaError(
                f"The schema file {str(schema)[:200]} cannot be read ({error.strerror}); check the path."
            ) from None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"The schema is not JSON ({str(error)[:200]}); give a JSON Schema as JSON.") from None
    if not isinstance(schema, dict | bool):
        raise SchemaError(f"A schema is a JSON object or a boolean, not {type(schema).__name__}; give a JSON Schema.")
    return schema


def compile_schema(schema: Any) -> CompiledSchema:
    """Compile a schema (see `load_schema`); JSON text is compiled once a process.

    Raises:
        SchemaError: an invalid schema, or a reference that leaves it.
    """
    return _compile_text(schema) if isinstance(schema, str) else CompiledSchema(load_schema(schema))


@lru_cache(maxsize=8192)
def _compile_text(text: str) -> CompiledSchema:
    return CompiledSchema(load_schema(text))


_OFFLINE: dict[str, Any] = {"offline": True, "validate_formats": True, "mask": "the value"}
_REGULAR = jsonschema_rs.RegexOptions()
_BOUNDED = jsonschema_rs.FancyRegexOptions(backtrack_limit=10_000)  # for patterns that are not regular


def _validator(schema: dict[str, Any] | bool) -> jsonschema_rs.Validator:
    """A validator that never leaves this process."""
    try:
        return jsonschema_rs.validator_for(schema, pattern_options=_REGULAR, **_OFFLINE)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return jsonschema_rs.validator_for(schema, pattern_options=_BOUNDED, **_OFFLINE)


def _validators(schema: dict[str, Any] | bool) -> jsonschema_rs.ValidatorMap:
    """Validators of a schema and of every schema within it, by JSON pointer."""
    try:
        return jsonschema_rs.validator_map_for(schema, pattern_options=_REGULAR, **_OFFLINE)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return jsonschema_rs.validator_map_for(schema, pattern_options=_BOUNDED, **_OFFLINE)


class CompiledSchema:
    """A schema ready to judge values.

    Attributes:
        schema: as given.
        shape: its keys and types, None for a schema that says nothing about them.
    """

    def __init__(self, schema: dict[str, Any] | bool):
        self.schema = schema
        try:
            self._validator = _validator(schema)
        except jsonschema_rs.ReferencingError as error:
            raise SchemaError(f"{_place(schema, str(error))}: {_short(error)}; put it under `$defs`.") from None
        except jsonschema_rs.ValidationError as error:
            where = "".join(f"/{part}" for part in error.instance_path) or _place(schema, error.message)
            remedy = "only references within the schema are followed" if "esource" in error.message else "mend it there"
            raise SchemaError(f"The schema is invalid at {where}: {_short(error)}; {remedy}.") from None
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"The schema cannot be compiled ({_short(error)}); simplify it.") from None
        # where closing every object says the same as the grade, one call tells a perfect part from the others
        closed = _validators(_close(schema)) if _closable(schema) else None
        self.shape = _Compiler(schema, closed).shape((schema,))

    @property
    def wants_list(self) -> bool:
        """Whether the document shall be an array."""
        return any(s.types is not None and "array" in s.types for s in (self.shape.options or [self.shape]))

    def is_valid(self, value: Any) -> bool:
        """Full JSON Schema validity."""
        try:
            return self._validator.is_valid(value)
        except (ValueError, TypeError, RecursionError):
            return False

    def is_perfect(self, value: Any) -> bool | None:
        """Whether a value is valid and has no invented key; None where only `grade` can tell."""
        if self.shape.perfect is None:
            return None
        try:
            return self.shape.perfect.is_valid(value)
        except (ValueError, TypeError, RecursionError):
            return False

    def first_error(self, value: Any) -> str | None:
        """The first breach of the schema in words, with its place; None for a valid value."""
        try:
            self._validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            where = "".join(f"/{part}" for part in error.instance_path)[:200]
            return f"{where or 'the document'}: {_short(error)}"
        except (ValueError, TypeError, RecursionError) as error:
            return _short(error)
        return None

    def grade(self, value: Any, *, max_values: int = 20_000) -> Grade:
        """How far a value has the schema's keys and types. Raises `TooManyValues`."""
        return _Walk(max_values).top(self.shape, value)

    def invented_keys(self, value: Any, *, max_values: int = 20_000) -> int:
        """Keys of `value`, at any level, that the schema does not know. Raises `TooManyValues`."""
        walk = _Walk(max_values)
        walk.grade(self.shape, value)
        return walk.invented


def _short(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)
    return " ".join(text.split())[:300].rstrip(".")


def _place(schema: Any, message: str) -> str:
    """Path of the reference that an error message speaks of; "/" (the whole schema) if none is found."""
    for path, word, reference in _references(schema, ""):
        address = reference.split("#")[0].rstrip("/") or reference
        if address.strip("#") and address in message:
            return f"{path}/{word} ({reference[:100]})"
    return "/"


def _references(schema: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Every (path, keyword, target) of a schema's references."""
    if isinstance(schema, dict):
        for word in ("$ref", "$dynamicRef", "$schema"):
            if isinstance(schema.get(word), str):
                yield path, word, schema[word]
        for key, item in schema.items():
            yield from _references(item, f"{path}/{key}")
    elif isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _references(item, f"{path}/{index}")


def _pointers(schema: Any, pointer: str) -> Iterator[tuple[int, str]]:
    """(id, JSON pointer) of every object in a schema."""
    if isinstance(schema, dict):
        yield id(schema), pointer
        for key, item in schema.items():
            yield from _pointers(item, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _pointers(item, f"{pointer}/{index}")


def _closable(schema: Any) -> bool:
    """Whether `additionalProperties: false` may be added to every object: nothing in it shares an object's keys."""
    if isinstance(schema, list):
        return all(_closable(item) for item in schema)
    if not isinstance(schema, dict):
        return True
    in_place = _IN_PLACE & schema.keys()
    if in_place - {"anyOf", "oneOf", "$ref"} or (in_place and (_OBJECT_WORDS | {"type"}) & schema.keys()):
        return False
    if "$id" in schema or "unevaluatedProperties" in schema or "$recursiveRef" in schema:
        return False
    if _OBJECT_WORDS & schema.keys() and not isinstance(schema.get("type"), str):
        return False  # the grade takes it for an object, JSON Schema alone does not
    return all(_closable(item) for key, item in schema.items() if key not in ("enum", "const", "default", "examples"))


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    keep = ("enum", "const", "default", "examples")
    made = {key: item if key in keep else _close(item) for key, item in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


# -------------------------------------------------------------------------------------------------------------- shape


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
        perfect: validator that passes just the objects and arrays without any fault, where there is one.
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


class _Compiler:
    """Turns a schema and what it refers to into shapes; a recursive schema becomes a cyclic graph of them."""

    def __init__(self, root: dict[str, Any] | bool, closed: jsonschema_rs.ValidatorMap | None):
        self.root = root
        self.perfect = {} if closed is None else {i: closed.get(pointer) for i, pointer in _pointers(root, "#")}
        self.made: dict[tuple[int, ...], Shape] = {}
        self.filling: list[Shape] = []
        self.without_: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}  # kept: a part is known by its id

    def shape(self, schemas: tuple[Any, ...]) -> Shape:
        """Shape of a place that all of `schemas` describe."""
        parts = {id(part): part for schema in schemas for part in self._parts(schema, set())}
        key = tuple(parts)
        if key in self.made:
            return self.made[key]
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
        if id(schema) in seen:
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
        for step in reference[2:].split("/") if reference != "#" else ():
            step = step.replace("~1", "/").replace("~0", "~").replace("%25", "%").replace("%22", '"')
            if isinstance(target, list) and step.isdigit() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, dict) and step in target:
                target = target[step]
            else:
                return True
        return target

    def _fill(self, shape: Shape, parts: list[Any]) -> None:
        if any(part is False for part in parts):
            shape.types = frozenset()
            return
        for part in parts:
            for word in ("anyOf", "oneOf"):
                branches = part.get(word)
                if isinstance(branches, list) and len(branches) <= _MAX_OPTIONS:
                    followed = ("$ref", "allOf")
                    others = [self._without(p, (*followed, word) if p is part else followed) for p in parts]
                    found: list[Shape] = []
                    for branch in branches:
                        made = self.shape((*others, branch))
                        if made not in self.filling:  # an alternative to itself says nothing
                            found += made.options or [made]
                    if len(found) <= _MAX_OPTIONS:
                        shape.options = found
                    else:
                        shape.additional = shape  # anything goes
                    return
        shape.types = _types(parts)
        names: dict[str, list[Any]] = {}
        patterns: list[tuple[str, Any]] = []
        for part in parts:
            for name, schema in part.get("properties", {}).items():
                names.setdefault(name, []).append(schema)
            patterns += part.get("patternProperties", {}).items()
            shape.required = tuple(dict.fromkeys((*shape.required, *part.get("required", ()))))
            shape.min_items = max(shape.min_items, int(part.get("minItems", 0)))
            if "maxItems" in part:
                shape.max_items = min(int(part["maxItems"]), shape.max_items or int(part["maxItems"]))
            prefix = part.get("prefixItems")
            if prefix is None and isinstance(part.get("items"), list):  # drafts before 2020-12
                prefix = part["items"]
            if prefix and not shape.prefix:
                shape.prefix = [self.shape((item,)) for item in prefix]
            rest = part.get("additionalItems") if isinstance(part.get("items"), list) else part.get("items")
            if isinstance(rest, dict) and shape.items is None:
                shape.items = self.shape((rest,))
            elif rest is False:
                shape.max_items = len(shape.prefix) if shape.max_items is None else shape.max_items
        shape.properties = {name: self.shape(tuple(schemas)) for name, schemas in names.items()}
        shape.patterns = [(_validator({"pattern": pattern}), self.shape((schema,))) for pattern, schema in patterns]
        shape.additional = self._additional(parts)
        if any(_SCALAR_WORDS & part.keys() for part in parts):
            said = [{key: item for key, item in part.items() if key in _SCALAR_WORDS} for part in parts]
            try:
                shape.bounds = _validator({"allOf": said})
            except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
                shape.bounds = None  # `not` with a reference: left to the full validation

    def _without(self, part: Any, words: tuple[str, ...]) -> Any:
        """A part less some words, the same object each time: shapes are found again by the ids of their parts."""
        key = (id(part), words)
        if key not in self.without_:
            self.without_[key] = {k: v for k, v in part.items() if k not in words}
        return self.without_[key]

    def _additional(self, parts: list[Any]) -> Shape | None:
        given = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
        if any(schema is False for schema in given):
            return None
        if given:
            return self.shape(tuple(given))
        if any("unevaluatedProperties" in part for part in parts):
            return None
        # an object of which no key is named may hold any
        return None if any(part.get("properties") or part.get("patternProperties") for part in parts) else ANY


def _types(parts: list[Any]) -> frozenset[str] | None:
    allowed: frozenset[str] | None = None
    for part in parts:
        said = part.get("type")
        if said is None:
            if "const" in part:
                said = [type_of(part["const"])]
            elif isinstance(part.get("enum"), list):
                said = [type_of(value) for value in part["enum"]]
            elif _OBJECT_WORDS & part.keys():
                said = ["object"]
            elif _ARRAY_WORDS & part.keys():
                said = ["array"]
            else:
                continue
        now = frozenset([said] if isinstance(said, str) else said)
        if "number" in now:
            now |= {"integer"}
        allowed = now if allowed is None else allowed & now
    return allowed


def type_of(value: Any) -> str:
    """JSON type of a value; a number without a fraction is an integer, as JSON Schema has it."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _NAMES[type(value)]


# -------------------------------------------------------------------------------------------------------------- grade


@dataclass(frozen=True, slots=True)
class Grade:
    """How far a value has a schema's keys and types, each in [0, 1].

    Attributes:
        keys: by keys and types alone; 1 if all required keys are there, all types right and no key invented.
        full: the same, less for scalars that break a bound, pattern or enumeration.
        attempt: at least one key or item that the schema asks for is there with the right type.
    """

    keys: float
    full: float
    attempt: bool


class _Walk:
    """One pass over a value beside its shape.

    Of an object with n required keys, the credit of each that is there being PRESENT + (1 − PRESENT) g for the grade g
    of its value,
        g(object) = Σ credit / (n + invented keys + Σ over optional keys that are there (1 − credit)),
    with one whole credit for n = 0. Of an array, with the share m of `minItems` that is there,
        g(array) = m / (1 + items beyond `maxItems` + Σ over items (1 − g(item))).
    A scalar has 1 or 0 by type (BOUND if only a bound is broken). Faults are counted, never averaged away: adding sound
    parts cannot hide an unsound one, and each of these costs: a required key less, a key invented, a type made wrong.
    Among alternatives (`anyOf`, `oneOf`) the best counts.
    """

    def __init__(self, max_values: int):
        self.left = max_values
        self.invented = 0

    def top(self, shape: Shape, value: Any) -> Grade:
        """The grade of a whole document; an empty container or a scalar that no schema asked for is no attempt."""
        keys, full = self.grade(shape, value)
        return Grade(keys, full, keys > 0 and any(self._attempt(option, value) for option in shape.options or [shape]))

    def _attempt(self, shape: Shape, value: Any) -> bool:
        if isinstance(value, dict):
            if shape.types is not None and "object" not in shape.types:
                return False
            asked = shape.required or value.keys()
            for key in value.keys() & asked:
                child = shape.known(key) or (ANY if key in shape.required else None)
                if child is not None and self.grade(child, value[key])[0] > 0:
                    return True
            return False
        if isinstance(value, list):
            if shape.types is not None and "array" not in shape.types:
                return False
            return any(self.grade(shape.item(i), item)[0] > 0 for i, item in enumerate(value))
        return shape.types is not None  # a bare scalar is an answer only to a schema that names its type

    def grade(self, shape: Shape, value: Any) -> tuple[float, float]:
        """(by keys and types, with bounds) of a value."""
        if shape.perfect is not None and isinstance(value, dict | list) and shape.perfect.is_valid(value):
            return 1.0, 1.0
        if shape.options:
            return self._best(shape.options, value)
        if isinstance(value, dict):
            return self._object(shape, value) if shape.types is None or "object" in shape.types else (0.0, 0.0)
        if isinstance(value, list):
            return self._array(shape, value) if shape.types is None or "array" in shape.types else (0.0, 0.0)
        if shape.types is not None and type_of(value) not in shape.types:
            return 0.0, 0.0
        return (1.0, 1.0) if shape.bounds is None or shape.bounds.is_valid(value) else (1.0, BOUND)

    def _visit(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TooManyValues

    def _best(self, options: list[Shape], value: Any) -> tuple[float, float]:
        self._visit(len(options))
        before, best, invented = self.invented, (-1.0, 0.0), 0
        for option in options:
            self.invented = before
            keys, full = self.grade(option, value)
            if keys > best[0]:
                invented = self.invented
            best = (max(best[0], keys), max(best[1], full))
        self.invented = invented
        return best

    def _object(self, shape: Shape, value: Mapping[str, Any]) -> tuple[float, float]:
        if shape is ANY:
            return 1.0, 1.0
        self._visit(len(value))
        properties, required = shape.properties, shape.required
        credit_keys = credit_full = fault_keys = fault_full = 0.0
        for key, item in value.items():
            known = properties.get(key) or shape.known(key)
            if known is None:
                if key not in required:
                    self.invented += 1
                    fault_keys += 1.0
                    fault_full += 1.0
                    continue
                known = ANY
            keys, full = self.grade(known, item)
            if key in required:
                credit_keys += PRESENT + (1 - PRESENT) * keys
                credit_full += PRESENT + (1 - PRESENT) * full
            else:
                fault_keys += (1 - PRESENT) * (1 - keys)
                fault_full += (1 - PRESENT) * (1 - full)
        if not required:
            return 1 / (1 + fault_keys), 1 / (1 + fault_full)
        n = len(required)
        return credit_keys / (n + fault_keys), credit_full / (n + fault_full)

    def _array(self, shape: Shape, value: list[Any]) -> tuple[float, float]:
        if shape is ANY:
            return 1.0, 1.0
        fault_keys = fault_full = 0.0
        if shape.items is not None or shape.prefix:
            self._visit(len(value))
            for index, item in enumerate(value):
                keys, full = self.grade(shape.item(index), item)
                fault_keys += 1 - keys
                fault_full += 1 - full
        beyond = 0 if shape.max_items is None else max(0, len(value) - shape.max_items)
        share = min(1.0, len(value) / shape.min_items) if shape.min_items else 1.0
        return share / (1 + beyond + fault_keys), share / (1 + beyond + fault_full)


NO_SCHEMA = CompiledSchema(True)
