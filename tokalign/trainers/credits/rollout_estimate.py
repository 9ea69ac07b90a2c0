"""Credit by continuations from the borders of steps: VinePPO (arXiv 2410.01679).

    V(s) = 1/K Σ_k R(s, continuation k of s by the policy),     A = V(after the step) − V(before it)

on all tokens of a step. After the last step nothing is left to continue, so V is the completion's own reward there.
The steps' A add up to R − V(prompt): what the whole completion is credited with, told apart by step. It takes the place
of the sequence's advantage (`replaces` is all reward functions) and is in units of reward, not of standard deviations.
K = 9, as in the paper; a step is a line unless told otherwise.

This is the dearest credit: K continuations for each border of each completion (equal beginnings of a group are
continued once), and every one is judged by the reward functions. The trainer's own generation makes them, vLLM or
transformers, at its own temperature, no longer than a completion may be. The metrics
`credit/rollout_estimate/continuations` and `/tokens` say what a batch cost, on average over the processes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer, is_conversational

from tokalign.internals.trl import parse_response
from tokalign.trainers.credits.reading import group_size


def lines(pieces: Sequence[str]) -> list[int]:
    """Where lines end: numbers of tokens before each border, of the texts of a completion's tokens.

    Blank lines belong to the line before them, and the end of the completion is no border.
    """
    return [
        end
        for end, (piece, following) in enumerate(pairwise(pieces), start=1)
        if "\n" in piece and following.strip("\n")
    ]


class RolloutEstimateCredit:
    """VinePPO's advantage of steps.

    Args:
        continuations: K, at least 1.
        borders: texts of a completion's tokens -> how many tokens precede each border, rising; default `lines`.

    Raises:
        ValueError: K below 1, or a trainer whose completions are not text alone (tools, environments).
    """

    __name__ = "rollout_estimate"
    mode = "advantage"
    reads = ()

    def __init__(self, continuations: int = 9, borders: Callable[[Sequence[str]], list[int]] = lines):
        if continuations < 1:
            raise ValueError(f"continuations is {continuations}: use at least 1.")
        self.continuations, self.borders = continuations, borders
        self.replaces: tuple[Any, ...] = ()

    def attach(self, trainer: Any) -> None:
        """Takes the trainer, whose generation and rewards it uses."""
        if trainer.tools or trainer.environments is not None:
            raise ValueError(
                "rollout_estimate cannot continue a completion that calls tools, whose results it cannot undo: use "
                "`turns`, or train without tools and environments."
            )
        self.trainer, self.replaces = trainer, tuple(trainer.reward_funcs)

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        rewards: list[float | None],
        **columns: Any,
    ) -> list[list[float]]:
        """One number a token: its step's advantage, NaN where no reward function judged what it stands on."""
        trainer = self.trainer
        pieces = [trainer._tokenizer.batch_decode([[i] for i in ids]) for ids in completion_ids]
        borders = [[0, *self.borders(own)] for own in pieces]

        # Completions of a group that begin alike are in one state, which is continued once
        first, size = trainer.accelerator.process_index * len(prompts), group_size(trainer)
        states: dict[tuple[int, tuple[int, ...]], int] = {}
        for row, ids in enumerate(completion_ids):
            for border in borders[row]:
                states.setdefault(((first + row) // size, tuple(ids[:border])), row)
        asked = [(row, prefix) for (_, prefix), row in states.items() for _ in range(self.continuations)]
        returned, tokens = self._continue(asked, prompts, columns)
        log_metric: Callable[[str, float], None] = columns["log_metric"]
        log_metric("credit/rollout_estimate/continuations", len(asked))
        log_metric("credit/rollout_estimate/tokens", tokens)

        parts = returned.view(-1, self.continuations).nanmean(dim=1).tolist()
        value = dict(zip(states, parts, strict=True))
        credits = []
        for row, (ids, own) in enumerate(zip(completion_ids, rewards, strict=True)):
            before = [value[(first + row) // size, tuple(ids[:border])] for border in borders[row]]
            credits.append(step_advantages(len(ids), borders[row], before, math.nan if own is None else own))
        return credits

    def _continue(
        self, asked: Sequence[tuple[int, tuple[int, ...]]], prompts: list[Any], columns: dict[str, Any]
    ) -> tuple[torch.Tensor, int]:
        """Rewards (N,) of one continuation each of (row, beginning), NaN where nobody judged, and its tokens in all."""
        trainer = self.trainer
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("rollout_estimate reads text alone: train without images, or leave it out of `credit`.")
        # Generation and rewards gather over processes, so all ask for equally many; the surplus is thrown away
        everybody = max(gather_object([len(asked)]))
        padded = [*asked, *[asked[-1]] * (everybody - len(asked))]
        returned, tokens = [], 0
        for start in range(0, everybody, len(prompts)):  # as many at once as there are completions: they fitted
            part = padded[start : start + len(prompts)]
            made, _ = trainer._generate_single_turn([prompt_ids[row] + list(ids) for row, ids in part], None, {}, 1)
            whole = [
                [*ids, *new[: trainer.max_completion_length - len(ids)]]
                for (_, ids), new in zip(part, made, strict=True)
            ]
            tokens += sum(len(ids) - len(before) for ids, (_, before) in zip(whole, part, strict=True))
            returned.append(self._rewards([row for row, _ in part], whole, prompts, prompt_ids, columns))
        return torch.cat(returned)[: len(asked)], tokens

    def _rewards(
        self, rows: list[int], ids: list[list[int]], prompts: list[Any], prompt_ids: Any, columns: dict[str, Any]
    ) -> torch.Tensor:
        """Weighted sums of the reward functions of completions (N,) of these rows, on the CPU."""
        trainer = self.trainer
        own = {name: values for name, values in columns.items() if isinstance(values, list)}
        inputs = [{"prompt": prompts[row], **{name: values[row] for name, values in own.items()}} for row in rows]
        asked = [prompts[row] for row in rows]
        texts: list[Any] = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):  # as TRL reads completions
            template = getattr(trainer._tokenizer, "response_template", None)
            if template is None and getattr(trainer._tokenizer, "response_schema", None) is None:
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            else:
                texts = [
                    [parse_response(trainer._tokenizer, new, prefix=prompt_ids[row], tools=None)]
                    for row, new in zip(rows, ids, strict=True)
                ]
        with _unlogged(trainer):
            judged = GRPOTrainer._calculate_rewards(trainer, inputs, asked, texts, ids)
        first = trainer.accelerator.process_index * len(rows)
        judged = judged[first : first + len(rows)]
        totals = (judged * trainer.reward_weights.to(judged.device)).nansum(dim=1)
        return totals.masked_fill(judged.isnan().all(dim=1), torch.nan).cpu()


def step_advantages(length: int, borders: Sequence[int], before: Sequence[float], last: float) -> list[float]:
    """V(after) − V(before) of its step for each of `length` tokens.

    Args:
        borders: where steps begin, rising, 0 first.
        before: V there.
        last: V at the end.
    """
    credit: list[float] = []
    for start, end, value, after in zip(borders, [*borders[1:], length], before, [*before[1:], last], strict=True):
        credit += [after - value] * (end - start)
    return credit


@contextmanager
def _unlogged(trainer: Any) -> Iterator[None]:
    """What reward functions log and remember in here is not of the completions that train: it is put back."""
    logs = trainer._pending_extra_logs, trainer._pending_metrics
    rewards = [getattr(function, "reward", function) for function in trainer.reward_funcs]
    kept = [(reward, reward.last_scores) for reward in rewards if hasattr(reward, "last_scores")]
    trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
    try:
        yield
    finally:
        trainer._pending_extra_logs, trainer._pending_metrics = logs
        for reward, scores in kept:
            reward.last_scores = scores
