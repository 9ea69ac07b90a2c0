"""Credit by a larger model: on-policy distillation (after arXiv 2306.13649 and 2306.08543).

    c_t = log π_T(y_t|x, y_<t) − log π(y_t|x, y_<t)

on tokens that the policy itself wrote. The mean of −c_t is the reverse KL divergence KL(π ‖ π_T) of each next token, so
policy gradient with the advantage c_t, each token's own and none of later ones', moves the policy towards the teacher
where the policy goes. Those papers take the gradient of a divergence over the whole vocabulary; this is its estimate
from the one token that was drawn, which costs one forward of the teacher and one of the policy and no logits.

The teacher is read at temperature 1, the policy at the temperature that it is sampled at: what is sampled learns to be
the teacher. The teacher must have the policy's tokenizer. To learn from it alone, leave the rewards constant.
"""

from __future__ import annotations

from typing import Any

import torch

from tokalign.signals.likelihood import LikelihoodScorer
from tokalign.trainers.credits.reading import (
    Batch,
    base_and_adapter,
    frozen,
    loss_mask,
    named_path,
    policy_logps,
    read,
)


class TeacherCredit:
    """Advantage log π_T − log π of each token.

    Args:
        model: the teacher, a model or an adapter; unset is the configuration's `credit_model`.

    Raises:
        ValueError: no teacher is named, or one with another tokenizer.
    """

    __name__ = "teacher"
    mode = "advantage"

    def __init__(self, model: str | None = None):
        self.model = model
        self.reads = ["credit_model"] if model is None else []

    def attach(self, trainer: Any) -> None:
        """Loads the teacher."""
        path = named_path(trainer, self.model, "credit_model", "teacher reads a model to learn from")
        base, adapter = base_and_adapter(path, "credit_model")
        self.scorer = frozen(trainer, LikelihoodScorer, "credit_model", base, adapter=adapter)

    def tokens(self, trainer: Any, batch: Batch) -> torch.Tensor:
        """(B, T) advantages."""
        teacher = read(batch, lambda *ids: self.scorer.score(*ids)["logprob"])
        return (teacher - policy_logps(trainer, batch)) * loss_mask(batch)
