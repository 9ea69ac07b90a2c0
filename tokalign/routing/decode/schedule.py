"""The batch of routed decoding on transformers: which rows run, what each model reads in a step, who writes.

One step gives every row one token. The SLM reads what each row has that it has not seen (usually one token), the
policy scores the rows, and rows that are not routed draw from the SLM. For routed rows the SLM's proposal is dropped:
the LLM reads everything it has not seen in one forward pass and draws, and the SLM reads that token in the next step.
Neither cache is ever rolled back. With `llm_span` > 1 the LLM goes on for up to that many tokens before the SLM is
asked again (an option the paper does not have).

Rows join and leave between steps, and no row's tokens depend on the others: drawing is by a hash of (seed, sample,
step), the same number whichever model writes.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.batch import SAMPLED_LOGITS
from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.generation.sampling import sample, uniforms, wide_dtype
from tokalign.routing.decode.backend import RoutedStats, RoutedToken
from tokalign.routing.decode.policies import NextTokens, RoutingPolicy
from tokalign.routing.decode.slots import CachedModel


class Pair(Protocol):
    """What a batch needs of a `RoutedGenerator`, whose constructor describes the options."""

    slm: PreTrainedModel
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: RoutingPolicy
    llm_span: int
    most_draft: int
    on_verified: Callable[[list[int], list[bool | None]], None] | None
    token_budget: int
    max_rows: int
    shared_vocab: int
    max_length: int | None  # most positions of a row
    end_ids: list[frozenset[int]]  # tokens that end a completion when the SLM and when the LLM writes them


@dataclass(eq=False, slots=True)
class RoutedRow:
    """One completion in flight."""

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample: int
    limit: int  # most new tokens: max_tokens, or what the models' positions leave
    tokens: list[int]  # prompt and completion so far
    span: int = 0  # tokens that the LLM may still write before the SLM is asked again
    stats: RoutedStats = field(default_factory=RoutedStats)

    @property
    def width(self) -> int:
        return len(self.prompt) + self.limit

    @property
    def age(self) -> int:
        return len(self.tokens) - len(self.prompt)


class RoutedBatch:
    """Completions in flight on a generator's pair; true while there are any. Not for use by several threads."""

    def __init__(self, generator: Pair):
        self.generator = generator
        self.stats = RoutedStats()
        self.rows: list[RoutedRow] = []  # row r is row r of both caches
        self.waiting: deque[RoutedRow] = deque()
        self._models = (CachedModel(generator.slm), CachedModel(generator.llm))
        self._columns: dict[str, torch.Tensor] = {}
        self._changed = True  # rows have come or gone since the columns were made
        self._next_key = 0

    def __bool__(self) -> bool:
        return bool(self.rows or self.waiting)

    def add(self, prompt: Ids, params: SamplingParams, *, sample: int = 0) -> int:
        """Queue one completion that `RoutedGenerator.check` has passed; returns the key that `step` gives with it."""
        limit, longest = params.max_tokens, self.generator.max_length
        if longest is not None:
            limit = min(limit, longest - len(prompt))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._next_key += 1
        self.waiting.append(RoutedRow(self._next_key, tuple(prompt), params, seed, sample, limit, list(prompt)))
        return self._next_key

    def cancel(self, key: int) -> None:
        """Drop a completion and free its slots; does nothing if it has ended."""
        self.waiting = deque(row for row in self.waiting if row.key != key)
        for place, row in enumerate(self.rows):
            if row.key == key:
                self._leave(place)
                break

    @torch.inference_mode()
    def step(self) -> list[tuple[int, RoutedToken, RoutedStats]]:
        """One token of every row in flight: (key, token, the work for that completion so far).

        Raises:
            ValueError: a model's logits are not finite numbers.
        """
        self._admit()
        policy, rows, columns = self.generator.policy, self.rows, self._current_columns()
        written: dict[int, tuple[int, float]] = {}
        scores: dict[int, float] = {}
        # 1. The SLM reads every row that it is asked about, and the policy scores them. Its proposal is drawn at once
        # for all of these rows, because id, log-probability and score then reach the CPU in one transfer; a routed row
        # drops it.
        if policy.needs_slm:
            asked = [r for r, row in enumerate(rows) if not row.span]
            if asked:
                logits, hidden = self._read(0, asked, hidden=policy.needs_hidden)
                own = self._of_rows(columns, asked, logits.device)
                ids, logprobs = self._draw(logits, own, asked)
                seen = NextTokens(hidden, logits, own["seed"], own["sample"], own["step"], ids)
                spans = policy.spans(seen)
                more = () if spans is None else (spans,)
                for r, each in zip(asked, as_lists(ids, logprobs, policy.scores(seen), *more), strict=True):
                    written[r], scores[r] = (int(each[0]), each[1]), each[2]
                    if scores[r] >= policy.threshold:
                        rows[r].span = int(each[3]) if more else self.generator.llm_span
                        rows[r].stats.handoffs += 1
                        self.stats.handoffs += 1
            by_llm = [r for r, row in enumerate(rows) if row.span]
        else:
            by_llm = list(range(len(rows)))
        # 2. The LLM draws for the routed rows. Its draws overwrite the proposals in `written`.
        if by_llm:
            logits, _ = self._read(1, by_llm)
            own = self._of_rows(columns, by_llm, logits.device)
            ids, logprobs = self._draw(logits, own, by_llm)
            stop = policy.stop(NextTokens(None, logits, own["seed"], own["sample"], own["step"], ids))
            more = () if stop is None else (stop,)
            for r, each in zip(by_llm, as_lists(ids, logprobs, *more), strict=True):
                written[r] = (int(each[0]), each[1])
                rows[r].span = 0 if more and each[2] else max(0, rows[r].span - 1)
        # 3. Each row takes its token and may end. Rows leave from the last place on, because the place of one that
        # leaves is filled by the last.
        columns["step"] += 1
        llm_rows = set(by_llm)
        texts = self._tails([r for r, row in enumerate(rows) if row.params.stop], written)
        given = []
        for r, row in enumerate(rows):
            token = self._finish(row, written[r], r in llm_rows, scores.get(r), texts.get(r, ""))
            given.append((row.key, token, row.stats))
        for place in reversed(range(len(given))):
            if given[place][1].finish_reason is not None:
                self._leave(place)
        return given

    def _admit(self) -> None:
        """Let waiting rows in while there is room; always at least one row."""
        generator = self.generator
        # Every row of a cache has the slots of the longest, so the budget is rows × widest, as it will be when all are
        # full.
        width = max((row.width for row in self.rows), default=0)
        while self.waiting and len(self.rows) < generator.max_rows:
            width = max(width, self.waiting[0].width)
            if self.rows and (len(self.rows) + 1) * width > generator.token_budget:
                break
            self.rows.append(self.waiting.popleft())
            for model in self._models:
                model.add()
            self._changed = True

    def _leave(self, place: int) -> None:
        """Free a row; the last one takes its place."""
        for model in self._models:
            model.drop(place)
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
        self._changed = True

    def _current_columns(self) -> dict[str, torch.Tensor]:
        # Made anew only when rows come or go. A transfer to the device at each step would cost more than the step adds.
        if self._changed:
            device, rows = self._models[0].device, self.rows
            self._columns = {
                "seed": torch.tensor([row.seed for row in rows], device=device),
                "sample": torch.tensor([row.sample for row in rows], device=device),
                "step": torch.tensor([row.age for row in rows], device=device),
                "temperature": torch.tensor([row.params.temperature for row in rows], device=device),
                "top_p": torch.tensor([row.params.top_p for row in rows], device=device, dtype=wide_dtype(device)),
            }
            self._changed = False
        return self._columns

    def _of_rows(
        self, columns: dict[str, torch.Tensor], places: list[int], device: torch.device
    ) -> dict[str, torch.Tensor]:
        if len(places) < len(self.rows):
            index = torch.tensor(places, device=self._models[0].device)
            columns = {name: column[index] for name, column in columns.items()}
        return {name: column.to(device) for name, column in columns.items()}

    def _read(
        self, side: int, places: list[int], *, hidden: bool = False, keep: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let a model read all that these rows have and it has not seen: next-token logits (R, shared ids), states.

        Args:
            side: 0 for the SLM, 1 for the LLM.
            keep: of how many last tokens, see `CachedModel.extend`.
        """
        model = self._models[side]
        # A row that this model has not met may share its prompt with others: read it once.
        fresh = [p for p in places if not model.lengths[p]]
        if fresh:
            self._share_prompts(side, fresh)
        unseen = [self.rows[p].tokens[model.lengths[p] :] for p in places]
        self._count(side, places, unseen)
        logits, states = model.extend(places, unseen, hidden=hidden, keep=keep)
        return logits[..., : self.generator.shared_vocab], states

    def _share_prompts(self, side: int, fresh: list[int]) -> None:
        """Read a prompt once for all rows that have it, but its last token: that gives each row its own logits.

        The prompt may have been read by a row that is well on its way: its first slots hold the prompt still.
        """
        model = self._models[side]
        alike: dict[tuple[int, ...], list[int]] = {}
        for place in fresh:
            alike.setdefault(self.rows[place].prompt, []).append(place)
        # Three cases: a row in flight holds the prompt already (copy its slots); several new rows have it (one reads
        # it, the others copy); one row alone has it (it is read with the first step).
        leaders = []
        for prompt, places in alike.items():
            length = len(prompt) - 1
            source = next(
                (p for p, row in enumerate(self.rows) if 0 < length <= model.lengths[p] and row.prompt == prompt), None
            )
            if source is not None:
                model.share(source, places, length)
            elif length and len(places) > 1:
                leaders.append(places[0])
        if leaders:
            prompts = [self.rows[p].prompt[:-1] for p in leaders]
            self._count(side, leaders, prompts)
            model.extend(leaders, prompts)
            for p in leaders:
                model.share(p, alike[self.rows[p].prompt][1:], model.lengths[p])

    def _count(self, side: int, places: list[int], tokens: Sequence[Sequence[int]]) -> None:
        for place, each in zip(places, tokens, strict=True):
            for stats in (self.rows[place].stats, self.stats):
                if side == 0:
                    stats.slm_positions += len(each)
                else:
                    stats.llm_positions += len(each)

    def _draw(
        self, logits: torch.Tensor, columns: dict[str, torch.Tensor], places: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For each row the drawn id and its log-probability."""
        greedy = all(self.rows[p].params.greedy for p in places)
        chunk = max(1, SAMPLED_LOGITS // logits.shape[1])
        ids, logprobs = [], []
        u = None if greedy else uniforms(columns["seed"], columns["sample"], columns["step"])
        for a in range(0, len(places), chunk):
            part = slice(a, a + chunk)
            wide = logits[part].float()
            if u is None:
                ids.append(wide.argmax(-1))
            else:
                ids.append(sample(wide, u[part], columns["temperature"][part], columns["top_p"][part]))
            logprobs.append(wide.gather(1, ids[-1][:, None]).squeeze(1) - wide.logsumexp(-1))
        return torch.cat(ids), torch.cat(logprobs)

    def _tails(self, places: list[int], written: dict[int, tuple[int, float]]) -> dict[int, str]:
        """Text at the end of rows that have stop strings, long enough to hold one that the newest token completes."""
        if not places:
            return {}
        tails = []
        for place in places:
            row = self.rows[place]
            # Every token of a string but its first spells at least one byte of it; a few more give the decoder context.
            window = max(len(text.encode()) for text in row.params.stop) + 4
            start = max(len(row.prompt), len(row.tokens) + 1 - window)
            tails.append([*row.tokens[start:], written[place][0]])
        decode = self.generator.tokenizer.batch_decode
        texts = decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return dict(zip(places, texts, strict=True))

    def _finish(
        self, row: RoutedRow, written: tuple[int, float], by_llm: bool, score: float | None, tail: str
    ) -> RoutedToken:
        """Append a token to its row and see whether it is the last."""
        token, logprob = written
        if not math.isfinite(logprob) or (score is not None and math.isnan(score)):
            raise ValueError(
                f"The {'LLM' if by_llm else 'SLM'} gave logits that are not finite numbers: check its weights, or load "
                "it in float32."
            )
        row.tokens.append(token)
        for stats in (row.stats, self.stats):
            if by_llm:
                stats.llm_tokens += 1
            else:
                stats.slm_tokens += 1
        stops = token in self.generator.end_ids[by_llm] or token in row.params.stop_token_ids
        if stops or any(text in tail for text in row.params.stop):
            reason: str | None = "stop"
        else:
            reason = "length" if row.age >= row.limit else None
        return RoutedToken(token, by_llm, logprob, score, reason)


def as_lists(*columns: torch.Tensor) -> list[list[float]]:
    """Columns (R,) as rows of numbers, in one transfer."""
    device = columns[0].device
    return torch.stack([column.to(device, wide_dtype(device)) for column in columns], dim=1).tolist()
