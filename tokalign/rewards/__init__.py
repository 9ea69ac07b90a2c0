"""Verifiable rewards: final answers of maths problems."""

from tokalign.rewards.math_answers import answers_match, extract_answer

__all__ = ["answers_match", "extract_answer"]
