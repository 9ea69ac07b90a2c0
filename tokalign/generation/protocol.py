"""What every generation engine takes and gives: token ids in; token ids, log-probs and a finish reason out.

Ids are the interface because every signal in this package is bound to ids: no engine encodes a prompt or re-encodes
its own text. The three engines (`transformers_engine`, `vllm_engine`, `openai_engine`) are interchangeable through
`load_engine(EngineArguments(...))`; their greedy ids agree in fp32. A request's `seed` fixes its completions whatever
else is in the batch, so shards, processes and resumed jobs do not change results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from tokalign.generation.sampling import GREEDY_BELOW, Penalties

Ids = Sequence[int]


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued.

    Attributes:
        n: completions drawn from the prompt.
        temperature: 0 is greedy decoding (then all `n` completions are equal).
        top_p: the smallest set of most probable tokens whose probabilities sum to at least `top_p` is kept.
        top_k: this many most probable tokens are kept, and those that tie with the last; 0 or −1 is all.
        min_p: tokens with less than this share of the likeliest one's probability are left out.
        repetition_penalty: a token of the prompt or the text so far has its logit divided by this, or multiplied where
            it is negative.
        presence_penalty: subtracted from the logit of a token that the text so far holds.
        frequency_penalty: subtracted from the logit once for each time that the text so far holds the token.
        max_tokens: most tokens a completion may have, its end token included.
        seed: fixes the completions of this request alone; None draws a fresh seed.
        stop: a completion ends with the token that completes one of these strings (that token is kept).
        stop_token_ids: a completion ends with one of these ids (kept), besides the model's own end tokens.
        banned_token_ids: ids that are never sampled, with probability exactly 0.
        banned_steps: the ban holds for this many first tokens (1 masks a critical token at its own position
            only); None is every token.
        json_schema: JSON text of a JSON Schema; only documents of it can be written. None is free text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()
    banned_steps: int | None = None
    json_schema: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}: ask for at least 1 completion a prompt.")
        if not self.temperature >= 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature is {self.temperature}: use 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use a number above 0 and at most 1.")
        if self.top_k < -1:
            raise ValueError(f"top_k is {self.top_k}: keep at least 1 token, or 0 or -1 for all.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: use a number from 0 to 1.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: use a positive number; 1 is off.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} is {getattr(self, name)}: use a number from -2 to 2; 0 is off.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: allow at least 1 token.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: use a number from 0 to 2**63 - 1, or None for a fresh one.")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop is {self.stop!r}: give a tuple of non-empty strings, e.g. ('\\n',).")
        if self.banned_steps is not None and self.banned_steps < 1:
            raise ValueError(f"banned_steps is {self.banned_steps}: use at least 1, or None for every token.")
        if self.json_schema is not None and not _is_object(self.json_schema):
            raise ValueError(
                f"json_schema is {str(self.json_schema)[:80]!r}: give the JSON text of an object, e.g. "
                '\'{"type": "object"}\'.'
            )
        for name in ("stop", "stop_token_ids", "banned_token_ids"):  # YAML and JSON give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """A temperature under 1e-5 is greedy, as in vLLM: logits divided by it would overflow."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether a token's probability depends on how often it has been written."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def penalties(self, prompt: Ids, vocab: int, device: torch.device) -> Penalties | None:
        """The count of what is written behind `prompt`, among `vocab` ids; None where the penalties are off."""
        if not self.penalized:
            return None
        return Penalties(
            torch.tensor(prompt, device=device),
            vocab,
            repetition=self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
        )

    @property
    def vllm_options(self) -> dict[str, Any]:
        """What vLLM, in a process or behind HTTP, has to be told beside temperature and top-p.

        Its server fills what a request leaves out from the model's generation_config.json, and a repetition penalty
        there changes even greedy ids: so each is said, also where it is off.
        """
        names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        return {name: getattr(self, name) for name in names}

    @property
    def draws(self) -> int:
        """Completions that have to be computed: the `n` of a greedy request are one and the same."""
        return 1 if self.greedy else self.n


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError, RecursionError):
        return False


