"""Reading the one structured document that a completion is: strictly, once, within limits, without trusting it.

A completion is untrusted text. Before anything parses it, its size and nesting are bounded; what then parses must be
one document and nothing else. Repeated keys, NaN, infinities, lone surrogates, YAML anchors and tags, XML doctypes and
attributes are faults, not data. Nothing here resolves references, opens files or reaches a network.

`Document` has three states, which every reward component builds on:

- whole: the text is exactly one document (white space around it is free, and so is one Markdown fence);
- partial: a document with text around it, or the well-formed beginning of one that breaks off;
- none: no document, or a faulty one.

JSON and tool calls are read here; `yaml_documents` and `xml_documents` read the other two into the same values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import pydantic_core

Format = Literal["json", "yaml", "xml", "tool_call"]
FORMATS: tuple[Format, ...] = ("json", "yaml", "xml", "tool_call")
Source = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class _Missing:
    """The value of a text that holds no document (None is a document: JSON's null)."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True)
class Limits:
    """What a completion may cost.

    Args:
        max_bytes: longest completion in UTF-8 bytes; a longer one is not parsed.
        max_depth: deepest nesting of containers.
        max_values: most values (keys not counted) that a score visits in one document.
    """

    max_bytes: int = 1 << 18
    max_depth: int = 64
    max_values: int = 20_000

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_depth", "max_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1.")
        if self.max_depth > 200:
            raise ValueError(f"max_depth is {self.max_depth}; Python's own recursion allows at most 200 here.")


@dataclass(frozen=True, slots=True)
class Document:
    """What was read.

    Attributes:
        value: the parsed document; MISSING where there is none.
        error: why the text is not exactly one strict document, None if it is.
        fenced: it stood in one Markdown fence.
        share: of the text's characters, those that belong to the document; 1 for a whole one.
    """

    value: Any
    error: str | None = None
    fenced: bool = False
    share: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether the completion is exactly one strict document."""
        return self.error is None


class Fault(ValueError):
    """A document that no reading can mend: repeated keys, NaN, too deep. Its text says which."""


def text_of(completion: Source) -> str:
    """The text of a completion as TRL passes it: a string, or messages of which the last one is the answer."""
    if isinstance(completion, str):
        return completion
    message = completion if isinstance(completion, Mapping) else (completion[-1] if completion else {})
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


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
        types: XML alone: the shape (`tokalign.rewards.schemas.Shape`) that says which texts are numbers.
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
        return _READERS[output_format](text.strip(), limits, wants_list, types)
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

_NAMES = {"json": ("", "json"), "yaml": ("", "yaml", "yml"), "xml": ("", "xml"), "tool_call": ("", "json")}
_FENCED = re.compile(r"```[ \t]*([A-Za-z]*)[ \t]*\n(.*)\n?[ \t]*```", re.DOTALL)
_BLOCK = re.compile(r"```[ \t]*([A-Za-z]*)[ \t]*\n(.*?)```", re.DOTALL)


def unfence(text: str, output_format: Format) -> tuple[str, bool]:
    """The text inside one fence around everything, and whether there was one."""
    if not (text.startswith("```") and text.endswith("```")):
        return text, False
    match = _FENCED.fullmatch(text)
    if match is None or match[1].lower() not in _NAMES[output_format]:
        return text, False
    return match[2].strip(), True


def one_block(text: str, output_format: Format) -> str | None:
    """The content of the only fenced block of this format, None if there is none or more than one."""
    blocks = [m[2].strip() for m in _BLOCK.finditer(text) if m[1].lower() in _NAMES[output_format]]
    return blocks[0] if len(blocks) == 1 else None


# -------------------------------------------------------------------------------------------------------------- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Fault(f"the key {repeated[:100]!r} is repeated")
    return made


def _constant(name: str) -> NoReturn:
    raise Fault(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise Fault(f"the number {text[:40]} is out of range")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89abAB]")
_STARTS = 8  # places in a text where a document is looked for; each costs at most one pass


def check_depth(text: str, limits: Limits) -> None:
    """Raise `Fault` if JSON brackets nest deeper than the limit, without parsing."""
    if text.count("{") + text.count("[") <= limits.max_depth:
        return
    depth = 0
    for bracket in _NO_BRACKET.sub("", _STRING.sub("", text)):
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
    check_depth(body, limits)
    try:
        return Document(decode_json(body), None, fenced)
    except json.JSONDecodeError as error:
        return _partial_json(body, error, wants_list)


def _partial_json(text: str, error: json.JSONDecodeError, wants_list: bool) -> Document:
    """What can be told of a text that is not one document: one with text around it, or the beginning of one."""
    if not text:
        return Document(MISSING, "empty")
    reason = f"not JSON: {error.msg} at character {error.pos}"
    opener = re.compile(r"[\[{]" if wants_list else "{")
    position, found = 0, None
    for _ in range(_STARTS):
        match = opener.search(text, position)
        if match is None:
            break
        start = match.start()
        try:
            value, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as inner:
            if found is None and inner.pos > start + 1:  # a document that breaks off, not a brace in prose
                return _beginning(text, start, inner.pos, reason)
            position = start + 1
            continue
        except Fault:
            raise
        except ValueError:
            raise Fault("an integer of thousands of digits") from None
        if found is not None:
            return Document(MISSING, "more than one document")  # nobody can tell which one is the answer
        _refuse_surrogates(text[start:end], value)
        found = Document(value, "text around the document", share=(end - start) / len(text))
        position = end
    return found or Document(MISSING, reason)


def _beginning(text: str, start: int, end: int, reason: str) -> Document:
    """The well-formed beginning `text[start:end]` of a document, its open brackets closed."""
    try:
        value = pydantic_core.from_json(text[start:end], allow_partial=True, allow_inf_nan=False)
    except ValueError:
        return Document(MISSING, reason)
    return Document(value, reason, share=(end - start) / len(text))


# -------------------------------------------------------------------------------------------------------- tool calls

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MARKS = ("[TOOL_CALLS]", "<|python_tag|>")


def _read_tool_calls(completion: Source, text: str, limits: Limits, wants_list: bool) -> Document:
    """Calls as `{"name": …, "arguments": {…}}`, one or (if wanted) a list, in the chat formats that are common.

    Hermes and Qwen: `<tool_call>{…}</tool_call>`, one after the other. Mistral: `[TOOL_CALLS] [{…}]`. Llama 3: the bare
    object, perhaps after `<|python_tag|>`, with "parameters" for "arguments". Parsed already: a message with
    `tool_calls` in OpenAI's form, arguments as an object or as JSON text.
    """
    message = completion if isinstance(completion, Mapping) else {}
    if not isinstance(completion, str | Mapping) and completion:
        message = completion[-1]
    parsed = message.get("tool_calls")
    if parsed:
        calls = [_openai_call(call, limits) for call in parsed]
        error = "text beside the tool call" if text else None
        return _of_calls(calls, error, 0.5 if text else 1.0, wants_list)
    bodies = _TAGGED.findall(text)
    if bodies:
        outside = _TAGGED.sub("", text).strip()
        calls = []
        for body in bodies:
            check_depth(body, limits)
            try:
                calls.append(_call(decode_json(body.strip())))
            except json.JSONDecodeError as error:
                return Document(MISSING, f"a tool call is not JSON: {error.msg} at character {error.pos}")
        share = 1.0 - len(outside) / len(text)
        return _of_calls(calls, "text around the tool call" if outside else None, share, wants_list)
    for mark in _MARKS:
        text = text.removeprefix(mark).strip()
    document = _read_json(text, limits, True, None)
    if document.value is MISSING:
        return document
    value = document.value
    calls = [_call(item) for item in value] if isinstance(value, list) else [_call(value)]
    return _of_calls(calls, document.error, document.share, wants_list, document.fenced)


def _of_calls(calls: list[Any], error: str | None, share: float, wants_list: bool, fenced: bool = False) -> Document:
    value = calls[0] if len(calls) == 1 and not wants_list else calls
    return Document(value, error, fenced, share)


def _call(value: Any) -> Any:
    if isinstance(value, dict) and "parameters" in value and "arguments" not in value:
        return {"arguments" if key == "parameters" else key: item for key, item in value.items()}
    return value


def _openai_call(call: Any, limits: Limits) -> Any:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        fault = unreadable(arguments, limits)
        if fault is not None:
            raise Fault(fault)
        check_depth(arguments, limits)
        try:
            arguments = decode_json(arguments)
        except json.JSONDecodeError as error:
            raise Fault(f"the arguments are not JSON: {error.msg} at character {error.pos}") from None
    return {"name": function.get("name"), "arguments": arguments}


# ----------------------------------------------------------------------------------------------------- YAML and XML


def _read_yaml(text: str, limits: Limits, _: bool, __: Any) -> Document:
    from tokalign.rewards.yaml_documents import decode_yaml

    return _read_markup(text, "yaml", lambda body: decode_yaml(body, limits))


def _read_xml(text: str, limits: Limits, _: bool, types: Any) -> Document:
    from tokalign.rewards.xml_documents import decode_xml

    return _read_markup(text, "xml", lambda body: decode_xml(body, limits, types))


def _read_markup(text: str, output_format: Format, decode: Callable[[str], Any]) -> Document:
    body, fenced = unfence(text, output_format)
    if not body:
        return Document(MISSING, "empty")
    try:
        return Document(decode(body), None, fenced)
    except Fault as error:
        block = one_block(text, output_format)
        if block is None and output_format == "xml" and "<" in body:
            block = body[body.index("<") : body.rfind(">") + 1]
        if not block or block == body:
            raise
        try:
            return Document(decode(block), "text around the document", share=len(block) / len(text))
        except Fault:
            raise error from None


_READERS: dict[str, Callable[[str, Limits, bool, Any], Document]] = {
    "json": _read_json,
    "yaml": _read_yaml,
    "xml": _read_xml,
}
