"""How well scores find divergent tokens, and what finding them costs: AUROC, AUPRC, recall at LLM rates, calibration.

A token is routed to the large model (LLM) if its score is at least a threshold. The *LLM rate* is the share of all
tokens that are routed. A token without a verdict (label −1) is routed by its score like any other, so it counts in
rates; nobody knows whether that was right, so it counts in nothing else. Tokens of one response are not independent:
intervals are 95 % percentile bootstraps over *responses*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokalign.routing.labels.classes import DIVERGENT
from tokalign.statistics import Ranking, area_under_roc, auroc, percentile_interval

RATES = (0.02, 0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 0.5)


def ranking_of(scores: np.ndarray, labels: np.ndarray, responses: np.ndarray) -> Ranking:
    """The divergent tokens among those with a verdict, ranked by score.

    Args:
        scores: (N,) finite.
        labels: (N,) 0 identical, 1 neutral, 2 divergent, −1 no verdict.
        responses: (N,) which response a token belongs to, any integers.

    Raises:
        ValueError: lengths differ, a score is not finite, or there is no divergent or no other token.
    """
    scores, labels, responses = check_tokens(scores, labels, responses)
    divergent = labels == DIVERGENT
    others = (labels >= 0) & ~divergent
    if not divergent.any() or not others.any():
        raise ValueError(
            f"There are {int(divergent.sum())} divergent and {int(others.sum())} other tokens, and a measure of how "
            "well they are told apart needs both; label more problems."
        )
    return Ranking(scores, divergent, others, responses)


def check_tokens(
    scores: np.ndarray, labels: np.ndarray, responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three as float64 and integer vectors of one length.

    Raises:
        ValueError: lengths differ, there is no token, or a score is not finite.
    """
    scores, labels, responses = np.asarray(scores, dtype=np.float64), np.asarray(labels), np.asarray(responses)
    if not (scores.ndim == 1 and scores.shape == labels.shape == responses.shape and len(scores)):
        raise ValueError(
            f"scores {scores.shape}, labels {labels.shape} and responses {responses.shape} must be vectors of one "
            "length, at least 1."
        )
    if not (finite := np.isfinite(scores)).all():
        raise ValueError(f"The score of token {int(np.argmin(finite))} is not finite; train the router again.")
    return scores, labels, responses


def average_precision(hits: np.ndarray, others: np.ndarray) -> float:
    """AUPRC: Σ_n (R_n − R_{n−1}) P_n over the distinct scores; a random score gets the share of divergent tokens."""
    seen = np.maximum(hits + others, 1)
    return float((np.diff(hits, prepend=0) * (hits / seen)).sum() / hits[-1])


def recall_at(hits: np.ndarray, everything: np.ndarray, rates: Sequence[float]) -> np.ndarray:
    """Largest share of the divergent tokens that can be routed at LLM rates of at most `rates`; ties stay together."""
    # Counts, not shares: 0.3 * 10 is 3.0000000000000004 here and 2.9999999999999996 elsewhere
    allowed = np.floor(np.asarray(rates) * everything[-1] + 1e-9)
    groups = np.searchsorted(everything, allowed, side="right")
    return np.concatenate([[0], hits])[groups] / hits[-1]