@dataclass
class Completion:
    """One sampled continuation.

    Attributes:
        token_ids: sampled ids, the end token included if the model wrote one.
        logprobs: log-probability in nats of each id under the model itself: temperature 1, before top-p, bans and
            schemas (but with a `json_schema`, vLLM and its server give them over the ids that the schema allows).
        finish_reason: "stop" (an end token, stop id or stop string) or "length" (`max_tokens` reached).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


@runtime_checkable
class Engine(Protocol):
    """Continues token-id prompts. `tokenizer` belongs to the model, for callers that build prompts."""

    tokenizer: PreTrainedTokenizerBase

    def generate(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """Completions of every prompt in the caller's order, `params.n` of them each.

        Args:
            prompts: token ids, one sequence a prompt.
            params: one for all prompts, or one each. One `seed` for all prompts gives them common random numbers.
            adapter: path of a LoRA adapter on the engine's base (OpenAI engine: served model name); None is the
                adapter that the engine was loaded with, or the base model.

        Raises:
            ValueError: one sentence naming the row, for an empty prompt, one that the model cannot hold, ids
                outside the vocabulary, or an adapter of another base.
        """
        ...

    def close(self) -> None:
        """Free the model or the connections."""
        ...


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """A completion's text up to and with the first of these strings: what its last token writes after it, or a model
    that ran on, is no part of the answer."""
    ends = [at + len(one) for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))]


def continue_from_prefixes(
    engine: Engine,
    prompt_ids: Ids,
    completion_ids: Ids,
    lengths: Sequence[int],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    adapter: str | None = None,
    last_tokens: Ids | None = None,
) -> list[list[Completion]]:
    """Completions of `prompt_ids + completion_ids[:t]` for every t in `lengths`, in that order, `params.n` each.

    Equal to `engine.generate` on those prefixes. An engine that can share one KV cache among the prefixes of one
    completion has a method of this name, which is used; vLLM shares by its prefix cache.

    Args:
        params: one for all prefixes (they then share random numbers, which steadies differences between prefixes),
            or one each. A `json_schema` is refused: the document has begun before the prefix ends.
        last_tokens: for every t, the id that stands in place of the prefix's last one: the completion as it would
            be had another token been chosen there.
    """
    for t, each in zip(lengths, params_of_each(params, len(lengths)), strict=True):
        if each.json_schema is not None:
            raise ValueError(
                f"Prefix length {t} has a json_schema, which would start anew inside the completion: leave json_schema "
                "out, or generate from the prompt."
            )
    shared = getattr(engine, "continue_from_prefixes", None)
    if shared is not None:
        return shared(prompt_ids, completion_ids, lengths, params, adapter=adapter, last_tokens=last_tokens)
    prefixes = prefixes_of(prompt_ids, completion_ids, lengths, last_tokens)
    return engine.generate(prefixes, params, adapter=adapter)


def prefixes_of(
    prompt_ids: Ids, completion_ids: Ids, lengths: Sequence[int], last_tokens: Ids | None = None
) -> list[list[int]]:
    """`prompt_ids + completion_ids[:t]` for every t, refusing a t that the completion does not have.

    With `last_tokens`, one for every t, that id stands in place of the prefix's last one.
    """
    for t in lengths:
        if not 0 <= t <= len(completion_ids):
            raise ValueError(
                f"Prefix length {t} is outside the completion: use 0 to {len(completion_ids)}, its number of tokens."
            )
    if last_tokens is None:
        return [[*prompt_ids, *completion_ids[:t]] for t in lengths]
    if len(last_tokens) != len(lengths) or 0 in lengths:
        raise ValueError(
            f"There are {len(lengths)} prefix lengths and {len(last_tokens)} last tokens: give one each, and no length "
            "0, which has no token of the completion to replace."
        )
    return [[*prompt_ids, *completion_ids[: t - 1], last] for t, last in zip(lengths, last_tokens, strict=True)]


def params_of_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """`params` as one for each of `count` prompts."""
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"There are {count} prompts but {len(params)} SamplingParams: give one for all or one each.")
    return list(params)


def check_prompts(
    prompts: Sequence[Ids], vocab_size: int, max_length: int | None, each: Sequence[SamplingParams]
) -> None:
    """Refuse, naming the row, what the model cannot continue: see `Engine.generate`."""
    for row, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {row} is empty: give at least one token id, e.g. the tokenizer's bos token.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Prompt {row} has token id {low if low < 0 else high} but the model's vocabulary has {vocab_size}: "
                "encode it with this model's tokenizer."
            )
        if max_length is not None and len(prompt) >= max_length:
            raise ValueError(
                f"Prompt {row} has {len(prompt)} tokens but the model holds {max_length} positions: "
                "shorten it or choose a model with a longer context."
            )
        banned = set(params.banned_token_ids)
        if banned and (min(banned) < 0 or max(banned) >= vocab_size or len(banned) == vocab_size):
            raise ValueError(
                f"Prompt {row} bans token ids outside the vocabulary of {vocab_size}, or all of it: "
                "ban ids of this model's tokenizer and leave at least one."
            )


def repeat_greedy(results: list[list[Completion]], each: Sequence[SamplingParams]) -> list[list[Completion]]:
    """`results` with a greedy request's one completion copied to make `n`."""
    return [
        completions
        + [replace(one, token_ids=list(one.token_ids), logprobs=list(one.logprobs)) for _ in range(params.n - 1)]
        if params.greedy
        else completions
        for params, completions in zip(each, results, strict=True)
        for one in completions[:1]
    ]


