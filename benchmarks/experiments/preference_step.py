r"""What a step of our preference trainers costs beside TRL's DPOTrainer step on the same batch: time and peak memory.

    python -m benchmarks.experiments.preference_step                    # critical-token DPO; CPU, 32k and 128k words
    python -m benchmarks.experiments.preference_step --method treg      # T-REG with the rewards in the dataset
    python -m benchmarks.experiments.preference_step --device cuda --dtype bfloat16 --hidden_size 2048 --layers 16 \
        --peft --vocab_size 128256 --completion_length 1024 --batch_size 8

A step is collation, both forward passes, backward and optimizer. Time: both trainers in one process, taking turns, and
the median of the pairs' ratios (a busy machine slows both halves of a pair). Memory: each trainer alone in a process of
its own, the peak of allocated device memory, or on a CPU of resident memory above what the imports take. The target
is ≤ 1.05 for both. Writes results.json to `output_dir`; speed.py judges it.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from benchmarks.experiments.measure import in_turns, peak_bytes, random_llama, word_tokenizer
from benchmarks.render import ROOT, Tables, save
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer, TRegConfig, TRegTrainer

OURS = {"critical_token_dpo": (CriticalTokenDPOTrainer, CriticalTokenDPOConfig), "treg": (TRegTrainer, TRegConfig)}


@dataclass
class Arguments:
    """Shape of the model and the batch, and how often to measure."""

    method: str = field(default="critical_token_dpo", metadata={"help": "Ours: critical_token_dpo or treg."})
    vocab_size: list[int] = field(default_factory=lambda: [32000, 128000], metadata={"help": "One row each."})
    hidden_size: int = 256
    layers: int = 4
    prompt_length: int = 32
    completion_length: int = 64
    batch_size: int = 2
    peft: bool = field(default=False, metadata={"help": "LoRA, with the reference by disabled adapter."})
    dtype: str = "float32"
    device: str = "cpu"
    pairs: int = field(default=15, metadata={"help": "Pairs of steps to time, after two to warm up."})
    seed: int = 0
    output_dir: str = "runs/benchmarks/preference_step"
    memory_of: str | None = field(default=None, metadata={"help": "For the script itself: measure this method only."})


def make_step(arguments: Arguments, vocab_size: int, method: str, folder: str) -> Callable[[], None]:
    """One training step of `method` on a fixed batch of random rows, as a function to call again and again."""
    tokenizer = word_tokenizer(vocab_size)
    rng = random.Random(arguments.seed)
    rows = []
    for i in range(arguments.batch_size):
        row = {"id": str(i), "prompt": ""}
        for name, length in (
            ("prompt", arguments.prompt_length),
            ("chosen", arguments.completion_length),
            ("rejected", arguments.completion_length),
        ):
            row[f"{name}_ids"] = [rng.randrange(2, vocab_size) for _ in range(length)]
            row[name] = tokenizer.decode(row[f"{name}_ids"], skip_special_tokens=True)
        for side in ("chosen", "rejected"):
            row[f"{side}_contrast"] = [rng.random() for _ in row[f"{side}_ids"]]
            row[f"{side}_token_reward"] = [rng.random() - 0.5 for _ in row[f"{side}_ids"]]
        rows.append(row)
    shared = dict(
        output_dir=f"{folder}/out",
        per_device_train_batch_size=arguments.batch_size,
        max_length=None,
        model_init_kwargs={"dtype": arguments.dtype},
        use_cpu=arguments.device == "cpu",
        bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        seed=arguments.seed,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = dict(model=f"{folder}/model", processing_class=tokenizer, peft_config=lora if arguments.peft else None)
    trainer: DPOTrainer
    if method == "dpo":  # its dataset only has to exist: the batch below is collated from the rows
        pair = {"prompt": "t2", "chosen": "t3", "rejected": "t4"}
        trainer = DPOTrainer(args=DPOConfig(**shared), train_dataset=Dataset.from_list([pair]), **common)
    else:
        trainer_class, config_class = OURS[method]
        trainer = trainer_class(args=config_class(**shared), train_dataset=Dataset.from_list(rows), **common)
    trainer.create_optimizer()
    trainer.model.to(trainer.accelerator.device)
    trainer.current_gradient_accumulation_steps = 1  # `train` would set it

    def step() -> None:
        trainer.training_step(trainer.model, trainer.data_collator(rows))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def save_model(arguments: Arguments, vocab_size: int, folder: str) -> None:
    """A Llama with random weights, for both trainers to load."""
    heads = max(1, arguments.hidden_size // 64)
    shape = {"vocab_size": vocab_size, "intermediate_size": 3 * arguments.hidden_size}
    random_llama(f"{folder}/model", arguments, **shape, num_attention_heads=heads, num_key_value_heads=heads)


def measure_memory(arguments: Arguments, vocab_size: int, method: str) -> int:
    """Peak memory of three steps (the first makes the optimizer's state) in a process of its own."""
    options = asdict(arguments) | {"vocab_size": vocab_size, "memory_of": method}
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "benchmarks.experiments.preference_step", *flags]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return int(run.stdout.splitlines()[-1])


def compare(arguments: Arguments, vocab_size: int) -> dict:
    """Both measurements for one vocabulary size."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(arguments, vocab_size, folder)
        methods = ("dpo", arguments.method)
        steps = {method: make_step(arguments, vocab_size, method, folder) for method in methods}
        seconds = in_turns(steps, arguments.pairs, arguments.device)
    ours, stock = seconds[arguments.method], seconds["dpo"]
    peaks = {method: measure_memory(arguments, vocab_size, method) for method in seconds}
    return {
        "vocab_size": vocab_size,
        "seconds": seconds,
        "peak_bytes": peaks,
        "time_ratio": statistics.median(a / b for a, b in zip(ours, stock, strict=True)),
        "memory_ratio": peaks[arguments.method] / peaks["dpo"],
    }


def tables(results: dict[str, Any]) -> Tables:
    """A row for each vocabulary size: medians, peaks and their ratios."""
    rows = []
    for entry in results["results"]:
        times, peaks = entry["seconds"], entry["peak_bytes"]
        figures = [*(statistics.median(times[m]) for m in times), entry["time_ratio"]]
        figures += [*(peaks[m] / 2**30 for m in times), entry["memory_ratio"]]
        rows.append([f"{entry['vocab_size']:,}", *(f"{figure:.3f}" for figure in figures)])
    headings = ("words", "DPO, s", "ours, s", "time ratio", "DPO, GiB", "ours, GiB", "memory ratio")
    return {f"{results['arguments']['method']} step beside DPOTrainer's": (headings, rows)}


def main(arguments: Arguments) -> None:
    """Measure and report, or print one method's peak memory where the script has called itself for that."""
    if arguments.memory_of is None:
        compared = [compare(arguments, vocab_size) for vocab_size in arguments.vocab_size]
        save(arguments.output_dir, {"arguments": asdict(arguments), "results": compared}, tables)
        return
    imports = peak_bytes(arguments.device)  # half a gigabyte that is no part of any step
    with tempfile.TemporaryDirectory() as folder:
        save_model(arguments, arguments.vocab_size[0], folder)
        step = make_step(arguments, arguments.vocab_size[0], arguments.memory_of, folder)
        for _ in range(3):
            step()
    print(peak_bytes(arguments.device) - imports)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())  # type: ignore[arg-type]
