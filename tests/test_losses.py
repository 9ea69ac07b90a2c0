"""The vectorised losses against plain loops written from the papers' equations."""

import math

import pytest
import torch

from tokalign.losses import (
    critical_token_dpo_position_loss,
    pair_weight,
    sequence_rewards,
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
