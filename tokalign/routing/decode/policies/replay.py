"""Given decisions, repeated: runs that are to be compared for speed must do the same work."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


class ReplayPolicy(RoutingPolicy):
    """Routes exactly at given steps.

    Args:
        steps_per_row: for each schedule the steps (0 is a completion's first token) that are routed. A request
            follows schedule `seed % len(steps_per_row)`: give the requests the seeds 0, 1, 2 …
    """

    def __init__(self, steps_per_row: Sequence[Collection[int]]):
        if not steps_per_row:
            raise ValueError("steps_per_row is empty: give at least one schedule, e.g. [[0, 8]].")
        self.threshold = 1.0
        last = max((step for steps in steps_per_row for step in steps), default=-1)
        self._routed = torch.zeros(len(steps_per_row), last + 2)  # the last column stands for all later steps
        for row, steps in enumerate(steps_per_row):
            self._routed[row, list(steps)] = 1.0

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        self._routed = self._routed.to(tokens.steps.device)
        rows, columns = self._routed.shape
        return self._routed[tokens.seeds % rows, tokens.steps.clamp(max=columns - 1)]
