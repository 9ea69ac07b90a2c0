"""Who writes the next token: policies that score it from what the SLM has computed.

A token is routed to the LLM if and only if its score is at least the policy's threshold. The score is known before
any token is drawn and does not depend on the draw, so both engines decide alike, greedy or sampling. `RouterPolicy`
is the method (R2R, arXiv 2505.21600); entropy and random are the baselines at equal LLM rate; always and never are
the two models alone; replay repeats given decisions, for measuring speed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from tokalign.generation.sampling import entropy, uniforms
from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig

logger = logging.getLogger(__name__)

_DECISIONS = 0x5DEECE66D  # keeps the random policy's numbers apart from those that draw the tokens of the same seed


class NextTokens(NamedTuple):
    """What is known of N next tokens before any of them is drawn.

    Attributes:
        hidden: (N, d), what the SLM's LM head got; None unless the policy's `needs_hidden`.
        logits: (N, V), the SLM's over the ids that both models share.
        seeds: (N,) int64, the requests' seeds.
        samples: (N,) int64, which of a request's `n` completions.
        steps: (N,) int64, completion tokens so far.
    """

    hidden: torch.Tensor | None
    logits: torch.Tensor
    seeds: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor


class RoutingPolicy(Protocol):
    """Decides for N rows at a time.

    Attributes:
        threshold: route if and only if score >= threshold. It may be changed while decoding.
        needs_slm: False if the SLM need not run at all: every token is the LLM's and has no score.
        needs_hidden: whether `scores` reads `hidden`.
    """

    threshold: float
    needs_slm: bool
    needs_hidden: bool

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        """Scores (N,) of N next tokens, float32 (float64 where a policy needs it)."""
        ...


class RouterPolicy:
    """Scores of a trained `TokenRouter`, in [0, 1].

    Args:
        threshold: None is the calibrated one that is stored with the router. Another one is logged.

    Raises:
        ValueError: neither a stored threshold nor one given.
    """

    needs_slm = True

    def __init__(self, router: TokenRouter, threshold: float | None = None):
        stored = router.config.threshold
        if threshold is None:
            threshold = router.threshold
        elif stored is not None and threshold != stored:
            logger.warning("Routing at threshold %g; the router was calibrated to %g.", threshold, stored)
        self.router = router.eval()
        self.threshold = check_threshold(threshold)
        self.needs_hidden = "hidden" in router.config.inputs

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return self.router.scores(tokens.hidden, tokens.logits)


class EntropyPolicy:
    """Entropy in nats of the SLM's next-token distribution over the shared ids. `threshold` is in nats too."""

    needs_slm = True
    needs_hidden = False

    def __init__(self, threshold: float):
        self.threshold = check_threshold(threshold)

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return entropy(tokens.logits.float())


class RandomPolicy:
    """Routes a share `rate` of the tokens at random; the request's seed fixes which."""

    needs_slm = True
    needs_hidden = False

    def __init__(self, rate: float):
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}: use a share of the tokens, from 0 to 1.")
        self.threshold = 1 - rate

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return uniforms(tokens.seeds ^ _DECISIONS, tokens.samples, tokens.steps)


@dataclass(frozen=True)
class AlwaysLLM:
    """Every token is the LLM's; the SLM does not run."""

    threshold: float = 0.0
    needs_slm: bool = False
    needs_hidden: bool = False

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return torch.ones_like(tokens.steps, dtype=torch.float32)


@dataclass(frozen=True)
class NeverLLM:
    """Every token is the SLM's; the LLM does not run."""

    threshold: float = 2.0
    needs_slm: bool = True
    needs_hidden: bool = False

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return torch.zeros_like(tokens.steps, dtype=torch.float32)


class ReplayPolicy:
    """Routes exactly at given steps, so that runs of different speed do the same work.

    Args:
        steps_per_row: for each schedule the steps (0 is a completion's first token) that are routed. A request
            follows schedule `seed % len(steps_per_row)`: give the requests the seeds 0, 1, 2 …
    """

    needs_slm = True
    needs_hidden = False

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


def prompts_of_labels(router: str) -> dict[str, Any] | None:
    """How the prompts of the labels were rendered that a router, by hub id or folder, was trained on; None: unknown."""
    return TokenRouterConfig.from_pretrained(router).prompts


def named_policy(
    name: str, *, router: str | None = None, threshold: float | None = None, rate: float | None = None
) -> RoutingPolicy | None:
    """The policy `entropy`, `random`, `always` or `never` of a command's options; None for `router`, which is loaded.

    Raises:
        ValueError: an option that the policy lacks, or one that does not belong to it.
    """
    given = {"router": router, "threshold": threshold, "rate": rate}
    needs = {"router": {"router"}, "entropy": {"threshold"}, "random": {"rate"}, "always": set(), "never": set()}[name]
    takes = needs | ({"threshold"} if name == "router" else set())
    for option, value in given.items():
        if value is not None and option not in takes:
            raise ValueError(f"--{option} does not belong to --policy {name}: leave one of them out.")
        if value is None and option in needs:
            raise ValueError(f"--policy {name} needs --{option}: give it, or choose another policy.")
    if name == "entropy" and threshold is not None:
        return EntropyPolicy(threshold)
    if name == "random" and rate is not None:
        return RandomPolicy(rate)
    alone: dict[str, Any] = {"always": AlwaysLLM(), "never": NeverLLM()}  # frozen: nobody moves their thresholds
    return alone.get(name)
