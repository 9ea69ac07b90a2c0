"""The JSON Schema of a Pydantic model, by which the model's own JSON is a perfect answer.

`Model.model_json_schema()` says what the model reads, by the letter of JSON Schema. What the model writes
(`model_dump_json`) may differ: a `datetime` without an offset, a negative or fractional duration, a decimal with an
exponent, field names where the schema has aliases, computed fields. The schema made here allows both.
"""

from __future__ import annotations

from typing import Any

from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from tokalign.rewards.structured.validators import LOCAL_DATETIME, LOCAL_TIME

_DURATION = r"^-?P(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?$"
_EXPONENT = r"^-?\d(\.\d+)?E[-+]\d+$"


class _AsWritten(GenerateJsonSchema):
    """Pydantic's schema with the formats that its own serializer writes."""

    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        made = super().datetime_schema(schema)
        return made | {"format": LOCAL_DATETIME} if made.get("format") == "date-time" else made

    def time_schema(self, schema: Any) -> dict[str, Any]:
        made = super().time_schema(schema)
        return made | {"format": LOCAL_TIME} if made.get("format") == "time" else made

    def timedelta_schema(self, schema: Any) -> dict[str, Any]:
        made = super().timedelta_schema(schema)
        return {"type": "string", "pattern": _DURATION} if made.get("format") == "duration" else made

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        made = super().decimal_schema(schema)
        for option in (made, *made.get("anyOf", ())):
            if "pattern" in option:
                option["pattern"] = f"{option['pattern']}|{_EXPONENT}"
        return made


def forms(model: Any) -> list[dict[str, Any]]:
    """The schemas of the JSON forms of a model that differ: as it reads, as it writes by alias, and as it writes.

    Raises ValueError where the model has no JSON Schema.
    """
    if not hasattr(model, "model_config"):  # not Pydantic's, though it calls itself so
        return [model.model_json_schema()]
    as_written = bool(model.model_config.get("serialize_by_alias"))
    kinds: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    try:
        for mode, by_alias in (("validation", True), ("serialization", True), ("serialization", as_written)):
            kind = {"mode": mode, "by_alias": by_alias, "schema_generator": _AsWritten}
            form = model.model_json_schema(**kind)
            if form not in found:
                found.append(form)
                kinds.append(kind)
        if len(found) == 1:
            return found
        # each form brings its own `$defs`, to which its references must lead when they stand beside each other
        templates = [f"#/anyOf/{index}/$defs/{{model}}" for index in range(len(kinds))]
        return [model.model_json_schema(ref_template=at, **kind) for at, kind in zip(templates, kinds, strict=True)]
    except PydanticUserError as error:
        raise ValueError(error.message) from None
