"""docs/results/routing.md: labels, router, accuracy–cost frontier and clock of R2R (arXiv 2505.21600)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pages.common import Run, claims_table, header, markdown_table, number, percent, verdict

NEEDS = ("routing_ledger",)
NEURAL, SLM, LLM, ROUTED = "neural router", "SLM only", "LLM only", "routed"
PLAIN = "LLM only (transformers generate)"
LABELS = {"identical": 0.89, "neutral": 0.06, "divergent": 0.05}  # the paper's shares
PAPER = {  # average accuracy in points, activated parameters in B, cost in K tokens · B; ± 1, read off a figure
    "R1-1.5B (SLM)": (10, 1.5, 42),
    "R1-7B": (28, 7, 154),
    "R1-14B": (43, 14, 234),
    "R1-32B (LLM)": (50, 32, 537),
    "R2R": (46, 5.6, 103),
}
PAPER_RATE = 0.12  # 11 to 15 % of the tokens in the paper; the nearest rate here stands for it
PAPER_SPEED = 2.8
BASELINES = ("entropy", "random", "query-level")  # that the paper has too


def page(runs: dict[str, Run]) -> str:
    results = runs["routing_ledger"]["results"]
    lines = header("Token routing", _intro(results), runs)
    lines += _labels(results) + _router(results) + _frontier(results) + _against_llm(results) + _clock(results)
    return "\n".join(lines)


def _intro(results: dict[str, Any]) -> str:
    slm, llm = (results["parameters"][key] for key in ("slm", "llm"))
    arguments = results["arguments"]
    return f"""Token routing (R2R, [arXiv 2505.21600](https://arxiv.org/abs/2505.21600), NeurIPS 2025; [how it works](../routing.md)) in the
ledger world: an SLM of {slm / 1e6:.2f} M parameters and an LLM of {llm / 1e6:.2f} M (1:{llm / slm:.0f}; the paper's 1.5 B and 32 B are 1:21). One pair serves all
seeds; a seed has its own {arguments["train_problems"]:,} labelled problems, routers, {arguments["validation_problems"]:,} validation problems, on which every policy's threshold is set so
that it serves an LLM rate, and {arguments["test_problems"]:,} test problems, read once. So the intervals say nothing about other pairs of models.
Verdicts of the labels are by outcome: does the LLM, going on behind the SLM's token, still reach the right answer?"""


def _rate(results: dict[str, Any]) -> str:
    """The LLM rate that stands for the paper's."""
    return min(results["recovered"], key=lambda rate: abs(float(rate) - PAPER_RATE))


def _beyond(entry: dict[str, Any], level: float) -> str:
    """The verdict on a claim that a figure is above `level`."""
    return verdict({"ci95": [None if bound is None else bound - level for bound in entry["ci95"]]})


def _labels(results: dict[str, Any]) -> list[str]:
    labels = results["labels"]
    rows = [
        [name, f"{100 * LABELS[name]:.0f}" if name in LABELS else "–", percent(labels[name], digits=2)]
        for name in (*LABELS, "invalid")
    ]
    claim = {
        "claim": "more tokens differ without harm than with it (neutral − divergent)",
        "paper": f"{100 * (LABELS['neutral'] - LABELS['divergent']):+.0f}",
        "entry": labels["neutral - divergent"],
        "unit": "points",
    }
    return [
        "## Labels",
        "",
        f"Per cent of {labels['tokens']['mean']:,.0f} tokens of the LLM's answers a seed. *Invalid*: nothing can be told, mostly because the"
        " LLM's own answer is wrong. A ledger has few ways to say the same thing.",
        "",
        *markdown_table(("the SLM's token is", "paper", "here"), rows),
        "",
        *claims_table([claim]),
        "",
        "![Labels and speed](figures/routing_labels_clock.png)",
        "",
    ]


def _router(results: dict[str, Any]) -> list[str]:
    keys = ("auroc", "auprc", "recall at 0.05", "recall at 0.12")
    rows = [[name, *(number(entry[key], 3) for key in keys)] for name, entry in results["routers"].items()]
    claims = [
        {
            "claim": f"{d['better']} finds divergent tokens better than {d['worse']}, {name}",
            "paper": "yes" if d["worse"] in BASELINES else "–",
            "entry": d[key],
            "unit": name,
            "digits": 3,
        }
        for d in results["router_differences"]
        for key, name in (("auroc", "AUROC"), ("auprc", "AUPRC"))
    ]
    return [
        "## The router on held-out responses",
        "",
        "How well the scores find divergent tokens in responses that neither training nor threshold has seen. *Recall at* an LLM rate: the"
        " share of the divergent tokens that is routed when that share of all tokens is.",
        "",
        *markdown_table(("", "AUROC", "AUPRC", "recall at 5 %", "recall at 12 %"), rows),
        "",
        *claims_table(claims),
        "",
    ]


def _frontier(results: dict[str, Any]) -> list[str]:
    equal, frontier = results["at_equal_rate"], results["frontier"]
    rows = [
        [f"{100 * float(rate):g} %", *(percent(by_rate[rate]) for by_rate in equal.values())]
        for rate in results["recovered"]
    ]
    served = [
        [name, *(percent(entry["llm_rate"]) for entry in by_rate.values())]
        for name, by_rate in frontier.items()
        if name in equal
    ]
    claims = [
        {
            "claim": f"{d['better']} > {d['worse']} at {100 * float(d['rate']):g} %",
            "paper": "yes" if d["worse"] in BASELINES else "–",
            "entry": d["accuracy"],
            "unit": "points",
        }
        for d in results["differences"]
    ]
    return [
        "## Accuracy at equal LLM rate",
        "",
        f"Per cent of the test problems; SLM alone {percent(frontier[SLM]['']['accuracy'])}, LLM alone {percent(frontier[LLM]['']['accuracy'])}."
        " Accuracies are at exactly the rate of the row, linear between the rates that were served on the test problems (below). Where two policies are both"
        " at the LLM's accuracy, nothing is left to tell them apart by.",
        "",
        *markdown_table(("LLM tokens", *equal), rows),
        "",
        *claims_table(claims),
        "",
        "LLM tokens that were served on the test problems, per cent, by thresholds for the rates at the top:",
        "",
        *markdown_table(("", *(f"{100 * float(rate):g} %" for rate in results["recovered"])), served),
        "",
        "![Accuracy against both costs](figures/routing_frontier.png)",
        "",
    ]


def _against_llm(results: dict[str, Any]) -> list[str]:
    slm, llm, routed = PAPER["R1-1.5B (SLM)"], PAPER["R1-32B (LLM)"], PAPER["R2R"]
    saving, below = results["saving"], results["minus_llm"]
    rows = [
        [
            f"{100 * float(rate):g} %",
            percent(results["frontier"][NEURAL][rate]["accuracy"]),
            percent(below[rate], "+"),
            percent(entry),
            *(number(saving[key][rate]) for key in ("activated_parameters", "full_cost")),
        ]
        for rate, entry in results["recovered"].items()
    ]
    paper = [[name, *(f"{value:g}" for value in figures)] for name, figures in PAPER.items()]
    rate = _rate(results)
    at = f"at {100 * float(rate):g} % LLM tokens"
    gap = (routed[0] - llm[0]) / 100
    claims = [
        {
            "claim": f"routed − LLM alone, {at}: no further below than in the paper",
            "paper": f"{100 * gap:+.0f}",
            "entry": below[rate],
            "unit": "points",
            "verdict": _beyond(below[rate], gap),
        },
        {
            "claim": f"activated parameters fall, {at}: LLM alone / routed",
            "paper": f"{llm[1] / routed[1]:.1f}",
            "entry": saving["activated_parameters"][rate],
            "unit": "×",
        },
        {
            "claim": f"so does the full cost, {at}: LLM alone / routed",
            "paper": "not counted",
            "entry": saving["full_cost"][rate],
            "unit": "×",
        },
    ]
    for claim in claims[1:]:
        claim |= {"sign": "", "digits": 2, "verdict": _beyond(claim["entry"], 1)}
    for claim in claims:
        claim["entry"] = claim["entry"] | {"p": None}  # not of these claims: they are not about 0
    return [
        "## Against the LLM alone",
        "",
        f"The paper's averages over AIME, LiveCodeBench and GPQA (R2R goes {100 * (routed[0] - slm[0]) / (llm[0] - slm[0]):.0f} % of the way from SLM to"
        " LLM, at 11 to 15 % LLM tokens), and ours by served LLM rate. *Activated* is the paper's cost: parameters of the model that wrote a token."
        " The *full* cost counts all that ran: parameters × positions, prefill and the SLM's work on routed positions and the router included.",
        "",
        *markdown_table(("paper", "accuracy", "activated, B", "cost, K tokens · B"), paper),
        "",
        *markdown_table(
            (
                *("LLM tokens", "accuracy, %", "− LLM alone, points", "of the way, %"),
                *("activated: LLM / routed", "full: LLM / routed"),
            ),
            rows,
        ),
        "",
        *claims_table(claims),
        "",
    ]


def _clock(results: dict[str, Any]) -> list[str]:
    if not results["clock"]:
        return []
    rows, claims = [], []
    for timed in results["clock"]:
        ratios = timed["ratio"]
        rows += [
            [str(timed["batch"]), name, number(speed, 0), number(ratios[name])]
            for name, speed in timed["tokens_per_second"].items()
        ]
        claims.append(
            {
                "claim": f"routed is faster than the LLM alone, batch {timed['batch']}",
                "paper": f"{PAPER_SPEED:g}",
                "entry": ratios[ROUTED] | {"p": None},
                "unit": "×",
                "sign": "",
                "digits": 2,
                "verdict": _beyond(ratios[ROUTED], 1),
            }
        )
    first = results["clock"][0]
    return [
        "## The clock",
        "",
        f"Tokens a second on the same prompts, one process, in turns; routed at {100 * first['llm_rate']:g} % LLM tokens with the router of one seed."
        f" Intervals are over {first['ratio'][ROUTED]['seeds']} turns, not over seeds. Assisted generation (speculative decoding with the same pair)"
        f" takes one sequence at a time and is to be read beside “{PLAIN}”. Routing saves the LLM's steps, not its arithmetic: each token"
        " goes through it once. It pays where a step's time is the reading of weights, as at 32 B on a GPU; the LLM here has"
        f" {4 * results['parameters']['llm'] / 1e6:.0f} MB of them.",
        "",
        *markdown_table(("batch", "", "tokens/s", "/ LLM only"), rows),
        "",
        *claims_table(claims),
        "",
    ]


def _spread(entry: dict[str, Any], scale: float = 1, most: float | None = None) -> tuple[float, list[list[float]]]:
    """Mean and lengths of the error bar, which ends at `most` and at 0."""
    mean = entry["mean"]
    low, high = (mean if bound is None else bound for bound in entry["ci95"])
    low, high = max(0.0, low), high if most is None else min(most, high)
    return scale * mean, [[scale * (mean - low)], [scale * (high - mean)]]


def figures(runs: dict[str, Run], folder: Path) -> None:
    results = runs["routing_ledger"]["results"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    costs = {"activated_parameters": "the paper's cost", "full_cost": "full cost"}
    for axis, (key, name) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        for k, (policy, by_rate) in enumerate(results["frontier"].items()):
            for entry in by_rate.values():
                mean, bar = _spread(entry["accuracy"], 100, most=1)
                axis.errorbar(entry[key]["mean"] / 1e6, mean, bar, color=f"C{k}", capsize=3)
            means = [(entry[key]["mean"] / 1e6, 100 * entry["accuracy"]["mean"]) for entry in by_rate.values()]
            axis.plot(*zip(*means, strict=True), marker="o", color=f"C{k}", label=policy)
        axis.axhline(100 * results["frontier"][LLM][""]["accuracy"]["mean"], color="grey", linestyle=":")
        axis.set(xlabel=f"{name}, M parameters a token", ylim=(0, 102))
        axis.grid(alpha=0.3)
    figure.axes[0].set(ylabel="accuracy, per cent")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(folder / "routing_frontier.png", dpi=110)

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(results["clock"]), squeeze=False)[0]
    axes[0].barh([i - 0.2 for i in range(len(LABELS))], [100 * share for share in LABELS.values()], 0.4, label="paper")
    here = [_spread(results["labels"][name], 100) for name in LABELS]
    axes[0].barh([i + 0.2 for i in range(len(LABELS))], [mean for mean, _ in here], 0.4, label="here")
    axes[0].set(yticks=range(len(LABELS)), yticklabels=list(LABELS), xlabel="per cent of the tokens", title="labels")
    axes[0].invert_yaxis()
    axes[0].legend()
    for axis, timed in zip(axes[1:], results["clock"], strict=True):
        for name, entry in timed["tokens_per_second"].items():
            mean, bar = _spread(entry)
            axis.barh(name.replace(" (", "\n("), mean, xerr=bar, capsize=3, color="C0")
        axis.set(xlabel="tokens/s", title=f"batch {timed['batch']}")
        axis.invert_yaxis()
    figure.savefig(folder / "routing_labels_clock.png", dpi=110)
