"""Where a small model (SLM) would leave the path of a large one (LLM): one forward pass over given completions gives a
model's greedy choice at every position (R2R, arXiv 2505.21600, section 3.2).

Where the choice is the completion's own token the two are *identical*; the other positions are *differences*, and
`tokalign.routing.labels.branches` goes on from them. The same pass gives what a router reads: hidden state, largest
logits, entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.protocol import Ids
from tokalign.generation.scorer import CompletionScorer
from tokalign.routing.labels.features import INPUTS, TENSORS, row_features, write_features
from tokalign.stage.jobs import Dropped, Item, Row


@dataclass(frozen=True)
class Prefill:
    """What a model says at the T positions of one completion where its tokens are chosen; V' shared ids.

    Attributes:
        predicted: (T,) int32, the greedy choice among the shared ids.
        logprobs: (T,) float32, nats, of the completion's own tokens over the shared ids.
        features: None, or the router's inputs: `hidden` (T, d) float16 (what the LM head reads), `top_logits` (T, k)
            float16 in falling order, `predicted` (T,) int32, `entropy` (T,) float32 in nats over the shared ids.
    """

    predicted: np.ndarray
    logprobs: np.ndarray
    features: dict[str, np.ndarray] | None


class DivergenceScorer(CompletionScorer):
    """Greedy choices, log-probs and router features of given completions, with one model in memory.

    transformers only: vLLM's prompt log-probs hold neither the hidden states nor the logits that a router reads.

    Args:
        model: path, hub id, or a loaded causal LM.
        tokenizer: only its pad id is used.
        shared_vocab: ids that both models of the pair have; the others are no choice of either.
        top_k: logits kept a position (all, where the models share fewer ids).
        features: whether router features are made at all.
        adapter: PEFT adapter path, or None for the model itself.
        token_budget, tile_bytes, dtype, device_map: as in `CompletionScorer`.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        shared_vocab: int,
        top_k: int = 100,
        features: bool = True,
        adapter: str | Path | None = None,
        token_budget: int = 4096,
        tile_bytes: int | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: str | None = None,
    ):
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
        self.shared_vocab, self.features = shared_vocab, features
        self.top_k = min(top_k, shared_vocab)

    def problem(self, prompt_ids: Ids, completion_ids: Ids) -> str | None:
        """Why a row is to be dropped (the same words for all such rows, so that they can be counted), or None."""
        if (reason := self._problem(len(prompt_ids), len(completion_ids))) is not None:
            return reason
        if max(max(prompt_ids), max(completion_ids)) >= self.shared_vocab:
            return f"an id that the two models do not share ({self.shared_vocab} shared)"
        return None

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Ids], completions: Sequence[Ids], *, names: Sequence[str] | None = None
    ) -> list[Prefill]:
        """One forward pass over every row.

        Args:
            prompts, completions: token ids, one pair a row.
            names: what to call the rows in errors; their index if absent.

        Raises:
            ValueError: a row that `problem` refuses for its lengths, or log-probs that are not finite.
        """
        labels = self._check_rows(prompts, completions, names)
        results: list[Prefill | None] = [None] * len(prompts)
        # Rows of like length share a pass, so that little of it is padding; results go back to the caller's order
        for rows in self._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            input_ids, predicts, token_ids = self._pad([prompts[r] for r in rows], [completions[r] for r in rows])
            with self._active(self.name):
                hidden = self._states(input_ids, predicts)
                token_ids = token_ids.to(self.head_device)
                # The logits of all positions at once would be larger than the model: a tile of positions at a time.
                # The entropy takes a second tile.
                step = max(1, self.tile_bytes // (8 * self.vocabulary))
                tiles = [
                    self._read(hidden[start : start + step], token_ids[start : start + step])
                    for start in range(0, len(token_ids), step)
                ]
            columns = {key: torch.cat([tile[key] for tile in tiles]).cpu().numpy() for key in tiles[0]}
            ends = np.cumsum([len(completions[r]) for r in rows])[:-1]
            parts = {key: np.split(column, ends) for key, column in columns.items()}
            for i, row in enumerate(rows):
                own = {key: part[i] for key, part in parts.items()}
                logprobs = own.pop("logprobs")
                self._check_finite(torch.from_numpy(logprobs), labels[row])
                # Copied: a slice would keep its whole batch alive
                features = {key: value.copy() for key, value in own.items()} if self.features else None
                results[row] = Prefill(own["predicted"].copy(), logprobs.copy(), features)
        return [result for result in results if result is not None]

    def _read(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What one tile of positions gives, hidden states (P, d) and the tokens chosen there (P,)."""
        logits = self._logits(hidden)
        shared = logits[:, : self.shared_vocab]
        needs = INPUTS if self.features else ("token",)
        read = row_features(hidden, logits, top_k=self.top_k, shared_vocab=self.shared_vocab, needs=needs)
        # The features of a long answer are gigabytes; on their way to the disk they have the disk's types.
        read = {name: values.to(getattr(torch, np.dtype(TENSORS[name]).name)) for name, values in read.items()}
        return {**read, "logprobs": shared.gather(-1, token_ids[:, None]).squeeze(-1) - shared.logsumexp(dim=-1)}


# ------------------------------------------------------------------------------------------- rows of a shard, in a job


def row_name(row: Row) -> str:
    """Name of a completion: its problem's id, and which of that problem's it is."""
    return f"{row['id']}/{row.get('sample', 0)}"


def add_llm_choices(scorer: DivergenceScorer, batch: list[Row]) -> list[Item]:
    """Completions that someone else wrote, with the LLM's greedy choice at every position as `llm_ids`."""
    items, kept = _kept(scorer, batch)
    for row, read in zip(kept, _prefill(scorer, kept), strict=True):
        row["llm_ids"] = read.predicted.tolist()
    return items


def add_slm_choices(scorer: DivergenceScorer, batch: list[Row], folder: Path) -> list[Item]:
    """The rows with `slm_ids` and `slm_logprobs` (of the completion's tokens, nats), and where their features are.

    Features are written first, then (by the job) the rows that point at them: no row is without its features, and a
    shard that is done again replaces its file.
    """
    items, kept = _kept(scorer, batch)
    if not kept:
        return items
    results = _prefill(scorer, kept)
    features = [result.features for result in results if result.features is not None]
    arrays = {key: np.concatenate([one[key] for one in features]) for key in features[0]}
    name = write_features(folder, [row_name(row) for row in kept], arrays)
    first = 0
    for row, result in zip(kept, results, strict=True):
        row["slm_ids"] = result.predicted.tolist()
        row["slm_logprobs"] = result.logprobs.tolist()
        row["features_file"], row["features_first"] = name, first
        first += len(result.predicted)
    return items


def _kept(scorer: DivergenceScorer, batch: list[Row]) -> tuple[list[Item], list[Row]]:
    """Items of a shard (rows, or why they are dropped), and the rows among them."""
    items: list[Item] = []
    for row in batch:
        problem = scorer.problem(row["prompt_ids"], row["completion_ids"])
        items.append(row if problem is None else Dropped(problem))
    return items, [item for item in items if isinstance(item, dict)]


def _prefill(scorer: DivergenceScorer, rows: list[Row]) -> list[Prefill]:
    prompts, completions = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    return scorer.prefill(prompts, completions, names=[row_name(row) for row in rows])


def llm_choices(row: Row) -> list[int]:
    """The LLM's greedy choices along a completion: the completion itself where the LLM wrote it."""
    return row["llm_ids"] if "llm_ids" in row else row["completion_ids"]


def differences(slm_ids: Ids, llm_ids: Ids) -> list[int]:
    """Positions at which two models choose different tokens."""
    return [t for t, (slm, llm) in enumerate(zip(slm_ids, llm_ids, strict=True)) if slm != llm]
