"""Where a small model (SLM) would leave the path of a large one (LLM), and where each path then leads: the raw material
of routing labels (R2R, arXiv 2505.21600, section 3.2).

1. One forward pass of the SLM over an answer gives its greedy choice at every position; where it is the answer's own
   token the two are *identical*. The same pass gives what a router reads: hidden state, largest logits, entropy.
2. From every difference the LLM goes on greedily behind the SLM's token: the *branch*. It ends where the answer ends
   (for a verdict by outcome), or when it has finished the sentence and one more (for a judge). The other branch is cut
   from the LLM's own answer by the same rule.
3. `tokalign.routing.labels.verdicts` says which differences matter.

Deviation: the released system decodes branches and encodes them again; here they are ids from end to end. A sentence
ends by a rule on token ids (`SentenceRule`), not by a fixed list of words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.generation.protocol import Engine, Ids, SamplingParams, continue_from_prefixes
from tokalign.generation.scorer import CompletionScorer
from tokalign.routing.labels.features import INPUTS, TENSORS, row_features

# From this many prefix tokens of one answer on, its branches are worth a call of their own that shares one prefill.
SHARED_PREFILL = 16_384


# -------------------------------------------------------------------------------------------------- the SLM's one pass


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
        for rows in self._batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]):
            input_ids, predicts, token_ids = self._pad([prompts[r] for r in rows], [completions[r] for r in rows])
            with self._active(self.name):
                hidden = self._states(input_ids, predicts)
                token_ids = token_ids.to(self.head_device)
                step = max(1, self.tile_bytes // (8 * self.vocabulary))  # the entropy takes a second tile
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


def end_ids(model: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a completion of `model`: its generation config's and the tokenizer's."""
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a model without generation_config.json
        ends = None
    listed = [ends] if isinstance(ends, int) else list(ends or [])
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


# ------------------------------------------------------------------------------------------------------- sentences

_MARKS = frozenset(".!?;。！？；\n")


@dataclass(frozen=True)
class SentenceRule:
    """Where sentences end, by token id.

    A token ends a sentence if it holds one of . ! ? ; 。！？； or a newline with no letter or digit behind it, and
    there is a letter or digit since the last such end. So "…" and a blank line after a full stop are no sentences of
    their own. Known limit: a full stop that is a token of its own inside a number ("3" "." "14") counts as an end.

    Attributes:
        marks: ids with such a mark.
        words: ids with a letter or digit.
        sentences: how many ends make a branch: the current sentence and one more.
    """

    marks: frozenset[int]
    words: frozenset[int]
    sentences: int = 2

    def open_before(self, ids: Ids) -> list[bool]:
        """For every position 0 … T of a completion: whether a sentence has begun and not ended before it."""
        states = [False]
        for token in ids:
            states.append(token not in self.marks and (states[-1] or token in self.words))
        return states

    def cut(self, ids: Ids, begun: bool) -> int | None:
        """Tokens of `ids` up to and with the one that ends the last sentence wanted; None if it does not end there.

        Args:
            begun: `open_before` of the first of `ids`.
        """
        left = self.sentences
        for t, token in enumerate(ids):
            begun = begun or token in self.words
            if begun and token in self.marks:
                begun, left = False, left - 1
                if left == 0:
                    return t + 1
        return None


def sentence_rule(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> SentenceRule:
    """The rule of a tokenizer: every id is read once, as the text that it stands for alone."""
    special = set(tokenizer.all_special_ids)
    known = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in known], clean_up_tokenization_spaces=False)
    marks, words = [], []
    for token, text in zip(known, texts, strict=True):
        # U+FFFD is a part of a character that several tokens spell: text all the same
        last = max((k for k, letter in enumerate(text) if letter.isalnum() or letter == "�"), default=-1)
        if last >= 0:
            words.append(token)
        if _MARKS.intersection(text[last + 1 :]):
            marks.append(token)
    return SentenceRule(frozenset(marks), frozenset(words))


# -------------------------------------------------------------------------------------------------------- branches


@dataclass(frozen=True)
class Fork:
    """A token that might have been chosen at position `position` of a completion.

    Attributes:
        begun: whether a sentence is open there (`SentenceRule.open_before`).
    """

    prompt_ids: Ids
    completion_ids: Ids
    position: int
    token: int
    begun: bool = False


def differences(slm_ids: Ids, llm_ids: Ids) -> list[int]:
    """Positions at which two models choose different tokens."""
    return [t for t, (slm, llm) in enumerate(zip(slm_ids, llm_ids, strict=True)) if slm != llm]


def own_branch(fork: Fork, rule: SentenceRule, max_tokens: int) -> list[int]:
    """The branch that the completion itself goes on with from the fork's position, cut by the rule of the others."""
    ids = list(fork.completion_ids[fork.position : fork.position + 1 + max_tokens])
    return ids[: rule.cut(ids, fork.begun)]


