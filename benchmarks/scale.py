r"""docs/scale.md: what 8B, 32B + 1.5B and 70B take in memory, labelling time, storage and network, on paper.

    python benchmarks/scale.py --output docs/scale.md

Arithmetic on shapes (benchmarks/scale_memory.py) and on the assumptions below, with figures of docs/results/data/
beside it where they were measured; nothing here runs a model. A test writes the page again and compares, so run this
after the suite has written new data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pages.common import Run, load_runs, markdown_table
from scale_memory import (
    GB,
    GPUS,
    LENGTHS,
    METHODS,
    STAGES,
    Limits,
    Shape,
    activations,
    cache_bytes,
    gb,
    memory_rows,
    shape,
    smallest,
    states,
    step_bytes,
    step_rows,
)
from trl import TrlParser

from tokalign.routing.labels.features import TENSORS

ROOT = Path(__file__).resolve().parents[1]
POLICIES = ("Llama-3-8B", "Qwen2.5-32B", "Llama-3-70B")
SLM, LLM = "Qwen2.5-1.5B", "Qwen2.5-32B"
LINKS = (25, 100, 400)  # Gb/s
NEEDS = ("token_credit", "critical_dpo_ledger", "speed", "speed_gpu")
AGAINST_BARE = ("contrastive scoring, overhead", "token rewards, share of the limit")  # ratios of speed.json


@dataclass
class ScaleArguments:
    """Assumptions, each stated on the page; where it was measured the page says so instead."""

    output: str = field(default="docs/scale.md", metadata={"help": "The page."})
    figure: str = field(default="docs/figures/scale_memory.png", metadata={"help": "Its figure."})
    data: str = field(default="docs/results/data", metadata={"help": "Folder of the suite's data."})
    memory_gb: float = field(default=80.0, metadata={"help": "Memory of a GPU."})
    free: float = field(default=0.1, metadata={"help": "Share of it left for buffers and fragments."})
    host_gb: float = field(default=1000.0, metadata={"help": "Memory of a machine's host that offload may use."})
    peak_tflops: float = field(default=312.0, metadata={"help": "Dense bf16 TFLOP/s of a GPU (A100)."})
    prefill: float = field(default=0.4, metadata={"help": "Share of the peak that forward passes reach."})
    decode: float = field(default=0.1, metadata={"help": "Share that batched generation reaches (bound by memory)."})
    prompt_tokens: int = field(default=100, metadata={"help": "Prompt of a pair."})
    completion_tokens: int = field(default=150, metadata={"help": "Completion of a pair."})
    template_tokens: int = field(default=120, metadata={"help": "Words of a revision prompt around what it quotes."})
    continuations: int = field(default=64, metadata={"help": "Continuations of a prefix (the paper's N)."})
    answer_tokens: int = field(default=3000, metadata={"help": "A reasoning model's answer, for routing labels."})
    differ: float = field(default=0.11, metadata={"help": "Share of tokens where the SLM differs (the paper's)."})
    branch_tokens: int = field(default=60, metadata={"help": "A branch to the end of the next sentence."})
    judge_billions: float = field(default=72.7, metadata={"help": "Parameters of the judge (Qwen2.5-72B)."})
    judge_prompt: int = field(default=1450, metadata={"help": "Tokens that the judge reads: context and branches."})
    judge_reply: int = field(default=55, metadata={"help": "Tokens that the judge writes."})
    judge_orders: int = field(default=2, metadata={"help": "Orders that it is asked in."})
    rollouts: int = field(default=512, metadata={"help": "Completions between two weight syncs of online training."})
    rollout_tokens: int = field(default=1024, metadata={"help": "Tokens of each."})
    rollout_bytes: int = field(default=30, metadata={"help": "Bytes of JSON a token on its way back: id, log-prob."})
    servers: int = field(default=8, metadata={"help": "GPUs that generate."})


# -------------------------------------------------------------------------------------------------------- labelling


def gpu_hours(args: ScaleArguments, parameters: float, *, prefill: float = 0, decode: float = 0) -> float:
    """GPU-hours per million labelled tokens: 2 floating-point operations a weight and token.

    Args:
        prefill, decode: tokens through the model for each labelled token, read in parallel or generated.
    """
    rate = args.peak_tflops * 1e12 * 3600
    return 2 * parameters * 1e6 * (prefill / args.prefill + decode / args.decode) / rate


def passes(args: ScaleArguments) -> dict[str, tuple[float, float]]:
    """Tokens (read, generated) through one model for each labelled token, by signal.

    p prompt, T completion, q template. Log-prob: p / T + 1. Contrast: two such passes. Contrastive prompting: two
    passes whose prompt quotes prompt and completion, 2 (p + q + 2 T) / T. Rollout estimate: every prefix once (its
    cache is shared) and N continuations of it, on average (T − 1) / 2 long.
    """
    p, t, q = args.prompt_tokens, args.completion_tokens, args.template_tokens
    return {
        "log-prob, entropy": ((p + t) / t, 0.0),
        "contrast (2 forwards)": (2 * (p + t) / t, 0.0),
        "contrastive prompting (2 forwards)": (2 * (p + q + 2 * t) / t, 0.0),
        f"rollout estimate (N = {args.continuations})": ((p + t) / t, args.continuations * (t - 1) / 2),
    }


def routing_hours(args: ScaleArguments) -> dict[str, float]:
    """GPU-hours of each stage of routing labels per million labelled tokens (methods: R2R, section 3.2)."""
    slm, llm = shape(SLM).parameters, shape(LLM).parameters
    p, t = args.prompt_tokens, args.answer_tokens
    asked = args.differ * args.judge_orders
    return {
        "answers: the LLM writes greedily": gpu_hours(args, llm, prefill=p / t, decode=1),
        "prefill: the SLM reads them": gpu_hours(args, slm, prefill=(p + t) / t),
        "branches by sentences (judge)": gpu_hours(args, llm, decode=args.differ * args.branch_tokens),
        "branches to the end (outcome)": gpu_hours(args, llm, decode=args.differ * t / 2),
        "verdicts: the judge": gpu_hours(
            args, 1e9 * args.judge_billions, prefill=asked * args.judge_prompt, decode=asked * args.judge_reply
        ),
    }


def measured(runs: dict[str, Run]) -> list[list[str]]:
    """What the suite has measured of tokens through a model for each labelled token; a row a figure and run."""
    rows = []
    if "token_credit" in runs:
        for name, signal in runs["token_credit"]["results"]["targets"]["first_error"]["signals"].items():
            if signal["tokens_per_scored_token"]:
                rows.append([name, f"{signal['tokens_per_scored_token']:.2f}", "token_credit"])
    if "critical_dpo_ledger" in runs:
        estimates = runs["critical_dpo_ledger"]["results"]["estimates"]
        for name, key in (("contrastive score", "contrast_tokens"), ("rollout estimate", "rollout_tokens")):
            rows.append([name, f"{estimates[key]['mean']:,.2f}", "critical_dpo_ledger"])
    return rows


def rates(runs: dict[str, Run]) -> list[list[str]]:
    """Rates that speed.json has: tokens a second through the scorers, of routed pairs, and scorers by bare passes."""
    rows = []
    for name in ("speed", "speed_gpu"):
        if name not in runs:
            continue
        run = runs[name]
        on = ", ".join(str(run["machine"][key]) for key in ("cpu", "threads", "gpu") if key in run["machine"])
        for curve in run["results"]["curves"]:
            if curve["over"] == "tokens":
                last = curve["points"][-1]
                rows.append([curve["what"], f"{last['tokens'] / last['seconds']:,.0f} tokens/s", f"{name}: {on}"])
        for pair in run["results"]["routed"]:
            for way, rate in pair["tokens_per_second"].items():
                of = f"{' + '.join(pair['pair'])}, batch {pair['batch']}"
                rows.append([f"{way}, {of}", f"{rate:,.1f} tokens/s", f"{name}: {on}"])
        for ratio in run["results"]["ratios"]:
            if ratio["name"] in AGAINST_BARE:
                rows.append([f"{ratio['what']} ({ratio['detail']})", f"{ratio['value']:.2f} ×", f"{name}: {on}"])
    return rows


# -------------------------------------------------------------------------------------------------- storage, network


def storage(args: ScaleArguments) -> dict[str, float]:
    """Bytes for each completion token of a stage, before compression: 8 an id, a log-prob or a signal's value.

    A prompt's ids and text (4 bytes a token) are shared by the tokens of a completion.
    """
    prompt, text = 12 * args.prompt_tokens, 4
    row = prompt / args.completion_tokens
    return {
        "rollouts: ids, log-probs, text": 8 + 8 + text + row,
        "preferences: ids, text": 8 + text + row / 2,
        "a signal": 8,
        "reference log-probs, kept ahead of training": 4,
        "routing labels: ids, SLM's choices, labels": 3 * 8 + prompt / args.answer_tokens,
        f"routing features of {SLM}": feature_bytes(shape(SLM).width),
    }


def feature_bytes(width: int, top_k: int = 100) -> int:
    """Bytes of a position's features: 2 (d + k) + 8, by the types that tokalign.routing.labels.features stores."""
    sizes = {"hidden": width, "top_logits": top_k}
    return sum(np.dtype(kind).itemsize * sizes.get(name, 1) for name, kind in TENSORS.items())


