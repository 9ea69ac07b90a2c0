r"""Contrastive estimation of critical tokens (critical-token DPO, arXiv 2411.19943v3, section 3.2).

    tokalign score contrast --model meta-llama/Meta-Llama-3-8B --positive runs/positive --negative runs/negative \
        --dataset runs/pairs --output_dir runs/scored

reads preference pairs and writes them again with `chosen_contrast` and `rejected_contrast`. On many GPUs:
`tokalign score contrast … --accelerate_config ddp`, or `accelerate launch -m tokalign score contrast …`.

Two adapters of one base, tuned on correct (positive) and on incorrect (negative) trajectories, read one completion:

    log s_t = (1 + β) log P_p(y_t|·) − β log P_n(y_t|·) − log Z_t,    Z_t = Σ_v P_p(v)^(1+β) / P_n(v)^β.

Each model's own normaliser cancels against Z_t, so this is softmax((1 + β)·l_p − β·l_n) of the two models' logits at
the token y_t. A low s_t marks a likely critical token. The cost is two forward passes a completion.

Deviations from the released code, which keeps two merged models and the softmax over the whole vocabulary: one base in
memory with the two adapters switched on in turn; the vocabulary is met only in tiles, at completion positions; where
the LM head is one linear map that no adapter touches and nothing caps its output, the contrast is taken before it,
(1 + β) W h_p − β W h_n = W((1 + β) h_p − β h_n), which halves the head's work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.scorer import CompletionScorer
from tokalign.signals.job import ScoreArguments, load_pairs, score_pairs
from tokalign.stage.processes import process_state

CPU_TILE_BYTES = 8 << 20  # logits of a tile, exponentials included: small enough to stay near the cache
SMALLEST_BLOCK = 2048  # words of the vocabulary in one matrix product


def _softmax_at(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Probability of `token_ids` (P,) under fp32 `logits` (P, V), which are overwritten. Non-finite rows give NaN."""
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.gather(-1, token_ids[:, None]).squeeze(-1) / logits.sum(dim=-1)


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}.")


