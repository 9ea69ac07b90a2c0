r"""Critical-token DPO and its rivals (arXiv 2411.19943v3, Table 3) in the ledger world, by seed.

    python -m benchmarks.experiments.critical_dpo_ledger --output_dir runs/benchmarks/critical_dpo_ledger

Base, SFT, SFT→DPO, SFT→TDPO, DPO, TDPO, RPO and critical-token DPO from one base model. Grid, seeds and test problems
as in common.py. Beside accuracy: how the log-probs of chosen and rejected answers move during training, pass@k from
wrong answers' prefixes with and without the critical token of the rollout estimate, and what the contrast costs against
that estimate. Writes results.json; docs/results/critical_token_dpo.md shows it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from trl import TrlParser

from benchmarks.experiments import common
from benchmarks.experiments.common import Comparison, ComparisonArguments, ComparisonSeed, Method
from benchmarks.ledger_stages import TDPO, logp_curve
from benchmarks.render import CLAIM, SHARE, Tables, claim, gaps, interval, number, percent, read_json, save
from tokalign.stage.loading import load_stage

OURS = "critical-token DPO"
METHODS = {
    "SFT": Method("sft", "sft", dataset="positive"),
    "SFT→DPO": Method("dpo", start="SFT"),
    "SFT→TDPO": Method("dpo", TDPO, start="SFT"),
    "DPO": Method("dpo"),
    "TDPO": Method("dpo", TDPO),
    "RPO": Method("rpo"),
    OURS: Method("critical_dpo", dataset="scored"),
}
EQUAL = f"{OURS} at DPO's rate"  # not tuned: how log-probs move depends on the rate, and the tuned ones differ
CLAIMS = (  # better, worse
    (OURS, "RPO"),
    (OURS, "DPO"),
    (OURS, "SFT→DPO"),
    (OURS, "SFT→TDPO"),
    (OURS, "SFT"),
    (OURS, "base"),
    ("RPO", "DPO"),
    ("SFT", "base"),
    ("SFT→DPO", "SFT"),
    ("SFT→TDPO", "SFT→DPO"),
    (OURS, "TDPO"),
    (EQUAL, "DPO"),
)
CURVES = ("DPO", "TDPO", "RPO", OURS)  # methods that start from the base on the same pairs in the same order


@dataclass
class CriticalDPOLedgerArguments(ComparisonArguments):
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/critical_dpo_ledger"
    rollouts: int = field(default=16, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2], metadata=common.GRID
    )
    estimate_rows: int = field(default=20, metadata={"help": "Wrong answers a seed with a rollout estimate."})
    continuations: int = field(default=64, metadata={"help": "Continuations a prefix of the rollout estimate."})


MAKE = {
    "positive": lambda run: run.out / "preferences" / "positive",
    "scored": lambda run: run.stages.contrast(run.base, run.dataset("pairs"), run.seed),
}


def rollout_estimate(run: ComparisonSeed, args: CriticalDPOLedgerArguments) -> dict[str, Any]:
    """pass@k with and without the critical token, and tokens and forward passes of both estimates an answer."""
    sizes = {"rows": args.estimate_rows, "continuations": args.continuations}
    folder = run.stages.rollout_estimate(run.base, run.dataset("pairs"), seed=run.seed, **sizes)
    rows = load_stage(folder)
    tokens = sum(len(ids) for ids in rows["rejected_ids"])
    through = sum(len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in rows)
    curves = read_json(folder / "pass_at_k.json")
    return {
        "rows": len(rows),
        "with_critical_token": sum(index >= 0 for index in rows["critical_index"]),
        "pass_at_k": {kind: {str(point["k"]): point["mean"] for point in curves[kind]} for kind in ("with", "without")},
        # A token that is generated is a forward pass of the model over one position of one row
        "rollout_tokens": sum(rows["rollout_tokens"]) / tokens,
        "rollout_passes_an_answer": sum(rows["rollout_tokens"]) / len(rows),
        "contrast_tokens": 2 * through / tokens,  # two forward passes over prompt and completion
    }


def curves(run: ComparisonSeed, rates: dict[str, float]) -> dict[str, Any]:
    """Change of the chosen and rejected log-prob by training step: each method's log minus the reference's log-prob of
    the same batches (DPO's own log has it: logps − rewards / β), since all see the pairs in the same order."""
    folder = run.train("DPO", rates["DPO"])
    history = read_json(next(folder.glob("checkpoint-*/trainer_state.json")))["log_history"]
    entries = [entry for entry in history if "logps/chosen" in entry]
    beta = 0.1  # recipes/ledger/dpo.yaml
    start = {
        side: [e[f"logps/{side}"] - e[f"rewards/{side}"] / beta for e in entries] for side in ("chosen", "rejected")
    }
    moved: dict[str, Any] = {"step": [e["step"] for e in entries]}
    for method in CURVES:
        curve = logp_curve(run.train(method, rates[method]))
        moved[method] = {side: [a - b for a, b in zip(curve[side], start[side], strict=True)] for side in start}
    return moved


def main(args: CriticalDPOLedgerArguments) -> dict[str, Any]:
    comparison = Comparison(args, METHODS, MAKE)
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *METHODS, EQUAL)}
    estimates, dynamics = [], []
    for run in comparison.seeds():
        rates = comparison.rates | {EQUAL: comparison.rates["DPO"]}
        for method in by_method:
            row, rate = OURS if method == EQUAL else method, rates.get(method)
            measured = run.figures(row, rate, preferences=run.dataset("pairs"))
            sides = {side: measured["logps"][side]["mean"] for side in ("chosen", "rejected")}
            start = by_method["base"][-1] if method != "base" else {f"{s}_logp": sides[s] for s in sides}
            by_method[method].append(
                {key: measured[key] for key in common.MEASURES}
                | {f"{side}_logp": value for side, value in sides.items()}
                | {f"{side}_change": value - start[f"{side}_logp"] for side, value in sides.items()}
            )
        dynamics.append(curves(run, comparison.rates))
        estimates.append(rollout_estimate(run, args))
    keys = (*common.MEASURES, "chosen_change", "rejected_change")
    results = comparison.results(by_method, CLAIMS, keys) | {
        "dynamics": mean_curves(dynamics),
        "pass_at_k": {
            kind: {
                k: common.over_seeds([e["pass_at_k"][kind][k] for e in estimates])
                for k in estimates[0]["pass_at_k"][kind]
            }
            for kind in ("with", "without")
        },
        "freed": {  # at the largest k: what taking the critical token away adds
            k: common.over_seeds([e["pass_at_k"]["without"][k] - e["pass_at_k"]["with"][k] for e in estimates])
            for k in ("1", str(args.continuations))
        },
        "estimates": {
            key: common.over_seeds([e[key] for e in estimates]) for key in estimates[0] if key != "pass_at_k"
        },
    }
    return save(args.output_dir, results, tables)


