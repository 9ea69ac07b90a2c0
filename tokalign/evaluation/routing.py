"""Accuracy of routed pairs against what they cost, from stages of `tokalign generate` on the same problems.

Two costs (R2R, arXiv 2505.21600): the paper's average activated parameters, which counts a token for the model that
wrote it, and a full cost, parameters × positions of everything that ran. Beside token routing stands *query-level*
routing: whole problems go to the LLM, those first on which the SLM's answer has the lowest mean log-prob.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from tokalign.prompts import RECORD
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of
from tokalign.statistics import accuracy, paired_bootstrap


def load_run(folder: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Rows and manifest of a finished stage of `tokalign generate` with one completion a problem.

    Raises:
        ContractError: another job's stage, several completions a problem, or answers that were not verified.
    """
    rows = load_stage(folder, stage="rollouts")
    manifest = manifest_of(rows) or {}
    if "routing" not in manifest:
        raise ContractError(f"{folder} is not a stage of `tokalign generate`; generate it with that.")
    if len(set(rows["id"])) != len(rows):
        raise ContractError(f"{folder} has several completions a problem; generate it with --num_rollouts 1.")
    if None in rows["correct"]:
        raise ContractError(f"{folder} has problems without an `answer`, so nothing was verified; leave them out.")
    return rows, manifest


def same_prompts(run: str | Path, manifest: Mapping[str, Any], other: str | Path, others: Mapping[str, Any]) -> None:
    """Refuse to compare runs whose prompts were rendered differently, where both say how.

    Raises:
        ContractError: they were.
    """
    if RECORD not in manifest or RECORD not in others:
        return
    first, second = ({k: v for k, v in one[RECORD].items() if k != "date"} for one in (manifest, others))
    if first != second:
        raise ContractError(
            f"{run} and {other} rendered their prompts differently ({first}, {second}); generate both with the same "
            "--prompt_format and --chat_template_kwargs."
        )


def run_summary(folder: str | Path, llm_run: str | Path | None = None) -> dict[str, Any]:
    """Accuracy with its interval, LLM rate, costs and speed of one run; paired with the LLM's own run if given."""
    rows, manifest = load_run(folder)
    routing, parameters = manifest["routing"], manifest["parameters"]
    result = {
        "policy": parameters["policy"],
        "threshold": parameters["threshold"],
        **accuracy([bool(c) for c in rows["correct"]]),
        **{
            name: routing.get(name)
            for name in (
                "llm_rate",
                "activated_parameters",
                "full_cost",
                "weight_reads",
                "tokens_per_second",
                "handoffs",
                "parameters",
            )
        },
    }
    if llm_run is not None:
        other, other_manifest = load_run(llm_run)
        same_prompts(folder, manifest, llm_run, other_manifest)
        result["minus_llm"] = paired_bootstrap(_outcomes(rows), _outcomes(other))
    return result


