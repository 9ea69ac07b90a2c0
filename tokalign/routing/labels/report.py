"""The report of routing labels: shares of each class by split, where in an answer the models differ, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from tokalign.routing.labels.classes import DIVERGENT, IDENTICAL, LABELS, NEUTRAL
from tokalign.routing.labels.verdicts import DISAGREE, NO_VERDICT
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

BINS = 20  # of the relative position in an answer
_COLOURS = {"identical": "#999999", "neutral": "#56B4E9", "divergent": "#D55E00", "invalid": "#000000"}


def feature_bytes_per_token(hidden_size: int, top_k: int) -> int:
    """Hidden state and logits in 2 bytes a number, the SLM's choice and its entropy in 4 each."""
    return 2 * hidden_size + 2 * top_k + 8


def label_shares(folder: str | Path) -> dict[str, Any]:
    """Counts of each class in a labels stage, and by relative position, streamed.

    Returns:
        `responses`, `tokens`, `counts` and `shares` by class, `by_position`: for each of `BINS` equal parts of an
        answer its `tokens`, and how many of them `differ` (any class but identical) and are `divergent`.
    """
    rows = load_stage(folder, stage="routing_labels").select_columns(["label"]).with_format("arrow")
    counts = dict.fromkeys(LABELS, 0)
    bins = {"tokens": np.zeros(BINS, int), "differ": np.zeros(BINS, int), "divergent": np.zeros(BINS, int)}
    for table in rows.iter(batch_size=1000):
        column = table["label"].combine_chunks()
        labels = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        position = np.arange(len(labels)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        part = position * BINS // np.repeat(lengths, lengths)
        for label in counts:
            counts[label] += int((labels == label).sum())
        bins["tokens"] += np.bincount(part, minlength=BINS)
        bins["differ"] += np.bincount(part[labels != IDENTICAL], minlength=BINS)
        bins["divergent"] += np.bincount(part[labels == DIVERGENT], minlength=BINS)
    total = sum(counts.values())
    return {
        "responses": len(rows),
        "tokens": total,
        "counts": {LABELS[label]: count for label, count in counts.items()},
        "shares": {LABELS[label]: count / total for label, count in counts.items()},
        "by_position": {key: values.tolist() for key, values in bins.items()},
    }


def build_label_report(folders: Mapping[str, Path], splits: Mapping[str, Path], *, swap_order: bool) -> dict[str, Any]:
    """Everything that is known of a finished labelling.

    Args:
        folders: of the stages "answers", "prefill" and "branches".
        splits: of the labels stages that exist.
        swap_order: whether the judge was asked in both orders.

    Returns:
        `splits` (`label_shares` of each), `invalid` (tokens by reason), `judge` (with `swap_order`: verdicts that both
        orders agreed on or not), `stages` (tokens, seconds of work and tokens a second), `features` (bytes by
        measurement and by formula).
    """
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    report: dict[str, Any] = {"splits": {name: label_shares(folder) for name, folder in splits.items()}}
    invalid: dict[str, int] = {}
    seconds = 0.0
    for folder in splits.values():
        manifest = read_manifest(folder)
        seconds += manifest["seconds"]
        # labels of an earlier version count their tokens under `dropped`
        for reason, count in {**manifest["dropped"], **manifest.get("left_out", {})}.items():
            if reason.startswith(_INVALID):
                invalid[reason.removeprefix(_INVALID)] = invalid.get(reason.removeprefix(_INVALID), 0) + count
    report["invalid"] = invalid
    told = sum(split["counts"][LABELS[label]] for split in report["splits"].values() for label in (NEUTRAL, DIVERGENT))
    if swap_order:
        disagree = invalid.get(DISAGREE, 0)
        both = told + disagree
        report["judge"] = {
            "agree": told,
            "disagree": disagree,
            "disagreement": disagree / both if both else None,
            "no_verdict": invalid.get(NO_VERDICT, 0),
        }
    prefill = load_stage(folders["prefill"])
    tokens = {
        "answers": _tokens(prefill, "completion_ids"),
        "prefill": _tokens(prefill, "prompt_ids") + _tokens(prefill, "completion_ids"),
        "branches": 0,
    }
    if manifests["branches"]["rows"]:
        branches = load_stage(folders["branches"])
        # The first token of a branch is given, not written
        columns = [c for c in ("slm_branch_ids", "llm_branch_ids") if c in manifests["branches"]["written"]]
        tokens["branches"] = sum(_tokens(branches, column) - len(branches) for column in columns)
    report["stages"] = {
        name: {
            "tokens": count,
            "seconds": manifests[name]["seconds"],
            "tokens_per_second": round(count / max(manifests[name]["seconds"], 1e-3), 1),
        }
        for name, count in tokens.items()
    }
    report["stages"]["labels"] = {
        "verdicts": told + sum(invalid.get(reason, 0) for reason in (DISAGREE, NO_VERDICT)),
        "seconds": round(seconds, 3),
    }
    features = manifests["prefill"]
    held = sum(
        (folders["prefill"] / features["features"] / name).stat().st_size for name in set(prefill["features_file"])
    )
    report["features"] = {
        "bytes": held,
        "tokens": tokens["answers"],
        "bytes_per_million_tokens": round(held / tokens["answers"] * 1e6),
        "formula_per_million_tokens": feature_bytes_per_token(features["hidden_size"], features["top_k"]) * 10**6,
    }
    return report


_INVALID = "invalid: "


def invalid_count(reason: str) -> str:
    """The name under which a labels job counts tokens that it calls invalid."""
    return f"{_INVALID}{reason}"


def _tokens(rows: Dataset, column: str) -> int:
    tables = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.list_value_length(table[column])).as_py() for table in tables)


