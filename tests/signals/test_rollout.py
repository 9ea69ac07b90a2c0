"""The rollout estimate on an engine whose distribution is known, and on a real one."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny_tokenizer
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import Completion
from tokalign.signals.rollout import (
    critical_position,
    pass_at_k_ablation,
    pass_at_k_curves,
    plot_pass_at_k,
    rollout_accuracy,
    rollout_estimate,
)

END, GOOD, BAD = 1, 2, 3


def first_hopeless(scores, threshold):
    """The definition, word by word."""
    for t, score in enumerate(scores):
        if score == 0 and all(later < threshold for later in scores[t + 1 :]):
            return t
    return None


@given(
    st.lists(st.sampled_from([0.0, 0.0, 1 / 64, 3 / 64, 0.05, 4 / 64, 0.5, 1.0]), max_size=12),
    st.sampled_from([0.0, 0.02, 0.05, 1.0]),
)
def test_critical_position_is_its_definition(scores, threshold):
    assert critical_position(scores, threshold=threshold) == first_hopeless(scores, threshold)


def test_critical_position_examples():
    assert critical_position([0.5, 0.0, 0.2, 0.0, 0.04, 0.0]) == 3  # the zero at 1 is followed by 20 %
    assert critical_position([0.5, 0.04, 0.0]) == 2
    assert critical_position([0.5, 0.02]) is None
    assert critical_position([0.0, 0.05]) is None  # 5 % is not below 5 %
    assert critical_position([]) is None
    with pytest.raises(ValueError, match="token 1 is nan"):
        critical_position([0.0, float("nan")])


class Coin:
    """Each new token is GOOD (probability `p`) or BAD; a completion of four tokens ends. Right: no BAD in it."""

    def __init__(self, p: float):
        self.p, self.tokenizer, self.requests = p, SimpleNamespace(eos_token_id=END), []

    def generate(self, prompts, params, *, adapter=None):
        results = []
        for prompt, one in zip(prompts, params, strict=True):
            self.requests.append((list(prompt), one))
            rng = random.Random(one.seed)
            completions = []
            for _ in range(one.n):
                ids: list[int] = []
                while len(prompt) - 1 + len(ids) < 4:
                    token = GOOD if rng.random() < self.p else BAD
                    if token in one.banned_token_ids and (one.banned_steps is None or len(ids) < one.banned_steps):
                        token = GOOD + BAD - token
                    ids.append(token)
                completions.append(Completion([*ids, END], [0.0] * (len(ids) + 1), "stop"))
            results.append(completions)
        return results


def right(ids):
    assert ids[-1] == END and ids.count(END) == 1 and len(ids) == 5
    return BAD not in ids


def test_scores_are_shares_of_right_continuations():
    engine = Coin(0.5)
    scores = rollout_accuracy(engine, [9], [GOOD, GOOD, BAD, GOOD, END], right, n=4000, seed=3)
    assert scores[2:] == [0.0, 0.0, 0.0]
    assert scores[0] == pytest.approx(1 / 8, abs=0.02) and scores[1] == pytest.approx(1 / 4, abs=0.03)
    assert critical_position(scores) == 2
    assert len(engine.requests) == 4  # the ended prefix is its own continuation and is not sent
    assert len({params.seed for _, params in engine.requests}) == 4
    assert rollout_accuracy(Coin(0.5), [9], [GOOD, GOOD, BAD, GOOD, END], right, n=4000, seed=3) == scores
    assert rollout_accuracy(Coin(0.5), [9], [GOOD, GOOD, BAD, GOOD, END], right, n=4000, seed=4) != scores


def test_an_ended_right_completion_scores_one_and_tokens_are_counted():
    estimate = rollout_estimate(Coin(1.0), [9], [GOOD, GOOD, GOOD, GOOD, END], right, n=3)
    assert estimate.accuracy == [1.0] * 5
    assert estimate.tokens == 6 + 3 * (4 + 3 + 2 + 1)  # one prefill; the rest of each of the four prefixes, thrice
    cut = rollout_estimate(Coin(1.0), [9], [GOOD, GOOD], right, n=3)  # truncated: its last prefix is continued too
    assert cut.correct == [3, 3]


def test_each_distinct_continuation_is_verified_once():
    seen = []

    def verify(ids):
        seen.append(tuple(ids))
        return right(ids)

    rollout_accuracy(Coin(1.0), [9], [GOOD, GOOD, GOOD], verify, n=50)
    assert len(seen) == len(set(seen)) == 1


def test_ablation_masks_the_critical_token_at_its_own_position_only():
    engine = Coin(0.5)
    found = pass_at_k_ablation(engine, [9], [GOOD, GOOD, BAD, GOOD, END], 2, right, n=4000)
    assert found.with_correct == 0
    assert found.without_correct / 4000 == pytest.approx(0.5, abs=0.03)  # BAD is banned at 2, free again at 3
    assert {tuple(prompt): (p.banned_token_ids, p.banned_steps) for prompt, p in engine.requests} == {
        (9, GOOD, GOOD): ((BAD,), 1),
        (9, GOOD, GOOD, BAD): ((), None),
    }


def test_ablation_where_the_end_token_is_critical():
    engine = Coin(0.5)
    found = pass_at_k_ablation(engine, [9], [GOOD, END], 1, lambda ids: len(ids) == 5, n=8)
    assert (found.with_correct, found.without_correct) == (0, 8)  # with it, nothing follows
    assert len(engine.requests) == 1


def test_refusals():
    with pytest.raises(ValueError, match="completion is empty"):
        rollout_estimate(Coin(0.5), [9], [], right)
    with pytest.raises(ValueError, match="critical_index is 5"):
        pass_at_k_ablation(Coin(0.5), [9], [GOOD, END], 5, right)


def test_curves_and_figure(tmp_path):
    curves = pass_at_k_curves([0, 0, 1], [4, 8, 2], 8)
    assert [point["k"] for point in curves["with"]] == [1, 2, 4, 8]
    assert curves["without"][0]["mean"] == pytest.approx((4 + 8 + 2) / 24)
    assert curves["without"][-1]["mean"] == 1.0
    assert all(p["ci95"][0] <= p["mean"] <= p["ci95"][1] for side in ("with", "without") for p in curves[side])
    plot_pass_at_k(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_transformers_engine_gives_the_same_with_and_without_a_shared_cache(tiny_path):
    engine = load_engine(EngineArguments(model=tiny_path, dtype="float32"))
    tokenizer = tiny_tokenizer()
    prompt, completion = tokenizer("1+1=").input_ids, tokenizer("2 so").input_ids

    def verify(ids):
        return sum(ids) % 2 == 0

    options = {"n": 16, "max_tokens": 5, "seed": 1}
    shared = rollout_estimate(engine, prompt, completion, verify, **options)
    plain = SimpleNamespace(tokenizer=engine.tokenizer, generate=engine.generate)
    assert rollout_estimate(plain, prompt, completion, verify, **options) == shared
    assert 0 < sum(shared.correct) < 16 * len(completion)
    critical = completion[2]
    ablation = pass_at_k_ablation(engine, prompt, completion, 2, lambda ids: ids[2] == critical, **options)
    assert (ablation.with_correct, ablation.without_correct) == (16, 0)
