"""How well a token signal finds the first wrong step of a solution, on text whose steps people have labelled.

A step's score is made of its tokens' (`step_scores`): the lowest, which says whether anything in the step is
suspicious, or the mean. The first wrong step is compared with right ones: those before it, and all steps of solutions
without a mistake. What comes after the first wrong step is neither.

The first wrong step is always the last of the steps that a solution offers, so whatever drifts along a text finds it
and knows nothing: within a solution, the step's number alone has AUROC 1. Hence these figures:

- position-matched AUROC, the one to go by: pairs of a wrong and a right step with the same number, which are steps of
  two solutions; and of those the pairs of nearly the same length, since a long step is wrong more often, has a lower
  lowest token, and its length needs no model;
- pooled AUROC: all pairs of a wrong and a right step; within-solution AUROC: pairs of one solution;
- hit@1: how often the lowest of a solution's steps up to the first wrong one is the wrong one, beside chance, which is
  one over their number; and the same among all steps of the solution.

Intervals resample questions (several solutions may answer one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokalign.statistics import share_interval, stratified_auroc, stratified_auroc_difference

Reduce = Literal["min", "mean"]
# Steps are of nearly the same length if their numbers of tokens lie in one interval [ALIKE^k, ALIKE^(k+1)).
ALIKE = 1.25


@dataclass(frozen=True)
class Steps:
    """The steps of a data set, all solutions one after the other; arrays (N,), N the number of steps.

    Attributes:
        solution: number of the solution that a step belongs to, rising.
        question: number of the question that the solution answers.
        index: which step of its solution it is, from 0.
        wrong: the first wrong step of its solution.
        right: right: before the first wrong one, or of a solution without a mistake.
    """

    solution: np.ndarray
    question: np.ndarray
    index: np.ndarray
    wrong: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[int], first_wrong: Sequence[int | None], question: Sequence[Any]) -> Steps:
        """Of solutions: how many steps each has, which one is first wrong (None or −1: none), what it answers.

        Raises:
            ValueError: a solution without steps, or a first wrong step that it does not have.
        """
        at = [-1 if place is None else place for place in first_wrong]
        for number, (count, place) in enumerate(zip(steps, at, strict=True)):
            if not (count > 0 and -1 <= place < count):
                raise ValueError(f"Solution {number} has {count} steps, of which {place} is said to be wrong first.")
        counts = np.asarray(steps, dtype=np.int64)
        solution = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(solution)) - np.repeat(np.cumsum(counts) - counts, counts)
        wrong_at = np.repeat(np.asarray(at, dtype=np.int64), counts)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(question))}
        asked = np.repeat(np.asarray([numbers[name] for name in question], dtype=np.int64), counts)
        return cls(solution, asked, index, index == wrong_at, (wrong_at < 0) | (index < wrong_at))


def step_scores(
    values: Sequence[Sequence[float] | np.ndarray],
    tokens: Sequence[Sequence[Sequence[int]]],
    reduce: Reduce = "min",
    keep: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """One score a step, from one a token.

    Args:
        values: of each solution (T,), low = suspicious (`Signal.suspicion`).
        tokens: of each solution, the indices of each step's tokens (`stage.pieces.spans_to_tokens`).
        reduce: "min" or "mean" of a step's tokens.
        keep: of each solution (T,) booleans, the tokens that count; all if absent.

    Returns:
        (N,) scores of all steps in order, NaN where none of a step's tokens counts.
    """
    scores = []
    for number, (own, steps) in enumerate(zip(values, tokens, strict=True)):
        array = np.asarray(own, dtype=np.float64)
        for step in steps:
            chosen = [t for t in step if keep is None or keep[number][t]]
            scores.append(getattr(array[chosen], reduce)() if chosen else np.nan)
    return np.asarray(scores)


def detection(
    scores: np.ndarray,
    steps: Steps,
    *,
    lengths: np.ndarray | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of one signal on one data set (module docstring).

    Args:
        scores: (N,) of the steps, low = suspicious; NaN where a step has none: it takes part in nothing.
        lengths: (N,) numbers of tokens, for the pairs of nearly the same length.

    Returns:
        `matched`, `length_matched`, `pooled`, `within`: `stratified_auroc` with the strata step number, step number and
        length, none, solution (None where there is no pair, or no length is given); `hit1` and `hit1_all`: `share`,
        `ci95`, `chance`, `solutions` (None where no wrong step has a score).
    """
    known = np.isfinite(scores)
    compared = known & (steps.wrong | steps.right)

    def area(strata: np.ndarray) -> dict[str, Any] | None:
        return stratified_auroc(
            scores[compared],
            steps.wrong[compared],
            strata[compared],
            steps.question[compared],
            samples=samples,
            seed=seed,
        )

    return {
        "matched": area(steps.index),
        "length_matched": None if lengths is None else area(length_strata(steps, lengths)),
        "pooled": area(np.zeros_like(steps.index)),
        "within": area(steps.solution),
        "hit1": _hits(scores, steps, compared, samples, seed),
        "hit1_all": _hits(scores, steps, known, samples, seed),
    }


def length_strata(steps: Steps, lengths: np.ndarray) -> np.ndarray:
    """A number (N,) for each step number and length, lengths that are nearly the same being one."""
    about = np.floor(np.log(np.maximum(lengths, 1)) / np.log(ALIKE)).astype(np.int64)
    return steps.index * (about.max() + 1) + about


def difference(
    a: np.ndarray, b: np.ndarray, steps: Steps, *, samples: int = 1000, seed: int = 0
) -> dict[str, Any] | None:
    """Position-matched AUROC of `a` minus that of `b` (N,), on the steps that both score: `difference`, `ci95`."""
    compared = np.isfinite(a) & np.isfinite(b) & (steps.wrong | steps.right)
    columns = (array[compared] for array in (a, b, steps.wrong, steps.index, steps.question))
    return stratified_auroc_difference(*columns, samples=samples, seed=seed)


def _hits(scores: np.ndarray, steps: Steps, among: np.ndarray, samples: int, seed: int) -> dict[str, Any] | None:
    """How often the lowest of the steps `among` (N,) is the wrong one; where several are, each counts as a part."""
    if not (among & steps.wrong).any():
        return None
    value, solution, wrong = scores[among], steps.solution[among], steps.wrong[among]
    starts = np.flatnonzero(np.r_[True, solution[1:] != solution[:-1]])
    each = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(value)]))
    lowest = value == np.minimum.reduceat(value, starts)[each]
    has_wrong = np.logical_or.reduceat(wrong, starts)
    share = np.add.reduceat((lowest & wrong).astype(float), starts) / np.add.reduceat(lowest.astype(float), starts)
    counts = np.bincount(each)
    hits, chance = share[has_wrong], 1 / counts[has_wrong]
    # Solutions of one question are resampled together: each stands for its question's mean, weighted by their number
    return {
        "share": float(hits.mean()),
        "ci95": list(_clustered(hits, steps.question[among][starts][has_wrong], samples, seed)),
        "chance": float(chance.mean()),
        "solutions": len(hits),
    }


def _clustered(values: np.ndarray, groups: np.ndarray, samples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean of shares that resamples groups."""
    if (values == values[0]).all():
        return share_interval(list(values))
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    drawn = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=samples)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [0.025, 0.975])
    return float(low), float(high)
