"""Score every token of preference pairs by contrastive estimation (critical-token DPO, arXiv 2411.19943v3).

Reads a `preferences` stage, writes it again with `chosen_contrast` and `rejected_contrast`: s_t in [0, 1], low = likely
critical. One base in memory, two LoRA adapters on it; rows are shared over the processes, finished shards are kept.

accelerate launch scripts/score_contrast.py \
    --model meta-llama/Meta-Llama-3-8B \
    --positive runs/positive --negative runs/negative \
    --dataset runs/pairs --output_dir runs/scored
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.signals import ContrastiveScorer
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest, write_manifest
from tokalign.stage.processes import process_state

SIDES = ("chosen", "rejected")


@dataclass
class ScoreContrastArguments:
    """Arguments of contrastive scoring."""

    model: str = field(metadata={"help": "Base model of both adapters: hub id or path."})
    positive: str = field(metadata={"help": "LoRA adapter tuned on correct trajectories."})
    negative: str = field(metadata={"help": "LoRA adapter tuned on incorrect trajectories."})
    dataset: str = field(metadata={"help": "Preferences stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the scored stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    beta: float = field(default=1.0, metadata={"help": "β of the estimate: strength of the contrast."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass, padding included."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."})
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads a large base over all visible GPUs (one process)."}
    )
    shard_size: int = field(default=256, metadata={"help": "Rows a shard: what a kill can lose."})


def token_count(path: str) -> int:
    """Scored tokens of the stage at `path`."""
    scores = load_stage(path).select_columns([f"{side}_contrast" for side in SIDES]).with_format("arrow")
    tables = scores.iter(batch_size=1000)
    return sum(pc.sum(pc.list_value_length(column)).as_py() for table in tables for column in table.columns)


def main(arguments: ScoreContrastArguments) -> None:
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows: Dataset = load_stage(arguments.dataset, split=arguments.split, stage="preferences", tokenizer=tokenizer)
    scorer = ContrastiveScorer(
        arguments.model,
        tokenizer,
        arguments.positive,
        arguments.negative,
        beta=arguments.beta,
        token_budget=arguments.token_budget,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
    )

    def score(batch: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
        """All rows of a shard at once, so that the scorer can put rows of one length together."""
        items: list[dict[str, Any] | Dropped] = []
        for row in batch:
            problems = (f"{s}: {p}" for s in SIDES if (p := scorer.problem(row["prompt_ids"], row[f"{s}_ids"])))
            items.append(Dropped(p) if (p := next(problems, None)) else dict(row))
        jobs = [(row, side) for row in items if isinstance(row, dict) for side in SIDES]
        scores = scorer.score(
            [row["prompt_ids"] for row, _ in jobs],
            [row[f"{side}_ids"] for row, side in jobs],
            names=[f"{row['id']!r} ({side})" for row, side in jobs],
        )
        for (row, side), values in zip(jobs, scores, strict=True):
            row[f"{side}_contrast"] = values
        return items

    run_job(
        score,
        rows,
        arguments.output_dir,
        name="score_contrast",
        parameters={
            "beta": arguments.beta,
            "model": weights_hash(arguments.model),
            "positive": weights_hash(arguments.positive),
            "negative": weights_hash(arguments.negative),
            "split": arguments.split,
            "dtype": str(scorer.base.dtype),
        },
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest={key: getattr(arguments, key) for key in ("model", "positive", "negative")},
    )
    if state.is_main_process:
        manifest = read_manifest(arguments.output_dir)
        if manifest["rows"]:
            scored = token_count(arguments.output_dir)
            rate = scored / max(manifest["seconds"], 1e-3)
            write_manifest(
                arguments.output_dir, {**manifest, "scored_tokens": scored, "tokens_per_second": round(rate, 1)}
            )
            print(f"{scored:,} tokens scored, {rate:,.0f} a second of work; {arguments.output_dir}")


if __name__ == "__main__":
    parser = TrlParser((ScoreContrastArguments,))
    main(*parser.parse_args_and_config())
