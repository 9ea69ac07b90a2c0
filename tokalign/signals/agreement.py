"""How well token signals find the critical token of a wrong solution, and what each costs.

Each wrong solution has one target token: its first wrong one where a world knows it (column `first_error`), or the
critical token of the rollout estimate (`critical_index`; arXiv 2411.19943v3, section 3.1). A signal should be at its
suspicious end there; the table of signals says which end that is, and values are turned so that it is the low one. The
report has, with 95 % intervals from a bootstrap over solutions (tokens of one solution are not independent):

- AUROC: the chance that a target scores below another token of the wrong solutions, ties counted half (Mann-Whitney);
- hit@1: the share of solutions whose lowest score is at the target; hit within 1: at most one token away from it. Where
  several tokens are lowest, one of them at random would be taken, and the figure is the mean over that choice. So a
  constant score has exactly the chance level;
- cost: tokens that go through a model for each scored token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokalign.signals.registry import Signal, get
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.statistics import auroc, auroc_interval, hit, share_interval

CHANCE = "chance"  # the baseline that every report holds
TARGETS = ("first_error", "critical_index")


def report(
    signals: Mapping[str, Sequence[Sequence[float] | np.ndarray]],
    targets: Sequence[int | None],
    *,
    costs: Mapping[str, float] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Agreement of signals with the target tokens.

    Args:
        signals: for each name one list of scores a wrong solution, low = suspicious, all of one shape.
        targets: index of the target token of each solution; None or −1 where unknown (left out and counted).
        costs: tokens through a model for each scored token, by signal.
        samples: bootstrap resamples of solutions.

    Returns:
        `solutions`, `unknown`, `tokens`, and `signals`: by name `auroc`, `hit1`, `hit_within_1`, each with `…_ci95`,
        and `tokens_per_scored_token`. The entry "chance" is a signal that says nothing.

    Raises:
        ValueError: no known target, lengths that disagree, NaN, or a target outside its solution.
    """
    known = [i for i, target in enumerate(targets) if target is not None and target >= 0]
    if not known:
        raise ValueError(f"None of the {len(targets)} solutions has a known target token: compute the target first.")
    if not signals:
        raise ValueError("There is no signal to compare: pass at least one.")
    shape = next(iter(signals.values()))
    lengths = [len(shape[i]) for i in known]
    target_of = [int(targets[i]) for i in known]  # type: ignore[arg-type]  # None was left out
    for i, length, target in zip(known, lengths, target_of, strict=True):
        if target >= length:
            raise ValueError(f"Row {i}: the target is token {target} but the solution has {length}: recompute it.")
    rows = np.repeat(np.arange(len(known)), lengths)
    is_target = np.zeros(len(rows), dtype=bool)
    is_target[np.cumsum([0, *lengths[:-1]]) + target_of] = True

    result: dict[str, Any] = {
        "solutions": len(known),
        "unknown": len(targets) - len(known),
        "tokens": len(rows),
        "signals": {},
    }
    costs = {CHANCE: 0.0, **(costs or {})}
    for name, values in {**signals, CHANCE: [[0.0] * len(row) for row in shape]}.items():
        if len(values) != len(targets):
            raise ValueError(f"Signal {name} has {len(values)} rows but there are {len(targets)} targets.")
        chosen = [np.asarray(values[i], dtype=np.float64) for i in known]
        for i, length, scores in zip(known, lengths, chosen, strict=True):
            if len(scores) != length:
                raise ValueError(
                    f"Row {i}: signal {name} has {len(scores)} scores for {length} tokens: score it again."
                )
            if not np.isfinite(scores).all():
                raise ValueError(f"Row {i}: signal {name} holds NaN or infinity: score it again.")
        flat = np.concatenate(chosen)
        entry: dict[str, Any] = {
            "auroc": auroc(flat, is_target),
            "auroc_ci95": list(auroc_interval(flat, is_target, rows, samples=samples, seed=seed)),
        }
        for key, within in (("hit1", 0), ("hit_within_1", 1)):
            hits = [hit(s, t, within=within) for s, t in zip(chosen, target_of, strict=True)]
            entry[key] = float(np.mean(hits))
            entry[f"{key}_ci95"] = list(share_interval(hits, seed=seed))
        entry["tokens_per_scored_token"] = costs.get(name)
        result["signals"][name] = entry
    return result


def among(
    signals: Mapping[str, Sequence[Sequence[float] | np.ndarray]],
    targets: Sequence[int | None],
    candidates: Sequence[np.ndarray],
) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """Signals and targets with the candidate tokens only, as `report` takes them: of one kind, or up to the target.

    Args:
        signals, targets: as of `report`.
        candidates: for each solution a bool a token.

    Returns:
        Signals cut to the candidates, and targets counted among them; −1 where the target is unknown or no candidate.
    """
    cut = {
        name: [np.asarray(row, dtype=np.float64)[keep] for row, keep in zip(values, candidates, strict=True)]
        for name, values in signals.items()
    }
    places = [
        int(keep[:target].sum()) if target is not None and target >= 0 and keep[target] else -1
        for target, keep in zip(targets, candidates, strict=True)
    ]
    return cut, places


