"""JSON, read strictly, and the Markdown fence that a document of any format may stand in."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import pydantic_core

from tokalign.rewards.structured.documents.document import MISSING, Document, Fault, Format, Limits

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
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
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
    try:
        return Document(decode_json(body), None, fenced)
    except json.JSONDecodeError as error:
        return _partial_json(body, error, limits, wants_list)


def _partial_json(text: str, error: json.JSONDecodeError, limits: Limits, wants_list: bool) -> Document:
    """What can be told of a text that is not one document: one with text around it, or the beginning of one."""
    if not text:
        return Document(MISSING, "empty")
    reason = f"not JSON: {error.msg} at character {error.pos}"
    opener = re.compile(r"[\[{]" if wants_list else "{")
    position, document = 0, None
    for _ in range(_STARTS):
        match = opener.search(text, position)
        if match is None:
            break
        start = match.start()
        try:
            value, end = DECODER.raw_decode(text, start)
        except json.JSONDecodeError as inner:
            if document is None and inner.pos > start + 1:  # a document that breaks off, not a brace in prose
                return _beginning(text, start, inner.pos, reason, limits)
            position = start + 1
            continue
        except Fault:
            raise
        except ValueError:
            raise Fault("an integer of thousands of digits") from None
        if document is not None:
            return Document(MISSING, "more than one document")  # nobody can tell which one is the answer
        part = text[start:end]
        refuse_surrogates(part, value)
        check_limits(part, limits)  # quotes outside it may have hidden its brackets from the check of the whole text
        document = Document(value, "text around the document", outside=len(text) - len(part))
        position = end
    return document or Document(MISSING, reason)


def _beginning(text: str, start: int, end: int, reason: str, limits: Limits) -> Document:
    """The well-formed beginning `text[start:end]` of a document, its open brackets closed."""
    part = text[start:end]
    check_limits(part, limits)
    try:
        value = pydantic_core.from_json(part, allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return Document(MISSING, reason)
    return Document(value, reason, outside=len(text) - len(part), broken=True)
