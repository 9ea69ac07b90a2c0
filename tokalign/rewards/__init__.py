"""Verifiable rewards: final answers of maths problems, and structured output."""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names

if TYPE_CHECKING:
    from tokalign.rewards.answers.extraction import extract_answer
    from tokalign.rewards.answers.matching import answers_match
    from tokalign.rewards.answers.reward import answer_reward
    from tokalign.rewards.structured.reward import StructuredReward

__all__ = ["StructuredReward", "answer_reward", "answers_match", "extract_answer"]
_HOMES = {
    "answers.extraction": ("extract_answer",),
    "answers.matching": ("answers_match",),
    "answers.reward": ("answer_reward",),
    "structured.reward": ("StructuredReward",),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
