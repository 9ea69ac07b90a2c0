"""Tool calls as models of every family write them, with whole, broken and hostile ends."""

from __future__ import annotations

import json

import pytest

from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.documents.document import MISSING
from tokalign.rewards.structured.documents.reading import read_document
from tokalign.rewards.structured.schemas import compile_schema

ARGUMENTS = {"city": 'São "P", </tool_call>\n', "days": 3, "zip": "75001", "at": [1.5, {"x": None}], "on": True}
CALL = {"name": "geo.find", "arguments": ARGUMENTS}
SECOND = {"name": "now", "arguments": {}}
TEXT, ARGUMENTS_TEXT = json.dumps(CALL, ensure_ascii=False), json.dumps(ARGUMENTS)
OF_CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "geo.find"},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "zip": {"type": ["string", "null"]},
                "at": {"type": "array"},
                "on": {"type": "boolean"},
            },
        },
    },
}
OF_SECOND = {"type": "object", "properties": {"name": {"const": "now"}, "arguments": {"type": "object"}}}
SCHEMA = {"type": "array", "items": {"anyOf": [OF_SECOND, OF_CALL]}}
SHAPE = compile_schema(SCHEMA).shape

PAIRS = "".join(
    f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
    for key, value in ARGUMENTS.items()
)
PARAMETERS = "".join(
    f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
    for key, value in ARGUMENTS.items()
)
LLAMA = TEXT.replace('"arguments"', '"parameters"')
PYTHONIC = """geo.find(city='S\u00e3o "P", </tool_call>\\n', days=3, zip="75001", at=[1.5, {"x": None}], on=True)"""
DEEPSEEK = f"function<｜tool▁sep｜>geo.find\n```json\n{ARGUMENTS_TEXT}\n```<｜tool▁call▁end｜>"
KIMI = f"functions.geo.find:0<|tool_call_argument_begin|>{ARGUMENTS_TEXT}<|tool_call_end|>"
HARMONY = f"<|channel|>commentary to=functions.geo.find <|constrain|>json<|message|>{ARGUMENTS_TEXT}<|call|>"
ANALYSIS = "<|channel|>analysis<|message|>Call {it}: to find<|end|><|start|>assistant"

ONE = {
    "Hermes": f"<tool_call>\n{TEXT}\n</tool_call>",
    "Hermes, one line": f"<tool_call>{TEXT}</tool_call>",
    "Hermes, cut by a stop string": f"<tool_call>\n{TEXT}\n",
    "encoded twice": "<tool_call>" + json.dumps({**CALL, "arguments": ARGUMENTS_TEXT}) + "</tool_call>",
    "OpenAI's form": "<tool_call>" + json.dumps({"type": "function", "function": CALL}) + "</tool_call>",
    "Qwen3-Coder": f"<tool_call>\n<function=geo.find>\n{PARAMETERS}</function>\n</tool_call>",
    "Qwen3-Coder, no outer tag": f"<function=geo.find>\n{PARAMETERS}</function>",
    "Qwen3-Coder, cut by a stop string": f"<tool_call>\n<function=geo.find>\n{PARAMETERS}</function>",
    "GLM": f"<tool_call>geo.find\n{PAIRS}</tool_call>",
    "Llama": LLAMA,
    "Llama, tag": f"<|python_tag|>{LLAMA}",
    "Llama, function": f"<function=geo.find>{ARGUMENTS_TEXT}</function>",
    "pythonic": f"[{PYTHONIC}]",
    "pythonic, bare": PYTHONIC,
    "pythonic, marks": f"<|python_start|>[{PYTHONIC}]<|python_end|>",
    "LFM2": f"<|tool_call_start|>[{PYTHONIC}]<|tool_call_end|>",
    "Mistral, list": f"[TOOL_CALLS] [{TEXT}]",
    "Mistral, list with ids": "[TOOL_CALLS] " + json.dumps([{**CALL, "id": "VvvODy9mT"}]),
    "Mistral": f"[TOOL_CALLS]geo.find[ARGS]{ARGUMENTS_TEXT}",
    "Mistral, id": f"[TOOL_CALLS]geo.find[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS_TEXT}",
    "Mistral, no marks left": f"geo.find{ARGUMENTS_TEXT}",
    "DeepSeek V3": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{DEEPSEEK}<｜tool▁calls▁end｜>",
    "DeepSeek V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>geo.find<｜tool▁sep｜>"
    f"{ARGUMENTS_TEXT}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "Kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>{KIMI}<|tool_calls_section_end|>",
    "Kimi, no marks left": f"functions.geo.find:0{ARGUMENTS_TEXT}",
    "gpt-oss": HARMONY,
    "gpt-oss, analysis": ANALYSIS + HARMONY,
    "gpt-oss, recipient first": ANALYSIS
    + f" to=functions.geo.find<|channel|>commentary json<|message|>{ARGUMENTS_TEXT}<|call|>",
    "gpt-oss, no marks left": f"analysisCall {{it}}.assistantcommentary to=functions.geo.find json{ARGUMENTS_TEXT}",
    "gpt-oss, encoded twice": "<|channel|>commentary to=functions.geo.find json<|message|>"
    + json.dumps(ARGUMENTS_TEXT),
    "fence": f"```json\n{TEXT}\n```",
}
EMPTY = json.dumps(SECOND)
TWO = {
    "Hermes": f"<tool_call>\n{TEXT}\n</tool_call>\n<tool_call>\n{EMPTY}\n</tool_call>",
    "Qwen3-Coder": f"<tool_call><function=geo.find>\n{PARAMETERS}</function></tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "GLM": f"<tool_call>geo.find\n{PAIRS}</tool_call><tool_call>now</tool_call>",
    "Llama": f'{LLAMA}; {{"name": "now", "parameters": {{}}}}',
    "lines": f"{TEXT}\n{EMPTY}",
    "pythonic": f"[{PYTHONIC}, now()]",
    "pythonic, bare": f"{PYTHONIC}, now()",
    "Mistral, list": f"[TOOL_CALLS] [{TEXT}, {EMPTY}]",
    "Mistral": f"[TOOL_CALLS]geo.find[ARGS]{ARGUMENTS_TEXT}[TOOL_CALLS]now[ARGS]{{}}",
    "DeepSeek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{DEEPSEEK}\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "Kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>{KIMI}<|tool_call_begin|>functions.now:1"
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "gpt-oss": HARMONY
    + "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
}


