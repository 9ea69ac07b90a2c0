"""Log-probability of chosen and rejected completions under a model: log π(y|x) = Σ_t log π(y_t | x, y_<t), in nats.

What preference training moves, measured outside the trainer on any preferences stage: plain DPO tends to lower the
chosen completion too, critical-token DPO should keep it (arXiv 2411.19943v3, §5). Rows are batched by token budget; the
LM head runs tile by tile (TRL's fused head), so no (rows, tokens, vocabulary) tensor exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from tokalign.data.contract import check_preferences, load_stage, weights_hash
from tokalign.evaluation.metrics import mean_interval
from tokalign.generation.protocol import adapter_config
from tokalign.jobs import process_state, run_job

IGNORED = -100  # label of a position that is not scored
SIDES = ("chosen", "rejected")


class LogProbScorer:
    """A model, with an adapter or without, that scores completions.

    Args:
        model: path or hub id.
        adapter: LoRA adapter of that model, or None.
        dtype: weights' type; "auto" is the checkpoint's own.
        token_budget: most rows × longest row in one batch; a longer single row is a batch of its own.
    """

    def __init__(self, model: str, adapter: str | None = None, *, dtype: str = "auto", token_budget: int = 32768):
        device = process_state().device
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        add_fused_lm_head(base)
        self.model = base
        if adapter is not None:
            adapter_config(adapter, model)
            self.model = PeftModel.from_pretrained(base, adapter).eval()
            # The fused head multiplies by the head's stored weight, which does not hold what an adapter adds to it.
            if isinstance(self.model.get_output_embeddings(), BaseTunerLayer | AuxiliaryTrainingWrapper):
                self.model = self.model.merge_and_unload()
        self.device = device
        self.token_budget = token_budget
        self.max_length = getattr(base.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """log π(completion | prompt) of each row, in nats, in the caller's order.

        Raises:
            ValueError: a row without prompt or completion, or longer than the model's positions.
        """
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        for i, (row, prompt, completion) in enumerate(zip(rows, prompts, completions, strict=True)):
            if not len(prompt) or not len(completion):
                raise ValueError(f"Row {i} has an empty prompt or completion: drop it.")
            if self.max_length is not None and len(row) > self.max_length:
                raise ValueError(
                    f"Row {i} has {len(row)} tokens but the model holds {self.max_length} positions: drop it, or "
                    "choose a model with a longer context."
                )
        logps = [0.0] * len(rows)
        for batch in self._batches([len(row) for row in rows]):
            ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)
            lengths = torch.tensor([len(rows[i]) for i in batch])[:, None]
            starts = torch.tensor([len(prompts[i]) for i in batch])[:, None]
            positions = torch.arange(ids.shape[1])[None]
            mask = positions < lengths
            labels = ids.masked_fill(~(mask & (positions >= starts)), IGNORED)
            outputs = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.long().to(self.device),
                labels=labels.to(self.device),
                fused_lm_head=True,
            )
            for i, value in zip(batch, outputs.log_probs.float().sum(1).tolist(), strict=True):
                logps[i] = value
        return logps

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Row indices, longest first, cut so that rows × longest stays within the budget."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * lengths[batch[0]] > self.token_budget:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def completion_logps(
    model: str,
    adapter: str | None,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "auto",
    token_budget: int = 32768,
    shard_size: int = 256,
) -> dict[str, Any]:
    """Score both sides of a preferences stage as a resumable job and average them.

    Args:
        dataset: preferences stage (`id`, `prompt_ids`, `chosen_ids`, `rejected_ids`, …).
        output_dir: folder of the job's rows: `id`, `chosen_logp`, `rejected_logp`, `chosen_tokens`, `rejected_tokens`.

    Returns:
        For "chosen", "rejected" and "margin" (chosen − rejected): `mean` in nats, `ci95`, `n`.
    """
    check_preferences(dataset, tokenizer)
    loaded: list[LogProbScorer] = []  # a finished job loads no model

    def score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not loaded:
            loaded.append(LogProbScorer(model, adapter, dtype=dtype, token_budget=token_budget))
        prompts = [row["prompt_ids"] for row in rows] * 2
        logps = loaded[0].score(prompts, [row[f"{side}_ids"] for side in SIDES for row in rows])
        return [
            {
                "id": row["id"],
                "chosen_logp": chosen,
                "rejected_logp": rejected,
                "chosen_tokens": len(row["chosen_ids"]),
                "rejected_tokens": len(row["rejected_ids"]),
            }
            for row, chosen, rejected in zip(rows, logps[: len(rows)], logps[len(rows) :], strict=True)
        ]

    run_job(
        score,
        dataset,
        output_dir,
        name="completion_logps",
        parameters={
            "model": weights_hash(model),
            "adapter": weights_hash(adapter) if adapter else None,
            "dtype": dtype,
        },
        tokenizer=tokenizer,
        shard_size=shard_size,
        extra_manifest={"model_path": model, "adapter_path": adapter},
    )
    scored = load_stage(output_dir)
    chosen, rejected = list(scored["chosen_logp"]), list(scored["rejected_logp"])
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return {"chosen": _mean(chosen), "rejected": _mean(rejected), "margin": _mean(margins)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "ci95": list(mean_interval(values)), "n": len(values)}
