"""Where each of two tokens leads: from every difference the LLM goes on greedily behind the SLM's token (R2R, arXiv
2505.21600, section 3.2).

A *branch* ends where the answer ends (for a verdict by outcome), or when it has finished the sentence and one more (for
a judge). The other branch is the LLM's own answer from there on, cut by the same rule.

Deviation: the released system decodes branches and encodes them again; here they are ids from end to end. A sentence
ends by a rule on token ids (`SentenceRule`), not by a fixed list of words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets import Dataset

from tokalign.generation.completions import EncodedIds, Prefix
from tokalign.generation.protocol import Engine, Ids, SamplingParams, continue_from_prefixes
from tokalign.routing.labels.divergence import Row, differences, llm_choices, row_name
from tokalign.routing.labels.sentences import SentenceRule
from tokalign.routing.labels.verdicts import LLM_WRONG, NO_ANSWER
from tokalign.stage.jobs import Dropped, Item
from tokalign.stage.seeds import derived_seed

# From this many prefix tokens of one answer on, its branches are worth a call of their own that shares one prefill.
SHARED_PREFILL = 16_384


@dataclass(frozen=True)
class Fork:
    """A token that might have been chosen at position `position` of a completion.

    Attributes:
        begun: whether a sentence is open there (`SentenceRule.open_before`).
    """

    prompt_ids: Ids
    completion_ids: Ids
    position: int
    token: int
    begun: bool = False


def own_branch(fork: Fork, rule: SentenceRule, max_tokens: int) -> list[int]:
    """The branch that the completion itself goes on with from the fork's position, cut by the rule of the others."""
    ids = list(fork.completion_ids[fork.position : fork.position + 1 + max_tokens])
    return ids[: rule.cut(ids, fork.begun)]


def continue_forks(
    engine: Engine,
    forks: Sequence[Fork],
    ends: Collection[int],
    *,
    max_tokens: int,
    stop: tuple[str, ...] = (),
    rule: SentenceRule | None = None,
    positions: int | None = None,
    shared_prefill: int = SHARED_PREFILL,
) -> list[tuple[list[int], str]]:
    """Greedy branches: for each fork its token and what the engine writes behind it.

    All forks go to the engine in one call a round, so that a prefix cache (vLLM, a server) serves those of one answer.
    An engine that can share one KV cache among the prefixes of an answer (transformers) is asked once an answer
    instead where the prefixes of that answer have `shared_prefill` tokens or more; ids are the same.

    Args:
        ends: ids that end a completion; a fork whose token is one of them is a finished branch.
        max_tokens: most tokens behind the fork's own.
        stop: strings that end an answer, as they did when the answers were made (used without a rule only).
        rule: go on until it cuts; None is to the end of the answer.
        positions: most tokens that the model holds, for an engine that does not know (a server).

    Returns:
        For each fork the branch's ids and why it ended: "stop" (end of the answer, or of the sentences) or "length"
        (`max_tokens`, or the model's positions).
    """
    positions = getattr(engine, "max_length", None) or positions
    branches = [[fork.token] for fork in forks]
    reasons: list[str | None] = [None] * len(forks)

    def settle(i: int) -> None:
        """Note why branch i has ended, if it has; what comes behind the sentences wanted is cut off."""
        fork, branch = forks[i], branches[i]
        cut = None if rule is None else rule.cut(branch, fork.begun)
        used = len(fork.prompt_ids) + fork.position + len(branch)
        if branch[-1] in ends or cut is not None:
            branches[i], reasons[i] = branch[:cut], "stop"
        elif len(branch) > max_tokens or (positions is not None and used >= positions):
            reasons[i] = "length"

    def extend(i: int, token_ids: list[int], finish_reason: str, stops: bool) -> None:
        branches[i] += token_ids
        settle(i)
        # A mark that ends no sentence ("…", or "3." before "14") stopped the engine too early: another round. Anything
        # else that stopped it ends the branch.
        if reasons[i] is None and not (rule is not None and stops and token_ids[-1] in rule.marks):
            reasons[i] = finish_reason

    def params(i: int, **stops: Any) -> SamplingParams:
        fork, branch = forks[i], branches[i]
        left = max_tokens + 1 - len(branch)
        if positions is not None:  # servers refuse what might not fit
            left = min(left, positions - len(fork.prompt_ids) - fork.position - len(branch))
        return SamplingParams(temperature=0, max_tokens=left, stop=() if rule else stop, **stops)

    # A token that ends the answer, or the second sentence, is a whole branch
    for i in range(len(forks)):
        settle(i)
    # A long answer's forks share nearly all of their prefix: one KV cache serves them, and the prefix is read once
    if hasattr(engine, "continue_from_prefixes"):
        for group in _answers(forks, [i for i, reason in enumerate(reasons) if reason is None], shared_prefill):
            first = forks[group[0]]
            continued = continue_from_prefixes(
                engine,
                first.prompt_ids,
                first.completion_ids,
                [forks[i].position + 1 for i in group],
                [params(i) for i in group],
                last_tokens=[forks[i].token for i in group],
            )
            # No stop ids: one round with the shared cache is cheaper than a second prefill of long prefixes
            for i, (completion,) in zip(group, continued, strict=True):
                extend(i, completion.token_ids, completion.finish_reason, stops=False)
    # All other branches together, a sentence a round: the engine can stop at a mark, but only the rule knows which mark
    # ends a sentence. Without a rule there is one round.
    # The prefixes of an answer share its ids: as lists of their own they would need the square of its length.
    stop_ids = tuple(sorted(rule.marks)) if rule is not None else ()
    answers: dict[tuple[int, int], EncodedIds] = {}

    def prefix(i: int) -> Prefix:
        fork = forks[i]
        key = id(fork.prompt_ids), id(fork.completion_ids)
        if key not in answers:
            answers[key] = EncodedIds([*fork.prompt_ids, *fork.completion_ids])
        return Prefix(answers[key], len(fork.prompt_ids) + fork.position, branches[i])

    while pending := [i for i, reason in enumerate(reasons) if reason is None]:
        prefixes = [prefix(i) for i in pending]
        each = [params(i, stop_token_ids=stop_ids) for i in pending]
        for i, (completion,) in zip(pending, engine.generate(prefixes, each), strict=True):
            extend(i, completion.token_ids, completion.finish_reason, stops=True)
    return [(branch, str(reason)) for branch, reason in zip(branches, reasons, strict=True)]


def _answers(forks: Sequence[Fork], open_: Sequence[int], least: int) -> Iterator[list[int]]:
    """Groups of forks of one answer whose prefixes have `least` tokens or more."""
    for _, group in groupby(open_, key=lambda i: id(forks[i].completion_ids)):
        members = list(group)
        if sum(len(forks[i].prompt_ids) + forks[i].position + 1 for i in members) >= least:
            yield members


# ------------------------------------------------------------------------------------------- rows of a shard, in a job


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
        # First the forks of all rows, so that the engine gets the whole shard in one call
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


def spans(keys: Iterable[Any]) -> dict[Any, range]:
    """Where the rows of each key are in a stage that holds them one after the other."""
    rows_of: dict[Any, range] = {}
    start = 0
    for key, group in groupby(keys):
        length = sum(1 for _ in group)
        rows_of[key] = range(start, start + length)
        start += length
    return rows_of