@pytest.mark.parametrize("text", ONE.values(), ids=ONE.keys())
def test_one_call(text):
    found = read_document(text, "tool_call", types=SHAPE)
    assert (found.value, found.error) == (CALL, None)
    assert json.dumps(found.value) == json.dumps(CALL)  # 1 and 1.0, True and 1
    assert read_document(f" \n{text}\n", "tool_call", wants_list=True, types=SHAPE).value == [CALL]


@pytest.mark.parametrize("text", TWO.values(), ids=TWO.keys())
def test_two_calls(text):
    found = read_document(text, "tool_call", types=SHAPE)
    assert (found.value, found.error) == ([CALL, SECOND], None)


@pytest.mark.parametrize("text", [*ONE.values(), *TWO.values()], ids=[*ONE.keys(), *TWO.keys()])
def test_text_beside_a_call_is_a_fault(text):
    for around in (f"Sure! {text}", f"{text} Done."):
        found = read_document(around, "tool_call", types=SHAPE)
        assert found.value is MISSING or found.error is not None


@pytest.mark.parametrize("text", [*ONE.values(), *TWO.values()], ids=[*ONE.keys(), *TWO.keys()])
def test_a_call_that_breaks_off_is_not_whole(text):
    broken = text[: text.index("75001") + 3]
    found = read_document(broken, "tool_call", types=SHAPE)
    assert found.value is MISSING or found.error is not None


@pytest.mark.parametrize(
    ("text", "value", "error"),
    [
        ("<tool_call>{} now", {}, "text around the tool call"),
        ("<tool_call>{}<tool_call>{}</tool_call>", [{}, {}], "a tool call is not closed"),
        ("<tool_call>now</tool_call>", SECOND, None),
        ('<tool_call>{"name": "f", "arguments": "{x"}</tool_call>', {"name": "f", "arguments": "{x"}, None),
        ("<|channel|>commentary<|message|>I look.<|end|>" + HARMONY, CALL, "text around the tool call"),
        ("f(a=(1, 2.), b=-.5, c=+1_000, d='it\\'s \\x41\\u00e9\\101', )", None, None),
        ("print hello", "none", "not JSON: Expecting value at character 0"),
    ],
)
def test_other_ends(text, value, error):
    found = read_document(text, "tool_call", types=SHAPE)
    if text.startswith("f("):
        value = {"name": "f", "arguments": {"a": [1, 2.0], "b": -0.5, "c": 1000, "d": "it's AéA"}}
    assert ("none" if found.value is MISSING else found.value, found.error) == (value, error)


@pytest.mark.parametrize(
    "text",
    [
        "f(1)",
        "f(a=b)",
        "f(a=1",
        "f(a=1))",
        "f(a=1,,b=2)",
        "f(a=[1)",
        "[a=1]",
        "f(a=__import__('os').system('true'))",
        "f(a={1, 2})",
        "f(a=1 b=2)",
        "f(a='x' 'y')",
        "[f(a=1)], g()",
        "f(a=01)",
        "g(a=1) + f(b=2)",
    ],
)
def test_what_is_no_call_with_named_constants(text):
    found = read_document(text, "tool_call")
    assert found.value is MISSING or not found.whole


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("f(a=1, a=2)", "the key 'a' is repeated"),
        ("f(a='\\ud800')", "a lone surrogate, which is not text"),
        ("f(a=" + "[" * 100 + "]" * 100 + ")", "nested deeper than 64"),
        ("f(a=1e999)", "the number 1e999 is out of range"),
        ("<tool_call>f<arg_key>a</arg_key><arg_value>1", "the argument 'a' is not closed by '</arg_value>'"),
        ("<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>", "the key 'a' is repeated"),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}', "the key 'a' is repeated"),
        ("<tool_call>a" * 11_000, "more than 10000 values"),
    ],
)
def test_what_no_reading_mends(text, error):
    found = read_document(text, "tool_call")
    assert found.value is MISSING and found.error == error


def test_text_values_take_the_type_that_the_function_declares():
    text = "<function=geo.find><parameter=zip>75001</parameter><parameter=days>3</parameter></function>"
    for schema, zip_code in ((SCHEMA, "75001"), (OF_CALL, "75001"), (None, 75001), (OF_SECOND, 75001)):
        types = None if schema is None else compile_schema(schema).shape
        found = read_document(text, "tool_call", types=types).value
        assert found == {"name": "geo.find", "arguments": {"zip": zip_code, "days": 3}}
    null = "<function=geo.find><parameter=zip>null</parameter><parameter=days>three</parameter></function>"
    assert read_document(null, "tool_call", types=SHAPE).value["arguments"] == {"zip": None, "days": "three"}


def test_every_family_earns_full_marks():
    reward = StructuredReward({**SCHEMA, "minItems": 2}, output_format="tool_call")
    for text in TWO.values():
        assert reward.score(text, [CALL, SECOND])["total"] == 4.0
