r"""What a step of our preference trainers costs beside TRL's DPOTrainer step on the same batch: time and peak memory.

    python benchmarks/preference_step.py                            # critical-token DPO; CPU, vocabularies 32k and 128k
    python benchmarks/preference_step.py --method treg              # T-REG with the rewards in the dataset
    python benchmarks/preference_step.py --device cuda --dtype bfloat16 --hidden_size 2048 --layers 16 --peft \
        --vocab_size 128256 --completion_length 1024 --batch_size 8

A step is collation, both forward passes, backward and optimizer. Time: both trainers in one process, taking turns, and
the median of the pairs' ratios (a busy machine slows both halves of a pair). Memory: each trainer alone in a process of
its own, the peak of allocated device memory, or on a CPU of resident memory above what the imports take. The target
is ≤ 1.05 for both. Writes results.json and results.png to `output_dir`/`method`.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer, TRegConfig, TRegTrainer

OURS = {
    "critical_token_dpo": (CriticalTokenDPOTrainer, CriticalTokenDPOConfig),
    "treg": (TRegTrainer, TRegConfig),
}


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


def made_up_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for every id."""
    words = {"<pad>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="</s>")), pad_token="<pad>", eos_token="</s>"
    )


def make_step(arguments: Arguments, vocab_size: int, method: str, folder: str) -> Callable[[], None]:
    """One training step of `method` on a fixed batch of random rows, as a function to call again and again."""
    tokenizer = made_up_tokenizer(vocab_size)
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
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return step


def save_model(arguments: Arguments, vocab_size: int, folder: str) -> None:
    """A Llama with random weights, for both trainers to load."""
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden_size // 64),
        max_position_embeddings=arguments.prompt_length + arguments.completion_length,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.device(arguments.device):  # a real shape would take minutes on the host
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(f"{folder}/model")


def peak_bytes(device: str) -> int:
    """Peak memory of this process so far (on a CPU: of Linux)."""
    if device == "cpu":
        # Not getrusage: a child's ru_maxrss starts at its parent's
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return torch.cuda.max_memory_allocated()


def measure_memory(arguments: Arguments, vocab_size: int, method: str) -> int:
    """Peak memory of three steps (the first makes the optimizer's state) in a process of its own."""
    options = asdict(arguments) | {"vocab_size": vocab_size, "memory_of": method}
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    run = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.splitlines()[-1])


def measure_time(arguments: Arguments, vocab_size: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each step, the two methods taking turns (and turns at going first)."""
    methods = ("dpo", arguments.method)
    steps = {method: make_step(arguments, vocab_size, method, folder) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for pair in range(arguments.pairs + 2):
        for method in methods if pair % 2 else methods[::-1]:
            start = time.perf_counter()
            steps[method]()
            if pair >= 2:
                seconds[method].append(time.perf_counter() - start)
    return seconds


def compare(arguments: Arguments, vocab_size: int) -> dict:
    """Both measurements for one vocabulary size."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(arguments, vocab_size, folder)
        seconds = measure_time(arguments, vocab_size, folder)
    ours, stock = seconds[arguments.method], seconds["dpo"]
    peaks = {method: measure_memory(arguments, vocab_size, method) for method in seconds}
    return {
        "vocab_size": vocab_size,
        "seconds": seconds,
        "peak_bytes": peaks,
        "time_ratio": statistics.median(a / b for a, b in zip(ours, stock, strict=True)),
        "memory_ratio": peaks[arguments.method] / peaks["dpo"],
    }


def report(results: list[dict], arguments: Arguments) -> None:
    """Table on screen, results.json and results.png in `output_dir`."""
    output = Path(arguments.output_dir) / arguments.method
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps({"arguments": asdict(arguments), "results": results}, indent=2))
    table = Table(title=f"{arguments.method} step / DPOTrainer step")
    for column in ("vocabulary", "DPO s", "ours s", "time ratio", "DPO GiB", "ours GiB", "memory ratio"):
        table.add_column(column, justify="right")
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.5), squeeze=False)
    for result, axis in zip(results, axes[0], strict=True):
        methods = list(result["seconds"])
        times = [statistics.median(result["seconds"][method]) for method in methods]
        sizes = [result["peak_bytes"][method] / 2**30 for method in methods]
        table.add_row(
            f"{result['vocab_size']:,}",
            *(f"{value:.3f}" for value in (*times, result["time_ratio"], *sizes, result["memory_ratio"])),
        )
        for method in methods:
            axis.plot(result["seconds"][method], marker=".", label=method)
        ratios = f"time × {result['time_ratio']:.3f}, memory × {result['memory_ratio']:.3f}"
        axis.set(title=f"{result['vocab_size']:,} tokens: {ratios}", xlabel="pair", ylabel="seconds a step")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(output / "results.png", dpi=120)
    Console().print(table)


def main(arguments: Arguments) -> None:
    """Measure and report, or print one method's peak memory where the script has called itself for that."""
    if arguments.memory_of is None:
        report([compare(arguments, vocab_size) for vocab_size in arguments.vocab_size], arguments)
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
