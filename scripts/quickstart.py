"""The main job: from nothing to a better model and a report, on a laptop without a GPU.

    make quickstart          (or: python scripts/quickstart.py --config recipes/ledger/quickstart.yaml)

Runs the whole of critical-token DPO (arXiv 2411.19943) on the ledger world by calling the same scripts and recipes that
train an 8B model, one after the other, each with the command line that is printed above it:

    base → rollouts → pairs → positive/negative adapters → scores → SFT, DPO, critical-token DPO → evaluation → report

Stages that a former run finished are skipped; a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Tiny models gain nothing from an accelerator, and every laptop shall see the same numbers.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.evaluation.run import compare_runs
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.trainers.checkpoints import last_whole_checkpoint
from tokalign.view.heatmap import token_heatmap
from tokalign.view.report import build_report
from tokalign.worlds.ledger_models import trained_model

ROOT = Path(__file__).resolve().parents[1]
LEDGER = "recipes/ledger"
METHODS = ("base", "sft", "dpo", "critical_token_dpo")
NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO", "critical_token_dpo": "critical-token DPO"}
console = Console()


@dataclass
class QuickstartArguments:
    """Sizes of the main job; recipes/ledger/quickstart.yaml holds the measured ones."""

    output_dir: str = field(default="runs/quickstart", metadata={"help": "Folder of all results."})
    base: str | None = field(default=None, metadata={"help": "Start from this model instead of the ledger's weak one."})
    train_problems: int = field(default=1500, metadata={"help": "Problems to sample rollouts for."})
    test_problems: int = field(default=1500, metadata={"help": "Held-out problems of the evaluation (read once)."})
    rollouts: int = field(default=16, metadata={"help": "Rollouts a problem."})
    estimate_rows: int = field(default=60, metadata={"help": "Wrong answers that get the costly rollout estimate."})
    continuations: int = field(default=64, metadata={"help": "Continuations a prefix of the rollout estimate."})
    samples: int = field(default=4, metadata={"help": "Samples a test problem for the sampled accuracy."})
    max_tokens: int = field(default=96, metadata={"help": "Most tokens of a completion."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def config_hash(arguments: Sequence[Any]) -> str | None:
    """Hash of the YAML behind `--config`, whose settings the command line does not show."""
    parts = [str(part) for part in arguments]
    if "--config" not in parts:
        return None
    return hashlib.sha256((ROOT / parts[parts.index("--config") + 1]).read_bytes()).hexdigest()[:12]


def command_line(script: str, arguments: Sequence[Any]) -> str:
    """What one would type in a shell."""
    return shlex.join(["python", script, *map(str, arguments)])


class Stages:
    """Runs stages once: finished ones, with the same command line, are kept in `state.json` with their seconds."""

    def __init__(self, folder: Path):
        self.file = folder / "state.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.commands: list[str] = []

    def is_done(self, name: str, script: str, arguments: Sequence[Any]) -> bool:
        """Whether a former run finished this stage with this command line and these settings."""
        done = self.done.get(name, {})
        return done.get("command") == command_line(script, arguments) and done.get("config") == config_hash(arguments)

    def run(self, name: str, script: str, *arguments: Any, resume: tuple[str, ...] = ()) -> None:
        """Run `script` as `python script arguments…` would, in this process (imports are paid once)."""
        command = command_line(script, arguments)
        self.commands.append(command)
        if self.is_done(name, script, arguments):
            console.print(f"[dim]✓ {name} (done before)[/dim]")
            return
        console.rule(f"[bold]{name}[/bold]", align="left")
        console.print(f"[dim]{command}[/dim]", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        argv, sys.argv = sys.argv, [str(ROOT / script), *map(str, arguments), *resume]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            sys.argv = argv
        self.finish(name, command, time.perf_counter() - started, config_hash(arguments))

    def finish(self, name: str, command: str, seconds: float, config: str | None = None) -> None:
        """Note that a stage is done; written whole or not at all."""
        self.done[name] = {"command": command, "seconds": round(seconds, 1), "config": config}
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)

    def train(self, name: str, script: str, output: Path, *arguments: Any) -> None:
        """Run a recipe; an interrupted training goes on from its last checkpoint, unless its settings have changed."""
        arguments = (*arguments, "--output_dir", output)
        settings = json.dumps([script, *map(str, arguments), config_hash(arguments)])
        note = output / "started_with.json"
        resume: tuple[str, ...] = ()
        if not self.is_done(name, script, arguments):
            if note.exists() and note.read_text() == settings:
                checkpoint = last_whole_checkpoint(output)
                resume = ("--resume_from_checkpoint", checkpoint) if checkpoint else ()
            else:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True, exist_ok=True)
            note.write_text(settings)
        self.run(name, script, *arguments, resume=resume)


def main(args: QuickstartArguments) -> dict[str, Any]:
    """Run or resume every stage; returns what `metrics.json` holds."""
    os.chdir(ROOT)  # the recipes' paths are relative to the repository
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    world, seed = out / "world", ("--seed", args.seed)

    sizes = ("--train", args.train_problems, "--validation", 1, "--test", args.test_problems, "--sft", 1)
    stages.run("problems", "data/ledger.py", "--output_dir", world, *sizes, *seed)
    base = Path(args.base) if args.base else base_model(stages)

    sampling = ("--num_rollouts", args.rollouts, "--max_tokens", args.max_tokens, *seed)
    stages.run(
        *("rollouts", "scripts/sample_rollouts.py", "--model", base, "--dataset", world / "train"),
        *("--output_dir", out / "rollouts", *sampling),
    )
    stages.run(
        *("pairs", "scripts/build_pairs.py", "--dataset", out / "rollouts", "--output_dir", out / "preferences"),
        *seed,
    )
    pairs = out / "preferences" / "pairs"
    for side in ("positive", "negative"):
        stages.train(
            *(f"{side} adapter", "recipes/sft.py", out / side, "--config", f"{LEDGER}/{side}_sft.yaml"),
            *("--model_name_or_path", base, "--dataset_name", out / "preferences" / side, *seed),
        )
    stages.run(
        *("contrastive scores", "scripts/score.py", "contrast", "--model", base, "--dataset", pairs),
        *("--positive", out / "positive", "--negative", out / "negative", "--output_dir", out / "scored"),
    )
    stages.run(
        *("true first errors", "scripts/score.py", "first-error", "--dataset", out / "scored", "--tokenizer", base),
        *("--problems", world / "train", "--output_dir", out / "marked"),
    )
    stages.run(
        *("rollout estimate", "scripts/score.py", "rollout", "--model", base, "--dataset", pairs),
        *("--max_rows", args.estimate_rows, "--n", args.continuations, "--max_tokens", args.max_tokens),
        *("--output_dir", out / "rollout_estimate", *seed),
    )
    stages.run(
        *("agreement", "scripts/compare.py", "--datasets", out / "marked", out / "rollout_estimate"),
        *("--output_dir", out / "agreement"),
    )

    recipes = {
        "sft": ("recipes/sft.py", out / "preferences" / "positive"),
        "dpo": ("recipes/critical_dpo.py", out / "scored"),
        "critical_token_dpo": ("recipes/critical_dpo.py", out / "scored"),
    }
    for method, (recipe, dataset) in recipes.items():
        config = f"{LEDGER}/{method.replace('critical_token', 'critical')}.yaml"
        stages.train(
            *(NAMES[method], recipe, out / method, "--config", config),
            *("--model_name_or_path", base, "--dataset_name", dataset, *seed),
        )
    for method in METHODS:
        adapter = () if method == "base" else ("--adapter", out / method)
        stages.run(
            *(f"evaluation of {NAMES[method]}", "scripts/evaluate.py", "--model", base, *adapter),
            *("--problems", world / "test", "--split", "train", "--preferences", pairs),
            *("--samples", args.samples, "--max_tokens", args.max_tokens, *seed),
            *("--output_dir", out / "evaluation" / method),
        )
    return finish(args, stages, out, base)


def base_model(stages: Stages) -> Path:
    """The weak base model from the cache, trained first where the cache does not have it."""
    console.rule("[bold]base model[/bold]", align="left")
    started = time.perf_counter()
    base = trained_model("ledger-slm")
    if "base model" not in stages.done:
        stages.finish("base model", str(base), time.perf_counter() - started)
    console.print(f"[dim]{base}[/dim]", highlight=False, soft_wrap=True)
    return base


def finish(args: QuickstartArguments, stages: Stages, out: Path, base: Path) -> dict[str, Any]:
    """Table on screen, `metrics.json` and `report.html`."""
    evaluated = {m: json.loads((out / "evaluation" / m / "metrics.json").read_text()) for m in METHODS}
    start = evaluated["base"]["logps"]
    rows = []
    for method, figures in evaluated.items():
        change = {s: figures["logps"][s]["mean"] - start[s]["mean"] for s in ("chosen", "rejected")}
        kept = {k: figures[k] for k in ("greedy_accuracy", "sampled_accuracy", "n", "ci95", "sampled_ci95")}
        rows.append({"method": NAMES[method], **kept, **{f"{s}_change": change[s] for s in change}})
    metrics = {
        "seconds": round(sum(stage["seconds"] for stage in stages.done.values()), 1),
        "methods": {
            method: {key: row[key] for key in ("greedy_accuracy", "sampled_accuracy", "n", "ci95")}
            | {"chosen_logp_change": row["chosen_change"], "rejected_logp_change": row["rejected_change"]}
            for method, row in zip(METHODS, rows, strict=True)
        },
        "stages": {name: stage["seconds"] for name, stage in stages.done.items()},
        "seed": args.seed,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    comparisons = []
    for other in ("dpo", "sft", "base"):
        result = compare_runs(out / "evaluation" / "critical_token_dpo", out / "evaluation" / other)
        for kind in ("greedy", "sampled"):
            comparisons.append({"name": f"critical-token DPO − {NAMES[other]}, {kind} accuracy", **result[kind]})
    (out / "report.html").write_text(report(args, stages, out, base, rows, comparisons), encoding="utf-8")
    show(rows, comparisons[:2])
    console.print(f"\n{metrics['seconds']:.0f} s in all; [bold]{out / 'report.html'}[/bold], {out / 'metrics.json'}")
    return metrics


def report(args: QuickstartArguments, stages: Stages, out: Path, base: Path, rows, comparisons) -> str:
    """The page: table, comparisons, curves, pass@k, agreement, heatmap, commands."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    agreement = json.loads((out / "agreement" / "agreement.json").read_text())
    pass_at_k = {}
    pass_file = out / "rollout_estimate" / "pass_at_k.json"
    if pass_file.exists():
        pass_at_k = pass_at_k_bands(json.loads(pass_file.read_text()))
    heatmap = token_heatmap(heatmap_rows(out), tokenizer, title="Which tokens break wrong answers", fragment=True)
    dropped = read_manifest(out / "preferences" / "pairs").get("dropped", {})
    return build_report(
        title="tokalign quickstart: critical-token DPO on the ledger world",
        table=rows,
        comparisons=comparisons,
        curves={NAMES[m]: logp_curve(out / m) for m in ("dpo", "critical_token_dpo")},
        pass_at_k=pass_at_k,
        agreement=agreement_rows(agreement),
        heatmap=heatmap,
        commands=stages.commands,
        environment={
            "seed": args.seed,
            "seconds": round(sum(stage["seconds"] for stage in stages.done.values())),
            "problems without a pair": ", ".join(f"{n} × {reason}" for reason, n in dropped.items()) or "none",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}",
        },
    )


