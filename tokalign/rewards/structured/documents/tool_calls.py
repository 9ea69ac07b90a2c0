"""Tool calls as models write them, read into `{"name": …, "arguments": {…}}`: one, or a list of them.

The format is found by its marks, so nobody has to name it and a model may be exchanged:

| model family | what is read |
|---|---|
| Hermes, Qwen 2.5 and 3 | `<tool_call>{"name": …, "arguments": …}</tool_call>` |
| Qwen3-Coder, Qwen 3.5 | `<tool_call><function=f><parameter=x>1</parameter></function></tool_call>` |
| GLM-4.5 | `<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>` |
| Llama 3 | `{"name": …, "parameters": …}; {…}`, perhaps after `<|python_tag|>`; `<function=f>{…}</function>` |
| Llama 4, LFM2, pythonic | `[f(x=1), g(y="a")]`, perhaps between `<|python_start|>` and `<|python_end|>` |
| Mistral | `[TOOL_CALLS] [{…}]`, `[TOOL_CALLS]f[ARGS]{…}` |
| DeepSeek V3, R1 | `<｜tool▁call▁begin｜>function<｜tool▁sep｜>f`, then a fence; V3.1 `f<｜tool▁sep｜>{…}` |
| Kimi K2 | `<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{…}<|tool_call_end|>` |
| gpt-oss | `<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>`, after its analysis |
| any | the bare JSON of a call or of a list; a message's own `tool_calls`, arguments as an object or as JSON text |

Marks that are special tokens are often gone from decoded text: Mistral's `f{…}`, Kimi's `functions.f:0{…}` and gpt-oss'
`commentary to=functions.f json{…}` are read too. A call's JSON ends where its value ends, so a string may hold
`</tool_call>`. The last call may lack its closing mark, which a stop string cuts off; before further text it may not.
Arguments that are JSON text of an object, encoded twice, are that object. Qwen3-Coder and GLM write all values as text:
where the schema of the named function allows a string there, the text is the value, elsewhere the JSON in it.

Why not the parsers of TRL or vLLM: they take token ids and one model's template, let faulty JSON through or make text
of it, and a reward must tell these apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tokalign.rewards.structured.documents.document import MISSING, Document, Fault, Limits, unreadable
from tokalign.rewards.structured.documents.json import (
    DECODER,
    check_limits,
    decode_json,
    read_json,
    refuse_surrogates,
)

# ------------------------------------------------------------------------------------------------- one table of formats
# No quantifier gives back what it took: on text made for it, backtracking takes minutes.


class _Style(NamedTuple):
    """How a call opens (its name, if it stands outside the body, as a group), what its body is, and how it closes."""

    opens: str
    body: str  # "call": JSON with name and arguments | "arguments": JSON | "parameters", "pairs": tags around text
    closes: re.Pattern[str]


def _style(opens: str, body: str, closes: str) -> _Style:
    return _Style(opens, body, re.compile(rf"\s*+{closes}"))


_NAME = r"(?P<NAME>[^\s<>\[\]{}:]++)"
_STYLES = {
    "coder": _style(
        rf"(?:<tool_call>\s*+)?<function={_NAME}>(?!\s*+\{{)", "parameters", r"</function>(?:\s*+</tool_call>)?"
    ),
    "llama": _style(rf"<function={_NAME}>(?=\s*+\{{)", "arguments", r"</function>"),
    "glm": _style(r"<tool_call>\s*+(?P<NAME>[\w./:-]++)", "pairs", r"</tool_call>"),
    "hermes": _style(r"<tool_call>", "call", r"</tool_call>"),
    "mistral": _style(
        rf"\[TOOL_CALLS\]\s*+{_NAME}\s*+(?:\[CALL_ID\]\s*+\w++\s*+)?(?:\[ARGS\]\s*+)?(?=\{{)", "arguments", r""
    ),
    "deepseek": _style(
        r"(?:<｜tool▁calls▁begin｜>\s*+)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
        r"(?P<NAME>[^\s<]++)\s*+(?:<｜tool▁sep｜>|```json)",
        "arguments",
        r"(?:```\s*+)?<｜tool▁call▁end｜>(?:\s*+<｜tool▁calls▁end｜>)?",
    ),
    "kimi": _style(
        r"(?:<\|tool_calls_section_begin\|>\s*+)?<\|tool_call_begin\|>\s*+(?:functions\.)?"
        rf"{_NAME}(?::\d++)?\s*+<\|tool_call_argument_begin\|>",
        "arguments",
        r"<\|tool_call_end\|>(?:\s*+<\|tool_calls_section_end\|>)?",
    ),
    "harmony": _style(
        r"(?:<\|start\|>)?(?:assistant)?(?:<\|channel\|>)?(?:commentary|analysis)?[ ]?to=functions\.(?P<NAME>[\w.-]++)"
        r"\s*+(?:<\|channel\|>)?(?:(?:commentary|analysis)\s*+)?(?:<\|constrain\|>)?(?:json\s*+)?(?:<\|message\|>)?"
        r"(?=\s*+[{\"])",
        "arguments",
        r"(?:<\|(?:call|end|return)\|>)?",
    ),
}
_OPENS = re.compile(
    "|".join(f"(?P<{style}>{each.opens.replace('NAME', style + '_name')})" for style, each in _STYLES.items())
)
_ANALYSIS = re.compile(r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>.*?(?:<\|end\|>|\Z)", re.DOTALL)
_MARKS = {
    "[TOOL_CALLS]": "",
    "<|python_tag|>": "",
    "<|python_start|>": "<|python_end|>",
    "<|tool_call_start|>": "<|tool_call_end|>",
}
_SPACE = re.compile(r"[\s;]*+")
_NAMED = re.compile(r"(?:functions\.)?([A-Za-z_][\w.-]*+)(?::\d++)?(?=\{)")
# The tags around one value of a body whose values are text: opening tag, then where the value ends.
_TAGS = {
    "parameters": (re.compile(r"\s*+<parameter=([^<>\n]++)>"), "</parameter>"),
    "pairs": (re.compile(r"\s*+<arg_key>([^<>]++)</arg_key>\s*+<arg_value>"), "</arg_value>"),
}


def read_tool_calls(text: str, parsed: Any, limits: Limits, wants_list: bool, types: Any = None) -> Document:
    """The calls of a completion as a document, a list of them if that is wanted or if there are several.

    Args:
        text: of the completion, stripped.
        parsed: calls that a chat parser has found already, in OpenAI's form.
        limits: of size and nesting.
        wants_list: whether one call is a list too.
        types: shape of the schema (`tokalign.rewards.structured.shapes.Shape`), for values that are written as text.

    Raises:
        Fault: what no reading can mend.
    """
    if parsed:
        error = "text beside the tool call" if text else None
        return _of_calls(_openai_calls(parsed, limits), error, len(text), wants_list)
    if "<|channel|>" in text:  # gpt-oss reasons in a channel of its own
        text = _ANALYSIS.sub("", text).strip()
    if _OPENS.search(text):
        return _marked(text, limits, wants_list, types)
    mark = next((mark for mark in _MARKS if text.startswith(mark)), "")
    text = text.removeprefix(mark).removesuffix(_MARKS.get(mark, "")).strip()
    calls = _pythonic(text, limits)
    if calls is not None:
        return _of_calls(calls, None, 0, wants_list)
    document = read_json(text, limits, True)
    if document.error is not None:
        calls = _bare(text, limits)
        if calls is not None:
            return _of_calls(calls, None, 0, wants_list)
    if document.value is MISSING:
        return document
    value = document.value
    calls = [_call(item, limits) for item in (value if isinstance(value, list) else [value])]
    if mark == "[TOOL_CALLS]":  # Mistral gives each call an id
        calls = [{k: v for k, v in call.items() if k != "id"} if isinstance(call, dict) else call for call in calls]
    made = _of_calls(calls, document.error, document.outside, wants_list, document.fenced)
    return replace(made, broken=document.broken)


def _of_calls(calls: list[Any], error: str | None, outside: int, wants_list: bool, fenced: bool = False) -> Document:
    value = calls[0] if len(calls) == 1 and not wants_list else calls
    return Document(value, error, fenced, outside)


# ----------------------------------------------------------------------------------------------------- formats by marks


def _marked(text: str, limits: Limits, wants_list: bool, types: Any) -> Document:
    """Calls that marks announce, one after the other; what stands between and around them is outside."""
    calls: list[Any] = []
    outside, position, error = 0, 0, None
    while match := _OPENS.search(text, position):
        style = str(match.lastgroup)
        gap = _gap(text[position : match.start()])
        # gpt-oss without its marks: the reasoning begins with the name of its channel
        outside += 0 if style == "harmony" and not calls and gap.startswith("analysis") else len(gap)
        if len(calls) >= limits.max_values:
            raise Fault(f"more than {limits.max_values} values")
        _, body, closes = _STYLES[style]
        name = match.groupdict().get(f"{style}_name")
        begin = _after_space(text, match.end())
        try:
            if body in _TAGS:
                arguments, position = _text_values(text, begin, body, _arguments_shape(types, str(name)), limits)
                calls.append({"name": name, "arguments": arguments})
            else:
                value, position = _json_at(text, begin, limits)
                calls.append(_call(value if body == "call" else {"name": name, "arguments": value}, limits))
        except json.JSONDecodeError as fault:
            check_limits(text[begin:], limits)  # too deep is the truer reason, if it is one
            return Document(MISSING, f"a tool call is not JSON: {fault.msg} at character {fault.pos - begin}")
        if closed := closes.match(text, position):
            position = closed.end()
        elif position < len(text):
            error = error or "a tool call is not closed"
    outside += len(_gap(text[position:]))
    return _of_calls(calls, "text around the tool call" if outside else error, outside, wants_list)


def _gap(text: str) -> str:
    return text.strip().strip(";").strip()


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _json_at(text: str, begin: int, limits: Limits) -> tuple[Any, int]:
    """The JSON value that begins in a text at a place, and where it ends."""
    try:
        value, end = DECODER.raw_decode(text, begin)
    except (json.JSONDecodeError, Fault):
        raise
    except ValueError:  # Python's limit on digits
        raise Fault("an integer of thousands of digits") from None
    part = text[begin:end]
    check_limits(part, limits)
    refuse_surrogates(part, value)
    return value, end


def _text_values(text: str, position: int, body: str, shape: Any, limits: Limits) -> tuple[dict[str, Any], int]:
    """Arguments that are written as text between tags, and where the last of them ends."""
    opens, closes = _TAGS[body]
    arguments: dict[str, Any] = {}
    while match := opens.match(text, position):
        end = text.find(closes, match.end())
        if end < 0:
            raise Fault(f"the argument {match[1][:100]!r} is not closed by {closes!r}")
        key = match[1].strip()
        if key in arguments:
            raise Fault(f"the key {key[:100]!r} is repeated")
        if len(arguments) >= limits.max_values:
            raise Fault(f"more than {limits.max_values} values")
        value = text[match.end() : end]
        if body == "parameters":  # each stands on lines of its own, which are not part of it
            value = value.removeprefix("\r").removeprefix("\n").removesuffix("\n").removesuffix("\r")
        arguments[key] = _of_text(value, None if shape is None else shape.known(key), limits)
        position = end + len(closes)
    return arguments, position


def _of_text(text: str, shape: Any, limits: Limits) -> Any:
    """A value that is written as text: itself where a string is allowed, else the JSON in it, if it is any."""
    options = [] if shape is None else shape.options or [shape]
    wanted = set().union(*(option.types or () for option in options))
    if "string" in wanted and not ("null" in wanted and text == "null"):
        return text
    check_limits(text, limits)
    try:
        return decode_json(_WORDS.get(text, text))  # templates of Qwen 3.5 write Python's `True`
    except json.JSONDecodeError:
        return text


def _arguments_shape(types: Any, name: str) -> Any:
    """Shape of the arguments of the named function in a schema of calls, of one call or of a list of them."""
    shapes = [] if types is None else [types]
    for _ in range(3):  # a list of alternatives of calls is the deepest that there is
        shapes = [option for shape in shapes for option in shape.options or [shape]]
        shapes = [shape.item(0) if shape.types and "array" in shape.types else shape for shape in shapes]
    for shape in shapes:
        named = shape.properties.get("name")
        if named is not None and (named.bounds is None or named.bounds.is_valid(name)):
            return shape.properties.get("arguments")
    return None


# ------------------------------------------------------------------------------------------------ formats without marks


def _bare(text: str, limits: Limits) -> list[Any] | None:
    """Calls one after the other, `{…}; {…}` or `f{…}g{…}`; None if the text is not just that."""
    calls: list[Any] = []
    position = 0
    while position < len(text):
        named = _NAMED.match(text, position)
        begin = named.end() if named else position
        if not text.startswith("{", begin) or len(calls) >= limits.max_values:
            return None
        try:
            value, end = _json_at(text, begin, limits)
        except json.JSONDecodeError:
            return None
        calls.append(_call({"name": named[1], "arguments": value} if named else value, limits))
        position = _after_space(text, end)
    return calls or None


def _call(value: Any, limits: Limits) -> Any:
    """A call in the one form: "parameters" are the arguments, and arguments encoded twice what they stand for."""
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict) and value.keys() <= {"type", "function", "id"}:  # OpenAI's form
        value = value["function"]
    if "parameters" in value and "arguments" not in value:
        value = {"arguments" if key == "parameters" else key: item for key, item in value.items()}
    if isinstance(value.get("arguments"), str):
        value = {**value, "arguments": _decoded(value["arguments"], limits)}
    return value


def _decoded(text: str, limits: Limits) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    check_limits(text, limits)
    try:
        return decode_json(text)
    except json.JSONDecodeError:
        return text


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
            calls.append(_call({"name": function["name"], "arguments": decode_json(text)}, limits))
        except json.JSONDecodeError as error:
            raise Fault(f"the arguments are not JSON: {error.msg} at character {error.pos}") from None
    return calls


# ------------------------------------------------------------------------------------------------------- Python's calls
# Nothing is evaluated: the tokens of the calls are written as JSON, which is then read as strictly as any.

_CALLED = re.compile(r"\[?\s*+[A-Za-z_][\w.]*+\(")
_TOKEN = re.compile(
    r"""\s*+(?:
        (?P<call>[A-Za-z_][\w.]*+)\(
      | (?P<key>[A-Za-z_]\w*+)\s*+=
      | (?P<word>True|False|None|true|false|null)\b
      | (?P<string>"(?:[^"\\]|\\.)*+"|'(?:[^'\\]|\\.)*+')
      | (?P<number>[-+]?(?:\d[\d_]*+(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?)
      | (?P<sign>[\[\](){},:])
    )""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"True": "true", "False": "false", "None": "null"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_WRITTEN = {"(": "[", ")": "]"}
_ESCAPE = re.compile(
    r"\\(?:(?P<code>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<octal>[0-7]{1,3})|(?P<one>.))", re.DOTALL
)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}


def _pythonic(text: str, limits: Limits) -> list[Any] | None:
    """Calls with named arguments as Python writes them, in a list or one after the other; None for anything else."""
    if not _CALLED.match(text) or text[-1] not in ")]":
        return None
    pieces = list(_as_json(text, limits)) if text.startswith("[") else ["[", *_as_json(text, limits), "]"]
    if None in pieces:
        return None
    written = "".join(map(str, pieces))
    check_limits(written, limits)
    try:
        calls = decode_json(written)
    except json.JSONDecodeError:
        return None
    fine = isinstance(calls, list) and all(
        isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls
    )
    return calls if fine else None


def _as_json(text: str, limits: Limits) -> Iterator[str | None]:
    """The tokens of Python's calls, lists, tuples, dictionaries and constants as JSON; None where there is another."""
    position, closers = 0, list[str]()
    comma = False  # a comma waits: before a closing bracket it says nothing
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or (match.lastgroup == "key" and (not closers or closers[-1] != "call")):
            yield None
            return
        position = match.end()
        kind, token = str(match.lastgroup), match[str(match.lastgroup)]
        if token == ",":
            if comma:
                yield None
                return
            comma = True
            continue
        closes = kind == "sign" and token in ")]}"
        if comma and not closes:
            yield ","
        comma = False
        if kind == "call" or (kind == "sign" and token in "([{"):
            closers.append("call" if kind == "call" else _CLOSING[token])
            if len(closers) > limits.max_depth:
                raise Fault(f"nested deeper than {limits.max_depth}")
        if closes:
            closer = closers.pop() if closers else ""
            if token != (")" if closer == "call" else closer):
                yield None
                return
            yield "}}" if closer == "call" else _WRITTEN.get(token, token)
        else:
            yield _WRITERS[kind](token)
    if closers or comma:
        yield None


def _number(token: str) -> str:
    digits = token.replace("_", "").removeprefix("+")
    if re.fullmatch(r"-?\d++(?:\.\d++)?(?:[eE][-+]?\d++)?", digits):
        return digits
    return repr(float(digits))  # `1.` and `.5`


def _string(token: str) -> str:
    return json.dumps(_ESCAPE.sub(_unescaped, token[1:-1]), ensure_ascii=False)


def _unescaped(match: re.Match[str]) -> str:
    if match["code"] or match["octal"]:
        code = int(match["code"][1:], 16) if match["code"] else int(match["octal"], 8)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise Fault("a lone surrogate, which is not text")
        return chr(code)
    one = match["one"]
    return _ESCAPED.get(one, one if one in "\\'\"" else match[0])


_WRITERS: dict[str, Callable[[str], str]] = {
    "call": lambda name: f'{{"name": {json.dumps(name)}, "arguments": {{',
    "key": lambda name: f"{json.dumps(name)}:",
    "word": lambda word: _WORDS.get(word, word),
    "string": _string,
    "number": _number,
    "sign": lambda sign: _WRITTEN.get(sign, sign),
}