@torch.no_grad()
def contrastive_score(
    positive_logits: torch.Tensor,
    negative_logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    beta: float = 1.0,
    tile_bytes: int = CPU_TILE_BYTES,
) -> torch.Tensor:
    """Contrastive score s_t of each token (arXiv 2411.19943v3, eq. for log s_t; see the module docstring).

    Args:
        positive_logits: (B, T, V) logits that predict `token_ids`; any float dtype, strided views welcome.
        negative_logits: (B, T, V), same vocabulary.
        token_ids: (B, T) token at each position, 0 <= id < V.
        beta: strength of the contrast, >= 0; 0 gives the positive model's own probability.
        tile_bytes: bound on the fp32 working memory; the logits are neither copied whole nor changed.

    Returns:
        (B, T) fp32 scores in [0, 1].

    Raises:
        ValueError: shapes disagree, an id is outside the vocabulary, or a position's logits are NaN or infinite.
    """
    _check_beta(beta)
    if positive_logits.ndim != 3 or positive_logits.shape != negative_logits.shape:
        raise ValueError(
            "positive_logits and negative_logits must both be (B, T, V) over one vocabulary, got "
            f"{tuple(positive_logits.shape)} and {tuple(negative_logits.shape)}."
        )
    if token_ids.shape != positive_logits.shape[:-1]:
        raise ValueError(
            f"token_ids must be {tuple(positive_logits.shape[:-1])} to match the logits, got {tuple(token_ids.shape)}."
        )
    batch, length, vocabulary = positive_logits.shape
    outside = (token_ids < 0) | (token_ids >= vocabulary)
    if outside.any():
        raise ValueError(f"token_ids must be in [0, {vocabulary}), got {int(token_ids[outside][0])}.")

    scores = torch.empty(batch, length, dtype=torch.float32, device=positive_logits.device)
    step = max(1, tile_bytes // (4 * vocabulary))
    for row in range(batch):  # row by row, because a view over (B, T) of a shifted slice would be a copy
        for start in range(0, length, step):
            at = slice(start, start + step)
            tile = positive_logits[row, at].to(torch.float32, copy=True).mul_(1 + beta)
            tile.sub_(negative_logits[row, at], alpha=beta)
            scores[row, at] = _softmax_at(tile, token_ids[row, at])
    bad = scores.isnan().nonzero()
    if len(bad):
        row, position = bad[0].tolist()
        raise ValueError(
            f"The combined logits of row {row}, position {position} are not finite: "
            "look for NaN or infinity in the models' weights or an overflow in half precision."
        )
    return scores


class ContrastiveScorer(CompletionScorer):
    """Scores completions with one base in memory and two adapters on it.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapters.
        tokenizer: the models' tokenizer; only its pad id is used.
        positive, negative: PEFT adapter paths, or None for the base itself.
        beta: β of the estimate.

    The others are those of `CompletionScorer`, and so are the errors.
    """

    tile_default = CPU_TILE_BYTES

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        positive: str | None,
        negative: str | None,
        *,
        beta: float = 1.0,
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
        _check_beta(beta)
        self.beta = beta
        adapters = {name: path for name, path in (("positive", positive), ("negative", negative)) if path is not None}
        super().__init__(
            model,
            tokenizer,
            adapters,
            token_budget=token_budget,
            tile_bytes=tile_bytes,
            dtype=dtype,
            device_map=device_map,
        )
        self.names = tuple(name if name in adapters else None for name in ("positive", "negative"))
        # A head that an adapter targets is wrapped by PEFT, a quantised one has a class of its own, and the weights of
        # one that accelerate keeps elsewhere are not there
        self.plain_head = type(self.head) is nn.Linear and self.head.weight.device.type != "meta"

    def problem(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        return self._problem(len(prompt_ids), len(completion_ids))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        names: Sequence[str] | None = None,
    ) -> list[list[float]]:
        """Contrastive scores of completions.

        Args:
            prompts, completions: token ids, one pair a row.
            names: what to call the rows in errors; their index if absent.

        Returns:
            One list a row in the given order, one score in [0, 1] a completion token.

        Raises:
            ValueError: a row that `problem` refuses, or logits that are not finite.
        """
        labels = self._check_rows(prompts, completions, names)
        results: list[list[float]] = [[] for _ in prompts]
        for rows in self._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            scores = self._score_batch([prompts[r] for r in rows], [completions[r] for r in rows])
            for row, values in zip(rows, scores, strict=True):
                for position, value in enumerate(values):
                    if math.isnan(value):
                        raise ValueError(
                            f"Row {labels[row]}: the combined logits of completion token {position} are not finite; "
                            "check the adapters' weights or score in fp32."
                        )
                results[row] = values
        return results

    @torch.inference_mode()
    def _score_batch(self, prompts: list[Sequence[int]], completions: list[Sequence[int]]) -> list[list[float]]:
        input_ids, predicts, token_ids = self._pad(prompts, completions)
        hidden = []
        for name in self.names:
            with self._active(name):
                hidden.append(self._states(input_ids, predicts))
        flat = self._combine(hidden[0], hidden[1], token_ids)
        return [part.tolist() for part in flat.cpu().split([len(c) for c in completions])]

    def _combine(self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """(P, D), (P, D), (P,) -> (P,) scores, of which no more than a tile meets the vocabulary at a time."""
        token_ids = token_ids.to(self.head_device)
        # Bytes an entry of a tile: fp32 logits, twice where the models' are capped apart, and the head's own output
        # where it is in half precision
        entry = (4 if self.softcap is None else 8) + (0 if positive.dtype == torch.float32 else 2)
        if self.plain_head:
            step = max(1, self.tile_bytes // (entry * min(SMALLEST_BLOCK, self.vocabulary)))
            score = self._score_blocks
        else:
            step = max(1, self.tile_bytes // ((4 + entry) * self.vocabulary))
            score = self._score_whole
        parts = [slice(start, start + step) for start in range(0, len(token_ids), step)]
        return torch.cat([score(positive[at], negative[at], token_ids[at], entry) for at in parts])

    def _score_whole(
        self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor, entry: int
    ) -> torch.Tensor:
        """Through the head as a module, which an adapter may have changed: few positions, the whole vocabulary."""
        with self._active(self.names[0]):
            tile = self._logits(positive).mul_(1 + self.beta)
        with self._active(self.names[1]):
            tile.sub_(self._logits(negative), alpha=self.beta)
        return _softmax_at(tile, token_ids)

    def _score_blocks(
        self, positive: torch.Tensor, negative: torch.Tensor, token_ids: torch.Tensor, entry: int
    ) -> torch.Tensor:
        """Through the head's weight, a block of the vocabulary for many positions, with a running normaliser.

        A matrix product over many positions reads and packs the large weight once for all of them: on a CPU that is
        twice as fast as tiles of few positions and the whole vocabulary, in the same memory.
        """
        # The head is linear, so the two logits are combined before it, as states: one product with the weight, not two.
        # A cap on logits is not linear; there both models' tiles are made and capped first.
        if self.softcap is None:
            dtype = positive.dtype
            positive = positive.float().mul_(1 + self.beta).sub_(negative, alpha=self.beta).to(dtype)
        weight, bias = self.head.weight, self.head.bias
        block = max(1, self.tile_bytes // (entry * len(token_ids)))
        # Softmax over a vocabulary that is seen block by block (online normaliser, arXiv 1805.02867): keep the highest
        # logit so far and the sum of exp(logit − highest); when a block raises the highest, the sum is scaled down to
        # it.
        highest = positive.new_full((len(token_ids),), -torch.inf, dtype=torch.float32)
        total, chosen = torch.zeros_like(highest), torch.zeros_like(highest)
        for start in range(0, weight.shape[0], block):
            at = slice(start, start + block)
            part = weight[at], None if bias is None else bias[at]
            tile = self._transform(linear(positive, *part))
            if self.softcap is not None:
                tile.mul_(1 + self.beta).sub_(self._transform(linear(negative, *part)), alpha=self.beta)
            # The logit of the token itself is in one block only; in the others a clamped index reads a value that is
            # not used.
            within = token_ids - start
            inside = (within >= 0) & (within < tile.shape[1])
            here = tile.gather(-1, within.clamp(0, tile.shape[1] - 1)[:, None]).squeeze(-1)
            chosen = torch.where(inside, here, chosen)
            before, highest = highest, torch.maximum(highest, tile.amax(dim=-1))
            total = total * (before - highest).exp() + tile.sub_(highest[:, None]).exp_().sum(dim=-1)
        return ((chosen - highest).exp() / total).clamp_(max=1.0)  # rounding can pass 1 by one unit


@dataclass(kw_only=True)
class Arguments(ScoreArguments):
    """Contrastive scores of pairs."""

    positive: str = field(metadata={"help": "LoRA adapter tuned on correct trajectories."})
    negative: str = field(metadata={"help": "LoRA adapter tuned on incorrect trajectories."})
    beta: float = field(default=1.0, metadata={"help": "β of the estimate: strength of the contrast."})


def main(arguments: Arguments) -> None:
    process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = load_pairs(arguments, tokenizer)
    scorer = ContrastiveScorer(
        arguments.model,
        tokenizer,
        arguments.positive,
        arguments.negative,
        beta=arguments.beta,
        **arguments.model_options(),
    )
    score_pairs(
        arguments,
        rows,
        tokenizer,
        scorer,
        name="score_contrast",
        signals=["contrast"],
        weights={key: getattr(arguments, key) for key in ("model", "positive", "negative")},
        parameters={"beta": arguments.beta},
    )
