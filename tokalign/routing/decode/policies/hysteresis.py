"""To the LLM where the SLM is unsure, back where the LLM is sure (R-Stitch, arXiv 2507.17307).

    u_M = H(p_M) / ln V,   the entropy of model M's next token as a share of the largest that V ids can have

The SLM's token is dropped if u_SLM >= threshold. The LLM then writes on while u_LLM > back: the token at which that
ends is the LLM's last. The paper has one threshold for both ways (`back=None`).

Deviations: `most` bounds a span of LLM tokens, which the paper leaves open; R-Stitch+, which learns, is not here.
"""

from __future__ import annotations

import math

import torch

from tokalign.generation.sampling import entropy
from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


class HysteresisPolicy(RoutingPolicy):
    """Scores in [0, 1]: the SLM's entropy over the shared ids, divided by its largest value.

    Args:
        threshold: from this on a token goes to the LLM.
        back: the LLM gives the text back behind a token at which its own is no more than this; None is `threshold`,
            also where that is changed later.
        most: most tokens that the LLM writes in a row; None is no bound.
    """

    def __init__(self, threshold: float, back: float | None = None, most: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"most is {most}: let the LLM write at least the 1 token that is routed to it.")
        self.threshold = check_threshold(threshold)
        self.back = None if back is None else check_threshold(back)
        self.most = 2**31 - 1 if most is None else most

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return entropy(tokens.logits.float()) / math.log(tokens.logits.shape[1])

    def spans(self, tokens: NextTokens) -> torch.Tensor:
        return torch.full_like(tokens.steps, self.most)

    def stop(self, tokens: NextTokens) -> torch.Tensor:
        return self.scores(tokens) <= (self.threshold if self.back is None else self.back)
