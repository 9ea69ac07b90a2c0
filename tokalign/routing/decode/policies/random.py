"""The baseline that knows nothing: a share of the tokens, drawn by the request's seed."""

from __future__ import annotations

import torch

from tokalign.generation.sampling import uniforms
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy

_DECISIONS = 0x5DEECE66D  # keeps the random policy's numbers apart from those that draw the tokens of the same seed


class RandomPolicy(RoutingPolicy):
    """Routes a share `rate` of the tokens at random; the request's seed fixes which."""

    def __init__(self, rate: float):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}: use a share of the tokens, from 0 to 1.")
        self.threshold = 1 - rate

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return uniforms(tokens.seeds ^ _DECISIONS, tokens.samples, tokens.steps)
