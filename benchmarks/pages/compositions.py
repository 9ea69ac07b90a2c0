"""docs/results/compositions.md: token signals in places that no paper put them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import (
    FAILS,
    HOLDS,
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

NEEDS = ("compositions",)
DPO, REFERENCE = "none (plain DPO)", "contrastive score"
OWN, CONTRAST = "T-REG, its own reward", "T-REG, contrastive score as reward"
SOURCES = {  # where the weight 1 − s_t of a rejected token comes from
    DPO: "1 for every token",
    REFERENCE: "s: two adapters' contrast ([arXiv 2411.19943](https://arxiv.org/abs/2411.19943), the paper's own)",
    "rollout estimate": "s: share of right continuations of the prefix",
    "self-generated reward": "s: T-REG's reward by contrastive prompting + 0.5",
    "entropy": "s: 1 − entropy / the answer's highest",
    "log-prob": "s: the policy's probability of the token",
    "LLM disagrees": "s: 0 where the larger model would have written another token, {agreed:g} elsewhere (routing labels by prefill)",
    "random": "s: uniform in [0, 1]",
    OWN: "no weights; rewards by contrastive prompting ([arXiv 2412.02685](https://arxiv.org/abs/2412.02685))",
    CONTRAST: "no weights; reward: s of the contrast − 0.5",
}
INTRO = """Every token signal is a column of one shape, so each can stand where another method's stood. Critical-token DPO with the weights of
other signals, T-REG with the contrastive score as its reward, and a router as a detector of the critical token, in the ledger world: a
base of 0.16 M parameters, its own rollouts and pairs. Every seed has its own problems, rollouts, pairs, adapters, training order and test
problems; all rows of a seed train on the same pairs, in the same order, for the same number of epochs. Every row had the same grid of
learning rates on validation problems with pairs of their own; the test problems were read once. No paper claims any of this but that the
contrastive score beats plain DPO, and that T-REG's own rewards help: the rest is reported as found."""


def page(runs: dict[str, Run]) -> str:
    results = runs["compositions"]["results"]
    lines = header("Compositions that no paper tried", INTRO, runs)
    return "\n".join([*lines, *_table(results), *_detection(results)])


def _table(results: dict[str, Any]) -> list[str]:
    arguments, methods = results["arguments"], results["methods"]
    rates, weights = results["validation"]["learning_rate"], results["mean_weight"]
    gaps = {(d["better"], d["worse"]): d for d in results["differences"]}
    rows = []
    for name, entry in methods.items():
        row = [
            name,
            SOURCES[name].format(agreed=results["agreed"]) if name in SOURCES else "",
            f"{weights[name]['mean']:.2f}" if name in weights else "",
            f"{rates[name]:g}" if name in rates else "",
            percent(entry["greedy"]),
            percent(entry["sampled"]),
        ]
        for other in (DPO, REFERENCE):
            row.append(_gap(gaps[name, other]["greedy"]) if (name, other) in gaps else "")
        rows.append(row)
    lines = [
        "## One table",
        "",
        f"Per cent of {arguments['test_problems']} test problems a seed, mean over {arguments['seeds']} seeds (95 % interval by Student's t), after"
        f" training on {_range(results['pairs'])} pairs a seed. *Mean weight* is that of a rejected token: a signal that is high nearly"
        " everywhere also trains on less, which the learning rate makes up for in part. The last two columns are paired differences in greedy"
        f" accuracy, in points, and the verdict on the claim that the row is better: *{HOLDS}*: better; *{FAILS}*: worse.",
        "",
        *markdown_table(
            (
                "",
                "what it trains on",
                "mean weight",
                "learning rate",
                "greedy",
                "sampled",
                "against plain DPO",
                "against the contrastive score",
            ),
            rows,
        ),
        "",
        *(_count(gaps, other) for other in (DPO, REFERENCE)),
        "",
    ]
    if (CONTRAST, OWN) in gaps:
        claims = [
            {
                "claim": f"{CONTRAST} > {OWN}, {key}",
                "paper": "not tried",
                "entry": gaps[CONTRAST, OWN][key],
                "unit": "points",
            }
            for key in ("greedy", "sampled")
        ]
        lines += [*claims_table(claims), ""]
    lines += ["![Accuracy](figures/compositions_accuracy.png)", ""]
    return lines + grid_section(results["validation"], "Greedy accuracy, per cent,", lambda cell: cell["greedy"])


def _gap(entry: dict[str, Any]) -> str:
    return f"{percent(entry, '+')} **{verdict(entry)}**"


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _count(gaps: dict[tuple[str, str], dict[str, Any]], other: str) -> str:
    """How many rows are better, worse, or neither, in greedy accuracy."""
    rows = {better: verdict(entry["greedy"]) for (better, worse), entry in gaps.items() if worse == other}
    parts = []
    for word, what in ((HOLDS, "better"), (FAILS, "worse"), (OPEN, "not to be told apart")):
        names = [name for name, found in rows.items() if found == word]
        listed = f" ({', '.join(names)})" if names and word != OPEN else ""
        parts.append(f"{len(names)} {what}{listed}")
    return f"Against the row *{other}*, of {len(rows)}: {', '.join(parts)}.  "


def _detection(results: dict[str, Any]) -> list[str]:
    part = results["detection"]
    rows = [[name, number(entry["auroc"], 3), number(entry["hit1"], 3)] for name, entry in part["signals"].items()]
    claims = [
        {
            "claim": f"{d['better']} finds the first error better than {d['worse']}",
            "paper": "not tried",
            "entry": d["auroc"],
            "unit": "AUROC",
            "digits": 3,
        }
        for d in part["differences"]
    ]
    return [
        "## Who finds the first error",
        "",
        f"The same signals against the true first wrong token of {sum(part['solutions']):,} wrong answers of those pairs, beside token routers"
        " ([arXiv 2505.21600](https://arxiv.org/abs/2505.21600)) that were trained on the first errors of other problems' wrong answers. A router"
        " reads the policy's hidden state, logits and likeliest token *before* a token is chosen: it sees that an error is near, not whether it"
        " was made. The rollout estimate stays low after an error, so its lowest token need not be the first. AUROC and hit@1, mean over seeds.",
        "",
        *markdown_table(("signal", "AUROC", "hit@1"), rows),
        "",
        *claims_table(claims),
        "",
        "![First errors](figures/compositions_detection.png)",
        "",
    ]


def figures(runs: dict[str, Run], folder: Path) -> None:
    results = runs["compositions"]["results"]
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("greedy", "sampled"), strict=True):
        error_bars(axis, {name: entry[key] for name, entry in results["methods"].items()})
        axis.axvline(100 * results["methods"][DPO][key]["mean"], color="grey", linestyle=":")
        axis.set(title=f"{key} accuracy, {results['arguments']['seeds']} seeds", xlabel="per cent")
    figure.savefig(folder / "compositions_accuracy.png", dpi=110)

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (key, name) in zip(
        figure.subplots(1, 2, sharey=True), (("auroc", "AUROC"), ("hit1", "hit@1")), strict=True
    ):
        error_bars(axis, {n: entry[key] for n, entry in results["detection"]["signals"].items()}, scale=1)
        axis.set(title=f"{name} · true first wrong token", xlim=(-0.02, 1.02))
    figure.savefig(folder / "compositions_detection.png", dpi=110)
