"""Contrastive scoring against the procedure of the paper's released code, and against two bare forward passes.

Released procedure, written here from its description: one row at a time through two merged models held in memory, the
softmax of the combined logits over the whole vocabulary kept and moved to the host, then the tokens' entries gathered.
Bare passes: the scorer's own batches through `model(input_ids, attention_mask).logits` under each adapter, nothing
else. All three run in this process on the same random models, interleaved, and must give equal scores.

Extra peak memory is what a run needs above the models: CUDA's allocator peak, or on a CPU the kernel's high-water mark
of resident memory (Linux), reset before each run. A growth table shows time and memory against the number of rows.

python benchmarks/contrast.py                                        # CPU, about two minutes
python benchmarks/contrast.py --device cuda --dtype bfloat16 --hidden_size 4096 --layers 32 --intermediate_size 14336
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import TrlParser

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
    short_length: int = field(default=64, metadata={"help": "Longest short row; rows are 50-100 % of it."})
    long_rows: int = field(default=6, metadata={"help": "Rows of the long workload."})
    long_length: int = field(default=512, metadata={"help": "Longest long row."})
    prompt_share: float = field(default=0.4, metadata={"help": "Share of a row that is its prompt."})
    growth: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Rows of the growth table."})
    token_budget: int = field(default=1024, metadata={"help": "Tokens of one forward pass of the scorer."})
    repeats: int = field(default=5, metadata={"help": "Timed runs of each; the fastest counts."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    dtype: str = field(default="float32", metadata={"help": "Weights' type."})
    output_dir: str = field(default="runs/benchmarks/contrast", metadata={"help": "Folder of JSON and PNG."})


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
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=max(1, arguments.heads // 4),
        max_position_embeddings=max(4096, arguments.long_length),
    )
    base = str(folder / "base")
    with torch.device(arguments.device):  # a real shape would take minutes on the host
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(base)
    del model
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


def resident(field_name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (most since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}; measure on Linux or on a GPU.")


def extra_peak(function: Callable[[], object], device: str) -> int:
    """Bytes that `function` needs at its peak above what is held before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or they hide what the run needs
    Path("/proc/self/clear_refs").write_text("5")
    held = resident("VmRSS")
    function()
    return resident("VmHWM") - held


def seconds(function: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
            times[key].append(seconds(run, device))
    peaks = {key: extra_peak(runs[key], device) for key in ("ours", "released", "bare")}
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
    result = []
    longest = (arguments.short_length + arguments.long_length) // 2
    for count in arguments.growth:
        rows = make_rows(count, longest, arguments, seed=1)
        run: Callable[[], object] = lambda rows=rows: scorer.score(*rows)  # noqa: E731
        taken = min(seconds(run, arguments.device) for _ in range(3))
        tokens = sum(map(len, rows[0])) + sum(map(len, rows[1]))
        peak = extra_peak(run, arguments.device)
        result.append({"rows": count, "tokens": tokens, "seconds": taken, "extra_peak_bytes": peak})
    return result


def plot(comparisons: list[dict], growth: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    time_axes, memory_axes, growth_axes = figure.subplots(1, 3)
    names = [c["workload"] for c in comparisons]
    for i, key in enumerate(("released", "bare", "ours")):
        at = [x + 0.27 * (i - 1) for x in range(len(names))]
        time_axes.bar(at, [c["seconds"][key] for c in comparisons], width=0.25, label=key)
        memory_axes.bar(at, [c["extra_peak_bytes"][key] / 2**20 for c in comparisons], width=0.25, label=key)
    for axes, title in ((time_axes, "seconds"), (memory_axes, "extra peak memory, MiB")):
        axes.set_xticks(range(len(names)), names)
        axes.set(title=title, yscale="log")
        axes.legend()
    tokens = [g["tokens"] for g in growth]
    growth_axes.plot(tokens, [g["seconds"] for g in growth], "o-", label="seconds")
    growth_axes.set(xlabel="tokens", title="growth of ours", xlim=(0, None), ylim=(0, None))
    twin = growth_axes.twinx()
    twin.plot(tokens, [g["extra_peak_bytes"] / 2**20 for g in growth], "s--", color="tab:red")
    twin.set(ylabel="extra peak, MiB (dashed)", ylim=(0, None))
    figure.savefig(path, dpi=150)


def main(arguments: ContrastBenchmarkArguments) -> dict:
    console = Console()
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
    growth = growth_table(scorer, arguments)
    rates = [g["seconds"] / g["tokens"] for g in growth]
    result = {
        "arguments": asdict(arguments),
        "device_name": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "torch_threads": torch.get_num_threads(),
        "comparisons": comparisons,
        "growth": growth,
        "growth_rate_spread": max(rates) / min(rates),
        "growth_memory_spread": max(g["extra_peak_bytes"] for g in growth) / min(g["extra_peak_bytes"] for g in growth),
    }

    table = Table("", *(c["workload"] for c in comparisons), "target", title=f"Contrastive scoring, {arguments.device}")
    for key in ("released", "bare", "ours"):
        table.add_row(f"{key}, seconds", *(f"{c['seconds'][key]:.2f}" for c in comparisons), "")
    for key in ("released", "bare", "ours"):
        table.add_row(
            f"{key}, extra peak MiB", *(f"{c['extra_peak_bytes'][key] / 2**20:,.0f}" for c in comparisons), ""
        )
    table.add_row("released / ours, time", *(f"{c['speed-up']:.2f}" for c in comparisons), "≥ 3")
    table.add_row("ours / released, extra peak", *(f"{c['memory ratio']:.3f}" for c in comparisons), "≤ 0.2")
    table.add_row("ours / bare passes, time", *(f"{c['against bare']:.2f}" for c in comparisons), "≤ 1.3")
    table.add_row("largest relative difference", *(f"{c['largest_relative_difference']:.1e}" for c in comparisons), "")
    console.print(table)
    table = Table("rows", "tokens", "seconds", "µs a token", "extra peak MiB", title="Growth of ours")
    for g in growth:
        micro = 1e6 * g["seconds"] / g["tokens"]
        cells = (str(g["rows"]), f"{g['tokens']:,}", f"{g['seconds']:.2f}", f"{micro:.0f}")
        table.add_row(*cells, f"{g['extra_peak_bytes'] / 2**20:,.0f}")
    console.print(table)

    folder_out = Path(arguments.output_dir)
    folder_out.mkdir(parents=True, exist_ok=True)
    (folder_out / "contrast.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(comparisons, growth, folder_out / "contrast.png")
    console.print(f"{folder_out}/contrast.json, contrast.png")
    return result


if __name__ == "__main__":
    parser = TrlParser((ContrastBenchmarkArguments,))
    main(*parser.parse_args_and_config())
