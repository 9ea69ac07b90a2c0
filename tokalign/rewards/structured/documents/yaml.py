"""YAML as data: one document, JSON's own types, nothing that expands or constructs.

libyaml gives events and this builds values from them without recursion. Anchors, aliases and tags are refused (an alias
bomb is a kilobyte that expands to gigabytes; a tag names a type to construct), so are repeated keys and deep nesting.
Plain scalars have the types of YAML 1.2's core schema: `yes`, `1:30` and `2024-01-01` are strings.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from tokalign.rewards.structured.documents.document import Fault, Limits

_TAG_DIRECTIVE = re.compile(r"^%TAG", re.MULTILINE)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NULLS = ("", "~", "null", "Null", "NULL")
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MAX_DIGITS = 400


def decode_yaml(text: str, limits: Limits) -> Any:
    """The value of the only document in `text`. Raises `Fault`."""
    if _TAG_DIRECTIVE.search(text):  # libyaml compares each with all others
        raise Fault("YAML tags are not allowed")
    stack: list[_Open] = []
    documents: list[Any] = []
    left = limits.max_values
    try:
        event: Any
        for event in yaml.parse(text, Loader=yaml.CLoader):  # events only: nothing is constructed
            kind = type(event)
            if kind is yaml.ScalarEvent:
                _refuse_extras(event)
                value = _scalar(event.value) if event.implicit[0] else event.value
            elif kind in _STARTS:
                _refuse_extras(event)
                if len(stack) == limits.max_depth:
                    raise Fault(f"nested deeper than {limits.max_depth}")
                stack.append(_Open(_STARTS[kind]()))
                continue
            elif kind in _ENDS:
                value = stack.pop().value
            elif kind is yaml.AliasEvent:
                raise Fault("YAML anchors and aliases are not allowed")
            else:
                continue
            if _put(stack, documents, value):
                left -= 1
                if left < 0:
                    raise Fault(f"more than {limits.max_values} values")
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        raise Fault(f"not YAML: {problem[:200]}" + (f" in line {mark.line + 1}" if mark else "")) from None
    if not documents:
        raise Fault("empty")
    return documents[0]


_STARTS: dict[type, type] = {yaml.MappingStartEvent: dict, yaml.SequenceStartEvent: list}
_ENDS = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
_NO_KEY = object()


def _refuse_extras(event: Any) -> None:
    if event.anchor is not None:
        raise Fault("YAML anchors and aliases are not allowed")
    if event.tag is not None:
        raise Fault("YAML tags are not allowed")


class _Open:
    """A container that is still being filled; of a mapping also the key that waits for its value."""

    __slots__ = ("key", "value")

    def __init__(self, value: dict[str, Any] | list[Any]):
        self.value = value
        self.key: Any = _NO_KEY


def _put(stack: list[_Open], documents: list[Any], value: Any) -> bool:
    """Put a value where it belongs, and whether it is a value and not a key."""
    if not stack:
        if documents:
            raise Fault("more than one document")
        documents.append(value)
        return True
    top = stack[-1]
    if isinstance(top.value, list):
        top.value.append(value)
    elif top.key is _NO_KEY:
        if not isinstance(value, str):
            raise Fault(f"the key {str(value)[:100]} is not a string")
        if value in top.value:
            raise Fault(f"the key {value[:100]!r} is repeated")
        top.key = value
        return False
    else:
        top.value[top.key] = value
        top.key = _NO_KEY
    return True


def _scalar(text: str) -> Any:
    if text in _NULLS:
        return None
    if text in _TRUTHS:
        return _TRUTHS[text]
    if _NOT_FINITE.fullmatch(text):
        raise Fault(f"the number {text} is not finite")
    if len(text) > _MAX_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise Fault(f"the number {text[:40]} is out of range")
        return number
    return text
