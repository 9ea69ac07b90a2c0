"""Learning-rate grid of the ledger methods on the validation split: what the YAMLs in recipes/ledger/ are set from.

    python benchmarks/ledger_grid.py --quickstart runs/quickstart --output_dir runs/ledger_grid

Every method gets the same grid on the same pairs (those of a finished `make quickstart`); the test split is not read.
Writes `grid.json` and `grid.png`; finished cells are kept.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from trl import TrlParser

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from quickstart import Stages  # noqa: E402  the quickstart's way of running a recipe, kept in one place

RECIPES = {"sft": "sft", "dpo": "critical_dpo", "rpo": "critical_dpo", "critical_dpo": "critical_dpo"}


@dataclass
class GridArguments:
    """The grid."""

    quickstart: str = field(default="runs/quickstart", metadata={"help": "Folder of a finished quickstart."})
    output_dir: str = field(default="runs/ledger_grid", metadata={"help": "Folder of the grid."})
    methods: list[str] = field(default_factory=lambda: ["sft", "dpo", "critical_dpo"], metadata={"help": "Methods."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3],
        metadata={"help": "Learning rates, the same for every method."},
    )
    problems: int = field(default=1000, metadata={"help": "Validation problems."})
    seed: int = field(default=0, metadata={"help": "Seed of training and sampling."})


def main(args: GridArguments) -> list[dict]:
    """Train and evaluate every cell."""
    out, source = Path(args.output_dir), Path(args.quickstart)
    out.mkdir(parents=True, exist_ok=True)
    stages, seed = Stages(out), ("--seed", args.seed)
    base = json.loads((source / "state.json").read_text())["base model"]["command"]
    world = out / "world"
    sizes = ("--train", 1, "--validation", args.problems, "--test", 1, "--sft", 1)
    stages.run("validation problems", "data/ledger.py", "--output_dir", world, *sizes, *seed)
    cells = []
    for method in args.methods:
        dataset = source / ("preferences/positive" if method == "sft" else "scored")
        for rate in args.learning_rates:
            name, model = f"{method} {rate:g}", out / f"{method}-{rate:g}"
            stages.train(
                *(f"train {name}", f"recipes/{RECIPES[method]}.py", model),
                *("--config", f"recipes/ledger/{method}.yaml", "--model_name_or_path", base),
                *("--dataset_name", dataset, "--learning_rate", rate, *seed),
            )
            stages.run(
                *(f"evaluate {name}", "scripts/evaluate.py", "--model", base, "--adapter", model, *seed),
                *("--problems", world / "validation", "--split", "train", "--samples", 2, "--max_tokens", 96),
                *("--output_dir", out / f"evaluation-{method}-{rate:g}"),
            )
            figures = json.loads((out / f"evaluation-{method}-{rate:g}" / "metrics.json").read_text())
            keep = ("greedy_accuracy", "ci95", "sampled_accuracy", "sampled_ci95", "n")
            cells.append({"method": method, "learning_rate": rate, **{key: figures[key] for key in keep}})
    (out / "grid.json").write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")
    show(cells, out / "grid.png")
    return cells


def show(cells: list[dict], picture: Path) -> None:
    """Table on screen and a figure with intervals."""
    table = Table("method", "learning rate", "greedy", "95 % interval", "sampled", title=f"n = {cells[0]['n']}")
    figure, axis = plt.subplots(figsize=(6, 4))
    for method in dict.fromkeys(cell["method"] for cell in cells):
        rows = [cell for cell in cells if cell["method"] == method]
        for row in rows:
            low, high = row["ci95"]
            cells_ = (f"{row['greedy_accuracy']:.1%}", f"{low:.1%} – {high:.1%}", f"{row['sampled_accuracy']:.1%}")
            table.add_row(method, f"{row['learning_rate']:g}", *cells_)
        values = [row["greedy_accuracy"] for row in rows]
        errors = [[abs(v - row["ci95"][side]) for v, row in zip(values, rows, strict=True)] for side in (0, 1)]
        axis.errorbar([row["learning_rate"] for row in rows], values, yerr=errors, marker="o", capsize=3, label=method)
    axis.set(xscale="log", xlabel="learning rate", ylabel="greedy accuracy (validation)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((GridArguments,)).parse_args_and_config())
