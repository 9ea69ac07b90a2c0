"""Verifiable rewards: final answers of maths problems, and structured output."""

from tokalign.rewards.answers.matching import answers_match, extract_answer
from tokalign.rewards.structured.reward import StructuredReward

__all__ = ["StructuredReward", "answers_match", "extract_answer"]