def generate_with_early_bans(
    generate: Callable[[Sequence[Ids], Sequence[SamplingParams]], list[list[Completion]]],
    prompts: Sequence[Ids],
    each: Sequence[SamplingParams],
) -> list[list[Completion]]:
    """`generate` for an engine that can only ban ids for a whole completion, with `banned_steps` obeyed.

    A request with `banned_steps` = m is asked for m tokens with the ban, then its unfinished completions for the rest
    without it. A stop string could straddle the two parts unseen, a schema's document would start anew in the second,
    and the second's penalties would take the first for a prompt: these options exclude each other here.
    """
    early = [p.banned_steps is not None and bool(p.banned_token_ids) for p in each]
    for row, params in enumerate(each):
        if early[row] and params.stop:
            raise ValueError(
                f"Prompt {row} has both banned_steps and stop strings, which only engine=transformers combines: "
                "use stop_token_ids instead of stop."
            )
        if early[row] and params.penalized:
            raise ValueError(
                f"Prompt {row} has both banned_steps and a penalty, which only engine=transformers combines: leave one "
                "of them out."
            )
        if early[row] and params.json_schema is not None:
            raise ValueError(
                f"Prompt {row} has both banned_steps and json_schema, which only engine=transformers combines: "
                "leave one of them out."
            )
    first = [
        replace(p, max_tokens=min(p.max_tokens, p.banned_steps or p.max_tokens)) if is_early else p
        for p, is_early in zip(each, early, strict=True)
    ]
    results = generate(prompts, first)
    rest: list[tuple[Completion, list[int], SamplingParams]] = []
    for prompt, params, is_early, completions in zip(prompts, each, early, results, strict=True):
        for k, done in enumerate(completions):
            left = params.max_tokens - len(done.token_ids)
            if is_early and done.finish_reason == "length" and left > 0 and len(done.token_ids) == params.banned_steps:
                seed = None if params.seed is None else (params.seed + 1_000_003 * (k + 1)) % 2**63
                again = replace(params, n=1, max_tokens=left, seed=seed, banned_token_ids=(), banned_steps=None)
                rest.append((done, [*prompt, *done.token_ids], again))
    if rest:
        continued = generate([prompt for _, prompt, _ in rest], [params for _, _, params in rest])
        for (done, _, _), (more,) in zip(rest, continued, strict=True):
            done.token_ids += more.token_ids
            done.logprobs += more.logprobs
            done.finish_reason = more.finish_reason
    return results
