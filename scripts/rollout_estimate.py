"""Rollout estimate of the critical token of wrong answers (arXiv 2411.19943v3): the costly reference of the contrast.

Reads a `preferences` stage with an `answer` column and continues every prefix of every rejected completion `n` times.
Adds `rejected_rollout_accuracy` (share of right continuations a token), `critical_index` (−1: none), `with_correct` and
`without_correct` (right ones of `n` fresh continuations with and without the critical token; −1: none) and
`rollout_tokens` (tokens through the model). Writes the pass@k figure beside the stage.

accelerate launch scripts/rollout_estimate.py \
    --model meta-llama/Meta-Llama-3-8B --engine vllm --dtype bfloat16 \
    --dataset runs/pairs --output_dir runs/rollout_estimate --max_rows 200
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from tokalign.generation import EngineArguments, load_engine
from tokalign.rewards import answers_match, extract_answer
from tokalign.signals.rollout import (
    critical_position,
    pass_at_k_ablation,
    pass_at_k_curves,
    plot_pass_at_k,
    rollout_estimate,
)
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest, write_manifest
from tokalign.stage.processes import process_state
from tokalign.stage.seeds import derived_seed


@dataclass
class RolloutEstimateArguments:
    """Arguments of the rollout estimate; those of the engine are beside them."""

    dataset: str = field(metadata={"help": "Preferences stage with an `answer` column: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    n: int = field(default=64, metadata={"help": "Continuations a prefix."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the continuations."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the continuations."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a continuation."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a continuation."})
    threshold: float = field(default=0.05, metadata={"help": "Scores after the critical token stay below this."})
    seed: int = field(default=0, metadata={"help": "Fixes all continuations."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows; the estimate is costly."})
    shard_size: int = field(default=8, metadata={"help": "Rows a shard: what a kill can lose."})


def main(arguments: RolloutEstimateArguments, engine_arguments: EngineArguments) -> None:
    state = process_state()
    engine = load_engine(engine_arguments)
    tokenizer = engine.tokenizer
    rows = load_stage(arguments.dataset, split=arguments.split, stage="preferences", tokenizer=tokenizer)
    if "answer" not in rows.column_names:
        raise ContractError(f"{arguments.dataset} has no column `answer` to verify continuations with; add it by `id`.")
    rows = rows.select(range(min(len(rows), arguments.max_rows or len(rows))))
    sampling = {key: getattr(arguments, key) for key in ("n", "temperature", "top_p", "max_tokens")}
    stop = tuple(arguments.stop or ())
    positions = getattr(engine, "max_length", None)

    def estimate(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any] | Dropped]:
        for row in batch:
            prompt_ids, rejected_ids, answer = row["prompt_ids"], row["rejected_ids"], row["answer"]
            if not rejected_ids:
                yield Dropped("the rejected completion is empty")
                continue
            if positions is not None and len(prompt_ids) + len(rejected_ids) >= positions:
                yield Dropped(f"no room for a continuation in the model's {positions} positions")
                continue

            def verify(ids: list[int], answer: str = answer) -> bool:
                return answers_match(extract_answer(tokenizer.decode(ids, skip_special_tokens=True)), answer)

            if verify(list(rejected_ids)):
                yield Dropped("the rejected completion has the right answer")
                continue
            # By content, so that two pairs of one problem differ and a shard's place does not matter
            options = {**sampling, "stop": stop, "seed": derived_seed(arguments.seed, row["id"], tuple(rejected_ids))}
            found = rollout_estimate(engine, prompt_ids, rejected_ids, verify, **options)
            index = critical_position(found.accuracy, threshold=arguments.threshold)
            result = {
                **row,
                "rejected_rollout_accuracy": found.accuracy,
                "critical_index": -1,
                "with_correct": -1,
                "without_correct": -1,
                "rollout_tokens": found.tokens,
            }
            if index is not None:
                counts = pass_at_k_ablation(engine, prompt_ids, rejected_ids, index, verify, **options)
                result["critical_index"] = index
                result["with_correct"], result["without_correct"] = counts.with_correct, counts.without_correct
            yield result

    named = {"model": engine_arguments.model, "adapter": engine_arguments.adapter}
    run_job(
        estimate,
        rows,
        arguments.output_dir,
        name="rollout_estimate",
        parameters={
            **sampling,
            "stop": list(stop),
            "threshold": arguments.threshold,
            "seed": arguments.seed,
            "split": arguments.split,
            "engine": engine_arguments.engine,
            "dtype": engine_arguments.dtype,
            **{key: weights_hash(path) if path else None for key, path in named.items()},
        },
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest=named,
    )
    engine.close()
    if state.is_main_process:
        summarise(arguments.output_dir, arguments.n)


def summarise(output_dir: str, n: int) -> None:
    """Cost into the manifest; pass@k with and without the critical token as JSON and figure."""
    manifest = read_manifest(output_dir)
    if not manifest["rows"]:
        return
    done = load_stage(output_dir)
    tokens, scored = sum(done["rollout_tokens"]), sum(len(ids) for ids in done["rejected_ids"])
    found = [i for i, index in enumerate(done["critical_index"]) if index >= 0]
    cost = {"rollout_tokens": tokens, "scored_tokens": scored, "tokens_per_scored_token": round(tokens / scored, 1)}
    write_manifest(output_dir, {**manifest, **cost, "critical_tokens_found": len(found)})
    print(f"{len(found)} of {len(done)} wrong answers have a critical token; {tokens:,} tokens through the model.")
    if found:
        part = done.select(found)
        curves = pass_at_k_curves(part["with_correct"], part["without_correct"], n)
        (Path(output_dir) / "pass_at_k.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
        plot_pass_at_k(curves, Path(output_dir) / "pass_at_k.png")


if __name__ == "__main__":
    parser = TrlParser((RolloutEstimateArguments, EngineArguments))
    main(*parser.parse_args_and_config())
