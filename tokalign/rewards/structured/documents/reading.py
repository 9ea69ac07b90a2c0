"""Reading the one structured document that a completion is: strictly, once, within limits, without trusting it.

A completion is untrusted text. Before anything parses it, its size and nesting are bounded; what then parses must be
one document and nothing else. Repeated keys, NaN, infinities, lone surrogates, YAML anchors and tags, XML doctypes and
attributes are faults, not data. Nothing here resolves references, opens files or reaches a network.

`Document` has three states, which every reward component builds on:

- whole: the text is exactly one document (white space around it is free, and so is one Markdown fence);
- partial: a document with text around it, or the well-formed beginning of one that breaks off;
- none: no document, or a faulty one.

Each format has a file of its own beside this one, which reads it into the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokalign.rewards.structured.documents.document import (
    MISSING,
    Document,
    Fault,
    Format,
    Limits,
    Source,
    unreadable,
)
from tokalign.rewards.structured.documents.json import one_block, read_json, unfence
from tokalign.rewards.structured.documents.tool_calls import read_tool_calls
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


def answer_of(completion: Source, reasoning_end: str | None) -> str | None:
    """The text of a completion without its reasoning, which ends with `reasoning_end`; None if it does not end.

    A chat parser moves the reasoning out of a message's content, into `reasoning_content` or a key like it, and finds
    tool calls only after it. Such a message's content is the answer, unless the end stands in it all the same.
    """
    return _without_reasoning(completion, text_of(completion), reasoning_end)


_REASONING = ("reasoning_content", "reasoning", "thinking")


def _without_reasoning(completion: Source, text: str, reasoning_end: str | None) -> str | None:
    if reasoning_end is None:
        return text
    _, end, answer = text.rpartition(reasoning_end)
    if end:
        return answer
    message = {} if isinstance(completion, str) else _message(completion)
    parsed = any(key in message for key in _REASONING) or message.get("tool_calls")
    return text if parsed else None


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
        reasoning_end: only what follows the last occurrence of this text counts, e.g. "</think>"; all of a message
            whose reasoning a parser has taken out already (`answer_of`).
        wants_list: the document shall be an array (of tool calls, for "tool_call").
        types: the shape (`tokalign.rewards.structured.shapes.Shape`) that says which texts are numbers, for formats
            that write all values as text (XML, and the tool calls of some models).
    """
    limits = limits or Limits()
    text = text_of(completion)
    fault = unreadable(text, limits)
    if fault is not None:
        return Document(MISSING, fault)
    answer = _without_reasoning(completion, text, reasoning_end)
    if answer is None:
        return Document(MISSING, f"the reasoning is not closed by {reasoning_end!r}")
    text = answer
    try:
        if output_format == "tool_call":
            parsed = {} if isinstance(completion, str) else _message(completion)
            return read_tool_calls(text, parsed.get("tool_calls"), limits, wants_list, types)
        return _READERS[output_format](text, limits, wants_list, types)
    except Fault as error:
        return Document(MISSING, str(error))
    except RecursionError:  # the caller's own stack is nearly used up; the depth limit is checked before this
        return Document(MISSING, "nested too deep for this interpreter's stack")


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
    "json": lambda text, limits, wants_list, _: read_json(text, limits, wants_list),
    "yaml": _read_yaml,
    "xml": _read_xml,
}
