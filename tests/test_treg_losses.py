"""T-REG's vectorised losses against plain loops written from the paper's equations."""

import math

import pytest
import torch

from tokalign.losses import pair_weight, sequence_rewards, token_reward_regularizer, treg_loss


def _batch(seed: int = 0, pairs: int = 5, length: int = 9):
    """Log-probs of policy and reference, masks and rewards of both sides; garbage where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -torch.rand(2, 2, pairs, length, generator=generator, dtype=torch.float64)
    rewards = torch.rand(2, pairs, length, generator=generator, dtype=torch.float64) - 0.5
    mask = torch.zeros(2, pairs, length, dtype=torch.long)
    for side in range(2):
        for pair in range(pairs):
            start = 2 + pair % 2
            mask[side, pair, start : start + 1 + (pair + 3 * side) % 5] = 1
    for garbage, value in ((policy, -math.inf), (reference, -math.inf), (rewards, math.nan)):
        garbage[mask == 0] = value  # must never be read
    return policy, reference, mask, rewards


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("simpo", [False, True])
@pytest.mark.parametrize("sequence_weight", ["gradient", "static"])
@pytest.mark.parametrize("reduction", [None, "sum", "mean"])
def test_loss_is_the_papers_equation(simpo, sequence_weight, reduction):
    policy, reference, mask, rewards = _batch()
    beta, alpha, gamma = (2.0, 0.5, 0.7) if simpo else (0.3, 0.25, 0.0)
    references = (None, None) if simpo else tuple(reference)
    got = treg_loss(
        *policy,
        *references,
        *mask,
        *rewards,
        beta=beta,
        alpha=alpha,
        gamma=gamma,
        sequence_weight=sequence_weight,
        reduction=reduction,
    )
    for pair in range(policy.size(1)):
        reward, regularizer = [0.0, 0.0], 0.0
        for side in range(2):
            tokens = [t for t in range(policy.size(2)) if mask[side, pair, t]]
            own = 0.0
            for t in tokens:
                logp = policy[side, pair, t].item()
                if simpo:
                    reward[side] += beta * logp / len(tokens)
                else:
                    reward[side] += beta * (logp - reference[side, pair, t].item())
                own -= beta * rewards[side, pair, t].item() * logp
            averaged = reduction == "mean" or (reduction is None and simpo)
            regularizer += own / len(tokens) if averaged else own
        margin = reward[0] - reward[1] - gamma
        weight = _sigmoid(-margin) if sequence_weight == "gradient" else 1.0
        expected = -math.log(_sigmoid(margin)) + alpha * weight * regularizer
        assert got[pair].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("simpo", [False, True])
def test_gradient_goes_through_the_log_probs_alone(simpo):
    """∂ℓ/∂log π(y_t) = −w (± r' + α β r̂_t): the same w in both terms, itself without a gradient."""
    policy, reference, mask, rewards = _batch(1)
    beta, alpha, gamma = 1.5, 0.5, 0.4 if simpo else 0.0
    leaf = policy.clone().requires_grad_()
    references = (None, None) if simpo else tuple(reference)
    treg_loss(*leaf, *references, *mask, *rewards, beta=beta, alpha=alpha, gamma=gamma).sum().backward()
    sequences = [sequence_rewards(policy[s], mask[s], None if simpo else reference[s], beta=beta) for s in range(2)]
    weight = torch.sigmoid(sequences[1] - sequences[0] + gamma)
    for side, sign in ((0, 1.0), (1, -1.0)):
        scale = 1 / mask[side].sum(1) if simpo else torch.ones(policy.size(1))
        expected = -weight[:, None] * beta * scale[:, None] * (sign + alpha * rewards[side].nan_to_num())
        inside = mask[side] == 1
        torch.testing.assert_close(leaf.grad[side][inside], expected[inside].double())
        assert (leaf.grad[side][~inside] == 0).all()


def test_alpha_of_zero_and_rewards_of_zero_are_the_base_loss():
    policy, reference, mask, rewards = _batch(2)
    plain = -torch.nn.functional.logsigmoid(
        0.2 * ((policy - reference).masked_fill(mask == 0, 0).sum(2) * torch.tensor([[1.0], [-1.0]])).sum(0)
    )
    assert torch.allclose(treg_loss(*policy, *reference, *mask, *rewards, beta=0.2, alpha=0.0), plain)
    nothing = torch.zeros_like(rewards)
    assert torch.allclose(treg_loss(*policy, *reference, *mask, *nothing, beta=0.2, alpha=0.5), plain)


def test_a_token_of_high_reward_is_raised_and_one_of_low_reward_lowered():
    logps = torch.full((1, 3), -1.0, requires_grad=True)
    rewards = torch.tensor([[0.4, 0.0, -0.4]])
    token_reward_regularizer(logps, torch.ones(1, 3), rewards, beta=0.5).sum().backward()
    assert torch.allclose(-logps.grad, torch.tensor([[0.2, 0.0, -0.2]]))


def test_refusals():
    policy, reference, mask, rewards = _batch(3)
    with pytest.raises(ValueError, match="both sides"):
        treg_loss(*policy, reference[0], None, *mask, *rewards, beta=0.1, alpha=0.1)
    with pytest.raises(ValueError, match="reduction must be"):
        token_reward_regularizer(policy[0], mask[0], rewards[0], beta=0.1, reduction="max")
    with pytest.raises(ValueError, match="sequence_weight must be"):
        pair_weight(torch.zeros(2), "dynamic")
