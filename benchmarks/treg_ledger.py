r"""T-REG and its ablation (arXiv 2412.02685, AlpacaEval/Arena-Hard table) in the ledger world: accuracy, by seed.

    python benchmarks/treg_ledger.py --output_dir runs/treg_ledger

From one base model, with the token rewards of a model that has learned to rewrite drafts: DPO, DPO + SFT on the chosen
answer, T-REG with w fixed, with DPO's implicit reward as r̂ (of a DPO model trained before, and of the policy in
training), T-REG; SimPO and T-REG on SimPO. Every method has the same grid of learning rates, chosen by greedy accuracy
on validation problems with pairs of their own (seed 1000). Every seed then has its own problems, rollouts, pairs,
training order and test problems, and the test problems are read once. Means over seeds with 95 % intervals, and the
paired differences that the paper's ordering claims. Writes `treg_ledger.json`, `.png` and `.md`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ledger_stages import (
    LEDGER,
    MAX_TOKENS,
    build_pairs,
    models,
    over_seeds,
    score_token_rewards,
    stages_in,
    write_json,
)
from rich.console import Console
from rich.table import Table
from trl import TrlParser

GRID_SEED = 1000
# name -> (YAML, further arguments, dataset it trains on)
METHODS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "DPO": ("treg", ("--alpha", 0), "rewarded"),
    "DPO + SFT on y_w": ("treg", ("--alpha", 0, "--loss_type", "sigmoid", "sft"), "rewarded"),
    "T-REG, w fixed": ("treg", ("--sequence_weight", "static"), "rewarded"),
    "T-REG, r̂ of a trained DPO": ("treg", ("--signal", "implicit_reward"), "implicit"),
    "T-REG, r̂ of the policy": ("treg", ("--reward_source", "implicit"), "rewarded"),
    "T-REG": ("treg", (), "rewarded"),
    "SimPO": ("simpo", (), "rewarded"),
    "SimPO + T-REG": ("treg_simpo", (), "rewarded"),
}
CLAIMS = (  # better, worse: the paper's ordering
    ("T-REG", "DPO"),
    ("T-REG", "T-REG, w fixed"),
    ("T-REG", "T-REG, r̂ of a trained DPO"),
    ("T-REG, w fixed", "DPO"),
    ("DPO", "DPO + SFT on y_w"),
    ("SimPO + T-REG", "SimPO"),
)


@dataclass
class TRegLedgerArguments:
    """Sizes of the experiment."""

    base: str | None = field(default=None, metadata={"help": "The start; unset is the ledger's weak base."})
    eval_model: str | None = field(
        default=None,
        metadata={"help": "Model that gives token rewards; unset is the ledger's, which can rewrite drafts."},
    )
    output_dir: str = field(default="runs/treg_ledger", metadata={"help": "Folder of all results."})
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    problems: int = field(default=1000, metadata={"help": "Training problems a seed."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3], metadata={"help": "The grid, the same for every method."}
    )
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=600, metadata={"help": "Test problems a seed."})
    samples: int = field(default=2, metadata={"help": "Samples a problem for the sampled accuracy."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})


class Seed:
    """Pairs, trained models and evaluations of one seed."""

    def __init__(self, args: TRegLedgerArguments, seed: int, split: str, problems: int):
        self.args, self.seed, self.split = args, seed, split
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.stages = stages_in(self.out)
        pairs = build_pairs(self.stages, self.out, args.base, problems=args.problems, rollouts=args.rollouts, seed=seed)
        self.datasets = {"rewarded": score_token_rewards(self.stages, self.out, args.eval_model, pairs)}
        counts = {name: 1 for name in ("train", "validation", "test", "sft")} | {split: problems}
        self.stages.run(
            *("held-out problems", "data/ledger.py", "--output_dir", self.out / "held_out", "--seed", seed),
            *(part for name, count in counts.items() for part in (f"--{name}", count)),
        )

    def accuracy(self, method: str, rate: float | None) -> dict[str, float]:
        """Greedy and sampled accuracy of a method on the held-out problems; of the base if `rate` is None."""
        name = "base" if rate is None else f"{method} {rate:g}".replace(" ", "_")
        adapter: tuple[Any, ...] = ()
        if rate is not None:
            adapter = ("--adapter", self.train(method, rate, self.out / "models" / name))
        self.stages.run(
            *(f"evaluate {name}", "scripts/evaluate.py", "--model", self.args.base, *adapter, "--seed", self.seed),
            *("--problems", self.out / "held_out" / self.split, "--split", "train", "--samples", self.args.samples),
            *("--max_tokens", MAX_TOKENS, "--output_dir", self.out / "evaluation" / name),
        )
        metrics = json.loads((self.out / "evaluation" / name / "metrics.json").read_text())
        return {key: metrics[f"{key}_accuracy"] for key in ("greedy", "sampled")}

    def train(self, method: str, rate: float, output: Path) -> Path:
        yaml, options, dataset = METHODS[method]
        if dataset == "implicit" and dataset not in self.datasets:
            self.datasets[dataset] = self.implicit_rewards()
        self.stages.train(
            *(f"train {output.name}", "recipes/treg.py", output, "--config", f"{LEDGER}/{yaml}.yaml", *options),
            *("--model_name_or_path", self.args.base, "--dataset_name", self.datasets[dataset]),
            *("--learning_rate", rate, "--seed", self.seed),
        )
        return output

    def implicit_rewards(self) -> Path:
        """Token rewards of a DPO model of this seed, trained at the middle of the grid."""
        rate = self.args.learning_rates[len(self.args.learning_rates) // 2]
        adapter = self.train("DPO", rate, self.out / "models" / f"DPO_{rate:g}")
        self.stages.run(
            *("implicit rewards", "scripts/score_likelihood.py", "--model", self.args.base, "--adapter", adapter),
            *("--signals", "implicit_reward", "--dataset", self.datasets["rewarded"]),
            *("--output_dir", self.out / "implicit"),
        )
        return self.out / "implicit"


def choose_rates(args: TRegLedgerArguments) -> dict[str, Any]:
    """Validation accuracies of every method and rate, and the rate with the best greedy one; sampled settles a tie."""
    seed = Seed(args, GRID_SEED, "validation", args.validation_problems)
    grid = {m: {rate: seed.accuracy(m, rate) for rate in args.learning_rates} for m in args.methods}
    best = {
        m: max(cells, key=lambda rate: (cells[rate]["greedy"], cells[rate]["sampled"])) for m, cells in grid.items()
    }
    return {"grid": grid, "best": best}


def main(args: TRegLedgerArguments) -> dict[str, Any]:
    args.base, args.eval_model = models(args.base, args.eval_model)
    chosen = choose_rates(args)
    accuracies: dict[str, list[dict[str, float]]] = {m: [] for m in ("base", *args.methods)}
    for number in range(args.seeds):
        seed = Seed(args, number, "test", args.test_problems)
        accuracies["base"].append(seed.accuracy("base", None))
        for method in args.methods:
            accuracies[method].append(seed.accuracy(method, chosen["best"][method]))
    results = {
        "arguments": asdict(args),
        "validation": {m: {f"{rate:g}": cell for rate, cell in cells.items()} for m, cells in chosen["grid"].items()},
        "learning_rate": chosen["best"],
        "methods": {
            m: {key: over_seeds([s[key] for s in seeds]) for key in ("greedy", "sampled")}
            for m, seeds in accuracies.items()
        },
        "claims": [
            claim(accuracies, better, worse) for better, worse in CLAIMS if {better, worse} <= set(args.methods)
        ],
    }
    write_json(Path(args.output_dir) / "treg_ledger.json", results)
    show(results, Path(args.output_dir))
    return results


def claim(accuracies: dict[str, list[dict[str, float]]], better: str, worse: str) -> dict[str, Any]:
    """Paired difference over seeds (they share problems, pairs and test set), and what it says of the paper's order."""
    entry: dict[str, Any] = {"better": better, "worse": worse}
    for key in ("greedy", "sampled"):
        pairs = zip(accuracies[better], accuracies[worse], strict=True)
        entry[key] = over_seeds([a[key] - b[key] for a, b in pairs])
        low, high = entry[key]["ci95"]
        entry[key]["verdict"] = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told here"
    return entry


