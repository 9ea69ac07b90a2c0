"""Token signals: one number a completion token, bound to token ids."""

from tokalign.signals.contrast import ContrastiveScorer, contrastive_score
from tokalign.signals.likelihood import LikelihoodScorer
from tokalign.signals.rollout import critical_position, pass_at_k_ablation, rollout_accuracy
from tokalign.signals.token_reward import PromptingScorer, token_reward

__all__ = [
    "ContrastiveScorer",
    "LikelihoodScorer",
    "PromptingScorer",
    "contrastive_score",
    "critical_position",
    "pass_at_k_ablation",
    "rollout_accuracy",
    "token_reward",
]
