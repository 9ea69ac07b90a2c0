"""The pipeline on real text: GSM8K rows → rollouts → pairs → scores → two steps of critical-token DPO, on a laptop.

    python scripts/own_data.py --source path/to/gsm8k        (a folder with train.jsonl, or a hub id)

Shows every stage on text of your own kind before a GPU is paid for. A real model would be downloaded here; this script
makes a small stand-in instead: a byte-level BPE tokenizer trained on the text, and a Llama that learns a few of its
problems by heart, well enough that some of its samples are right and some are wrong. Accuracy means nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from quickstart import Stages, console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from trl import TrlParser

from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage

CPU = ("--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--dtype", "float32")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class OwnDataArguments:
    """Where the text is, and how small the stand-in is."""

    source: str = field(metadata={"help": "GSM8K as in data/gsm8k.py: a folder with train.jsonl, a file or a hub id."})
    output_dir: str = field(default="runs/own_data", metadata={"help": "Folder of all results."})
    problems: int = field(default=24, metadata={"help": "Problems that the stand-in learns, the shortest ones."})
    vocab_size: int = field(default=1500, metadata={"help": "Size of the tokenizer that is trained on the text."})
    steps: int = field(default=150, metadata={"help": "Steps of learning by heart."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template: any text survives encode → decode."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_stand_in(problems: Dataset, folder: Path, vocab_size: int) -> None:
    """Tokenizer trained on the problems' text, and the architecture of a small Llama for it."""
    tokenizer = train_tokenizer([*problems["prompt"], *problems["solution"]], vocab_size)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    ).save_pretrained(folder)


def shortest(problems: Dataset, n: int) -> list[dict]:
    """The `n` problems with the shortest text, with their solution as an SFT row's completion."""
    lengths = [len(p) + len(s) for p, s in zip(problems["prompt"], problems["solution"], strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)[:n]
    return [problems[i] for i in sorted(order)]


def as_messages(rows: list[dict]) -> list[dict]:
    """Prompt and solution as the messages that TRL's SFTTrainer takes."""
    return [
        {
            "id": row["id"],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["solution"]}],
        }
        for row in rows
    ]


def main(args: OwnDataArguments) -> None:
    """Run or resume every stage."""
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages, seed = Stages(out), ("--seed", args.seed)
    stages.run("problems", "data/gsm8k.py", "--source", args.source, "--output_dir", out / "problems")

    problems = load_stage(str(out / "problems" / "train"), stage="problems")
    rows = shortest(problems, args.problems)
    chosen = Dataset.from_list([{k: row[k] for k in ("id", "prompt", "answer", "solution")} for row in rows])
    sizes = {"problems": args.problems, "seed": args.seed}
    run_job(lambda batch: batch, chosen, out / "few", name="few problems", parameters=sizes)
    run_job(lambda batch: as_messages(batch), chosen, out / "few_sft", name="few solutions", parameters=sizes)
    if not (out / "stand_in" / "config.json").exists():  # written last, so a killed run leaves no half stand-in
        write_stand_in(problems, out / "stand_in", args.vocab_size)
    base = out / "base"
    stages.train(
        *("learning by heart", "recipes/sft.py", base, "--model_name_or_path", out / "stand_in"),
        *("--dataset_name", out / "few_sft", "--from_scratch", "true", "--max_steps", args.steps, *CPU, *seed),
        *("--learning_rate", "3e-3", "--per_device_train_batch_size", 8, "--report_to", "none"),
        *("--save_strategy", "no", "--logging_steps", 50),
    )
    stages.run(
        *("rollouts", "scripts/sample_rollouts.py", "--model", base, "--dataset", out / "few", *seed),
        *("--output_dir", out / "rollouts", "--num_rollouts", 32, "--max_tokens", 200),
    )
    stages.run(
        *("pairs", "scripts/build_pairs.py", "--dataset", out / "rollouts", "--output_dir", out / "preferences"),
        *seed,
    )
    lora = ("--use_peft", "true", "--lora_r", 8, "--report_to", "none", "--logging_steps", 1, "--learning_rate", "1e-3")
    for side in ("positive", "negative"):
        stages.train(
            *(f"{side} adapter", "recipes/sft.py", out / side, "--model_name_or_path", base, *CPU, *lora, *seed),
            *("--lora_target_modules", "gate_proj", "up_proj", "down_proj", "--num_train_epochs", 3),
            *("--dataset_name", out / "preferences" / side),
        )
    stages.run(
        *("contrastive scores", "scripts/score.py", "contrast", "--model", base, "--output_dir", out / "scored"),
        *("--dataset", out / "preferences" / "pairs", "--positive", out / "positive", "--negative", out / "negative"),
    )
    stages.train(
        *("critical-token DPO", "recipes/critical_dpo.py", out / "critical_token_dpo"),
        *("--model_name_or_path", base, "--dataset_name", out / "scored", "--max_steps", 2, *CPU, *lora, *seed),
        *("--lora_target_modules", "all-linear", "--per_device_train_batch_size", 4),
    )
    stages.run(
        *("heatmap", "scripts/view.py", "--dataset", out / "scored", "--tokenizer", base),
        *("--output", out / "heatmap.html"),
    )
    console.print(f"\nPairs and scores in {out / 'scored'}; look at [bold]{out / 'heatmap.html'}[/bold]")


if __name__ == "__main__":
    main(*TrlParser((OwnDataArguments,)).parse_args_and_config())
