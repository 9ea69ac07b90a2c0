"""The label of every token of an answer, from the verdicts on its differences: what the last stage does to one shard.

By **outcome**, where answers can be checked: the LLM's own branch is right; is the branch behind the SLM's token? Or by
a **judge**, a model that reads both branches (`tokalign.routing.labels.judge`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.labels.branches import BranchLookup
from tokalign.routing.labels.classes import IDENTICAL, INVALID
from tokalign.routing.labels.divergence import Row, differences, llm_choices
from tokalign.routing.labels.judge import Comparison, branch_text, question_text
from tokalign.routing.labels.report import invalid_count
from tokalign.routing.labels.verdicts import CUT_OFF, LLM_WRONG, NO_ANSWER, NOT_CONTINUED, Verdict, outcome_verdict
from tokalign.stage.jobs import Dropped, Item, Kept


@dataclass
class Labeller:
    """Rows of the prefill stage in; rows of the labels stage out, with the tokens that are INVALID counted by reason.

    Attributes:
        lookup: the branches.
        judge: verdicts of comparisons; None is the verdict by outcome.
        context: tokens of the answer before a difference that a judge reads.
    """

    lookup: BranchLookup
    tokenizer: PreTrainedTokenizerBase
    judge: Callable[[list[Comparison]], list[Verdict]] | None
    context: int

    def __call__(self, batch: list[Row]) -> list[Item]:
        # The judge gets the differences of the whole shard in one call; its verdicts come back in their order
        grown = [self.lookup.of(row) for row in batch]
        pairs = [(row, branch) for row, branches in zip(batch, grown, strict=True) for branch in branches]
        if self.judge is None:
            verdicts = iter([self.outcome(row, branch) for row, branch in pairs])
        else:  # no judge is started for a shard without differences
            verdicts = iter(self.judge([self.comparison(row, branch) for row, branch in pairs]) if pairs else [])
        items: list[Item] = []
        for row, branches in zip(batch, grown, strict=True):
            by_position = {branch["position"]: next(verdicts) for branch in branches}
            no_answer = self.judge is None and not row["answer"]
            items.append(Dropped(NO_ANSWER) if no_answer else self.labelled(row, by_position))
        return items

    def outcome(self, row: Row, branch: Row) -> Verdict:
        """The verdict on one difference by whether the answers behind both tokens are right."""

        def right(ids: list[int]) -> bool:
            whole = [*row["completion_ids"][: branch["position"]], *ids]
            return answers_match(extract_answer(branch_text(whole, self.tokenizer)), row["answer"])

        llm = right(branch["llm_branch_ids"]) if "llm_branch_ids" in branch else bool(row["correct"])
        slm = llm and right(branch["slm_branch_ids"])
        if llm and not slm and branch["finish_reason"] == "length":
            return Verdict(INVALID, CUT_OFF)  # where it would have led is not known
        return outcome_verdict(llm, slm)

    def comparison(self, row: Row, branch: Row) -> Comparison:
        """What a judge reads of one difference."""
        t = branch["position"]
        ids = (row["completion_ids"][max(0, t - self.context) : t], branch["llm_branch_ids"], branch["slm_branch_ids"])
        return Comparison(question_text(row["prompt"]), *(branch_text(part, self.tokenizer) for part in ids))

    def labelled(self, row: Row, told: dict[int, Verdict]) -> Kept:
        """A row of the labels stage, from the verdicts on its differences by position."""
        # A difference without a branch: either the answer was wrong and had none, or the limit left this one out
        wrong = self.judge is None and "llm_ids" not in row and not row["correct"]
        untold = Verdict(INVALID, LLM_WRONG if wrong else NOT_CONTINUED)
        label = [IDENTICAL] * len(row["completion_ids"])
        counts: Counter[str] = Counter()
        for t in differences(row["slm_ids"], llm_choices(row)):
            verdict = told.get(t, untold)
            label[t] = verdict.label
            if verdict.reason is not None:
                counts[invalid_count(verdict.reason)] += 1
        optional = [name for name in ("sample", "correct", "llm_ids", "written_by") if name in row]
        columns = ["id", "prompt_ids", "completion_ids", "slm_ids", *optional, "features_file", "features_first"]
        return Kept([{**{name: row[name] for name in columns}, "label": label}], counts)
