"""Keeps the served LLM rate at its target while traffic drifts away from the calibration data.

A threshold is calibrated on held-out responses; real prompts may be harder, and the share of tokens that the LLM
writes then leaves the budget. The controller watches that share, r, an exponential average over tokens, and moves the
threshold's logit z in proportion to how far r is from the target ρ:

    r ← r + (1 − e^(−n/W)) · (m/n − r)                 m of the last n tokens were the LLM's, W = `window`
    z ← z + g · n/W · clip(logit r − logit ρ, ±2)      g = `gain`; unless |r − ρ| ≤ `deadband`
    threshold = sigmoid(z), with |z − z₀| ≤ `bound` around the calibrated z₀

Integral control in logit space: one step means the same share at a 2 % and at a 40 % target, and z itself is the
integral, so its bound is the anti-windup. With logit-shaped scores the loop's gain is at most g/W a token against a lag
of W tokens; g = 1/4 is critical damping.
"""

from __future__ import annotations

import math


class BudgetController:
    """See the module. Deterministic: the same observations give the same thresholds.

    Args:
        target_rate: ρ, share of tokens that the LLM should write, between 0 and 1.
        calibrated_threshold: where to start, a score between 0 and 1. (An entropy in nats has no logit.)
        window: W, tokens over which the rate is averaged.
        gain: g.
        deadband: the threshold rests while the rate is this close to the target.
        bound: furthest that the threshold's logit may move from the calibrated one.
        step: `observe` reports a move when the logit has moved by this much since the last one.

    Raises:
        ValueError: one sentence, for numbers outside their range.
    """

    def __init__(
        self,
        target_rate: float,
        calibrated_threshold: float,
        *,
        window: int = 2000,
        gain: float = 0.25,
        deadband: float = 0.003,
        bound: float = 4.0,
        step: float = 0.02,
    ):
        if not 0 < target_rate < 1:
            raise ValueError(f"target_rate is {target_rate}: use a share of the tokens between 0 and 1.")
        if not 0 < calibrated_threshold < 1:
            raise ValueError(
                f"The threshold is {calibrated_threshold}: a budget can only steer one between 0 and 1, so calibrate "
                "the router (`tokalign calibrate`) or leave target_rate out."
            )
        if window < 1 or min(gain, bound, step) <= 0 or deadband < 0:
            raise ValueError(
                f"window {window}, gain {gain}, bound {bound}, step {step}, deadband {deadband}: all but the deadband "
                "must be above 0."
            )
        self.target_rate = target_rate
        self.window, self.gain, self.deadband, self.bound, self.step = window, gain, deadband, bound, step
        self.rate = target_rate  # nothing seen yet is no reason to move
        self._start = self._logit = self._reported = _logit(calibrated_threshold)

    @property
    def threshold(self) -> float:
        """The score from which on a token should be routed now."""
        return 1 / (1 + math.exp(-self._reported))

    def observe(self, llm_tokens: int, tokens: int) -> bool:
        """Take in `tokens` more tokens, `llm_tokens` of them the LLM's; returns whether `threshold` has moved."""
        if not 0 <= llm_tokens <= tokens:
            raise ValueError(f"{llm_tokens} of {tokens} tokens: the LLM cannot have written more than there are.")
        if tokens == 0:
            return False
        self.rate += (1 - math.exp(-tokens / self.window)) * (llm_tokens / tokens - self.rate)
        if abs(self.rate - self.target_rate) > self.deadband:
            error = min(2.0, max(-2.0, _logit(self.rate) - _logit(self.target_rate)))
            moved = self._logit + self.gain * tokens / self.window * error
            self._logit = min(self._start + self.bound, max(self._start - self.bound, moved))
        if abs(self._logit - self._reported) < self.step:
            return False
        self._reported = self._logit
        return True


def _logit(share: float) -> float:
    share = min(1 - 1e-9, max(1e-9, share))  # an average may be 0 or 1
    return math.log(share / (1 - share))
