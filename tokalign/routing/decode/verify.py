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
from dataclasses import dataclass, field, replace

import torch

from tokalign.routing.decode.backend import RoutedStats, RoutedToken, RowFailed
from tokalign.routing.decode.policies import NextTokens
from tokalign.routing.decode.schedule import Pair, RoutedBatch, RoutedRow, as_lists


@dataclass(slots=True)
class Draft:
    """What the SLM has proposed for one row since the LLM looked last.

    Attributes:
        proposals: (token, score); all but one that was held back stand at the end of the row's tokens.
        length: how many stand there.
        looks: whether the LLM is to look now.
        sound: whether the SLM's logits were finite so far; where they are not, it is not asked again for this row.
        agreed: of the completion so far, see `RoutedToken`.
    """

    proposals: list[tuple[int, float]] = field(default_factory=list)
    length: int = 0
    looks: bool = False
    sound: bool = True
    agreed: list[bool | None] = field(default_factory=list)


class VerifiedBatch(RoutedBatch):
    """Completions in flight whose tokens are all the LLM's choice. Rows join, wait and give way as in `RoutedBatch`."""

    def __init__(self, generator: Pair):
        super().__init__(generator)
        self._drafts: dict[int, Draft] = {}  # by the rows' keys

    @torch.inference_mode()
    def step(self) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """One token more for every draft; then the LLM looks at those that wait for it, if it is time.

        Returns:
            (key, token, the work for that completion so far) of each verified token: several of a row, or none. A row
            for which the LLM's logits are not finite gets the error and has ended.
        """
        self._admit()
        needs_slm, drafts = self.generator.policy.needs_slm, [self._draft_of(row) for row in self.rows]
        grown = self._write_drafts([r for r, d in enumerate(drafts) if not d.looks]) if needs_slm else 0
        return self._verify(self._turn([r for r, d in enumerate(drafts) if d.looks or not needs_slm], grown))

    def cancel(self, key: int) -> None:
        super().cancel(key)
        self._drafts.pop(key, None)

    def _draft_of(self, row: RoutedRow) -> Draft:
        return self._drafts.setdefault(row.key, Draft())

    def _free(self, place: int) -> None:
        if not self._draft_of(self.rows[place]).sound:
            self._models[0].wipe(place)
        super()._free(place)

    def _leave(self, place: int) -> None:
        key = self.rows[place].key
        super()._leave(place)
        del self._drafts[key]

    def _write_drafts(self, places: list[int]) -> int:
        """The SLM's next token of these rows, or a look in its place; returns how many drafts have grown."""
        if not places:
            return 0
        pair, grown, start = self.generator, 0, time.perf_counter()
        ready, logits, hidden = self._read(0, places, hidden=pair.policy.needs_hidden)
        if not ready:
            return 0
        columns = self._of_rows(self._current_columns(), ready, logits.device)
        ids, logprobs = self._draw(logits, columns, ready)
        seen = NextTokens(hidden, logits, columns["seed"], columns["sample"], columns["step"], ids)
        for r, (number, logprob, score) in zip(ready, as_lists(ids, logprobs, pair.policy.scores(seen)), strict=True):
            row, draft, token = self.rows[r], self._draft_of(self.rows[r]), int(number)
            draft.sound = math.isfinite(logprob) and not math.isnan(score)
            draft.looks = not draft.sound or score >= pair.policy.threshold
            if draft.sound:
                draft.proposals.append((token, score))
            if draft.looks:
                continue
            # A draft stands in the row's tokens like anything written, so both models read it by the same code.
            row.tokens.append(token)
            draft.length += 1
            grown += 1
            for stats in (row.stats, self.stats):
                stats.drafted += 1
            # Nothing can stand behind these. A stop string inside the draft is found when the draft is verified.
            full = draft.length >= pair.most_draft or row.age >= row.limit
            draft.looks = full or token in pair.end_ids[1] or token in row.params.stop_token_ids
        self._changed = True  # the columns' steps
        if self._steady:
            looks = sum(self._draft_of(self.rows[r]).looks for r in ready)
            self._pace.slm(len(ready), looks, time.perf_counter() - start)
        return grown

    def _verify(self, places: list[int]) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """The LLM reads the drafts of these rows in one pass, and each row gets what the LLM would have written."""
        if not places:
            return []
        start = time.perf_counter()
        keep = 1 + max(self._draft_of(self.rows[r]).length for r in places)
        places, logits, _ = self._read(1, places, keep=keep)
        if not places:
            return []
        rows = [self.rows[r] for r in places]
        counts = [self._draft_of(row).length + 1 for row in rows]
        for stats in (stats for row in rows for stats in (row.stats, self.stats)):
            stats.handoffs += 1
        # The LLM draws at each position of each draft, and behind it: one list of positions for all rows.
        now = self._of_rows(self._current_columns(), places, logits.device)
        row_of = torch.repeat_interleave(torch.tensor(counts, device=logits.device))
        back = torch.tensor([n - 1 - j for n in counts for j in range(n)], device=logits.device)
        columns = {name: column[row_of] for name, column in now.items()}
        columns["step"] = columns["step"] - back
        at = logits if keep > 1 else logits[:, None]
        drawn = iter(as_lists(*self._draw(at[row_of, -1 - back], columns, [places[i] for i in row_of.tolist()])))
        given = []
        for place, row, count in zip(places, rows, counts, strict=True):
            given += self._keep(place, row, [next(drawn) for _ in range(count)])
        self._changed = True
        if self._steady:
            self._pace.llm(len(places), time.perf_counter() - start)
        ends = {key: token for key, token, _ in given}  # the last of each row
        for place in reversed(places):
            token = ends[self.rows[place].key]
            if isinstance(token, RowFailed):
                self._models[1].wipe(place)
            if isinstance(token, RowFailed) or token.finish_reason is not None:
                self._leave(place)
        return given

    def _keep(
        self, place: int, row: RoutedRow, own: list[list[float]]
    ) -> list[tuple[int, RoutedToken | RowFailed, RoutedStats]]:
        """Replace a row's draft by what the LLM has drawn: the draft's prefix that equals it, and one token more."""
        draft = self._draft_of(row)
        proposals, length = draft.proposals, draft.length
        del row.tokens[len(row.tokens) - length :]
        draft.proposals, draft.length, draft.looks, row.waited = [], 0, not draft.sound, 0
        given: list[tuple[int, RoutedToken | RowFailed, RoutedStats]] = []
        for j, (number, logprob) in enumerate(own):
            token = int(number)
            proposed, score = proposals[j] if j < len(proposals) else (None, None)
            agreed = None if proposed is None else proposed == token
            tails = self._tails([place], {place: (token, logprob)}) if row.params.stop else {}
            written = self._finish(row, (token, logprob), True, score, tails.get(place, ""))
            if isinstance(written, RowFailed):
                given.append((row.key, written, row.stats))
                break
            kept = j < length and agreed
            if kept:
                for stats in (row.stats, self.stats):
                    stats.llm_tokens -= 1
                    stats.slm_tokens += 1
            given.append((row.key, replace(written, by_llm=not kept, agreed=agreed), row.stats))
            draft.agreed.append(agreed)
            if not kept or written.finish_reason is not None:
                break
        # Neither model has read the last token; what follows it was read for nothing.
        for model in self._models:
            model.truncate(place, len(row.tokens) - 1)
        last = given[-1][1]
        if self.generator.on_verified is not None and isinstance(last, RoutedToken) and last.finish_reason is not None:
            self.generator.on_verified(list(row.tokens), list(draft.agreed))
        return given
