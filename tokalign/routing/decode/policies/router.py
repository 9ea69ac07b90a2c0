"""The method: a trained router scores every token of the SLM (R2R, arXiv 2505.21600, section 3.3).

Which token does the router see when the SLM samples? By default the likeliest, ŷ = argmax z (`score="argmax"`). The
paper's labels say whether *that* token diverges, so the router never saw another in training. Nor does the score then
hang on the draw, so that an engine whose sampler runs after the router (vLLM) decides alike. The paper's released code
scores the token that was drawn (`score="drawn"`). Greedy decoding is the same under both.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy
from tokalign.routing.router.model import TokenRouter

logger = logging.getLogger(__name__)


class RouterPolicy(RoutingPolicy):
    """Scores of a trained `TokenRouter`, in [0, 1].

    Args:
        threshold: None is the calibrated one that is stored with the router. Another one is logged.
        score: which token's embedding the router reads, see above. A router without the input `token` reads neither.

    Raises:
        ValueError: neither a stored threshold nor one given.
    """

    def __init__(
        self, router: TokenRouter, threshold: float | None = None, *, score: Literal["argmax", "drawn"] = "argmax"
    ):
        if score not in ("argmax", "drawn"):
            raise ValueError(f"score is {score!r}: use 'argmax' (as in training) or 'drawn'.")
        stored = router.config.threshold
        if threshold is None:
            threshold = router.threshold
        elif stored is not None and threshold != stored:
            logger.warning("Routing at threshold %g; the router was calibrated to %g.", threshold, stored)
        self.router = router.eval()
        self.threshold = check_threshold(threshold)
        self.needs_hidden = "hidden" in router.config.inputs
        self.score = score

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        if self.score == "drawn":
            return self.router.scores(tokens.hidden, tokens.logits, predicted=tokens.drawn)
        return self.router.scores(tokens.hidden, tokens.logits)

    def attach(self, slm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Moves the router beside the SLM and gives it the SLM's input embedding."""
        embedding: torch.Tensor = slm.get_input_embeddings().weight  # type: ignore[assignment]
        self.router.to(embedding.device)
        self.router.attach_embedding(embedding)