def mean_curves(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds, at the steps that all have (a seed has as many pairs as its rollouts gave)."""
    steps = min((curve["step"] for curve in by_seed), key=len)
    return {"step": steps} | {
        method: {
            side: [statistics.mean(curve[method][side][i] for curve in by_seed) for i in range(len(steps))]
            for side in ("chosen", "rejected")
        }
        for method in CURVES
    }


# ------------------------------------------------------------------------------------------------ what the page shows


TABLE_3 = {  # averages over three models: GSM8K, MATH500
    "base": (67.0, 30.1),
    "SFT": (70.1, 30.9),
    "SFT→DPO": (71.3, 30.5),
    "SFT→TDPO": (71.7, 30.8),
    "DPO": (70.5, 29.4),
    "RPO": (75.4, 32.3),
    OURS: (77.2, 33.4),
}


def tables(results: dict[str, Any]) -> Tables:
    """Table 3, log-probs, pass@k and cost, each with the paper's claims."""
    rates, estimates = results["validation"]["learning_rate"], results["estimates"]
    validation = results["validation"] | {"learning_rate": rates | {EQUAL: rates["DPO"]}}
    shown = common.comparison_tables(results | {"validation": validation}, TABLE_3, "paper, GSM8K / MATH500")
    changes = [
        [method, *(number(entry[f"{side}_change"], 2, "+") for side in ("chosen", "rejected"))]
        for method, entry in results["methods"].items()
        if method != "base"
    ]
    last = str(max(map(int, results["pass_at_k"]["with"])))
    paper = {"1": ("≈ 30", "≈ +30"), last: ("> 90", "> +90")}  # without the critical token; with it, 0
    pass_rows = [
        [f"pass@{k}", here, f"{kind} the critical token", percent(results["pass_at_k"][kind][k])]
        for k in ("1", last)
        for kind, here in (("with", "0"), ("without", paper[k][0]))
    ]
    freed = [
        claim(f"without the critical token pass@{k} is higher", paper[k][1], results["freed"][k]) for k in ("1", last)
    ]
    return shown | {
        "order": (CLAIM, order(results)),
        "logps": (("", "chosen", "rejected"), changes),
        "logp_claims": (CLAIM, logp_claims(results)),
        "pass_at_k": (("", "paper", "prefix", "here"), pass_rows),
        "pass_at_k_claims": (CLAIM, freed),
        "cost": cost(estimates),
        "answers": f"{sum(estimates['rows']['values']):.0f}",
        "with_critical_token": f"{sum(estimates['with_critical_token']['values']):.0f}",
        "continuations": last,
    }


def order(results: dict[str, Any]) -> list[list[str]]:
    """The paper's order as claims on greedy accuracy."""
    rows = []
    for entry in results["differences"]:
        better, worse = entry["better"], entry["worse"]
        paper = gaps(TABLE_3[better], TABLE_3[worse]) if {better, worse} <= set(TABLE_3) else "–"
        rows.append(claim(f"{better} > {worse}", paper, entry["greedy"]))
    return rows


def logp_claims(results: dict[str, Any]) -> list[list[str]]:
    methods = results["methods"]
    above = {d["better"]: d["chosen_change"] for d in results["differences"] if d["worse"] == "DPO"}
    return [
        claim("DPO lowers the chosen log-prob", "yes", fall(methods["DPO"]["chosen_change"]), "nats"),
        *(claim(f"{m} keeps it higher than DPO", "yes", above[m], "nats") for m in (OURS, EQUAL)),
        claim(f"{OURS} lowers the rejected log-prob", "yes", fall(methods[OURS]["rejected_change"]), "nats"),
    ]


def fall(change: Mapping[str, Any]) -> dict[str, Any]:
    """The same figure with the sign turned: how far something fell."""
    low, high = change["ci95"]
    return {**change, "mean": -change["mean"], "ci95": [None, None] if low is None else [-high, -low]}


def cost(estimates: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Tokens and forward passes of the contrast beside those of the rollout estimate."""
    keys = ("rollout_passes_an_answer", "rollout_tokens", "contrast_tokens")
    passes, rollout, contrast = (estimates[key]["mean"] for key in keys)
    return ("", "tokens a scored token", "forward passes an answer"), [
        ["contrastive estimate", f"{contrast:.1f}", "2"],
        ["rollout estimate", f"{rollout:,.0f}", f"{passes:,.0f}"],
        ["contrast / rollout", f"{contrast / rollout:.2%}", f"{2 / passes:.4%} (paper 0.002 %)"],
    ]


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    moves = results["dynamics"]
    dynamics = Figure(figsize=(10, 4), layout="constrained")
    for axis, side in zip(dynamics.subplots(1, 2), ("chosen", "rejected"), strict=True):
        for method in (name for name in moves if name != "step"):
            axis.plot(moves["step"], moves[method][side], label=method)
        axis.axhline(0, color="grey", linestyle=":")
        axis.set(title=f"{side} answers", xlabel="step", ylabel="Δ Σ log π, nats")
        axis.grid(alpha=0.3)
    dynamics.axes[0].legend()

    pass_at_k = Figure(figsize=(6, 4), layout="constrained")
    axis = pass_at_k.subplots()
    for kind, by_k in results["pass_at_k"].items():
        steps = sorted(map(int, by_k))
        entries = [by_k[str(k)] for k in steps]
        (line,) = axis.plot(steps, [100 * e["mean"] for e in entries], marker="o", label=f"{kind} the critical token")
        if entries[0]["ci95"][0] is not None:
            low, high = zip(*([100 * end for end in interval(e, SHARE)] for e in entries), strict=True)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axis.set(xscale="log", xticks=steps, xticklabels=steps, xlabel="k", ylabel="pass@k, per cent", ylim=(-2, 102))
    axis.legend()
    axis.grid(alpha=0.3)
    return {
        "critical_token_dpo_accuracy.png": common.accuracy_figure(results, "base"),
        "critical_token_dpo_dynamics.png": dynamics,
        "critical_token_dpo_pass_at_k.png": pass_at_k,
    }


if __name__ == "__main__":
    main(*TrlParser((CriticalDPOLedgerArguments,)).parse_args_and_config())
