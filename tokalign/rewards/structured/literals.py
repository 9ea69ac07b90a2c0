"""Java and JavaScript values as source text, as the Berkeley Function-Calling Leaderboard asks for them.

Its Java and JavaScript functions take every argument as a string: "true", "42L", "new int[]{1, 2}", "{limit: 50}". To
compare one with the allowed values, which are plain JSON, it is read by its declared type. A text that is no literal of
that type stays what it is, since it may name a variable.

Two differences from the leaderboard's own converter, which cannot read some of its own answers: a quoted string in a
Java array is the string without its quotes, and items of the type "any" are read by their look.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

Language = Literal["java", "javascript"]
# A type is the leaderboard's name of it; of a container with declared items, `[type, type of the items]`.
Type = str | list[str]

_WHOLE, _DECIMAL = r"(-?\d{1,300})", r"(-?\d{1,300}(?:\.\d{1,300})?"
_EXPONENT = r"(?:[eE][+-]?\d{1,3})?)"
_NUMBERS: dict[str, dict[str, re.Pattern[str]]] = {
    "java": {
        **dict.fromkeys(("byte", "short", "integer"), re.compile(_WHOLE)),
        "long": re.compile(_WHOLE + "[lL]"),
        "float": re.compile(_DECIMAL + _EXPONENT + "[fF]"),
        "double": re.compile(_DECIMAL + _EXPONENT),
    },
    "javascript": {
        "integer": re.compile(_WHOLE),
        "float": re.compile(_DECIMAL + ")"),
        "Bigint": re.compile(_WHOLE + "n"),
    },
}
_DECIMALS = ("float", "double")
_BY_LOOK = {"java": ("integer", "long", "double", "float"), "javascript": ("integer", "float")}
_SUFFIXES = {"long": "L", "Bigint": "n"}
_LISTS = ("Array", "ArrayList", "array")
_OBJECTS = ("HashMap", "dict")
# What stands in a Java list, array or map; the first group is None for an empty one.
_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.*)\)\)", re.DOTALL)
_ADDED = re.compile(r"new\s+ArrayList<\w*>\(\)\s*(?:\{\s*\{(.*)\}\s*\})?", re.DOTALL)
_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*)\}", re.DOTALL)
_MAP = re.compile(r"new\s+HashMap<[^>]*>\s*\(\)\s*(?:\{\s*\{(.*)\}\s*\})?", re.DOTALL)
_NEW_ARRAY = re.compile(r"(?:\[|new\s+Array\()(.*)[\])]", re.DOTALL)
# a quote that never ends takes the rest with it: tried anew at each escaped quote, it would take the square of the time
_PIECE = re.compile(r""""(?:[^"\\]|\\.)*+"?|'(?:[^'\\]|\\.)*+'?|.""", re.DOTALL)
_DEEPEST = 8


def read_literal(text: str, kind: Type, language: Language) -> Any:
    """The value that source text of a declared type stands for; the text itself where it is no literal of that type."""
    outer, inner = kind if isinstance(kind, list) else (kind, None)
    bare = text.strip()
    if outer in _LISTS:
        items = _items(bare, language)
        return text if items is None else [_element(item, inner, language, 0) for item in items]
    if outer in _OBJECTS:
        pairs = _pairs(bare, language)
        return text if pairs is None else {key: _element(item, None, language, 0) for key, item in pairs}
    if outer in ("boolean", "Boolean") and text in ("true", "false"):
        return text == "true"
    if outer == "String" and language == "javascript":
        return _unquoted(text)
    number = _number(text, outer, language)
    return text if number is None else number


def write_literal(value: Any, kind: Type, language: Language) -> str:
    """Source text of a value of a declared type, the inverse of `read_literal`; a string is a name, or a String."""
    outer, inner = kind if isinstance(kind, list) else (kind, None)
    if isinstance(value, str):
        return value
    if language == "javascript":
        return json.dumps(value, ensure_ascii=False) + ("n" if outer == "Bigint" else "")
    if isinstance(value, list):
        items = ", ".join(_java(item, inner) for item in value)
        if outer != "Array":
            return f"new ArrayList<>(Arrays.asList({items}))"
        return f"new {_ELEMENTS.get(inner or 'any', inner)}[]{{{items}}}"
    if isinstance(value, dict):
        puts = " ".join(f"put({json.dumps(key, ensure_ascii=False)}, {_java(item)});" for key, item in value.items())
        return f"new HashMap<>() {{{{ {puts} }}}}" if puts else "new HashMap<>()"
    return _java(value, outer)


_ELEMENTS = {"any": "Object", "integer": "int"}


def _java(value: Any, kind: str | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text + ({**_SUFFIXES, "float": "f"}.get(kind or "", "") if number else "")


def _number(text: str, kind: str, language: Language) -> int | float | None:
    pattern = _NUMBERS[language].get(kind)
    match = pattern and pattern.fullmatch(text)
    if not match:
        return None
    return float(match[1]) if kind in _DECIMALS else int(match[1])


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _element(text: str, kind: str | None, language: Language, depth: int) -> Any:
    """An item of a container: of its declared type, else by its look."""
    if _unquoted(text) != text:
        return _unquoted(text)
    if kind not in (None, "any"):
        number = _number(text, str(kind), language)
        return text if number is None else number
    if text in ("true", "false"):
        return text == "true"
    if language == "javascript" and depth < _DEEPEST:
        if text.startswith("[") and (items := _items(text, language)) is not None:
            return [_element(item, None, language, depth + 1) for item in items]
        if text.startswith("{") and (pairs := _pairs(text, language)) is not None:
            return {key: _element(item, None, language, depth + 1) for key, item in pairs}
    numbers = (_number(text, one, language) for one in _BY_LOOK[language])
    return next((number for number in numbers if number is not None), text)


def _items(text: str, language: Language) -> list[str] | None:
    """Source text of the items of a list; None where the text is none."""
    if language == "javascript":
        match = _NEW_ARRAY.fullmatch(text)
        return _split(match[1], ",") if match else None
    if match := _AS_LIST.fullmatch(text) or _ARRAY.fullmatch(text):
        return _split(match[1], ",")
    match = _ADDED.fullmatch(text)
    return [arguments[0] for arguments in _calls(match[1] or "", "add")] if match else None


def _pairs(text: str, language: Language) -> list[tuple[str, str]] | None:
    """Key and source text of each value of a map; None where the text is none."""
    if language == "java":
        match = _MAP.fullmatch(text)
        calls = _calls(match[1] or "", "put") if match else []
        return [(_unquoted(each[0]), each[1]) for each in calls if len(each) == 2] if match else None
    if not (text.startswith("{") and text.endswith("}")):
        return None
    halves = [_split(pair, ":") for pair in _split(text[1:-1], ",")]
    return [(_unquoted(half[0]), ":".join(half[1:])) for half in halves]


def _calls(text: str, name: str) -> Iterator[list[str]]:
    """Arguments of each `name(…);`."""
    for statement in _split(text, ";"):
        if statement.startswith(name + "(") and statement.endswith(")"):
            yield _split(statement[len(name) + 1 : -1], ",") or [""]


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that stand in no quotes and no brackets; nothing for blank text."""
    parts, begin, depth = [], 0, 0
    for piece in _PIECE.finditer(text):
        if piece[0] in "([{":
            depth += 1
        elif piece[0] in ")]}":
            depth -= 1
        elif piece[0] == separator and depth == 0:
            parts.append(text[begin : piece.start()].strip())
            begin = piece.end()
    last = text[begin:].strip()
    return [*parts, last] if last or parts else []
