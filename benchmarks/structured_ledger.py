r"""Structured GRPO in the ledger world: the table, the ablation and the curriculum of RL-Struct in miniature, by seed.

    python benchmarks/structured_ledger.py --output_dir runs/structured_ledger

A base that has read sloppy JSON (half of its documents have a fault of structure) → SFT on a few clean documents → from
there DPO (best against worst of eight samples by the reward), GRPO with our reward, with the paper's literal one, and
with each component of ours left out, all with the same settings and rollouts of vLLM in the same process; and the SFT
model under constrained decoding. Every model answers the same test problems at temperature 1 and greedily. Means over
seeds with 95 % intervals (Student's t), paired differences, and every component over the steps. Writes
`structured_ledger.json`, `.md`, `.png` and `curriculum.png`. vLLM comes with `make install-test`; `--rollouts
transformers` needs none. A killed run goes on with the model that it was at.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ledger_stages import LEDGER, ROOT, over_seeds, stages_in, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.data.contract import load_stage
from tokalign.data.prompts import render_prompt
from tokalign.evaluation.run import problem_seed
from tokalign.generation.protocol import EngineArguments, SamplingParams, load_engine
from tokalign.jobs import Dropped, run_job
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured import WEIGHTS
from tokalign.view.curriculum import curriculum, first_step, plot_curriculum

# ledger_stages has put scripts/ on the path
from evaluate_structured import EvaluateStructuredArguments, OptionalEngineArguments  # isort: skip
from evaluate_structured import main as evaluate  # isort: skip
from quickstart import command_line, config_hash  # isort: skip

WORLD = "--min_events 2 --max_events 3 --max_start 20 --max_change 10 --max_number 40".split()
MAX_TOKENS = 110
ABLATED = ("validity", "structure", "format", "schema", "correctness")
GRPO: dict[str, tuple[str, ...]] = {
    "GRPO": (),
    "GRPO, the paper's literal reward": ("--reward_preset", "rl-struct"),
    **{
        f"GRPO − {left_out}": (
            "--component_weights",
            json.dumps({name: weight for name, weight in WEIGHTS.items() if name not in (left_out, "length")}),
        )
        for left_out in ABLATED
    },
}
METHODS = ("base", "SFT", "SFT, constrained decoding", "DPO", *GRPO)
FIGURES = ("validity", "structure", "compliance", "content_f1", "exact_match", "invented_keys", "total")
CLAIMS = [("GRPO", other) for other in ("SFT", "DPO", *list(GRPO)[1:])]


@dataclass
class StructuredLedgerArguments:
    """Sizes of the experiment."""

    output_dir: str = field(default="runs/structured_ledger", metadata={"help": "Folder of all results."})
    seeds: int = field(default=3, metadata={"help": "Seeds 0, 1, …"})
    base_documents: int = field(default=35200, metadata={"help": "Documents that the base is trained on, once."})
    sloppy_share: float = field(default=0.5, metadata={"help": "Share of them with a fault of structure."})
    problems: int = field(default=2000, metadata={"help": "Problems of the train split, for GRPO and DPO."})
    sft_documents: int = field(default=200, metadata={"help": "Clean documents of the SFT (validation split)."})
    sft_learning_rate: float = field(default=3e-4, metadata={"help": "Of the SFT, full fine-tuning."})
    pairs_from: int = field(default=600, metadata={"help": "Problems of which DPO's pairs are sampled."})
    steps: int = field(default=40, metadata={"help": "Steps of GRPO, 16 prompts × 8 completions each."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of GRPO, the same for every reward."})
    dpo_learning_rate: float = field(default=3e-4, metadata={"help": "Of DPO."})
    rollouts: str = field(default="vllm-colocate", metadata={"help": "Rollouts of GRPO; 'transformers' needs no vLLM."})
    test_problems: int = field(default=500, metadata={"help": "Test problems, the same for every seed."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})


class Experiment:
    """The world, the base, and by seed everything that is trained on them."""

    def __init__(self, args: StructuredLedgerArguments):
        self.args, self.out = args, Path(args.output_dir)
        self.stages = stages_in(self.out)
        self.world, self.base = self.out / "world", self.out / "base"
        self.stages.run(
            *("world", "data/ledger.py", "--output_dir", self.world, "--problem_rendering", "json", *WORLD),
            *("--renderings", "json", "--sloppy_share", args.sloppy_share, "--sft", args.base_documents),
            *("--train", args.problems, "--validation", args.sft_documents, "--test", args.test_problems),
        )
        self.stages.train(
            *("base", "recipes/sft.py", self.base, "--config", f"{LEDGER}/base_slm.yaml"),
            *("--model_name_or_path", self.world / "ledger-slm", "--dataset_name", self.world / "sft"),
            *("--max_steps", args.base_documents // 32, "--seed", 0),
        )

    def model(self, method: str, seed: int) -> tuple[Path, Path | None]:
        """Model and adapter of a method, trained now if it is not there."""
        if method == "base":
            return self.base, None
        folder = self.out / f"seed-{seed}"
        sft = folder / "sft"
        self.stages.train(
            *(f"SFT, seed {seed}", "recipes/sft.py", sft, "--config", f"{LEDGER}/sft.yaml", "--use_peft", "false"),
            *("--model_name_or_path", self.base, "--dataset_name", self.world, "--dataset_train_split", "validation"),
            *("--learning_rate", self.args.sft_learning_rate, "--num_train_epochs", 1, "--seed", seed),
        )
        if method.startswith("SFT"):
            return sft, None
        adapter = folder / method.replace(" ", "_").replace(",", "").replace("'", "")
        if method == "DPO":
            pairs = self.pairs(sft, folder / "pairs", seed)
            self.stages.train(
                *(f"DPO, seed {seed}", "recipes/critical_dpo.py", adapter, "--config", f"{LEDGER}/dpo.yaml"),
                *("--model_name_or_path", sft, "--dataset_name", pairs, "--seed", seed),
                *("--learning_rate", self.args.dpo_learning_rate),
            )
        else:
            self.launch(
                *(f"{method}, seed {seed}", "recipes/structured_grpo.py", adapter),
                *("--config", f"{LEDGER}/structured_grpo.yaml", *GRPO[method], "--rollouts", self.args.rollouts),
                *("--model_name_or_path", sft, "--dataset_name", self.world, "--seed", seed),
                *("--max_steps", self.args.steps, "--learning_rate", self.args.learning_rate),
            )
        return sft, adapter

    def launch(self, name: str, script: str, output: Path, *arguments: Any) -> None:
        """Run a recipe once, in a process of its own: one process holds one engine of vLLM."""
        arguments = (*arguments, "--output_dir", output)
        if self.stages.is_done(name, script, arguments):
            return
        Console().rule(name, align="left")
        started = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True, cwd=ROOT)
        command = command_line(script, arguments)
        self.stages.finish(name, command, time.perf_counter() - started, config_hash(arguments))

    def pairs(self, model: Path, output: Path, seed: int) -> Path:
        """Best and worst of eight samples of each problem by our reward; problems where all are worth the same drop."""
        reward = StructuredReward()
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = load_stage(self.world, split="train").select(range(self.args.pairs_from))
        engines: list[Any] = []

        def work(batch: list[dict[str, Any]]) -> list[Any]:
            if not engines:
                engines.append(load_engine(EngineArguments(model=str(model))))
            prompts = [render_prompt(row["prompt"], tokenizer) for row in batch]
            each = [SamplingParams(n=8, max_tokens=MAX_TOKENS, seed=problem_seed(seed, row["id"])) for row in batch]
            made: list[Any] = []
            for row, ids, completions in zip(batch, prompts, engines[0].generate(prompts, each), strict=True):
                texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
                scored = [reward.score(text, row["answer"], row["schema"])["total"] for text in texts]
                best, worst = scored.index(max(scored)), scored.index(min(scored))
                if scored[best] == scored[worst]:
                    made.append(Dropped("all samples are worth the same"))
                    continue
                sides = {"chosen": best, "rejected": worst}
                made.append(
                    {"id": row["id"], "prompt": row["prompt"], "prompt_ids": ids}
                    | {side: [{"role": "assistant", "content": texts[i]}] for side, i in sides.items()}
                    | {f"{side}_ids": completions[i].token_ids for side, i in sides.items()}
                )
            return made

        run_job(work, rows, output, name="pairs by reward", parameters={"seed": seed}, tokenizer=tokenizer)
        return output

    def figures(self, method: str, seed: int, temperature: float) -> dict[str, float]:
        """Figures of a method on the test problems."""
        model, adapter = self.model(method, seed)
        place = self.out / f"seed-{seed}" / "evaluation" / f"{method} T={temperature:g}".replace(" ", "_")
        constrained = method.endswith("constrained decoding")
        metrics = evaluate(
            EvaluateStructuredArguments(
                output_dir=str(place),
                problems=str(self.world),
                constrained=constrained,
                temperature=temperature,
                seed=seed,
                max_tokens=2 * MAX_TOKENS if constrained else MAX_TOKENS,
            ),
            OptionalEngineArguments(model=str(model), adapter=adapter and str(adapter)),
        )
        return {
            **{name: metrics["figures"][name]["value"] for name in FIGURES},
            "tokens_per_second": metrics["latency"]["tokens_per_second"],
        }

    def history(self, method: str, seed: int) -> list[dict[str, Any]]:
        """The training log of a GRPO run."""
        _, adapter = self.model(method, seed)
        assert adapter is not None
        return json.loads((adapter / "log_history.json").read_text())


def main(args: StructuredLedgerArguments) -> dict[str, Any]:
    experiment = Experiment(args)
    cells: dict[str, dict[str, list[dict[str, float]]]] = {"sampled": {}, "greedy": {}}
    for method in args.methods:
        for key, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            cells[key][method] = [experiment.figures(method, seed, temperature) for seed in range(args.seeds)]
    trained = [m for m in args.methods if m in GRPO]
    histories = {m: [experiment.history(m, seed) for seed in range(args.seeds)] for m in trained}
    results = {
        "arguments": asdict(args),
        **{key: {m: summary(runs) for m, runs in methods.items()} for key, methods in cells.items()},
        "differences": [
            {
                "better": better,
                "worse": worse,
                **{
                    f: over_seeds([a[f] - b[f] for a, b in zip(sampled[better], sampled[worse], strict=True)])
                    for f in ("validity", "structure", "content_f1", "exact_match")
                },
            }
            for sampled in (cells["sampled"],)
            for better, worse in CLAIMS
            if {better, worse} <= set(args.methods)
        ],
        "half_way_step": {
            m: {
                component: [first_step(curriculum(smooth(history))[component]) for history in runs]
                for component in curriculum(runs[0])
            }
            for m, runs in histories.items()
        },
    }
    write_json(experiment.out / "structured_ledger.json", results)
    show(results, experiment.out)
    if histories:
        mean = {m: average(runs) for m, runs in histories.items()}
        plot_curriculum({m: mean[m] for m in list(mean)[:2]}, experiment.out / "curriculum.png", window=3)
    return results


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Every figure over the seeds."""
    return {figure: over_seeds([run[figure] for run in runs]) for figure in (*FIGURES, "tokens_per_second")}