def sync_seconds(size: float, link: float) -> float:
    """Seconds that `size` bytes take over a link of `link` Gb/s at its full rate."""
    return 8 * size / (link * 1e9)


def generation_seconds(args: ScaleArguments, parameters: float) -> float:
    """Seconds that the servers take for the completions between two syncs."""
    rate = args.servers * args.peak_tflops * 1e12 * args.decode / (2 * parameters)
    return args.rollouts * args.rollout_tokens / rate


# -------------------------------------------------------------------------------------------------------------- page


def tables(args: ScaleArguments, runs: dict[str, Run]) -> dict[str, list[str]]:
    """Every table of the page, by its name in `TEXT`."""
    names = (SLM, *POLICIES)
    signals, routing = passes(args), routing_hours(args)
    judged = sum(hours for name, hours in routing.items() if "outcome" not in name)
    by_outcome = sum(hours for name, hours in routing.items() if "judge" not in name)
    stored = storage(args)
    assumed = [
        [f"`{f.name}`", f"{getattr(args, f.name):,g}", f.metadata["help"]]
        for f in fields(args)
        if not isinstance(getattr(args, f.name), str)
    ]
    limits = limits_of(args)
    sizes = [f"{length // 1024}k, {gpus}" for length in LENGTHS for gpus in GPUS]
    found = {"assumptions": markdown_table(("argument", "value", "what it is"), assumed)}
    found["models"] = markdown_table(
        ("model", "parameters", "bf16 weights, GB", "LoRA r 16, all linear", "ZeRO-3's largest layer"),
        [[n, *_counts(shape(n))] for n in names],
    )
    for name in POLICIES:
        headings = ("method", "ZeRO", *(f"states, {gpus}" for gpus in GPUS), *sizes, "host, 8")
        found[f"memory {name}"] = markdown_table(headings, memory_rows(limits, shape(name)))
    sides = ("all kept", "checkpointed", "whole logits", "their share", "fused head", "with LoRA")
    headings = ("model", "length", *sides)
    found["step"] = markdown_table(headings, [row for n in POLICIES for row in step_rows(shape(n))])
    found["smallest"] = markdown_table(
        ("model", "method", *sizes),
        [
            [n, title, *(smallest(limits, shape(n), method, gpus, length) for length in LENGTHS for gpus in GPUS)]
            for n in POLICIES
            for method, title in METHODS.items()
        ],
    )
    found["labelling"] = markdown_table(
        ("signal", "tokens read", "tokens generated", *POLICIES),
        [
            [name, f"{read:.2f}", f"{written:,.0f}"]
            + [figures(gpu_hours(args, shape(n).parameters, prefill=read, decode=written)) for n in POLICIES]
            for name, (read, written) in signals.items()
        ],
    )
    stages = [*routing.items(), ("**in all, judge**", judged), ("**in all, outcome**", by_outcome)]
    found["routing"] = markdown_table(("stage", "GPU-hours"), [[name, figures(hours)] for name, hours in stages])
    found["measured"] = markdown_table(("signal", "tokens a labelled token", "measured by"), measured(runs))
    found["rates"] = ["Not measured yet: there is no speed.json in docs/results/data."]
    if speeds := rates(runs):
        found["rates"] = markdown_table(("what", "measured", "by, on"), speeds)
    found["storage"] = markdown_table(
        ("stage", "bytes a token", "10 M tokens, GB"),
        [[name, f"{size:,.1f}", f"{size / 100:,.2f}"] for name, size in stored.items()],
    )
    rows = []
    for n in POLICIES:
        generation = generation_seconds(args, shape(n).parameters)
        for sent, count in (("weights (full, merged LoRA)", shape(n).parameters), ("adapter", shape(n).adapter)):
            seconds = [sync_seconds(2 * count, link) for link in LINKS]
            share = f"{seconds[1] / (seconds[1] + generation):.2%}"
            cells = [f"{2 * count / GB:,.2f}", *(f"{s:,.2f} s" for s in seconds), f"{generation:,.0f} s", share]
            rows.append([n, sent, *cells])
    links = (f"{link} Gb/s" for link in LINKS)
    found["network"] = markdown_table(
        ("model", "sent", "GB", *links, "a round's generation", f"share at {LINKS[1]} Gb/s"), rows
    )
    return found


