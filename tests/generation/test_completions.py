"""Ids on their way to a server: the JSON of a text that grows, and of many prefixes of one text."""

from __future__ import annotations

import json
import random

import pytest

from tokalign.generation import completions
from tokalign.generation.completions import EncodedIds, Prefix, completion_body

DRAW = random.Random(0)
IDS = [DRAW.randrange(10 ** DRAW.randrange(1, 7)) for _ in range(300)]


def decoded(text: bytes) -> list[int]:
    return json.loads(b"[" + text + b"]")


def test_json_follows_a_text_that_grows_and_writes_each_id_once(monkeypatch):
    written = []
    plain = completions._json
    monkeypatch.setattr(completions, "_json", lambda value: written.extend(value) or plain(value))
    ids = EncodedIds(IDS[:100])
    assert decoded(ids.json()) == IDS[:100]
    for token in IDS[100:200]:
        ids.append(token)
        if token % 3 == 0:
            assert decoded(ids.json()) == ids
    ids.extend(IDS[200:])
    assert decoded(ids.json()) == ids == IDS
    assert written == IDS


def test_json_of_the_beginning():
    ids = EncodedIds(IDS)
    assert [decoded(ids.json(length)) for length in (0, 1, 2, 299, 300, 999)] == [
        IDS[:length] for length in (0, 1, 2, 299, 300, 300)
    ]
    ids.append(7)
    assert decoded(ids.json(301)) == [*IDS, 7] and decoded(ids.json(300)) == IDS
    assert decoded(EncodedIds().json()) == decoded(EncodedIds().json(0)) == []


@pytest.mark.parametrize("tail", [[], [5], [5, 6, 70]])
@pytest.mark.parametrize("length", [0, 1, 150, 300])
def test_a_prefix_reads_as_the_list_that_it_stands_for(length, tail):
    prefix, plain = Prefix(EncodedIds(IDS), length, tail), [*IDS[:length], *tail]
    assert list(prefix) == plain and len(prefix) == len(plain) and decoded(prefix.json()) == plain
    assert prefix[-2:] == plain[-2:] and [prefix[i] for i in range(-len(plain), len(plain))] == plain * 2
    with pytest.raises(IndexError):
        prefix[len(plain)]


@pytest.mark.parametrize("make", [list, tuple, EncodedIds, lambda ids: Prefix(EncodedIds(ids), len(ids), [])])
def test_a_request_says_the_same_whatever_holds_its_prompt(make):
    fields = {"model": 'a "model"', "logit_bias": {"3": -100}, "seed": None}
    assert json.loads(completion_body(make(IDS), fields)) == {**fields, "prompt": IDS}
