"""Typed equality and F1 over leaves, against plain loops."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.ordering import searching
from tokalign.rewards.structured.content import equal, leaf_f1, token_f1

values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 1.0, 0.5]), st.text("ab ", max_size=3)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


def same_scalar(a, b):
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, str) or isinstance(b, str):
        return type(a) is type(b) and a == b
    return a == b


def plain_leaves(value, path=""):
    if isinstance(value, dict) and value:
        return [leaf for key in value for leaf in plain_leaves(value[key], f"{path}.{key}")]
    if isinstance(value, list) and value:
        return [leaf for i in range(len(value)) for leaf in plain_leaves(value[i], f"{path}[{i}]")]
    return [(path, value)]


def plain_f1(value, reference):
    found, wanted, common = plain_leaves(value), plain_leaves(reference), 0
    for path, leaf in found:
        for other, wanted_leaf in wanted:
            alike = (
                type(leaf) is type(wanted_leaf)
                if isinstance(leaf, dict | list) or isinstance(wanted_leaf, dict | list)
                else same_scalar(leaf, wanted_leaf)
            )
            common += path == other and alike
    return 2 * common / (len(found) + len(wanted))


@searching(300)
@given(values, values)
def test_against_plain_loops(value, reference):
    for a, b in ((value, reference), (reference, value), (value, json.loads(json.dumps(value)))):
        assert leaf_f1(a, b) == pytest.approx(plain_f1(a, b), abs=1e-12)
        assert equal(a, b) == (leaf_f1(a, b) == 1.0)


def test_words():
    assert token_f1("", "") == 1 and token_f1("a", "") == 0 and token_f1("a a b", "a b b") == pytest.approx(2 / 3)


def test_leaves_have_types():
    assert leaf_f1({"a": [1, 2]}, {"a": [1, 3]}) == 0.5
    assert leaf_f1({"a": []}, {"a": {}}) == 0 and leaf_f1({"a": 1.0}, {"a": 1}) == 1 and leaf_f1(True, 1) == 0
