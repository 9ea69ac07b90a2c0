"""The main job: from nothing to a better model and a report, on a laptop without a GPU.

    tokalign quickstart
    make quickstart          (in a clone: the same by `--config recipes/ledger/quickstart.yaml`)

Runs the whole of critical-token DPO (arXiv 2411.19943) on the ledger world by the same verbs that train an 8B model,
one after the other, each with the command line that is printed above it:

    base → rollouts → pairs → positive/negative adapters → scores → SFT, DPO, critical-token DPO → evaluation → report

Stages that a former run finished are skipped; a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Tiny models gain nothing from an accelerator, and laptops with one kind of CPU shall see the same numbers.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or its two threads hinder each other on a busy machine

import torch
import transformers
import trl
from rich.table import Table
from transformers import AutoTokenizer

from tokalign.cli.ledger_models import THREADS, trained_model
from tokalign.cli.stages import Stages, console
from tokalign.evaluation.run import compare_runs
from tokalign.stage.manifest import read_manifest
from tokalign.view.heatmap import token_heatmap
from tokalign.view.report import build_report
from tokalign.view.results import agreement_rows, heatmap_rows, logp_curve, pass_at_k_bands

LEDGER = "recipes/ledger"
METHODS = ("base", "sft", "dpo", "critical_token_dpo")
NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO", "critical_token_dpo": "critical-token DPO"}


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


def main(args: QuickstartArguments) -> dict[str, Any]:
    """Run or resume every stage; returns what `metrics.json` holds."""
    torch.set_num_threads(THREADS)  # not as many as there are cores: the figures would be others on each machine
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    world, pairs = out / "world", out / "preferences" / "pairs"
    seed, tokens = ("--seed", args.seed), ("--max_tokens", args.max_tokens)

    sizes = ("--train", args.train_problems, "--validation", 1, "--test", args.test_problems, "--sft", 1)
    stages.run("problems", "data ledger", "--output_dir", world, *sizes, *seed)
    base = Path(args.base) if args.base else base_model(stages, out / "base")
    model = ("--model", base)

    sampling = ("--dataset", world / "train", "--num_rollouts", args.rollouts, *tokens, *seed)
    stages.run("rollouts", "sample", *model, *sampling, "--output_dir", out / "rollouts")
    stages.run("pairs", "pairs", "--dataset", out / "rollouts", "--output_dir", out / "preferences", *seed)

    def train(name: str, verb: str, folder: str, config: str, dataset: Path) -> None:
        options = ("--config", f"{LEDGER}/{config}.yaml", "--model_name_or_path", base, "--dataset_name", dataset)
        stages.train(name, verb, out / folder, *options, *seed)

    for side in ("positive", "negative"):
        train(f"{side} adapter", "sft", side, f"{side}_sft", out / "preferences" / side)
    sides = ("--positive", out / "positive", "--negative", out / "negative")
    stages.run(
        "contrastive scores", "score contrast", *model, "--dataset", pairs, *sides, "--output_dir", out / "scored"
    )
    known = ("--dataset", out / "scored", "--tokenizer", base, "--problems", world / "train")
    stages.run("true first errors", "score first-error", *known, "--output_dir", out / "marked")
    estimate = ("--max_rows", args.estimate_rows, "--n", args.continuations, *tokens, *seed)
    rollout = (*model, "--dataset", pairs, *estimate, "--output_dir", out / "rollout_estimate")
    stages.run("rollout estimate", "score rollout", *rollout)
    both = ("--datasets", out / "marked", out / "rollout_estimate")
    stages.run("agreement", "compare", *both, "--output_dir", out / "agreement")

    train(NAMES["sft"], "sft", "sft", "sft", out / "preferences" / "positive")
    train(NAMES["dpo"], "dpo", "dpo", "dpo", out / "scored")
    train(NAMES["critical_token_dpo"], "critical-dpo", "critical_token_dpo", "critical_dpo", out / "scored")
    for method in METHODS:
        adapter = () if method == "base" else ("--adapter", out / method)
        test = ("--problems", world / "test", "--split", "train", "--preferences", pairs)
        evaluation = (*model, *adapter, *test, "--samples", args.samples, *tokens, *seed)
        folder = ("--output_dir", out / "evaluation" / method)
        stages.run(f"evaluation of {NAMES[method]}", "evaluate answers", *evaluation, *folder)
    return finish(args, stages, out, base)


def base_model(stages: Stages, folder: Path) -> Path:
    """The weak base model, copied from the cache to where recipes/ledger/ expects it, and trained first if need be."""
    console.rule("[bold]base model[/bold]", align="left")
    if "base model" not in stages.done or not folder.exists():
        started = time.perf_counter()
        shutil.copytree(trained_model("ledger-slm"), folder, dirs_exist_ok=True)
        stages.finish("base model", str(folder), time.perf_counter() - started)
    console.print(f"[dim]{folder}[/dim]", highlight=False, soft_wrap=True)
    return folder


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
    rows_of_heatmap = heatmap_rows(out / "marked", out / "rollout_estimate")
    heatmap = token_heatmap(rows_of_heatmap, tokenizer, title="Which tokens break wrong answers", fragment=True)
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


def show(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> None:
    """The result on screen."""
    n = rows[0]["n"]
    table = Table(title=f"{n} held-out problems", caption="Δ: mean change of Σ log π over the pairs against base, nats")
    for heading in ("method", "greedy", "95 %", "sampled", "Δ chosen", "Δ rejected"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        low, high = row["ci95"]
        accuracy = (f"{row['greedy_accuracy']:.1%}", f"{low:.1%} – {high:.1%}", f"{row['sampled_accuracy']:.1%}")
        table.add_row(row["method"], *accuracy, f"{row['chosen_change']:+.2f}", f"{row['rejected_change']:+.2f}")
    console.print(table)
    for row in comparisons:
        low, high = row["ci95"]
        console.print(f"{row['name']}: {row['difference']:+.1%} ({low:+.1%} – {high:+.1%}), p = {row['p']:.2g}")
