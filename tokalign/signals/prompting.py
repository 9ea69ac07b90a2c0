r"""Token rewards by contrastive prompting (T-REG, arXiv 2412.02685).

One model reads a completion y behind two prompts that quote it: x_better asks to rewrite it for the better, x_worse for
the worse (`tokalign.data.revision`):

    r̂_t = σ( log π(y_t|x_better, y_<t) − log π(y_t|x_worse, y_<t) ) − 0.5    in [−0.5, 0.5]

A token that a better answer would keep has a positive reward. The cost is two forward passes a completion, each behind
a prompt that holds the question and the completion once more.

    tokalign score token-reward --model meta-llama/Meta-Llama-3-8B-Instruct --templates general \
        --dataset runs/pairs --output_dir runs/rewarded

reads preference pairs and writes them again with `chosen_token_reward`, `rejected_token_reward`, and in
`token_reward_tokens` what went through the model for both. The model is the reference of the training to come, or any
other with the same tokenizer. On many GPUs: `tokalign score token-reward … --accelerate_config ddp`, or
`accelerate launch -m tokalign score token-reward …`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.data.revision import load_templates, revision_prompts, templates_hash
from tokalign.generation.scorer import CompletionScorer
from tokalign.prompts import RECORD, rendering_of
from tokalign.signals.job import ScoreArguments, load_pairs, score_pairs
from tokalign.stage.manifest import manifest_of
from tokalign.stage.processes import process_state


def token_reward(better_logps: torch.Tensor, worse_logps: torch.Tensor) -> torch.Tensor:
    """Token reward r̂_t = σ(better − worse) − 0.5 (arXiv 2412.02685).

    Args:
        better_logps: log-probabilities of tokens in nats, any shape, any float dtype.
        worse_logps: the same tokens' under the other prompt (or another model), same shape.

    Returns:
        fp32 rewards of that shape in [−0.5, 0.5].

    Raises:
        ValueError: the shapes disagree.
    """
    if better_logps.shape != worse_logps.shape:
        raise ValueError(
            "better_logps and worse_logps must be of the same tokens, got shapes "
            f"{tuple(better_logps.shape)} and {tuple(worse_logps.shape)}."
        )
    return torch.sigmoid(better_logps.float() - worse_logps.float()) - 0.5


class PromptingScorer(CompletionScorer):
    """Token rewards of completions, with one model in memory.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapter: the reference, or any other model
            with the same tokenizer.
        tokenizer: the model's tokenizer; only its pad id is used.
        adapter: PEFT adapter path, or None for the model itself.
        token_budget: tokens of one forward pass, padding included; the two rows of one completion stay together.
        tile_bytes: bound on the fp32 logits that exist at a time; default by device.
        dtype: of a model given by path ("auto": as stored).

    Raises:
        ValueError: an adapter of another base, or a model whose way from hidden states to logits is not known here.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        adapter: str | Path | None = None,
        *,
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
        super().__init__(
            model,
            tokenizer,
            {} if adapter is None else {"evaluation": adapter},
            token_budget=token_budget,
            tile_bytes=tile_bytes,
            dtype=dtype,
            device_map=device_map,
        )
        self.name = None if adapter is None else "evaluation"

    def problem(self, better_ids: Sequence[int], worse_ids: Sequence[int], completion_ids: Sequence[int]) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        shortest, longest = sorted((len(better_ids), len(worse_ids)))
        return self._problem(shortest, len(completion_ids)) or self._problem(longest, len(completion_ids))

    def score(
        self,
        better_prompts: Sequence[Sequence[int]],
        worse_prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        names: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Token rewards of completions.

        Args:
            better_prompts, worse_prompts: ids of the revision prompts (`revision_prompt_ids`), one of each a row.
            completions: token ids, scored as they are behind both prompts.
            names: what to call the rows in errors; their index if absent.

        Returns:
            One list a row in the given order, one reward in [−0.5, 0.5] a completion token.

        Raises:
            ValueError: a row that `problem` refuses, or log-probabilities that are not finite.
        """
        for prompts in (better_prompts, worse_prompts):
            labels = self._check_rows(prompts, completions, names)
        pairs = list(zip(better_prompts, worse_prompts, strict=True))
        lengths = [max(map(len, pair)) + len(c) for pair, c in zip(pairs, completions, strict=True)]
        results: list[list[float]] = [[] for _ in completions]
        for rows in self._batches(lengths, copies=2):
            texts = [completions[r] for r in rows]
            prompts = [pairs[r][0] for r in rows] + [pairs[r][1] for r in rows]
            logps, _ = self._logps(self.name, prompts, texts * 2)
            rewards = token_reward(*logps.chunk(2))
            for row, values in zip(rows, rewards.split([len(c) for c in texts]), strict=True):
                self._check_finite(values, labels[row])
                results[row] = values.tolist()
        return results


@dataclass(kw_only=True)
class Arguments(ScoreArguments):
    """Token rewards of pairs."""

    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the model."})
    templates: str = field(
        default="general",
        metadata={"help": "Revision prompts: general, math, code, ledger, or the path of a JSON file."},
    )
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders revision prompts by the chat template, `raw` encodes them as they are."},
    )


def main(arguments: Arguments) -> None:
    process_state()
    templates = load_templates(arguments.templates)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_pairs(arguments, tokenizer)

    # Policy prompt and revision prompts are rendered alike, but for texts, which a chat model is asked about in a chat
    record, key = (manifest_of(rows) or {}).get(RECORD), "revision_prompts"
    rendering = replace(
        rendering_of(arguments.template, tokenizer, recorded=record, folder=arguments.output_dir, key=key),
        format=arguments.prompt_format,
    )
    variables = {"chat_template_kwargs": rendering.chat_template_kwargs} if rendering.chat_template_kwargs else {}

    def revisions(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        return revision_prompts(row, side, templates, tokenizer, rendering)

    score_pairs(
        arguments,
        rows,
        tokenizer,
        PromptingScorer(arguments.model, tokenizer, arguments.adapter, **arguments.model_options()),
        name="score_token_rewards",
        signals=["token_reward"],
        weights={"model": arguments.model, "adapter": arguments.adapter},
        parameters={"templates": templates_hash(templates), "prompt_format": arguments.prompt_format, **variables},
        prompts=revisions,
        extra_manifest={"templates": asdict(templates), key: rendering.record(tokenizer)},
    )
