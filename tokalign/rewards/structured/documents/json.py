"""JSON, read strictly, and the Markdown fence that a document of any format may stand in."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import pydantic_core

from tokalign.rewards.structured.documents.document import MISSING, Document, Fault, Format, Limits, Part

# ------------------------------------------------------------------------------------------------------------ fences
# Possessive quantifiers throughout: on text made for it, backtracking takes minutes.

_NAMES = {"json": ("", "json"), "yaml": ("", "yaml", "yml"), "xml": ("", "xml"), "tool_call": ("", "json")}
_FENCED = re.compile(r"```[ \t]*+([A-Za-z]*+)[ \t]*+\r?\n(.*)```", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*+([A-Za-z]*+)[ \t]*+\r?\n(.*?)```", re.DOTALL)


def unfence(text: str, output_format: Format) -> tuple[str, bool]:
    """The text inside one fence around everything, and whether there was one."""
    bare = text.strip()
    if not (bare.startswith("```") and bare.endswith("```")):
        return text, False
    match = _FENCED.fullmatch(bare)
    if match is None or match[1].lower() not in _NAMES[output_format]:
        return text, False
    return match[2], True


def one_block(text: str, output_format: Format) -> str | None:
    """The content of the only fenced block of this format, None if there is none or more than one."""
    blocks = [m[2] for m in _BLOCK.finditer(text) if m[1].lower() in _NAMES[output_format]]
    return blocks[0] if len(blocks) == 1 else None


# -------------------------------------------------------------------------------------------------------------- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    by_key = dict(pairs)
    if len(by_key) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Fault(f"the key {repeated[:100]!r} is repeated")
    return by_key


def _constant(name: str) -> NoReturn:
    raise Fault(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Fault(f"the number {text[:40]} is out of range")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # a string that never ends takes the rest with it
_OPENERS = {True: re.compile(r"[\[{]"), False: re.compile("{")}
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_EXTRA = "Extra data"  # the parser's word for text behind a document
_BETWEEN = re.compile("[,:]")
_FEW = 32  # keys that are counted in a text one by one
_STARTS = 8  # places in a text where a document is looked for; each costs at most one pass


def check_limits(text: str, limits: Limits) -> None:
    """Raise `Fault` if JSON text nests too deep or holds too many values, without parsing."""
    if text.count("{") + text.count("[") <= limits.max_depth and text.count(",") < limits.max_values:
        return
    bare = _STRING.sub("", text)
    if bare.count(",") >= limits.max_values:
        raise Fault(f"more than {limits.max_values} values")
    depth = 0
    for bracket in _NO_BRACKET.sub("", bare):
        depth += 1 if bracket in "[{" else -1
        if depth > limits.max_depth:
            raise Fault(f"nested deeper than {limits.max_depth}")


def decode_json(text: str) -> Any:
    """Strict JSON: `Fault` for what must not be mended, `json.JSONDecodeError` for other errors of syntax."""
    try:
        value = DECODER.decode(text)
    except (json.JSONDecodeError, Fault):
        raise
    except ValueError:  # Python's limit on digits
        raise Fault("an integer of thousands of digits") from None
    refuse_surrogates(text, value)
    return value


def refuse_surrogates(text: str, value: Any) -> None:
    """Raise `Fault` if JSON text holds a lone surrogate as an escape."""
    # an escape can smuggle in half a character; pairs are ordinary text
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Fault("a lone surrogate, which is not text") from None


def read_json(text: str, limits: Limits, wants_list: bool) -> Document:
    """The one document of a text, the one with text around it, or the beginning of one. Raises `Fault`."""
    body, fenced = unfence(text, "json")
    body = body.strip()
    check_limits(body, limits)
    at = text.find(body)
    try:
        return Document(decode_json(body), None, fenced, parts=(Part("", at, at + len(body)),))
    except json.JSONDecodeError as error:
        return _partial_json(body, at, error, limits, wants_list)


def _partial_json(text: str, at: int, error: json.JSONDecodeError, limits: Limits, wants_list: bool) -> Document:
    """What can be told of a text that is not one document: one with text around it, or the beginning of one.

    `at` is where the text stands in all that is judged.
    """
    if not text:
        return Document(MISSING, "empty")
    reason = f"not JSON: {error.msg} at character {error.pos}"
    opener = _OPENERS[wants_list]
    position, document = 0, None
    for _ in range(_STARTS):
        match = opener.search(text, position)
        if match is None:
            break
        start = match.start()
        if not start and error.msg != _EXTRA and error.pos > 1:  # it is of this very document: no need to read it again
            return _beginning(text, at, start, error.pos, reason, limits)
        try:
            value, end = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as inner:
            if document is None and inner.pos > start + 1:  # a document that breaks off, not a brace in prose
                return _beginning(text, at, start, inner.pos, reason, limits)
            position = start + 1
            continue
        except Fault:
            raise
        except ValueError:
            raise Fault("an integer of thousands of digits") from None
        if document is not None:
            # nobody can tell which one is the answer
            return Document(MISSING, "more than one document", parts=(Part("", at + start, at + start),))
        part = text[start:end]
        refuse_surrogates(part, value)
        check_limits(part, limits)  # quotes outside it may have hidden its brackets from the check of the whole text
        place = Part("", at + start, at + end)
        document = Document(value, "text around the document", outside=len(text) - len(part), parts=(place,))
        position = end
    return document or Document(MISSING, reason, parts=(Part("", at + error.pos, at + error.pos),))


def _beginning(text: str, at: int, start: int, end: int, reason: str, limits: Limits) -> Document:
    """The well-formed beginning `text[start:end]` of a document, its open brackets closed."""
    part = text[start:end]
    check_limits(part, limits)
    parts = (Part("", at + start, at + end),)
    try:
        value = pydantic_core.from_json(part, allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return Document(MISSING, reason, parts=parts)
    _refuse_repeated(part, value)
    return Document(value, reason, outside=len(text) - len(part), broken=True, parts=parts)


def _refuse_repeated(part: str, value: Any) -> None:
    """Raise `Fault` if an object that the beginning `part` of a document leaves open repeats a key.

    What is closed has been read strictly; `value` is what a lenient parser read, which keeps one of the two.
    """
    # Most beginnings need no second parse: each key of an open object stands there as often as in what was read of it.
    # But not a key that may be what stands between two strings: that has a comma or a colon.
    whole, keys = value, list[str]()
    while value and type(value) in (dict, list):
        if type(value) is list:
            value = value[-1]
        else:
            keys += value
            value = value[keys[-1]]
    if "\\" not in part and len(keys) <= _FEW and not _BETWEEN.search("".join(keys)):
        read = pydantic_core.to_json(whole).decode()
        if all([part.count(quoted) == read.count(quoted) for quoted in [f'"{key}"' for key in keys]]):
            return
    bare = _STRING.sub(lambda match: "_" * len(match[0]), part)
    for end in (len(part), max(bare.rfind(","), bare.rfind("{"))):  # the last value may be cut
        opened: list[str] = []
        for bracket in _NO_BRACKET.sub("", bare[:end]):
            if bracket in "[{":
                opened.append("}" if bracket == "{" else "]")
            else:
                opened.pop()
        try:
            DECODER.decode(part[:end] + "".join(reversed(opened)))
        except json.JSONDecodeError:
            continue
        return
