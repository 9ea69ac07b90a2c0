"""Spans of a completion: each stands where a second, plain reader finds that part, and says what the alignment says."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rewards.hostile import GOOD, hostile
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.documents.document import Limits
from tokalign.rewards.structured.documents.places import places_of
from tokalign.rewards.structured.documents.reading import text_of

TEXT = st.text('ab/~"\\\n é🤖{}[]:,1', max_size=5)
SCALARS = st.none() | st.booleans() | st.integers(-50, 5000) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(TEXT, VALUES, min_size=1, max_size=4)
STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 3, "\t"]),
        "separators": st.sampled_from([None, (",", ":"), (" , ", " :\n")]),
    }
)
DECODER = json.JSONDecoder()


def second_reader(text, at=0, pointer=""):
    """(names, values, where it ends) of the JSON at a place, by plain recursion; values are (place, value)."""
    while text[at] in " \t\n\r":
        at += 1
    value, end = DECODER.raw_decode(text, at)
    names, values = {}, {pointer: ((at, end), value)}
    if value and isinstance(value, dict | list):
        inside = at + 1
        for index in range(len(value)):
            while text[inside] in " \t\n\r,":
                inside += 1
            if isinstance(value, dict):
                key, colon = DECODER.raw_decode(text, inside)
                below = f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"
                colon = text.index(":", colon) + 1
                names[below] = (inside, colon)
                inside = colon
            else:
                below = f"{pointer}/{index}"
            more, found, inside = second_reader(text, inside, below)
            names |= more
            values |= found
    return names, values, end


def resolve(value, pointer):
    for step in pointer.split("/")[1:]:
        value = value[int(step)] if isinstance(value, list) else value[step.replace("~1", "/").replace("~0", "~")]
    return value


def check(reward, completion, reference=None, schema=None):
    """Credit, after what always holds of it."""
    credit, text = reward.credit(completion, reference, schema), text_of(completion)
    assert credit.scores == reward.score(completion, reference, schema)
    for span in credit.spans:
        assert 0 <= span.start < span.end <= len(text) and 0 <= span.value <= 1
        if span.component in ("missing", "invented", "around", "broken"):
            assert span.value == 0
    return credit


def said(credit, completion, component):
    """{pointer: texts} of a component's spans."""
    found = defaultdict(list)
    for span in credit.spans:
        if span.component == component:
            found[span.pointer].append(text_of(completion)[span.start : span.end])
    return {pointer: texts[0] if len(texts) == 1 else texts for pointer, texts in found.items()}


@settings(deadline=None, max_examples=300)
@given(value=VALUES, style=STYLES)
def test_places_are_those_of_a_second_reader(value, style):
    text = json.dumps(value, **style)
    names, values, end = second_reader(text)
    places = places_of(text, 0, len(text), Limits())
    assert places.names == names and places.end == end and not places.unclosed
    empty = {p: place for p, (place, part) in values.items() if not part or not isinstance(part, dict | list)}
    assert places.leaves == empty
    assert places.containers == {p: place for p, (place, _) in values.items() if p not in empty}


@settings(deadline=None, max_examples=300)
@given(document=DOCUMENTS, reference=DOCUMENTS, style=STYLES, data=st.data())
def test_values_of_spans_are_the_alignments_leaves(document, reference, style, data):
    if data.draw(st.booleans()):  # a reference like the document, or nothing would be right
        reference = document | dict(list(reference.items())[:1])
    reward, text = StructuredReward(), json.dumps(document, **style)
    credit = check(reward, text, json.dumps(reference))
    names, values, _ = second_reader(text)
    leaves = []
    reward.alignment(document, reward.targets(json.dumps(reference), reward._compiled(None)), leaves)

    def place_of(leaf):
        if leaf.kind == "missing":
            end = values[leaf.parent][0][1]
            return end - 1, end
        (start, end), _ = values[leaf.given]
        return (names.get(leaf.given, (start,))[0] if leaf.kind == "invented" else start), end

    expected = sorted((leaf.pointer, *place_of(leaf), leaf.kind, leaf.credit) for leaf in leaves)
    assert sorted(span for span in credit.spans if span.component != "key") == expected
    invented = [span for span in credit.spans if span.component == "invented"]
    for span in credit.spans:
        if span.component == "key":
            assert (span.start, span.end) == names[span.pointer]
            assert span.value == 1 - any(other.start <= span.start < other.end for other in invented)
    assert sum(span.component == "key" for span in credit.spans) == len(names)


