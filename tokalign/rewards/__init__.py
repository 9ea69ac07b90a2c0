"""Verifiable rewards: final answers of maths problems, and structured output."""

from tokalign.rewards.math_answers import answers_match, extract_answer
from tokalign.rewards.structured import StructuredReward

__all__ = ["StructuredReward", "answers_match", "extract_answer"]
