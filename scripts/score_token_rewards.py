"""Reward every token of preference pairs by contrastive prompting (T-REG, arXiv 2412.02685).

Reads a `preferences` stage, writes it again with `chosen_token_reward` and `rejected_token_reward`: r̂_t in [−0.5, 0.5],
what `--model` thinks of the token, asked by two revision prompts; `token_reward_tokens` is what went through the model
for it. The model is the reference of the training to come, or any other with the same tokenizer. Rows are shared over
the processes, finished shards are kept.

accelerate launch scripts/score_token_rewards.py \
    --model meta-llama/Meta-Llama-3-8B-Instruct --templates general \
    --dataset runs/pairs --output_dir runs/rewarded
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.data.revision import load_templates, revision_prompt_ids, templates_hash
from tokalign.signals import PromptingScorer
from tokalign.signals.stage import load_pairs, report_rate
from tokalign.stage.contract import SIDES
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.processes import process_state


@dataclass
class ScoreTokenRewardsArguments:
    """Arguments of contrastive prompting."""

    model: str = field(metadata={"help": "Model that is asked: hub id or path."})
    dataset: str = field(metadata={"help": "Preferences stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the scored stage."})
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of that model."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    templates: str = field(
        default="general",
        metadata={"help": "Revision prompts: general, math, code, ledger, or the path of a JSON file."},
    )
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders revision prompts by the chat template, `raw` encodes them as they are."},
    )
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass, padding included."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."})
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads a large model over all visible GPUs (one process)."}
    )
    shard_size: int = field(default=256, metadata={"help": "Rows a shard: what a kill can lose."})


def main(arguments: ScoreTokenRewardsArguments) -> None:
    state = process_state()
    templates = load_templates(arguments.templates)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_pairs(arguments.dataset, arguments.split, tokenizer)
    scorer = PromptingScorer(
        arguments.model,
        tokenizer,
        arguments.adapter,
        token_budget=arguments.token_budget,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
    )

    def ask(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        text = row[side] if isinstance(row[side], str) else row[side][-1]["content"]
        name = f"{row['id']!r} ({side})"
        return revision_prompt_ids(row["prompt"], text, templates, tokenizer, arguments.prompt_format, name=name)

    def score(batch: list[dict[str, Any]]) -> list[dict[str, Any] | Dropped]:
        """All rows of a shard at once, so that the scorer can put rows of one length together."""
        items: list[dict[str, Any] | Dropped] = []
        jobs: list[tuple[dict[str, Any], str, list[int], list[int]]] = []
        for row in batch:
            asked = [(side, *ask(row, side)) for side in SIDES]
            problems = (f"{s}: {p}" for s, *prompts in asked if (p := scorer.problem(*prompts, row[f"{s}_ids"])))
            if (problem := next(problems, None)) is not None:
                items.append(Dropped(problem))
                continue
            row["token_reward_tokens"] = sum(len(b) + len(w) + 2 * len(row[f"{s}_ids"]) for s, b, w in asked)
            items.append(row)
            jobs += [(row, *prompts) for prompts in asked]
        rewards = scorer.score(
            [better for _, _, better, _ in jobs],
            [worse for _, _, _, worse in jobs],
            [row[f"{side}_ids"] for row, side, _, _ in jobs],
            names=[f"{row['id']!r} ({side})" for row, side, _, _ in jobs],
        )
        for (row, side, _, _), values in zip(jobs, rewards, strict=True):
            row[f"{side}_token_reward"] = values
        return items

    run_job(
        score,
        rows,
        arguments.output_dir,
        name="score_token_rewards",
        parameters={
            "model": weights_hash(arguments.model),
            "adapter": weights_hash(arguments.adapter) if arguments.adapter else None,
            "templates": templates_hash(templates),
            "prompt_format": arguments.prompt_format,
            "split": arguments.split,
            "dtype": str(scorer.base.dtype),
        },
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest={
            "model": arguments.model,
            "adapter": arguments.adapter,
            "templates": asdict(templates),
        },
    )
    if state.is_main_process:
        report_rate(arguments.output_dir, [f"{side}_token_reward" for side in SIDES], "token_reward_tokens")


if __name__ == "__main__":
    parser = TrlParser((ScoreTokenRewardsArguments,))
    main(*parser.parse_args_and_config())