@settings(deadline=None, max_examples=40)
@given(document=DOCUMENTS, reference=DOCUMENTS, style=STYLES, schema=st.booleans())
def test_a_document_cut_at_any_character_has_spans_in_its_text(document, reference, style, schema):
    reward, text = StructuredReward(), json.dumps(document, **style)
    rule = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]} if schema else None
    reference = None if schema else document | dict(list(reference.items())[:1])
    for end in range(len(text)):
        credit = check(reward, text[:end], reference, rule)
        for span in credit.spans:
            if span.component == "value" and span.value == 1 and not schema:  # only what is complete can be right
                part, right = text[span.start : span.end], resolve(reference, span.pointer)
                assert (part in ("[", "{") and not right) or json.loads(part) == right


def moved(credit, by):
    return sorted(s._replace(start=s.start + by, end=s.end + by) for s in credit.spans if s.component != "around")


@pytest.mark.parametrize(
    ("before", "after", "around"),
    [
        ("", "", []),
        ("  \n", "\n ", []),
        ("```json\n", "\n```", []),
        (" ```\r\n ", "```\n", []),
        ("So: ", " That is all.", ["So: ", " That is all."]),
        ("So:\n```json\n", "\n```", ["So:\n```json\n", "\n```"]),
        ("", ' "quoted" }', [' "quoted" }']),
    ],
)
@pytest.mark.parametrize("reasoned", ["", "<think>{"])
def test_what_stands_around_moves_the_spans_and_is_one_itself(before, after, around, reasoned):
    document, reference = '{"a": 1, "b": [true, "x"], "c": {"d": 2}}', '{"a": 2, "b": [true], "c": {"e": 1}}'
    alone = check(StructuredReward(), document, reference)
    reward = StructuredReward(reasoning_end="</think>" if reasoned else None)
    lead = f"{reasoned}}}</think>" if reasoned else ""
    text = f"{lead}{before}{document}{after}"
    credit = check(reward, text, reference)
    assert moved(credit, 0) == moved(alone, len(lead + before))
    found = [text[span.start : span.end] for span in credit.spans if span.component == "around"]
    assert found == around
    message = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    assert check(reward, message, reference).spans == credit.spans


def test_a_fence_is_around_where_none_is_wanted():
    text = '```json\n{"a": 1}\n```'
    assert "around" not in {s.component for s in check(StructuredReward(), text, {"a": 1}).spans}
    credit = check(StructuredReward(fence="never"), text, {"a": 1})
    assert said(credit, text, "around") == {"": ["```json\n", "\n```"]}


def test_of_a_message_without_its_reasoning_the_content_is_read():
    reward = StructuredReward(reasoning_end="</think>")
    message = [{"role": "assistant", "reasoning_content": "so {}", "content": '{"a": 1}'}]
    assert said(check(reward, message, {"a": 1}), message, "value") == {"/a": "1"}
    parts = [
        {"role": "assistant", "content": [{"type": "text", "text": "</think>"}, {"type": "text", "text": '{"a": 1}'}]}
    ]
    assert said(check(reward, parts, {"a": 1}), parts, "value") == {"/a": "1"}


