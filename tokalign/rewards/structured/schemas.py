"""JSON Schemas for rewards: read, checked and compiled once, offline.

`CompiledSchema` gives full validity, by jsonschema-rs (`validators`), and a graded reading of keys and types
(`grading`, over the schema's `shapes`). A remote or file `$ref`, an unknown dialect and an invalid schema are errors at
start-up that name the place.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema_rs

from tokalign.rewards.structured import validators
from tokalign.rewards.structured.grading import Grade, Walk
from tokalign.rewards.structured.shapes import DATA, NAMED, OBJECT_WORDS, ShapeCompiler, subschemas, type_of
from tokalign.rewards.structured.validators import short

_MAX_VALUES = 10_000
_MODEL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_REFERENCES = {"$ref", "$dynamicRef", "$recursiveRef"}
_IN_PLACE = set("allOf anyOf oneOf if not $ref $dynamicRef dependentSchemas dependencies dependentRequired".split())


class SchemaError(ValueError):
    """A schema that cannot be used; the message is one sentence with the place in it and the remedy."""


def load_schema(schema: Any) -> dict[str, Any] | bool:
    """A schema from an object, JSON text, the path of a JSON file, a Pydantic model class or "module:Model".

    Raises:
        SchemaError: no such file or model, no JSON, or nothing that can be a schema.
    """
    if isinstance(schema, str) and _MODEL.fullmatch(schema):
        schema = _model(schema)
    if hasattr(schema, "model_json_schema"):
        from tokalign.rewards.structured import models  # Pydantic is slow to import; who gives a model has done so

        try:
            forms = models.forms(schema)
        except ValueError as error:
            raise SchemaError(f"The Pydantic model {schema.__name__} has no JSON Schema ({short(error)}).") from None
        return forms[0] if len(forms) == 1 else {"anyOf": [_close(form) for form in forms]}
    if isinstance(schema, Path) or (isinstance(schema, str) and not _is_text(schema)):
        try:
            schema = Path(schema).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            name = str(schema)[:200]
            raise SchemaError(f"The schema file {name} cannot be read ({reason}); check the path.") from None
    return _of_text(schema) if isinstance(schema, str) else _of_kind(schema)


def _model(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SchemaError(f"The Pydantic model {name} cannot be imported ({error}); check PYTHONPATH.") from None
    if not hasattr(model, "model_json_schema"):
        raise SchemaError(f"{name} is not a Pydantic model; name a subclass of BaseModel, or a JSON Schema file.")
    return model


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
        # By its text, so that equal schemas are compiled once, whether they come from a file, a model class or a row.
        return compile_text(json.dumps(load_schema(schema)))
    except SchemaError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is not JSON ({str(error)[:200]}); give a JSON Schema.") from None


@lru_cache(maxsize=8192)
def compile_text(text: str) -> CompiledSchema:
    """Compile JSON text, and never take it for a path: the rows of a dataset may not name files."""
    return CompiledSchema(_of_text(text))


class CompiledSchema:
    """A schema ready to judge values.

    Attributes:
        schema: as given.
        shape: its keys and types.
    """

    def __init__(self, schema: dict[str, Any] | bool):
        self.schema = schema
        try:
            parts = list(subschemas(schema, "#"))
            formats = validators.own_formats(schema, parts)
            self._validator = validators.validator(schema, formats)
        except jsonschema_rs.ReferencingError as error:
            raise SchemaError(f"{_place(schema, str(error))}: {short(error)}; put it under `$defs`.") from None
        except jsonschema_rs.ValidationError as error:
            where = "".join(f"/{part}" for part in error.instance_path) or _place(schema, error.message)
            remedy = "only references within the schema are followed" if "esource" in error.message else "mend it there"
            what = short(error)
            found = _bad_pattern(parts)
            if found is not None:
                where, what = found[0], f"the pattern {found[1][:200]!r} is no regular expression that can be used"
            raise SchemaError(f"The schema is invalid at {where}: {what}; {remedy}.") from None
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"The schema cannot be compiled ({short(error)}); simplify it.") from None
        try:
            # where closing every object says the same as the grade, one call tells a perfect part from the others
            closed = (
                validators.validator_map(_close(schema), formats) if all(_closable(part) for _, part in parts) else None
            )
            shapes = ShapeCompiler(schema, parts, closed, formats)
            self.shape = shapes.shape((schema,))
            self._exact = not shapes.overlapping
        except RecursionError:
            raise SchemaError("The schema is nested too deep; simplify it.") from None
        # closed alternatives may exclude one another where the schema's own do not
        self._exclusive = any("oneOf" in part for _, part in parts)
        self._refers = any(_REFERENCES & part.keys() for _, part in parts)

    @property
    def only_empty(self) -> bool:
        """Whether no object or array that holds anything is right, so that an empty one is all that can be asked."""
        return all(option.empty for option in self.shape.options or [self.shape])

    @property
    def wants_list(self) -> bool:
        """Whether the document shall be an array."""
        return any(s.types is not None and "array" in s.types for s in (self.shape.options or [self.shape]))

    def takes(self, value: Any) -> bool:
        """Whether a document may have the type of this value."""
        kinds = [option.allowed for option in self.shape.options or [self.shape]]
        return any(allowed is None or type_of(value) in allowed for allowed in kinds)

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
            if self.shape.perfect.is_valid(value):
                return not self._exclusive or self._validator.is_valid(value)
        except (ValueError, TypeError, RecursionError):
            return False
        return False if self._exact else None

    def first_error(self, value: Any, grade: Grade | None = None) -> str | None:
        """The first fault in words, with its place: by the grade, else a breach of the schema; None if there is none.

        The grade of this very value spares a second pass. Raises `TooManyValues`.
        """
        walk = None if grade is None else grade.walk
        fault = (walk or Walk(_MAX_VALUES)).fault(self.shape, value, "")
        if fault is not None or self.is_valid(value):
            return fault
        if self._refers:  # the validator remembers nothing while it explains: it would take gigabytes for recursion
            return "the document: a rule of the schema is broken"
        try:
            self._validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return f"{''.join(f'/{part}' for part in error.instance_path)[:200] or 'the document'}: {short(error)}"
        except (ValueError, TypeError, RecursionError) as error:
            return f"the document: {short(error)}"
        return None

    def grade(self, value: Any, *, max_values: int = _MAX_VALUES) -> Grade:
        """How far a value has the schema's keys and types. Raises `TooManyValues`."""
        return Walk(max_values).top(self.shape, value)

    def invented_keys(self, value: Any, *, max_values: int = _MAX_VALUES) -> int:
        """Keys of `value`, at any level, that the schema does not know. Raises `TooManyValues`."""
        return self.grade(value, max_values=max_values).invented


