"""Policies against their equations, and costs against hand-counted tokens."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.support import tiny_model, tiny_tokenizer
from tokalign.generation.sampling import uniforms
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.costs import activated_parameters, full_cost, weight_reads
from tokalign.routing.decode.policies import (
    AlwaysLLM,
    CallPolicy,
    EntropyPolicy,
    HysteresisPolicy,
    NeverLLM,
    NextTokens,
    RandomPolicy,
    ReplayPolicy,
    RouterPolicy,
    ValuePolicy,
    named_policy,
)
from tokalign.routing.decode.policies.value import ValueHead
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig


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


def next_tokens(logits, drawn=None, hidden=None) -> NextTokens:
    return NextTokens(hidden, logits, *rows(len(logits)), drawn)


def test_hysteresis_measures_doubt_as_a_share_and_gives_back_at_its_second_threshold():
    torch.manual_seed(0)
    logits = torch.randn(6, 11) * torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 40.0])[:, None]
    policy = HysteresisPolicy(0.9, back=0.5, most=7)
    tokens = next_tokens(logits)
    scores = policy.scores(tokens)
    expected = [-sum(p * math.log(p) for p in row if p) / math.log(11) for row in logits.softmax(-1).tolist()]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores[0].item() == pytest.approx(1.0) and scores[-1] < 0.1
    assert policy.stop(tokens).tolist() == [score <= 0.5 for score in expected]
    assert policy.spans(tokens).tolist() == [7] * 6
    # R-Stitch's own rule has one threshold for both ways, also when it is moved
    paper = HysteresisPolicy(0.9)
    paper.threshold = 0.3
    assert paper.stop(tokens).tolist() == [score <= 0.3 for score in expected]


def test_a_call_is_a_token_that_says_how_long_the_llm_may_write():
    logits = torch.zeros(4, 40)
    logits[1, 7], logits[2, 8], logits[3, 8] = 9.0, 9.0, 2.0
    policy = CallPolicy({7: 10, 8: 50})
    tokens = next_tokens(logits, torch.tensor([7, 3, 8, 2]))
    scores = policy.scores(tokens)
    assert (scores >= policy.threshold).tolist() == [True, False, True, False]  # those that were drawn
    assert policy.spans(tokens)[[0, 2]].tolist() == [10, 50]
    likely = logits[1].softmax(-1)[[7, 8]].sum().item()
    assert scores[1].item() == pytest.approx(likely) and likely > 0.9
    policy.threshold = 0.9  # the likely ones too
    assert (scores >= policy.threshold).tolist() == [True, True, True, False]
    assert policy.spans(tokens)[1] == 10
    logits[1, 7] = 1e9  # sure, and yet another token was drawn (by top_p of another row, say)
    assert policy.scores(tokens)[1] < 1


def test_calls_are_found_by_their_text():
    tokenizer = tiny_tokenizer()
    policy = CallPolicy({"b": 3, 9: 4})
    policy.attach(tiny_model(len(tokenizer)), tokenizer)
    drawn = torch.tensor([tokenizer.convert_tokens_to_ids("b"), 9, 0])
    tokens = next_tokens(torch.zeros(3, len(tokenizer)), drawn)
    assert (policy.scores(tokens) >= 1).tolist() == [True, True, False]
    assert policy.spans(tokens)[:2].tolist() == [3, 4]
    with pytest.raises(ValueError, match="no token '<call>'"):
        CallPolicy({"<call>": 3}).attach(tiny_model(len(tokenizer)), tokenizer)


def test_a_value_head_is_an_mlp_that_a_file_brings(tmp_path):
    torch.manual_seed(0)
    head = ValueHead([6, 5, 4])
    head.save(tmp_path / "head.safetensors")
    hidden = torch.randn(3, 6)
    a, b, c = head.layers
    expected = torch.sigmoid(c(torch.relu(b(torch.relu(a(hidden)))))).squeeze(-1)
    policy = ValuePolicy(ValueHead.load(tmp_path / "head.safetensors"), 0.4)
    assert policy.needs_hidden and policy.threshold == 0.4
    assert torch.equal(policy.scores(next_tokens(torch.zeros(3, 2), hidden=hidden)), expected)
    with pytest.raises(ValueError, match="reads 6 numbers, the SLM's hidden state has 32"):
        policy.attach(tiny_model(30), tiny_tokenizer())
    for tensors in ({}, {"layers.0.weight": torch.zeros(2, 6)}, {"layers.0.weight": torch.zeros(2, 6), "x": hidden}):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="no value head"):
            ValueHead.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no value head"):
        ValueHead.load(tmp_path / "absent.safetensors")


def test_a_router_scores_the_likeliest_token_or_the_drawn_one():
    torch.manual_seed(0)
    config = TokenRouterConfig(hidden_size=6, shared_vocab=11, top_k=3, width=8, num_blocks=1, threshold=0.5)
    router, embedding = TokenRouter(config).eval(), torch.randn(11, 6)
    router.attach_embedding(embedding)
    hidden, logits, drawn = torch.randn(4, 6), torch.randn(4, 11), torch.tensor([3, 0, 7, 7])
    tokens = next_tokens(logits, drawn, hidden)
    for score, seen in (("argmax", logits.argmax(-1)), ("drawn", drawn)):
        expected = router(hidden, embedding[seen], logits.topk(3).values).logits.sigmoid()
        assert torch.equal(RouterPolicy(router, score=score).scores(tokens), expected)
    with pytest.raises(ValueError, match="score is 'sampled'"):
        RouterPolicy(router, score="sampled")


def test_options_become_policies_and_strangers_are_named(tmp_path):
    ValueHead([4]).save(tmp_path / "head.safetensors")
    assert named_policy("hysteresis", threshold=0.4, back=0.1).back == 0.1
    assert named_policy("value", value_head=str(tmp_path / "head.safetensors")).threshold == 0.5
    assert named_policy("call", calls=["<a=b>=20"], threshold=0.7).threshold == 0.7
    assert named_policy("router", router="r", threshold=0.4) is None
    for options, sentence in (
        ({"name": "call"}, "needs --calls"),
        ({"name": "call", "calls": ["<call>"]}, "--calls has '<call>'"),
        ({"name": "call", "calls": ["<call>=0"]}, "at least 1"),
        ({"name": "value", "value_head": "x", "back": 0.3}, "--back does not belong to --policy value"),
        ({"name": "hysteresis"}, "needs --threshold"),
    ):
        with pytest.raises(ValueError, match=sentence):
            named_policy(**options)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RandomPolicy(1.5), "rate is 1.5: use a share"),
        (lambda: EntropyPolicy(math.nan), "threshold is not a number"),
        (lambda: RouterPolicy(Router(0.1, []), math.nan), "threshold is not a number"),
        (lambda: ReplayPolicy([]), "steps_per_row is empty"),
        (lambda: HysteresisPolicy(0.5, most=0), "most is 0: let the LLM"),
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
    assert weight_reads(stats, 1.5, 32.0, 0.05) == pytest.approx((10 * 1.55 + 2 * 32) / 10)
    # Verified: 6 tokens drafted, 4 of them kept; 3 looks of the LLM gave 3 tokens more.
    verified = RoutedStats(4, 3, handoffs=3, slm_positions=13, llm_positions=14, drafted=6)
    assert weight_reads(verified, 1.5, 32.0) == pytest.approx((9 * 1.5 + 3 * 32) / 7)
    stats += RoutedStats(1, 2, 3, 4, 5)
    assert stats == RoutedStats(9, 4, 5, 18, 13)
    assert RoutedStats().llm_rate == 0.0
    for cost in (activated_parameters, full_cost, weight_reads):
        with pytest.raises(ValueError, match="No token was written"):
            cost(RoutedStats(), 1.0, 2.0)
