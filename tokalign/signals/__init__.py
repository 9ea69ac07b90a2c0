"""Token signals: one number a completion token, bound to token ids."""

from tokalign.signals.contrast import ContrastiveScorer, contrastive_score

__all__ = ["ContrastiveScorer", "contrastive_score"]
