"""Metrics against brute force: enumeration, plain loops over resampled problems, and scipy's own intervals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokalign import statistics as metrics
from tokalign.statistics import (
    Ranking,
    accuracy,
    area_under_roc,
    auroc,
    auroc_interval,
    hit,
    mcnemar,
    mean_interval,
    over_seeds,
    paired,
    paired_bootstrap,
    pass_at_k,
    pass_at_k_report,
    sampled_accuracy,
    share_interval,
    wilson_interval,
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_equals_scipy_and_holds_the_share(counts, confidence):
    successes, n = counts
    low, high = wilson_interval(successes, n, confidence)
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


def test_wilson_known_value():
    # 10 of 20: centre 0.5, z = 1.959964, half-width z·sqrt(0.25/20 + z²/1600) / (1 + z²/20)
    assert wilson_interval(10, 20) == pytest.approx((0.299298, 0.700702), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-15)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_rises_with_k_and_c(case):
    n, c, k = case
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert value <= pass_at_k(n, c, min(n, k + 1))
    assert value <= pass_at_k(n, min(n, c + 1), k)


def test_pass_at_k_keeps_its_digits_at_large_n():
    # One right sample among 10^5: k/n exactly, where 1 - C(n-c,k)/C(n,k) in floats would lose digits.
    assert pass_at_k(100_000, 1, 3) == pytest.approx(3e-5, rel=1e-14)


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match=r"impossible|cannot be estimated"):
        pass_at_k(*arguments)


def test_accuracy_reports_count_and_interval():
    report = accuracy([True, False, True, True])
    assert report["accuracy"] == 0.75 and report["n"] == 4
    assert report["ci95"] == list(wilson_interval(3, 4))
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])
    with pytest.raises(ValueError, match="sampled_accuracy"):
        accuracy([0.5, 1.0])


def _bootstrap_loop(values, samples, seed):
    """The definition: draw n problems with replacement, average, repeat."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(samples):
        drawn = [values[generator.integers(len(values))] for _ in values]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, [0.025, 0.975])


def test_bootstrap_by_counts_equals_bootstrap_by_problems():
    values = list(np.random.default_rng(3).choice([0, 0.25, 0.5, 1], size=40))
    low, high = share_interval(values, samples=20_000, seed=0)
    expected = _bootstrap_loop(values, 4_000, 1)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.012)  # Monte-Carlo error of 4,000 resamples


