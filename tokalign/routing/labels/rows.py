"""Routing labels, row by row: what each stage of scripts/label_routing.py does to one shard (R2R, arXiv 2505.21600).

Functions and small classes from a list of rows to a list of items for `tokalign.stage.jobs.run_job`. None depends on
which rows share a shard. The models' work is in `tokalign.routing.labels.divergence`, the verdicts in
`tokalign.routing.labels.verdicts`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.labels.classes import IDENTICAL, INVALID
from tokalign.routing.labels.divergence import (
    DivergenceScorer,
    Fork,
    Prefill,
    SentenceRule,
    differences,
    own_branch,
    spans,
)
from tokalign.routing.labels.features import write_features
from tokalign.routing.labels.report import invalid_count
from tokalign.routing.labels.verdicts import (
    CUT_OFF,
    LLM_WRONG,
    Comparison,
    Verdict,
    branch_text,
    outcome_verdict,
    question_text,
)
from tokalign.stage.jobs import Dropped, Item, Kept, Row
from tokalign.stage.seeds import derived_seed

SPLITS = ("train", "calibration", "test")
UNFINISHED = "the answer did not end within max_tokens"
EMPTY = "the answer is empty"
NO_ANSWER = "no `answer` to verify with"
NOT_CONTINUED = "left out by max_branches_per_answer"


def row_name(row: Row) -> str:
    """Name of a completion: its problem's id, and which of that problem's it is."""
    return f"{row['id']}/{row.get('sample', 0)}"


def llm_choices(row: Row) -> list[int]:
    """The LLM's greedy choices along a completion: the completion itself where the LLM wrote it."""
    return row["llm_ids"] if "llm_ids" in row else row["completion_ids"]


def split_indices(ids: Sequence[Any], calibration_share: float, test_share: float) -> dict[str, list[int]]:
    """Rows of each split, by a hash of the problem's id: all completions of a problem are in one split."""
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i, name in enumerate(ids):
        digest = hashlib.blake2b(f"routing split\0{name}".encode(), digest_size=8).digest()
        u = int.from_bytes(digest, "big") / 2**64
        held_out = "calibration" if u < calibration_share + test_share else "train"
        parts["test" if u < test_share else held_out].append(i)
    return parts


# --------------------------------------------------------------------------------------------- answers and prefill


def finished_answer(item: list[Row] | Dropped) -> Row | Dropped:
    """The one greedy rollout of a problem, if labels can be made of it."""
    if isinstance(item, Dropped):
        return item
    (rollout,) = item
    if not rollout["completion"].strip():
        return Dropped(EMPTY)
    if rollout["finish_reason"] != "stop":
        return Dropped(UNFINISHED)
    return {key: value for key, value in rollout.items() if key != "logprobs"}


def add_llm_choices(scorer: DivergenceScorer, batch: list[Row]) -> list[Item]:
    """Completions that someone else wrote, with the LLM's greedy choice at every position as `llm_ids`."""
    items, kept = _kept(scorer, batch)
    for row, read in zip(kept, _prefill(scorer, kept), strict=True):
        row["llm_ids"] = read.predicted.tolist()
    return items


def add_slm_choices(scorer: DivergenceScorer, batch: list[Row], folder: Path) -> list[Item]:
    """The rows with `slm_ids` and `slm_logprobs` (of the completion's tokens, nats), and where their features are.

    Features are written first, then (by the job) the rows that point at them: no row is without its features, and a
    shard that is done again replaces its file.
    """
    items, kept = _kept(scorer, batch)
    if not kept:
        return items
    results = _prefill(scorer, kept)
    features = [result.features for result in results if result.features is not None]
    arrays = {key: np.concatenate([one[key] for one in features]) for key in features[0]}
    name = write_features(folder, [row_name(row) for row in kept], arrays)
    first = 0
    for row, result in zip(kept, results, strict=True):
        row["slm_ids"] = result.predicted.tolist()
        row["slm_logprobs"] = result.logprobs.tolist()
        row["features_file"], row["features_first"] = name, first
        first += len(result.predicted)
    return items


def _kept(scorer: DivergenceScorer, batch: list[Row]) -> tuple[list[Item], list[Row]]:
    """Items of a shard (rows, or why they are dropped), and the rows among them."""
    items: list[Item] = []
    for row in batch:
        problem = scorer.problem(row["prompt_ids"], row["completion_ids"])
        items.append(row if problem is None else Dropped(problem))
    return items, [item for item in items if isinstance(item, dict)]


def _prefill(scorer: DivergenceScorer, rows: list[Row]) -> list[Prefill]:
    prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    return scorer.prefill(prompts, completions, names=[row_name(row) for row in rows])


