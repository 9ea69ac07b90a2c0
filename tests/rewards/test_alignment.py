"""How far a document says what its reference says: against every possible alignment, and law by law."""

from __future__ import annotations

import copy
import itertools
import os
import random
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.rewards.ordering import searching
from tokalign.rewards.structured.alignment import MISTYPED, CallAligner, Leaf, align, mistyped, target_of
from tokalign.rewards.structured.calls import AllowedAligner
from tokalign.rewards.structured.content import equal
from tokalign.rewards.structured.schemas import compile_schema

scalars = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.sampled_from(["", "1", "true", "x", 1.0, 2.5]))


def extended(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)


values = st.recursive(scalars, extended, max_leaves=9)


def leaves_of(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(leaves_of, inner)) or 1


def plain(value, reference) -> float:
    """Credit by the words of the module, every alignment tried."""
    size = leaves_of(reference)
    if isinstance(reference, dict) and reference and isinstance(value, dict):
        credit = sum(plain(value[key], reference[key]) for key in value if key in reference)
        return credit * size / (size + len(set(value) - set(reference)))
    if isinstance(reference, list) and reference and isinstance(value, list):
        most = 0.0
        for count in range(min(len(value), len(reference)) + 1):
            for rows in itertools.combinations(range(len(value)), count):
                for columns in itertools.combinations(range(len(reference)), count):
                    pairs = zip(rows, columns, strict=True)
                    most = max(most, sum(plain(value[i], reference[j]) for i, j in pairs))
        surplus = max(0, len(value) - len(reference))
        return most * size / (size + surplus * max(1.0, size / len(reference)))
    return 1.0 if equal(value, reference) else MISTYPED * mistyped(value, reference)


def share(value, reference, **options) -> float:
    """Share of a document, whose leaves add up to it."""
    target, leaves = target_of(reference, **options), []
    found = align(value, target)
    assert align(value, target, leaves=leaves) == found
    assert sum(leaf.weight for leaf in leaves) == pytest.approx(found.size)
    assert sum(leaf.weight * leaf.credit for leaf in leaves) == pytest.approx(found.credit)
    return found.share


def place(value, pointer):
    for step in pointer.split("/")[1:]:
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


@searching(400)
@given(values, values)
def test_against_every_alignment(value, reference):
    found = share(value, reference)
    assert found == pytest.approx(plain(value, reference) / leaves_of(reference))
    assert (found == 1.0) == (equal(value, reference))
    assert share(reference, reference) == 1.0


@searching(300)
@given(values, values)
def test_the_leaves_name_places(value, reference):
    leaves: list[Leaf] = []
    align(value, target_of(reference), leaves=leaves)
    for leaf in leaves:
        assert (leaf.given is None) == (leaf.kind == "missing") == (leaf.parent is not None)
        if leaf.kind == "missing":
            assert isinstance(place(value, leaf.parent), dict | list)
        else:
            given = place(value, leaf.given)
            assert leaf.kind == "invented" or leaf.credit < 1 or equal(given, place(reference, leaf.pointer))
    wanted = [leaf.pointer for leaf in leaves if leaf.kind != "invented"]
    assert len(wanted) == len(set(wanted)) == leaves_of(reference)


@searching(400)
@given(st.data())
def test_each_leaf_put_right_pays(data):
    """Law 2: whatever else is wrong, a wrong value put right or a missing key added raises the share."""
    reference, value = data.draw(values), data.draw(values)
    leaves: list[Leaf] = []
    now = align(value, target_of(reference), leaves=leaves).share
    wrong = [leaf for leaf in leaves if leaf.credit < 1 and leaf.kind != "invented"]
    assume(wrong)
    leaf = data.draw(st.sampled_from(wrong))
    right = copy.deepcopy(place(reference, leaf.pointer))
    put = leaf.given if leaf.kind == "value" else f"{leaf.parent}/{leaf.pointer.rpartition('/')[2]}"
    assume(put)
    parent = place(value := copy.deepcopy(value), put.rpartition("/")[0])
    # what is missing with all that surrounds it, or from a list, is another law
    around = place(reference, leaf.pointer.rpartition("/")[0])
    assume(leaf.pointer.count("/") == put.count("/"))
    assume(leaf.kind == "value" or (isinstance(parent, dict) and isinstance(around, dict)))
    parent[int(put.rpartition("/")[2]) if isinstance(parent, list) else put.rpartition("/")[2]] = right
    assert align(value, target_of(reference)).share > now


