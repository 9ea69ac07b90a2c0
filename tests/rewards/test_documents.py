"""Reading: what is one document and what is not, and that no text whatever raises, hangs, or leaves this process."""

from __future__ import annotations

import builtins
import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.hostile import GOOD, SCHEMA, hostile, large
from tests.rewards.ordering import searching
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.documents import json as json_documents
from tokalign.rewards.structured.documents.document import FORMATS, MISSING, Limits
from tokalign.rewards.structured.documents.reading import read_document, text_of
from tokalign.rewards.structured.schemas import compile_schema


def plain(completion, output_format="json", **options):
    document = read_document(completion, output_format, **options)
    return "none" if document.value is MISSING else document.value, document.error


# ----------------------------------------------------------------------------------------------------------- JSON


def members(inner):
    keys = st.sampled_from(["a", "b", ",", ":", ", ", ":1,", "a b"])
    members = st.lists(st.tuples(keys, inner), max_size=4)
    return st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]") | members.map(
        lambda pairs: "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"
    )


@searching(400)
@given(st.recursive(st.sampled_from(["1", '"a"', '","', "null"]), members, max_leaves=8), st.data())
def test_a_key_repeated_where_a_document_breaks_off_is_always_seen(text, data):
    """What decides quickly by counting decides as the second strict parse does."""
    text = text[: data.draw(st.integers(0, len(text)))]
    quick = plain(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_documents, "_FEW", -1)
        assert plain(text) == quick


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        ' \n{"a": 1}\n',
        '```json\n{"a": 1}\n```',
        '```json\r\n{"a": 1}\r\n```',
        '```\n{"a": 1}```',
        '```JSON \n{"a":1}\n  ```\n',
    ],
)
def test_whole_json(text):
    document = read_document(text)
    assert (
        document.whole and document.value == {"a": 1} and document.fenced is ("```" in text) and document.outside == 0
    )


@pytest.mark.parametrize(
    ("text", "value", "outside", "error"),
    [
        ('{"a": 1} bye', {"a": 1}, 4, "text around the document"),
        ('So {x}: {"a": 1}', {"a": 1}, 8, "text around the document"),
        ('Sure:\n```json\n{"a": 1}\n```', {"a": 1}, 18, "text around the document"),
        ('```python\n{"a": 1}\n```', {"a": 1}, 14, "text around the document"),
        ('```{"a": 1}```', {"a": 1}, 6, "text around the document"),
        ('"quoted {"a": 1}', {"a": 1}, 8, "text around the document"),
        ('{"a": 1, "b": [2, 3', {"a": 1, "b": [2, 3]}, 0, "not JSON: Expecting ',' delimiter at character 19"),
        ('x {"a": {"b": "c', {"a": {}}, 4, "not JSON: Expecting value at character 0"),
        ('{"a": 1,}', {"a": 1}, None, "not JSON: "),
        ('{"a": [{"a": "a"}, {"a": "\\"a\\"', {"a": [{"a": "a"}, {}]}, None, "not JSON: "),
        ('{"a": 1, "a": tr', {"a": 1}, None, "not JSON: "),  # no second value
    ],
)
def test_partial_json(text, value, outside, error):
    document = read_document(text)
    assert not document.whole and document.value == value and document.error.startswith(error)
    assert outside is None or document.outside == outside


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty"),
        ("``` \n```", "empty"),
        ("prose", "not JSON: Expecting value at character 0"),
        ('{"a": 1} {"a": 2}', "more than one document"),
        ('{"a": 1, "a": 2}', "the key 'a' is repeated"),
        ('{"a": {"b": 1, "b": 1}} and more', "the key 'b' is repeated"),
        ('{"a": 1, "a": 2', "the key 'a' is repeated"),  # broken off, so that nothing has closed the object
        ('x {"b": 3, "a": [{"b": 1}, {"b": 2, "\\u0062": 3, "c": "d, e', "the key 'b' is repeated"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is out of range"),
        ('{"a": ' + "9" * 100_000 + "}", "an integer of thousands of digits"),
        ('x {"a": ' + "9" * 100_000 + "}", "an integer of thousands of digits"),
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ('"' + '{"a":' * 100 + "1" + "}" * 100, "nested deeper than 64"),
        ('"' + '{"a":' * 5000, "nested"),
        ('{"a": "\\ud800"}', "a lone surrogate, which is not text"),
        ('{"a": "\\udc00"}', "a lone surrogate, which is not text"),
        ('{"\\uDFFF": 1}', "a lone surrogate, which is not text"),
        ('x {"a": "\\udc00"}', "a lone surrogate, which is not text"),
        ('{"a": "\ud800"}', "a lone surrogate, which is not text"),
        ('{"a": "' + "é" * 140_000 + '"}', "longer than 262144 bytes"),
        ("x" * 50_000_000, "longer than 262144 bytes"),
    ],
)
def test_no_json(text, error):
    found = read_document(text)
    assert found.value is MISSING and found.error.startswith(error)


