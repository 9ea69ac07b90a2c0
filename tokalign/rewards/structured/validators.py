"""jsonschema-rs for untrusted text: offline, patterns in linear time where they can, errors without the value."""

from __future__ import annotations

from typing import Any

import jsonschema_rs

_OFFLINE: dict[str, Any] = {"offline": True, "validate_formats": True, "mask": "the value"}
_REGULAR = jsonschema_rs.RegexOptions()
_BOUNDED = jsonschema_rs.FancyRegexOptions(backtrack_limit=10_000)  # for patterns that are not regular


def validator(schema: dict[str, Any] | bool) -> jsonschema_rs.Validator:
    """A validator that never leaves this process."""
    try:
        return jsonschema_rs.validator_for(schema, pattern_options=_REGULAR, **_OFFLINE)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return jsonschema_rs.validator_for(schema, pattern_options=_BOUNDED, **_OFFLINE)


def validator_map(schema: dict[str, Any] | bool) -> jsonschema_rs.ValidatorMap:
    """Validators of a schema and of every schema within it, by JSON pointer."""
    try:
        return jsonschema_rs.validator_map_for(schema, pattern_options=_REGULAR, **_OFFLINE)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return jsonschema_rs.validator_map_for(schema, pattern_options=_BOUNDED, **_OFFLINE)


def short(error: Exception) -> str:
    """The message of a library's error in one line."""
    text = getattr(error, "message", None) or str(error)
    return " ".join(text.split())[:300].rstrip(".")
