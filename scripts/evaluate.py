"""Accuracy of a model on a problems stage, with 95 % intervals, pass@k, and a paired comparison with another run.

    python scripts/evaluate.py --model runs/quickstart/base --problems runs/quickstart/problems --split test \
        --output_dir runs/eval/base --samples 8 --temperature 1.0
    accelerate launch scripts/evaluate.py --model runs/quickstart/base --adapter runs/quickstart/critical_token_dpo \
        --problems runs/quickstart/problems --split test --output_dir runs/eval/ours --samples 8 \
        --preferences runs/quickstart/preferences --compare runs/eval/base

Writes rows, `metrics.json` and, with `--preferences`, `logps/` into output_dir. A killed run resumes; rerunning
a finished one only prints it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.evaluation.logps import completion_logps
from tokalign.evaluation.run import compare_runs, evaluate, write_metrics
from tokalign.generation import EngineArguments, load_engine
from tokalign.rewards import answers_match, extract_answer
from tokalign.stage.hashes import weights_hash
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state


@dataclass
class EvaluateArguments:
    problems: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder for rows and metrics.json."})
    split: str = field(default="test", metadata={"help": "Split of the problems."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate the first problems only."})
    samples: int = field(default=0, metadata={"help": "Completions a problem for sampled accuracy and pass@k."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the samples."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is."},
    )
    shard_size: int = field(default=256, metadata={"help": "Problems a shard: what a kill can lose."})
    preferences: str | None = field(
        default=None, metadata={"help": "Preferences stage whose chosen and rejected log-probs are measured too."}
    )
    preferences_split: str = field(default="train", metadata={"help": "Split of the preferences."})
    logps_token_budget: int = field(default=32768, metadata={"help": "Most rows x tokens in a batch of log-probs."})
    compare: str | None = field(default=None, metadata={"help": "output_dir of another run to compare with."})


def main(script_args: EvaluateArguments, engine_args: EngineArguments) -> dict[str, Any]:
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(
        engine_args.tokenizer or engine_args.model, trust_remote_code=engine_args.trust_remote_code
    )
    problems = load_stage(script_args.problems, split=script_args.split, stage="problems")
    if script_args.limit is not None:
        problems = problems.select(range(min(script_args.limit, len(problems))))
    # An OpenAI server names its adapter; only local weights can be hashed.
    local = engine_args.engine != "openai"
    adapter = engine_args.adapter
    metrics = evaluate(
        lambda: load_engine(engine_args),
        problems,
        script_args.output_dir,
        extract=extract_answer,
        match=answers_match,
        tokenizer=tokenizer,
        samples=script_args.samples,
        temperature=script_args.temperature,
        top_p=script_args.top_p,
        max_tokens=script_args.max_tokens,
        stop=script_args.stop or (),
        seed=script_args.seed,
        prompt_format=script_args.prompt_format,
        shard_size=script_args.shard_size,
        parameters={
            "engine": engine_args.engine,
            "model": weights_hash(engine_args.model) if local else engine_args.served_model or engine_args.model,
            "adapter": weights_hash(adapter) if local and adapter else adapter,
            "dtype": engine_args.dtype,
        },
        extra_manifest={"model_path": engine_args.model, "adapter_path": adapter},
    )
    metrics |= {"model": engine_args.model, "adapter": adapter, "logps": None, "comparison": None}
    if script_args.preferences is not None:
        metrics["logps"] = completion_logps(
            engine_args.model,
            adapter,
            load_stage(
                script_args.preferences,
                split=script_args.preferences_split,
                stage="preferences",
                tokenizer=tokenizer,
            ),
            Path(script_args.output_dir) / "logps",
            tokenizer=tokenizer,
            dtype=engine_args.dtype,
            token_budget=script_args.logps_token_budget,
        )
    if state.is_main_process:
        if script_args.compare is not None:
            metrics["comparison"] = compare_runs(script_args.output_dir, script_args.compare)
        write_metrics(script_args.output_dir, metrics)
        show(metrics, script_args.compare)
    return metrics


def show(metrics: dict[str, Any], other: str | None) -> None:
    """Print the figures, each with its interval and count."""
    table = Table("figure", "value", "95 % interval", "n", title=metrics["adapter"] or metrics["model"])
    add_share(table, "greedy accuracy", metrics["greedy_accuracy"], metrics["ci95"], metrics["n"])
    if metrics["sampled_accuracy"] is not None:
        add_share(table, "sampled accuracy", metrics["sampled_accuracy"], metrics["sampled_ci95"], metrics["n"])
        for row in metrics["pass_at_k"]:
            add_share(table, f"pass@{row['k']}", row["mean"], row["ci95"], row["n"])
    table.add_row("greedy truncated", f"{metrics['truncated']:.1%}", "", str(metrics["n"]))
    for name, row in (metrics["logps"] or {}).items():
        table.add_row(f"log-prob {name} (nats)", f"{row['mean']:.2f}", span(row["ci95"], "{:.2f}"), str(row["n"]))
    console = Console()
    console.print(table)
    if metrics["comparison"] is not None:
        console.print(comparison_table(metrics["comparison"], other))


def comparison_table(comparison: dict[str, Any], other: str | None) -> Table:
    table = Table("difference", "value", "95 % interval", "p", "n", title=f"this run − {other}")
    for name in ("greedy", "sampled"):
        if (row := comparison[name]) is not None:
            exact = "" if row["mcnemar_p"] is None else f" (McNemar {row['mcnemar_p']:.2g})"
            cells = (f"{row['difference']:+.1%}", span(row["ci95"], "{:+.1%}"), f"{row['p']:.2g}{exact}")
            table.add_row(f"{name} accuracy", *cells, str(row["n"]))
    for name, row in (comparison["logps"] or {}).items():
        cells = (f"{row['difference']:+.2f}", span(row["ci95"], "{:+.2f}"), f"{row['p']:.2g}")
        table.add_row(f"log-prob {name} (nats)", *cells, str(row["n"]))
    settings = [key for key in comparison["settings"] if key not in ("model", "adapter")]
    if settings:
        table.caption = f"The runs differ in {', '.join(settings)} too."
    return table


def add_share(table: Table, name: str, value: float, ci95: list[float], n: int) -> None:
    table.add_row(name, f"{value:.1%}", span(ci95, "{:.1%}"), str(n))


def span(ci95: list[float], form: str) -> str:
    return " – ".join(form.format(end) for end in ci95)


if __name__ == "__main__":
    parser = TrlParser((EvaluateArguments, EngineArguments))
    main(*parser.parse_args_and_config())
