"""Structured output of a model on a problems stage, free or constrained, and finished runs side by side.

    python scripts/evaluate_structured.py --model Qwen/Qwen2.5-1.5B-Instruct --problems runs/gsm8k_json/problems \
        --split test --output_dir runs/structured/base
    accelerate launch scripts/evaluate_structured.py --model Qwen/Qwen2.5-1.5B-Instruct \
        --problems runs/gsm8k_json/problems --split test --output_dir runs/structured/constrained --constrained true
    python scripts/evaluate_structured.py --runs runs/structured/base runs/structured/constrained \
        --names base constrained --output_dir runs/structured/table

The first two write rows, `timing/` and `metrics.json` into output_dir; a killed run resumes; rerunning a finished one
only prints it. The third needs no model: it prints all runs with paired differences to the first, and writes
`table.json` and `table.png`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.evaluation.run import write_metrics
from tokalign.evaluation.structured import FIGURES, compare, evaluate_structured, plot
from tokalign.generation import EngineArguments, load_engine
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.schemas import load_schema
from tokalign.stage.files import write_text_atomically
from tokalign.stage.hashes import weights_hash
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state

NAMES = {
    "validity": "valid documents",
    "structure": "structural accuracy",
    "compliance": "schema compliance",
    "content_f1": "content F1",
    "exact_match": "exact match",
    "invented_keys": "invented keys a document",
    "hallucinated": "documents with any",
    "total": "reward",
    "truncated": "truncated",
}


@dataclass
class EvaluateStructuredArguments:
    output_dir: str = field(metadata={"help": "Folder for rows and metrics.json, or for table.json and table.png."})
    problems: str | None = field(default=None, metadata={"help": "Problems stage: folder or hub id."})
    split: str = field(default="test", metadata={"help": "Split of the problems."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate the first problems only."})
    constrained: bool = field(default=False, metadata={"help": "Decode under each problem's JSON Schema."})
    schema: str | None = field(
        default=None, metadata={"help": "JSON Schema file for problems without a schema of their own."}
    )
    output_format: Literal["json", "yaml", "xml", "tool_call"] = field(
        default="json", metadata={"help": "What the completions shall be."}
    )
    fence: Literal["optional", "never", "required"] = field(
        default="optional", metadata={"help": "Whether the document stands in a Markdown fence."}
    )
    references: Literal["value", "allowed"] = field(
        default="value",
        metadata={"help": "`allowed`: references give lists of allowed values for a tool call's arguments."},
    )
    text_match: Literal["exact", "tokens"] = field(
        default="exact", metadata={"help": "How the reward compares strings: equal, or F1 over words."}
    )
    reasoning_end: str | None = field(
        default=None, metadata={"help": "Judge only what follows the last of these, e.g. </think>."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy, else one sample a problem."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is."},
    )
    shard_size: int = field(default=256, metadata={"help": "Problems a shard: what a kill can lose."})
    runs: list[str] | None = field(default=None, metadata={"help": "output_dirs of finished runs to compare."})
    names: list[str] | None = field(default=None, metadata={"help": "What to call these runs."})


@dataclass
class OptionalEngineArguments(EngineArguments):
    model: str = field(default="", metadata={"help": "Hub id or path of the model; none with --runs."})


def main(script_args: EvaluateStructuredArguments, engine_args: OptionalEngineArguments) -> dict[str, Any]:
    if script_args.runs is not None:
        return tabulate(script_args.runs, script_args.names, Path(script_args.output_dir))
    if not engine_args.model or script_args.problems is None:
        raise ValueError("An evaluation needs --model and --problems, or --runs with finished ones.")
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(
        engine_args.tokenizer or engine_args.model, trust_remote_code=engine_args.trust_remote_code
    )
    problems = load_stage(script_args.problems, split=script_args.split, stage="problems")
    if script_args.limit is not None:
        problems = problems.select(range(min(script_args.limit, len(problems))))
    schema = None if script_args.schema is None else load_schema(Path(script_args.schema))
    # An OpenAI server names its adapter; only local weights can be hashed.
    local = engine_args.engine != "openai"
    adapter = engine_args.adapter
    metrics = evaluate_structured(
        lambda: load_engine(engine_args),
        problems,
        script_args.output_dir,
        reward=StructuredReward(
            output_format=script_args.output_format,
            fence=script_args.fence,
            references=script_args.references,
            text_match=script_args.text_match,
            reasoning_end=script_args.reasoning_end,
        ),
        tokenizer=tokenizer,
        schema=None if schema is None else json.dumps(schema),
        constrained=script_args.constrained,
        temperature=script_args.temperature,
        seed=script_args.seed,
        max_tokens=script_args.max_tokens,
        stop=script_args.stop or (),
        prompt_format=script_args.prompt_format,
        shard_size=script_args.shard_size,
        parameters={
            "engine": engine_args.engine,
            "grammar_backend": engine_args.grammar_backend if script_args.constrained else None,
            "model": weights_hash(engine_args.model) if local else engine_args.served_model or engine_args.model,
            "adapter": weights_hash(adapter) if local and adapter else adapter,
            "dtype": engine_args.dtype,
        },
        extra_manifest={"model_path": engine_args.model, "adapter_path": adapter},
    )
    metrics |= {"model": engine_args.model, "adapter": adapter}
    if state.is_main_process:
        write_metrics(script_args.output_dir, metrics)
        show(metrics)
    return metrics


def show(metrics: dict[str, Any]) -> None:
    """Print the figures, each with its interval and count."""
    how = "constrained" if metrics["constrained"] else "free"
    table = Table("figure", "value", "95 % interval", "n", title=f"{metrics['adapter'] or metrics['model']}, {how}")
    for name in FIGURES:
        if (figure := metrics["figures"][name]) is not None:
            form = form_of(name)
            interval = " – ".join(form.format(end) for end in figure["ci95"])
            table.add_row(NAMES[name], form.format(figure["value"]), interval, str(figure["n"]))
    table.caption = latency_text(metrics["latency"])
    Console().print(table)


def tabulate(runs: list[str], names: list[str] | None, output_dir: Path) -> dict[str, Any]:
    """Print, write and draw the comparison of finished runs."""
    comparison = compare(runs, names)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output_dir / "table.json", json.dumps(comparison, indent=2, allow_nan=False) + "\n")
    plot(comparison, output_dir / "table.png")
    columns = [run["name"] for run in comparison["runs"]]
    table = Table(
        "figure", *columns, title="values; below them the paired difference to the first run and its interval"
    )
    for name in FIGURES:
        table.add_row(NAMES[name], *(cell(name, run) for run in comparison["runs"]))
    rates = [run["latency"]["tokens_per_second"] for run in comparison["runs"]]
    table.add_row("tokens a second", *("" if rate is None else f"{rate:,.0f}" for rate in rates))
    first_calls = [run["latency"]["first_call_seconds"] for run in comparison["runs"]]
    table.add_row("first call (s)", *(f"{seconds:.2f}" for seconds in first_calls))
    Console().print(table)
    return comparison


def cell(name: str, run: dict[str, Any]) -> str:
    figure = run["figures"][name]
    if figure is None:
        return ""
    form = form_of(name)
    text = form.format(figure["value"])
    change = (run["differences"] or {}).get(name)
    if change is None:
        return text
    signed = form.replace(":", ":+")
    return f"{text}\n{signed.format(change['difference'])} ({' – '.join(signed.format(end) for end in change['ci95'])})"


def form_of(name: str) -> str:
    return "{:.2f}" if name in ("invented_keys", "total") else "{:.1%}"


def latency_text(latency: dict[str, Any]) -> str:
    if latency["tokens_per_second"] is None:
        return ""
    return (
        f"{latency['tokens']:,} tokens in {latency['generation_seconds']:.1f} s ({latency['tokens_per_second']:,.0f} a "
        f"second); before that {latency['load_seconds']:.1f} s to load and {latency['first_call_seconds']:.1f} s for "
        "the first call"
    )


if __name__ == "__main__":
    parser = TrlParser((EvaluateStructuredArguments, OptionalEngineArguments))
    main(*parser.parse_args_and_config())
