"""Token signals: one number a completion token, bound to token ids. `registry` is their table, each has a file."""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names

if TYPE_CHECKING:
    from tokalign.signals.claim import ClaimScorer
    from tokalign.signals.contrast import ContrastiveScorer, contrastive_score
    from tokalign.signals.likelihood import LikelihoodScorer
    from tokalign.signals.prompting import PromptingScorer, token_reward
    from tokalign.signals.registry import Signal, register
    from tokalign.signals.rollout import critical_position, pass_at_k_ablation, rollout_accuracy

__all__ = [
    "ClaimScorer",
    "ContrastiveScorer",
    "LikelihoodScorer",
    "PromptingScorer",
    "Signal",
    "contrastive_score",
    "critical_position",
    "pass_at_k_ablation",
    "register",
    "rollout_accuracy",
    "token_reward",
]
_HOMES = {
    "claim": ("ClaimScorer",),
    "contrast": ("ContrastiveScorer", "contrastive_score"),
    "likelihood": ("LikelihoodScorer",),
    "registry": ("Signal", "register"),
    "rollout": ("critical_position", "pass_at_k_ablation", "rollout_accuracy"),
    "prompting": ("PromptingScorer", "token_reward"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
