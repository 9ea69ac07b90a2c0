"""Token rewards by contrastive prompting against bare forward passes of the same padded batches.

Four procedures on the same random model, in this process, interleaved:

- ours: `PromptingScorer.score`, from ids to lists of rewards;
- forward: `model(input_ids, attention_mask)` of every batch, the forward-only limit of the target;
- completion head: the layers, and the LM head at completion positions, its logits thrown away;
- layers: the backbone alone, without any LM head.

Share = limit's time / our time; above 1 our run is faster than the limit, because the head is skipped on prompts. A
revision prompt holds a question, the completion and the words of a template.

python benchmarks/token_rewards.py                                   # CPU, a few minutes
python benchmarks/token_rewards.py --device cuda --dtype bfloat16 --hidden_size 4096 --intermediate_size 14336 \
    --layers 32 --heads 32 --rows 256 --token_budget 16384
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from trl import TrlParser

from tokalign.signals import PromptingScorer

LIMITS = {"forward": "whole model", "completion head": "head at completions only", "layers": "no head"}
TARGET = 0.8  # share of "forward"


@dataclass
class TokenRewardsBenchmarkArguments:
    """Model shape, workload and device."""

    vocab_sizes: list[int] = field(default_factory=lambda: [32000, 128256], metadata={"help": "Vocabularies."})
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    intermediate_size: int = field(default=1024, metadata={"help": "MLP width."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    heads: int = field(default=8, metadata={"help": "Attention heads."})
    rows: int = field(default=12, metadata={"help": "Completions, each behind two prompts."})
    template_length: int = field(default=50, metadata={"help": "Tokens of a template without its fields."})
    question_length: int = field(default=80, metadata={"help": "Longest question; questions are 50-100 % of it."})
    completion_length: int = field(default=120, metadata={"help": "Longest completion, likewise."})
    token_budget: int = field(default=2048, metadata={"help": "Tokens of one forward pass."})
    repeats: int = field(default=5, metadata={"help": "Timed runs of each; the fastest counts."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; torch's choice if unset."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    dtype: str = field(default="float32", metadata={"help": "Weights' type."})
    output_dir: str = field(default="runs/benchmarks/token_rewards", metadata={"help": "Folder of JSON and PNG."})


Rows = tuple[list[list[int]], list[list[int]], list[list[int]]]


def make_rows(vocab_size: int, arguments: TokenRewardsBenchmarkArguments) -> Rows:
    """(better prompts, worse prompts, completions) of random ids."""
    rng = random.Random(0)

    def draw(longest: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(longest // 2, longest))]

    better_template, worse_template = (draw(2 * arguments.template_length)[: arguments.template_length] for _ in "bw")
    better, worse, completions = [], [], []
    for _ in range(arguments.rows):
        completion = draw(arguments.completion_length)
        quoted = draw(arguments.question_length) + completion
        better.append(quoted + better_template)
        worse.append(quoted + worse_template)
        completions.append(completion)
    return better, worse, completions


def make_scorer(vocab_size: int, arguments: TokenRewardsBenchmarkArguments) -> PromptingScorer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=max(1, arguments.heads // 4),
        max_position_embeddings=8192,
    )
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    return PromptingScorer(model, None, token_budget=arguments.token_budget)


def padded_batches(scorer: PromptingScorer, rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The scorer's own batches on its device: ids, attention mask, scored positions."""
    better, worse, completions = rows
    lengths = [max(len(b), len(w)) + len(c) for b, w, c in zip(*rows, strict=True)]
    batches = []
    for batch in scorer._batches(lengths, copies=2):
        prompts, texts = [p[r] for p in (better, worse) for r in batch], [completions[r] for r in batch] * 2
        input_ids, predicts, _ = scorer._pad(prompts, texts)
        ends = torch.tensor([len(p) + len(c) for p, c in zip(prompts, texts, strict=True)])
        mask = (torch.arange(input_ids.shape[1])[None] < ends[:, None]).long()
        batches.append((input_ids.to(scorer.device), mask.to(scorer.device), predicts.to(scorer.device)))
    return batches


