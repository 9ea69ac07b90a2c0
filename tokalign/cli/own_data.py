"""The pipeline on real text: GSM8K rows → rollouts → pairs → scores → two steps of critical-token DPO, on a laptop.

    tokalign own-data --source openai/gsm8k
    tokalign own-data --source path/to/gsm8k

The source is a hub id, or a folder with `train.jsonl`. Shows every stage on text of your own kind before a GPU is paid
for. A real model would be downloaded here; this makes a small stand-in instead (`tokalign.worlds.stand_in`). Stages
that a former run finished are skipped; a stage that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

# Tiny models gain nothing from an accelerator.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset

from tokalign.cli.stages import Stages, console
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.worlds.stand_in import as_messages, shortest, write_stand_in

CPU = ("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--dtype", "float32")
LORA = ("--use_peft", "true", "--lora_r", "8", "--learning_rate", "1e-3", "--logging_steps", "1")


@dataclass
class OwnDataArguments:
    """Where the text is, and how small the stand-in is."""

    source: str = field(metadata={"help": "GSM8K as `tokalign data gsm8k` takes it: a folder, a file or a hub id."})
    output_dir: str = field(default="runs/own_data", metadata={"help": "Folder of all results."})
    problems: int = field(default=24, metadata={"help": "Problems that the stand-in learns, the shortest ones."})
    vocab_size: int = field(default=1500, metadata={"help": "Size of the tokenizer that is trained on the text."})
    steps: int = field(default=150, metadata={"help": "Steps of learning by heart."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def main(args: OwnDataArguments) -> None:
    """Run or resume every stage."""
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, seed = Stages(out), ("--seed", args.seed)
    stages.run("problems", "data gsm8k", "--source", args.source, "--output_dir", out / "problems")
    write_few(args, out)

    base = out / "base"
    learning = ("--from_scratch", "true", "--max_steps", args.steps, "--learning_rate", "3e-3")
    batches = ("--per_device_train_batch_size", 8, "--save_strategy", "no", "--logging_steps", 50)
    start = ("--model_name_or_path", out / "stand_in", "--dataset_name", out / "few_sft", "--report_to", "none")
    stages.train("learning by heart", "sft", base, *start, *learning, *batches, *CPU, *seed)

    model, pairs = ("--model", base), out / "preferences" / "pairs"
    drawn = ("--dataset", out / "few", "--num_rollouts", 32, "--max_tokens", 200)
    stages.run("rollouts", "sample", *model, *drawn, "--output_dir", out / "rollouts", *seed)
    stages.run("pairs", "pairs", "--dataset", out / "rollouts", "--output_dir", out / "preferences", *seed)

    tuned = ("--model_name_or_path", base, "--report_to", "none", *LORA, *CPU, *seed)
    layers = ("--lora_target_modules", "gate_proj", "up_proj", "down_proj")
    for side in ("positive", "negative"):
        data = ("--dataset_name", out / "preferences" / side, "--num_train_epochs", 3)
        stages.train(f"{side} adapter", "sft", out / side, *tuned, *layers, *data)
    sides = ("--positive", out / "positive", "--negative", out / "negative")
    scored = out / "scored"
    stages.run("contrastive scores", "score contrast", *model, *sides, "--dataset", pairs, "--output_dir", scored)

    two_steps = ("--max_steps", 2, "--per_device_train_batch_size", 4, "--lora_target_modules", "all-linear")
    trained = out / "critical_token_dpo"
    stages.train("critical-token DPO", "critical-dpo", trained, *tuned, "--dataset_name", scored, *two_steps)
    page = out / "heatmap.html"
    stages.run("heatmap", "view", "--dataset", scored, "--tokenizer", base, "--output", page)
    console.print(f"\nPairs and scores in {scored}; look at [bold]{page}[/bold]")


def write_few(args: OwnDataArguments, out: Path) -> None:
    """The problems that the stand-in learns, their solutions, and the untrained stand-in itself."""
    problems = load_stage(out / "problems" / "train", stage="problems")
    rows = shortest(problems, args.problems)
    few = Dataset.from_list([{key: row[key] for key in ("id", "prompt", "answer", "solution")} for row in rows])
    sizes = {"problems": args.problems, "seed": args.seed}
    run_job(lambda batch: batch, few, out / "few", name="few problems", parameters=sizes)
    run_job(as_messages, few, out / "few_sft", name="few solutions", parameters=sizes)
    if not (out / "stand_in" / "config.json").exists():  # written last, so a killed run leaves no half stand-in
        write_stand_in(problems, out / "stand_in", args.vocab_size)
