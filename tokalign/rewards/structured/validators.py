"""jsonschema-rs for untrusted text: offline, patterns in linear time where they can, errors without the value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import jsonschema_rs

_DRAFTS = {
    jsonschema_rs.Draft4Validator: 4,
    jsonschema_rs.Draft6Validator: 6,
    jsonschema_rs.Draft7Validator: 7,
    jsonschema_rs.Draft201909Validator: 2019,
    jsonschema_rs.Draft202012Validator: 2020,
}
_OFFLINE: dict[str, Any] = {"offline": True, "validate_formats": True, "mask": "the value"}
# Formats that a draft does not know yet. Whoever writes one in a schema of that draft wants it checked all the same.
_LATER: dict[int, tuple[str, ...]] = {7: ("uuid", "duration")}
_LATER[6] = (*_LATER[7], "iri", "iri-reference", "idn-hostname", "relative-json-pointer")
_LATER[4] = (*_LATER[6], "uri-reference", "uri-template", "json-pointer")
# What Pydantic writes: RFC 3339, where the offset may be missing.
LOCAL_DATETIME = "date-time with or without an offset"
LOCAL_TIME = "time with or without an offset"
_LOCAL = {LOCAL_DATETIME: "date-time", LOCAL_TIME: "time"}
_REGULAR = jsonschema_rs.RegexOptions()
_BOUNDED = jsonschema_rs.FancyRegexOptions(backtrack_limit=10_000)  # for patterns that are not regular


def draft(schema: dict[str, Any] | bool) -> int:
    """The draft of JSON Schema that a schema is written in: 4, 6, 7, 2019 or 2020."""
    return _DRAFTS.get(jsonschema_rs.validator_cls_for(schema), 2020)


def own_formats(schema: dict[str, Any] | bool, parts: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The checks of the formats that parts of a schema name and that the library does not know for its draft.

    Only these are given to a validator: it is slower with checks in Python, whether they are asked or not.
    """
    later = {LOCAL_DATETIME, LOCAL_TIME, *_LATER.get(draft(schema), ())}
    named = {part["format"] for _, part in parts if isinstance(part.get("format"), str)}
    return {name: _format(name) for name in sorted(named & later)}


def validator(schema: dict[str, Any] | bool, formats: Mapping[str, Any] | None = None) -> jsonschema_rs.Validator:
    """A validator that never leaves this process; `formats` are from `own_formats`."""
    return _compiled(jsonschema_rs.validator_for, schema, formats)


def validator_map(
    schema: dict[str, Any] | bool, formats: Mapping[str, Any] | None = None
) -> jsonschema_rs.ValidatorMap:
    """Validators of a schema and of every schema within it, by JSON pointer."""
    return _compiled(jsonschema_rs.validator_map_for, schema, formats)


def _compiled(compiler: Any, schema: dict[str, Any] | bool, formats: Mapping[str, Any] | None) -> Any:
    options = {**_OFFLINE, "formats": formats} if formats else _OFFLINE
    try:
        return compiler(schema, pattern_options=_REGULAR, **options)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return compiler(schema, pattern_options=_BOUNDED, **options)


@cache
def _format(name: str) -> Callable[[str], bool]:
    if name in _LOCAL:
        check = _format(_LOCAL[name])
        return lambda text: check(text) or check(f"{text}Z")
    return validator({"format": name}).is_valid


def short(error: Exception) -> str:
    """The message of a library's error in one line."""
    text = getattr(error, "message", None) or str(error)
    return " ".join(text.split())[:300].rstrip(".")