@torch.inference_mode()
def forward(scorer: PromptingScorer, batches: list, how: str) -> None:
    """Bare passes over all batches; see the module docstring."""
    model = scorer.base
    for input_ids, mask, predicts in batches:
        if how == "forward":
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            continue
        states = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        if how == "completion head":
            model.get_output_embeddings()(states[predicts])


def seconds(function: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(vocab_size: int, arguments: TokenRewardsBenchmarkArguments) -> dict:
    """Times of the four procedures, fastest of interleaved runs, with one vocabulary."""
    scorer = make_scorer(vocab_size, arguments)
    rows = make_rows(vocab_size, arguments)
    batches = padded_batches(scorer, rows)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: scorer.score(*rows)}
    for how in LIMITS:
        runs[how] = lambda how=how: forward(scorer, batches, how)  # type: ignore[misc]
    for run in runs.values():
        run()  # warm
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, arguments.device))
    fastest = {name: min(values) for name, values in times.items()}
    tokens = sum(int(mask.sum()) for _, mask, _ in batches)
    scored = sum(map(len, rows[2]))
    return {
        "vocab_size": vocab_size,
        "tokens": tokens,
        "padded_tokens": sum(input_ids.numel() for input_ids, _, _ in batches),
        "scored_tokens": scored,
        "batches": len(batches),
        "seconds": fastest,
        "runs": times,
        "tokens_per_second": {name: tokens / value for name, value in fastest.items()},
        "scored_tokens_per_second": scored / fastest["ours"],
        "share": {name: fastest[name] / fastest["ours"] for name in LIMITS},
    }


def plot(results: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rate_axes, share_axes = figure.subplots(1, 2)
    names = [f"{r['vocab_size']:,} words" for r in results]
    for i, key in enumerate(("ours", *LIMITS)):
        at = [x + 0.2 * (i - 1.5) for x in range(len(names))]
        rate_axes.bar(at, [r["tokens_per_second"][key] for r in results], width=0.18, label=key)
        if key in LIMITS:
            share_axes.bar(at, [r["share"][key] for r in results], width=0.18, color=f"C{i}", label=f"of {key}")
    rate_axes.set(title="tokens a second through the model", yscale="log")
    share_axes.axhline(TARGET, color="black", linewidth=0.8, linestyle="--")
    share_axes.set(title=f"share of each limit (target {TARGET} of forward)")
    for axes in (rate_axes, share_axes):
        axes.set_xticks(range(len(names)), names)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: TokenRewardsBenchmarkArguments) -> dict:
    console = Console()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results = [measure(vocab_size, arguments) for vocab_size in arguments.vocab_sizes]
    on_cuda = arguments.device.startswith("cuda")
    result = {
        "arguments": asdict(arguments),
        "device_name": torch.cuda.get_device_name() if on_cuda else "cpu",
        "torch_threads": torch.get_num_threads(),
        "results": results,
    }
    title = f"Token rewards, {arguments.device}, {arguments.dtype}, {torch.get_num_threads()} threads"
    table = Table("", *(f"{r['vocab_size']:,} words" for r in results), "target", title=title)
    for name in ("ours", *LIMITS):
        table.add_row(f"{name}, seconds", *(f"{r['seconds'][name]:.2f}" for r in results), "")
    for name in ("ours", *LIMITS):
        table.add_row(f"{name}, tokens a second", *(f"{r['tokens_per_second'][name]:,.0f}" for r in results), "")
    table.add_row("ours, rewards a second", *(f"{r['scored_tokens_per_second']:,.0f}" for r in results), "")
    for name, what in LIMITS.items():
        target = f"≥ {TARGET}" if name == "forward" else ""
        table.add_row(f"share of {name} ({what})", *(f"{r['share'][name]:.2f}" for r in results), target)
    console.print(table)

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "token_rewards.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(results, folder / "token_rewards.png")
    console.print(f"{folder}/token_rewards.json, token_rewards.png")
    return result


if __name__ == "__main__":
    parser = TrlParser((TokenRewardsBenchmarkArguments,))
    main(*parser.parse_args_and_config())
