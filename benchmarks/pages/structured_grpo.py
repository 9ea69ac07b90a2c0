"""docs/results/structured_grpo.md: methods, ablation, curriculum and transfer tables of arXiv 2512.00319."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import Run, claims_table, error_bars, grid_section, header, markdown_table, percent, verdict
from tokalign.view.curriculum import COLOURS, COMPONENTS, DASHED

NEEDS = ("structured_ledger",)
LITERAL = "GRPO, literal reward"
CONSTRAINED = "SFT, constrained decoding"
SHOWN = {"validity": "valid", "structure": "structure", "content_f1": "content F1", "exact_match": "exact match"}
PAPER: dict[str, dict[str, float]] = {  # the recipes task, per cent
    "SFT": {"validity": 72.1, "structure": 65.4, "content_f1": 80.0},
    CONSTRAINED: {"validity": 100.0, "structure": 99.8, "content_f1": 79.5},
    "DPO": {"validity": 88.4, "structure": 82.5, "content_f1": 82.0},
    "GRPO": {"validity": 92.1, "structure": 89.7, "content_f1": 84.5},
    "GRPO − validity": {"validity": 68.3, "structure": 85.2, "content_f1": 83.0},
    "GRPO − structure": {"validity": 90.5, "structure": 45.6, "content_f1": 85.0},
    "GRPO − format": {"validity": 88.2, "structure": 87.1, "content_f1": 84.2},
}
PAPER_SLOWDOWN = 90.6 / 15.2  # tokens a second, free over constrained
PAPER_TRANSFER = {"base": (15.2, 25.5), "SFT": (58.2, 70.1), "GRPO": (85.4, 91.2)}  # structure, GSM8K-JSON and tools
ABLATED = {  # row -> the figure that the component stands for
    "GRPO − validity": "validity",
    "GRPO − structure": "structure",
    "GRPO − format": "validity",
    "GRPO − schema": "compliance",
    "GRPO − correctness": "content_f1",
}
NAMES = SHOWN | {"compliance": "schema"}
INTRO = """GRPO with structured-output rewards (RL-Struct, [arXiv 2512.00319](https://arxiv.org/abs/2512.00319); a later note says that its
authors withdrew it; [how it works](../structured_grpo.md)) in the ledger world: a base of 0.16 M parameters that has read sloppy
JSON in two renderings, SFT on a few clean documents of one of them, and from there DPO (best against worst of eight samples by the
reward) and GRPO. Every seed has its own problems, SFT documents, pairs, rollouts and test problems; all methods of a seed share
them. SFT, DPO, GRPO and GRPO with the paper's literal reward had the same grid of learning rates on validation problems, chosen by
structure × content F1; the ablations take GRPO's rate, so theirs is not tuned. The test problems were read once. Whoever starts
from an SFT model starts from the tuned one."""


def page(runs: dict[str, Run]) -> str:
    results = runs["structured_ledger"]["results"]
    lines = header("Structured GRPO", INTRO, runs)
    lines += _methods(results) + _ablation(results) + _curriculum(results) + _transfer(results)
    lines += grid_section(
        results["validation"],
        "Structure × content F1 (shares multiplied), per cent,",
        lambda cell: cell["structure"] * cell["content_f1"],
    )
    return "\n".join(lines)


def _difference(entries: list[dict[str, Any]], better: str, worse: str) -> dict[str, Any]:
    return next(e for e in entries if (e["better"], e["worse"]) == (better, worse))


def _claim(results: dict[str, Any], better: str, worse: str, figure: str) -> dict[str, Any]:
    """Claim that `better` is above `worse` in a figure, with the paper's difference where it has both rows."""
    both = [PAPER.get(method, {}).get(figure) for method in (better, worse)]
    return {
        "claim": f"{NAMES[figure]}: {better} > {worse}",
        "paper": "–" if None in both else f"{both[0] - both[1]:+.1f}",  # type: ignore[operator]
        "entry": _difference(results["differences"], better, worse)[figure],
        "unit": "points",
    }


def _paper(method: str) -> str:
    row = PAPER.get(method)
    return " / ".join(f"{row[f]:.1f}" for f in ("validity", "structure", "content_f1")) if row else "–"


def _methods(results: dict[str, Any]) -> list[str]:
    arguments, sampled = results["arguments"], results["sampled"]
    rates = results["validation"]["learning_rate"]
    rows = [
        [
            *(method, _paper(method), f"{rates[method]:g}" if method in rates else ""),
            *(percent(entry[figure]) for figure in SHOWN),
            f"{entry['tokens_per_second']['mean']:,.0f}",
        ]
        for method, entry in sampled.items()
        if method not in ABLATED
    ]
    greedy = [[method, *(percent(entry[figure]) for figure in SHOWN)] for method, entry in results["greedy"].items()]
    order = (("DPO", "SFT"), ("GRPO", "SFT"), ("GRPO", "DPO"))
    claims = [_claim(results, *pair, figure) for figure in ("structure", "content_f1") for pair in order]
    claims += [_claim(results, CONSTRAINED, "GRPO", "structure"), _claim(results, "GRPO", CONSTRAINED, "content_f1")]
    claims.append(_slowdown(results["slowdown"]))
    ours = [_claim(results, "GRPO", LITERAL, figure) for figure in ("structure", "content_f1")]
    return [
        "## The methods",
        "",
        f"Per cent of {arguments['test_problems']} test problems a seed, one sample each at temperature 1, mean over {arguments['seeds']}"
        " seeds (95 % interval by Student's t). The paper's column is validity / structure / content of its recipes task; its PPO"
        " has no row here.",
        "",
        f"SFT reads {arguments['sft_documents']} documents (with twice as many it leaves less to learn: the number was set on validation"
        f" problems, so that there is room above it); DPO's pairs are of {arguments['pairs_from']} problems × 8 samples; GRPO makes"
        f" {arguments['steps']} steps of {arguments['completions']} completions.",
        "",
        *markdown_table(("", "paper", "learning rate", *SHOWN.values(), "tokens/s"), rows),
        "",
        *claims_table(claims),
        "",
        "Our claim, not the paper's: judging parsed keys and types beats its literal reward, which looks for substrings.",
        "",
        *claims_table(ours),
        "",
        "The same models, greedily:",
        "",
        *markdown_table(("", *SHOWN.values()), greedy),
        "",
        "![Methods](figures/structured_grpo_methods.png)",
        "",
    ]


def _slowdown(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Claim on a ratio: above 1 is slower; the p-value of a mean of 0 says nothing of it."""
    above = {"ci95": [None if bound is None else bound - 1 for bound in entry["ci95"]]}
    return {
        "claim": "constrained decoding is slower: tokens a second, free over constrained",
        "paper": f"{PAPER_SLOWDOWN:.1f} ×",
        "entry": {**entry, "p": None},
        "unit": "×",
        "sign": "",
        "verdict": verdict(above),
    }


def _ablation(results: dict[str, Any]) -> list[str]:
    sampled = results["sampled"]
    methods = [method for method in ABLATED if method in sampled]
    if not methods:
        return []
    shown = ("validity", "structure", "compliance", "content_f1")
    rows = [[m, _paper(m), *(percent(sampled[m][figure]) for figure in shown)] for m in ("GRPO", *methods)]
    claims = [_claim(results, "GRPO", method, ABLATED[method]) for method in methods]
    dearest = max(claims, key=lambda claim: claim["entry"]["mean"])
    return [
        "## The ablation",
        "",
        f"One component of the reward left out, {results['arguments']['ablation_seeds']} of the seeds, GRPO's learning rate. In the paper a"
        " component that is left out takes its own measure with it; the difference is in that measure, paired over the seeds that both have"
        " (validity for format, which has no measure of its own there). Schema and correctness are components that the paper does not ablate.",
        "",
        *markdown_table(("", "paper", *(NAMES[figure] for figure in shown)), rows),
        "",
        *claims_table(claims),
        "",
        f"The largest loss here is {100 * dearest['entry']['mean']:.1f} points ({dearest['claim']}). The components of ours"
        " that judge form read the same document, so each of them also pays for what another asks.",
        "",
    ]


def _curriculum(results: dict[str, Any]) -> list[str]:
    half = results["half_way_step"]["GRPO"]
    seeds = range(results["arguments"]["seeds"])
    rows = [
        [component, *("–" if step is None else str(step) for step in half[component])]
        for component in COMPONENTS
        if component in half
    ]
    claims = [
        {"claim": f"{e['first']} before {e['then']}", "paper": "yes", "entry": e["steps"], "unit": "steps"}
        for e in results["curriculum"]
    ]
    return [
        "## The emergent curriculum",
        "",
        f"The step, of {results['arguments']['steps']}, at which a component has made half of its way from its first value to its highest"
        " (running mean of five steps; – where it never rises), and by how many steps the second follows the first in the same run. In the"
        " figure each panel shows the components of its own reward: the literal one reads substrings.",
        "",
        *markdown_table(("GRPO", *(f"seed {seed}" for seed in seeds)), rows),
        "",
        *claims_table(claims),
        "",
        "![Curriculum](figures/structured_grpo_curriculum.png)",
        "",
    ]


def _transfer(results: dict[str, Any]) -> list[str]:
    rows = []
    for method, entry in results["rows"].items():
        paper = " / ".join(f"{value:.1f}" for value in PAPER_TRANSFER[method]) if method in PAPER_TRANSFER else "–"
        rows.append([method, paper, *(percent(entry[figure]) for figure in SHOWN)])
    claims = []
    for figure in ("structure", "content_f1"):
        for better, worse in (("SFT", "base"), ("GRPO", "SFT"), ("GRPO", "base")):
            both = [PAPER_TRANSFER[better], PAPER_TRANSFER[worse]]
            gaps = " / ".join(f"{a - b:+.1f}" for a, b in zip(*both, strict=True))
            entry = _difference(results["transfer"], better, worse)[figure]
            claims.append(
                {
                    "claim": f"{NAMES[figure]}: {better} > {worse}",
                    "paper": gaps if figure == "structure" else "–",
                    "entry": entry,
                    "unit": "points",
                }
            )
    entry = _difference(results["transfer"], "GRPO", LITERAL)["structure"]
    claims.append({"claim": f"structure: GRPO > {LITERAL}", "paper": "–", "entry": entry, "unit": "points"})
    return [
        "## Transfer to another schema",
        "",
        "The same test problems asked for in the rendering `rows`: the same content as lists instead of named keys, and an answer that is an"
        " object. The base has read both renderings, half of the documents with a fault; SFT, DPO and GRPO saw `json` alone. The paper's"
        " column is structure on GSM8K-JSON / tool use, with its base as zero-shot.",
        "",
        *markdown_table(("", "paper", *SHOWN.values()), rows),
        "",
        *claims_table(claims),
        "",
        "![Transfer](figures/structured_grpo_transfer.png)",
        "",
    ]


def figures(runs: dict[str, Run], folder: Path) -> None:
    results = runs["structured_ledger"]["results"]
    seeds = results["arguments"]["seeds"]
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN.items(), strict=True):
        error_bars(axis, {m: entry[key] for m, entry in results["sampled"].items()})
        axis.set(title=f"{name}, {seeds} seeds", xlabel="per cent")
    figure.savefig(folder / "structured_grpo_methods.png", dpi=110)

    curves = results["curves"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (method, components) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for component in COMPONENTS:
            if component in components:
                steps, means = zip(*components[component], strict=True)
                style = "--" if component in DASHED else "-"
                axis.plot(steps, means, style, color=COLOURS[component], label=component)
        axis.set(title=f"{method}, mean of {seeds} seeds", xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean of the component")
    figure.axes[0].legend()
    figure.savefig(folder / "structured_grpo_curriculum.png", dpi=110)

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = (("sampled", "json, trained on"), ("rows", "rows, not trained on"))
    for axis, (key, name) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        error_bars(axis, {m: results[key][m]["structure"] for m in results["rows"]})
        axis.set(title=f"structure, rendering {name}", xlabel="per cent")
    figure.savefig(folder / "structured_grpo_transfer.png", dpi=110)
