"""Lossless decoding: the SLM drafts, the LLM reads the draft and keeps what it would have written itself.

The SLM writes until the policy says look (score >= threshold; that proposal is held back), or `most_draft` tokens, an
end or the limit are reached. The LLM then reads the draft x_1 … x_n in one pass, which gives its own token y_j behind
every x_1 … x_{j-1}:

    keep x_1 … x_k, the longest prefix with x_j = y_j, and write y_{k+1}

This is speculative decoding (Leviathan, Kalman and Matias, arXiv 2211.17192) with a policy that chooses the length of
each draft. It needs no rejection sampling: y_j is drawn with the hash of (seed, sample, step), so the LLM alone would
have drawn the same. A completion is therefore the LLM's own at every threshold, greedy or sampling, up to the last bits
in which a forward pass of many tokens may differ from one of a single token. The threshold decides speed alone.

Nothing is given out before it is verified. With each token goes whether the SLM had drawn the same (`agreed`): labels
"identical or different" on the text that is served, for which nothing extra is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from tokalign.routing.decode.backend import RoutedStats, RoutedToken, RowFailed
from tokalign.routing.decode.policies import NextTokens
from tokalign.routing.decode.schedule import Pair, RoutedBatch, RoutedRow, as_lists, not_numbers


@dataclass(slots=True)
class Draft:
    """What the SLM has proposed for one row since the LLM looked last.

    Attributes:
        proposals: (token, score); all but one that was held back stand at the end of the row's tokens.
        length: how many stand there.
        looks: whether the LLM is to look now.
        agreed: of the completion so far, see `RoutedToken`; kept if somebody listens.
    """

    proposals: list[tuple[int, float]] = field(default_factory=list)
    length: int = 0
    looks: bool = False
    agreed: list[bool | None] = field(default_factory=list)


class VerifiedBatch(RoutedBatch):
    """Completions in flight whose tokens are all the LLM's choice."""

    def __init__(self, generator: Pair):
        super().__init__(generator)
        self._drafts: dict[int, Draft] = {}  # by the rows' keys

    @torch.inference_mode()
    def step(self) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """One token more for every draft; then the LLM looks at those that wait, if it is time (see `schedule`).

        Returns:
            (key, token, the work for that completion so far) of each verified token: several of a row, or none. A row
            whose logits are not finite numbers gets the error in place of a token and has ended.
        """
        self._admit()
        needs_slm = self.generator.policy.needs_slm
        drafts = [self._draft_of(row) for row in self.rows]
        for row, draft in zip(self.rows, drafts, strict=True):
            # One pass over more would give the tokens before the switch the frequencies of those behind it.
            draft.looks |= len(row.tokens) == self._models[1].switch
        failed: list[tuple[int, RowFailed]] = []
        if needs_slm and (drafting := [r for r, draft in enumerate(drafts) if not draft.looks]):
            failed = self._write_drafts(drafting)
        given: list[tuple[int, RoutedToken | RowFailed, RoutedStats]] = []
        broken = {r for r, _ in failed}
        looking = [r for r, draft in enumerate(drafts) if (draft.looks or not needs_slm) and r not in broken]
        others = sum(not draft.looks for draft in drafts) - len(broken) if needs_slm else 0
        ended: dict[int, bool] = dict.fromkeys(broken, True)  # place -> whether the row has failed
        if due := self._due(looking, others):
            given, more = self._verify(due)
            ended |= more
        given += [(self.rows[r].key, error, self.rows[r].stats) for r, error in failed]
        for place in sorted(ended, reverse=True):
            self._leave(place, wipe=ended[place])
        return given

    def cancel(self, key: int) -> None:
        super().cancel(key)
        self._drafts.pop(key, None)  # of a row that had given way and waits

    def _draft_of(self, row: RoutedRow) -> Draft:
        return self._drafts.setdefault(row.key, Draft())

    def _leave(self, place: int, *, wipe: bool = False) -> None:
        self._drafts.pop(self.rows[place].key, None)
        super()._leave(place, wipe=wipe)

    def _write_drafts(self, places: list[int]) -> list[tuple[int, RowFailed]]:
        """The SLM's next token of these rows, or a look in its place; returns the rows that have failed."""
        pair, start = self.generator, time.perf_counter()
        before = {r: self._models[0].lengths[r] for r in places}
        ready, logits, hidden = self._read(0, places, hidden=pair.policy.needs_hidden)
        if not ready:
            return []
        columns = self._of_rows(self._current_columns(), ready, logits.device)
        ids, logprobs = self._draw(logits, columns, ready)
        seen = NextTokens(hidden, logits, columns["seed"], columns["sample"], columns["step"], ids)
        failed = []
        table = as_lists(ids, logprobs, pair.policy.scores(seen))
        for r, (number, logprob, score) in zip(ready, table, strict=True):
            row, draft, token = self.rows[r], self._draft_of(self.rows[r]), int(number)
            if not_numbers(logprob, score) and draft.length:
                # What the SLM overflows at is its own draft, which the LLM may never write.
                draft.looks = True
                self._forget(0, r, min(before[r], len(row.tokens) - draft.length - 1))
                continue
            if not_numbers(logprob, score):
                failed.append((r, self._failure(row, logprob, by_llm=False)))
                continue
            draft.proposals.append((token, score))
            draft.looks = score >= pair.policy.threshold
            if draft.looks:
                continue
            # A draft stands in the row's tokens like anything written, so both models read it by the same code.
            row.tokens.append(token)
            if row.penalties is not None:
                row.penalties.add(token)
            draft.length += 1
            for stats in (row.stats, self.stats):
                stats.drafted += 1
            # Nothing can stand behind these. A stop string inside the draft is found when the draft is verified.
            full = draft.length >= pair.most_draft or row.age >= row.limit
            draft.looks = full or token in pair.end_ids[1] or token in row.params.stop_token_ids
        self._changed = True  # the columns' steps
        if self._steady:
            looks = sum(self._draft_of(self.rows[r]).looks for r in ready)
            self._pace.slm(len(ready), looks, time.perf_counter() - start)
        return failed

    def _verify(
        self, places: list[int]
    ) -> tuple[list[tuple[int, RoutedToken | RowFailed, RoutedStats]], dict[int, bool]]:
        """The LLM reads the drafts of these rows in one pass, and each row gets what the LLM would have written.

        Returns:
            What is given, and the places that end with it: whether they have failed.
        """
        start = time.perf_counter()
        keep = max(self._draft_of(self.rows[r]).length + 1 for r in places)
        before = {r: self._models[1].lengths[r] for r in places}
        places, logits, _ = self._read(1, places, keep=keep)
        if not places:
            return [], {}
        rows = [self.rows[r] for r in places]
        drafts = [self._draft_of(row) for row in rows]
        counts = [draft.length + 1 for draft in drafts]
        for row in rows:
            row.waited = 0
            for stats in (row.stats, self.stats):
                stats.handoffs += 1
        # The LLM draws at each position of each draft, and behind it: at once for all rows, but of a row whose draws
        # depend on what stands before them (penalties) one after the other.
        at = logits[:, None] if logits.ndim == 2 else logits
        together = [(i, j) for i, n in enumerate(counts) if rows[i].penalties is None for j in range(n)]
        drawn = iter(self._draws(places, at, counts, together))
        given, ended = [], {}
        for i, (place, row, draft, count) in enumerate(zip(places, rows, drafts, counts, strict=True)):
            if row.penalties is None:
                own = [next(drawn) for _ in range(count)]
            else:
                one = partial(self._draws, places, at, counts)
                own = self._draws_in_turn(row, draft, i, one)
            if draft.length and not all(math.isfinite(logprob) for _, logprob in own):
                # Masked or not, one token at which the LLM overflows reaches all of a pass. Would it have written that?
                del row.tokens[len(row.tokens) - draft.length :]
                draft.proposals, draft.length, draft.looks = [], 0, True  # it looks again, without the draft
                self._models[0].truncate(place, len(row.tokens) - 1)
                self._forget(1, place, before[place])
                continue
            new = self._keep(place, row, draft, own)
            given += new
            last = new[-1][1]
            if isinstance(last, RowFailed) or last.finish_reason is not None:
                ended[place] = isinstance(last, RowFailed)
        self._changed = True
        if self._steady:
            self._pace.llm(len(places), self._tokens_read, time.perf_counter() - start)
        return given, ended

    def _forget(self, side: int, place: int, kept: int) -> None:
        """Forget all but the first `kept` tokens of a row, because the rest may be no numbers."""
        model = self._models[side]
        kept = kept if model.switch is None else 0  # longrope may have read all of it anew in the last pass
        model.wipe(place, kept)
        model.truncate(place, kept)

    def _draws(
        self, places: list[int], logits: torch.Tensor, counts: list[int], positions: list[tuple[int, int]]
    ) -> list[list[float]]:
        """What the LLM draws at some positions of some drafts: ids and log-probabilities.

        Args:
            places: of the rows.
            logits: (R, keep, V) of these rows, aligned on the right.
            counts: of each row, how many positions there are: the draft's and the one behind it.
            positions: (index of the row, position).
        """
        if not positions:
            return []
        now = self._of_rows(self._current_columns(), places, logits.device)
        row_of, back = (
            torch.tensor(each, device=logits.device)
            for each in zip(*((i, counts[i] - 1 - j) for i, j in positions), strict=True)
        )
        columns = {name: column[row_of] for name, column in now.items()}
        columns["step"] = columns["step"] - back
        return as_lists(*self._draw(logits[row_of, -1 - back], columns, [places[i] for i, _ in positions]))

    @staticmethod
    def _draws_in_turn(
        row: RoutedRow, draft: Draft, i: int, draws: Callable[[list[tuple[int, int]]], list[list[float]]]
    ) -> list[list[float]]:
        """The draws of row `i` up to the first that is not the draft's, each with the penalties of what is before."""
        assert row.penalties is not None
        tokens = row.tokens[len(row.tokens) - draft.length :]
        for token in tokens:
            row.penalties.add(token, -1)
        own: list[list[float]] = []
        for j in range(len(tokens) + 1):
            own += draws([(i, j)])
            if j == len(tokens) or own[-1][0] != tokens[j]:
                break
            row.penalties.add(tokens[j])
        for token in tokens[: len(own) - 1]:  # they are counted when they are written
            row.penalties.add(token, -1)
        return own

    def _keep(
        self, place: int, row: RoutedRow, draft: Draft, own: list[list[float]]
    ) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """Replace a row's draft by what the LLM has drawn: the draft's prefix that equals it, and one token more."""
        given: list[tuple[int, RoutedToken | RowFailed, RoutedStats]] = []
        proposals, length = draft.proposals, draft.length
        del row.tokens[len(row.tokens) - length :]
        draft.proposals, draft.length, draft.looks = [], 0, False
        for j, (number, logprob) in enumerate(own):
            token = int(number)
            proposed, score = proposals[j] if j < len(proposals) else (None, None)
            agreed = None if proposed is None else proposed == token
            tails = self._tails([place], {place: (token, logprob)}) if row.params.stop else {}
            written = self._finish(row, (token, logprob), True, score, tails.get(place, ""))
            if isinstance(written, RowFailed):
                return [*given, (row.key, written, row.stats)]
            kept = j < length and agreed
            if kept:
                for stats in (row.stats, self.stats):
                    stats.llm_tokens -= 1
                    stats.slm_tokens += 1
            given.append((row.key, replace(written, by_llm=not kept, agreed=agreed), row.stats))
            if not kept or written.finish_reason is not None:
                break
        # Neither model has read the last token; what follows it was read for nothing.
        for model in self._models:
            model.truncate(place, len(row.tokens) - 1)
        if self.generator.on_verified is not None:
            tokens = [token for _, token, _ in given if isinstance(token, RoutedToken)]
            draft.agreed += [token.agreed for token in tokens]
            if tokens[-1].finish_reason is not None:
                self.generator.on_verified(list(row.tokens), draft.agreed)
        return given