def _bad_pattern(parts: list[tuple[str, dict[str, Any]]]) -> tuple[str, str] | None:
    """(place, pattern) of the first pattern that cannot be compiled."""
    for at, part in parts:
        keys = part.get("patternProperties")
        patterns = [("pattern", part.get("pattern"))]
        patterns += [("patternProperties", key) for key in (keys if isinstance(keys, dict) else ())]
        for word, pattern in patterns:
            if isinstance(pattern, str):
                try:
                    validators.validator({"pattern": pattern})
                except (jsonschema_rs.ValidationError, ValueError):
                    return f"{at[1:]}/{word}", pattern
    return None


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


def _closable(schema: dict[str, Any]) -> bool:
    """Whether `additionalProperties: false` would refuse exactly the keys that the grade calls invented."""
    in_place = _IN_PLACE & schema.keys()
    if in_place - {"anyOf", "oneOf", "$ref"} or len(in_place) > 1 or (in_place and OBJECT_WORDS & schema.keys()):
        return False
    return not {"unevaluatedProperties", "$recursiveRef", "contains"} & schema.keys()


def _close(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A copy of the schema in which every object that names its keys refuses others: then one call of the library says
    # whether a document is valid *and* has no invented key, and most documents need no grading in Python.
    closed: dict[str, Any] = {}
    for word, item in schema.items():
        if word in NAMED and isinstance(item, dict):
            closed[word] = {name: _close(member) for name, member in item.items()}
        else:
            closed[word] = item if word in DATA else _close(item)
    keyed = "properties" in schema or "patternProperties" in schema
    properties, required = closed.get("properties", {}), schema.get("required", [])
    # the metaschema sees to these types, but for what stands under a keyword that it does not know
    if not isinstance(properties, dict) or not isinstance(required, list):
        return closed
    if keyed and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
        unnamed: dict[str, Any] = {name: {} for name in required if isinstance(name, str)}
        closed["properties"] = unnamed | properties  # a required key is never invented
    return closed


NO_SCHEMA = CompiledSchema(True)