def test_what_looks_odd_and_is_json():
    for text in (
        '{"a": "\\ud83d\\ude00"}',
        '{"a": "\\\\ud800"}',
        '{"a": "[[[{{{"}',
        '{"": -0.0}',
        '{"a":' * 64 + "1" + "}" * 64,
    ):
        assert read_document(text).value == json.loads(text) and read_document(text).whole


def test_limits():
    assert plain('{"a": [1]}', limits=Limits(max_depth=1)) == ("none", "nested deeper than 1")
    assert plain('{"a": 1}', limits=Limits(max_bytes=7)) == ("none", "longer than 7 bytes")
    for name in ("max_bytes", "max_depth", "max_values"):
        with pytest.raises(ValueError, match=rf"{name} is 0; use at least 1\."):
            Limits(**{name: 0})
    with pytest.raises(ValueError, match=r"max_depth is 201; Python's own recursion allows at most 200 here\."):
        Limits(max_depth=201)


def test_only_what_follows_the_reasoning_counts():
    assert plain('<think>{"b": 2}</think></think> {"a": 1}', reasoning_end="</think>") == ({"a": 1}, None)
    assert plain('<think>{"a": 1}', reasoning_end="</think>") == ("none", "the reasoning is not closed by '</think>'")


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ({"reasoning_content": "hm", "content": '{"a": 1}'}, {"a": 1}),
        ({"reasoning_content": None, "content": '{"a": 1}'}, {"a": 1}),
        ({"reasoning": "hm", "content": '{"a": 1}'}, {"a": 1}),
        ({"thinking": "hm", "content": [{"type": "text", "text": '{"a": 1}'}]}, {"a": 1}),
        ({"reasoning_content": "hm", "content": 'so {</think>{"a": 1}'}, {"a": 1}),
        ({"content": '<think>hm</think>{"a": 1}'}, {"a": 1}),
        ({"content": '<think>{"a": 1}'}, "none"),
        ({"reasoning_content": '{"a": 1}', "content": ""}, "none"),  # the reasoning never ended
    ],
)
def test_reasoning_that_a_parser_has_moved(message, value):
    assert plain([message], reasoning_end="</think>")[0] == value


def test_calls_that_a_parser_has_found_stand_after_the_reasoning():
    message = {"content": "", "tool_calls": [{"function": CALL}]}
    assert plain([message], "tool_call", reasoning_end="</think>") == (CALL, None)


# ----------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name: aaa\ncount: 3\nlist:\n- 1\n- [2, {x: y}]\n", {"name": "aaa", "count": 3, "list": [1, [2, {"x": "y"}]]}),
        ("```yaml\na: 1\n```", {"a": 1}),
        ("---\na: yes\nb: 1:30\nc: 2024-01-01\n", {"a": "yes", "b": "1:30", "c": "2024-01-01"}),
        (
            "a: ~\nb: null\nc:\nd: true\ne: 'true'\nf: 1.5\ng: .5e1\nh: '1'",
            dict(a=None, b=None, c=None, d=True, e="true", f=1.5, g=5.0, h="1"),
        ),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("```\n  a: |\n    line\n  b: 1\n```", {"a": "line\n", "b": 1}),
        ("\n  a: 1\n  b: >-\n    two\n    lines", {"a": 1, "b": "two lines"}),
        ('{"a": [1, 2.5, null, "x"]}', {"a": [1, 2.5, None, "x"]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("a: " + "9" * 500, {"a": "9" * 500}),
    ],
)
def test_yaml(text, value):
    assert plain(text, "yaml") == (value, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty"),
        ("# only a comment", "empty"),
        ("a: 1\n---\na: 2", "more than one document"),
        ("a: 1\na: 2", "the key 'a' is repeated"),
        ("1: a", "the key 1 is not a string"),
        ("? [a]\n: b", "the key ['a'] is not a string"),
        ("a: &x [1]\nb: *x", "YAML anchors and aliases are not allowed"),
        ("a: *x", "YAML anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "YAML tags are not allowed"),
        ("a: !!int '3'", "YAML tags are not allowed"),
        ("%TAG ! tag:x,2000:\n---\na: 1", "YAML tags are not allowed"),
        ("a: .inf", "the number .inf is not finite"),
        ("a: .nan", "the number .nan is not finite"),
        ("a: 1e999", "the number 1e999 is out of range"),
        ("a: [1", "not YAML: "),
        ("a: b: c", "not YAML: mapping values are not allowed in this context in line 1"),
        ("a: \x07", "not YAML: "),
        ('a: "\\ud800"', "not YAML: "),
        ("[" * 100_000, "nested deeper than 64"),
        ("- " * 100_000, "nested deeper than 64"),
        ("a: 1\n\nI hope this helps.", "not YAML: "),
        ("- a\n" * 20_000, "more than 10000 values"),
    ],
)
def test_no_yaml(text, error):
    found = read_document(text, "yaml")
    assert found.value is MISSING and found.error.startswith(error)


