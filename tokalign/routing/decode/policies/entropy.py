"""The first baseline: the SLM's own doubt, as the entropy of its next-token distribution (R2R, section 5)."""

from __future__ import annotations

import torch

from tokalign.generation.sampling import entropy
from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


class EntropyPolicy(RoutingPolicy):
    """Entropy in nats of the SLM's next-token distribution over the shared ids. `threshold` is in nats too."""

    def __init__(self, threshold: float):
        self.threshold = check_threshold(threshold)

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return entropy(tokens.logits.float())
