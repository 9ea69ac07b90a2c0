"""Credit by the policy's own entropy H_t = −Σ_v π(v|x, y_<t) log π(v|x, y_<t): the tokens where it had to decide.

`entropy`, a weight (arXiv 2506.01939): the policy gradient of the most uncertain tokens alone,

    w_t = 1 if H_t is at or above the quantile 1 − ρ of all loss tokens of the batch (every process), else 0.

ρ = 0.2 there. TRL's `top_entropy_quantile: 0.2` is the same rule inside the loss, made anew for every micro-batch: take
that if it is all you want. This one is made once for the batch that was sampled, by the policy that sampled it, and can
be combined with other credits; in a batch of one micro-batch the two are one, which a test holds.

`graded_entropy`, an advantage (arXiv 2506.14758): a bonus for uncertain tokens that cannot turn an advantage around,

    A_t = A + min(α H_t, |A| / κ),     H without a gradient, α = 0.4, κ = 2.

Both cost one forward of the policy.
"""

from __future__ import annotations

from typing import Any

import torch

from tokalign.trainers.credits.reading import Batch, loss_mask, policy_entropies


class EntropyCredit:
    """Weight 1 on the share ρ of tokens with the highest entropy, 0 on the others.

    Args:
        share: ρ, in (0, 1].

    Raises:
        ValueError: a share outside.
    """

    __name__ = "entropy"
    mode = "weight"
    reads = ()

    def __init__(self, share: float = 0.2):
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: use a share of the tokens above 0 and at most 1.")
        self.share = share

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) weights."""
        entropies = policy_entropies(trainer, batch)
        return trainer.get_high_entropy_mask(entropies, loss_mask(batch), 1 - self.share).float()


class GradedEntropyCredit:
    """The bonus min(α H, |A| / κ).

    Args:
        alpha: α, ≥ 0.
        kappa: κ, > 1: what keeps a negative advantage negative.

    Raises:
        ValueError: a number outside.
    """

    __name__ = "graded_entropy"
    mode = "advantage"
    reads = ()

    def __init__(self, alpha: float = 0.4, kappa: float = 2.0):
        if alpha < 0 or kappa <= 1:
            raise ValueError(f"alpha is {alpha} and kappa {kappa}: use alpha at least 0 and kappa above 1.")
        self.alpha, self.kappa = alpha, kappa

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) bonuses."""
        bonus = torch.minimum(
            self.alpha * policy_entropies(trainer, batch), batch["advantages"].abs()[:, None] / self.kappa
        )
        return bonus * loss_mask(batch)