def test_yaml_alias_bomb():
    bomb = "a: &a [x,x]\n" + "".join(
        f"{c}: &{c} [*{b},*{b}]\n" for b, c in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    assert plain(bomb, "yaml") == ("none", "YAML anchors and aliases are not allowed")


def test_yaml_with_text_around_one_block():
    found = read_document("Sure:\n```yaml\na: 1\n```\nDone: yes, and: no", "yaml")
    assert found.value == {"a": 1} and found.error == "text around the document" and found.outside > 30


# ------------------------------------------------------------------------------------------------------------ XML


def typed(text):
    shape = compile_schema(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "n": {"type": "integer"},
                "x": {"type": "number"},
                "ok": {"type": "boolean"},
                "none": {"type": ["null", "integer"]},
                "items": {"type": "array", "items": {"type": "integer"}},
                "sub": {"type": "object", "properties": {"n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}},
            },
        }
    ).shape
    return plain(text, "xml", types=shape)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<r><name>7</name><n>7</n><x>1.5e1</x><ok>true</ok></r>", {"name": "7", "n": 7, "x": 15.0, "ok": True}),
        (
            "<r><items><i>1</i><i>2</i></items><none/><sub><n>3</n></sub></r>",
            {"items": [1, 2], "none": None, "sub": {"n": 3}},
        ),
        ("<r><items/><sub/><none>null</none><name/></r>", {"items": [], "sub": {}, "none": None, "name": ""}),
        ("<r><n>007</n><ok>yes</ok><x>1e999</x></r>", {"n": "007", "ok": "yes", "x": "1e999"}),
        ("```xml\n<r>\n  <n> 5 </n>\n</r>\n```", {"n": 5}),
        ("<r><name>a &lt; b<![CDATA[<c>]]></name></r>", {"name": "a < b<c>"}),
        ('<?xml version="1.0" encoding="utf-16"?><r><n>1</n></r>', {"n": 1}),
        ('<?xml version="1.0" encoding="nonsense"?><r><n>1</n></r>', {"n": 1}),
        ("<r><n>" + "1" * 400 + "</n></r>", {"n": "1" * 400}),
    ],
)
def test_xml(text, value):
    assert typed(text) == (value, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty"),
        ("prose", "not XML: "),
        ("<a><b></a>", "not XML: mismatched tag"),
        ("<r><a/><a/></r>", "the element 'a' is repeated"),
        ('<r><a id="1"/></r>', "the element 'a' has attributes, which no schema describes"),
        ("<r>text<a/></r>", "the element 'r' has text beside its children"),
        ("<a>" * 80_000, "nested deeper than 64"),
        ("<r>&undefined;</r>", "not XML: undefined entity"),
        ("<r>&#xD800;</r>", "not XML: "),
        ("<r>\0</r>", "not XML: "),
        ('<!DOCTYPE r [<!ENTITY a "aaa"><!ENTITY b "&a;&a;">]><r>&b;</r>', "XML doctypes and entities are not allowed"),
        ('<!DOCTYPE r SYSTEM "file:///etc/passwd"><r/>', "XML doctypes and entities are not allowed"),
        (
            '<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]><r>&a;</r>',
            "XML doctypes and entities are not allowed",
        ),
        ('<!DOCTYPE r [<!ENTITY % a SYSTEM "http://example.com/a.dtd">%a;]><r/>', "XML doctypes and entities are not"),
        ("<r>" + "<a/>" * 20_000 + "</r>", "more than 10000 values"),
    ],
)
def test_no_xml(text, error):
    found = read_document(text, "xml")
    assert found.value is MISSING and found.error.startswith(error)


