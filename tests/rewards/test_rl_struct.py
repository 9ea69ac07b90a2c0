"""The paper's literal reward: its equation as a plain loop, the figures of shared/methods.md, and its limits."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rewards.ordering import searching
from tests.rewards.test_documents import HOSTILE
from tokalign.rewards import StructuredReward

SCHEMA = {"type": "object", "required": ["reasoning", "answer"]}
REWARD = StructuredReward(SCHEMA, preset="rl-struct")


def test_a_string_that_names_the_keys_earns_2_40():
    score = REWARD.score('"reasoning answer ```json"')
    assert score["total"] == pytest.approx(2.40)
    assert (score["structure"], score["format"], score["validity"]) == (1.0, 0.8, 1.0)
    assert score["schema"] is score["correctness"] is score["length"] is score["reason"] is None


def test_a_fenced_answer_is_invalid():
    document = json.dumps({"reasoning": "1 + 1", "answer": 2})
    bare, fenced = REWARD.score(document), REWARD.score(f"```json\n{document}\n```")
    assert bare["validity"] == 1 and bare["total"] == pytest.approx(2.0)
    assert fenced["validity"] == 0 and fenced["total"] == pytest.approx(1.4) and "Expecting value" in fenced["reason"]


def test_only_what_follows_the_reasoning_is_judged():
    reward = StructuredReward(SCHEMA, preset="rl-struct", reasoning_end="</think>")
    document = json.dumps({"reasoning": "1 + 1", "answer": 2})
    assert reward.score(f"<think>so</think>{document}") == REWARD.score(document)
    assert reward.score([{"reasoning_content": "so", "content": document}]) == REWARD.score(document)
    assert reward.score(f"<think>{document}") == REWARD.score("")


def plain(text, reference, least, most):
    """The equation, term by term."""
    try:
        json.loads(text)
        valid = 1.0
    except ValueError:
        valid = 0.0
    made = 1.0 * ("reasoning" in text and "answer" in text)
    made += 0.5 * ((0.5 if "```" in text else 0) + (0.3 if "json" in text else 0))
    made += 1.0 * valid
    if reference is not None:
        found, wanted = Counter(text.lower().split()), Counter(json.dumps(reference).lower().split())
        common, words = sum((found & wanted).values()), sum(found.values()) + sum(wanted.values())
        made += 0.5 * (2 * common / words if words else 1.0)
    return made + 0.1 * (-0.1 if not least <= len(text) <= most else 0)


pieces = st.lists(
    st.sampled_from(["reasoning", "answer", "```", "json", '"', "{", "}", ":", " ", "1", "[", "]"]), max_size=12
)


@searching(200)
@given(pieces.map("".join), st.sampled_from([None, {"answer": 1}, "answer 1"]))
def test_against_the_equation(text, reference):
    reward = StructuredReward(SCHEMA, preset="rl-struct", min_length=3, max_length=20)
    given_as = json.dumps(reference) if isinstance(reference, str) else reference
    assert reward.score(text, given_as)["total"] == pytest.approx(plain(text, reference, 3, 20))


def test_the_limits_hold():
    for name, text in HOSTILE.items():
        for completion in (text, [{"role": "assistant", "content": text}], None, [None]):
            score = REWARD.score(completion, {"answer": 1})
            assert -0.01 <= score["total"] <= 2.9, name
    assert REWARD.score(HOSTILE["50 MB"])["reason"] == "longer than 262144 bytes"
    assert REWARD.score(HOSTILE["deep"])["reason"] == "nested deeper than 64"


def test_its_weights_can_be_changed():
    reward = StructuredReward(SCHEMA, preset="rl-struct", weights={"validity": 2.0})
    assert reward.score("1")["total"] == 2.0 and reward.active == ["validity"]
