"""The threshold at which routed decoding *serves* a given LLM rate, found by decoding.

A threshold that routes 12 % of the tokens of the LLM's own answers need not route 12 % of what a pair writes: the SLM
leads it to other prefixes, and each token that the LLM takes over changes what is hard afterwards. No label is needed:
the pair decodes some prompts, the threshold moves to the quantile of the scores that it met, and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, NeverLLM


@dataclass(frozen=True)
class ServedThreshold:
    """A threshold and the LLM rate that decoding had with it, on `tokens` tokens of `prompts` prompts."""

    threshold: float
    llm_rate: float
    tokens: int
    prompts: int


def served_threshold(
    generator: RoutedGenerator,
    prompts: Sequence[Ids],
    params: SamplingParams,
    target_rate: float,
    *,
    rounds: int = 6,
    tolerance: float = 0.005,
) -> ServedThreshold:
    """The threshold whose served LLM rate is nearest to the target among at most `rounds` decodings.

    The policy of `generator` is left with its own threshold.

    Args:
        generator: a pair whose policy scores tokens (a router, or entropy).
        prompts: token ids; held out from training, and not those of the final test.
        params: how the pair will be served.
        target_rate: share of the tokens that the LLM shall write, in (0, 1).
        tolerance: a rate this near to the target ends the search.

    Raises:
        ValueError: a target outside (0, 1), or a policy without a threshold.
    """
    if not 0 < target_rate < 1:
        raise ValueError(f"target_rate is {target_rate}: use a share between 0 and 1.")
    policy = generator.policy
    if isinstance(policy, (AlwaysLLM, NeverLLM)):
        raise ValueError(f"{type(policy).__name__} has no threshold to set: give the pair a router, or entropy.")
    before, best = policy.threshold, None
    try:
        for _ in range(rounds):
            done = [completion for each in generator.generate(prompts, params) for completion in each]
            scores = np.array([s for completion in done for s in completion.scores if s is not None])
            tokens = sum(len(completion.token_ids) for completion in done)
            rate = sum(completion.stats.llm_tokens for completion in done) / tokens
            served = ServedThreshold(policy.threshold, rate, tokens, len(prompts))
            if best is None or abs(rate - target_rate) < abs(best.llm_rate - target_rate):
                best = served
            if abs(rate - target_rate) <= tolerance:
                break
            # A hand-off is good for a span of LLM tokens, so fewer of them make the rate where a policy has long ones.
            handoffs = sum(completion.stats.handoffs for completion in done)
            span = sum(completion.stats.llm_tokens for completion in done) / handoffs if handoffs else 1.0
            share = target_rate if span == 1 else target_rate / (span * (1 - target_rate) + target_rate)
            policy.threshold = between(scores, share)
    finally:
        policy.threshold = before
    assert best is not None
    return best


def between(scores: np.ndarray, share: float) -> float:
    """A threshold that this share of the scores (N,) reaches: the middle of two of them, since the rounding of another
    run may put a token whose score is the threshold on either side of it."""
    ordered = np.sort(scores)
    first = min(max(len(ordered) - round(share * len(ordered)), 0), len(ordered) - 1)  # that is routed
    return float((ordered[max(first - 1, 0)] + ordered[first]) / 2)
