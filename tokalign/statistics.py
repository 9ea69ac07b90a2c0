"""Accuracy, pass@k, ranking and differences between runs, every figure with its count and its interval.

- Wilson (1927) score interval for one completion a problem.
- Unbiased pass@k of Chen et al. 2021 (arXiv 2107.03374), Eq. 1: 1 − C(n−c, k) / C(n, k).
- Several samples of one problem are not independent, so intervals resample *problems* (Efron's bootstrap), never
  samples.
- Two runs on the same problems are compared problem by problem: paired bootstrap, and McNemar's exact test (1947)
  where every problem has one 0/1 outcome.
- AUROC of tokens (Mann-Whitney, ties half) resamples the rows that they stand in, never tokens. A resample is one
  weight a row, so tokens are sorted once and every curve is a cumulative sum (`Ranking`).
- AUROC within strata (van Elteren's pairs, each of one weight) compares only what is alike, such as steps of one index.
- Runs of several seeds have Student's t-interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

# Resampled counts held at once (numbers, not bytes): 8 MiB however many problems and samples there are.
CHUNK_CELLS = 1 << 20
ROUNDING = 1e-12  # 0.3 − 0.2 and 0.2 − 0.1 differ by less: differences of seeds that are no differences


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, inside [0, 1] and never of zero width.

    Args:
        successes: number of successes out of `n`. A fraction is allowed: per-problem shares vary less than 0/1
            outcomes of the same mean, so the interval is then too wide rather than too narrow.
        n: number of trials, at least 1.
        confidence: coverage, between 0 and 1.

    Raises:
        ValueError: no trials, more successes than trials, or a confidence outside (0, 1).
    """
    if n < 1:
        raise ValueError(f"There are {n} results: an interval needs at least one.")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n} are impossible: pass counts with 0 <= successes <= n.")
    z = float(stats.norm.ppf(0.5 + _checked_confidence(confidence) / 2))
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact where rounding would leave them 1e-17 outside.
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of `k` samples is right, from `c` right ones among `n` (arXiv 2107.03374, Eq. 1).

    (C(n,k) − C(n−c,k)) / C(n,k) in whole numbers up to one division, so exact to the last bit for any n.

    Raises:
        ValueError: k outside 1..n, or c outside 0..n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} right samples of {n} are impossible: pass counts with 0 <= c <= n.")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: use 1 <= k <= n.")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def accuracy(correct: Sequence[bool], *, confidence: float = 0.95) -> dict[str, Any]:
    """Share of right answers, one a problem, with Wilson's interval: `accuracy`, `n`, `ci95`.

    Raises:
        ValueError: nothing to average, or a value that is not 0 or 1.
    """
    values = _values(correct, "correct")
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("accuracy takes one True or False a problem: use sampled_accuracy for shares.")
    successes = int(values.sum())
    return {
        "accuracy": successes / len(values),
        "n": len(values),
        "ci95": list(wilson_interval(successes, len(values), confidence)),
    }


def sampled_accuracy(
    correct: Sequence[Sequence[bool]], *, samples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Any]:
    """Mean over problems of each problem's share of right samples, with a bootstrap over problems.

    Args:
        correct: one list of outcomes a problem; lists may differ in length, and every problem weighs the same.
        samples: bootstrap resamples.

    Returns:
        `accuracy`, `n` (problems), `completions`, `ci95`.
    """
    for row, outcomes in enumerate(correct):
        if len(outcomes) == 0:
            raise ValueError(f"Problem {row} has no samples: drop it, or sample it again.")
    shares = [sum(map(bool, outcomes)) / len(outcomes) for outcomes in correct]
    return {
        "accuracy": float(np.mean(_values(shares, "correct"))),
        "n": len(shares),
        "completions": sum(map(len, correct)),
        "ci95": list(share_interval(shares, samples=samples, seed=seed, confidence=confidence)),
    }


