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
from urllib.parse import unquote

import jsonschema_rs

PRESENT = 0.25  # credit of an object, and of a required key in it, whatever their values
BOUND = 0.5  # credit of a value of the right type that breaks a bound, pattern or enumeration
_MAX_VALUES = 10_000
_MAX_OPTIONS = 64  # alternatives of one place in a schema; with more, that place is not graded
_MAX_SHAPES = 10_000
_NAMES = {str: "string", bool: "boolean", int: "integer", dict: "object", list: "array", type(None): "null"}
_CONTAINERS = (dict, list)
_OBJECT_WORDS = {"properties", "required", "patternProperties", "additionalProperties", "propertyNames"}
_ARRAY_WORDS = {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"}
_SCALAR_WORDS = {
    *("enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format", "not"),
}
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by name
_DATA = ("enum", "const", "default", "examples")  # values, not schemas
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
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
    if isinstance(schema, Path) or (isinstance(schema, str) and not _is_text(schema)):
        try:
            schema = Path(schema).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            name = str(schema)[:200]
            raise SchemaError(f"The schema file {name} cannot be read ({reason}); check the path.") from None
    return _of_text(schema) if isinstance(schema, str) else _of_kind(schema)


def _is_text(schema: str) -> bool:
    return schema.lstrip().startswith("{") or schema.strip() in ("true", "false")


def _of_text(text: str) -> dict[str, Any] | bool:
    try:
        return _of_kind(json.loads(text))
    except SchemaError:
        raise
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is not JSON ({str(error)[:200]}); give a JSON Schema as JSON.") from None


def _of_kind(schema: Any) -> dict[str, Any] | bool:
    if not isinstance(schema, dict | bool):
        raise SchemaError(f"A schema is a JSON object or a boolean, not {type(schema).__name__}; give a JSON Schema.")
    return schema


def compile_schema(schema: Any) -> CompiledSchema:
    """Compile a schema (see `load_schema`); the same one is compiled once a process.

    Raises:
        SchemaError: an invalid schema, or a reference that leaves it.
    """
    if isinstance(schema, str) and _is_text(schema):
        return compile_text(schema)
    try:
        return compile_text(json.dumps(load_schema(schema)))
    except SchemaError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is not JSON ({str(error)[:200]}); give a JSON Schema.") from None


@lru_cache(maxsize=8192)
def compile_text(text: str) -> CompiledSchema:
    """Compile JSON text, and never take it for a path: the rows of a dataset may not name files."""
    return CompiledSchema(_of_text(text))


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
        try:
            parts = list(_schemas(schema, "#"))
            # where closing every object says the same as the grade, one call tells a perfect part from the others
            closed = _validators(_close(schema)) if all(_closable(part) for _, part in parts) else None
            self.shape = _Compiler(schema, closed).shape((schema,))
        except RecursionError:
            raise SchemaError("The schema is nested too deep; simplify it.") from None
        # closed alternatives may exclude one another where the schema's own do not
        self._exclusive = any("oneOf" in part for _, part in parts)
        self._refers = any(_REFERENCES & part.keys() for _, part in parts)

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
            return self.shape.perfect.is_valid(value) and (not self._exclusive or self._validator.is_valid(value))
        except (ValueError, TypeError, RecursionError):
            return False

    def first_error(self, value: Any, grade: Grade | None = None) -> str | None:
        """The first fault in words, with its place: by the grade, else a breach of the schema; None if there is none.

        The grade of this very value spares a second pass. Raises `TooManyValues`.
        """
        walk = None if grade is None else grade.walk
        found = (walk or _Walk(_MAX_VALUES)).fault(self.shape, value, "")
        if found is not None or self.is_valid(value):
            return found
        if self._refers:  # the validator remembers nothing while it explains: it would take gigabytes for recursion
            return "the document: a rule of the schema is broken"
        try:
            self._validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return f"{''.join(f'/{part}' for part in error.instance_path)[:200] or 'the document'}: {_short(error)}"
        except (ValueError, TypeError, RecursionError) as error:
            return f"the document: {_short(error)}"
        return None

    def grade(self, value: Any, *, max_values: int = _MAX_VALUES) -> Grade:
        """How far a value has the schema's keys and types. Raises `TooManyValues`."""
        return _Walk(max_values).top(self.shape, value)

    def invented_keys(self, value: Any, *, max_values: int = _MAX_VALUES) -> int:
        """Keys of `value`, at any level, that the schema does not know. Raises `TooManyValues`."""
        return self.grade(value, max_values=max_values).invented


def _short(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)
    return " ".join(text.split())[:300].rstrip(".")


def _place(schema: Any, message: str) -> str:
    """Path of the reference that an error message speaks of; "/" (the whole schema) if none is found."""
    for path, word, reference in _references(schema, ""):
        address, _, fragment = reference.partition("#")
        address = address.rstrip("/") or fragment
        if address and address in message:
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


def _schemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(JSON pointer, schema) of a schema and of every schema within it."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from _schemas(item, f"{pointer}/{index}")
    elif isinstance(schema, dict):
        yield pointer, schema
        for word, item in schema.items():
            if word in _NAMED and isinstance(item, dict):
                for name, member in item.items():
                    yield from _schemas(member, f"{pointer}/{word}/{name.replace('~', '~0').replace('/', '~1')}")
            elif word not in _DATA:
                yield from _schemas(item, f"{pointer}/{word}")


def _closable(schema: dict[str, Any]) -> bool:
    """Whether `additionalProperties: false` says of this object what the grade says: nothing else shares its keys."""
    in_place = _IN_PLACE & schema.keys()
    if in_place - {"anyOf", "oneOf", "$ref"} or (in_place and (_OBJECT_WORDS | {"type"}) & schema.keys()):
        return False
    if "$id" in schema or "unevaluatedProperties" in schema or "$recursiveRef" in schema:
        return False
    # without a type the grade takes it for an object or an array, JSON Schema does not
    return not (_OBJECT_WORDS | _ARRAY_WORDS) & schema.keys() or isinstance(schema.get("type"), str)


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for word, item in schema.items():
        if word in _NAMED and isinstance(item, dict):
            made[word] = {name: _close(member) for name, member in item.items()}
        else:
            made[word] = item if word in _DATA else _close(item)
    keyed = schema.get("type") == "object" and ("properties" in schema or "patternProperties" in schema)
    if keyed and "additionalProperties" not in schema:
        made["additionalProperties"] = False
        unnamed: dict[str, Any] = {name: {} for name in schema.get("required", ())}
        made["properties"] = unnamed | made.get("properties", {})  # a required key is never invented
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
        constant: they allow one value; another one is half a fault of type, which tells alternatives apart.
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


class _Compiler:
    """Turns a schema and what it refers to into shapes; a recursive schema becomes a cyclic graph of them."""

    def __init__(self, root: dict[str, Any] | bool, closed: jsonschema_rs.ValidatorMap | None):
        self.root = root
        self.perfect = {} if closed is None else {id(part): closed.get(at) for at, part in _schemas(root, "#")}
        self.dialect = {"$schema": root["$schema"]} if isinstance(root, dict) and "$schema" in root else {}
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
        outer, self.filling = self.filling, []  # below a key or an item, an alternative may well be met again
        self._fill_object(shape, parts)
        self._fill_array(shape, parts)
        self.filling = outer
        if any(_SCALAR_WORDS & part.keys() for part in parts):
            said = [{key: item for key, item in part.items() if key in _SCALAR_WORDS} for part in parts]
            try:
                shape.bounds = _validator({**self.dialect, "allOf": said})
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
        shape.patterns = [(_validator({"pattern": pattern}), self.shape((schema,))) for pattern, schema in patterns]
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
    """How far a value has a schema's keys and types.

    Attributes:
        keys: in [0, 1], by keys and types alone; 1 if all required keys are there, all types and constants right and no
            key invented.
        full: the same, less for scalars that break a bound, pattern or enumeration.
        attempt: at least one key or item that the schema asks for is there with the right type.
        invented: keys, at any level, that the schema does not know.
        walk: the pass that found this, with its memory, to explain it by.
    """

    keys: float
    full: float
    attempt: bool
    invented: int = 0
    walk: _Walk | None = field(default=None, repr=False, compare=False)


class _Walk:
    """One pass over a value beside its shape.

    Let b be PRESENT for an object with required keys and 1 for one without, n the number of its required keys, and the
    credit of a key that is there PRESENT + (1 − PRESENT) g for the grade g of its value. Then
        g(object) = (b + Σ over required keys that are there credit)
                    / (b + n + invented keys + Σ over optional keys that are there (1 − credit)).
    Of an array, with the share m = min(1, (1 + items) / (1 + `minItems`)),
        g(array) = m / (1 + items beyond `maxItems` + Σ over items (1 − g(item))).
    A scalar has 1 or 0 by type; with bounds, BOUND if only a bound is broken. One that should be a constant and has its
    type only has BOUND in any case. What has the right type is above 0 at every level, and faults are counted, never
    averaged away: so each costs, wherever it is (a required key less, a key invented, a type made wrong), and adding
    sound parts cannot hide it. The cost shrinks with depth, by 0.6 a level at most, and meets floating point at some 30
    levels of objects. Among alternatives (`anyOf`, `oneOf`) the best counts: there a fault is what is one for the best
    of them, before and after.
    """

    def __init__(self, max_values: int):
        self.left = max_values
        self.invented = 0
        # (by keys and types, with bounds, invented keys) of containers: without this memory alternatives within
        # alternatives take time exponential in the depth
        self.known: dict[tuple[int, int], tuple[float, float, int]] = {}

    def top(self, shape: Shape, value: Any) -> Grade:
        """The grade of a whole document; nothing where no key or item is there that the schema asks for."""
        keys, full = self.grade(shape, value)
        invented, options = self.invented, shape.options or [shape]
        if type(value) in _CONTAINERS:
            asked = [child for option in options for child in self._asked(option, value)]
            if not asked:
                return Grade(0.0, 0.0, False, invented, self)
            return Grade(keys, full, any(self.grade(child, item)[0] > 0 for child, item in asked), invented, self)
        # a bare scalar is an answer only to a schema that names its type
        named = keys > 0 and all(option.types is not None for option in options)
        return Grade(keys, full, True) if named else Grade(0.0, 0.0, False)

    def fault(self, shape: Shape, value: Any, place: str) -> str | None:
        """The first fault in words, with its place (a JSON pointer); None where the grade sees none."""
        if min(self.grade(shape, value)) == 1.0:
            return None
        if shape.options:
            return self.fault(max(shape.options, key=lambda option: self.grade(option, value)), value, place)
        where, kind = place[:200] or "the document", type_of(value)
        if shape.types is not None and kind not in shape.types:
            return f"{where}: {kind} where {' or '.join(sorted(shape.types)) or 'nothing'} is allowed"
        if isinstance(value, dict):
            for key in shape.required:
                if key not in value:
                    return f"{where}: the key {key[:100]!r} is missing"
            for key, item in value.items():
                child = shape.known(key) or (ANY if key in shape.required else None)
                if child is None:
                    return f"{where}: the key {key[:100]!r} is not in the schema"
                found = self.fault(child, item, f"{place}/{key}")
                if found is not None:
                    return found
        elif isinstance(value, list):
            for index, item in enumerate(value):
                found = self.fault(shape.item(index), item, f"{place}/{index}")
                if found is not None:
                    return found
            return f"{where}: {len(value)} items"
        else:
            try:
                shape.bounds.validate(value)
            except jsonschema_rs.ValidationError as error:
                return f"{where}: {_short(error)}"
        return None

    def _asked(self, shape: Shape, value: Any) -> Iterator[tuple[Shape, Any]]:
        """(shape, value) of the keys or items of a container that the schema asks for."""
        if shape.types is not None and ("object" if isinstance(value, dict) else "array") not in shape.types:
            return
        if isinstance(value, list):
            yield from ((shape.item(index), item) for index, item in enumerate(value))
            return
        for key in shape.required or value:
            if key in value:
                child = shape.known(key) or (ANY if key in shape.required else None)
                if child is not None:
                    yield child, value[key]

    def grade(self, shape: Shape, value: Any) -> tuple[float, float]:
        """(by keys and types, with bounds) of a value."""
        if type(value) in _CONTAINERS:
            return self._container(shape, value)
        if shape.options:
            return self._best(shape.options, value)
        if shape.types is not None and type_of(value) not in shape.types:
            return 0.0, 0.0
        if shape.bounds is None or shape.bounds.is_valid(value):
            return 1.0, 1.0
        return (BOUND, BOUND) if shape.constant else (1.0, BOUND)

    def _container(self, shape: Shape, value: Any) -> tuple[float, float]:
        at = (id(shape), id(value))
        if at in self.known:
            keys, full, invented = self.known[at]
            self.invented += invented
            return keys, full
        before = self.invented
        if shape.perfect is not None and shape.perfect.is_valid(value):
            keys, full = 1.0, 1.0
        elif shape.options:
            keys, full = self._best(shape.options, value)
        elif shape.types is not None and type_of(value) not in shape.types:
            keys, full = 0.0, 0.0
        else:
            keys, full = self._object(shape, value) if type(value) is dict else self._array(shape, value)
        self.known[at] = (keys, full, self.invented - before)
        return keys, full

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
        base = PRESENT if required else 1.0
        credit_keys = credit_full = base
        whole_keys = whole_full = base + len(required)
        for key, item in value.items():
            known = properties.get(key) or shape.known(key)
            if known is None:
                if key not in required:
                    self.invented += 1
                    whole_keys += 1.0
                    whole_full += 1.0
                    continue
                known = ANY
            keys, full = self.grade(known, item)
            if key in required:
                credit_keys += PRESENT + (1 - PRESENT) * keys
                credit_full += PRESENT + (1 - PRESENT) * full
            else:
                whole_keys += (1 - PRESENT) * (1 - keys)
                whole_full += (1 - PRESENT) * (1 - full)
        return credit_keys / whole_keys, credit_full / whole_full

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
        share = min(1.0, (1 + len(value)) / (1 + shape.min_items))
        return share / (1 + beyond + fault_keys), share / (1 + beyond + fault_full)


NO_SCHEMA = CompiledSchema(True)
