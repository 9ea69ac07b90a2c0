"""docs/results/treg.md: the ablation table and the token credit of arXiv 2412.02685."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import (
    OPEN,
    Run,
    claims_table,
    error_bars,
    grid_section,
    header,
    markdown_table,
    number,
    percent,
    verdict,
)

NEEDS = ("treg_ledger", "token_credit")
PAPER = {  # AlpacaEval 2 LC, Arena-Hard; SimPO's rows are Gemma-2-9B's
    "DPO": (47.0, 35.9),
    "DPO + SFT on y_w": (46.0, 32.7),
    "T-REG, w fixed": (48.0, 35.1),
    "T-REG, r̂ of a trained DPO": (49.8, 36.9),
    "T-REG": (50.8, 40.3),
    "SimPO": (73.5, 63.0),
    "SimPO + T-REG": (74.5, 64.2),
}
TARGETS = {"first_error": "the true first wrong token", "critical_index": "the rollout estimate's critical token"}
SHORT = {"first_error": "first wrong token", "critical_index": "rollout estimate"}
INTRO = """T-REG ([arXiv 2412.02685](https://arxiv.org/abs/2412.02685), ACL 2025; [how it works](../treg.md)) in the ledger world: a
base of 0.16 M parameters, pairs of its own right and wrong rollouts, token rewards by contrastive prompting of a model of the
same size that has learned to rewrite drafts. Every seed has its own problems, rollouts, pairs, training order and test problems;
all methods of a seed share them. Every method had the same grid of learning rates on validation problems with pairs of their own;
the test problems were read once, but for those of "r̂ of a trained DPO" ([log](../log.md)). The paper's measures are win rates of a judge on open questions; ours is accuracy."""


def page(runs: dict[str, Run]) -> str:
    lines = header("T-REG", INTRO, runs) + _ablation(runs["treg_ledger"]["results"])
    if "token_credit" in runs:
        lines += _credit(runs["token_credit"]["results"])
    return "\n".join(lines)


def _ablation(results: dict[str, Any]) -> list[str]:
    arguments, rates = results["arguments"], results["validation"]["learning_rate"]
    rows = []
    for method, entry in results["methods"].items():
        paper = " / ".join(f"{value:.1f}" for value in PAPER[method]) if method in PAPER else "–"
        rate = f"{rates[method]:g}" if method in rates else ""
        rows.append([method, paper, rate, percent(entry["greedy"]), percent(entry["sampled"])])
    claims = []
    for entry in results["differences"]:
        gaps = [a - b for a, b in zip(PAPER[entry["better"]], PAPER[entry["worse"]], strict=True)]
        for key in ("greedy", "sampled"):
            claims.append(
                {
                    "claim": f"{entry['better']} > {entry['worse']}, {key}",
                    "paper": " / ".join(f"{gap:+.1f}" for gap in gaps),
                    "entry": entry[key],
                    "unit": "points",
                }
            )
    open_ones = [claim for claim in claims if verdict(claim["entry"]) == OPEN]
    widest = max((claim["entry"]["ci95"][1] or 0 for claim in open_ones), default=0)
    lines = [
        "## The ablation",
        "",
        f"Per cent of {arguments['test_problems']} test problems a seed, mean over {arguments['seeds']} seeds (95 % interval by Student's"
        " t). The paper's columns are AlpacaEval 2 LC / Arena-Hard, of Gemma-2-9B in the SimPO rows and of Llama-3-8B in the others.",
        "",
        *markdown_table(("", "paper", "learning rate", "greedy", "sampled"), rows),
        "",
        *claims_table(claims),
        "",
    ]
    if open_ones:
        lines += [
            f"Where it cannot be told, the intervals leave room for at most {100 * widest:.1f} points in the claim's direction.",
            "",
        ]
    lines += ["![Accuracy](figures/treg_ablation.png)", ""]
    return lines + grid_section(results["validation"], "Greedy accuracy, per cent,", lambda cell: cell["greedy"])


def _credit(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Token credit",
        "",
        "Which signal finds the token that breaks a wrong solution. The paper shows examples and no figures; its claim is that rewards by"
        " contrastive prompting are better credit than DPO's implicit ones.",
        "",
    ]
    for target, label in TARGETS.items():
        part = results["targets"][target]
        rows = [
            [name, number(entry["auroc"], 3), number(entry["hit1"], 3), f"{entry['tokens_per_scored_token']:.1f}"]
            for name, entry in part["signals"].items()
        ]
        claims = [
            {"claim": f"{d['better']} > {d['worse']}", "paper": "yes" if "implicit" in d["worse"] else "–"}
            | {"entry": d["auroc"], "unit": "AUROC", "digits": 3}
            for d in part["differences"]
            if d["better"].startswith("T-REG")
        ]
        lines += [
            f"**Against {label}**, {sum(part['solutions']):,} wrong solutions:",
            "",
            *markdown_table(("signal", "AUROC", "hit@1", "tokens a scored token"), rows),
            "",
            *claims_table(claims),
            "",
        ]
    return [*lines, "![Token credit](figures/treg_credit.png)", ""]


def figures(runs: dict[str, Run], folder: Path) -> None:
    results = runs["treg_ledger"]["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("greedy", "sampled"), strict=True):
        error_bars(axis, {m: entry[key] for m, entry in results["methods"].items()})
        axis.axvline(100 * results["methods"]["DPO"][key]["mean"], color="grey", linestyle=":")
        axis.set(title=f"{key} accuracy, {results['arguments']['seeds']} seeds", xlabel="per cent")
    figure.savefig(folder / "treg_ablation.png", dpi=110)
    if "token_credit" in runs:
        targets = runs["token_credit"]["results"]["targets"]
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots(len(TARGETS), 2)
        for row, target in zip(axes, TARGETS, strict=True):
            for axis, (key, name) in zip(row, (("auroc", "AUROC"), ("hit1", "hit@1")), strict=True):
                entries = {n: entry[key] for n, entry in targets[target]["signals"].items()}
                error_bars(axis, entries, scale=1)
                axis.set(title=f"{name} · {SHORT[target]}", xlim=(-0.02, 1.02))
        figure.savefig(folder / "treg_credit.png", dpi=110)
