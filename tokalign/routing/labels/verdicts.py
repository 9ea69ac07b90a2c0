"""The verdict on a difference: its class, and why it is INVALID if it is (R2R, arXiv 2505.21600, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

from tokalign.routing.labels.classes import DIVERGENT, INVALID, NEUTRAL

# Why nothing can be told about a difference, or about a whole answer; reports count by these words.
LLM_WRONG = "the LLM's own answer is wrong"
CUT_OFF = "the branch did not end within branch_max_tokens"
NO_VERDICT = "the judge gave no verdict"
DISAGREE = "the judge's two orders disagree"
NO_ANSWER = "no `answer` to verify with"
NOT_CONTINUED = "left out by max_branches_per_answer"


class Verdict(NamedTuple):
    """The class of a difference, and why it is INVALID if it is."""

    label: int
    reason: str | None = None


def outcome_verdict(llm_right: bool, slm_right: bool) -> Verdict:
    """Divergent if the branch behind the LLM's token is right and the one behind the SLM's is wrong.

    Where the LLM is wrong itself, sending it the token cannot be justified by the outcome, whatever the SLM does.
    """
    if not llm_right:
        return Verdict(INVALID, LLM_WRONG)
    return Verdict(NEUTRAL if slm_right else DIVERGENT)
