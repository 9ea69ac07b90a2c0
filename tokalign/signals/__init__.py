"""Token signals: one number a completion token, bound to token ids."""

from tokalign.signals.contrast import ContrastiveScorer, contrastive_score
from tokalign.signals.likelihood import LikelihoodScorer
from tokalign.signals.prompting import PromptingScorer, token_reward
from tokalign.signals.rollout import critical_position, pass_at_k_ablation, rollout_accuracy

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