def test_bootstrap_interval_covers_the_truth():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        shares = generator.beta(2, 3, size=60)  # true mean 0.4
        low, high = mean_interval(shares, samples=400, seed=trial)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_chunks_change_nothing(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    whole = mean_interval(values, samples=500)
    monkeypatch.setattr(metrics, "CHUNK_CELLS", 120)  # two resamples a chunk
    assert mean_interval(values, samples=500) == whole


def test_memory_is_chunked():
    chunks = [len(c) for c in metrics.bootstrap_means(np.arange(300_000.0), samples=5, seed=0)]
    assert sum(chunks) == 5 and max(chunks) * 300_000 <= metrics.CHUNK_CELLS


def test_sampled_accuracy_resamples_problems_not_samples():
    # 20 problems, each all right or all wrong, 50 samples each: 1,000 completions hold only 20 facts.
    correct = [[i % 2 == 0] * 50 for i in range(20)]
    report = sampled_accuracy(correct)
    assert report["accuracy"] == 0.5 and report["n"] == 20 and report["completions"] == 1000
    low, high = report["ci95"]
    assert high - low > 0.35  # 1,000 independent samples would give 0.06
    with pytest.raises(ValueError, match="Problem 1 has no samples"):
        sampled_accuracy([[True], []])


def test_equal_shares_still_have_an_interval():
    assert share_interval([1.0] * 10) == wilson_interval(10, 10)
    low, high = share_interval([0.5])
    assert low < 0.5 < high


def test_pass_at_k_report_averages_problems():
    report = pass_at_k_report([8, 8, 8], [0, 1, 8])
    assert [row["k"] for row in report] == [1, 2, 4, 8]
    assert report[1]["mean"] == pytest.approx((0 + 2 / 8 + 1) / 3)
    assert all(row["n"] == 3 and row["ci95"][0] <= row["mean"] <= row["ci95"][1] for row in report)


outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@settings(deadline=None, max_examples=50)
@given(outcomes)
def test_paired_bootstrap_is_antisymmetric_and_independent_of_order(pairs):
    a = {str(i): float(x) for i, (x, _) in enumerate(pairs)}
    b = {str(i): float(y) for i, (_, y) in enumerate(pairs)}
    forward = paired_bootstrap(a, b, samples=400)
    assert forward == paired_bootstrap(dict(reversed(a.items())), b, samples=400)
    backward = paired_bootstrap(b, a, samples=400)
    assert forward["difference"] == -backward["difference"]
    assert forward["mcnemar_p"] == backward["mcnemar_p"]
    assert forward["wins"] == backward["losses"]
    assert forward["wins"] + forward["losses"] + forward["ties"] == len(pairs)
    assert 0 < forward["p"] <= 1


def test_paired_bootstrap_sees_what_unpaired_intervals_miss():
    # The second run solves every problem the first solves, and 20 more of 400.
    generator = np.random.default_rng(0)
    b = generator.random(400) < 0.5
    a = b.copy()
    a[np.flatnonzero(~b)[:20]] = True
    result = paired_bootstrap(list(a.astype(float)), list(b.astype(float)))
    assert result["difference"] == pytest.approx(0.05) and result["n"] == 400
    assert result["ci95"][0] > 0 and result["p"] < 0.001
    assert result["mcnemar_p"] == pytest.approx(2 * 0.5**20)
    assert wilson_interval(int(b.sum()), 400)[1] > wilson_interval(int(a.sum()), 400)[0]


def test_paired_bootstrap_p_is_near_mcnemars():
    a = [1.0] * 30 + [0.0] * 15 + [1.0] * 55
    b = [0.0] * 30 + [1.0] * 15 + [1.0] * 55
    result = paired_bootstrap(a, b)
    assert result["mcnemar_p"] == pytest.approx(_mcnemar_loop(30, 15))
    assert result["p"] == pytest.approx(result["mcnemar_p"], abs=0.02)


def _mcnemar_loop(wins, losses):
    n = wins + losses
    chances = [math.comb(n, i) / 2**n for i in range(n + 1)]
    return sum(c for c in chances if c <= chances[wins] * (1 + 1e-9))


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_equals_enumeration(wins, losses):
    assert mcnemar(wins, losses) == pytest.approx(_mcnemar_loop(wins, losses) if wins + losses else 1.0)


def test_equal_runs_are_not_different():
    result = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert result["difference"] == 0 and result["p"] == 1 and result["mcnemar_p"] == 1


def test_shares_have_no_mcnemar():
    assert paired_bootstrap([0.5, 1.0], [0.25, 1.0])["mcnemar_p"] is None


def test_runs_on_other_problems_are_refused():
    with pytest.raises(ValueError, match="2 problems are in one run only, the first with id 'x'"):
        paired_bootstrap({"x": 1.0}, {"y": 1.0})
    with pytest.raises(ValueError, match="2 problems and the other 1"):
        paired_bootstrap([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="a of problem 1 is not a number"):
        paired_bootstrap([1.0, math.nan], [1.0, 0.0])


# --------------------------------------------------------------------------------------------------------- ranking


def pairs_won(scores, is_target):
    """Share of (target, other) pairs in which the target scores lower, ties half."""
    won = [
        1.0 if a < b else 0.5 if a == b else 0.0
        for a, x in zip(scores, is_target, strict=True)
        if x
        for b, y in zip(scores, is_target, strict=True)
        if not y
    ]
    return sum(won) / len(won)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_won(tokens):
    scores, target = [s / 4 for s, _ in tokens], [t for _, t in tokens]
    if all(target) or not any(target):
        with pytest.raises(ValueError, match="AUROC needs"):
            auroc(scores, target)
    else:
        assert auroc(scores, target) == pytest.approx(pairs_won(scores, target))
        values, is_target = -np.array(scores), np.array(target)
        hits, others, everything = Ranking(values, is_target, ~is_target, np.zeros(len(values))).sums()
        assert area_under_roc(hits, others) == auroc(scores, target) and everything[-1] == len(tokens)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_auroc_interval_is_a_bootstrap_over_rows(seed):
    """The weighted form equals repeating the drawn rows' tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 6, size=5)
    rows = np.repeat(np.arange(5), lengths)
    scores = rng.integers(0, 4, size=len(rows)) / 4
    target = np.zeros(len(rows), dtype=bool)
    target[np.r_[0, np.cumsum(lengths)[:-1]] + rng.integers(0, lengths)] = True
    generator = np.random.default_rng(7)
    values = []
    for _ in range(30):
        drawn = np.repeat(np.arange(5), generator.multinomial(5, np.full(5, 0.2)))
        index = np.concatenate([np.flatnonzero(rows == r) for r in drawn])
        values.append(pairs_won(scores[index], target[index]))
    expected = np.quantile(values, [0.025, 0.975])
    assert auroc_interval(scores, target, rows, samples=30, seed=7) == pytest.approx(tuple(expected))


def test_hit_shares_ties():
    assert hit([0.5, 0.1, 0.9], 1) == 1 and hit([0.5, 0.1, 0.9], 2) == 0
    assert hit([0.5, 0.1, 0.9], 2, within=1) == 1
    assert hit([0.1, 0.1, 0.9, 0.1], 3) == pytest.approx(1 / 3)
    assert hit([0.1, 0.1, 0.9, 0.1], 0, within=1) == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------------- seeds


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_over_seeds_is_students_t(values):
    summary = over_seeds(values)
    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    spread = error * float(stats.t.ppf(0.975, n - 1))
    assert summary["mean"] == pytest.approx(mean) and summary["values"] == values and summary["seeds"] == n
    assert summary["ci95"] == pytest.approx([mean - spread, mean + spread], rel=1e-9, abs=1e-9)
    if error > 1e-9:
        assert summary["p"] == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1), rel=1e-6)


def test_over_seeds_of_one_seed_and_of_equal_ones():
    assert over_seeds([0.5]) == {"mean": 0.5, "ci95": [None, None], "seeds": 1, "values": [0.5], "p": None}
    assert over_seeds([0.0, 0.0])["p"] == 1 and over_seeds([0.1, 0.1, 0.1])["p"] == 0
    assert over_seeds([0.1, 0.1, 0.1])["ci95"] == [0.1, 0.1]


def test_paired_takes_differences_seed_by_seed():
    assert paired([3.0, 5.0, 9.0], [1.0, 4.0, 6.0]) == over_seeds([2.0, 1.0, 3.0])
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
