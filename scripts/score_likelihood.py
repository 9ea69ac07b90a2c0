"""Add the likelihood signals to preference pairs: log-probs, entropies, DPO's implicit reward.

Reads a `preferences` stage, writes it again with `chosen_<signal>` and `rejected_<signal>` for each of `--signals`:
`logprob` and `entropy` in nats, `implicit_reward` in [−0.5, 0.5] (an adapter that DPO has trained against its base,
both on one model in memory; an ablation of T-REG, arXiv 2412.02685). Rows are shared over the processes, finished
shards are kept.

accelerate launch scripts/score_likelihood.py \
    --model meta-llama/Meta-Llama-3-8B-Instruct --adapter runs/dpo --signals logprob entropy implicit_reward \
    --dataset runs/pairs --output_dir runs/likelihood
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.signals import LikelihoodScorer
from tokalign.signals.stage import load_pairs, report_rate
from tokalign.stage.contract import SIDES
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.processes import process_state


@dataclass
class ScoreLikelihoodArguments:
    """Arguments of likelihood scoring."""

    model: str = field(metadata={"help": "Model, or base of the adapter: hub id or path."})
    dataset: str = field(metadata={"help": "Preferences stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the scored stage."})
    signals: list[str] = field(
        default_factory=lambda: ["logprob"],
        metadata={"help": "Of logprob, entropy, implicit_reward (which needs an adapter)."},
    )
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of that model: the policy."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass, padding included."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."})
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads a large model over all visible GPUs (one process)."}
    )
    shard_size: int = field(default=256, metadata={"help": "Rows a shard: what a kill can lose."})


def main(arguments: ScoreLikelihoodArguments) -> None:
    state = process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_pairs(arguments.dataset, arguments.split, tokenizer)
    scorer = LikelihoodScorer(
        arguments.model,
        tokenizer,
        arguments.adapter,
        signals=arguments.signals,
        token_budget=arguments.token_budget,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
    )

    def score(batch: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
        """All rows of a shard at once, so that the scorer can put rows of one length together."""
        items: list[dict[str, Any] | Dropped] = []
        for row in batch:
            problems = (f"{s}: {p}" for s in SIDES if (p := scorer.problem(row["prompt_ids"], row[f"{s}_ids"])))
            items.append(Dropped(p) if (p := next(problems, None)) else row)
        jobs = [(row, side) for row in items if isinstance(row, dict) for side in SIDES]
        scores = scorer.score(
            [row["prompt_ids"] for row, _ in jobs],
            [row[f"{side}_ids"] for row, side in jobs],
            names=[f"{row['id']!r} ({side})" for row, side in jobs],
        )
        for signal, lists in scores.items():
            for (row, side), values in zip(jobs, lists, strict=True):
                row[f"{side}_{signal}"] = values
        return items

    run_job(
        score,
        rows,
        arguments.output_dir,
        name="score_likelihood",
        parameters={
            "signals": sorted(arguments.signals),
            "model": weights_hash(arguments.model),
            "adapter": weights_hash(arguments.adapter) if arguments.adapter else None,
            "split": arguments.split,
            "dtype": str(scorer.base.dtype),
        },
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest={"model": arguments.model, "adapter": arguments.adapter},
    )
    if state.is_main_process:
        report_rate(arguments.output_dir, [f"{side}_{arguments.signals[0]}" for side in SIDES])


if __name__ == "__main__":
    parser = TrlParser((ScoreLikelihoodArguments,))
    main(*parser.parse_args_and_config())
