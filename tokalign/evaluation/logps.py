"""Log-probability of chosen and rejected completions under a model: log π(y|x) = Σ_t log π(y_t | x, y_<t), in nats.

What preference training moves, measured outside the trainer on any preferences stage: plain DPO tends to lower the
chosen completion too, critical-token DPO should keep it (arXiv 2411.19943v3, §5). The tokens' log-probs are those of
`tokalign.signals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.generation.scorer import CompletionScorer
from tokalign.stage.contract import SIDES, TEXT_ROWS, check_preferences
from tokalign.stage.hashes import allowance, weights_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.statistics import mean_interval


class LogProbScorer(CompletionScorer):
    """A model, with an adapter or without, that scores completions.

    Args:
        model: path or hub id.
        adapter: LoRA adapter of that model, or None.
        dtype: weights' type; "auto" is the checkpoint's own.
        token_budget: most rows × longest row in one batch; a longer single row is a batch of its own.
    """

    def __init__(self, model: str, adapter: str | None = None, *, dtype: str = "auto", token_budget: int = 32768):
        adapters = {} if adapter is None else {"policy": adapter}
        super().__init__(model, None, adapters, dtype=dtype, token_budget=token_budget)
        self.name = None if adapter is None else "policy"

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """log π(completion | prompt) of each row, in nats, in the caller's order.

        Raises:
            ValueError: a row without prompt or completion, or longer than the model's positions, or log-probs that
                are not finite.
        """
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        for i, (length, prompt, completion) in enumerate(zip(lengths, prompts, completions, strict=True)):
            if not len(prompt) or not len(completion):
                raise ValueError(f"Row {i} has an empty prompt or completion: drop it.")
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"Row {i} has {length} tokens but the model holds {self.max_length} positions: drop it, or "
                    "choose a model with a longer context."
                )
        sums = [0.0] * len(lengths)
        for batch in self._batches(lengths):
            texts = [completions[i] for i in batch]
            logps, _ = self._logps(self.name, [prompts[i] for i in batch], texts)
            for i, row in zip(batch, logps.split([len(text) for text in texts]), strict=True):
                self._check_finite(row, str(i))
                sums[i] = math.fsum(row.tolist())
        return sums


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
    allow_other_tokenizer: bool = False,
) -> dict[str, Any]:
    """Score both sides of a preferences stage as a resumable job and average them.

    Args:
        dataset: preferences stage (`id`, `prompt_ids`, `chosen_ids`, `rejected_ids`, …).
        output_dir: folder of the job's rows: `id`, `chosen_logp`, `rejected_logp`, `chosen_tokens`, `rejected_tokens`.
        allow_other_tokenizer: score ids that another tokenizer has made.

    Returns:
        For "chosen", "rejected" and "margin" (chosen − rejected): `mean` in nats, `ci95`, `n`.
    """
    check_preferences(dataset, tokenizer, text_rows=0 if allow_other_tokenizer else TEXT_ROWS)
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
        extra_manifest={"model_path": model, "adapter_path": adapter, **allowance(allow_other_tokenizer)},
    )
    scored = load_stage(output_dir)
    chosen, rejected = list(scored["chosen_logp"]), list(scored["rejected_logp"])
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return {"chosen": _mean(chosen), "rejected": _mean(rejected), "margin": _mean(margins)}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "ci95": list(mean_interval(values)), "n": len(values)}
