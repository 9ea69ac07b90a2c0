r"""Structured output of a model on a problems stage, free or constrained, and finished runs side by side.

    tokalign evaluate structured --model Qwen/Qwen2.5-1.5B-Instruct --problems runs/gsm8k_json \
        --split test --output_dir runs/structured/base
    tokalign evaluate structured --model Qwen/Qwen2.5-1.5B-Instruct --problems runs/gsm8k_json \
        --split test --output_dir runs/structured/constrained --constrained true --accelerate_config ddp
    tokalign evaluate structured --runs runs/structured/base runs/structured/constrained \
        --names base constrained --output_dir runs/structured/table

The first two write rows, `timing/` and `metrics.json` into output_dir; a killed run resumes; rerunning a finished one
only prints it. The third needs no model: it prints all runs with paired differences to the first, and writes
`table.json` and `table.png`. With a launcher: `accelerate launch -m tokalign evaluate structured …`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import AutoTokenizer

from tokalign.evaluation.run import write_metrics
from tokalign.evaluation.structured import compare, evaluate_structured, plot
from tokalign.evaluation.tables import side_by_side, structured_table
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.arguments import engine_identities
from tokalign.prompts import PromptArguments, recorded_beside, rendering_of
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.schemas import load_schema
from tokalign.stage.files import write_text_atomically
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state


@dataclass
class EvaluateStructuredArguments(PromptArguments):
    """The problems, what is asked of the answers, and finished runs to compare."""

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
    shard_size: int = field(default=256, metadata={"help": "Problems a shard: what a kill can lose."})
    runs: list[str] | None = field(default=None, metadata={"help": "output_dirs of finished runs to compare."})
    names: list[str] | None = field(default=None, metadata={"help": "What to call these runs."})


@dataclass
class OptionalEngineArguments(EngineArguments):
    """The model, and what generates with it."""

    model: str = field(default="", metadata={"help": "Hub id or path of the model; none with --runs."})


def main(arguments: EvaluateStructuredArguments, engine_arguments: OptionalEngineArguments) -> dict[str, Any]:
    """Evaluate or resume, or compare; returns what `metrics.json` or `table.json` holds."""
    if arguments.runs is not None:
        return _compare(arguments.runs, arguments.names, Path(arguments.output_dir))
    if not engine_arguments.model or arguments.problems is None:
        raise ValueError("An evaluation needs --model and --problems, or --runs with finished ones.")
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(
        engine_arguments.tokenizer or engine_arguments.model, trust_remote_code=engine_arguments.trust_remote_code
    )
    problems = load_stage(arguments.problems, split=arguments.split, stage="problems")
    if arguments.limit is not None:
        problems = problems.select(range(min(arguments.limit, len(problems))))
    schema = None if arguments.schema is None else load_schema(Path(arguments.schema))
    models = {"model": engine_arguments.model, "adapter": engine_arguments.adapter}
    judged = ("output_format", "fence", "references", "text_match", "reasoning_end")
    rendering = rendering_of(
        arguments,
        tokenizer,
        recorded=recorded_beside(engine_arguments.adapter, engine_arguments.model),
        folder=arguments.output_dir,
    )
    metrics = evaluate_structured(
        lambda: load_engine(engine_arguments),
        problems,
        arguments.output_dir,
        reward=StructuredReward(**{name: getattr(arguments, name) for name in judged}),
        tokenizer=tokenizer,
        schema=None if schema is None else json.dumps(schema),
        constrained=arguments.constrained,
        temperature=arguments.temperature,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop or (),
        rendering=rendering,
        shard_size=arguments.shard_size,
        parameters={
            **engine_identities(engine_arguments),
            "engine": engine_arguments.engine,
            "grammar_backend": engine_arguments.grammar_backend if arguments.constrained else None,
            "dtype": engine_arguments.dtype,
        },
        extra_manifest={f"{name}_path": path for name, path in models.items()},
    )
    metrics |= models
    if state.is_main_process:
        write_metrics(arguments.output_dir, metrics)
        Console().print(structured_table(metrics))
    return metrics


def _compare(runs: list[str], names: list[str] | None, output_dir: Path) -> dict[str, Any]:
    """Print, write and draw the comparison of finished runs."""
    comparison = compare(runs, names)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output_dir / "table.json", json.dumps(comparison, indent=2, allow_nan=False) + "\n")
    plot(comparison, output_dir / "table.png")
    Console().print(side_by_side(comparison))
    return comparison