def print_label_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """One line a split, then one a stage."""
    console = console or Console()
    table = Table("split", "responses", "tokens", *LABELS.values(), title="Routing labels", title_justify="left")
    for name, split in report["splits"].items():
        shares = [f"{split['shares'][label]:.2%}" for label in LABELS.values()]
        table.add_row(name, f"{split['responses']:,}", f"{split['tokens']:,}", *shares)
    console.print(table)
    for reason, count in report["invalid"].items():
        console.print(f"invalid: {reason}: {count:,} tokens")
    if (judge := report.get("judge")) and judge["disagreement"] is not None:
        console.print(f"the judge's two orders disagree on {judge['disagreement']:.1%} of the differences")
    rates = [
        f"{name} {stage['tokens_per_second']:,.0f}" for name, stage in report["stages"].items() if "tokens" in stage
    ]
    console.print(f"tokens a second of work: {', '.join(rates)}")
    console.print(f"features: {report['features']['bytes_per_million_tokens'] / 1e6:,.1f} MB per million tokens")


def plot_label_report(report: Mapping[str, Any], path: str | Path) -> None:
    """PNG: shares of the classes by split, and the share of differing and of divergent tokens along an answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    bars, line = figure.subplots(1, 2)
    names = list(report["splits"])
    left = np.zeros(len(names))
    for label in LABELS.values():
        shares = np.array([report["splits"][name]["shares"][label] for name in names])
        bars.barh(names, shares, left=left, color=_COLOURS[label], label=label)
        left += shares
    bars.set(xlim=(0, 1), xlabel="share of tokens")
    bars.invert_yaxis()
    bars.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    parts = [split["by_position"] for split in report["splits"].values()]
    total = {key: np.sum([part[key] for part in parts], axis=0) for key in ("tokens", "differ", "divergent")}
    middle = (np.arange(BINS) + 0.5) / BINS
    seen = total["tokens"] > 0
    for key, colour, name in (("differ", "#56B4E9", "differs"), ("divergent", "#D55E00", "divergent")):
        line.plot(middle[seen], total[key][seen] / total["tokens"][seen], "o-", color=colour, label=name, markersize=3)
    line.set(xlabel="position in the answer, as a share of it", ylabel="share of tokens", xlim=(0, 1), ylim=(0, None))
    line.legend(frameon=False)
    figure.savefig(path, dpi=150)