def continue_forks(
    engine: Engine,
    forks: Sequence[Fork],
    ends: Collection[int],
    *,
    max_tokens: int,
    stop: tuple[str, ...] = (),
    rule: SentenceRule | None = None,
    positions: int | None = None,
    shared_prefill: int = SHARED_PREFILL,
) -> list[tuple[list[int], str]]:
    """Greedy branches: for each fork its token and what the engine writes behind it.

    All forks go to the engine in one call a round, so that a prefix cache (vLLM, a server) serves those of one answer.
    An engine that can share one KV cache among the prefixes of an answer (transformers) is asked once an answer
    instead where the prefixes of that answer have `shared_prefill` tokens or more; ids are the same.

    Args:
        ends: ids that end a completion; a fork whose token is one of them is a finished branch.
        max_tokens: most tokens behind the fork's own.
        stop: strings that end an answer, as they did when the answers were made (used without a rule only).
        rule: go on until it cuts; None is to the end of the answer.
        positions: most tokens that the model holds, for an engine that does not know (a server).

    Returns:
        For each fork the branch's ids and why it ended: "stop" (end of the answer, or of the sentences) or "length"
        (`max_tokens`, or the model's positions).
    """
    positions = getattr(engine, "max_length", None) or positions
    branches = [[fork.token] for fork in forks]
    reasons: list[str | None] = [None] * len(forks)

    def settle(i: int) -> None:
        """Whether branch i needs no further round."""
        fork, branch = forks[i], branches[i]
        cut = None if rule is None else rule.cut(branch, fork.begun)
        used = len(fork.prompt_ids) + fork.position + len(branch)
        if branch[-1] in ends or cut is not None:
            branches[i], reasons[i] = branch[:cut], "stop"
        elif len(branch) > max_tokens or (positions is not None and used >= positions):
            reasons[i] = "length"

    def extend(i: int, token_ids: list[int], finish_reason: str, stops: bool) -> None:
        branches[i] += token_ids
        settle(i)
        if reasons[i] is None and not (rule is not None and stops and token_ids[-1] in rule.marks):
            reasons[i] = finish_reason

    def params(i: int, **stops: Any) -> SamplingParams:
        fork, branch = forks[i], branches[i]
        left = max_tokens + 1 - len(branch)
        if positions is not None:  # servers refuse what might not fit
            left = min(left, positions - len(fork.prompt_ids) - fork.position - len(branch))
        return SamplingParams(temperature=0, max_tokens=left, stop=() if rule else stop, **stops)

    for i in range(len(forks)):
        settle(i)
    if hasattr(engine, "continue_from_prefixes"):
        for group in _answers(forks, [i for i, reason in enumerate(reasons) if reason is None], shared_prefill):
            first = forks[group[0]]
            continued = continue_from_prefixes(
                engine,
                first.prompt_ids,
                first.completion_ids,
                [forks[i].position + 1 for i in group],
                [params(i) for i in group],
                last_tokens=[forks[i].token for i in group],
            )
            # No stop ids: one round with the shared cache is cheaper than a second prefill of long prefixes
            for i, (completion,) in zip(group, continued, strict=True):
                extend(i, completion.token_ids, completion.finish_reason, stops=False)
    stop_ids = tuple(sorted(rule.marks)) if rule is not None else ()
    while pending := [i for i, reason in enumerate(reasons) if reason is None]:
        prefixes = [
            [*forks[i].prompt_ids, *forks[i].completion_ids[: forks[i].position], *branches[i]] for i in pending
        ]
        each = [params(i, stop_token_ids=stop_ids) for i in pending]
        for i, (completion,) in zip(pending, engine.generate(prefixes, each), strict=True):
            extend(i, completion.token_ids, completion.finish_reason, stops=True)
    return [(branch, str(reason)) for branch, reason in zip(branches, reasons, strict=True)]


def _answers(forks: Sequence[Fork], open_: Sequence[int], least: int) -> Iterator[list[int]]:
    """Groups of forks of one answer whose prefixes have `least` tokens or more."""
    for _, group in groupby(open_, key=lambda i: id(forks[i].completion_ids)):
        members = list(group)
        if sum(len(forks[i].prompt_ids) + forks[i].position + 1 for i in members) >= least:
            yield members


def spans(keys: Iterable[Any]) -> dict[Any, range]:
    """Where the rows of each key are in a stage that holds them one after the other."""
    rows_of: dict[Any, range] = {}
    start = 0
    for key, group in groupby(keys):
        length = sum(1 for _ in group)
        rows_of[key] = range(start, start + length)
        start += length
    return rows_of
