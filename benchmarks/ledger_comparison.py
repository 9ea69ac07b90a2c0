"""Methods side by side in the ledger world: one grid of learning rates for all, fresh data every seed, one table.

Every method gets the same learning rates; its best on validation problems (with pairs of their own, seed 1000; greedy
accuracy, ties by sampled accuracy) is trained anew with every seed. A seed has its own problems, rollouts, pairs,
training order and test problems, which all its methods share, and which are read once. So differences between methods
are paired over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ledger_stages import LEDGER, MAX_TOKENS, build_pairs, over_seeds, paired, stages_in
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

GRID_SEED = 1000
MEASURES = ("greedy", "sampled")


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe with its settings, what it trains on, and from where.

    Args:
        config: YAML in recipes/ledger/, without its ending.
        recipe: script that trains.
        options: further arguments of the recipe.
        dataset: name of the dataset, made by the experiment.
        start: method whose trained model it starts from; the base if None.
    """

    config: str
    recipe: str = "recipes/critical_dpo.py"
    options: tuple[Any, ...] = ()
    dataset: str = "pairs"
    start: str | None = None


@dataclass
class ComparisonArguments:
    """Sizes of the experiment."""

    base: str | None = field(default=None, metadata={"help": "The start; unset is the ledger's weak base."})
    output_dir: str = field(default="runs/benchmarks/comparison", metadata={"help": "Folder of all results."})
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    problems: int = field(default=1000, metadata={"help": "Training problems a seed."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3], metadata={"help": "The grid, the same for every method."}
    )
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=600, metadata={"help": "Test problems a seed."})
    samples: int = field(default=2, metadata={"help": "Samples a problem for the sampled accuracy."})


class SeedRun:
    """Pairs, datasets, trained models and evaluations of one seed; whatever is there is kept.

    Args:
        make: name of a dataset -> function of this run that makes it and returns its folder. "pairs" is there.
        rates: method -> learning rate, for methods that others start from.
    """

    def __init__(
        self,
        args: ComparisonArguments,
        methods: Mapping[str, Method],
        make: Mapping[str, Callable[[SeedRun], Path]],
        rates: Mapping[str, float],
        *,
        seed: int,
        split: str,
        problems: int,
    ):
        self.args, self.methods, self.make, self.rates = args, methods, make, rates
        self.seed, self.split = seed, split
        self.base = str(args.base)
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.stages = stages_in(self.out)
        self.datasets = {
            "pairs": build_pairs(
                self.stages, self.out, self.base, problems=args.problems, rollouts=args.rollouts, seed=seed
            )
        }
        counts = {name: 1 for name in ("train", "validation", "test", "sft")} | {split: problems}
        self.stages.run(
            *("held-out problems", "data/ledger.py", "--output_dir", self.out / "held_out", "--seed", seed),
            *(part for name, count in counts.items() for part in (f"--{name}", count)),
        )

    def dataset(self, name: str) -> Path:
        """Folder of a dataset, made now if it is not there."""
        if name not in self.datasets:
            self.datasets[name] = self.make[name](self)
        return self.datasets[name]

    def start(self, method: str) -> str:
        """Model that a method starts from: the base, or another method's with its adapter merged."""
        name = self.methods[method].start
        if name is None:
            return self.base
        rate = self.rates[name]
        merged = self.out / "merged" / f"{name} {rate:g}".replace(" ", "_")
        if not (merged / "config.json").exists():
            adapter = self.train(name, rate)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter)
            AutoTokenizer.from_pretrained(self.base).save_pretrained(merged)
            model.merge_and_unload().save_pretrained(merged)
        return str(merged)

    def name(self, method: str, rate: float) -> str:
        """Of the folders of a method at a learning rate; another start is another folder."""
        start = self.methods[method].start
        after = "" if start is None else f" after {self.rates[start]:g}"
        return f"{method} {rate:g}{after}".replace(" ", "_")

    def train(self, method: str, rate: float) -> Path:
        """Adapter of a method at a learning rate."""
        chosen = self.methods[method]
        output = self.out / "models" / self.name(method, rate)
        self.stages.train(
            *(f"train {output.name}", chosen.recipe, output, "--config", f"{LEDGER}/{chosen.config}.yaml"),
            *("--model_name_or_path", self.start(method), "--dataset_name", self.dataset(chosen.dataset)),
            *("--learning_rate", rate, "--seed", self.seed, *chosen.options),
        )
        return output

    def figures(self, method: str, rate: float | None, *options: Any) -> dict[str, Any]:
        """Greedy and sampled accuracy on the held-out problems (`rate` None: of the base), and all that
        scripts/evaluate.py writes with `options`."""
        name = "base" if rate is None else self.name(method, rate)
        adapter: tuple[Any, ...] = () if rate is None else ("--adapter", self.train(method, rate))
        model = self.base if rate is None else self.start(method)
        self.stages.run(
            *(f"evaluate {name}", "scripts/evaluate.py", "--model", model, *adapter, "--seed", self.seed),
            *("--problems", self.out / "held_out" / self.split, "--split", "train", "--samples", self.args.samples),
            *("--max_tokens", MAX_TOKENS, "--output_dir", self.out / "evaluation" / name, *options),
        )
        metrics = json.loads((self.out / "evaluation" / name / "metrics.json").read_text())
        return metrics | {key: metrics[f"{key}_accuracy"] for key in MEASURES}