def joined_rows(paths: Sequence[str], split: str = "train") -> list[dict[str, Any]]:
    """Rows that all stages hold, with the columns that `agreement` reads; one a distinct rejected completion.

    Raises:
        ContractError: a stage without ids, or stages that share no rejected completion of one problem.
    """
    merged: dict[tuple[Any, ...], dict[str, Any]] | None = None
    for path in paths:
        dataset = load_stage(path, split=split)
        for column in ("id", "prompt_ids", "rejected_ids"):
            if column not in dataset.column_names:
                raise ContractError(f"{path} has no column `{column}`; pass stages made from preference pairs.")
        extra = ("id", "prompt_ids", "chosen_ids", *TARGETS)
        keep = [name for name in dataset.column_names if name.startswith("rejected_") or name.endswith("_tokens")]
        keep += [name for name in extra if name in dataset.column_names]
        rows = {(row["id"], *row["rejected_ids"]): row for row in dataset.select_columns(keep)}
        merged = rows if merged is None else {key: {**merged[key], **rows[key]} for key in merged if key in rows}
    if not merged:
        raise ContractError(f"{' and '.join(paths)} share no rejected completion; pass stages of the same pairs.")
    return list(merged.values())


def tokens_per_scored_token(signal: Signal, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens through a model for each scored token: what the job counted, else passes over prompt and completion.

    Args:
        rows: with `prompt_ids`, `<side>_ids`, and the signal's counts where its job kept some.

    Returns:
        None where the table has no cost for the signal and its job has counted none.
    """
    if signal.counted and signal.counted in rows[0]:
        scored = sum(len(row[f"{side}_ids"]) for row in rows for side in signal.sides)
        return sum(row[signal.counted] for row in rows) / scored
    if signal.passes is None:
        return None
    prompts, completions = (sum(len(row[name]) for row in rows) for name in ("prompt_ids", "rejected_ids"))
    return signal.passes * (prompts + completions) / completions


def agreement(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None, *, samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`report` of signals by target, for each target that the rows hold.

    Args:
        rows: with `prompt_ids`, `rejected_ids`, `rejected_<signal>`, and `first_error` or `critical_index` (−1 or None
            where unknown).
        names: registered signals; all that the rows hold if absent.

    Raises:
        ContractError: no column of a signal, or no target.
        ValueError: a signal that is not in the table, so that its suspicious end is not known.
    """
    columns = [
        column.removeprefix("rejected_")
        for column, value in rows[0].items()
        if column.startswith("rejected_") and isinstance(value, list) and all(isinstance(v, float) for v in value)
    ]
    signals = [get(name) for name in (names or columns)]
    for signal in signals:
        if signal.name not in columns:
            raise ContractError(f"No stage has a column `rejected_{signal.name}`; score it with {signal.command}.")
    targets = {name: [row[name] for row in rows] for name in TARGETS if name in rows[0]}
    if not targets:
        raise ContractError(
            "No stage has a target column, `first_error` or `critical_index`; make one with `tokalign score rollout`."
        )
    costs = {s.name: cost for s in signals if (cost := tokens_per_scored_token(s, rows)) is not None}
    results = {}
    for target, places in targets.items():
        scores = {s.name: [s.suspicion(np.asarray(row[f"rejected_{s.name}"])) for row in rows] for s in signals}
        if target == "critical_index":  # the target is made from it
            scores.pop("rollout_accuracy", None)
        elif "critical_index" in targets:  # the paper's reading of the rollouts: one token, or none
            scores["rollout critical token"] = [
                np.asarray([0.0 if t == row["critical_index"] else 1.0 for t in range(len(row["rejected_ids"]))])
                for row in rows
            ]
            if "rollout_accuracy" in costs:
                costs["rollout critical token"] = costs["rollout_accuracy"]
        results[target] = report(scores, places, costs=costs, samples=samples, seed=seed)
    return results


_MEASURES = (("auroc", "AUROC"), ("hit1", "hit@1"), ("hit_within_1", "hit within 1"))


def print_report(result: Mapping[str, Any], title: str, console: Console | None = None) -> None:
    """One line a signal: every measure with its interval, and the cost."""
    table = Table("signal", *(label for _, label in _MEASURES), "tokens / scored token", title=title)
    for name, entry in result["signals"].items():
        cells = [f"{entry[k]:.3f} [{entry[f'{k}_ci95'][0]:.3f}, {entry[f'{k}_ci95'][1]:.3f}]" for k, _ in _MEASURES]
        cost = entry["tokens_per_scored_token"]
        table.add_row(name, *cells, "unknown" if cost is None else f"{cost:,.1f}")
    table.caption = (
        f"{result['solutions']:,} wrong solutions, {result['tokens']:,} tokens; {result['unknown']:,} without"
    )
    (console or Console()).print(table)


def plot_reports(results: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """PNG: one row of panels a target, one panel a measure, one bar a signal with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(_MEASURES), squeeze=False)
    for panels, (target, result) in zip(grid, results.items(), strict=True):
        names = list(result["signals"])
        for axes, (key, label) in zip(panels, _MEASURES, strict=True):
            values = [result["signals"][name][key] for name in names]
            intervals = [result["signals"][name][f"{key}_ci95"] for name in names]
            spread = [
                [max(0.0, v - low) for v, (low, _) in zip(values, intervals, strict=True)],
                [max(0.0, high - v) for v, (_, high) in zip(values, intervals, strict=True)],
            ]
            axes.barh(names, values, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
            axes.set(xlim=(0, 1.02), title=f"{label} · {target}")
            axes.invert_yaxis()
    figure.savefig(path, dpi=150)
