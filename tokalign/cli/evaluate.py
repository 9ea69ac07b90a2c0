r"""Accuracy of a model on a problems stage, with 95 % intervals, pass@k, and a paired comparison with another run.

    tokalign evaluate answers --model meta-llama/Meta-Llama-3-8B --problems runs/gsm8k --split test \
        --output_dir runs/eval/base --samples 8 --temperature 1.0
    tokalign evaluate answers --model meta-llama/Meta-Llama-3-8B --adapter runs/critical_dpo \
        --problems runs/gsm8k --split test --output_dir runs/eval/critical_dpo --samples 8 \
        --preferences runs/pairing/pairs --compare runs/eval/base --accelerate_config ddp

Writes rows, `metrics.json` and, with `--preferences`, `logps/` into output_dir. A killed run resumes; rerunning
a finished one only prints it. With a launcher: `accelerate launch -m tokalign evaluate answers …`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from tokalign.evaluation.logps import completion_logps
from tokalign.evaluation.run import compare_runs, evaluate, write_metrics
from tokalign.evaluation.tables import accuracy_table, difference_table
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.arguments import engine_identities
from tokalign.prompts import PromptArguments, recorded_beside, rendering_of
from tokalign.rewards import answers_match, extract_answer
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import MANIFEST, manifest_of, read_manifest, stop_strings
from tokalign.stage.processes import process_state


@dataclass
class EvaluateArguments(PromptArguments):
    """The problems, how they are answered, and what the run is compared with."""

    problems: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder for rows and metrics.json."})
    split: str = field(default="test", metadata={"help": "Split of the problems."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate the first problems only."})
    samples: int = field(default=0, metadata={"help": "Completions a problem for sampled accuracy and pass@k."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the samples."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(
        default=None,
        metadata={
            "help": "Strings that end a completion; unset is those that ended the rollouts of `rollouts`, of "
            "`preferences`, or of what the adapter or the model was trained on, by the first that says so."
        },
    )
    rollouts: str | None = field(
        default=None, metadata={"help": "Stage of rollouts, or of what was made of them, that says where to stop."}
    )
    rollouts_split: str = field(default="train", metadata={"help": "Split of `rollouts`."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    shard_size: int = field(default=256, metadata={"help": "Problems a shard: what a kill can lose."})
    preferences: str | None = field(
        default=None, metadata={"help": "Preferences stage whose chosen and rejected log-probs are measured too."}
    )
    preferences_split: str = field(default="train", metadata={"help": "Split of the preferences."})
    logps_token_budget: int = field(default=32768, metadata={"help": "Most rows x tokens in a batch of log-probs."})
    allow_other_tokenizer: bool = field(
        default=False, metadata={"help": "Take ids that another tokenizer has made; the manifest then says so."}
    )
    compare: str | None = field(default=None, metadata={"help": "output_dir of another run to compare with."})


def main(arguments: EvaluateArguments, engine_arguments: EngineArguments) -> dict[str, Any]:
    """Evaluate or resume; returns what `metrics.json` holds."""
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(
        engine_arguments.tokenizer or engine_arguments.model, trust_remote_code=engine_arguments.trust_remote_code
    )
    problems = load_stage(arguments.problems, split=arguments.split, stage="problems")
    if arguments.limit is not None:
        problems = problems.select(range(min(arguments.limit, len(problems))))
    stop = _stop(arguments, engine_arguments) if arguments.stop is None else arguments.stop
    models = {"model": engine_arguments.model, "adapter": engine_arguments.adapter}
    rendering = rendering_of(
        arguments,
        tokenizer,
        recorded=recorded_beside(engine_arguments.adapter, engine_arguments.model),
        folder=arguments.output_dir,
    )
    preferences = None
    if arguments.preferences is not None:  # before anything is sampled, which takes hours
        preferences = load_stage(
            arguments.preferences,
            split=arguments.preferences_split,
            stage="preferences",
            tokenizer=tokenizer,
            allow_other_tokenizer=arguments.allow_other_tokenizer,
        )
    metrics = evaluate(
        lambda: load_engine(engine_arguments),
        problems,
        arguments.output_dir,
        extract=extract_answer,
        match=answers_match,
        tokenizer=tokenizer,
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        stop=stop,
        seed=arguments.seed,
        rendering=rendering,
        shard_size=arguments.shard_size,
        parameters={
            **engine_identities(engine_arguments),
            "engine": engine_arguments.engine,
            "dtype": engine_arguments.dtype,
        },
        extra_manifest={f"{name}_path": path for name, path in models.items()},
        allow_other_tokenizer=arguments.allow_other_tokenizer,
    )
    metrics |= {**models, "logps": None, "comparison": None}
    if preferences is not None:
        metrics["logps"] = completion_logps(
            engine_arguments.model,
            engine_arguments.adapter,
            preferences,
            Path(arguments.output_dir) / "logps",
            tokenizer=tokenizer,
            dtype=engine_arguments.dtype,
            token_budget=arguments.logps_token_budget,
            allow_other_tokenizer=arguments.allow_other_tokenizer,
        )
    if state.is_main_process:
        if arguments.compare is not None:
            metrics["comparison"] = compare_runs(arguments.output_dir, arguments.compare)
        write_metrics(arguments.output_dir, metrics)
        Console().print(accuracy_table(metrics))
        if arguments.compare is not None:
            Console().print(difference_table(metrics["comparison"], arguments.compare))
    return metrics


def _stop(arguments: EvaluateArguments, engine_arguments: EngineArguments) -> list[str]:
    """Where sampling stopped, evaluation stops: by the first manifest that says where, which is printed."""
    found: list[tuple[str, list[str] | None]] = []
    if (path := arguments.rollouts) is not None:
        stop = stop_strings(manifest_of(load_stage(path, split=arguments.rollouts_split)))
        if stop is None:
            raise ContractError(f"{path} does not say where its rollouts stopped; give --stop, or another stage.")
        found.append((path, stop))
    if (path := arguments.preferences) is not None:
        found.append((path, stop_strings(manifest_of(load_stage(path, split=arguments.preferences_split)))))
    for path in (engine_arguments.adapter, engine_arguments.model):
        if path is not None and (Path(path) / MANIFEST).is_file():
            found.append((path, stop_strings(read_manifest(path))))
    for path, stop in found:
        if stop is not None:
            if process_state().is_main_process:
                Console().print(f"Completions end at {stop or 'no string'}, as the rollouts behind {path} did.")
            return stop
    return []