def probabilities(scores: np.ndarray, pos_weight: float) -> np.ndarray:
    """Undo the weight of divergent tokens in the loss: σ(logit − ln w) of scores σ(logit)."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores / (scores + pos_weight * (1 - scores))


def reliability(probability: np.ndarray, divergent: np.ndarray, *, bins: int = 10) -> dict[str, Any]:
    """Reliability curve over bins of equal width, and expected calibration error Σ n_b/N |observed − predicted|.

    Args:
        probability: (N,) in [0, 1].
        divergent: (N,) booleans.

    Returns:
        `predicted`, `observed`, `tokens` of the bins that hold tokens, and `ece`.
    """
    index = np.minimum((probability * bins).astype(int), bins - 1)
    tokens = np.bincount(index, minlength=bins)
    kept = tokens > 0
    predicted = np.bincount(index, weights=probability, minlength=bins)[kept] / tokens[kept]
    observed = np.bincount(index, weights=divergent, minlength=bins)[kept] / tokens[kept]
    ece = float((tokens[kept] / tokens.sum() * np.abs(observed - predicted)).sum())
    return {
        "predicted": predicted.tolist(),
        "observed": observed.tolist(),
        "tokens": tokens[kept].tolist(),
        "ece": ece,
    }


def router_report(
    scores: np.ndarray,
    labels: np.ndarray,
    responses: np.ndarray,
    *,
    pos_weight: float = 1.0,
    rates: Sequence[float] = RATES,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that the scores of a held-out split say about a router.

    Args:
        scores, labels, responses: (N,), see `ranking_of`.
        pos_weight: that the router was trained with; `reliability` is about scores freed of it.
        rates: LLM rates at which recall is reported.
        samples: bootstrap resamples of responses.

    Returns:
        `tokens`, `responses`, `invalid` (tokens without a verdict), `divergent_share` (of those with one), `auroc`,
        `auprc`, each with `…_ci95`; `recall_at_rate`: by rate `recall` and `ci95`; `reliability`; `curve`: LLM `rate`
        and `recall` along the threshold, at most 200 points.
    """
    ranking = ranking_of(scores, labels, responses)
    hits, others, everything = ranking.sums()
    resampled: list[tuple[float, float, np.ndarray]] = []
    for weights in ranking.resamples(samples, seed):
        h, o, e = ranking.sums(weights)
        if h[-1] and o[-1]:
            resampled.append((area_under_roc(h, o), average_precision(h, o), recall_at(h, e, rates)))
    told = np.asarray(labels) >= 0
    divergent = np.asarray(labels)[told] == DIVERGENT
    recalls = recall_at(hits, everything, rates)
    spread = np.array([recall for _, _, recall in resampled])
    points = np.unique(np.linspace(0, len(hits) - 1, 200).astype(int))
    return {
        "tokens": len(told),
        "responses": len(ranking.rows),
        "invalid": int((~told).sum()),
        "divergent_share": float(divergent.mean()),
        "auroc": auroc(-np.asarray(scores)[told], divergent),
        "auroc_ci95": list(percentile_interval(np.array([value for value, _, _ in resampled]))),
        "auprc": average_precision(hits, others),
        "auprc_ci95": list(percentile_interval(np.array([value for _, value, _ in resampled]))),
        "recall_at_rate": {
            f"{rate:g}": {"recall": float(recalls[i]), "ci95": list(percentile_interval(spread[:, i]))}
            for i, rate in enumerate(rates)
        },
        "reliability": reliability(probabilities(np.asarray(scores)[told], pos_weight), divergent),
        "curve": {
            "rate": [0.0, *(everything[points] / everything[-1]).tolist()],
            "recall": [0.0, *(hits[points] / hits[-1]).tolist()],
        },
    }


def print_report(report: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """AUROC, AUPRC, recall at each rate and calibration error, with intervals."""
    table = Table("measure", "value", "95 % interval", title=title)
    for key, label in (("auroc", "AUROC"), ("auprc", "AUPRC")):
        low, high = report[f"{key}_ci95"]
        table.add_row(label, f"{report[key]:.3f}", f"{low:.3f} – {high:.3f}")
    for rate, entry in report["recall_at_rate"].items():
        low, high = entry["ci95"]
        table.add_row(f"recall at LLM rate {rate}", f"{entry['recall']:.3f}", f"{low:.3f} – {high:.3f}")
    table.add_row("expected calibration error", f"{report['reliability']['ece']:.3f}", "")
    if "threshold" in report:
        at = report["threshold"]
        for key in ("rate", "recall", "accuracy"):
            low, high = at["ci"][key]
            table.add_row(f"{key} at threshold {at['threshold']:.4g}", f"{at[key]:.3f}", f"{low:.3f} – {high:.3f}")
    table.caption = (
        f"{report['responses']:,} responses, {report['tokens']:,} tokens, {report['divergent_share']:.1%} divergent; "
        f"{report['invalid']:,} without a verdict"
    )
    (console or Console()).print(table)


def plot_reports(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """PNG: recall along the LLM rate, and the reliability curve, one line a report (router)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="grey", linestyle=":", label="random")
    right.plot([0, 1], [0, 1], color="grey", linestyle=":", label="exact")
    for name, report in reports.items():
        curve, bins = report["curve"], report["reliability"]
        left.plot(curve["rate"], curve["recall"], label=f"{name} (AUROC {report['auroc']:.3f})")
        if "threshold" in report:
            left.plot(report["threshold"]["rate"], report["threshold"]["recall"], "o", color=left.lines[-1].get_color())
        right.plot(bins["predicted"], bins["observed"], marker="o", label=f"{name} (error {bins['ece']:.3f})")
    left.set(xlabel="LLM rate", ylabel="divergent tokens routed", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="predicted share of divergent tokens", ylabel="observed share", xlim=(0, 1), ylim=(0, 1.02))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=150)