def smooth(history: list[dict[str, Any]], window: int = 5) -> list[dict[str, Any]]:
    """A log with every component replaced by its running mean: single steps of 128 completions are noisy."""
    kept = [entry for entry in history if "structured/validity" in entry or "structured/structure" in entry]
    made = []
    for i, entry in enumerate(kept):
        part = kept[max(0, i - window + 1) : i + 1]
        means = {
            k: sum(p[k] for p in part) / len(part)
            for k in entry
            if k.startswith("structured/") and all(k in p for p in part)
        }
        made.append({"step": entry["step"], **means})
    return made


def average(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean over seeds of the components at each step."""
    kept = [[e for e in run if any(k.startswith("structured/") for k in e)] for run in runs]
    return [
        {
            "step": entries[0]["step"],
            **{k: sum(e[k] for e in entries) / len(entries) for k in entries[0] if k.startswith("structured/")},
        }
        for entries in zip(*kept, strict=True)
    ]


def show(results: dict[str, Any], folder: Path) -> None:
    """The same tables on screen and as Markdown, and a figure."""
    headings = ("valid", "structure", "schema", "content F1", "exact", "invented keys", "reward", "tokens/s")
    figures = (*FIGURES, "tokens_per_second")
    seeds, n = results["arguments"]["seeds"], results["arguments"]["test_problems"]
    lines: list[str] = []
    console = Console()

    def cell(figure: str, entry: dict[str, Any], sign: str = "") -> str:
        if figure == "tokens_per_second":
            return f"{entry['mean']:,.0f}"
        scale, digits = (1, 2) if figure in ("invented_keys", "total") else (100, 1)
        mean, low, high = (scale * value for value in (entry["mean"], *entry["ci95"]))
        return f"{mean:{sign}.{digits}f} ({low:{sign}.{digits}f} – {high:{sign}.{digits}f})"

    for key, title in (("sampled", "temperature 1"), ("greedy", "greedy")):
        caption = f"{title}: {seeds} seeds × {n} test problems, mean over seeds (95 % interval); per cent where a share"
        table = Table("method", *headings, title=caption)
        lines += [caption, "", f"| method | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
        for method, entry in results[key].items():
            row = [method, *(cell(f, entry[f]) for f in figures)]
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
        lines.append("")
        console.print(table)
    compared = ("validity", "structure", "content_f1", "exact_match")
    caption = "Paired differences over seeds, temperature 1, points"
    table = Table("", *compared, title=caption)
    lines += [caption, "", f"| | {' | '.join(compared)} |", "|---" * (len(compared) + 1) + "|"]
    for entry in results["differences"]:
        row = [f"{entry['better']} over {entry['worse']}", *(cell(f, entry[f], "+") for f in compared)]
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    console.print(table)
    (folder / "structured_ledger.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    shown = ("validity", "structure", "content_f1", "exact_match")
    figure, axes = plt.subplots(1, len(shown), figsize=(14, 4), layout="constrained", sharey=True)
    names = list(results["sampled"])
    for axis, name in zip(axes, shown, strict=True):
        means = [results["sampled"][m][name]["mean"] for m in names]
        spread = [results["sampled"][m][name]["ci95"][1] - mean for m, mean in zip(names, means, strict=True)]
        axis.errorbar(means, names, xerr=spread, fmt="o", capsize=4)
        axis.set(title=f"{name.replace('_', ' ')}, temperature 1", xlim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(folder / "structured_ledger.png", dpi=110)


if __name__ == "__main__":
    main(*TrlParser((StructuredLedgerArguments,)).parse_args_and_config())
