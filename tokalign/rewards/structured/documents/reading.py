"""Reading the one structured document that a completion is: strictly, once, within limits, without trusting it.

A completion is untrusted text. Before anything parses it, its size and nesting are bounded; what then parses must be
one document and nothing else. Repeated keys, NaN, infinities, lone surrogates, YAML anchors and tags, XML doctypes and
attributes are faults, not data. Nothing here resolves references, opens files or reaches a network.

`Document` has three states, which every reward component builds on:

- whole: the text is exactly one document (white space around it is free, and so is one Markdown fence);
- partial: a document with text around it, or the well-formed beginning of one that breaks off;
- none: no document, or a faulty one.

JSON and tool calls are read here; `documents/yaml.py` and `documents/xml.py` read the other two into the same values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import pydantic_core

from tokalign.rewards.structured.documents.document import MISSING, Document, Fault, Format, Limits, Source
from tokalign.rewards.structured.documents.xml import decode_xml
from tokalign.rewards.structured.documents.yaml import decode_yaml


def text_of(completion: Source) -> str:
    """The text of a completion as TRL passes it: a string, or messages of which the last one is the answer."""
    if isinstance(completion, str):
        return completion
    content = _message(completion).get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _message(completion: Any) -> Mapping[str, Any]:
    # chat parsers make messages out of what a model writes: anything may be missing or of another type
    if isinstance(completion, Sequence) and completion:
        completion = completion[-1]
    return completion if isinstance(completion, Mapping) else {}


def read_document(
    completion: Source,
    output_format: Format = "json",
    *,
    limits: Limits | None = None,
    reasoning_end: str | None = None,
    wants_list: bool = False,
    types: Any = None,
) -> Document:
    """Read a completion strictly. Never raises for any completion.

    Args:
        completion: text, or messages as TRL passes them; with "tool_call", a message's own `tool_calls` are read too.
        output_format: "json", "yaml", "xml" or "tool_call".
        limits: of size and nesting.
        reasoning_end: only what follows the last occurrence of this text counts, e.g. "</think>".
        wants_list: the document shall be an array (of tool calls, for "tool_call").
        types: XML alone: the shape (`tokalign.rewards.structured.shapes.Shape`) that says which texts are numbers.
    """
    limits = limits or Limits()
    text = text_of(completion)
    fault = unreadable(text, limits)
    if fault is not None:
        return Document(MISSING, fault)
    if reasoning_end is not None:
        _, end, text = text.rpartition(reasoning_end)
        if not end:
            return Document(MISSING, f"the reasoning is not closed by {reasoning_end!r}")
    try:
        if output_format == "tool_call":
            return _read_tool_calls(completion, text.strip(), limits, wants_list)
        return _READERS[output_format](text, limits, wants_list, types)
    except Fault as error:
        return Document(MISSING, str(error))
    except RecursionError:  # the caller's own stack is nearly used up; the depth limit is checked before this
        return Document(MISSING, "nested too deep for this interpreter's stack")


def unreadable(text: str, limits: Limits) -> str | None:
    """Why a text is not even looked at: too long, or not text."""
    # characters first: 50 MB must not be encoded to find out that they are too many
    if len(text) > limits.max_bytes:
        return f"longer than {limits.max_bytes} bytes"
    if text.isascii():
        return None
    try:
        return None if len(text.encode()) <= limits.max_bytes else f"longer than {limits.max_bytes} bytes"
    except UnicodeEncodeError:
        return "a lone surrogate, which is not text"


# ------------------------------------------------------------------------------------------------------------ fences
# Possessive quantifiers throughout: on text made for it, backtracking takes minutes.

_NAMES = {"json": ("", "json"), "yaml": ("", "yaml", "yml"), "xml": ("", "xml"), "tool_call": ("", "json")}
_FENCED = re.compile(r"```[ \t]*+([A-Za-z]*+)[ \t]*+\n(.*)```", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*+([A-Za-z]*+)[ \t]*+\n(.*?)```", re.DOTALL)


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


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
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
        value = _DECODER.decode(text)
    except (json.JSONDecodeError, Fault):
        raise
    except ValueError:  # Python's limit on digits
        raise Fault("an integer of thousands of digits") from None
    _refuse_surrogates(text, value)
    return value


def _refuse_surrogates(text: str, value: Any) -> None:
    # an escape can smuggle in half a character; pairs are ordinary text
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Fault("a lone surrogate, which is not text") from None


def _read_json(text: str, limits: Limits, wants_list: bool, _: Any) -> Document:
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
            value, end = _DECODER.raw_decode(text, start)
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
        _refuse_surrogates(part, value)
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
    return Document(value, reason, outside=len(text) - len(part))


# -------------------------------------------------------------------------------------------------------- tool calls

_MARKS = ("[TOOL_CALLS]", "<|python_tag|>")


def _read_tool_calls(completion: Source, text: str, limits: Limits, wants_list: bool) -> Document:
    """Calls as `{"name": …, "arguments": {…}}`, one or (if wanted) a list, in the chat formats that are common.

    Hermes and Qwen: `<tool_call>{…}</tool_call>`, one after the other. Mistral: `[TOOL_CALLS] [{…}]`. Llama 3: the bare
    object, perhaps after `<|python_tag|>`, with "parameters" for "arguments". Parsed already: a message with
    `tool_calls` in OpenAI's form, arguments as an object or as JSON text.
    """
    parsed = None if isinstance(completion, str) else _message(completion).get("tool_calls")
    if parsed:
        error = "text beside the tool call" if text else None
        return _of_calls(_openai_calls(parsed, limits), error, len(text), wants_list)
    outside, bodies = _tagged(text)
    if bodies:
        calls = []
        for body in bodies:
            check_limits(body, limits)
            try:
                calls.append(_call(decode_json(body.strip())))
            except json.JSONDecodeError as error:
                return Document(MISSING, f"a tool call is not JSON: {error.msg} at character {error.pos}")
        return _of_calls(calls, "text around the tool call" if outside else None, len(outside), wants_list)
    for mark in _MARKS:
        text = text.removeprefix(mark).strip()
    document = _read_json(text, limits, True, None)
    if document.value is MISSING:
        return document
    value = document.value
    calls = [_call(item) for item in value] if isinstance(value, list) else [_call(value)]
    return _of_calls(calls, document.error, document.outside, wants_list, document.fenced)


def _tagged(text: str) -> tuple[str, list[str]]:
    """What stands outside the tags `<tool_call>…</tool_call>`, and what stands in each pair of them."""
    outside, *rest = text.split("<tool_call>")
    bodies = []
    for piece in rest:
        body, closed, after = piece.partition("</tool_call>")
        if closed:
            bodies.append(body)
            outside += after
        else:
            outside += piece
    return outside.strip(), bodies


def _of_calls(calls: list[Any], error: str | None, outside: int, wants_list: bool, fenced: bool = False) -> Document:
    value = calls[0] if len(calls) == 1 and not wants_list else calls
    return Document(value, error, fenced, outside)


def _call(value: Any) -> Any:
    if isinstance(value, dict) and "parameters" in value and "arguments" not in value:
        return {"arguments" if key == "parameters" else key: item for key, item in value.items()}
    return value


def _openai_calls(parsed: Any, limits: Limits) -> list[Any]:
    # whoever parsed the calls may have let anything through, so their text is read again, strictly
    if not isinstance(parsed, list | tuple) or len(parsed) > limits.max_values:
        raise Fault("tool_calls is not a list of calls")
    calls, left = [], limits.max_bytes
    for call in parsed:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Fault("a tool call without a name")
        arguments = function.get("arguments", {})
        try:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        except (TypeError, ValueError, RecursionError):
            raise Fault("the arguments are not JSON") from None
        fault = unreadable(text, limits) or unreadable(function["name"], limits)
        left -= len(text)
        if fault is not None or left < 0:
            raise Fault(fault or f"longer than {limits.max_bytes} bytes")
        check_limits(text, limits)
        try:
            calls.append({"name": function["name"], "arguments": decode_json(text)})
        except json.JSONDecodeError as error:
            raise Fault(f"the arguments are not JSON: {error.msg} at character {error.pos}") from None
    return calls


# ----------------------------------------------------------------------------------------------------- YAML and XML


def _read_yaml(text: str, limits: Limits, _: bool, __: Any) -> Document:
    # a block of text after `|` needs the end of its last line
    return _read_markup(text, "yaml", lambda body: decode_yaml(body.rstrip() + "\n", limits))


def _read_xml(text: str, limits: Limits, _: bool, types: Any) -> Document:
    return _read_markup(text, "xml", lambda body: decode_xml(body.strip(), limits, types))


def _read_markup(text: str, output_format: Format, decode: Callable[[str], Any]) -> Document:
    body, fenced = unfence(text, output_format)
    if not body.strip():
        return Document(MISSING, "empty")
    try:
        return Document(decode(body), None, fenced)
    except Fault as error:
        block = one_block(text, output_format)
        if block is None and output_format == "xml" and "<" in body:
            block = body[body.index("<") : body.rfind(">") + 1]
        if not block or block == body:
            raise
        outside = len(text.strip()) - len(block.strip())
        try:
            return Document(decode(block), "text around the document", outside=outside)
        except Fault:
            raise error from None


_READERS: dict[str, Callable[[str, Limits, bool, Any], Document]] = {
    "json": _read_json,
    "yaml": _read_yaml,
    "xml": _read_xml,
}
