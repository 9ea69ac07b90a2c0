r"""T-REG and its ablation (arXiv 2412.02685, AlpacaEval/Arena-Hard table) in the ledger world: accuracy, by seed.

    python benchmarks/treg_ledger.py --output_dir runs/benchmarks/treg_ledger

From one base model, with the token rewards of a model that has learned to rewrite drafts: DPO, DPO + SFT on the chosen
answer, T-REG with w fixed, with DPO's implicit reward as r̂ (of a DPO model trained before, and of the policy in
training), T-REG; SimPO and T-REG on SimPO. Grid, seeds and test problems as in ledger_comparison.py. Writes
results.json; pages/treg.py makes the page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ledger_comparison import Comparison, ComparisonArguments, Method, SeedRun, difference, show_comparison, summary
from ledger_stages import models, score_token_rewards, write_json
from trl import TrlParser

TREG = "recipes/treg.py"
METHODS = {
    "DPO": Method("treg", TREG, ("--alpha", 0), "rewarded"),
    "DPO + SFT on y_w": Method("treg", TREG, ("--alpha", 0, "--loss_type", "sigmoid", "sft"), "rewarded"),
    "T-REG, w fixed": Method("treg", TREG, ("--sequence_weight", "static"), "rewarded"),
    "T-REG, r̂ of a trained DPO": Method("treg", TREG, ("--signal", "implicit_reward"), "implicit"),
    "T-REG, r̂ of the policy": Method("treg", TREG, ("--reward_source", "implicit"), "rewarded"),
    "T-REG": Method("treg", TREG, (), "rewarded"),
    "SimPO": Method("simpo", TREG, (), "rewarded"),
    "SimPO + T-REG": Method("treg_simpo", TREG, (), "rewarded"),
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

    eval_model: str | None = field(
        default=None,
        metadata={"help": "Model that gives token rewards; unset is the ledger's, which can rewrite drafts."},
    )
    output_dir: str = field(
        default="runs/benchmarks/treg_ledger", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})


def main(args: TRegLedgerArguments) -> dict[str, Any]:
    args.base, args.eval_model = models(args.base, args.eval_model)

    def rewarded(run: SeedRun) -> Path:
        return score_token_rewards(run.stages, run.out, str(args.eval_model), run.dataset("pairs"))

    def implicit(run: SeedRun) -> Path:
        """Token rewards of a DPO model of this seed, trained at the rate that the grid chose for it."""
        rate = comparison.rates["DPO"]
        adapter, folder = run.train("DPO", rate), run.out / f"implicit_{rate:g}"
        run.stages.run(
            *("implicit rewards", "scripts/score.py", "likelihood", "--model", run.base, "--adapter", adapter),
            *("--signals", "implicit_reward", "--dataset", run.dataset("rewarded")),
            *("--output_dir", folder),
        )
        return folder

    methods = {name: METHODS[name] for name in args.methods}
    comparison = Comparison(args, methods, {"rewarded": rewarded, "implicit": implicit})
    comparison.choose_rates()
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *methods)}
    for number in range(args.seeds):
        run = comparison.seed(number)
        by_method["base"].append(run.figures("base", None))
        for method in methods:
            by_method[method].append(run.figures(method, comparison.rates[method]))
    results = {
        "arguments": asdict(args),
        "validation": comparison.validation(),
        "methods": summary(by_method),
        "differences": [difference(by_method, *claim) for claim in CLAIMS if set(claim) <= set(methods)],
    }
    write_json(Path(args.output_dir) / "results.json", results)
    show_comparison(results)
    return results


if __name__ == "__main__":
    main(*TrlParser((TRegLedgerArguments,)).parse_args_and_config())
