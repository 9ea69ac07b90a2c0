"""Credit by the reward that a model trained with DPO holds in itself: PRIME (arXiv 2502.01456), RTO (2404.18922).

    r_t = β log( π_φ(y_t|x, y_<t) / π_ref(y_t|x, y_<t) )
    A_t = Σ_{s ≥ t} γ^(s−t) ( r_s − mean_{j ≠ i} r̄_j )

π_φ was trained by DPO (or as PRIME's implicit process reward model) from π_ref. r_s is the dense reward of both papers;
A_t is PRIME's: each token's reward less what the other completions of the group have per token on average, r̄_j, summed
to the end (its equation 5). It is added to the advantage of the outcome, as there. β is 0.05, as in the paper, and γ 1.
PRIME's released code subtracts something else: a group of n has each token's reward times n/(n−1), less the sum of all
n means over n−1. So a token is also moved by its distance from its own completion's mean. `form="released"` does that.

It costs two forwards of the frozen base. Left out: PRIME trains π_φ on, on the policy's own completions; here it stays
as it was given. RTO's PPO, which learns a critic from r_t, is not this either.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from tokalign.signals.likelihood import LikelihoodScorer
from tokalign.trainers.credits.reading import Batch, base_and_adapter, frozen, group_size, loss_mask, named_path, read


class ImplicitRewardCredit:
    """PRIME's advantage of the implicit reward.

    Args:
        model: π_φ, an adapter or a model; unset is the configuration's `credit_model`.
        reference: π_ref, an adapter or a model; unset is the base of the adapter π_φ, and where π_φ is no adapter the
            configuration's `credit_negative`.
        beta: β.
        gamma: γ, in [0, 1].
        form: of the baseline, "paper" or "released" (see above).

    Raises:
        ValueError: no model is named, one without a reference, or another form.
    """

    __name__ = "implicit_reward"
    mode = "advantage"

    def __init__(
        self,
        model: str | None = None,
        reference: str | None = None,
        beta: float = 0.05,
        gamma: float = 1.0,
        form: Literal["paper", "released"] = "paper",
    ):
        if form not in ("paper", "released"):
            raise ValueError(f"form is {form!r}: use 'paper' or 'released'.")
        self.form = form
        self.model, self.reference, self.beta, self.gamma = model, reference, beta, gamma
        self.reads = ["credit_model"] if model is None else []

    def attach(self, trainer: Any) -> None:
        """Loads π_φ, and π_ref where it is not the base under π_φ's adapter."""
        model = named_path(trainer, self.model, "credit_model", "implicit_reward reads a model that DPO has trained")
        base, adapter = base_and_adapter(model, "credit_model")
        self.reads += ["credit_negative"] if adapter is None and self.reference is None else []
        reference = self.reference or (trainer.args.credit_negative if adapter is None else None)
        if adapter is None and not reference:
            raise ValueError(
                f"implicit_reward compares credit_model {model} with what it was trained from: give that model as "
                "`credit_negative`, or an adapter as `credit_model`, whose base it is."
            )
        self.scorer = frozen(trainer, LikelihoodScorer, "credit_model", base, adapter=adapter)
        self.other = None
        if reference:
            base, adapter = base_and_adapter(reference, "credit_negative")
            self.other = frozen(trainer, LikelihoodScorer, "credit_negative", base, adapter=adapter)

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) advantages."""
        logps = read(batch, lambda *ids: self.scorer.score(*ids)["logprob"])
        other = self.other
        reference = read(batch, self._base if other is None else lambda *ids: other.score(*ids)["logprob"])
        mask = loss_mask(batch)
        rewards = self.beta * (logps - reference) * mask

        # A group may lie in several processes, so their means are gathered; a row without tokens has none
        has, means = mask.any(dim=1), rewards.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        gathered = trainer.accelerator.gather(torch.where(has, means, torch.nan))
        first = trainer.accelerator.process_index * len(means)
        baseline = mean_of_others(gathered, group_size(trainer))[first : first + len(means)]
        if self.form == "released":
            others = others_of(gathered, group_size(trainer))[first : first + len(means)]
            rewards = rewards + (rewards - means[:, None]) / others.clamp(min=1)[:, None]
        return returns((rewards - baseline[:, None]) * mask, self.gamma)

    def _base(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """log π_ref by the base itself, with the adapter switched off."""
        adapter, self.scorer.name = self.scorer.name, None
        try:
            return self.scorer.score(prompts, completions)["logprob"]
        finally:
            self.scorer.name = adapter


def mean_of_others(values: torch.Tensor, group: int) -> torch.Tensor:
    """Mean over the other members of each one's group, of (N,) values that lie group by group; NaN is no member.

    0 where there is no other.
    """
    known = values.view(-1, group).nan_to_num(0.0)
    return (known.sum(dim=1, keepdim=True) - known).view(-1) / others_of(values, group).clamp(min=1)


def others_of(values: torch.Tensor, group: int) -> torch.Tensor:
    """How many other members the group of each of (N,) values has; NaN is no member."""
    here = (~values.view(-1, group).isnan()).float()
    return (here.sum(dim=1, keepdim=True) - here).view(-1)


def returns(rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Σ_{s ≥ t} γ^(s−t) r_s of (B, T) rewards."""
    result, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for position in range(rewards.shape[1] - 1, -1, -1):
        running = rewards[:, position] + gamma * running
        result[:, position] = running
    return result
