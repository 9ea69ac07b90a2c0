"""What a policy sees and what it must answer.

A token is routed to the LLM if and only if its score is at least the policy's threshold. A policy may also say how long
the LLM then writes: at most `spans` tokens, and no further than the token at which `stop` gives the text back.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NextTokens(NamedTuple):
    """What is known of N next tokens before it is decided who writes them.

    Attributes:
        hidden: (N, d), what the SLM's LM head got; None unless the policy's `needs_hidden`.
        logits: (N, V), the writing model's over the ids that both models share: the SLM's, or the LLM's for `stop`.
        seeds: (N,) int64, the requests' seeds.
        samples: (N,) int64, which of a request's `n` completions.
        steps: (N,) int64, completion tokens so far.
        drawn: (N,) int64, the token that this model has drawn. While decoding it is always known; it is not written if
            the score routes it.
    """

    hidden: torch.Tensor | None
    logits: torch.Tensor
    seeds: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor
    drawn: torch.Tensor | None = None


class RoutingPolicy(Protocol):
    """Decides for N rows at a time. Inherit from it: all but `threshold` and `scores` has a default.

    Attributes:
        threshold: route if and only if score >= threshold. It may be changed while decoding.
        needs_slm: False if the SLM need not run at all: every token is the LLM's and has no score.
        needs_hidden: whether `scores` reads `hidden`.
    """

    threshold: float
    needs_slm: bool = True
    needs_hidden: bool = False

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        """Scores (N,) of N next tokens, float32 (float64 where a policy needs it)."""
        ...

    def spans(self, tokens: NextTokens) -> torch.Tensor | None:
        """Most tokens (N,) that the LLM may write from here on, if it is routed; None leaves it to `llm_span`."""
        return None

    def stop(self, tokens: NextTokens) -> torch.Tensor | None:
        """Rows (N,) bool that go back to the SLM behind the token that the LLM has drawn; None: none before its span.

        Args:
            tokens: `logits` and `drawn` are the LLM's, `hidden` is None.
        """
        return None

    def attach(self, slm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Called once, with the SLM that the policy is to watch.

        Raises:
            ValueError: one sentence, for an SLM that the policy was not made for.
        """
        return None