def query_level(slm_run: str | Path, llm_run: str | Path, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Query-level routing at LLM rates: the problems that the SLM is least sure of are answered by the LLM instead.

    The SLM answers every problem first, since its own mean log-prob is what decides.

    Args:
        slm_run, llm_run: stages of the two models alone, on the same problems.
        rates: most tokens of the final answers that the LLM may have written, as shares.

    Returns:
        For each rate `accuracy`, `n`, `ci95`, `llm_rate`, `activated_parameters`, `full_cost`.

    Raises:
        ContractError: the runs do not hold the same problems.
    """
    slm, slm_manifest = load_run(slm_run)
    llm, llm_manifest = load_run(llm_run)
    same_prompts(slm_run, slm_manifest, llm_run, llm_manifest)
    large = {row["id"]: row for row in llm.select_columns(["id", "correct", "written_by", "llm_positions"])}
    if set(large) != set(slm["id"]):
        raise ContractError(f"{slm_run} and {llm_run} hold other problems; generate both on the same.")
    small = slm.select_columns(["id", "correct", "written_by", "logprobs", "slm_positions"]).to_list()
    small.sort(key=lambda row: sum(row["logprobs"]) / len(row["logprobs"]))
    sizes = slm_manifest["routing"]["parameters"]
    points = []
    for rate in rates:
        tokens = {"slm": sum(len(row["written_by"]) for row in small), "llm": 0}
        right, positions = sum(bool(row["correct"]) for row in small), 0
        for row in small:  # as many as the rate allows, the least sure first
            other = large[row["id"]]
            own, new = len(row["written_by"]), len(other["written_by"])
            if tokens["llm"] + new > rate * (tokens["slm"] - own + tokens["llm"] + new):
                break
            tokens["slm"] -= own
            tokens["llm"] += new
            right += bool(other["correct"]) - bool(row["correct"])
            positions += other["llm_positions"]
        total = tokens["slm"] + tokens["llm"]
        work = sum(row["slm_positions"] for row in small) * sizes["slm"] + positions * sizes["llm"]
        points.append(
            {
                **accuracy([True] * right + [False] * (len(small) - right)),
                "llm_rate": tokens["llm"] / total,
                "activated_parameters": (tokens["slm"] * sizes["slm"] + tokens["llm"] * sizes["llm"]) / total,
                "full_cost": work / total,
            }
        )
    return points


def routing_points(
    slm_run: str | Path, llm_run: str | Path, runs: Iterable[Sequence[str]], query_rates: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
    """What `print_routing` and `plot_routing` show: by name the points of one line, `run_summary` or `query_level`.

    Args:
        slm_run, llm_run: stages of the two models alone.
        runs: name and folder of each routed stage; runs of one name are points of one line.
        query_rates: LLM rates of query-level routing.
    """
    points = {"SLM only": [run_summary(slm_run, llm_run)], "LLM only": [run_summary(llm_run)]}
    for name, folder in runs:
        points.setdefault(name, []).append(run_summary(folder, llm_run))
    return points | {"query-level": query_level(slm_run, llm_run, query_rates)}


def write_routing(points: Mapping[str, Sequence[Mapping[str, Any]]], folder: str | Path) -> None:
    """routing.json and routing.png."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_atomically(Path(folder) / "routing.json", json.dumps(points, indent=2) + "\n")
    plot_routing(points, Path(folder) / "routing.png")


def print_routing(points: Mapping[str, Sequence[Mapping[str, Any]]], console: Console | None = None) -> None:
    """A table, one line a point."""
    table = Table("", "LLM rate", "accuracy", "95 % interval", "activated", "full cost", "− LLM", title="routed pairs")
    for name, series in points.items():
        for point in series:
            low, high = point["ci95"]
            paired = point.get("minus_llm")
            difference = f"{100 * paired['difference']:+.1f}" if paired else ""
            table.add_row(
                name,
                f"{100 * point['llm_rate']:.1f} %",
                f"{100 * point['accuracy']:.1f} %",
                f"{100 * low:.1f} – {100 * high:.1f}",
                f"{point['activated_parameters']:,.0f}",
                f"{point['full_cost']:,.0f}",
                difference,
            )
    (console or Console()).print(table)


def plot_routing(points: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Figure: accuracy against the LLM rate and against the full cost, one line a policy with 95 % intervals.

    Series of one point (the two models alone) are drawn as dashed lines on the left.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    most = max(p["llm_rate"] for series in points.values() if len(series) > 1 for p in series)
    for k, (name, series) in enumerate(points.items()):
        ordered = sorted(series, key=lambda p: p["llm_rate"])
        values = [100 * p["accuracy"] for p in ordered]
        spread = [[100 * abs(p["ci95"][side] - p["accuracy"]) for p in ordered] for side in (0, 1)]
        color = f"C{k}"
        if len(ordered) == 1:
            left.axhline(values[0], color=color, linestyle="--", linewidth=1, label=f"{name}: {values[0]:.1f} %")
        else:
            rates = [100 * p["llm_rate"] for p in ordered]
            left.errorbar(rates, values, yerr=spread, fmt="o-", color=color, capsize=2, label=name)
        costs = [p["full_cost"] / 1e6 for p in ordered]
        right.errorbar(costs, values, yerr=spread, fmt="o-", color=color, capsize=2, label=name)
    left.set(xlabel="tokens written by the LLM (%)", ylabel="accuracy (%)", xlim=(0, 100 * most * 1.1))
    right.set(xlabel="full cost (million parameters × positions a token)")
    left.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.66))
    figure.savefig(path, dpi=150)


def _outcomes(rows: Dataset) -> dict[str, float]:
    return {name: float(correct) for name, correct in zip(rows["id"], rows["correct"], strict=True)}
