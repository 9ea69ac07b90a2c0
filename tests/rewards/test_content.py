"""What a document says beside its reference, against plain loops and a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.ordering import searching
from tokalign.rewards.structured.content import agreement, equal, leaf_f1, token_f1

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


def plain_agreement(value, reference):
    if isinstance(value, dict) and isinstance(reference, dict):
        keys = set(value) | set(reference)
        found = [plain_agreement(value[k], reference[k]) if k in value and k in reference else 0.0 for k in keys]
        return sum(found) / len(keys) if keys else 1.0
    if isinstance(value, list) and isinstance(reference, list):
        longest = max(len(value), len(reference))
        found = [plain_agreement(value[i], reference[i]) for i in range(longest) if i < min(len(value), len(reference))]
        return sum(found) / longest if longest else 1.0
    if isinstance(value, dict | list) or isinstance(reference, dict | list):
        return 0.0
    return float(same_scalar(value, reference))


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
        assert agreement(a, b) == pytest.approx(plain_agreement(a, b), abs=1e-12)
        assert leaf_f1(a, b) == pytest.approx(plain_f1(a, b), abs=1e-12)
        assert equal(a, b) == (plain_agreement(a, b) == 1.0)


@pytest.mark.parametrize(
    ("value", "reference", "share"),
    [
        (True, 1, 0.0),
        (1, 1.0, 1.0),
        ("1", 1, 0.0),
        (None, False, 0.0),
        (0, False, 0.0),
        ({}, [], 0.0),
        ({}, {}, 1.0),
        ([], [], 1.0),
        ({"a": 1}, {"a": 1, "b": 2}, 1 / 2),
        ({"a": 1, "c": 1}, {"a": 1, "b": 2}, 1 / 3),
        ({"a": 1, "b": 3}, {"a": 1, "b": 2}, 1 / 2),  # as much as leaving it out
        ([1, 2], [1, 3, 2], 1 / 3),
        ({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 0}, "d": 1}, 3 / 4),
    ],
)
def test_agreement(value, reference, share):
    assert agreement(value, reference) == pytest.approx(share)


def test_agreement_by_words():
    assert agreement({"a": "The cat sat"}, {"a": "the cat"}, text_match="tokens") == pytest.approx(4 / 5)
    assert agreement({"a": "The cat sat"}, {"a": "the cat"}) == 0
    assert agreement({"a": 1}, {"a": "1"}, text_match="tokens") == 0
    assert token_f1("", "") == 1 and token_f1("a", "") == 0 and token_f1("a a b", "a b b") == pytest.approx(2 / 3)


def test_the_last_bit_is_the_same_in_every_process():
    """Strings hash otherwise in every process, and sums of floats depend on their order."""
    code = (
        "from tokalign.rewards.structured.content import agreement\n"
        "value = {f'key{i}': {'a': 1, **{str(j): j for j in range(i)}} for i in range(60)}\n"
        "print(repr(agreement(value, {key: {'a': 1} for key in value})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_leaves_have_types():
    assert leaf_f1({"a": [1, 2]}, {"a": [1, 3]}) == 0.5
    assert leaf_f1({"a": []}, {"a": {}}) == 0 and leaf_f1({"a": 1.0}, {"a": 1}) == 1 and leaf_f1(True, 1) == 0