def show(results: dict[str, Any], folder: Path) -> None:
    """The same tables on screen and as Markdown, and a figure."""

    def percent(entry: dict[str, Any], sign: str = "") -> str:
        low, high = entry["ci95"]
        return f"{100 * entry['mean']:{sign}.1f} ({100 * low:{sign}.1f} – {100 * high:{sign}.1f})"

    n, seeds = results["arguments"]["test_problems"], results["arguments"]["seeds"]
    title = f"{seeds} seeds × {n} test problems, per cent, mean over seeds (95 % interval)"
    table = Table("method", "learning rate", "greedy", "sampled", title=title)
    lines = [title, "", "| method | learning rate | greedy | sampled |", "|---|---|---|---|"]
    for method, entry in results["methods"].items():
        rate = results["learning_rate"].get(method)
        cells = [method, "" if rate is None else f"{rate:g}", percent(entry["greedy"]), percent(entry["sampled"])]
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    claims = Table("the paper's order", "Δ greedy", "", "Δ sampled", "")
    lines += ["", "| the paper's order | Δ greedy | | Δ sampled | |", "|---|---|---|---|---|"]
    for entry in results["claims"]:
        cells = [f"{entry['better']} > {entry['worse']}"]
        for key in ("greedy", "sampled"):
            cells += [percent(entry[key], "+"), entry[key]["verdict"]]
        claims.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    Console().print(table, claims)
    (folder / "treg_ledger.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = list(results["methods"])
    for axis, key in zip(axes, ("greedy", "sampled"), strict=True):
        means = [results["methods"][m][key]["mean"] for m in names]
        spread = [results["methods"][m][key]["ci95"][1] - results["methods"][m][key]["mean"] for m in names]
        axis.errorbar(means, names, xerr=spread, fmt="o", capsize=4)
        axis.axvline(means[0], color="grey", linestyle=":")
        axis.set(title=f"{key} accuracy, {seeds} seeds")
    axes[0].invert_yaxis()
    figure.savefig(folder / "treg_ledger.png", dpi=120)


if __name__ == "__main__":
    main(*TrlParser((TRegLedgerArguments,)).parse_args_and_config())
