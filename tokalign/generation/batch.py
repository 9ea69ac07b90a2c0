"""Rows in flight: the state of a continuous batch between two forward passes of a transformers model.

Rows differ in age, prompt and sampling, so all of that is kept in tensors with one entry a row, and one decode step is
a handful of operations on the whole batch. Finished rows are cut out of the tensors and of the KV cache; new rows are
appended after padding the shorter of the two caches on the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from tokalign.generation.constrained import Grammars, Matcher
from tokalign.generation.protocol import Completion, Ids, SamplingParams
from tokalign.generation.sampling import Penalties, sample, uniforms, wide_dtype

# Logits looked at together while sampling; bounds its float64 temporaries to a few hundred MB at any vocabulary.
SAMPLED_LOGITS = 2**24


@dataclass(slots=True)
class SampledRow:
    """One completion to be drawn."""

    request: int
    group: int  # rows of one group have the same prompt
    prompt: Ids
    params: SamplingParams
    seed: int
    sample: int
    limit: int  # most new tokens: max_tokens, or what the model's positions leave
    completion: Completion | None = None
    matcher: Matcher | None = None  # where it is in the document of its schema
    penalties: Penalties | None = None  # what it has written, if that counts

    @property
    def width(self) -> int:
        return len(self.prompt) + self.limit


@dataclass
class Prefilled:
    """U distinct prompts after their prefill: the cache, a mask (U, L) of its slots, and next-token logits (U, V)."""

    cache: Any  # DynamicCache; its layers are of many types to a type checker
    mask: torch.Tensor
    logits: torch.Tensor


@dataclass
class Plan:
    """What the rows of one call have in common."""

    end_ids: list[int]
    most_stops: int
    longest: int
    bans: bool
    unknown: torch.Tensor | None  # ids that no row may draw: the tokenizer has none of them
    stop_strings: bool
    plain: bool
    decode: Callable[[list[list[int]]], list[str]]
    grammars: Grammars | None  # None: no row has a schema
    penalties: bool  # some row's next token depends on how often it has been written
    narrowed: bool  # some row has top-k or min-p


class Batch:
    """Rows in flight: `columns` have one entry a row, `logits` (B, V) are those of each row's next token."""

    def __init__(self, rows: list[SampledRow], start: Prefilled, which: list[int], plan: Plan):
        device = start.logits.device

        def column(values: list, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # Rows of one prompt have been prefilled once; this is where each gets a cache row of its own.
        index = column(which)
        self.rows, self.plan = rows, plan
        self.cache = start.cache
        self.cache.reorder_cache(index)
        self.mask = start.mask[index]
        self.logits = start.logits[index]
        size, wide = len(rows), wide_dtype(device)
        stops = [[*plan.end_ids, *row.params.stop_token_ids] for row in rows]
        self.columns = {
            "start": column([len(row.prompt) for row in rows]),
            "age": column([0] * size),
            "limit": column([row.limit for row in rows]),
            "done": column([False] * size, torch.bool),
            "stopped": column([False] * size, torch.bool),
            "seed": column([row.seed for row in rows]),
            "sample": column([row.sample for row in rows]),
            "temperature": column([row.params.temperature for row in rows], torch.float32),
            "top_p": column([row.params.top_p for row in rows], wide),
            "top_k": column([row.params.top_k for row in rows]),
            "min_p": column([row.params.min_p for row in rows], torch.float32),
            "stop_ids": column([ids + [-1] * (plan.most_stops - len(ids)) for ids in stops]),
            # One slot more than needed: a finished row that still waits to leave writes there.
            "ids": torch.zeros(size, plan.longest + 1, dtype=torch.long, device=device),
            "logprobs": torch.zeros(size, plan.longest + 1, dtype=torch.float32, device=device),
        }
        if plan.grammars is not None:
            for row in rows:
                if row.params.json_schema is not None:
                    row.matcher = plan.grammars.matcher(row.params.json_schema, row.request)
        for row in rows:
            row.penalties = row.params.penalties(row.prompt, self.logits.shape[1], device)
        if plan.bans:
            banned = torch.zeros(size, self.logits.shape[1], dtype=torch.bool, device=device)
            for k, row in enumerate(rows):
                banned[k, column(list(row.params.banned_token_ids))] = True
            steps = [row.limit if row.params.banned_steps is None else row.params.banned_steps for row in rows]
            self.columns |= {"banned": banned, "banned_steps": column(steps)}

    @property
    def width(self) -> int:
        return max(row.width for row in self.rows)

    def draw(self) -> int:
        """Append one token to every unfinished row; returns how many rows have finished and not yet left."""
        # The random number of a row depends on its own seed, sample and age alone, so its tokens do not depend on the
        # batch.
        c = self.columns
        u = uniforms(c["seed"], c["sample"], c["age"])
        chunk = max(1, SAMPLED_LOGITS // self.logits.shape[1])
        grammars = self.plan.grammars
        # One transfer for all chunks: matchers live on the CPU.
        done = [] if grammars is None else c["done"].tolist()
        drawn = []
        for a in range(0, len(self.rows), chunk):
            part = slice(a, a + chunk)
            logits = self.logits[part].float()
            allowed = logits
            if self.plan.unknown is not None:
                allowed = logits.index_fill(1, self.plan.unknown, -torch.inf)
            if self.plan.bans:
                now = c["age"][part] < c["banned_steps"][part]
                allowed = allowed.masked_fill(c["banned"][part] & now[:, None], -torch.inf)
            if grammars is not None:
                allowed = logits.clone() if allowed is logits else allowed
                rows = self.rows[part]
                matchers = [None if d else row.matcher for row, d in zip(rows, done[part], strict=True)]
                grammars.mask_(allowed, matchers, [row.request for row in rows])
            if self.plan.penalties:
                allowed = logits.clone() if allowed is logits else allowed
                for row, its_logits in zip(self.rows[part], allowed, strict=True):
                    if row.penalties is not None:
                        row.penalties.apply_(its_logits)
            # All of this changes what is drawn. The log-probability is that of the model itself, before it.
            narrow = [c[name][part] if self.plan.narrowed else None for name in ("top_k", "min_p")]
            ids = sample(allowed, u[part], c["temperature"][part], c["top_p"][part], *narrow)[:, None]
            drawn.append((ids, logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)))
        self.last = torch.cat([ids for ids, _ in drawn])
        # Rows that have finished stay until enough have: cutting the cache at each end would cost more than their
        # wasted draws. What they draw goes to a slot that nobody reads.
        slot = c["age"].masked_fill(c["done"], self.plan.longest)[:, None]
        c["ids"].scatter_(1, slot, self.last)
        c["logprobs"].scatter_(1, slot, torch.cat([logprobs for _, logprobs in drawn]))
        if grammars is not None:
            for row, was_done, token in zip(self.rows, done, self.last.flatten().tolist(), strict=True):
                if row.matcher is not None and not was_done:
                    row.matcher.accept(token)
        if self.plan.penalties:
            for row, token in zip(self.rows, self.last.flatten().tolist(), strict=True):
                if row.penalties is not None:
                    row.penalties.add(token)
        # An end token counts as drawn, so ages rise first; what ended before does not end twice.
        going = ~c["done"]
        c["age"] += going
        stopped = (self.last == c["stop_ids"]).any(1) & going
        if self.plan.stop_strings:
            stopped |= self._stop_strings() & going
        c["stopped"] |= stopped
        c["done"] |= stopped | (c["age"] >= c["limit"])
        return int(c["done"].sum())

    def _stop_strings(self) -> torch.Tensor:
        """Rows whose newest token completes one of their stop strings."""
        asking = [k for k, row in enumerate(self.rows) if row.params.stop]
        hits = torch.zeros(len(self.rows), dtype=torch.bool)
        if asking:
            # Every token of a string but its first spells at least one byte of it; a few more give the decoder context.
            window = max(len(text.encode()) for k in asking for text in self.rows[k].params.stop) + 4
            index = torch.tensor(asking, device=self.mask.device)
            age = self.columns["age"][index]
            slots = age[:, None] - window + torch.arange(window, device=age.device)
            tails = self.columns["ids"][index].gather(1, slots.clamp_(min=0)).tolist()
            texts = self.plan.decode([tail[max(0, window - a) :] for tail, a in zip(tails, age.tolist(), strict=True)])
            for k, text in zip(asking, texts, strict=True):
                hits[k] = any(stop in text for stop in self.rows[k].params.stop)
        return hits.to(self.mask.device)

    def retire(self) -> None:
        """Hand finished rows their completions and drop them from the batch."""
        # All that leaves the device in few transfers: a transfer a row would wait for the device each time.
        c = self.columns
        done = c["done"].tolist()
        leave = torch.tensor([k for k, d in enumerate(done) if d], device=self.mask.device)
        longest = int(c["age"].max())
        table = [c[name][leave].tolist() for name in ("age", "stopped")]
        table += [c[name][leave, :longest].tolist() for name in ("ids", "logprobs")]
        finished = (row for row, d in zip(self.rows, done, strict=True) if d)
        for row, age, stopped, ids, logprobs in zip(finished, *table, strict=True):
            if not all(map(math.isfinite, logprobs[:age])):
                raise ValueError(
                    f"The model gave logits that are not finite numbers for prompt {row.request}: "
                    "check its weights, or load it with --dtype float32."
                )
            row.completion = Completion(ids[:age], logprobs[:age], "stop" if stopped else "length")
        self.rows = [row for row, d in zip(self.rows, done, strict=True) if not d]
        if self.rows:
            stay = torch.tensor([k for k, d in enumerate(done) if not d], device=self.mask.device)
            self.columns = {name: value[stay] for name, value in c.items()}
            self.last, self.mask = self.last[stay], self.mask[stay]
            self.cache.reorder_cache(stay)
            if self.plan.plain:
                self._trim()

    def _trim(self) -> None:
        """Drop leading slots that no row sees any more."""
        unused = int(self.mask.any(0).int().argmax())
        if unused:
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.trim(unused)

    def join(self, other: Batch) -> None:
        """Take in the rows of `other`, padding the shorter of the two caches on the left."""
        lengths = (self.mask.shape[1], other.mask.shape[1])
        left = [max(lengths) - length for length in lengths]
        self.rows = self.rows + other.rows
        self.mask = torch.cat([pad(b.mask, (n, 0)) for b, n in zip((self, other), left, strict=True)])
        self.logits = torch.cat([self.logits, other.logits])
        self.columns = {name: torch.cat([value, other.columns[name]]) for name, value in self.columns.items()}
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.join(theirs)
