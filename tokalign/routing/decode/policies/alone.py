"""Either model by itself, as policies: what every other policy lies between."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


@dataclass(frozen=True)
class AlwaysLLM(RoutingPolicy):
    """Every token is the LLM's; the SLM does not run."""

    threshold: float = 0.0
    needs_slm: bool = False
    needs_hidden: bool = False

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return torch.ones_like(tokens.steps, dtype=torch.float32)


@dataclass(frozen=True)
class NeverLLM(RoutingPolicy):
    """Every token is the SLM's; the LLM does not run."""

    threshold: float = 2.0
    needs_slm: bool = True
    needs_hidden: bool = False

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return torch.zeros_like(tokens.steps, dtype=torch.float32)