def figures(value: float) -> str:
    """Three digits or so, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def limits_of(args: ScaleArguments) -> Limits:
    return Limits((1 - args.free) * args.memory_gb * GB, args.host_gb * GB)


def _counts(model: Shape) -> list[str]:
    weights = f"{2 * model.parameters / GB:.1f}"
    return [f"{model.parameters:,}", weights, f"{model.adapter:,}", f"{model.largest_layer:,}"]


def facts(args: ScaleArguments) -> dict[str, Any]:
    """The numbers in the page's sentences, by their name in `TEXT`."""
    eight, seventy = shape("Llama-3-8B"), shape("Llama-3-70B")
    signals = passes(args)
    cheap, costly = (signals[name] for name in signals if name.startswith(("contrast (", "rollout")))
    budget = limits_of(args).gpu
    hours = [gpu_hours(args, 1, prefill=read, decode=written) for read, written in (cheap, costly)]
    both = 2 * (shape(SLM).parameters + shape(LLM).parameters)
    cached = sum(cache_bytes(shape(name)) for name in (SLM, LLM))
    back = args.rollouts * args.rollout_tokens * args.rollout_bytes
    return {
        "budget": f"{budget / GB:g}",
        "memory": f"{args.memory_gb:g}",
        "free": f"{args.free:.0%}",
        "both": gb(both),
        "cached_kb": f"{cached / 1e3:,.0f}",
        "left_tokens": f"{(budget - both) / cached:,.0f}",
        "long_gb": gb(cached * 32768),
        "copy_70": gb(states(seventy, "full", "3", 8)[0]),
        "no_copy_70": gb(states(seventy, "full, no copy", "3", 8)[0]),
        "copy_70_16": gb(states(seventy, "full", "3", 16)[0]),
        "copy_70_64": gb(states(seventy, "full", "3", 64)[0]),
        "host_70": gb(states(seventy, "full, no copy", "3, offload", 8)[1]),
        "host": f"{args.host_gb:,g}",
        "whole_8": gb(2 * eight.parameters),
        "whole_70": gb(2 * seventy.parameters),
        "zero2_70": gb(states(seventy, "LoRA", "2", 64)[0]),
        "zero3_lora_70": gb(states(seventy, "LoRA", "3", 8)[0]),
        "zero0_8": gb(states(eight, "full", "0", 8)[0]),
        "zero1_8": gb(states(eight, "full", "1", 8)[0]),
        "zero2_8": gb(states(eight, "full", "2", 8)[0]),
        "kept_70": gb(activations(seventy, 2 * 8192, checkpointing=False)),
        "checkpointed_70": gb(activations(seventy, 2 * 8192, checkpointing=True)),
        "ratio_tokens": f"{sum(costly) / sum(cheap):,.0f}",
        "ratio_hours": f"{hours[1] / hours[0]:,.0f}",
        "decode_8": f"{args.peak_tflops * 1e12 * args.decode / (2 * eight.parameters):,.0f}",
        "decode_70": f"{args.peak_tflops * 1e12 * args.decode / (2 * seventy.parameters):,.0f}",
        "link": f"{LINKS[0]}",
        "back_mb": f"{back / 1e6:,.1f}",
        "back_seconds": f"{sync_seconds(back, LINKS[0]):.3f}",
        "rollouts": f"{args.rollouts}",
        "rollout_tokens": f"{args.rollout_tokens:,}",
        "servers": f"{args.servers}",
    }


