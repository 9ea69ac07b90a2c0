"""Rollouts: a naive `model.generate` loop against the transformers engine and vLLM, same model, prompts and limits.

    python benchmarks/rollouts.py                                   # a made-up 160 k-parameter Llama
    python benchmarks/rollouts.py --model <path or id> --num_prompts 256 --n 16 --max_tokens 512

The naive loop takes prompts in arrival order, pads a batch to its longest and runs until its longest completion ends.
All sample at temperature 1, and all are given the same prompts after one untimed warm-up. Rates are completion tokens,
end tokens included, over wall-clock seconds. Writes `rollouts.json` and `rollouts.png`.
"""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import TrlParser

from tokalign.generation import Engine, EngineArguments, SamplingParams, load_engine


@dataclass
class RolloutBenchmarkArguments:
    """What is generated, and where the results go."""

    model: str | None = field(default=None, metadata={"help": "Hub id or path; unset makes up a tiny Llama."})
    num_prompts: int = field(default=64, metadata={"help": "Prompts, of varied length."})
    n: int = field(default=16, metadata={"help": "Completions a prompt."})
    max_tokens: int = field(default=128, metadata={"help": "Most tokens a completion."})
    shortest_prompt: int = field(default=15, metadata={"help": "Tokens of the shortest prompt."})
    longest_prompt: int = field(default=60, metadata={"help": "Tokens of the longest prompt."})
    vocab_size: int = field(default=64, metadata={"help": "Vocabulary of the made-up model."})
    hidden_size: int = field(default=64, metadata={"help": "Its width; the MLP has 2.75 times as much."})
    layers: int = field(default=3, metadata={"help": "Its layers."})
    heads: int = field(default=2, metadata={"help": "Its attention heads."})
    dtype: str = field(default="float32", metadata={"help": "Its weights' type."})
    naive_batch: int = field(default=16, metadata={"help": "Prompts in a batch of the naive loop (times n rows)."})
    token_budget: int = field(default=65536, metadata={"help": "As in EngineArguments."})
    repeats: int = field(default=3, metadata={"help": "Timed runs; the fastest counts, for a shared machine."})
    vllm: bool = field(default=True, metadata={"help": "Measure vLLM too, where it is installed."})
    seed: int = field(default=0, metadata={"help": "Of prompts, made-up weights and sampling."})
    output_dir: str = field(default="runs/benchmarks/rollouts", metadata={"help": "Where results are written."})


def make_model(folder: Path, arguments: RolloutBenchmarkArguments) -> str:
    """A random Llama whose completions end after about 35 tokens: 1 in 35 tokens drawn is an end token."""
    torch.manual_seed(arguments.seed)
    vocab_size = arguments.vocab_size
    ends = max(1, round(vocab_size / 35))
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=11 * arguments.hidden_size // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=max(2, arguments.heads // 4),
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=list(range(1, 1 + ends)),
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).save_pretrained(folder)
    words = {f"<{i}>": i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<0>", eos_token="<1>").save_pretrained(folder)
    return str(folder)


def make_prompts(path: str, arguments: RolloutBenchmarkArguments) -> list[list[int]]:
    size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    numbers = random.Random(arguments.seed)
    lengths = range(arguments.shortest_prompt, arguments.longest_prompt + 1)
    return [
        [numbers.randrange(size // 8, size) for _ in range(numbers.choice(lengths))]
        for _ in range(arguments.num_prompts)
    ]


def measure_naive(path: str, prompts: list[list[int]], arguments: RolloutBenchmarkArguments) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(PartialState().device).eval()
    return measure(lambda p: naive_rollouts(model, p, arguments), prompts, arguments.repeats)


def naive_rollouts(model: Any, prompts: list[list[int]], arguments: RolloutBenchmarkArguments) -> int:
    """The loop that most scripts have; returns how many tokens it generated."""
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=model.device)
    tokens = 0
    for a in range(0, len(prompts), arguments.naive_batch):
        batch = prompts[a : a + arguments.naive_batch]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=arguments.n,
            max_new_tokens=arguments.max_tokens,
            pad_token_id=0,
        )
        # Tokens up to and including the first end token; what follows is padding.
        ended_before = torch.isin(output[:, width:], ends).int().cumsum(1).roll(1, 1)
        ended_before[:, 0] = 0
        tokens += int((ended_before == 0).sum())
    return tokens


def engine_rollouts(engine: Engine, prompts: list[list[int]], arguments: RolloutBenchmarkArguments) -> int:
    # A seed each: with one for all, sample k of every prompt would draw the same random numbers.
    seeds = range(1000 * arguments.seed, 1000 * arguments.seed + len(prompts))
    params = [SamplingParams(n=arguments.n, max_tokens=arguments.max_tokens, seed=1000 * seed) for seed in seeds]
    return sum(len(c.token_ids) for completions in engine.generate(prompts, params) for c in completions)


def measure(run: Callable[[list[list[int]]], int], prompts: list[list[int]], repeats: int) -> dict[str, float]:
    run(prompts[: max(1, len(prompts) // 8)])  # warm-up: allocators, kernels, compilation
    best: dict[str, float] = {}
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = run(prompts)
        seconds = time.perf_counter() - start
        if not best or tokens / seconds > best["tokens_per_second"]:
            best = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return best


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 0.8 + 0.6 * len(results)))
    bars = axes.barh(list(results), [r["tokens_per_second"] for r in results.values()], color="#4c72b0")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("completion tokens per second")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: RolloutBenchmarkArguments) -> dict[str, Any]:
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or make_model(Path(folder), arguments)
        prompts = make_prompts(path, arguments)
        results = {"model.generate loop": measure_naive(path, prompts, arguments)}
        kinds = ["transformers"]
        if arguments.vllm and importlib.util.find_spec("vllm") is not None:
            kinds.append("vllm")
        for kind in kinds:
            engine = load_engine(
                EngineArguments(path, engine=kind, token_budget=arguments.token_budget, max_lora_rank=0)  # type: ignore[arg-type]
            )
            name = f"{kind} engine"
            results[name] = measure(lambda p, e=engine: engine_rollouts(e, p, arguments), prompts, arguments.repeats)
            engine.close()
    naive = results["model.generate loop"]["tokens_per_second"]
    table = Table(
        title=f"{arguments.num_prompts} prompts x {arguments.n} completions, at most {arguments.max_tokens} tokens"
    )
    for heading in ("", "tokens", "seconds", "tokens/s", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, result in results.items():
        result["ratio"] = result["tokens_per_second"] / naive
        row = (f"{result['tokens']:,.0f}", f"{result['seconds']:.2f}", f"{result['tokens_per_second']:,.0f}")
        table.add_row(name, *row, f"{result['ratio']:.2f}x")
    console.print(table)
    report = {
        "arguments": asdict(arguments),
        "device": str(PartialState().device),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "rollouts.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(results, output / "rollouts.png")
    console.print(f"Wrote {output / 'rollouts.json'} and {output / 'rollouts.png'}")
    return report


if __name__ == "__main__":  # vLLM starts a second process, which imports this file
    parser = TrlParser((RolloutBenchmarkArguments,))
    (arguments,) = parser.parse_args_and_config()
    main(arguments)