@pytest.mark.parametrize(
    ("value", "reference", "found"),
    [
        (True, 1, 0.0),
        (1, 1.0, 1.0),
        ("1", 1, MISTYPED),
        (1, "1", MISTYPED),
        ("TRUE ", True, MISTYPED),
        ("1", True, 0.0),
        ("1_8", 18, 0.0),
        ("nan", 1, 0.0),
        (None, False, 0.0),
        (0, False, 0.0),
        ({}, [], 0.0),
        ([], [], 1.0),
        ([1], [], 0.0),
        ({"a": 1}, {"a": 1, "b": 2}, 1 / 2),
        ({"a": 1, "c": 1}, {"a": 1, "b": 2}, 1 / 3),
        ({"a": 1, "b": 3}, {"a": 1, "b": 2}, 1 / 2),  # as much as leaving it out
        ({"a": 5, "b": {"c": 1}}, {"a": 5, "b": 7}, 1 / 2),  # a wrong kind is one wrong value
    ],
)
def test_shares(value, reference, found):
    assert share(value, reference) == pytest.approx(found)


ITEMS = [[2, 3, 4, 5], ["b", "c", "d", "e"], [{"x": i, "y": [i, -i]} for i in (2, 3, 4, 5)]]


@pytest.mark.parametrize("items", ITEMS, ids=["numbers", "strings", "objects"])
def test_a_list_costs_its_best_alignment(items):
    """Law 3: an item dropped, inserted or moved costs about one; repeats and enumerations gain nothing."""
    other = [9, "z", {"x": 9, "y": [9, -9]}][ITEMS.index(items)]
    for index in range(4):
        assert share(items[:index] + items[index + 1 :], items) == 3 / 4
        assert share([*items[:index], other, *items[index:]], items) == pytest.approx(4 / 5)
        moved = items[:index] + items[index + 1 :]
        assert all(share([*moved[:to], items[index], *moved[to:]], items) >= 3 / 4 for to in range(4))
    assert share(items + items, items) == 1 / 2
    assert share([items[0]] * 4, items) == share([items[0]], items) == 1 / 4
    assert share([*items, *[other] * 16], [items[0]]) == pytest.approx(1 / 20)  # twenty guesses at one item


def test_long_lists_are_cut_at_equal_items():
    reference = [[i, i + 1] for i in range(2000)]
    value = [item for i, item in enumerate(reference) if i % 100] + [[0, 0]]
    assert share(value, reference) == 0.99
    assert share([[i, -1] for i in range(2000)], reference) == 0.5  # in order, where nothing is equal
    nested = [[[[i] * 9] * 9] * 9 for i in range(9)]  # every level could want a table
    assert 0 < share([[[[i + 1] * 9] * 9] * 9 for i in range(9)], nested) < 1


def call(city, name="f"):
    return {"name": name, "arguments": {"city": city, "day": 2}}


def test_calls_pair_in_any_order_and_a_repeat_never_pays():
    """Law 4."""

    two = [call("Rome"), call("Oslo")]

    def found(value, reference=two):
        return share(value, reference, kind=CallAligner)

    assert found([call("Oslo"), call("Rome")]) == 1
    assert found([call("Oslo")]) == found([call("Oslo"), call("Oslo")]) == 1 / 2
    assert found([call("Oslo"), call("Bern")]) == 5 / 6  # the second one's function and day are right
    assert found([call("Oslo"), call("Oslo"), call("Oslo")]) == found([call("Oslo"), call("Oslo"), call("Rome")]) / 2
    assert found([call("Oslo")] * 2, [call("Oslo")] * 2) == 1  # wanted twice
    assert found([call("Oslo"), call("Rome"), call("Oslo")]) == 2 / 3
    assert found([call("Oslo"), call("Rome", "g")]) == 1 / 2  # arguments of another function say nothing
    assert found(call("Rome")) == found([call("Rome")]) and found(call("Rome"), call("Rome")) == 1


