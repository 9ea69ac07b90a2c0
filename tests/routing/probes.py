"""A probe that a test's vLLM server loads."""

from __future__ import annotations

import torch


class Weighed(torch.nn.Module):
    """`scale` times the mean of the hidden state, and the probability of the likeliest token."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.scale * hidden.float().mean(-1) + logits.softmax(-1).amax(-1)