def test_each_kind_of_fault_is_where_it_is():
    reward = StructuredReward()
    reference = {"a": 1, "b": "x", "items": ["u", "v", "w"], "deep": {"k": 1, "l": 2}}
    text = '{"a": "1", "new": {"b": 1}, "items": ["u", "w", "y", "z"], "deep": {"k": 3}}'
    credit = check(reward, text, reference)
    assert said(credit, text, "missing") == {"/b": "}", "/deep/l": "}"} | {
        p: "]" for p in said(credit, text, "missing") if p.startswith("/items")
    }
    assert said(credit, text, "invented")["/new"] == '"new": {"b": 1}'
    values = {span.pointer: span.value for span in credit.spans if span.component == "value"}
    assert values["/a"] == 0.5 and values["/items/0"] == 1 and values["/deep/k"] == 0
    keys = {span.pointer: span.value for span in credit.spans if span.component == "key"}
    assert keys == {"/a": 1, "/new": 0, "/new/b": 0, "/items": 1, "/deep": 1, "/deep/k": 1}
    ends = {span.pointer: span.end for span in credit.spans if span.component == "missing"}
    assert ends["/b"] == len(text) and ends["/deep/l"] == len(text) - 1


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ('{"a": 1, "a": 2}', ', "a": 2}'),
        ('so {"a": 1, "b": NaN}', "NaN}"),
        ('{"a": 1, "b": 1e999}', "1e999}"),
        ('{"a": "\\ud800"}', '"\\ud800"}'),
        ('{"a": 1} {"a": 2}', '{"a": 2}'),
        ("no document", "no document"),
        ("{'a': 1}", "'a': 1}"),
        ('"' + "x" * 300 + '"', '"' + "x" * 300 + '"'),
        ("<think>never ends", "<think>never ends"),
        ("", None),
        (" \n", None),
        ("[" * 300, "[" * 300),
    ],
)
def test_what_is_no_document_has_but_the_place_of_its_fault(text, broken):
    reward = StructuredReward(
        limits=Limits(max_bytes=290), reasoning_end="</think>" if text.startswith("<think>") else None
    )
    credit = check(reward, text, {"a": 1})
    assert credit.exact and {s.component for s in credit.spans} <= {"broken"}
    assert said(credit, text, "broken") == ({} if broken is None else {"": broken})


def test_what_breaks_off_is_charged_where_it_does():
    text = '{"a": 1, "b": [2, {"c": 3, "d": "unfinish'
    credit = check(StructuredReward(), text, {"a": 1, "b": [2, {"c": 3, "d": "x"}], "e": 1})
    assert said(credit, text, "value") == {"/a": "1", "/b/0": "2", "/b/1/c": "3"}
    rest = ', "d": "unfinish'
    assert said(credit, text, "broken") == {"": rest}
    assert said(credit, text, "missing") == {"/b/1/d": rest, "/e": rest}
    text = '{"a": 1'  # nothing is left to charge: the last character is
    assert said(check(StructuredReward(), text, {"a": 1, "e": 1}), text, "missing") == {"/e": "1"}


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0},
        "b": {"type": "array", "items": {"type": "string"}, "maxItems": 2, "minItems": 1},
        "c": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/c"}]},
    },
    "required": ["a", "b"],
    "$defs": {"c": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}


@pytest.mark.parametrize(
    ("document", "wrong", "missing", "invented"),
    [
        ('{"a": 1, "b": ["x"], "c": {"x": 1}}', {}, {}, {}),
        ('{"a": -1, "b": ["x"]}', {"/a": "-1"}, {}, {}),
        ('{"a": "1", "b": "x"}', {"/a": '"1"', "/b": '"x"'}, {}, {}),
        ('{"a": 1, "b": ["x", 2]}', {"/b/1": "2"}, {}, {}),
        ('{"a": 1, "b": ["x", "y", "z"]}', {}, {}, {"/b/2": '"z"'}),
        ('{"a": 1, "c": {"y": [1]}}', {}, {"/b": "}", "/c/x": "}"}, {"/c/y": '"y": [1]'}),
        ('{"a": {"k": [1, 2]}, "b": ["x"]}', {"/a/k/0": "1", "/a/k/1": "2"}, {}, {}),
    ],
)
def test_without_a_reference_values_are_judged_by_the_schema(document, wrong, missing, invented):
    credit = check(StructuredReward(SCHEMA), document)
    value = json.loads(document)
    found = {span.pointer: span.value for span in credit.spans if span.component == "value"}
    texts = said(credit, document, "value")
    assert {pointer: texts[pointer] for pointer, one in found.items() if not one} == wrong
    assert all(json.loads(texts[pointer]) == resolve(value, pointer) for pointer in found)
    assert said(credit, document, "missing") == missing and said(credit, document, "invented") == invented
    places = places_of(document, 0, len(document), Limits())
    assert len(found) + sum(p.startswith(q) for p in places.leaves for q in invented) == len(places.leaves)