@pytest.mark.parametrize("kind", [CallAligner, AllowedAligner])
@pytest.mark.parametrize("count", [3, 150, 1237])
def test_equal_calls_are_perfect_in_any_order_and_at_any_number(kind, count):
    calls = [call(f"city {i}") for i in range(count)]
    calls[1]["arguments"]["day"] = 2.0
    allowed = [{**one, "arguments": {key: [value, "x"] for key, value in one["arguments"].items()}} for one in calls]
    for one in allowed:
        one["arguments"]["unit"] = ["", "C"]
    reference = calls if kind is CallAligner else allowed
    value = copy.deepcopy(calls[::-1])
    value[-2]["arguments"]["day"] = 2  # equal in JSON
    random.Random(0).shuffle(value)
    assert share(value, reference, kind=kind) == 1
    # one wrong argument costs one leaf, wherever its call stands, and a repeat is worth no more than nothing
    wrong = next(one for one in value if one["arguments"]["city"] == "city 0")
    wrong["arguments"]["city"] = "Rome"
    assert share(value, reference, kind=kind) == pytest.approx(1 - 1 / (3 * count))
    value[value.index(wrong)] = copy.deepcopy(value[0] if value[0] is not wrong else value[1])
    assert share(value, reference, kind=kind) == pytest.approx(1 - 1 / count)


def test_so_many_wrong_calls_pair_with_those_of_their_function():
    calls = [call(f"city {i}", "fg"[i % 2]) for i in range(1000)]
    wrong = [call(f"town {i}", "fg"[i // 500]) for i in range(1000)]
    assert share(wrong, calls, kind=CallAligner) == pytest.approx(2 / 3)


CONST = {"const": "step"}
STEP = {"type": "object", "properties": {"kind": CONST, "n": {"type": "integer"}}, "required": ["kind"]}


@pytest.mark.parametrize(
    ("schema", "value", "reference", "found"),
    [
        (STEP, {"kind": "step", "n": 1}, {"kind": "step", "n": 2}, 0.0),
        (STEP, {"kind": "step"}, {"kind": "step"}, 1.0),  # the constants alone: they are the answer
        (STEP, {"n": 2}, {"kind": "step", "n": 2}, 1.0),  # the schema's own grade sees to it
        ({**STEP, "required": []}, {"kind": "step", "n": 1}, {"kind": "step", "n": 2}, 0.5),  # it might be left out
        ({"type": "array", "items": STEP}, [{"kind": "step", "n": 3}], [{"kind": "step", "n": 2}], 0.0),
        ({"type": "array", "items": CONST}, ["step"], ["step", "step"], 0.5),  # how many there are is left open
        ({"anyOf": [STEP, {"type": "object", "properties": {"kind": {"const": "b"}}}]},
         {"kind": "step", "n": 1}, {"kind": "step", "n": 2}, 0.5),  # which alternative it is says something
        ({"type": "object", "properties": {"a": {"type": "null"}, "b": {}}, "required": ["a", "b"]},
         {"a": None, "b": 1}, {"a": None, "b": 2}, 0.0),
    ],
)  # fmt: skip
def test_what_the_schema_fixes_has_no_weight(schema, value, reference, found):
    assert share(value, reference, shape=compile_schema(schema).shape) == found


def test_words_of_free_text():
    target = target_of({"a": "the cat"})
    assert align({"a": "The cat sat"}, target, text_match="tokens").share == pytest.approx(4 / 5)
    assert align({"a": "The cat sat"}, target).share == 0
    lists = target_of(["the cat", "a dog"])
    assert align(["dog"], lists, text_match="tokens").share == pytest.approx(1 / 3)


def test_the_last_bit_is_the_same_in_every_process():
    """Strings hash otherwise in every process, and sums of floats depend on their order."""
    code = (
        "from tokalign.rewards.structured.alignment import align, target_of\n"
        "value = {f'key{i}': {'a': 1, **{str(j): j for j in range(i)}} for i in range(60)}\n"
        "print(repr(align(value, target_of({key: {'a': 1} for key in value})).share))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
