"""Token signals: one number a completion token, bound to token ids."""

from tokalign.signals.contrast import ContrastiveScorer, contrastive_score
from tokalign.signals.rollout import critical_position, pass_at_k_ablation, rollout_accuracy

__all__ = [
    "ContrastiveScorer",
    "contrastive_score",
    "critical_position",
    "pass_at_k_ablation",
    "rollout_accuracy",
]