def test_xml_with_text_around():
    found = read_document("Sure: <r><a>1</a></r> Bye", "xml")
    assert found.value == {"a": "1"} and found.error == "text around the document" and found.outside == 10


# ----------------------------------------------------------------------------------------------------- tool calls

CALL = {"name": "f", "arguments": {"x": 1}}
CALL_TEXT = json.dumps(CALL)


@pytest.mark.parametrize(
    ("completion", "value", "error"),
    [
        (CALL_TEXT, CALL, None),
        (f"<tool_call>\n{CALL_TEXT}\n</tool_call>", CALL, None),
        (f"<tool_call>{CALL_TEXT}</tool_call>\n<tool_call>{CALL_TEXT}</tool_call>", [CALL, CALL], None),
        (f"[TOOL_CALLS] [{CALL_TEXT}]", CALL, None),
        ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}', CALL, None),
        ('{"name": "f", "parameters": 1, "arguments": 2}', {"name": "f", "parameters": 1, "arguments": 2}, None),
        (f"I call: <tool_call>{CALL_TEXT}</tool_call>", CALL, "text around the tool call"),
        (f"I call {CALL_TEXT}", CALL, "text around the document"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}], CALL, None),
        ([{"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}], CALL, None),
        ({"tool_calls": [CALL, CALL]}, [CALL, CALL], None),
        ([{"content": "Well", "tool_calls": [CALL]}], CALL, "text beside the tool call"),
        ([{"content": CALL_TEXT, "tool_calls": []}], CALL, None),
        ("[]", [], None),
        ("5", 5, None),
    ],
)
def test_tool_calls(completion, value, error):
    assert plain(completion, "tool_call") == (value, error)


CALL_MARKS = [
    *("<function=f>", "<parameter=a>", "</parameter>", "</function>", "<arg_key>", "</arg_key>", "<arg_value>"),
    *(
        "</arg_value>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "f(a=",
        ")",
    ),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|channel|>", "analysis", "<|message|>", "<|end|>"),
    *("commentary", " to=functions.", "json", "<|call|>", '{"name": "f", "parameters": {}}', ";", "True", "\\x4"),
]


def test_a_list_of_tool_calls_is_wanted():
    assert plain(f"<tool_call>{CALL_TEXT}</tool_call>", "tool_call", wants_list=True) == ([CALL], None)


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("<tool_call>{</tool_call>", "a tool call is not JSON: "),
        ("<tool_call></tool_call>", "a tool call is not JSON: "),
        (f"<tool_call>{'[' * 100}</tool_call>", "nested deeper than 64"),
        ("<tool_call>" * 20_000, "a tool call is not JSON: "),
        ({"tool_calls": [None]}, "a tool call without a name"),
        ({"tool_calls": [{"function": None}]}, "a tool call without a name"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a tool call without a name"),
        ({"tool_calls": [{"function": {"name": ["f"]}}]}, "a tool call without a name"),
        ({"tool_calls": 5}, "tool_calls is not a list of calls"),
        ({"tool_calls": {"function": CALL}}, "tool_calls is not a list of calls"),
        ({"tool_calls": [CALL] * 20_000}, "tool_calls is not a list of calls"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "the arguments are not JSON: "),
        ({"tool_calls": [{"name": "f", "arguments": {1, 2}}]}, "the arguments are not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "NaN is not JSON"),
        ({"tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]}, "the key 'x' is repeated"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}, "a lone surrogate, which is not text"),
        ({"tool_calls": [{"name": "\ud800", "arguments": {}}]}, "a lone surrogate, which is not text"),
        ({"tool_calls": [{"name": "f", "arguments": "x" * 300_000}]}, "longer than 262144 bytes"),
        ({"tool_calls": [{"name": "f", "arguments": json.dumps(["x" * 90_000])}] * 3}, "longer than 262144 bytes"),
    ],
)
def test_no_tool_calls(completion, error):
    found = read_document(completion, "tool_call")
    assert found.value is MISSING and found.error.startswith(error)


def test_arguments_that_are_nested_too_deep_or_contain_themselves():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    itself: list = []
    itself.append(itself)
    for arguments in (deep, itself):
        found = read_document({"tool_calls": [{"name": "f", "arguments": arguments}]}, "tool_call")
        assert found.value is MISSING and found.error in ("the arguments are not JSON", "nested deeper than 64")
    while deep:  # freed level by level
        deep = deep[0]


# -------------------------------------------------------------------------------------------------- what is no text


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(
    "completion",
    [
        None,
        5,
        b"{}",
        [],
        [None],
        [5],
        {},
        [[]],
        [{"role": "assistant"}],
        [{"content": None}],
        [{"content": 5}],
        [{"content": {}}],
        [{"content": [None, 5, {"text": 5}]}],
    ],
)
def test_completions_without_text(completion, output_format):
    assert text_of(completion) == ""
    assert read_document(completion, output_format).error in ("empty", "not XML: no element found: line 1, column 0")
    assert StructuredReward(SCHEMA, output_format=output_format).score(completion)["total"] == 0


def test_content_in_parts():
    parts = [{"type": "text", "text": '{"a":'}, {"type": "image"}, {"type": "text", "text": " 1}"}]
    assert plain([{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]) == ({"a": 1}, None)


# -------------------------------------------------------------------------------------------------------- hostile text


HOSTILE, LARGE = dict(hostile()), dict(large())


@pytest.fixture
def alone(monkeypatch):
    """Neither files nor network."""

    def refuse(*_, **__):
        raise AssertionError("a file or the network was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(builtins, "open", refuse)


@pytest.mark.parametrize("output_format", FORMATS)
def test_hostile_text_has_a_score_and_a_reason(output_format, alone):
    reward = StructuredReward(SCHEMA, output_format=output_format)
    for name, text in HOSTILE.items():
        for completion in (
            text,
            [{"role": "assistant", "content": text}],
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": text}}]},
        ):
            score = reward.score(completion, json.dumps(GOOD))
            assert 0 <= score["total"] < 4.0 and score["reason"], name


def test_what_is_read_to_the_end_is_judged():
    reward = StructuredReward(SCHEMA)
    for text in LARGE.values():
        score = reward.score(text, GOOD)
        assert score["structure"] == score["validity"] == score["schema"] == 1 and score["reason"] is None
    for name in ("regular pattern", "backreference", "keys", "wrong items", "equal items"):
        score = reward.score(HOSTILE[name], GOOD)
        assert score["validity"] == 1 and 0.1 < score["structure"] <= 1 and score["schema"] < 1


def below(levels, call):
    return call() if levels == 0 else below(levels - 1, call)


@pytest.mark.parametrize("output_format", FORMATS)
def test_from_any_depth_of_the_stack(output_format):
    """A score or, where not even a function can be called any more, that one RecursionError; never another error."""
    reward = StructuredReward(SCHEMA, output_format=output_format)
    text = LARGE["sound, deep"] if output_format != "xml" else "<r>" + "<next>" * 60 + "</next>" * 60 + "</r>"
    reward.score(text, text if output_format == "json" else None)
    scored = []
    for levels in range(0, 960, 3):
        try:
            score = below(levels, lambda: reward.score(text, text if output_format == "json" else None))
        except RecursionError:
            break
        scored.append(score)
        assert score["reason"] is None or score["structure"] < 1
    reasons = {score["reason"] for score in scored}
    assert len(scored) > 200 and (
        output_format != "json" or {None, "nested too deep for this interpreter's stack"} <= reasons
    )


@pytest.mark.parametrize("output_format", FORMATS)
@searching(150)
@given(
    st.one_of(
        st.text(),
        st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
        st.lists(
            st.sampled_from(
                [
                    *"{}[]<>/:,-'\"`&*!|%#\n ",
                    "a",
                    "1",
                    "e9",
                    "name",
                    "count",
                    "```json\n",
                    "\\u",
                    "d8",
                    "null",
                    "<a>",
                    "</a>",
                    "<tool_call>",
                    "</tool_call>",
                    *CALL_MARKS,
                ]
            )
        ).map("".join),
    )
)
def test_any_text_has_a_score(output_format, text):
    score = StructuredReward(SCHEMA, output_format=output_format).score(text, GOOD)
    assert 0 <= score["total"] <= 4.0
    assert (score["reason"] is None) == (score["schema"] == 1.0)
