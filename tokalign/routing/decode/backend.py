"""What every routed decoder gives and counts.

A routed decoder writes one completion with two models: the small one (SLM) proposes each token, a policy decides
before it is drawn, and a routed token is written by the large one (LLM) instead (R2R, arXiv 2505.21600). The
decoders are interchangeable: `transformers_backend` runs both models in this process, an `orchestrator` moves requests
between two engines.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from tokalign.generation.protocol import Ids, SamplingParams


def check_threshold(value: float) -> float:
    """`value` as a float; ValueError for what is not a number."""
    if math.isnan(float(value)):
        raise ValueError("The threshold is not a number: give the score from which on a token goes to the LLM.")
    return float(value)


class RowFailed(ValueError):
    """One completion cannot go on, for a reason of its own that the message tells; the others do."""


class LLMUnavailable(ConnectionError):
    """The LLM cannot be reached, and the backend was told not to go on without it."""


@dataclass(frozen=True, slots=True)
class RoutedToken:
    """One token of a completion.

    Attributes:
        id: token id, below the number of ids that the two models share.
        by_llm: whether the LLM wrote it.
        logprob: in nats, under the model that wrote it over the shared ids, at temperature 1 and before top-p.
        score: the policy's, from which it was decided who writes this token; None where the SLM was not asked (later
            tokens of an LLM span, policies without an SLM, and the LLM's token behind a draft of full length).
        finish_reason: on the last token of a completion "stop" (end token, stop id or stop string) or "length".
        agreed: where the LLM verifies, whether the SLM had drawn the same token; None where it was not asked.
    """

    id: int
    by_llm: bool
    logprob: float | None = None
    score: float | None = None
    finish_reason: str | None = None
    agreed: bool | None = None


@dataclass(slots=True)
class RoutedStats:
    """Work done by both models.

    Attributes:
        slm_tokens: tokens that the SLM wrote.
        llm_tokens: tokens that the LLM wrote.
        handoffs: tokens that the policy took from the SLM, or looks of the LLM at a draft. Each costs the LLM one
            prefill of what it has not seen.
        slm_positions: tokens that went through the SLM, prompts included.
        llm_positions: tokens that went through the LLM, prompts included.
        drafted: tokens that the SLM wrote for the LLM to verify; those that it kept are `slm_tokens`.
    """

    slm_tokens: int = 0
    llm_tokens: int = 0
    handoffs: int = 0
    slm_positions: int = 0
    llm_positions: int = 0
    drafted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens written by either model."""
        return self.slm_tokens + self.llm_tokens

    @property
    def llm_rate(self) -> float:
        """Share of the tokens that the LLM wrote; 0 where there are none."""
        return self.llm_tokens / self.tokens if self.tokens else 0.0

    def __iadd__(self, other: RoutedStats) -> RoutedStats:
        self.slm_tokens += other.slm_tokens
        self.llm_tokens += other.llm_tokens
        self.handoffs += other.handoffs
        self.slm_positions += other.slm_positions
        self.llm_positions += other.llm_positions
        self.drafted += other.drafted
        return self


class RoutedBackend(Protocol):
    """A running pair that a server can share among its requests.

    Attributes:
        tokenizer: of both models.
        max_length: most tokens, prompt and completion, that both models hold.
        degraded: whether the LLM is out of reach at the moment and the SLM goes on alone.
        dead: why it can serve no request any more; None while it can.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    degraded: bool

    @property
    def dead(self) -> BaseException | None:
        """Read by servers, which end with it."""
        ...

    @property
    def stats(self) -> RoutedStats:
        """Everything since the start; cancelled requests count as far as they got."""
        ...

    @property
    def threshold(self) -> float:
        """A token is routed if and only if its score is at least this."""
        ...

    def generate(self, prompt_ids: Ids, params: SamplingParams, *, sample: int = 0) -> AsyncIterator[RoutedToken]:
        """One completion, token by token. `params.n` is the caller's loop over `sample`.

        Closing the iterator cancels the request and frees its place in both models. The token that completes a stop
        string is given, with finish_reason "stop".

        Raises:
            ValueError: one sentence, for a prompt or parameters that the pair cannot serve.
            LLMUnavailable: the LLM cannot be reached, if the backend was made with `on_llm_outage="error"`.
        """
        ...

    async def set_threshold(self, value: float) -> None:
        """Use another threshold from the next decision on."""
        ...

    async def llm_healthy(self) -> bool:
        """Whether the LLM answers now."""
        ...

    async def close(self) -> None:
        """Stop serving: open iterators end with an error, and both models are freed."""
        ...
