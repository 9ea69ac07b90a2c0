r"""Contrastive scoring against the procedure of the paper's released code, and against two bare forward passes.

Released procedure, written here from its description: one row at a time through two merged models held in memory, the
softmax of the combined logits over the whole vocabulary kept and moved to the host, then the tokens' entries gathered.
Bare passes: the scorer's own batches through `model(input_ids, attention_mask).logits` under each adapter, nothing
else. All three run in this process on the same random models, interleaved, and must give equal scores.

Extra peak memory is what a run needs above the models: CUDA's allocator peak, or on a CPU the kernel's high-water mark
of resident memory (Linux), reset before each run. Time and memory are measured over a growing number of rows as well.

    python -m benchmarks.experiments.contrast                              # CPU, about two minutes
    python -m benchmarks.experiments.contrast --device cuda --dtype bfloat16 --hidden_size 4096 --layers 32 \
        --intermediate_size 14336

Writes results.json to `output_dir`; speed.py judges it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import TrlParser

from benchmarks.experiments.measure import extra_peak, random_llama, timed
from benchmarks.render import Tables, save
from tokalign.signals import ContrastiveScorer


@dataclass
class ContrastBenchmarkArguments:
    """Model shape, workload and device."""

    vocab_size: int = field(default=128256, metadata={"help": "Vocabulary (Llama 3's)."})
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    intermediate_size: int = field(default=1024, metadata={"help": "MLP width."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    heads: int = field(default=8, metadata={"help": "Attention heads."})
    short_rows: int = field(default=32, metadata={"help": "Rows of the short workload."})
    short_length: int = field(default=64, metadata={"help": "Longest short row; rows are at least half of it."})
    long_rows: int = field(default=6, metadata={"help": "Rows of the long workload."})
    long_length: int = field(default=512, metadata={"help": "Longest long row."})
    prompt_share: float = field(default=0.4, metadata={"help": "Share of a row that is its prompt."})
    growth: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Numbers of rows to grow through."}
    )
    token_budget: int = field(default=1024, metadata={"help": "Tokens of one forward pass of the scorer."})
    repeats: int = field(default=5, metadata={"help": "Timed runs of each; the fastest counts."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    dtype: str = field(default="float32", metadata={"help": "Weights' type."})
    output_dir: str = field(default="runs/benchmarks/contrast", metadata={"help": "Folder of results.json."})


Rows = tuple[list[list[int]], list[list[int]]]


def make_rows(count: int, longest: int, arguments: ContrastBenchmarkArguments, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    prompts, completions = [], []
    for _ in range(count):
        length = rng.randint(longest // 2, longest)
        ids = [rng.randrange(arguments.vocab_size) for _ in range(length)]
        cut = max(1, int(length * arguments.prompt_share))
        prompts.append(ids[:cut])
        completions.append(ids[cut:])
    return prompts, completions


def make_models(folder: Path, arguments: ContrastBenchmarkArguments) -> tuple[str, str, str]:
    """Random base and two random adapters on the layers that the paper tunes."""
    shape = {"vocab_size": arguments.vocab_size, "intermediate_size": arguments.intermediate_size}
    heads = {"num_attention_heads": arguments.heads, "num_key_value_heads": max(1, arguments.heads // 4)}
    base = random_llama(folder / "base", arguments, **shape, **heads)
    adapters = []
    for name in ("positive", "negative"):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / name)
        adapters.append(str(folder / name))
    return base, adapters[0], adapters[1]


class Released:
    """Batch 1, two merged models, the full-vocabulary softmax kept and moved."""

    def __init__(self, base: str, adapters: tuple[str, str], device: str, dtype: str, beta: float = 1.0):
        self.beta, self.device = beta, device
        self.positive, self.negative = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device), path)
            .merge_and_unload()
            .eval()
            for path in adapters
        )

    @torch.no_grad()
    def __call__(self, rows: Rows) -> list[list[float]]:
        results = []
        for prompt, completion in zip(*rows, strict=True):
            input_ids = torch.tensor([prompt + completion], device=self.device)
            positive_logits = self.positive(input_ids=input_ids).logits
            negative_logits = self.negative(input_ids=input_ids).logits
            combined = (1 + self.beta) * positive_logits - self.beta * negative_logits
            probabilities = torch.softmax(combined, dim=-1).to("cpu")
            token_scores = probabilities[0, :-1].gather(-1, input_ids[0, 1:, None].cpu())[:, 0]
            results.append(token_scores[len(prompt) - 1 :].tolist())
        return results


@torch.no_grad()
def bare_passes(scorer: ContrastiveScorer, rows: Rows) -> None:
    prompts, completions = rows
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for batch in scorer._batches(lengths):
        width = max(lengths[r] for r in batch)
        input_ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for i, r in enumerate(batch):
            input_ids[i, : lengths[r]] = torch.tensor(prompts[r] + completions[r])
            mask[i, : lengths[r]] = 1
        input_ids, mask = input_ids.to(scorer.device), mask.to(scorer.device)
        for name in scorer.names:
            scorer.model.set_adapter(name, inference_mode=True)
            scorer.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits  # noqa: B018


def compare(name: str, rows: Rows, scorer: ContrastiveScorer, released: Released, repeats: int, device: str) -> dict:
    """Times (fastest of interleaved runs) and peaks of the three procedures on one workload."""
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: scorer.score(*rows),
        "released": lambda: released(rows),
        "bare": lambda: bare_passes(scorer, rows),
    }
    worst = max(
        abs(a - b) / b
        for x, y in zip(scorer.score(*rows), released(rows), strict=True)
        for a, b in zip(x, y, strict=True)
    )
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            times[key].append(timed(run, device))
    peaks = {key: extra_peak(run, device) for key, run in runs.items()}
    fastest = {key: min(values) for key, values in times.items()}
    return {
        "workload": name,
        "rows": len(rows[0]),
        "tokens": sum(map(len, rows[0])) + sum(map(len, rows[1])),
        "scored_tokens": sum(map(len, rows[1])),
        "seconds": fastest,
        "runs": times,
        "extra_peak_bytes": peaks,
        "largest_relative_difference": worst,
        "speed-up": fastest["released"] / fastest["ours"],
        "memory ratio": peaks["ours"] / peaks["released"],
        "against bare": fastest["ours"] / fastest["bare"],
    }


def growth_table(scorer: ContrastiveScorer, arguments: ContrastBenchmarkArguments) -> list[dict]:
    points = []
    longest = (arguments.short_length + arguments.long_length) // 2
    for count in arguments.growth:
        rows = make_rows(count, longest, arguments, seed=1)
        run: Callable[[], object] = lambda rows=rows: scorer.score(*rows)  # noqa: E731
        taken = min(timed(run, arguments.device) for _ in range(3))
        tokens = sum(map(len, rows[0])) + sum(map(len, rows[1]))
        peak = extra_peak(run, arguments.device)
        points.append({"rows": count, "tokens": tokens, "seconds": taken, "extra_peak_bytes": peak})
    return points


def main(arguments: ContrastBenchmarkArguments) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base, *adapters = make_models(Path(folder), arguments)
        released = Released(base, (adapters[0], adapters[1]), arguments.device, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=arguments.dtype).to(arguments.device)
        scorer = ContrastiveScorer(model, None, *adapters, token_budget=arguments.token_budget)
    workloads = {
        "short": make_rows(arguments.short_rows, arguments.short_length, arguments),
        "long": make_rows(arguments.long_rows, arguments.long_length, arguments),
    }
    comparisons = [
        compare(name, rows, scorer, released, arguments.repeats, arguments.device) for name, rows in workloads.items()
    ]
    results = {
        "arguments": asdict(arguments),
        "device_name": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "torch_threads": torch.get_num_threads(),
        "comparisons": comparisons,
        "growth": growth_table(scorer, arguments),
    }
    return save(arguments.output_dir, results, tables)


def tables(results: dict[str, Any]) -> Tables:
    """The three procedures on both workloads, and ours as rows are added."""
    rows = [
        [c["workload"], key, f"{c['seconds'][key]:.2f}", f"{c['extra_peak_bytes'][key] / 2**20:,.0f}"]
        for c in results["comparisons"]
        for key in c["seconds"]
    ]
    growth = [
        [f"{g['rows']:,}", f"{g['tokens']:,}", f"{g['seconds']:.2f}", f"{g['extra_peak_bytes'] / 2**20:,.0f}"]
        for g in results["growth"]
    ]
    measures = ("seconds", "extra peak MiB")
    return {"procedures": (("", "", *measures), rows), "growth of ours": (("rows", "tokens", *measures), growth)}


if __name__ == "__main__":
    main(*TrlParser((ContrastBenchmarkArguments,)).parse_args_and_config())
