r"""T-REG and its ablation (arXiv 2412.02685, AlpacaEval/Arena-Hard table) in the ledger world: accuracy, by seed.

    python -m benchmarks.experiments.treg_ledger --output_dir runs/benchmarks/treg_ledger

From one base model, with the token rewards of a model that has learned to rewrite drafts: DPO, DPO + SFT on the chosen
answer, T-REG with w fixed, with DPO's implicit reward as r̂ (of a DPO model trained before, and of the policy in
training), T-REG; SimPO and T-REG on SimPO. Grid, seeds and test problems as in common.py. Writes results.json;
docs/results/treg.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from trl import TrlParser

from benchmarks.experiments import common
from benchmarks.experiments.common import Comparison, ComparisonArguments, ComparisonSeed, Method
from benchmarks.render import CLAIM, OPEN, Tables, claim, gaps, save, verdict

METHODS = {
    "DPO": Method("treg", "treg", {"alpha": 0}, "rewarded"),
    "DPO + SFT on y_w": Method("treg", "treg", {"alpha": 0, "loss_type": ("sigmoid", "sft")}, "rewarded"),
    "T-REG, w fixed": Method("treg", "treg", {"sequence_weight": "static"}, "rewarded"),
    "T-REG, r̂ of a trained DPO": Method("treg", "treg", {"signal": "implicit_reward"}, "implicit"),
    "T-REG, r̂ of the policy": Method("treg", "treg", {"reward_source": "implicit"}, "rewarded"),
    "T-REG": Method("treg", "treg", {}, "rewarded"),
    "SimPO": Method("simpo", "treg", {}, "rewarded"),
    "SimPO + T-REG": Method("treg_simpo", "treg", {}, "rewarded"),
}
CLAIMS = (  # better, worse: the paper's ordering
    ("T-REG", "DPO"),
    ("T-REG", "T-REG, w fixed"),
    ("T-REG", "T-REG, r̂ of a trained DPO"),
    ("T-REG, r̂ of a trained DPO", "DPO"),
    ("T-REG, w fixed", "DPO"),
    ("DPO", "DPO + SFT on y_w"),
    ("SimPO + T-REG", "SimPO"),
)


@dataclass
class TRegLedgerArguments(ComparisonArguments):
    """Sizes of the experiment."""

    eval_model: str | None = field(default=None, metadata=common.EVAL_MODEL)
    output_dir: str = "runs/benchmarks/treg_ledger"
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})


def main(args: TRegLedgerArguments) -> dict[str, Any]:
    def rewarded(run: ComparisonSeed) -> Path:
        judge = args.ledger_model("ledger-slm-revise", run.seed, args.eval_model)
        return run.stages.token_rewards(judge, run.dataset("pairs"))

    def implicit(run: ComparisonSeed) -> Path:
        """Token rewards of a DPO model of this seed, trained at the rate that the grid chose for it."""
        rate = comparison.rates["DPO"]
        data, adapter = run.dataset("rewarded"), run.train("DPO", rate)
        return run.stages.likelihood(f"implicit_{rate:g}", run.base, data, "implicit_reward", adapter=adapter)

    methods = {name: METHODS[name] for name in args.methods}
    comparison = Comparison(args, methods, {"rewarded": rewarded, "implicit": implicit})
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *methods)}
    for run in comparison.seeds():
        for method, measured in by_method.items():
            measured.append(run.figures(method, comparison.rates.get(method)))
    return save(args.output_dir, comparison.results(by_method, CLAIMS), tables)


PAPER = {  # AlpacaEval 2 LC, Arena-Hard; SimPO's rows are Gemma-2-9B's
    "DPO": (47.0, 35.9),
    "DPO + SFT on y_w": (46.0, 32.7),
    "T-REG, w fixed": (48.0, 35.1),
    "T-REG, r̂ of a trained DPO": (49.8, 36.9),
    "T-REG": (50.8, 40.3),
    "SimPO": (73.5, 63.0),
    "SimPO + T-REG": (74.5, 64.2),
}


def tables(results: dict[str, Any]) -> Tables:
    """The ablation, the paper's ordering as claims, and the largest effect that an open claim could hide."""
    claims, room = [], 0.0
    for entry in results["differences"]:
        better, worse = entry["better"], entry["worse"]
        for key in common.MEASURES:
            claims.append(claim(f"{better} > {worse}, {key}", gaps(PAPER[better], PAPER[worse]), entry[key]))
            if verdict(entry[key]) == OPEN:
                room = max(room, entry[key]["ci95"][1] or 0.0)
    shown = common.comparison_tables(results, PAPER, "paper")
    return shown | {"claims": (CLAIM, claims), "room": f"{100 * room:.1f}"}


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    return {"treg_ablation.png": common.accuracy_figure(results, "DPO")}


if __name__ == "__main__":
    main(*TrlParser((TRegLedgerArguments,)).parse_args_and_config())
