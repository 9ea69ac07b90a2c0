"""The verifier of final answers as a reward function: 1 for a right answer, 0 for another (`answer_reward`)."""

from __future__ import annotations

from typing import Any

from tokalign.rewards.answers.extraction import extract_answer
from tokalign.rewards.answers.matching import answers_match
from tokalign.rewards.structured.documents.reading import text_of


def answer_reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """Whether completions state the right final answer, with the signature of TRL's reward functions.

    Args:
        completions: text, or messages of which the last one is the answer.
        answer: the right answers, each a text or a list of accepted ones; None where it is not known.

    Returns:
        1.0 or 0.0 for each completion; None where its right answer is not known.
    """
    return [
        None if right is None else float(answers_match(extract_answer(text_of(completion)), right))
        for completion, right in zip(completions, answer, strict=True)
    ]
