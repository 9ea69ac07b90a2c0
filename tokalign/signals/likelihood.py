r"""Signals that a model's own likelihoods give, in nats where they have a unit:

    logprob          log π(y_t|x, y_<t)
    entropy          −Σ_v π(v|x, y_<t) log π(v|x, y_<t), of the distribution that the token was drawn from
    implicit_reward  σ( log π(y_t|x, y_<t) − log π_ref(y_t|x, y_<t) ) − 0.5

The last is DPO's implicit reward, which T-REG's ablation uses in place of the self-generated one (arXiv 2412.02685): an
adapter that DPO has trained is π, the base without it is π_ref, and the log-ratio of a token, which is DPO's reward up
to the factor β, becomes a number in [−0.5, 0.5] by the map that contrastive prompting has. All cost one forward pass a
completion, the implicit reward two.

    tokalign score likelihood --model meta-llama/Meta-Llama-3-8B-Instruct --adapter runs/dpo \
        --signals logprob entropy implicit_reward --dataset runs/pairs --output_dir runs/likelihood

reads preference pairs and writes them again with `chosen_<signal>` and `rejected_<signal>`. On many GPUs:
`tokalign score likelihood … --accelerate_config ddp`, or `accelerate launch -m tokalign score likelihood …`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.scorer import CompletionScorer
from tokalign.signals.job import ScoreArguments, load_pairs, score_pairs
from tokalign.signals.prompting import token_reward
from tokalign.stage.processes import process_state

SIGNALS = ("logprob", "entropy", "implicit_reward")


class LikelihoodScorer(CompletionScorer):
    """Likelihood signals of completions, with one base in memory.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapter.
        tokenizer: the model's tokenizer; only its pad id is used.
        adapter: PEFT adapter path, or None for the model itself. The implicit reward compares it with the base; for
            two whole models take each one's log-probs, and `token_reward` of them.
        signals: of "logprob", "entropy", "implicit_reward".
        token_budget: tokens of one forward pass, padding included; a longer row goes alone.
        tile_bytes: bound on the fp32 logits that exist at a time; default by device.
        dtype: of a model given by path ("auto": as stored).

    Raises:
        ValueError: an unknown signal, an implicit reward without an adapter, an adapter of another base, or a model
            whose way from hidden states to logits is not known here.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: str | Path | None = None,
        *,
        signals: Sequence[str] = ("logprob",),
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
        if unknown := [signal for signal in signals if signal not in SIGNALS]:
            raise ValueError(f"There is no likelihood signal {unknown[0]!r}: use {', '.join(SIGNALS)}.")
        if "implicit_reward" in signals and adapter is None:
            raise ValueError(
                "The implicit reward compares an adapter with its base: give the adapter, or leave it out."
            )
        self.signals = tuple(signals)
        super().__init__(
            model,
            tokenizer,
            {} if adapter is None else {"policy": adapter},
            token_budget=token_budget,
            tile_bytes=tile_bytes,
            dtype=dtype,
            device_map=device_map,
        )
        self.name = None if adapter is None else "policy"

    def problem(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        return self._problem(len(prompt_ids), len(completion_ids))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        names: Sequence[str] | None = None,
    ) -> dict[str, list[list[float]]]:
        """Likelihood signals of completions.

        Args:
            prompts, completions: token ids, one pair a row.
            names: what to call the rows in errors; their index if absent.

        Returns:
            Of each signal, one list a row in the given order, one number a completion token.

        Raises:
            ValueError: a row that `problem` refuses, or numbers that are not finite.
        """
        labels = self._check_rows(prompts, completions, names)
        results: dict[str, list[list[float]]] = {signal: [[] for _ in prompts] for signal in self.signals}
        for rows in self._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            batch = [prompts[r] for r in rows], [completions[r] for r in rows]
            logps, entropies = self._logps(self.name, *batch, entropy="entropy" in self.signals)
            values = {"logprob": logps, "entropy": entropies}
            if "implicit_reward" in self.signals:
                values["implicit_reward"] = token_reward(logps, self._logps(None, *batch)[0])
            for signal in self.signals:
                flat = values[signal]
                assert flat is not None
                for row, part in zip(rows, flat.split([len(c) for c in batch[1]]), strict=True):
                    self._check_finite(part, labels[row])
                    results[signal][row] = part.tolist()
        return results


@dataclass(kw_only=True)
class Arguments(ScoreArguments):
    """Likelihood signals of pairs."""

    signals: list[str] = field(
        default_factory=lambda: ["logprob"],
        metadata={"help": "Of logprob, entropy, implicit_reward (which needs an adapter)."},
    )
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the model: the policy."})


def main(arguments: Arguments) -> None:
    process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_pairs(arguments, tokenizer)
    scorer = LikelihoodScorer(
        arguments.model, tokenizer, arguments.adapter, signals=arguments.signals, **arguments.model_options()
    )
    score_pairs(
        arguments,
        rows,
        tokenizer,
        scorer,
        name="score_likelihood",
        signals=arguments.signals,
        weights={"model": arguments.model, "adapter": arguments.adapter},
        parameters={"signals": sorted(arguments.signals)},
    )
