"""The vectorised losses against plain loops written from the papers' equations."""

import math
import statistics

import pytest
import torch

from tokalign.losses import (
    critical_token_dpo_position_loss,
    group_advantages,
    pair_weight,
    sequence_rewards,
    token_advantages,
    token_reward_regularizer,
    wpo_weights,
)


def _batch(seed: int = 0, pairs: int = 5, length: int = 9):
    """Log-probs of policy and reference, a value in [0, 1] a token, and the mask of two right-padded sides."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -torch.rand(2, 2, pairs, length, generator=generator, dtype=torch.float64)
    values = torch.rand(2, pairs, length, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, pairs, length, dtype=torch.long)
    for side in range(2):
        for pair in range(pairs):
            start = 2 + pair % 2
            mask[side, pair, start : start + 1 + (pair + 3 * side) % 5] = 1
    for garbage, value in ((policy, -math.inf), (reference, -math.inf), (values, math.nan)):
        garbage[mask == 0] = value  # must never be read
    return policy, reference, values, mask


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_position_form_is_the_released_code():
    policy, reference, weights, mask = _batch(1)
    ratios = policy - reference
    losses = critical_token_dpo_position_loss(*ratios, *mask, *weights, beta=0.5)
    length = ratios.size(2)
    for pair in range(ratios.size(1)):
        total = 0.0
        for t in range(length):
            chosen, rejected = (
                weights[side, pair, t].item() * ratios[side, pair, t].item() if mask[side, pair, t] else 0.0
                for side in range(2)
            )
            total -= math.log(_sigmoid(0.5 * (chosen - rejected)))
        assert losses[pair].item() == pytest.approx(total / length, rel=1e-10)


def test_position_form_has_no_gradient_outside_the_completions():
    policy, reference, weights, mask = _batch(3)
    rejected = policy[1].clone().requires_grad_()
    ratios = (policy - reference)[0], rejected - reference[1]
    critical_token_dpo_position_loss(*ratios, *mask, *weights, beta=1.0).sum().backward()
    assert (rejected.grad[mask[1] == 1] > 0).all() and (rejected.grad[mask[1] == 0] == 0).all()


@pytest.mark.parametrize("simpo", [False, True])
def test_sequence_rewards_are_dpos_and_simpos(simpo):
    policy, reference, _, mask = _batch()
    compared = torch.zeros_like(policy) if simpo else reference
    for side in range(2):
        rewards = sequence_rewards(policy[side], mask[side], None if simpo else reference[side], beta=0.3)
        for pair in range(policy.size(1)):
            tokens = [t for t in range(policy.size(2)) if mask[side, pair, t]]
            total = sum(policy[side, pair, t].item() - compared[side, pair, t].item() for t in tokens)
            assert rewards[pair].item() == pytest.approx(0.3 * total / (len(tokens) if simpo else 1), rel=1e-10)


def test_wpo_weights_are_the_papers():
    """w = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), both sides multiplied, and no gradient."""
    policy, _, squares, mask = _batch(4)
    logps = policy.flatten(0, 1).requires_grad_()
    weights = wpo_weights(logps, squares.flatten(0, 1), mask.flatten(0, 1))
    assert not weights.requires_grad
    for pair in range(policy.size(1)):
        product = 1.0
        for side in range(2):
            tokens = [t for t in range(policy.size(2)) if mask[side, pair, t]]
            terms = [policy[side, pair, t].item() - squares[side, pair, t].item() for t in tokens]
            product *= math.exp(sum(terms) / len(terms))
        assert weights[pair].item() == pytest.approx(product, rel=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_regularizer_and_its_gradient_are_the_papers(reduction):
    """L_reg = − Σ β r̂_t log π(y_t), so ∂L_reg/∂log π(y_t) = − β r̂_t."""
    policy, _, values, mask = _batch(2)
    logps, rewards, inside = policy[0].clone().requires_grad_(), values[0] - 0.5, mask[0]
    losses = token_reward_regularizer(logps, inside, rewards, beta=0.3, reduction=reduction)
    losses.sum().backward()
    for pair in range(logps.size(0)):
        tokens = [t for t in range(logps.size(1)) if inside[pair, t]]
        scale = 0.3 / (len(tokens) if reduction == "mean" else 1)
        expected = -sum(scale * rewards[pair, t].item() * logps[pair, t].item() for t in tokens)
        assert losses[pair].item() == pytest.approx(expected, rel=1e-10)
        for t in range(logps.size(1)):
            slope = -scale * rewards[pair, t].item() if t in tokens else 0.0
            assert logps.grad[pair, t].item() == pytest.approx(slope, rel=1e-10)


def test_pair_weight_is_the_base_losss_own_factor_without_a_gradient():
    margin = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin).sum(), margin)
    weight = pair_weight(margin, "gradient")
    assert torch.allclose(weight, -gradient) and not weight.requires_grad
    assert torch.equal(pair_weight(margin, "static"), torch.ones(3))


def test_refusals():
    policy, _, values, mask = _batch(3)
    with pytest.raises(ValueError, match="reduction must be"):
        token_reward_regularizer(policy[0], mask[0], values[0], beta=0.1, reduction="max")
    with pytest.raises(ValueError, match="sequence_weight must be"):
        pair_weight(torch.zeros(2), "dynamic")


def test_token_advantages_are_the_equation():
    generator = torch.Generator().manual_seed(0)
    weights, credits = torch.rand(2, 2, 4, 6, generator=generator, dtype=torch.float64)
    weights[0, 1, 2] = credits[1, 2, 3] = math.nan  # nothing is said of these tokens
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 1, 0], [0] * 6, [1, 0, 1, 1, 1, 0]])
    made = token_advantages(advantages, mask, list(weights), [(0.5, credits[0]), (2.0, credits[1])])
    for i in range(4):
        for t in range(6):
            w = [1.0 if weights[k, i, t].isnan() else weights[k, i, t].item() for k in range(2)]
            c = [0.0 if credits[k, i, t].isnan() else credits[k, i, t].item() for k in range(2)]
            expected = (advantages[i].item() * w[0] * w[1] + 0.5 * c[0] + 2.0 * c[1]) * mask[i, t].item()
            assert made[i, t].item() == pytest.approx(expected, rel=1e-12)


def _relative(values, group, scale):
    """Values against their groups' means, over the group's or all values' spread; None where there is no value."""
    every = [value for value in values if value is not None]
    made = []
    for start in range(0, len(values), group):
        members = values[start : start + group]
        known = [value for value in members if value is not None]
        spread = {"group": known, "batch": every, "none": None}[scale]
        divisor = 1.0 if spread is None else (statistics.stdev(spread) if len(spread) > 1 else math.nan) + 1e-4
        made += [None if value is None else (value - statistics.mean(known)) / divisor for value in members]
    return [None if value is None or math.isnan(value) else value for value in made]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_group_advantages_are_the_equation(scale, aggregation):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    rewards[torch.rand(12, 3, generator=generator) < 0.4] = math.nan
    rewards[1] = math.nan  # judged by nobody
    rewards[8:11] = math.nan  # one of a group that is judged
    weights = [0.5, -1.0, 2.0]
    columns = [[None if math.isnan(value) else value for value in column] for column in rewards.T.tolist()]
    summed_first = aggregation == "sum_then_normalize"
    normal = columns if summed_first else [_relative(column, 4, "group") for column in columns]
    totals = [
        None
        if all(column[i] is None for column in columns)
        else sum(w * (column[i] or 0.0) for w, column in zip(weights, normal, strict=True))
        for i in range(12)
    ]
    expected = _relative(totals, *((4, scale) if summed_first else (12, "batch")))
    given = {"group_size": 4, "scale_rewards": scale, "aggregation": aggregation}
    made = group_advantages(rewards, torch.tensor(weights, dtype=torch.float64), **given)
    assert made.tolist() == pytest.approx([value or 0.0 for value in expected], rel=1e-6)  # TRL's n / (n - 1) is fp32
    assert not group_advantages(rewards[:, :0], torch.ones(0), **given).any()  # of no function at all
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(rewards, torch.ones(3), **given | {"scale_rewards": "all"})