def heatmap_rows(out: Path, limit: int = 24) -> list[dict[str, Any]]:
    """The first pairs that the rollout estimate covered, with the columns of both stages."""
    estimated = {(row["id"], *row["rejected_ids"]): row for row in load_stage(out / "rollout_estimate")}
    rows: list[dict[str, Any]] = []
    for row in load_stage(out / "marked"):
        found = estimated.get((row["id"], *row["rejected_ids"]))
        if found and len(rows) < limit:
            columns = ("rejected_rollout_accuracy", "critical_index")
            rows.append({**row, **{column: found[column] for column in columns}})
    return rows


def logp_curve(folder: Path) -> dict[str, list[float | None]]:
    """`logps/chosen` and `logps/rejected` over steps, from the trainer's own log."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name.split("-")[1]))
    history = [x for x in json.loads(states[-1].read_text())["log_history"] if "logps/chosen" in x]
    return {
        "step": [x["step"] for x in history],
        "chosen": [x["logps/chosen"] for x in history],
        "rejected": [x["logps/rejected"] for x in history],
    }


def pass_at_k_bands(curves: dict[str, Any]) -> dict[str, Any]:
    """The rollout script's curves in the report's form: condition -> k -> (mean, low, high)."""
    return {
        condition: {row["k"]: (row["mean"], *row["ci95"]) for row in curves[condition]}
        for condition in ("with", "without")
    }


def agreement_rows(agreement: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a target and signal; figures as (value, low, high)."""
    return [
        {
            "target": target.replace("_", " "),
            "signal": signal.replace("_", " "),
            "AUROC": (figures["auroc"], *figures["auroc_ci95"]),
            "hit@1": (figures["hit1"], *figures["hit1_ci95"]),
            "tokens through the model a scored token": figures.get("tokens_per_scored_token") or "–",
        }
        for target, result in agreement.items()
        for signal, figures in result["signals"].items()
    ]


def show(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> None:
    """The result on screen."""
    n = rows[0]["n"]
    table = Table(title=f"{n} held-out problems", caption="Δ: mean change of Σ log π over the pairs against base, nats")
    for heading in ("method", "greedy", "95 %", "sampled", "Δ chosen", "Δ rejected"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        low, high = row["ci95"]
        table.add_row(
            *(row["method"], f"{row['greedy_accuracy']:.1%}", f"{low:.1%} – {high:.1%}"),
            *(f"{row['sampled_accuracy']:.1%}", f"{row['chosen_change']:+.2f}", f"{row['rejected_change']:+.2f}"),
        )
    console.print(table)
    for row in comparisons:
        low, high = row["ci95"]
        console.print(f"{row['name']}: {row['difference']:+.1%} ({low:+.1%} – {high:+.1%}), p = {row['p']:.2g}")


if __name__ == "__main__":
    main(*TrlParser((QuickstartArguments,)).parse_args_and_config())
