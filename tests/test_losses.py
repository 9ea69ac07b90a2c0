"""The vectorised losses against plain loops written from the papers' equations."""

import math

import pytest
import torch

from tokalign.losses import critical_token_dpo_loss


def _batch(seed: int = 0, pairs: int = 5, length: int = 9):
    """Two right-padded sides with a common prompt, garbage where the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    ratios = torch.randn(2, pairs, length, generator=generator, dtype=torch.float64)
    score = torch.rand(2, pairs, length, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, pairs, length, dtype=torch.long)
    for side in range(2):
        for pair in range(pairs):
            start = 2 + pair % 2
            mask[side, pair, start : start + 1 + (pair + 3 * side) % 5] = 1
    ratios[mask == 0] = float("inf")  # must never be read
    score[mask == 0] = float("nan")
    return ratios, mask, score


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("weigh_chosen", [False, True])
def test_sequence_form_is_the_papers_equation(beta, weigh_chosen):
    ratios, mask, score = _batch()
    got = critical_token_dpo_loss(*ratios, *mask, score[1], beta=beta, chosen_score=score[0] if weigh_chosen else None)
    for pair in range(ratios.size(1)):
        margin = 0.0
        for t in range(ratios.size(2)):
            if mask[0, pair, t]:
                weight = 1 - score[0, pair, t].item() if weigh_chosen else 1.0
                margin += beta * weight * ratios[0, pair, t].item()
            if mask[1, pair, t]:
                margin -= beta * (1 - score[1, pair, t].item()) * ratios[1, pair, t].item()
        assert got[pair].item() == pytest.approx(-_log_sigmoid(margin), rel=1e-10)


def test_position_form_is_the_released_code():
    ratios, mask, score = _batch(1)
    got = critical_token_dpo_loss(*ratios, *mask, score[1], beta=0.5, aggregation="position")
    length = ratios.size(2)
    for pair in range(ratios.size(1)):
        total = 0.0
        for t in range(length):
            chosen = ratios[0, pair, t].item() if mask[0, pair, t] else 0.0
            rejected = (1 - score[1, pair, t].item()) * ratios[1, pair, t].item() if mask[1, pair, t] else 0.0
            total -= _log_sigmoid(0.5 * (chosen - rejected))
        assert got[pair].item() == pytest.approx(total / length, rel=1e-10)


def test_without_a_score_it_is_dpo():
    ratios, mask, score = _batch(2)
    plain = critical_token_dpo_loss(*ratios, *mask, None, beta=0.3)
    assert torch.equal(plain, critical_token_dpo_loss(*ratios, *mask, torch.zeros_like(score[1]), beta=0.3))
    sums = [(ratios[side].masked_fill(mask[side] == 0, 0)).sum(1) for side in range(2)]
    assert torch.allclose(plain, -torch.nn.functional.logsigmoid(0.3 * (sums[0] - sums[1])))


def test_gradient_reaches_a_rejected_token_in_proportion_to_its_weight():
    ratios, mask, score = _batch(3)
    rejected = ratios[1].clone().requires_grad_()
    critical_token_dpo_loss(ratios[0], rejected, *mask, score[1], beta=1.0).sum().backward()
    per_weight = (rejected.grad / (1 - score[1]))[mask[1] == 1]
    pairs = mask[1].nonzero()[:, 0]
    for pair in range(ratios.size(1)):
        same = per_weight[pairs == pair]
        assert torch.allclose(same, same[:1].expand_as(same))
    assert (rejected.grad[mask[1] == 0] == 0).all()


def test_sides_of_different_length():
    ratios, mask, score = _batch(4)
    longer = [torch.nn.functional.pad(x, (0, 3)) for x in (ratios[1], mask[1], score[1])]
    padded = critical_token_dpo_loss(ratios[0], longer[0], mask[0], longer[1], longer[2], beta=0.1)
    assert torch.allclose(padded, critical_token_dpo_loss(*ratios, *mask, score[1], beta=0.1))
    with pytest.raises(ValueError, match="position by position and needs one length"):
        critical_token_dpo_loss(ratios[0], longer[0], mask[0], longer[1], longer[2], beta=0.1, aggregation="position")
    with pytest.raises(ValueError, match="must be 'sequence' or 'position'"):
        critical_token_dpo_loss(*ratios, *mask, score[1], beta=0.1, aggregation="token")
