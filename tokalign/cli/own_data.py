"""The pipeline on real text with your model: GSM8K rows → rollouts → pairs → scores → critical-token DPO, on a laptop.

    tokalign own-data --source openai/gsm8k --model HuggingFaceTB/SmolLM2-135M-Instruct
    tokalign own-data --source path/to/gsm8k --model runs/models/smollm2-135m-instruct
    tokalign own-data --source path/to/gsm8k --stand_in true

The source is a hub id, or a folder with `train.jsonl`; the model is a hub id or a folder (`tokalign data model smollm2`
fetches a small one, also where there is no hub). Its sizes are for a model of 135 M parameters: some twenty minutes of
one core, estimated from its measured speed. The model is first trained on worked solutions, as a small one solves too
few problems to have right and wrong answers of each; `--warm_up 0` leaves it as it is. Then come rollouts of other
problems, pairs of right and wrong ones, the positive and the negative adapter, contrastive scores, critical-token DPO,
and accuracy before and after it on problems that neither has seen. All trainings are those of
recipes/smollm2-135m-instruct/.

`--stand_in true` makes up a model instead, which learns a few problems by heart: nothing is downloaded, accuracy means
nothing, and it takes a minute. Stages that a former run finished are skipped; a stage that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

# Small models gain little from an accelerator, and the recipes are for a CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset
from transformers import AutoTokenizer

from tokalign.cli.stages import Stages, console
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.worlds.stand_in import shortest, write_stand_in

RECIPES = "recipes/smollm2-135m-instruct"
INSTRUCTION = "Solve it step by step. End with a line '#### <number>'."
BY_HEART, OF_EACH = 24, 32  # problems that the stand-in learns, and its rollouts of each
COLUMNS = ("id", "prompt", "answer", "solution", "completion")


@dataclass
class OwnDataArguments:
    """Where text and model are, and how much of it is done."""

    source: str = field(metadata={"help": "GSM8K as `tokalign data gsm8k` takes it: a folder, a file or a hub id."})
    model: str | None = field(default=None, metadata={"help": "The model: hub id or folder."})
    stand_in: bool = field(default=False, metadata={"help": "Make up a model that learns a few problems by heart."})
    output_dir: str = field(default="runs/own_data", metadata={"help": "Folder of all results."})
    warm_up: int = field(
        default=256, metadata={"help": "Worked solutions that the model is trained on first; 0 leaves it as it is."}
    )
    problems: int = field(
        default=64, metadata={"help": "Problems that rollouts are drawn of. All problems are the shortest ones."}
    )
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    test_problems: int = field(default=100, metadata={"help": "Problems of the evaluation; 0 leaves it out."})
    max_tokens: int = field(default=160, metadata={"help": "Most tokens of an answer."})
    vocab_size: int = field(default=1500, metadata={"help": "Stand-in: size of the tokenizer trained on the text."})
    steps: int = field(default=150, metadata={"help": "Stand-in: steps of learning by heart."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})

    def __post_init__(self) -> None:
        if (self.model is None) != self.stand_in:
            raise ContractError(
                "Say which model, and one: --model with a hub id or folder (`tokalign data model smollm2` fetches a "
                "small one), or --stand_in true for a made-up one."
            )


def main(args: OwnDataArguments) -> None:
    """Run or resume every stage."""
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, seed = Stages(out), ("--seed", args.seed)
    asked = () if args.stand_in else ("--instruction", INSTRUCTION)
    source = ("--source", args.source, "--prompt_style", "messages", *asked)
    if args.model:
        check_chat_template(args.model)
    stages.run("problems", "data gsm8k", *source, "--output_dir", out / "problems")
    write_parts(args, out)

    def train(name: str, verb: str, folder: str, recipe: str, dataset: Path, start: object, *options: object) -> Path:
        settings = ("--config", f"{RECIPES}/{recipe}.yaml", "--model_name_or_path", start, "--dataset_name", dataset)
        stages.train(name, verb, out / folder, *settings, *options, *seed)
        return out / folder

    base: object = args.model
    if args.stand_in:
        heart = ("--from_scratch", "true", "--max_steps", args.steps, "--learning_rate", "3e-3")
        batch = ("--lr_scheduler_type", "linear", "--per_device_train_batch_size", 8, "--bf16", "false")
        base = train("learning by heart", "sft", "base", "warm_up", out / "warm_up", out / "stand_in", *heart, *batch)
    elif args.warm_up:
        base = train("warm-up", "sft", "base", "warm_up", out / "warm_up", base)

    model, pairs = ("--model", base), out / "preferences" / "pairs"
    rollouts = OF_EACH if args.stand_in else args.rollouts
    drawn = ("--dataset", out / "few", "--num_rollouts", rollouts, "--max_tokens", args.max_tokens)
    stages.run("rollouts", "sample", *model, *drawn, "--output_dir", out / "rollouts", *seed)
    stages.run("pairs", "pairs", "--dataset", out / "rollouts", "--output_dir", out / "preferences", *seed)

    adapters: list[object] = []
    for side in ("positive", "negative"):
        adapter = train(f"{side} adapter", "sft", side, f"{side}_sft", out / "preferences" / side, base)
        adapters += [f"--{side}", adapter]
    scored = out / "scored"
    stages.run("contrastive scores", "score contrast", *model, *adapters, "--dataset", pairs, "--output_dir", scored)

    steps = ("--max_steps", 2) if args.stand_in else ()
    trained = train("critical-token DPO", "critical-dpo", "critical_token_dpo", "critical_dpo", scored, base, *steps)
    if args.test_problems and not args.stand_in:
        test = ("--problems", out / "held_out", "--split", "train", "--max_tokens", args.max_tokens, *seed)
        before = ("--output_dir", out / "evaluation" / "before")
        stages.run("accuracy before", "evaluate answers", *model, *test, *before)
        after = ("--adapter", trained, "--compare", before[1], "--output_dir", out / "evaluation" / "after")
        stages.run("accuracy after", "evaluate answers", *model, *test, *after)
    page = out / "heatmap.html"
    stages.run("heatmap", "view", "--dataset", scored, "--tokenizer", base, "--output", page)
    console.print(f"\nPairs and scores in {scored}; look at [bold]{page}[/bold]")


def check_chat_template(model: str) -> None:
    """Refuse, before hours of work, a model that is not there or cannot be asked."""
    try:
        template = AutoTokenizer.from_pretrained(model).chat_template
    except OSError as error:
        raise ContractError(
            f"There is no model {model} here or on a hub that can be reached; check --model, or fetch a small one by "
            "`tokalign data model smollm2`."
        ) from error
    if template is None:
        raise ContractError(f"{model} has no chat template, by which problems are asked here; take an instruct model.")


def write_parts(args: OwnDataArguments, out: Path) -> None:
    """The problems to train on first, those of the rollouts and those of the evaluation; the untrained stand-in.

    No problem is in two of them, but for the stand-in, whose rollouts are of what it has learned.
    """
    problems = load_stage(out / "problems" / "train", stage="problems")
    sizes = {"few": args.problems, "warm_up": args.warm_up, "held_out": args.test_problems}
    if args.stand_in:
        sizes = {"few": BY_HEART}
    rows = shortest(problems, sum(sizes.values()))
    random.Random(args.seed).shuffle(rows)  # so that all parts are equally hard
    parts = {name: [rows.pop() for _ in range(min(size, len(rows)))] for name, size in sizes.items() if size}
    parts.setdefault("warm_up", parts["few"])
    for name, part in parts.items():
        kept = Dataset.from_list([{key: row[key] for key in COLUMNS} for row in part])
        parameters = sizes | {"seed": args.seed, "stand_in": args.stand_in}
        run_job(lambda batch: batch, kept, out / name, name=f"problems, {name}", parameters=parameters)
    if args.stand_in and not (out / "stand_in" / "config.json").exists():  # written last: a killed run leaves no half
        write_stand_in(problems, out / "stand_in", args.vocab_size)
