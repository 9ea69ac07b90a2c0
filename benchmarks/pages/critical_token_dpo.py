"""docs/results/critical_token_dpo.md: Table 3, training dynamics, pass@k and cost of arXiv 2411.19943v3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import (
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

NEEDS = ("critical_dpo_ledger", "token_credit")
OURS = "critical-token DPO"
EQUAL = f"{OURS} at DPO's rate"
TABLE_3 = {  # averages over three models: GSM8K, MATH500
    "base": (67.0, 30.1),
    "SFT": (70.1, 30.9),
    "SFT→DPO": (71.3, 30.5),
    "SFT→TDPO": (71.7, 30.8),
    "DPO": (70.5, 29.4),
    "RPO": (75.4, 32.3),
    OURS: (77.2, 33.4),
}
INTRO = """Critical-token DPO ([arXiv 2411.19943](https://arxiv.org/abs/2411.19943), ICML 2025; [how it works](../critical_token_dpo.md))
in the ledger world: a base of 0.16 M parameters, its own rollouts, pairs and contrastive scores. Every seed has its own problems,
rollouts, pairs, adapters, training order and test problems; all methods of a seed share them. Every method had the same grid of
learning rates on validation problems with pairs of their own; the test problems chose nothing ([log](../log.md): some were read twice)."""


def page(runs: dict[str, Run]) -> str:
    results = runs["critical_dpo_ledger"]["results"]
    arguments, methods = results["arguments"], results["methods"]
    lines = header("Critical-token DPO", INTRO, runs)
    lines += [
        "## Table 3",
        "",
        f"Per cent of {arguments['test_problems']} test problems a seed, mean over {arguments['seeds']} seeds (95 % interval by Student's t)."
        " The last row is not tuned: it stands beside DPO at one learning rate.",
        "",
    ]
    rates = results["validation"]["learning_rate"]
    rates = rates | {EQUAL: rates["DPO"]}
    rows = []
    for method, entry in methods.items():
        paper = " / ".join(f"{value:.1f}" for value in TABLE_3[method]) if method in TABLE_3 else "–"
        rate = f"{rates[method]:g}" if method in rates else ""
        rows.append([method, paper, rate, percent(entry["greedy"]), percent(entry["sampled"])])
    lines += markdown_table(("", "paper, GSM8K / MATH500", "learning rate", "greedy", "sampled"), rows)
    lines += [
        "",
        *claims_table(_order(results)),
        "",
        "![Accuracy](figures/critical_token_dpo_accuracy.png)",
        "",
    ]
    lines += grid_section(results["validation"], "Greedy accuracy, per cent,", lambda cell: cell["greedy"])
    lines += _dynamics(results) + _pass_at_k(results) + _cost(results)
    if "token_credit" in runs:
        lines += _detection(runs["token_credit"]["results"])
    return "\n".join(lines)


def _order(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's order as claims, greedy accuracy."""
    claims = []
    for entry in results["differences"]:
        better, worse = entry["better"], entry["worse"]
        if {better, worse} <= set(TABLE_3):
            gaps = [a - b for a, b in zip(TABLE_3[better], TABLE_3[worse], strict=True)]
            paper = " / ".join(f"{gap:+.1f}" for gap in gaps)
            if max(gaps) < 0:  # the paper itself has it the other way round
                continue
        else:
            paper = "–"
        claims.append({"claim": f"{better} > {worse}", "paper": paper, "entry": entry["greedy"], "unit": "points"})
    return claims


def _dynamics(results: dict[str, Any]) -> list[str]:
    methods, lines = results["methods"], ["## Log-probs during training", ""]
    rows = [
        [method, number(entry["chosen_change"], 2, "+"), number(entry["rejected_change"], 2, "+")]
        for method, entry in methods.items()
        if method != "base"
    ]
    lines += [
        "Change of Σ log π against the base after training, mean over the training pairs, nats. A higher learning rate moves all of them",
        "further, so critical-token DPO is there at DPO's rate as well.",
        "",
        *markdown_table(("", "chosen", "rejected"), rows),
        "",
    ]
    gaps = {d["better"]: d for d in results["differences"] if d["worse"] == "DPO"}
    dpo, ours = methods["DPO"]["chosen_change"], methods[OURS]
    claims = [
        {
            "claim": "DPO lowers the chosen log-prob",
            "paper": "yes",
            "entry": _negative(dpo),
            "unit": "nats",
        },
        *(
            {
                "claim": f"{method} keeps it higher than DPO",
                "paper": "yes",
                "entry": gaps[method]["chosen_change"],
                "unit": "nats",
            }
            for method in (OURS, EQUAL)
        ),
        {
            "claim": f"{OURS} lowers the rejected log-prob",
            "paper": "yes",
            "entry": _negative(ours["rejected_change"]),
            "unit": "nats",
        },
    ]
    return [*lines, *claims_table(claims), "", "![Log-probs](figures/critical_token_dpo_dynamics.png)", ""]


def _negative(entry: dict[str, Any]) -> dict[str, Any]:
    """The same figure with the sign turned: how far something fell."""
    low, high = entry["ci95"]
    return entry | {"mean": -entry["mean"], "ci95": [None, None] if low is None else [-high, -low]}


def _pass_at_k(results: dict[str, Any]) -> list[str]:
    curves, estimates = results["pass_at_k"], results["estimates"]
    last = max(map(int, curves["with"]))
    rows = [
        [f"pass@{k}", "0" if kind == "with" else there, f"{kind} the critical token", percent(curves[kind][str(k)])]
        for k, there in ((1, "≈ 30"), (last, "> 90"))
        for kind in ("with", "without")
    ]
    claims = [
        {
            "claim": f"without the critical token pass@{k} is higher",
            "paper": paper,
            "entry": results["freed"][str(k)],
            "unit": "points",
        }
        for k, paper in ((1, "≈ +30"), (last, "> +90"))
    ]
    return [
        "## With and without the critical token",
        "",
        f"{sum(estimates['rows']['values']):.0f} wrong answers, of which {sum(estimates['with_critical_token']['values']):.0f} have a critical"
        f" token by the rollout estimate ({last} continuations of every prefix). The continuations for pass@k are drawn anew, not those"
        " that chose the token, so with the token it need not be 0. Per cent.",
        "",
        *markdown_table(("", "paper", "prefix", "here"), rows),
        "",
        *claims_table(claims),
        "",
        "![pass@k](figures/critical_token_dpo_pass_at_k.png)",
        "",
    ]


def _cost(results: dict[str, Any]) -> list[str]:
    estimates = results["estimates"]
    passes, rollout, contrast = (
        estimates[key]["mean"] for key in ("rollout_passes_an_answer", "rollout_tokens", "contrast_tokens")
    )
    rows = [
        ["contrastive estimate", f"{contrast:.1f}", "2"],
        ["rollout estimate", f"{rollout:,.0f}", f"{passes:,.0f}"],
        ["contrast / rollout", f"{contrast / rollout:.2%}", f"{2 / passes:.4%} (paper 0.002 %)"],
    ]
    return [
        "## Cost of the contrast",
        "",
        "Tokens through the model for every scored token, and forward passes for every answer (a generated token is one). Training the"
        " two adapters is not counted. Our answers have about 30 tokens; the ratio of tokens falls with the length, that of passes with its square.",
        "",
        *markdown_table(("", "tokens a scored token", "forward passes an answer"), rows),
        "",
    ]


def _detection(results: dict[str, Any]) -> list[str]:
    part = results["targets"]["first_error"]
    rows = [
        [name, number(entry["auroc"], 3), number(entry["hit1"], 3), f"{entry['tokens_per_scored_token']:.1f}"]
        for name, entry in part["signals"].items()
    ]
    claims = [
        {
            "claim": f"{d['better']} finds the first error better than {d['worse']}",
            "paper": "–",
            "entry": d["auroc"],
            "unit": "AUROC",
            "digits": 3,
        }
        for d in part["differences"]
        if d["better"] == "contrastive score"
    ]
    plain = next(
        d["auroc"] for d in part["differences"] if d["worse"] == "log-prob" and d["better"] == "contrastive score"
    )
    word = {HOLDS: "better than", OPEN: "not to be told from"}.get(verdict(plain), "worse than")
    return [
        "## Does the score find the error?",
        "",
        f"Against the true first wrong token of {sum(part['solutions']):,} wrong solutions: AUROC and hit@1, the share of them whose lowest"
        f" score is at that token (chance 0.5 and about 0.03). By AUROC the contrastive score is {word} the plain log-prob of the base"
        f" ({number(plain, 3, '+')}), which costs half as much.",
        "",
        *markdown_table(("signal", "AUROC", "hit@1", "tokens a scored token"), rows),
        "",
        *claims_table(claims),
        "",
    ]


def figures(runs: dict[str, Run], folder: Path) -> None:
    results = runs["critical_dpo_ledger"]["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), ("greedy", "sampled"), strict=True):
        error_bars(axis, {m: entry[key] for m, entry in results["methods"].items()})
        axis.axvline(100 * results["methods"]["base"][key]["mean"], color="grey", linestyle=":")
        axis.set(title=f"{key} accuracy, {results['arguments']['seeds']} seeds", xlabel="per cent")
    figure.savefig(folder / "critical_token_dpo_accuracy.png", dpi=110)

    curves = results["dynamics"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, side in zip(figure.subplots(1, 2), ("chosen", "rejected"), strict=True):
        for method in (name for name in curves if name != "step"):
            axis.plot(curves["step"], curves[method][side], label=method)
        axis.axhline(0, color="grey", linestyle=":")
        axis.set(title=f"{side} answers", xlabel="step", ylabel="Δ Σ log π, nats")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(folder / "critical_token_dpo_dynamics.png", dpi=110)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for kind, by_k in results["pass_at_k"].items():
        steps = sorted(map(int, by_k))
        entries = [by_k[str(k)] for k in steps]
        (line,) = axis.plot(steps, [100 * e["mean"] for e in entries], marker="o", label=f"{kind} the critical token")
        if entries[0]["ci95"][0] is not None:
            low, high = ([100 * min(100, max(0, e["ci95"][i])) for e in entries] for i in (0, 1))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axis.set(xscale="log", xticks=steps, xticklabels=steps, xlabel="k", ylabel="pass@k, per cent", ylim=(-2, 102))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(folder / "critical_token_dpo_pass_at_k.png", dpi=110)
