"""Policies against their equations, and costs against hand-counted tokens."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from tokalign.generation.sampling import uniforms
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.costs import activated_parameters, full_cost
from tokalign.routing.decode.policies import (
    AlwaysLLM,
    EntropyPolicy,
    NeverLLM,
    NextTokens,
    RandomPolicy,
    ReplayPolicy,
    RouterPolicy,
)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeds, samples and steps."""
    return torch.arange(count) + 5, torch.arange(count) % 3, torch.arange(count) % 7


def test_entropy_is_that_of_the_softmax_in_nats():
    torch.manual_seed(0)
    logits = torch.randn(4, 11) * 3
    logits[1, 3] = -torch.inf  # an id that the models may not write
    scores = EntropyPolicy(1.0).scores(NextTokens(None, logits, *rows(4)))
    for row, score in zip(logits.tolist(), scores.tolist(), strict=True):
        weights = [math.exp(x) for x in row]
        shares = [w / sum(weights) for w in weights]
        assert score == pytest.approx(-sum(p * math.log(p) for p in shares if p), abs=1e-5)


def test_random_routes_its_share_by_seed_alone_and_not_by_the_numbers_that_draw_tokens():
    seeds, samples, steps = (x.repeat(4000) for x in rows(5))
    steps = torch.arange(len(steps))
    for rate in (0.0, 0.12, 0.5, 1.0):
        policy = RandomPolicy(rate)
        scores = policy.scores(NextTokens(None, torch.zeros(len(seeds), 2), seeds, samples, steps))
        assert (scores >= policy.threshold).double().mean().item() == pytest.approx(rate, abs=0.01)
    drawing = uniforms(seeds, samples, steps)
    assert abs(torch.corrcoef(torch.stack([scores, drawing]))[0, 1]) < 0.02


def test_always_and_never_route_by_the_common_rule():
    tokens = NextTokens(None, torch.zeros(3, 4), *rows(3))
    always, never = AlwaysLLM(), NeverLLM()
    assert (always.scores(tokens) >= always.threshold).all() and not always.needs_slm
    assert not (never.scores(tokens) >= never.threshold).any() and never.needs_slm


def test_replay_routes_exactly_the_given_steps():
    schedules = [[0, 3], [], [5]]
    policy = ReplayPolicy(schedules)
    for seed in range(6):
        steps = torch.arange(20)
        same = torch.full((20,), seed), torch.zeros_like(steps), steps
        scores = policy.scores(NextTokens(None, torch.zeros(20, 2), *same))
        assert (scores >= policy.threshold).nonzero().flatten().tolist() == schedules[seed % 3]


class Router:
    """As much of a `TokenRouter` as the policy uses."""

    def __init__(self, stored: float | None, inputs: list[str]):
        self.config = SimpleNamespace(threshold=stored, inputs=inputs)

    @property
    def threshold(self) -> float:
        if self.config.threshold is None:
            raise ValueError("The router has no threshold")
        return self.config.threshold

    def eval(self):
        return self

    def scores(self, hidden, logits):
        return hidden.sum(-1)


def test_a_router_keeps_its_calibrated_threshold_unless_told_otherwise_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        policy = RouterPolicy(Router(0.4, ["hidden", "logits"]))
        assert policy.threshold == 0.4 and policy.needs_hidden
        assert RouterPolicy(Router(0.4, ["hidden"]), 0.4).threshold == 0.4
        assert RouterPolicy(Router(None, ["entropy"]), 0.7).threshold == 0.7
    assert not caplog.records
    assert not RouterPolicy(Router(0.4, ["entropy"])).needs_hidden
    assert RouterPolicy(Router(0.4, ["hidden"]), 0.9).threshold == 0.9
    assert "at threshold 0.9; the router was calibrated to 0.4" in caplog.text
    hidden = torch.rand(3, 4)
    assert torch.equal(policy.scores(NextTokens(hidden, torch.zeros(3, 2), *rows(3))), hidden.sum(-1))
    with pytest.raises(ValueError, match="has no threshold"):
        RouterPolicy(Router(None, ["hidden"]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RandomPolicy(1.5), "rate is 1.5: use a share"),
        (lambda: EntropyPolicy(math.nan), "threshold is not a number"),
        (lambda: RouterPolicy(Router(0.1, []), math.nan), "threshold is not a number"),
        (lambda: ReplayPolicy([]), "steps_per_row is empty"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_costs_by_hand():
    # 10 tokens after a prompt of 5; the LLM wrote the 3rd and 4th token, each a hand-off.
    stats = RoutedStats(slm_tokens=8, llm_tokens=2, handoffs=2, slm_positions=5 + 9, llm_positions=5 + 3)
    assert activated_parameters(stats, 1.5, 32.0) == pytest.approx((8 * 1.5 + 2 * 32) / 10)
    assert full_cost(stats, 1.5, 32.0, 0.05) == pytest.approx((14 * 1.5 + 8 * 32 + 10 * 0.05) / 10)
    assert (stats.tokens, stats.llm_rate) == (10, 0.2)
    stats += RoutedStats(1, 2, 3, 4, 5)
    assert stats == RoutedStats(9, 4, 5, 18, 13)
    assert RoutedStats().llm_rate == 0.0
    for cost in (activated_parameters, full_cost):
        with pytest.raises(ValueError, match="No token was written"):
            cost(RoutedStats(), 1.0, 2.0)