class Comparison:
    """The grid on validation problems, then every seed on test problems.

    Args:
        args: sizes.
        methods: name -> method; one that others start from stands before them.
        make: name of a dataset -> function that makes it (see `SeedRun`).
    """

    def __init__(
        self,
        args: ComparisonArguments,
        methods: Mapping[str, Method],
        make: Mapping[str, Callable[[SeedRun], Path]],
    ):
        self.args, self.methods, self.make = args, methods, make
        self.rates: dict[str, float] = {}
        self.grid: dict[str, dict[float, dict[str, float]]] = {}

    def choose_rates(self) -> None:
        """The rate of every method: best greedy accuracy on validation problems; sampled accuracy settles a tie."""
        run = self._run(GRID_SEED, "validation", self.args.validation_problems)
        for method in self.methods:
            cells = {}
            for rate in self.args.learning_rates:
                figures = run.figures(method, rate)
                cells[rate] = {key: figures[key] for key in MEASURES}
            self.grid[method] = cells
            self.rates[method] = max(cells, key=lambda r: (cells[r]["greedy"], cells[r]["sampled"]))

    def seed(self, seed: int) -> SeedRun:
        """A seed with its test problems; the rates must be chosen."""
        return self._run(seed, "test", self.args.test_problems)

    def _run(self, seed: int, split: str, problems: int) -> SeedRun:
        return SeedRun(self.args, self.methods, self.make, self.rates, seed=seed, split=split, problems=problems)

    def validation(self) -> dict[str, Any]:
        """What the rates were chosen by, for results.json."""
        return {
            "grid": {m: {f"{rate:g}": cell for rate, cell in cells.items()} for m, cells in self.grid.items()},
            "learning_rate": self.rates,
            "at_edge": [m for m, r in self.rates.items() if r in (self.args.learning_rates[0], self._highest())],
        }

    def _highest(self) -> float:
        return self.args.learning_rates[-1]


def summary(by_method: Mapping[str, list[dict[str, Any]]], keys: tuple[str, ...] = MEASURES) -> dict[str, Any]:
    """method -> measure -> over seeds."""
    return {m: {key: over_seeds([s[key] for s in seeds]) for key in keys} for m, seeds in by_method.items()}


def difference(
    by_method: Mapping[str, list[dict[str, Any]]], better: str, worse: str, keys: tuple[str, ...] = MEASURES
) -> dict[str, Any]:
    """Paired difference over seeds of two methods that share problems, pairs and test set."""
    return {
        "better": better,
        "worse": worse,
        **{key: paired([s[key] for s in by_method[better]], [s[key] for s in by_method[worse]]) for key in keys},
    }


def show_comparison(results: Mapping[str, Any]) -> None:
    """Methods and paired differences on the screen."""

    def percent(entry: dict[str, Any], sign: str = "") -> str:
        if entry["ci95"][0] is None:
            return f"{100 * entry['mean']:{sign}.1f}"
        low, high = entry["ci95"]
        return f"{100 * entry['mean']:{sign}.1f} ({100 * low:{sign}.1f} – {100 * high:{sign}.1f})"

    table = Table("method", "learning rate", *MEASURES, title="per cent, mean over seeds (95 % interval)")
    for method, entry in results["methods"].items():
        rate = results["validation"]["learning_rate"].get(method)
        table.add_row(method, "" if rate is None else f"{rate:g}", *(percent(entry[key]) for key in MEASURES))
    claims = Table("difference", *(f"Δ {key}" for key in MEASURES), title="paired over seeds, points")
    for entry in results["differences"]:
        claims.add_row(f"{entry['better']} − {entry['worse']}", *(percent(entry[key], "+") for key in MEASURES))
    Console().print(table, claims)