def page(args: ScaleArguments, runs: dict[str, Run]) -> str:
    """The Markdown: `TEXT` with a table where a line is `[[name]]`, and a number where it says `{name}`."""
    found, values = tables(args, runs), facts(args)
    lines: list[str] = []
    for line in TEXT.splitlines():
        if line.startswith("[["):
            lines += found[line[2:-2]]
        else:
            lines.append(line.format(**values) if "{" in line else line)
    return "\n".join(lines) + "\n"


def figure(args: ScaleArguments, path: Path) -> None:
    """Memory of a GPU by stage and size: bars on 8 GPUs, dots on 64, and the line of what a GPU has."""
    drawing = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    panels = drawing.subplots(1, len(METHODS), sharey=True)
    for panel, (method, title) in zip(panels, METHODS.items(), strict=True):
        for i, name in enumerate(POLICIES):
            model, at = shape(name), np.arange(len(STAGES)) + 0.27 * (i - 1)
            few, many = (
                [(states(model, method, s, gpus)[0] + step_bytes(model, method, LENGTHS[0])) / GB for s in STAGES]
                for gpus in (GPUS[0], GPUS[-1])
            )
            panel.bar(at, few, 0.25, label=f"{name}, {GPUS[0]} GPUs", color=f"C{i}")
            panel.plot(at, many, "o", label=f"{name}, {GPUS[-1]} GPUs", color=f"C{i}", markeredgecolor="black")
        panel.axhline(args.memory_gb, color="black", linestyle="--", linewidth=1)
        panel.set(title=title, xlabel="ZeRO stage", yscale="log", xticks=range(len(STAGES)), xticklabels=STAGES)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(f"GB a GPU, one pair of {LENGTHS[0] // 1024}k tokens a side")
    panels[-1].legend(fontsize=8)
    drawing.savefig(path)