CALLS = [{"name": "f", "arguments": {"x": 1, "y": "a"}}, {"name": "g", "arguments": {"z": True}}]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "b"}}\n</tool_call>'
        '<tool_call>{"name": "g", "arguments": {}}',
        '[{"name": "f", "arguments": {"x": 1, "y": "b"}}, {"name": "g", "parameters": {}}]',
        '{"name": "f", "arguments": {"x": 1, "y": "b"}}; '
        '{"type": "function", "function": {"name": "g", "arguments": {}}}',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1, "y": "b"}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS]f[ARGS]{"x": 1, "y": "b"}[TOOL_CALLS]g[ARGS]{}',
        'f{"x": 1, "y": "b"}g{}',
        '  functions.f:0{"x": 1, "y": "b"}functions.g:1{}',
    ],
)
def test_spans_of_tool_calls_are_in_their_json(text):
    credit = check(StructuredReward(output_format="tool_call"), text, CALLS)
    assert credit.exact and credit.scores["correctness"] > 0
    values = said(credit, text, "value")
    assert values == {
        "/0/name": values["/0/name"],
        "/0/arguments/x": "1",
        "/0/arguments/y": '"b"',
        "/1/name": values["/1/name"],
    }
    assert values["/0/name"].strip('"') == "f" and values["/1/name"].strip('"') == "g"
    assert said(credit, text, "missing") == {"/1/arguments/z": "}"}
    wrong = {span.pointer for span in credit.spans if span.component == "value" and not span.value}
    assert wrong == {"/0/arguments/y"}


def test_text_around_a_call_is_around_and_its_marks_are_not():
    text = 'Well: <tool_call>{"name": "f", "arguments": {"x": 1, "y": "a"}}</tool_call> Done.'
    credit = check(StructuredReward(output_format="tool_call"), text, CALLS[0])
    assert said(credit, text, "around") == {"": ["Well: ", " Done."]}


def test_a_single_call_in_a_list_and_a_list_of_one():
    text = ' [{"name": "f", "arguments": "{\\"x\\": 1}"}]'  # arguments encoded twice have no places of their own
    credit = check(StructuredReward(output_format="tool_call"), text, CALLS[0])
    assert said(credit, text, "value") == {"/name": '"f"', "/arguments/x": '"{\\"x\\": 1}"'}


@pytest.mark.parametrize(
    ("options", "completion"),
    [
        ({"output_format": "yaml"}, "a: 1\nb: x"),
        ({"output_format": "xml"}, "<r><a>1</a></r>"),
        ({"output_format": "tool_call"}, "[f(x=1)]"),
        ({"output_format": "tool_call"}, "<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>"),
        ({"preset": "rl-struct"}, '{"a": 1}'),
        ({}, json.dumps({"k" * 2000: {str(i): i for i in range(50)}})),
    ],
)
def test_where_places_are_unknown_the_whole_document_has_its_share(options, completion):
    reward = StructuredReward(**options)
    credit = check(reward, completion)
    assert not credit.exact
    (span,) = credit.spans
    best = sum(weight for name, weight in reward.weights.items() if credit.scores[name] is not None)
    assert span == ("", 0, len(completion), "document", credit.scores["total"] / best)


def test_parsed_tool_calls_stand_in_no_text():
    message = [{"role": "assistant", "content": "", "tool_calls": [{"function": CALLS[0]}]}]
    credit = StructuredReward(output_format="tool_call").credit(message, CALLS[0])
    assert credit.spans == [] and not credit.exact and credit.scores["correctness"] == 1


@pytest.mark.parametrize("output_format", ["json", "tool_call"])
def test_hostile_text_has_spans_in_it_and_pointers_that_fit_in_memory(output_format):
    reward = StructuredReward(output_format=output_format)
    for _, text in hostile():
        credit = check(reward, text, GOOD)
        assert sum(len(span.pointer) for span in credit.spans) <= Limits().max_depth * len(text)
