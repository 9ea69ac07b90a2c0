"""The batch of routed decoding on transformers: which rows run, what each model reads in a step, who writes.

**Who writes.** The SLM reads what a row has that it has not seen (usually one token), the policy scores it, and a row
that is not routed draws from the SLM. For a routed row the SLM's proposal is dropped: the LLM reads everything it has
not seen in one forward pass and draws, and the SLM reads that token next. Neither cache is ever rolled back. With
`llm_span` > 1 the LLM goes on for up to that many tokens before the SLM is asked again (an option the paper does not
have).

**When the LLM runs.** A pass of the LLM costs about the same for one row as for many, and while it runs the SLM stands
still. So routed rows wait while the others go on, until `llm_wait` of them wait, until no other row can go on, or until
one has waited `LONGEST_WAIT` steps (delayed batching, as in TokenRouter, arXiv 2610.12242). See `pace.Pace` for "auto".

**Who is in flight.** Rows join in the order of arrival while what is really held leaves room: the slots of prompt and
tokens so far of every row, not of what it may grow to. When rows outgrow the budget, the youngest gives its slots back
and waits at the head of the queue; when it joins again both models read it anew.

**Long prompts** are read in pieces, at most `prefill_chunk` tokens a step beside the rows that write.

No row's tokens depend on the others or on any of this: drawing is by a hash of (seed, sample, step), the same number
whichever model writes and whenever.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.batch import SAMPLED_LOGITS
from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.generation.sampling import Penalties, sample, uniforms, wide_dtype
from tokalign.routing.decode.backend import RoutedStats, RoutedToken, RowFailed
from tokalign.routing.decode.pace import Pace
from tokalign.routing.decode.policies import NextTokens, RoutingPolicy
from tokalign.routing.decode.slots import ROOM, CachedModel, slots_for

LONGEST_WAIT = 32  # steps that a routed row waits at most for others: its reader sees a pause of so many tokens
LOOK_AHEAD = 8  # rows at the head of the queue that are too large for now and may be overtaken by smaller ones
MOST_OVERTAKEN = 16  # times that this happens to a row; then it is the next
ALONE = 8  # pieces of a prompt are so many times as long where no row has begun to write


class Pair(Protocol):
    """What a batch needs of a `RoutedGenerator`, whose constructor describes the options."""

    slm: PreTrainedModel
    llm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: RoutingPolicy
    llm_span: int
    llm_wait: int | str  # or "quarter" (of the rows in flight), "auto" (see `Pace`)
    prefill_chunk: int
    most_draft: int
    on_verified: Callable[[list[int], list[bool | None]], None] | None
    token_budget: int
    max_rows: int
    shared_vocab: int
    max_length: int | None  # most positions of a row
    end_ids: list[frozenset[int]]  # tokens that end a completion when the SLM and when the LLM writes them


@dataclass(eq=False, slots=True)
class RoutedRow:
    """One completion in flight, or in the queue."""

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample: int
    limit: int  # most new tokens: max_tokens, or what the models' positions leave
    tokens: list[int]  # prompt and completion so far
    mark: int  # hash of the prompt: only where it is the same are two prompts compared
    span: int = 0  # tokens that the LLM may still write before the SLM is asked again
    score: float | None = None  # of the next token, once the SLM has been asked
    waited: int = 0  # steps since it was routed
    overtaken: int = 0  # times that a younger row has joined before it
    penalties: Penalties | None = None  # what it has written, if that counts
    stats: RoutedStats = field(default_factory=RoutedStats)

    @property
    def width(self) -> int:
        return len(self.prompt) + self.limit

    @property
    def age(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def slots(self) -> int:
        """Slots that it will hold when it has written `ROOM` tokens more, or all it may."""
        return slots_for(min(len(self.tokens) + ROOM, self.width))


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
        self._pace = Pace()
        self._few = max(1, generator.prefill_chunk // 8)  # tokens that a row may always read in a step
        # Of the last `_read`: how much, and whether no row had much to read, so that its time is that of a common step
        self._tokens_read, self._steady = 0, False
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
        ids = tuple(prompt)
        self.waiting.append(RoutedRow(self._next_key, ids, params, seed, sample, limit, list(ids), hash(ids)))
        return self._next_key

    def cancel(self, key: int) -> None:
        """Drop a completion and free its slots; does nothing if it has ended."""
        self.waiting = deque(row for row in self.waiting if row.key != key)
        for place, row in enumerate(self.rows):
            if row.key == key:
                self._leave(place, wipe=True)
                break

    @torch.inference_mode()
    def step(self) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """One pass of the SLM over the rows that it is asked about, and of the LLM where enough rows wait for it.

        Returns:
            (key, token, the work for that completion so far) of each row that got a token. A row whose logits are not
            finite numbers gets the error in place of a token and has ended; the others go on.
        """
        self._admit()
        columns = self._current_columns()
        written: dict[int, tuple[int, float]] = {}
        if self.generator.policy.needs_slm:
            self._ask_slm(columns, written)
        by_llm = self._ask_llm(columns, written)
        # Each row takes its token and may end.
        self._advance(columns, written)
        texts = self._tails([r for r in written if self.rows[r].params.stop], written)
        given = []
        for r in sorted(written):
            row = self.rows[r]
            given.append((row.key, self._finish(row, written[r], r in by_llm, row.score, texts.get(r, "")), row.stats))
            row.score, row.waited = None, 0
        # From the last place on, because the place of a row that leaves is filled by the last.
        for r, (_, token, _) in reversed(list(zip(sorted(written), given, strict=True))):
            if isinstance(token, RowFailed) or token.finish_reason is not None:
                self._leave(r, wipe=isinstance(token, RowFailed))
        return given

    def _ask_slm(self, columns: dict[str, torch.Tensor], written: dict[int, tuple[int, float]]) -> None:
        """Let the SLM write, or route, the next token of every row that does not wait for the LLM.

        Its proposal is drawn at once for all of these rows, because id, log-probability and score then reach the CPU in
        one transfer; a routed row drops it.
        """
        rows, policy = self.rows, self.generator.policy
        asked = [r for r, row in enumerate(rows) if not row.span]
        if not asked:
            return
        start = time.perf_counter()
        ready, logits, hidden = self._read(0, asked, hidden=policy.needs_hidden)
        if not ready:
            return
        own = self._of_rows(columns, ready, logits.device)
        ids, logprobs = self._draw(logits, own, ready)
        seen = NextTokens(hidden, logits, own["seed"], own["sample"], own["step"], ids)
        spans = policy.spans(seen)
        more = () if spans is None else (spans,)
        routed = 0
        for r, each in zip(ready, as_lists(ids, logprobs, policy.scores(seen), *more), strict=True):
            row, row.score = rows[r], each[2]
            if row.score < policy.threshold or not_numbers(each[1], row.score):
                written[r] = (int(each[0]), each[1])
                continue
            row.span = int(each[3]) if more else self.generator.llm_span
            routed += 1
            for stats in (row.stats, self.stats):
                stats.handoffs += 1
        if self._steady:
            self._pace.slm(len(ready), routed, time.perf_counter() - start)

    def _ask_llm(self, columns: dict[str, torch.Tensor], written: dict[int, tuple[int, float]]) -> set[int]:
        """Let the LLM write the next token of rows that wait for it, if it is time; returns their places."""
        rows, policy = self.rows, self.generator.policy
        asked = self._due([r for r, row in enumerate(rows) if row.span or not policy.needs_slm], len(written))
        if not asked:
            return set()
        start = time.perf_counter()
        ready, logits, _ = self._read(1, asked)
        if not ready:
            return set()
        own = self._of_rows(columns, ready, logits.device)
        ids, logprobs = self._draw(logits, own, ready)
        stop = policy.stop(NextTokens(None, logits, own["seed"], own["sample"], own["step"], ids))
        more = () if stop is None else (stop,)
        for r, each in zip(ready, as_lists(ids, logprobs, *more), strict=True):
            written[r] = (int(each[0]), each[1])
            rows[r].span = 0 if more and each[2] else max(0, rows[r].span - 1)
        if self._steady:
            self._pace.llm(len(ready), self._tokens_read, time.perf_counter() - start)
        return set(ready)

    def _due(self, routed: list[int], others: int) -> list[int]:
        """Which of the rows that wait for the LLM it reads now, while `others` have got a token from the SLM."""
        most, length = self.generator.llm_wait, self._models[1].lengths
        # What takes several pieces to read is read from now on; the others share a pass.
        far = {r for r in routed if len(self.rows[r].tokens) - length[r] > self.generator.prefill_chunk}
        near = [self.rows[r] for r in routed if r not in far]
        for row in near:
            row.waited += 1
        if near:
            rows = len(near) + others
            enough = self._pace.rows(rows) if most == "auto" else -(-rows // 4) if most == "quarter" else int(most)
            if not others or len(near) >= enough or max(row.waited for row in near) > LONGEST_WAIT:
                return routed
        return sorted(far)

    def _admit(self) -> None:
        """Take slots back if the rows have outgrown the budget, else let waiting rows in while there is room.

        There is always at least one row, however long.
        """
        rows, budget = self.rows, self.generator.token_budget
        held = sum(slots_for(len(row.tokens)) for row in rows)
        while held > budget and len(rows) > 1:
            place = max(range(len(rows)), key=lambda r: rows[r].key)
            row = rows[place]
            held -= slots_for(len(row.tokens))
            self._free(place, wipe=True)
            self.waiting.appendleft(row)  # the youngest first, so the oldest of them is the head
        # A row joins where all have room for some tokens more: one that must go again at once was read for nothing. A
        # large prompt does not stop the small ones behind it, but is overtaken only so often, and never once its client
        # has had a token.
        held = sum(row.slots for row in rows)
        passed: list[RoutedRow] = []
        while self.waiting and len(rows) < self.generator.max_rows:
            row = self.waiting[0]
            fits = not rows or held + row.slots <= budget
            blocked = any(larger.overtaken >= MOST_OVERTAKEN for larger in passed)
            if blocked or (not fits and (row.age or len(passed) == LOOK_AHEAD)):
                break
            self.waiting.popleft()
            if not fits:
                passed.append(row)
                continue
            for larger in passed:
                larger.overtaken += 1
            held += row.slots
            if row.penalties is None:  # not before, since the queue may be long and a vocabulary large
                row.penalties = row.params.penalties(row.prompt, self.generator.shared_vocab, self._models[0].device)
            rows.append(row)
            for model in self._models:
                model.add()
            self._changed = True
        self.waiting.extendleft(reversed(passed))

    def _leave(self, place: int, *, wipe: bool = False) -> None:
        """A row has ended."""
        self._free(place, wipe=wipe)

    def _free(self, place: int, *, wipe: bool) -> None:
        """Free a row's place in both models; the last row takes it.

        Args:
            wipe: for a row of which it is not known that all it holds are finite numbers.
        """
        for model in self._models:
            if wipe:
                model.wipe(place)
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
                "top_k": torch.tensor([row.params.top_k for row in rows], device=device),
                "min_p": torch.tensor([row.params.min_p for row in rows], device=device),
            }
            self._changed = False
        return self._columns

    def _advance(self, columns: dict[str, torch.Tensor], written: dict[int, tuple[int, float]]) -> None:
        """Count a step for the rows that have got a token."""
        if len(written) == len(self.rows):
            columns["step"] += 1
        elif written:
            columns["step"][torch.tensor(sorted(written), device=columns["step"].device)] += 1

    def _of_rows(
        self, columns: dict[str, torch.Tensor], places: list[int], device: torch.device
    ) -> dict[str, torch.Tensor]:
        if len(places) < len(self.rows):
            index = torch.tensor(places, device=self._models[0].device)
            columns = {name: column[index] for name, column in columns.items()}
        return {name: column.to(device) for name, column in columns.items()}

    def _read(
        self, side: int, places: list[int], *, hidden: bool = False, keep: int = 1
    ) -> tuple[list[int], torch.Tensor, torch.Tensor | None]:
        """Let a model read what these rows have and it has not seen; of a long prompt only a piece.

        Args:
            side: 0 for the SLM, 1 for the LLM.
            places: ascending.
            keep: of how many last tokens the logits are wanted, see `CachedModel.extend`.

        Returns:
            The places that have been read to their end (R), their next-token logits (R, shared ids) and states (R, d).
        """
        model, chunk = self._models[side], self.generator.prefill_chunk
        # Long pieces only make somebody wait who reads along.
        alone = len(self.rows) == 1 or not any(row.age for row in self.rows)
        room = chunk * ALONE if alone else chunk
        fresh, at_first = [p for p in places if not model.lengths[p]], room
        # A row that this model has not met may share its prompt with others: read it once.
        if fresh:
            places, room = self._share_prompts(side, places, fresh, room)
        left = [len(self.rows[p].tokens) - model.lengths[p] for p in places]
        counts = self._pieces(places, left, room, keep)
        reading = [(p, n, n == whole) for p, n, whole in zip(places, counts, left, strict=True) if n]
        self._steady = room == at_first and max(left, default=0) <= self._few
        self._tokens_read = sum(counts)
        if not reading:
            return [], torch.empty(0), None
        now = [p for p, *_ in reading]
        unseen = [self.rows[p].tokens[model.lengths[p] : model.lengths[p] + n] for p, n, _ in reading]
        self._count(side, now, unseen)
        logits, states = model.extend(now, unseen, hidden=hidden, keep=keep)
        ready = [p for p, _, ends in reading if ends]
        if len(ready) < len(now):
            index = torch.tensor([i for i, (*_, ends) in enumerate(reading) if ends], dtype=torch.int64)
            index = index.to(logits.device)
            logits, states = logits[index], None if states is None else states[index]
        return ready, logits[..., : self.generator.shared_vocab], states

    def _pieces(self, places: list[int], left: list[int], room: int, keep: int = 1) -> list[int]:
        """How many of the `left` tokens of each of these rows are read now, `room` in all: the oldest row first.

        A row that has only a few to read is never held up by those that have many.
        """
        if sum(left) <= room:
            return left
        counts = [n if n <= self._few else 0 for n in left]
        for i in sorted(range(len(places)), key=lambda i: self.rows[places[i]].key):
            if left[i] > self._few and room > 0:
                counts[i] = min(left[i], room)
                room -= counts[i]
                if 0 < left[i] - counts[i] < keep:  # the last piece has all tokens whose logits are wanted
                    counts[i] = left[i] - keep if left[i] > keep else left[i]
        return counts

    def _share_prompts(self, side: int, places: list[int], fresh: list[int], room: int) -> tuple[list[int], int]:
        """Read a prompt once for all rows that have it, but its last token: that gives each row its own logits.

        The prompt may have been read by a row that is well on its way: its first slots hold the prompt still.

        Returns:
            The places that may read on, without those whose prompt is still being read, and what is left of `room`.
        """
        model = self._models[side]
        alike: dict[tuple[int, ...], list[int]] = {}
        for place in fresh:
            alike.setdefault(self.rows[place].prompt, []).append(place)
        # Four cases: a row in flight holds the prompt already (copy its slots); one is reading it (wait for that);
        # several new rows have it (one reads it, the others copy); one alone has it (it is read with the first step).
        held_up: set[int] = set()
        leaders = []
        for prompt, same in alike.items():
            length, mark = len(prompt) - 1, self.rows[same[0]].mark
            alive = [p for p, row in enumerate(self.rows) if row.mark == mark and model.lengths[p]]
            read = {p: model.lengths[p] for p in alive if self.rows[p].prompt == prompt}
            source = next((p for p in read if 0 < length <= read[p]), None)
            if source is not None:
                model.share(source, same, length)
            elif length and read:
                held_up.update(same)
            elif length and len(same) > 1:
                leaders.append(same[0])
        if leaders:
            counts = self._pieces(leaders, [len(self.rows[p].prompt) - 1 for p in leaders], room)
            room = max(0, room - sum(counts))
            prompts = {p: self.rows[p].prompt[:n] for p, n in zip(leaders, counts, strict=True) if n}
            self._count(side, list(prompts), list(prompts.values()))
            model.extend(list(prompts), list(prompts.values()))
            for p in leaders:
                same = alike[self.rows[p].prompt]
                if model.lengths[p] == len(self.rows[p].prompt) - 1:
                    model.share(p, same[1:], model.lengths[p])
                else:
                    held_up.update(same)
        return [p for p in places if p not in held_up], room

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
        rows = [self.rows[p] for p in places]
        greedy = all(row.params.greedy for row in rows)
        narrowed = any(row.params.top_k > 0 or row.params.min_p > 0 for row in rows)
        penalized = any(row.penalties is not None for row in rows)
        chunk = max(1, SAMPLED_LOGITS // logits.shape[1])
        ids, logprobs = [], []
        u = None if greedy else uniforms(columns["seed"], columns["sample"], columns["step"])
        for a in range(0, len(places), chunk):
            part = slice(a, a + chunk)
            wide = logits[part].float()
            allowed = wide.clone() if penalized else wide
            if penalized:
                for row, its_logits in zip(rows[part], allowed, strict=True):
                    if row.penalties is not None:
                        row.penalties.apply_(its_logits)
            if u is None:
                ids.append(allowed.argmax(-1))
            else:
                names = ("temperature", "top_p", *(("top_k", "min_p") if narrowed else ()))
                ids.append(sample(allowed, u[part], *(columns[name][part] for name in names)))
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
    ) -> RoutedToken | RowFailed:
        """Append a token to its row and see whether it is the last."""
        token, logprob = written
        if not_numbers(logprob, score):
            return self._failure(row, logprob, by_llm)
        row.tokens.append(token)
        if row.penalties is not None:
            row.penalties.add(token)
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

    def _failure(self, row: RoutedRow, logprob: float, by_llm: bool) -> RowFailed:
        what = f"{'LLM' if by_llm else 'SLM'} gave logits"
        if math.isfinite(logprob):
            what = "policy gave scores"
        return RowFailed(
            f"The {what} that are not finite at token {len(row.tokens)} of the text: the weights may be broken, or "
            "overflow in half precision; change the prompt or load the models in float32."
        )


def not_numbers(logprob: float, score: float | None) -> bool:
    """Whether a row has failed: log-probabilities are finite, and scores may be infinite but are numbers."""
    return not math.isfinite(logprob) or (score is not None and math.isnan(score))


def as_lists(*columns: torch.Tensor) -> list[list[float]]:
    """Columns (R,) as rows of numbers, in one transfer."""
    device = columns[0].device
    return torch.stack([column.to(device, wide_dtype(device)) for column in columns], dim=1).tolist()
