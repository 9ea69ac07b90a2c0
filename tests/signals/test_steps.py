"""Figures of step detection against plain loops over pairs, and what the position of a step can and cannot do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokalign.signals.steps import ALIKE, Steps, detection, difference, length_strata, step_scores
from tokalign.statistics import auroc, stratified_auroc


def share_won(scores, target, same) -> float | None:
    """Share of pairs (target, other), of those that are the `same`, in which the target scores lower; ties half."""
    won = [
        (a < b) + (a == b) / 2
        for i, a in enumerate(scores)
        for j, b in enumerate(scores)
        if target[i] and not target[j] and same[i] == same[j]
    ]
    return sum(won) / len(won) if won else None


ITEMS = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3), st.integers(0, 4)), max_size=30)


@settings(deadline=None)
@given(ITEMS)
def test_stratified_auroc_is_the_share_of_pairs_won_within_strata(items) -> None:
    scores, target, strata, rows = (np.array([item[i] for item in items]) for i in range(4))
    found = stratified_auroc(scores, target, strata, rows, samples=20)
    expected = share_won(scores, target, strata)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found["auroc"] == pytest.approx(expected)
        assert found["pairs"] == sum(
            (target & (strata == s)).sum() * (~target.astype(bool) & (strata == s)).sum() for s in range(4)
        )
        if (strata == strata[0]).all():
            assert found["auroc"] == pytest.approx(auroc(scores, target))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_its_interval_is_a_bootstrap_over_rows(seed) -> None:
    """Weights of rows equal repeating the drawn rows' items."""
    rng = np.random.default_rng(seed)
    rows, strata = np.repeat(np.arange(8), 4), np.tile(np.arange(4), 8)
    scores, target = rng.integers(0, 5, 32) / 4, rng.random(32) < 0.4
    target[:4], target[4:8] = True, False
    generator, values = np.random.default_rng(3), []
    for weights in generator.multinomial(8, np.full(8, 1 / 8), size=40):
        items = np.concatenate([np.flatnonzero(rows == row) for row in np.repeat(np.arange(8), weights)])
        if (value := share_won(scores[items], target[items], strata[items])) is not None:
            values.append(value)
    found = stratified_auroc(scores, target, strata, rows, samples=40, seed=3)
    assert found is not None and found["ci95"] == pytest.approx(list(np.quantile(values, [0.025, 0.975])))


def test_position_alone_is_perfect_within_a_solution_and_nothing_when_matched() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(3, 9, 200)
    first = [int(rng.integers(0, n)) if rng.random() < 0.7 else -1 for n in counts]
    steps = Steps.of(counts.tolist(), first, list(range(200)))
    found = detection(-steps.index.astype(float), steps, samples=50)
    assert found["within"]["auroc"] == 1 and found["hit1"]["share"] == 1
    assert found["matched"]["auroc"] == 0.5 and found["matched"]["ci95"] == [0.5, 0.5]
    assert found["hit1_all"]["share"] < 0.5  # the last step of all is seldom the first wrong one
    lengths = rng.integers(1, 40, len(steps.index))
    longer = detection(-lengths - 20.0 * steps.wrong, steps, lengths=lengths + 20 * steps.wrong, samples=50)
    assert longer["matched"]["auroc"] > 0.75 and abs(longer["length_matched"]["auroc"] - 0.5) < 0.1
    known = np.where(steps.wrong, -1.0, 0.0)
    assert detection(known, steps, samples=50)["matched"]["auroc"] == 1
    constant = detection(np.zeros(len(known)), steps, samples=50)
    assert constant["hit1"]["share"] == pytest.approx(constant["hit1"]["chance"])
    assert constant["pooled"]["auroc"] == constant["within"]["auroc"] == 0.5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 4), st.integers(0, 2)), min_size=1, max_size=8), st.data())
def test_detection_is_what_loops_over_steps_say(solutions, data) -> None:
    solutions = [(n, min(first, n - 1), question) for n, first, question in solutions]
    steps = Steps.of(*(list(part) for part in zip(*solutions, strict=True)))
    size = len(steps.index)
    scores = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, np.nan]), min_size=size, max_size=size)))
    found, at, items, hits = detection(scores, steps, samples=20), 0, [], []
    for number, (count, first, _) in enumerate(solutions):
        own = scores[at : at + count]
        items += [
            (value, place == first, place, number)
            for place, value in enumerate(own)
            if not np.isnan(value) and (first < 0 or place <= first)
        ]
        if first >= 0 and not np.isnan(own[first]):
            upto = [value for value in own[: first + 1] if not np.isnan(value)]
            lowest = [value for value in upto if value == min(upto)]
            hits.append((own[first] == min(upto)) / len(lowest))
        at += count
    columns = [np.array(part) for part in zip(*items, strict=True)] or [np.zeros(0)] * 4
    for name, same in (("matched", columns[2]), ("within", columns[3]), ("pooled", np.zeros(len(items)))):
        expected = share_won(columns[0], columns[1], same)
        assert (None if found[name] is None else found[name]["auroc"]) == (expected and pytest.approx(expected))
    assert (found["hit1"] is None) == (not hits)
    assert not hits or found["hit1"]["share"] == pytest.approx(np.mean(hits))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), min_size=2, max_size=30))
def test_steps_of_one_length_stratum_have_one_number_and_nearly_one_length(items) -> None:
    index, lengths = (np.array(part) for part in zip(*items, strict=True))
    none = np.zeros(len(items), dtype=bool)
    strata = length_strata(Steps(none, none, index, none, none), lengths)
    for i, j in zip(*np.nonzero(strata[:, None] == strata[None, :]), strict=True):
        assert index[i] == index[j] and lengths[i] <= ALIKE * lengths[j] + 1e-9
    same = (index[:, None] == index[None, :]) & (lengths[:, None] == lengths[None, :])
    assert (strata[:, None] == strata[None, :])[same].all()


def test_a_difference_resamples_both_signals_together() -> None:
    rng = np.random.default_rng(1)
    steps = Steps.of([4] * 60, [int(rng.integers(0, 4)) for _ in range(60)], list(range(60)))
    noise = rng.normal(size=240)
    better, worse = noise - 1.5 * steps.wrong, noise - 1.0 * steps.wrong
    found = difference(better, worse, steps, samples=200)
    apart = [detection(scores, steps, samples=200)["matched"] for scores in (better, worse)]
    assert found is not None and apart[0] and apart[1]
    assert found["difference"] == pytest.approx(apart[0]["auroc"] - apart[1]["auroc"])
    assert found["ci95"][0] > 0 and np.diff(found["ci95"]) < np.diff(apart[0]["ci95"])
    assert difference(better, better, steps, samples=20) == {"difference": 0, "ci95": [0, 0]}


def test_step_scores_take_the_tokens_of_a_step_that_count() -> None:
    values, tokens = [[3.0, 1.0, 2.0], [5.0, 4.0]], [[[0, 1], [2]], [[0], [], [1]]]
    np.testing.assert_array_equal(step_scores(values, tokens), [1, 2, 5, np.nan, 4])
    np.testing.assert_array_equal(step_scores(values, tokens, "mean")[:2], [2, 2])
    keep = [np.array([True, False, False]), np.array([True, True])]
    np.testing.assert_array_equal(step_scores(values, tokens, "min", keep), [3, np.nan, 5, np.nan, 4])


def test_steps_that_a_solution_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="Solution 1 has 2 steps"):
        Steps.of([3, 2], [None, 2], ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        stratified_auroc(np.array([0.0, np.inf]), np.array([True, False]), np.zeros(2), np.zeros(2))
