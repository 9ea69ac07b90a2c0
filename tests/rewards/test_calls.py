"""Tool calls against lists of allowed values: the leaderboard's rules one by one, the grade, and source-text values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.ordering import searching
from tokalign.rewards.structured.alignment import Leaf, align, mistyped, target_of
from tokalign.rewards.structured.calls import AllowedAligner, calls_match, is_allowed_reference
from tokalign.rewards.structured.literals import read_literal, write_literal


def allowed_agreement(call, reference):
    """Share of a document of calls; its leaves add up to it."""
    leaves: list[Leaf] = []
    target = target_of(reference, None, AllowedAligner)
    found = align(call, target)
    assert align(call, target, leaves=leaves) == found
    assert sum(leaf.weight for leaf in leaves) == pytest.approx(found.size)
    assert sum(leaf.weight * leaf.credit for leaf in leaves) == pytest.approx(found.credit)
    return found.share


# ------------------------------------------------------------------------------ the leaderboard's rules, one a row

DICT = {"a": [1, 2], "b": ["x", ""]}


@pytest.mark.parametrize(
    ("value", "allowed", "kind", "right"),
    [
        # types are exact; a whole number passes for a float, and at the top alone
        (5, [5], "integer", True),
        (5.0, [5], "integer", False),
        ("5", [5], "integer", False),
        (True, [1], "integer", False),
        (5, [5.0], "float", True),
        ("5.0", [5.0], "float", False),
        (1, [True], "boolean", False),
        ([1, 2], [[1.5, 2.5], [1.0, 2.0]], ["array", "float"], False),
        ([1, 2], [[1, 2]], ["array", "float"], True),  # the type of the allowed items counts too
        ([1, 2], [[1, 2]], ["tuple", "integer"], True),
        ((1, 2), [[1, 2]], ["tuple", "integer"], False),
        # a value of the first allowed value's type stands for a variable: compared as it is
        ("limit", ["limit"], "integer", True),
        ("Limit", ["limit"], "integer", False),
        (5, [5, "five"], "integer", True),
        ("five", [5, "five"], "integer", False),
        (None, ["", None], "float", True),
        (None, ["", 1.0], "float", False),
        ("data", ["data"], "dict", True),
        ("Data", ["data"], "dict", False),
        # strings: case, spaces and , . / - _ * ^ aside, and one kind of quotes
        ("new york,ny", ["New York, NY"], "string", True),
        ("N_e-w.Y/o*r^k", ["new york"], "string", True),
        ("it's", ['it"s'], "string", True),
        ("New York!", ["New York"], "string", False),
        ("", ["", "x"], "string", True),
        ("x", [""], "string", False),
        ("Anything", ["anything"], "any", True),
        (["a"], [["a"]], "any", True),
        (["A"], [["a"]], "any", False),
        # arrays: by position, strings in them compared like strings
        (["Rome", "PARIS"], [["rome", "paris"]], ["array", "string"], True),
        (["Paris", "Rome"], [["Rome", "Paris"]], ["array", "string"], False),
        (["Rome"], [["Rome", "Paris"]], ["array", "string"], False),
        ([], ["", ["a"]], ["array", "string"], True),
        ([], [["a"]], ["array", "string"], False),
        (["a", 1], [["a", 1]], ["array", "string"], False),
        ([[1]], [[[1]]], ["array", "array"], True),
        # objects: known keys, allowed values, and no key missing that may not be left out
        ({"a": 2, "b": "X."}, [DICT], "dict", True),
        ({"a": 1}, [DICT], "dict", True),
        ({"b": "x"}, [DICT], "dict", False),
        ({"a": 3}, [DICT], "dict", False),
        ({"a": 1, "c": 1}, [DICT], "dict", False),
        ({"a": 3}, [DICT, {"a": [3]}], "dict", True),
        ({}, [""], "dict", False),
        ({"a": "plain"}, [{"a": "Plain"}], "dict", True),
        ({"a": {"b": 1}}, [{"a": [{"b": [1]}]}], "dict", False),  # an object inside an object is compared as it is
        ({"a": {"b": 1}}, [{"a": [{"b": 1}]}], "dict", True),
        ([{"a": 1}, {"a": 2}], [[DICT, DICT]], ["array", "dict"], True),
        ([{"a": 1}], [[DICT, DICT]], ["array", "dict"], False),
        ([{"a": 1}, 2], [[DICT, DICT]], ["array", "dict"], False),
        ([], ["", [DICT]], ["array", "dict"], True),
        # nothing is allowed
        ([], [], ["array", "string"], False),
    ],
)
def test_a_value_is_right_by_the_published_rules(value, allowed, kind, right):
    reference = {"name": "f", "arguments": {"x": allowed}, "types": {"x": kind}}
    assert calls_match({"name": "f", "arguments": {"x": value}}, reference) is right
    if right:
        assert allowed_agreement({"name": "f", "arguments": {"x": value}}, reference) == 1


def test_a_call_is_right_by_the_published_rules():
    reference = {"name": "f.g", "arguments": {"x": [1], "y": ["", 2]}, "types": {"x": "integer", "y": "integer"}}

    def right(arguments, name="f.g", **more):
        return calls_match({"name": name, "arguments": arguments}, {**reference, **more})

    assert right({"x": 1}) and right({"y": 2, "x": 1})
    assert not right({"y": 2}) and not right({"x": 1, "z": 1}) and not right({"x": 1}, name="f_g")
    assert not right({"x": 1}, required=["y"]) and right({"x": 1, "y": 2}, required=["y"])
    assert allowed_agreement({"name": "f.g", "arguments": {"x": 1}}, {**reference, "required": ["y"]}) == 2 / 3
    call = {"name": "f.g", "arguments": {"x": 1}}
    assert calls_match([call], reference) and calls_match(call, [reference])
    assert not calls_match([call, call], reference) and not calls_match([], reference)
    for value in (None, 5, "f.g", {"name": "f.g"}, {"name": "f.g", "arguments": [1]}, ["x"]):
        assert not calls_match(value, reference) and allowed_agreement(value, reference) == 0


def calls(*values):
    return [{"name": "f", "arguments": {"x": value}} for value in values]


def test_calls_may_come_in_any_order():
    reference = [{"name": "f", "arguments": {"x": [one]}} for one in ("Paris", "Rome", "Bonn")]
    assert calls_match(calls("rome", "Bonn", "Paris"), reference)
    assert allowed_agreement(calls("rome", "Bonn", "Paris"), reference) == 1
    for wrong, share in [
        (calls("Rome", "Rome", "Paris"), 2 / 3),  # a call made again has nothing
        (calls("Rome", "Oslo", "Paris"), 2.5 / 3),  # the second call has the right function and no right argument
        (calls("Rome", "Paris"), 2 / 3),
        (calls("Rome", "Paris", "Bonn", "Bonn"), 3 / 4),
        ([*calls("Rome", "Paris"), {"name": "g", "arguments": {}}], 2 / 3),
        (calls("Rome")[0], 1 / 3),
    ]:
        assert not calls_match(wrong, reference)
        assert allowed_agreement(wrong, reference) == pytest.approx(share)


def test_each_wanted_call_takes_the_first_that_fits_it_and_the_grade_the_best_pairing():
    reference = [{"name": "f", "arguments": {"x": [1, 2]}}, {"name": "f", "arguments": {"x": [1]}}]
    assert calls_match(calls(2, 1), reference)
    assert not calls_match(calls(1, 2), reference)  # the leaderboard's checker does not look back, so this does not
    assert allowed_agreement(calls(1, 2), reference) == 1


@pytest.mark.parametrize(
    ("reference", "fine"),
    [
        ({"name": "f", "arguments": {}}, True),
        ([{"name": "f", "arguments": {"x": [1]}}] * 2, True),
        ({"name": "f", "arguments": {"x": [1]}, "types": {"x": "integer"}, "required": [], "language": "java"}, True),
        ([], False),
        ({"name": "f", "arguments": {"x": 1}}, False),
        ({"name": "f", "arguments": {}, "kinds": {}}, False),
        ([{"name": "f", "arguments": {}}, {"name": "f"}], False),
    ],
)
def test_the_form_of_a_reference(reference, fine):
    assert is_allowed_reference(reference) is fine


# ------------------------------------------------------------------------------------------------------- the grade


def same(value, one):
    if isinstance(value, str) and isinstance(one, str):
        return value.lower().strip(".") == one.lower().strip(".")
    number = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, one))
    return value == one if number else type(value) is type(one) and value == one


def plain_allowed(call, reference):
    """For flat arguments of scalars."""
    if (
        not isinstance(call, dict)
        or call.get("name") != reference["name"]
        or not isinstance(call.get("arguments"), dict)
    ):
        return 0.0
    right = total = 0
    for key in set(call["arguments"]) | set(reference["arguments"]):
        allowed = reference["arguments"].get(key, [])
        optional = any(isinstance(one, str) and one == "" for one in allowed)
        own = 0
        if key in call["arguments"]:
            value = call["arguments"][key]
            own = 1 if any(same(value, one) for one in allowed) else any(mistyped(value, one) for one in allowed) / 2
        if not optional:
            right, total = right + own, total + 1
        elif key in call["arguments"]:
            total += 1 - own  # right or left out, it counts nothing
    return (1 + right) / (1 + total)


leaves = st.one_of(st.integers(0, 2), st.booleans(), st.sampled_from(["", "a", "A.", "b", "1", "true", 1.0, None]))


@searching(200)
@given(
    st.sampled_from(["f", "g"]),
    st.dictionaries(st.sampled_from("abcd"), leaves, max_size=4),
    st.dictionaries(st.sampled_from("abcd"), st.lists(leaves, max_size=3), max_size=4),
)
def test_allowed_agreement_against_a_plain_loop(name, arguments, allowed):
    call, reference = {"name": name, "arguments": arguments}, {"name": "f", "arguments": allowed}
    assert allowed_agreement(call, reference) == pytest.approx(plain_allowed(call, reference))


@pytest.mark.parametrize(
    ("arguments", "allowed", "share"),
    [
        ({"city": {"name": "Paris", "at": 1}}, {"city": [{"name": ["Paris", "paris"], "at": [1, ""]}]}, 1.0),
        ({"city": {"name": "Paris"}}, {"city": [{"name": ["Paris"], "at": [1, ""]}]}, 1.0),
        # what is not right as a whole has nine tenths of its right share, as one of two leaves
        ({"city": {"name": "Paris"}}, {"city": [{"name": ["Paris"], "at": [1]}]}, 0.5 + 0.45 / 2),
        (
            {"city": {"name": "Paris", "at": "1", "x": 0}},
            {"city": [{"name": ["Paris"], "at": [1]}]},
            0.5 + 0.45 * 1.5 / 3,
        ),
        ({"city": {"at": {"x": 1, "y": 3}}}, {"city": [{"at": [{"x": [1], "y": [2]}]}]}, 0.5 + 0.45 * 0.45),
        ({"at": [12, "15", 18]}, {"at": [[1], [12.0, 15.0, 18.0]]}, 0.5 + 0.45 * 2.5 / 3),
        ({"at": [1, 2, 3, 4]}, {"at": [[3]]}, 0.5 + 0.45 / 4),
        ({"at": [{"x": 1, "y": 2}]}, {"at": [[{"x": [1, 7], "y": [3]}]]}, 0.5 + 0.45 / 2),
        ({"at": []}, {"at": [[3]]}, 0.5),
        ({"at": [3]}, {"at": [3]}, 0.5),
        ({"city": {"name": "Paris"}}, {"city": [{"name": "Paris"}]}, 1.0),  # plain values: compared as they are
        ({"city": {}}, {"city": [{"name": "Paris"}]}, 0.5),
        ({"city": {"n": 1}}, {"city": [{"n": 1, "x": 2}]}, 0.5 + 0.45 / 2),
        ({"at": [1, 2]}, {"at": [[1, 2], [3]]}, 1.0),
        ({"at": [{"x": 1}]}, {"at": [[{"x": [1, 2]}]]}, 1.0),
        ({"at": True}, {"at": [1]}, 0.5),
        ({"at": "1"}, {"at": [3, 1]}, 0.75),
        ({"at": 1}, {"at": ["1"]}, 0.75),
        ([], {"at": [1]}, 0.0),
    ],
)
def test_allowed_agreement(arguments, allowed, share):
    assert allowed_agreement(
        {"name": "f", "arguments": arguments}, {"name": "f", "arguments": allowed}
    ) == pytest.approx(share)


def test_other_functions_and_no_calls():
    for call in ({"name": "g", "arguments": {}}, {"arguments": {}}, {"name": "f"}, [], "f", None):
        assert allowed_agreement(call, {"name": "f", "arguments": {}}) == 0


# -------------------------------------------------------------------------------------- values written as source text

LITERALS = [
    ("java", "integer", "-7", -7),
    ("java", "long", "42L", 42),
    ("java", "float", "1.5f", 1.5),
    ("java", "double", "0.5", 0.5),
    ("java", "boolean", "true", True),
    ("java", "String", "plain text", "plain text"),
    ("java", "any", "mapController", "mapController"),
    ("java", ["ArrayList", "long"], "new ArrayList<>(Arrays.asList(101L, 202L))", [101, 202]),
    ("java", ["ArrayList", "any"], 'new ArrayList<>(Arrays.asList("a, b", 42, true))', ["a, b", 42, True]),
    ("java", ["Array", "integer"], "new int[]{2, 7}", [2, 7]),
    ("java", ["Array", "String"], 'new String[]{"-v", "a;b"}', ["-v", "a;b"]),
    ("java", "HashMap", 'new HashMap<>() {{ put("limit", 50); put("at", "x)"); }}', {"limit": 50, "at": "x)"}),
    ("java", "HashMap", "new HashMap<>()", {}),
    ("javascript", "integer", "3", 3),
    ("javascript", "float", "3.0", 3.0),
    ("javascript", "Bigint", "3n", 3),
    ("javascript", "Boolean", "false", False),
    ("javascript", ["array", "String"], '["a", "b, c"]', ["a", "b, c"]),
    ("javascript", ["array", "float"], "[60.0, 30.5]", [60.0, 30.5]),
    ("javascript", "dict", '{"method": "GET", "at": [1, {"x": true}]}', {"method": "GET", "at": [1, {"x": True}]}),
]


@pytest.mark.parametrize(("language", "kind", "text", "value"), LITERALS)
def test_a_literal_is_written_and_read(language, kind, text, value):
    read = read_literal(text, kind, language)
    assert read == value and json.dumps(read) == json.dumps(value)
    assert write_literal(value, kind, language) == text


@pytest.mark.parametrize(
    ("language", "kind", "text", "value"),
    [
        ("java", "long", "42", "42"),  # a long has its letter
        ("java", "float", "1.5", "1.5"),
        ("java", "integer", "EVENT_THREAD", "EVENT_THREAD"),
        ("java", "boolean", "True", "True"),
        ("java", ["ArrayList", "any"], 'new ArrayList<>() {{ add(1); add("x"); }}', [1, "x"]),
        ("java", ["ArrayList", "String"], "new ArrayList<String>()", []),
        ("java", ["Array", "long"], "new long[] {1L, 2}", [1, "2"]),
        ("java", ["Array", "any"], "durations", "durations"),
        ("javascript", "String", "'x'", "x"),
        ("javascript", ["array", "integer"], "new Array(4, 5)", [4, 5]),
        ("javascript", ["array", "float"], "[[10, 15.0], [20, 25]]", [[10, 15.0], [20, 25]]),
        ("javascript", "dict", "{nm: 'Bar: chart', mn: chartModule}", {"nm": "Bar: chart", "mn": "chartModule"}),
        ("javascript", "dict", "{}", {}),
        ("javascript", "dict", "options", "options"),
    ],
)
def test_other_ways_to_write_a_literal(language, kind, text, value):
    if kind == ["array", "float"]:  # the declared type of items is that of the innermost here
        kind = "array"
    assert read_literal(text, kind, language) == value


def test_source_text_is_compared_as_what_it_stands_for():
    types = {"ids": ["ArrayList", "long"], "on": "boolean"}
    reference = {"name": "f", "arguments": {"ids": [[1, 2]], "on": [True]}, "types": types, "language": "java"}

    def right(ids, on):
        return calls_match({"name": "f", "arguments": {"ids": ids, "on": on}}, reference)

    assert right("new ArrayList<Long>(Arrays.asList(1L,2L))", "true")
    assert right("new ArrayList<>() {{ add(1L); add(2L); }}", "true")
    assert not right("new ArrayList<>(Arrays.asList(1, 2))", "true")
    assert not right([1, 2], "true") and not right("new ArrayList<>(Arrays.asList(1L, 2L))", True)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "'\\'" * 60_000, '"' * 99_999, "[" + "{a:[" * 50_000])
@pytest.mark.parametrize("kind", ["dict", ["array", "any"], "HashMap", ["ArrayList", "any"]])
def test_hostile_source_text_is_read_in_one_pass(text, kind):
    language = "java" if kind == "HashMap" or kind[0] == "ArrayList" else "javascript"
    for each in (text, f"[{text}]", f"{{{text}}}", f"new HashMap<>() {{{{ {text} }}}}"):
        assert read_literal(each, kind, language) is not None