def pass_at_k_report(
    n: Sequence[int],
    c: Sequence[int],
    ks: Sequence[int] | None = None,
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Mean pass@k over problems for every k, with a bootstrap over problems.

    Args:
        n: samples of each problem.
        c: right samples of each problem.
        ks: values of k; unset is 1, 2, 4 … up to the smallest n.

    Returns:
        For every k: `k`, `mean`, `ci95`, `n` (problems).
    """
    if len(n) != len(c) or len(n) == 0:
        raise ValueError(f"There are {len(n)} sample counts and {len(c)} right counts: pass one of each a problem.")
    if ks is None:
        ks = [2**power for power in range(max(0, min(n)).bit_length())]
    report = []
    for k in ks:
        values = [pass_at_k(total, right, k) for total, right in zip(n, c, strict=True)]
        low, high = share_interval(values, samples=samples, seed=seed, confidence=confidence)
        report.append({"k": k, "mean": float(np.mean(values)), "ci95": [low, high], "n": len(values)})
    return report


def share_interval(
    values: Sequence[float], *, samples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of per-problem shares in [0, 1]: percentile bootstrap over problems.

    Resampling equal values cannot vary, which is no evidence of certainty: Wilson's interval is used then.
    """
    data = _values(values, "values")
    if (data < 0).any() or (data > 1).any():
        raise ValueError("A per-problem share lies outside [0, 1]: pass shares, not counts.")
    if (data == data[0]).all():
        return wilson_interval(float(data[0]) * len(data), len(data), confidence)
    means = np.concatenate(list(bootstrap_means(data, samples=samples, seed=seed)))
    return percentile_interval(means, confidence)


def mean_interval(
    values: Sequence[float], *, samples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile-bootstrap interval of the mean of any numbers, e.g. log-probabilities in nats."""
    means = np.concatenate(list(bootstrap_means(_values(values, "values"), samples=samples, seed=seed)))
    return percentile_interval(means, confidence)


def paired_bootstrap(
    a: Mapping[str, float] | Sequence[float],
    b: Mapping[str, float] | Sequence[float],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Difference a − b of two runs on the same problems, resampling problems.

    Args:
        a: outcome of each problem, 0/1 or a share of right samples: by problem id, or in one order for both.
        b: the same problems under the other run.

    Returns:
        `difference` (mean of a − b), `ci95`, `p` (two-sided, of the bootstrap: twice the smaller tail at 0, never below
        2 / (samples + 1)), `n`, `wins`, `losses`, `ties`, and `mcnemar_p` (exact; None unless all outcomes are 0/1).

    Raises:
        ValueError: the runs do not hold the same problems.
    """
    first, second = _joined(a, b)
    differences = first - second
    at_most_zero = at_least_zero = 0
    chunks = []
    for means in bootstrap_means(differences, samples=samples, seed=seed):
        chunks.append(means)
        # A mean that is 0 in exact arithmetic may come out as 1e-17: it belongs to both tails.
        at_most_zero += int((means <= 1e-12).sum())
        at_least_zero += int((means >= -1e-12).sum())
    low, high = percentile_interval(np.concatenate(chunks), confidence)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    binary = bool(np.isin(first, (0.0, 1.0)).all() and np.isin(second, (0.0, 1.0)).all())
    return {
        "difference": float(differences.mean()),
        "ci95": [low, high],
        "p": min(1.0, 2 * (min(at_most_zero, at_least_zero) + 1) / (samples + 1)),
        "n": len(differences),
        "wins": wins,
        "losses": losses,
        "ties": len(differences) - wins - losses,
        "mcnemar_p": mcnemar(wins, losses) if binary else None,
    }


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of McNemar's test: problems that only one run solves, against a fair coin."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def bootstrap_means(values: np.ndarray, *, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Means of `samples` resamples with replacement of `values`, in chunks.

    Only how often each *distinct* value is drawn matters, and those counts are multinomial. Drawing the counts gives
    the same distribution as drawing problems, at (samples × distinct values): three columns for 0/1 differences. The
    chunks hold at most CHUNK_CELLS numbers, and chunking does not change the draws.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: use at least 1, e.g. 10000.")
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_CELLS // len(distinct))
    for start in range(0, samples, rows):
        drawn = generator.multinomial(
            len(values), counts / len(values), size=min(rows, samples - start)
        )  # (rows, distinct)
        yield drawn @ distinct / len(values)


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The middle of bootstrap values (samples,), as much of it as `confidence` says."""
    tail = (1 - _checked_confidence(confidence)) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------------- ranking


class Ranking:
    """Tokens sorted by falling score, ties together: every curve is a cumulative sum over the G groups of equal score.

    Args:
        scores: (N,) finite.
        targets: (N,) booleans, the tokens that should score high.
        others: (N,) booleans, those that should not. A token may be neither; then it counts in sums of all only.
        rows: (N,) which row (a response, a solution) a token stands in, any integers.

    Attributes:
        rows: (R,) the distinct rows, in the order of `resamples`.
    """

    def __init__(self, scores: np.ndarray, targets: np.ndarray, others: np.ndarray, rows: np.ndarray):
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        self.starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # first token of each group
        self.targets, self.others = targets[order], others[order]
        self.rows, self._row = np.unique(rows[order], return_inverse=True)

    def sums(self, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets, others and all tokens whose score is at least that of each group (G,), rows weighted by (R,)."""
        each = np.ones(len(self._row), dtype=np.int64) if weights is None else weights[self._row]
        hits, misses, everything = (
            np.cumsum(np.add.reduceat(kind, self.starts))
            for kind in (np.where(self.targets, each, 0), np.where(self.others, each, 0), each)
        )
        return hits, misses, everything

    def resamples(self, samples: int, seed: int) -> Iterator[np.ndarray]:
        """Weights (R,) of the rows, one resample at a time."""
        count = len(self.rows)
        generator = np.random.default_rng(seed)
        for _ in range(samples):
            yield generator.multinomial(count, np.full(count, 1 / count))


def area_under_roc(hits: np.ndarray, others: np.ndarray) -> float:
    """Chance that a target scores above another token, ties half; `Ranking.sums` of both (G,)."""
    h, o = np.diff(hits, prepend=0), np.diff(others, prepend=0)
    return float((h * (others[-1] - others + o / 2)).sum() / (hits[-1] * others[-1]))


def auroc(scores: Sequence[float] | np.ndarray, is_target: Sequence[bool] | np.ndarray) -> float:
    """Chance that a target token scores below another token, ties counted half; 0.5 is no information.

    Args:
        scores: (N,) finite scores, low = suspicious.
        is_target: (N,) booleans.

    Raises:
        ValueError: lengths differ, or one of the two groups is empty.
    """
    scores, is_target = np.asarray(scores, dtype=np.float64), np.asarray(is_target, dtype=bool)
    if scores.shape != is_target.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and is_target {is_target.shape} must be vectors of one length.")
    targets = int(is_target.sum())
    others = len(scores) - targets
    if targets == 0 or others == 0:
        raise ValueError(f"AUROC needs targets and other tokens; there are {targets} and {others}.")
    ranks = stats.rankdata(-scores)
    return float((ranks[is_target].sum() - targets * (targets + 1) / 2) / (targets * others))


def auroc_interval(
    scores: np.ndarray,
    is_target: np.ndarray,
    rows: np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap over rows of `auroc`; `rows` (N,) is the row of each token, any integers."""
    ranking = Ranking(-scores, is_target, ~is_target, rows)
    sums = (ranking.sums(weights) for weights in ranking.resamples(samples, seed))
    # A resample may lack one of the two groups; then there is nothing to tell apart.
    values = [area_under_roc(hits, others) for hits, others, _ in sums if hits[-1] and others[-1]]
    return percentile_interval(np.array(values), confidence)


def stratified_auroc(
    scores: np.ndarray,
    is_target: np.ndarray,
    strata: np.ndarray,
    rows: np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """Chance that a target scores below another item *of its own stratum*, ties half, over all such pairs.

    A pair counts once wherever it stands, so a stratum weighs as much as it has pairs. What is the same for all items
    of a stratum (their position, where strata are positions) can add nothing to the figure. One stratum for all gives
    `auroc`.

    Args:
        scores: (N,) finite, low = suspicious.
        is_target: (N,) booleans.
        strata: (N,) any integers.
        rows: (N,) the unit that is resampled (a solution, or the question that several solutions answer).
        samples: bootstrap resamples; each costs a pass over the N items, which are sorted once.

    Returns:
        `auroc`, `ci95`, `pairs`, and `targets` and `others` that stand in a pair; None where no stratum has both kinds.

    Raises:
        ValueError: lengths differ, or a score is not finite.
    """
    strata, is_target = np.asarray(strata), np.asarray(is_target, dtype=bool)
    found = _stratified(scores, is_target, strata, rows, samples, seed)
    if found is None:
        return None
    value, values, pairs = found
    paired_here = np.isin(strata, np.intersect1d(strata[is_target], strata[~is_target]))
    return {
        "auroc": value,
        "ci95": list(percentile_interval(values, confidence)),
        "pairs": pairs,
        "targets": int((paired_here & is_target).sum()),
        "others": int((paired_here & ~is_target).sum()),
    }


def stratified_auroc_difference(
    a: np.ndarray,
    b: np.ndarray,
    is_target: np.ndarray,
    strata: np.ndarray,
    rows: np.ndarray,
    *,
    samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any] | None:
    """By how much the scores `a` have a larger `stratified_auroc` than `b` on the same items: resampled together.

    Returns:
        `difference` and `ci95`; None where no stratum has both kinds.
    """
    first, second = (_stratified(scores, is_target, strata, rows, samples, seed) for scores in (a, b))
    if first is None or second is None:
        return None
    interval = percentile_interval(first[1] - second[1], confidence)  # one seed and one set of rows: the same draws
    return {"difference": first[0] - second[0], "ci95": list(interval)}


def _stratified(
    scores: np.ndarray, is_target: np.ndarray, strata: np.ndarray, rows: np.ndarray, samples: int, seed: int
) -> tuple[float, np.ndarray, int] | None:
    """AUROC within strata, its resamples and its number of pairs, or None; the draws depend on the rows alone."""
    scores, is_target = np.asarray(scores, dtype=np.float64), np.asarray(is_target, dtype=bool)
    strata, rows = np.asarray(strata), np.asarray(rows)
    if not scores.shape == is_target.shape == strata.shape == rows.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape}, is_target, strata and rows must be vectors of one length.")
    if not np.isfinite(scores).all():
        raise ValueError(f"Score {int(np.argmin(np.isfinite(scores)))} is not finite: score it again, or leave it out.")
    # Items by stratum, in each by rising score. Ties of one stratum are a group; `first` is the group that opens the
    # stratum of a group, `last` the one that closes it.
    order = np.lexsort((scores, strata))
    ordered, stratum, target = scores[order], strata[order], is_target[order]
    opens = np.r_[True, stratum[1:] != stratum[:-1]] if len(order) else np.zeros(0, dtype=bool)
    starts = np.flatnonzero(opens | np.r_[True, ordered[1:] != ordered[:-1]]) if len(order) else np.zeros(0, dtype=int)
    of_stratum = np.cumsum(opens[starts]) - 1
    first = np.flatnonzero(opens[starts])
    last = np.r_[first[1:], len(starts)] - 1
    _, row = np.unique(rows[order], return_inverse=True)

    def won(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pairs won, pairs) of each of S resamples, from weights (S, N) of the items in order."""
        targets = np.add.reduceat(np.where(target, weights, 0), starts, axis=1)
        others = np.add.reduceat(np.where(target, 0, weights), starts, axis=1)
        upto = np.cumsum(others, axis=1)
        # A target beats the others of its stratum that stand above it, and half of those of its own group
        above = upto[:, last][:, of_stratum] - upto
        before = upto[:, first] - others[:, first]  # others of the strata before
        hits = np.add.reduceat(targets, first, axis=1)
        return (targets * (above + others / 2)).sum(axis=1), (hits * (upto[:, last] - before)).sum(axis=1)

    if not is_target.any() or is_target.all():
        return None
    wins, pairs = won(np.ones((1, len(order)), dtype=np.int64))
    if not pairs[0]:
        return None
    values, generator, count = [], np.random.default_rng(seed), int(row.max()) + 1
    chunk = max(1, CHUNK_CELLS // len(order))
    for start in range(0, samples, chunk):
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=min(chunk, samples - start))
        resampled, among = won(drawn[:, row])
        values.append(resampled[among > 0] / among[among > 0])  # a resample may hold no pair
    return float(wins[0] / pairs[0]), np.concatenate(values), int(pairs[0])


def hit(scores: Sequence[float] | np.ndarray, target: int, *, within: int = 0) -> float:
    """Chance that the lowest score, one of the lowest at random, is at most `within` tokens from `target`."""
    scores = np.asarray(scores)
    lowest = np.flatnonzero(scores == scores.min())
    return float((np.abs(lowest - target) <= within).mean())


# ----------------------------------------------------------------------------------------------------------- seeds


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A figure over the seeds of a run: its mean, and how sure it is by Student's t.

    Returns:
        `mean`, `ci95`, `seeds` (their number), `values`, and `p`: two-sided, of a mean of 0, which says something of
        differences only. A single seed has neither interval nor p (None).
    """
    n = len(values)
    summary = {"mean": sum(values) / n, "ci95": [None, None], "seeds": n, "values": list(values), "p": None}
    if n > 1 and max(values) - min(values) <= ROUNDING:  # no spread, which t cannot divide by
        return summary | {"ci95": [values[0], values[0]], "p": float(abs(values[0]) <= ROUNDING)}
    if n > 1:
        test = stats.ttest_1samp(values, 0.0)
        summary |= {"ci95": [float(end) for end in test.confidence_interval(0.95)], "p": float(test.pvalue)}
    return summary


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """`over_seeds` of a − b: two methods, seed by seed on the same problems and pairs; what rounding leaves is 0."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return over_seeds([0.0 if abs(difference) <= ROUNDING else difference for difference in differences])


# ---------------------------------------------------------------------------------------------------------- checks


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: use a number between 0 and 1, e.g. 0.95.")
    return confidence


def _values(values: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} has shape {array.shape}: pass one number a problem, at least one.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} of problem {int(np.argmin(np.isfinite(array)))} is not a number: evaluate it again.")
    return array


def _joined(
    a: Mapping[str, float] | Sequence[float], b: Mapping[str, float] | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        missing = [key for key in a if key not in b] + [key for key in b if key not in a]
        if missing:
            raise ValueError(
                f"{len(missing)} problems are in one run only, the first with id {missing[0]!r}: "
                "evaluate both runs on the same problems."
            )
        # Sorted, so that the order in which a run stored its rows cannot change the last digit.
        keys = sorted(a)
        return _values([a[key] for key in keys], "a"), _values([b[key] for key in keys], "b")
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        raise ValueError("One run has problem ids and the other has none: pass two mappings or two sequences.")
    if len(a) != len(b):
        raise ValueError(f"One run has {len(a)} problems and the other {len(b)}: evaluate both on the same problems.")
    return _values(a, "a"), _values(b, "b")
