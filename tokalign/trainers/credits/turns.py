"""Credit by turn, where a completion is a conversation with tools: each turn's number on that turn's own tokens.

    c_t = G_k − mean_G G_k  on the tokens of turn k,     G_k = Σ_{j ≥ k} γ^(j−k) r_j     (G_k = r_k without γ)

A turn is what the policy writes between two results of tools; the tokens of the results have no credit. r_k comes from
a function of yours that reads the messages, or from a column: of the dataset, or what a `rollout_func` returns beside
its ids. The mean is over the completions of the group that have a turn k, in every process, so that a turn is judged by
how others did at the same place; `centre=False` leaves the numbers as they are. It is added to the outcome's advantage.

Turn-level credit of this kind is proposed in arXiv 2505.11821, which also divides by the standard deviation of the
turn; that is left out here, because a turn that few completions reach has none worth the name. It costs no forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokalign.trainers.credits.reading import Batch, group_size, loss_mask

Numbers = Sequence[float | None] | None


class TurnsCredit:
    """A number a turn, on its tokens.

    Args:
        rewards: called as a reward function is; gives a list for each completion, one number (or None) a turn, or None
            for a completion that it says nothing of. Unset, `column` is read.
        column: of such lists.
        gamma: γ, in [0, 1]: a turn has the discounted sum of its and later numbers. Unset, its own alone.
        centre: whether the group's mean at the same turn is taken off.
    """

    __name__ = "turns"
    mode = "advantage"
    reads = ()

    def __init__(
        self,
        rewards: Callable[..., Sequence[Numbers]] | None = None,
        column: str = "turn_rewards",
        gamma: float | None = None,
        centre: bool = True,
    ):
        self.rewards, self.column, self.gamma, self.centre = rewards, column, gamma, centre

    def prepare(self, **arguments: Any) -> None:
        """Asks for the numbers of this batch.

        Raises:
            ValueError: there is neither a function nor the column, or not one list a completion.
        """
        if self.rewards is None and self.column not in arguments:
            raise ValueError(
                f"turns reads the column {self.column!r}, which the rows lack: add it, let rollout_func return it, or "
                "give `TurnsCredit(rewards=…)` a function."
            )
        self.numbers = list(arguments[self.column] if self.rewards is None else self.rewards(**arguments))
        if len(self.numbers) != len(arguments["completions"]):
            raise ValueError(
                f"turns was given {len(self.numbers)} lists for {len(arguments['completions'])} completions: give one "
                "each, None for one without."
            )

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) advantages, NaN on tokens that nothing is said of.

        Raises:
            ValueError: a completion has not one number a turn.
        """
        own = loss_mask(batch).bool()
        turns = turn_of_tokens(own)
        count = (turns.max(dim=1).values + 1).tolist()
        values = torch.full((len(own), max(1, *count)), math.nan, device=own.device)
        for row, (numbers, there) in enumerate(zip(self.numbers, count, strict=True)):
            if numbers is None or not there:  # a truncated completion that TRL masks has no turn left
                continue
            if len(numbers) != there:
                raise ValueError(
                    f"turns: completion {row} has {there} turns but {len(numbers)} numbers; give one each."
                )
            known = [math.nan if number is None else float(number) for number in numbers]
            values[row, :there] = torch.tensor(known if self.gamma is None else to_go(known, self.gamma))
        if self.centre:
            values = values - self._means(trainer, values)
        return values.gather(1, turns.clamp(min=0)).masked_fill(~own, math.nan)

    def _means(self, trainer: Any, values: torch.Tensor) -> torch.Tensor:
        """(B, K) mean of each one's group at each turn, over the completions that have a number there."""
        accelerator, group, (rows, most) = trainer.accelerator, group_size(trainer), values.shape
        everybody = accelerator.gather(accelerator.pad_across_processes(values, dim=1, pad_index=math.nan))
        means = everybody.view(-1, group, everybody.shape[1]).nanmean(dim=1).repeat_interleave(group, dim=0)
        first = accelerator.process_index * rows
        return means[first : first + rows, :most]


def turn_of_tokens(own: torch.Tensor) -> torch.Tensor:
    """(B, T) the turn of each token, from 0 on, and −1 where `own` (B, T) says that the policy did not write it."""
    before = torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], dim=1)
    return ((own & ~before).cumsum(dim=1) - 1).masked_fill(~own, -1)


def to_go(numbers: Sequence[float], gamma: float) -> list[float]:
    """Σ_{j ≥ k} γ^(j−k) r_j for each k."""
    result: list[float] = []
    running = 0.0
    for number in reversed(numbers):
        running = number + gamma * running
        result.append(running)
    return result[::-1]
