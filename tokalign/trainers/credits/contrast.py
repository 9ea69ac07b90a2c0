"""Credit by contrastive estimation (critical-token DPO, arXiv 2411.19943v3, section 3.2), carried over to GRPO.

    log s_t = (1 + β) log P_p(y_t|·) − β log P_n(y_t|·) − log Z_t     (tokalign/signals/contrast.py)
    w_t = 1 − s_t where the completion's advantage is negative, 1 elsewhere.

P_p and P_n are adapters of one base, tuned on right and on wrong completions. A low s_t marks a token that the one
would hardly write and the other would: where a wrong completion went wrong. As in the paper, the weight is put on wrong
completions alone, which here are those with a negative advantage; of a right one every token keeps its advantage.

It costs two forwards of the base. The paper has the weight in a DPO loss; its use on GRPO's advantages is ours.
"""

from __future__ import annotations

from typing import Any

import torch

from tokalign.signals.contrast import ContrastiveScorer
from tokalign.trainers.credits.reading import Batch, base_and_adapter, frozen, named_path, read


class ContrastCredit:
    """Weight 1 − s_t on completions with a negative advantage.

    Args:
        positive, negative: adapters of one base; unset are the configuration's `credit_model` and `credit_negative`.
        beta: β of the estimate.

    Raises:
        ValueError: one of the two is not named or no adapter, or they are not of one base.
    """

    __name__ = "contrast"
    mode = "weight"

    def __init__(self, positive: str | None = None, negative: str | None = None, beta: float = 1.0):
        self.positive, self.negative, self.beta = positive, negative, beta
        named = {"credit_model": positive, "credit_negative": negative}
        self.reads = [option for option, path in named.items() if path is None]

    def attach(self, trainer: Any) -> None:
        """Loads the base with both adapters on it."""
        positive = named_path(trainer, self.positive, "credit_model", "contrast compares two adapters")
        negative = named_path(trainer, self.negative, "credit_negative", "contrast compares two adapters")
        base, adapter = base_and_adapter(positive, "credit_model")
        base_and_adapter(negative, "credit_negative")
        if adapter is None:
            raise ValueError(f"contrast compares two adapters of one base, but credit_model {positive} is a model.")
        options: dict[str, Any] = {"positive": positive, "negative": negative, "beta": self.beta}
        self.scorer = frozen(trainer, ContrastiveScorer, "credit_model", base, **options)

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) weights."""
        return critical_weights(read(batch, self.scorer.score), batch["advantages"])


def critical_weights(scores: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """w_t of contrastive scores (B, T), for completions with these advantages (B,)."""
    return torch.where(advantages[:, None] < 0, 1.0 - scores, 1.0)