def main(args: ScaleArguments) -> None:
    runs = load_runs(ROOT / args.data, NEEDS)
    Path(args.output).write_text(page(args, runs), encoding="utf-8")
    figure(args, Path(args.figure))


TEXT = """\
# Scale, on paper

What models of 8B, 32B + 1.5B (routing) and 70B take: memory by ZeRO stage, GPU-hours of labelling, storage, network,
and the commands. **We have run none of these sizes.** The tables are arithmetic on the models' shapes and on the
assumptions at the end of the page; what was measured, on small models, is in tables of its own and says by which run.
Written by `python benchmarks/scale.py --output docs/scale.md`; edits here are lost. GB are 10⁹ bytes.

[[models]]

Parameters are counted on models built from their published shapes on the meta device, shared ones once.

## Memory

Per GPU. *States* are the policy's weights, gradients, fp32 master weights and Adam's moments as DeepSpeed's own
estimators have them (stage 0 is theirs for one GPU; stage 1, which they lack, is 4 P + 16 P / N bytes for P weights
on N GPUs), and the reference:

| | reference | its bytes |
|---|---|---|
| full, frozen copy | a second model in bf16 | 2 P on every GPU; 2 P / N under ZeRO-3, where TRL shares it out too |
| full, log-probs ahead | `--precompute_ref_log_probs true`: run once, stored | none while training |
| LoRA, adapter off | the base under the adapter | none of its own; the base is 2 P, under ZeRO-3 2 P / N |

The other columns add a step on one preference pair (two rows of 2k or 8k tokens) with gradient checkpointing and
TRL's fused head. Struck out: more than {budget} GB ({memory} GB less {free} for communication buffers, gathered
layers ahead and fragments), or more than {host} GB a host. "Host, 8" is what offload keeps in the memory of one
machine of 8 GPUs, DeepSpeed's factor of 1.5 for buffers included.

### Llama-3-8B

[[memory Llama-3-8B]]

### Qwen2.5-32B

[[memory Qwen2.5-32B]]

### Llama-3-70B

[[memory Llama-3-70B]]

![Memory a GPU by ZeRO stage, method and size](figures/scale_memory.png)

### The lowest stage that fits

Lower stages communicate less, so take the first that fits. Columns: length, GPUs.

[[smallest]]

### Activations and the head

For one pair, bf16, fused attention. A layer keeps 20 h + 4 k + 8 f bytes a token (h width, k width of the keys, f of
the MLP; a test counts the tensors that the backward pass really keeps), checkpointed 2 h and one layer at a time.
Whole logits are 10 V a token: bf16, fp32 and their gradient. The fused head holds a tile of them, and, where the head
is trained, its gradient in fp32. "Their share" is that of whole logits in a
checkpointed step.

[[step]]

## What does not fit

- **70B, full DPO with a reference copy, 8 × 80 GB**: {copy_70} GB of states a GPU under ZeRO-3, before any
  activation. Without the copy still {no_copy_70} GB. On 16 GPUs {copy_70_16} GB. 64 GPUs ({copy_70_64} GB) are
  comfortable. Offload on one machine asks its host for {host_70} GB, without the copy. On 8 GPUs use LoRA:
  {zero3_lora_70} GB of states under ZeRO-3.
- **70B with LoRA under ZeRO-0, 1 or 2**: the base is whole on every GPU, {zero2_70} GB however many there are.
- **8B, full, without sharing (ZeRO-0, plain data parallel)**: {zero0_8} GB of states with the reference's copy, on
  any number of GPUs. On 8, ZeRO-1 has {zero1_8} GB and ZeRO-2 {zero2_8} GB.
- **70B at 8k without checkpointing**: {kept_70} GB of activations a pair; with it {checkpointed_70} GB.
  `gradient_checkpointing` is on by default in TRL's configurations.
- **Online GRPO of a 70B LoRA under ZeRO-3 with a vLLM server**: for the merge TRL gathers all weights on every GPU at
  once, {whole_70} GB. Full fine-tuning sends parameter by parameter and does not have this peak. (8B: {whole_8} GB
  beside the states, which fits.)
- **Long routed answers of 32B + 1.5B on one GPU**: both models are {both} GB, so {budget} GB leave {left_tokens}
  tokens of keys and values ({cached_kb} kB a token of both models); one answer of 32k tokens needs {long_gb} GB.
  Serve the LLM on two GPUs ([routed_serving.md](routed_serving.md)).
- **A rollout estimate of everything**: see below; take some hundred rows (`--max_rows`).

## Labelling

GPU-hours per million labelled tokens: 2 floating-point operations a weight and token, at the stated shares of a GPU's
peak. By these, one GPU generates {decode_8} tokens a second with 8B and {decode_70} with 70B (in a group that holds
it). With p prompt, T completion and q template tokens, a labelled token costs: log-prob (p + T) / T tokens read;
contrast two such passes; contrastive prompting 2 (p + q + 2 T) / T, as its prompt quotes the answer; the rollout
estimate N (T − 1) / 2 generated, if all continuations of a prefix share its cache.

[[labelling]]

The rollout estimate takes {ratio_tokens} times the tokens of the contrast, and {ratio_hours} times its GPU-hours, as
generating is slower than reading. The contrast needs two small adapters first (minutes:
[recipes](../recipes/README.md)).

Routing labels of the 1.5B + 32B pair, GPU-hours per million tokens of the LLM's answers:

[[routing]]

A job shares its rows over the processes of the launch, so hours on n GPUs are these over n, until fewer shards are
left than processes (`--shard_size`).

Measured on this package's small models (the ledger world; a CPU), tokens through the model for each labelled token,
to be compared with "tokens read" and "tokens generated" above. They differ as prompts and completions do: by the
formulas, log-prob's figure less 1 is the length of a prompt in completions.

[[measured]]

Rates as measured, of models that are small enough for the machine named: they say what the scorers add to bare forward
passes, not what a GPU would do.

[[rates]]

## Storage

Before compression (parquet is written with zstd). Features are not compressed.

[[storage]]

## Network between rollout servers and trainers

Online training (`structured_grpo.py --rollouts vllm-server`) sends the weights to the servers whenever they have
changed, before the next {rollouts} completions of up to {rollout_tokens} tokens. TRL merges a LoRA adapter and sends
whole weights, so both cost the same; "adapter" is what servers that load adapters would need (vLLM can; TRL does not
send them so). Seconds are at the link's full rate. Generation of a round is on {servers} GPUs at the decoding rate
above.

[[network]]

Back come ids and log-probs, about {back_mb} MB of JSON a round, {back_seconds} s at {link} Gb/s. Offline jobs move
nothing between machines but shards on the shared disk.

## Commands

One machine of 8 GPUs: 8B in full under ZeRO-2 or 3, 70B with LoRA under ZeRO-3.

```bash
accelerate launch --config_file accelerate_configs/zero2.yaml recipes/treg.py \\
    --config recipes/llama-3-8b-instruct/treg.yaml --precompute_ref_log_probs true
accelerate launch --config_file accelerate_configs/zero3.yaml recipes/critical_dpo.py \\
    --config recipes/llama-3-70b/critical_dpo.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml scripts/score.py contrast \\
    --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --dataset runs/llama-3-8b-gsm8k/pairs \\
    --positive runs/llama-3-8b-gsm8k/positive_sft --negative runs/llama-3-8b-gsm8k/negative_sft \\
    --output_dir runs/llama-3-8b-gsm8k/signals
accelerate launch scripts/label_routing.py --config recipes/deepseek-r1-distill-qwen-1.5b-32b/label_routing.yaml
```

Eight machines by hand, the same command on each with its own `--machine_rank` (0 … 7) and machine 0's address:

```bash
accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines 8 --num_processes 64 \\
    --machine_rank 0 --main_process_ip 10.0.0.1 --main_process_port 29500 recipes/critical_dpo.py \\
    --config recipes/llama-3-70b/critical_dpo.yaml --gradient_accumulation_steps 1
```

Recipes have a batch of 8 a process: on 8 times the GPUs a step sees 8 times the pairs, so lower the accumulation to
come closer to the batch that the paper used, or its learning rate no longer fits.

Under SLURM ([train.sbatch](../accelerate_configs/slurm/train.sbatch),
[label.sbatch](../accelerate_configs/slurm/label.sbatch)), from the repository root on a disk that all machines see:

```bash
sbatch --nodes=8 accelerate_configs/slurm/train.sbatch recipes/critical_dpo.py \\
    --config recipes/llama-3-70b/critical_dpo.yaml --gradient_accumulation_steps 1 --save_strategy steps --save_steps 50
sbatch --nodes=4 accelerate_configs/slurm/label.sbatch scripts/score.py contrast \\
    --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --dataset runs/llama-3-8b-gsm8k/pairs \\
    --positive runs/llama-3-8b-gsm8k/positive_sft --negative runs/llama-3-8b-gsm8k/negative_sft \\
    --output_dir runs/llama-3-8b-gsm8k/signals
```

`srun` starts one `accelerate launch` a machine. A preempted job, or one two minutes from its time limit, returns to
the queue: training goes on from its last whole checkpoint, an offline job with the shards that are missing. The test
of these files plays two machines on one CPU.

## Assumptions

Arguments of `benchmarks/scale.py`; none of them is measured here. Shares of the peak are guesses of the usual size:
40 % is what [recipes](../recipes/README.md) assume for training; decoding in large batches reaches less, as it reads
all weights for every token. The share of differing tokens is the routing paper's, the other lengths are those of
GSM8K and MATH answers as the recipes assume them.

[[assumptions]]
"""

if __name__ == "__main__":
    main(*TrlParser((ScaleArguments,)).parse_args_and_config())