# -------------------------------------------------------------------------------------------------------- branches


@dataclass
class BranchGrower:
    """Rows of the prefill stage in; for each the branches of its differences, one row each.

    Attributes:
        grow: `continue_forks` of the LLM's engine.
        outcome: whether the verdict will be by outcome; then rows without an `answer`, and those whose LLM answer is
            wrong, have no branches, since nothing could be told from them.
        rule: where branches end; None is at the end of the answer.
        max_tokens: most tokens behind a branch's first.
        most: differences continued a row, chosen at random by `seed`; None is all.
    """

    grow: Callable[[list[Fork]], list[tuple[list[int], str]]]
    outcome: bool
    rule: SentenceRule | None
    max_tokens: int
    most: int | None
    seed: int

    def __call__(self, batch: list[Row]) -> list[Item]:
        items: list[Item] = []
        ways: list[tuple[Row, Fork, Fork]] = []  # the branch's row, and what the SLM and the LLM go on with
        on_policy = "llm_ids" in batch[0]
        for row in batch:
            if self.outcome and not row["answer"]:
                items.append(Dropped(NO_ANSWER))
                continue
            if self.outcome and not on_policy and not row["correct"]:
                items.append(Dropped(LLM_WRONG))
                continue
            begun = None if self.rule is None else self.rule.open_before(row["completion_ids"])
            made = []
            for t in self.chosen(row):
                slm, llm = (
                    Fork(row["prompt_ids"], row["completion_ids"], t, token, begun is not None and begun[t])
                    for token in (row["slm_ids"][t], llm_choices(row)[t])
                )
                made.append({"id": row["id"], "sample": row.get("sample", 0), "position": t})
                ways.append((made[-1], slm, llm))
            items.append(made)
        # The LLM's own answer is its branch; a routed completion goes on as someone else wrote it
        forks = [fork for _, *both in ways for fork in (both if on_policy else both[:1])]
        grown = iter(self.grow(forks) if forks else [])  # no engine is loaded for a shard without differences
        for branch, _, llm in ways:
            branch["slm_branch_ids"], branch["finish_reason"] = next(grown)
            if on_policy:
                branch["llm_branch_ids"], _ = next(grown)
            elif self.rule is not None:
                branch["llm_branch_ids"] = own_branch(llm, self.rule, self.max_tokens)
        return items

    def chosen(self, row: Row) -> list[int]:
        """The differences of a row that are continued, the same in every process."""
        positions = differences(row["slm_ids"], llm_choices(row))
        if self.most is None or len(positions) <= self.most:
            return positions
        return sorted(random.Random(derived_seed(self.seed, row_name(row))).sample(positions, self.most))


# ---------------------------------------------------------------------------------------------------------- labels


class BranchLookup:
    """Branches by completion, read from the disk when they are asked for; `branches` None holds none."""

    def __init__(self, branches: Dataset | None):
        self.branches = branches
        self._where = {} if branches is None else spans(_branch_keys(branches))

    def of(self, row: Row) -> list[Row]:
        at = self._where.get((row["id"], row.get("sample", 0)))
        return self.branches.select(at).to_list() if self.branches is not None and at is not None else []


def _branch_keys(branches: Dataset) -> Iterator[tuple[Any, int]]:
    for batch in branches.select_columns(["id", "sample"]).iter(batch_size=1000):
        yield from zip(batch["id"], batch["sample"], strict=True)


@dataclass
class Labeller:
    """Rows of the prefill stage in; rows of the labels stage out, invalid tokens counted by reason.

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
        def right(ids: list[int]) -> bool:
            whole = [*row["completion_ids"][: branch["position"]], *ids]
            return answers_match(extract_answer(branch_text(whole, self.tokenizer)), row["answer"])

        llm = right(branch["llm_branch_ids"]) if "llm_branch_ids" in branch else bool(row["correct"])
        slm = llm and right(branch["slm_branch_ids"])
        if llm and not slm and branch["finish_reason"] == "length":
            return Verdict(INVALID, CUT_OFF)  # where it would have led is not known
        return outcome_verdict(llm, slm)

    def comparison(self, row: Row, branch: Row) -> Comparison:
        t = branch["position"]
        ids = (row["completion_ids"][max(0, t - self.context) : t], branch["llm_branch_ids"], branch["slm_branch_ids"])
        return Comparison(question_text(row["prompt"]), *(branch_text(part, self.tokenizer) for part in ids))

    def labelled(self, row: Row, told: dict[int, Verdict]) -> Kept:
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
