"""Two engines, one completion each time: moves many requests between a running SLM and a running LLM.

One request: the SLM writes until its engine stops it at a routed position, at an end token or at the limit. At a routed
position the LLM is asked for one token (or `llm_span`) after prompt and text so far, and the SLM goes on behind that.
Each engine keeps what it has read in its prefix cache or session, so a hand-off costs the LLM one prefill of what it
has not seen and neither side a rollback (R2R, arXiv 2505.21600, section 4).

Nothing here knows which engines these are: `SmallModel` and `LargeModel` say what each must do.

Sampling: temperature and top-p go to both engines. Every piece that an engine writes gets a seed made from the
request's seed, the sample and the position where the piece starts, so one seed fixes the whole completion.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from tokalign.generation.completions import EncodedIds
from tokalign.generation.protocol import Ids, SamplingParams, check_prompts
from tokalign.routing.decode.backend import LLMUnavailable, RoutedStats, RoutedToken, RowFailed, check_threshold

logger = logging.getLogger(__name__)

NEVER = 2.0  # a threshold that no score reaches


@dataclass(frozen=True, slots=True)
class Piece:
    """What an engine wrote since it was last heard of.

    Attributes:
        ids: tokens; at a routed position without the token that marks it.
        logprobs: one a token, or None.
        read: tokens that the engine had to read to write these, its own but the last included.
        end: "stop" after an end token or stop id, "routed" at a position that the LLM is to write, "length" where the
            engine has used up what it was allowed, None if it goes on.
    """

    ids: list[int]
    logprobs: list[float] | None = None
    read: int = 0
    end: Literal["stop", "routed", "length"] | None = None


class Turns(Protocol):
    """One request's place in the SLM, kept over its hand-offs."""

    def write(self, prefix: EncodedIds, most: int, seed: int | None) -> AsyncGenerator[Piece, None]:
        """What follows `prefix`, at most `most` tokens; the last piece has an `end`.

        `prefix` is that of the last call, what was written then, and what the LLM wrote since: the request's own list,
        which grows by what is given out. Closing the iterator early stops the engine.
        """
        ...

    async def close(self) -> None:
        """Free the place."""
        ...


class SmallModel(Protocol):
    """The engine that runs the SLM and its router."""

    vocab_size: int
    max_length: int

    @property
    def dead(self) -> BaseException | None:
        """Why the engine has ended, if it has for good."""
        ...

    def open(self, params: SamplingParams) -> Turns:
        """A place for one request."""
        ...

    async def set_threshold(self, value: float) -> None: ...

    async def close(self) -> None: ...


class LargeModel(Protocol):
    """The engine, or engines, that run the LLM."""

    max_length: int

    def write(
        self, prefix: EncodedIds, params: SamplingParams, most: int, seed: int | None, *, place: int, unseen: int
    ) -> AsyncGenerator[Piece, None]:
        """What follows `prefix`, at most `most` tokens; the last piece has an `end`.

        `prefix` is the request's own list, as in `Turns.write`.

        Args:
            place: the same number for one request, so that it finds its prefix in one server's cache.
            unseen: tokens at the end of `prefix` that this request has not shown it.

        Raises:
            LLMUnavailable: no server can be reached, after the retries.
            ConnectionError: they answer others, but not this request.
        """
        ...

    async def healthy(self) -> bool: ...

    async def close(self) -> None: ...


class Orchestrator:
    """A `RoutedBackend` over a `SmallModel` and a `LargeModel`; any number of requests at once, in one event loop.

    Args:
        tokenizer: of both models.
        threshold: that of the SLM's engine at the start.
        shared_vocab: ids below this may be written.
        llm_span: most tokens that the LLM writes in a row before the SLM is asked again.
        on_llm_outage: "slm" goes on without the LLM while it is out of reach, "error" raises `LLMUnavailable`.
        probe_seconds: pause between looks for the LLM during an outage.

    Attributes:
        degraded: whether the LLM is out of reach and the SLM goes on alone.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stats: RoutedStats
    degraded: bool

    def __init__(
        self,
        slm: SmallModel,
        llm: LargeModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        threshold: float,
        shared_vocab: int,
        llm_span: int = 1,
        on_llm_outage: Literal["slm", "error"] = "slm",
        probe_seconds: float = 5.0,
    ):
        if llm_span < 1:
            raise ValueError(f"llm_span is {llm_span}: let the LLM write at least the 1 token that is routed to it.")
        if on_llm_outage not in ("slm", "error"):
            raise ValueError(f"on_llm_outage is {on_llm_outage!r}: use 'slm' or 'error'.")
        self.slm, self.llm, self.tokenizer = slm, llm, tokenizer
        self.shared_vocab, self.llm_span = shared_vocab, llm_span
        self.on_llm_outage, self.probe_seconds = on_llm_outage, probe_seconds
        self.max_length = min(slm.max_length, llm.max_length)
        self.stats = RoutedStats()
        self.degraded = False
        self._threshold = check_threshold(threshold)
        self._switch = asyncio.Lock()  # one change of the engine's threshold at a time
        self._told = 0  # how often the engine has been told a threshold
        self._probe: asyncio.Task[None] | None = None
        self._requests = 0

    @property
    def threshold(self) -> float:
        """A token is routed if and only if its score is at least this (in an outage, again after it)."""
        return self._threshold

    async def set_threshold(self, value: float) -> None:
        """Use another threshold from the next decision on; during an outage, from its end on."""
        value = check_threshold(value)
        async with self._switch:
            if not self.degraded:
                await self._tell(value)
            self._threshold = value

    async def _tell(self, value: float) -> None:
        self._told += 1  # before: the engine may obey at once
        await self.slm.set_threshold(value)

    async def llm_healthy(self) -> bool:
        """Whether the LLM answers now."""
        return await self.llm.healthy()

    @property
    def dead(self) -> BaseException | None:
        """Why nothing can be written any more, if so: the SLM's engine has ended."""
        return self.slm.dead

    async def close(self) -> None:
        """Stop both engines' connections and processes."""
        if self._probe is not None:
            self._probe.cancel()
            with suppress(asyncio.CancelledError):
                await self._probe
        await self.slm.close()
        await self.llm.close()

    async def generate(
        self, prompt_ids: Ids, params: SamplingParams, *, sample: int = 0
    ) -> AsyncGenerator[RoutedToken, None]:
        """See `RoutedBackend.generate`. The engine keeps its scores to itself: `score` is None."""
        if params.banned_token_ids or params.json_schema is not None:
            raise ValueError(
                "Routed decoding takes no banned_token_ids and no json_schema: leave them out, or use one model."
            )
        if params.penalized:
            raise ValueError(
                "repetition_penalty, presence_penalty and frequency_penalty need both models in one process, because "
                "each of two engines would take what the other has written for a part of the prompt: leave them out."
            )
        check_prompts([prompt_ids], self.shared_vocab, self.max_length, [params])
        self._requests += 1
        request = _Completion(EncodedIds(prompt_ids), params, sample, self._requests)
        request.limit = min(params.max_tokens, self.max_length - len(prompt_ids))
        turns = self.slm.open(params)
        try:
            # The models take turns: the SLM's ends at a routed position, the LLM's after its span. A turn may be empty:
            # without the LLM the SLM takes the next one too.
            to_llm = self._llm_alone()
            while request.finish is None:
                if to_llm:
                    async with aclosing(self._by_llm(request)) as tokens:
                        async for token in tokens:
                            yield token
                    to_llm = self._llm_alone()
                else:
                    async with aclosing(self._by_slm(request, turns)) as tokens:
                        async for token in tokens:
                            yield token
                    to_llm = True  # or it is finished
        finally:
            await turns.close()

    def _llm_alone(self) -> bool:
        """Scores are at least 0: with such a threshold the SLM need not run to know what is routed."""
        return self._threshold <= 0 and not self.degraded

    def _routes(self) -> bool:
        """Whether the engine may be routing; False only where it has been told not to, and has heard."""
        return self._switch.locked() or not (self.degraded or self._threshold > 1)

    async def _by_slm(self, request: _Completion, turns: Turns) -> AsyncGenerator[RoutedToken, None]:
        """The SLM's tokens up to the next routed position or the end."""
        most = request.limit - request.age
        routes, told = self._routes(), self._told
        async with aclosing(turns.write(request.ids, most, request.seed("slm"))) as pieces:
            async for piece in pieces:
                self.stats.slm_positions += piece.read
                for token in self._tokens(request, piece, by_llm=False):
                    self.stats.slm_tokens += 1
                    yield token
                if piece.end == "routed":
                    # An engine that routes nothing stops only where its model has no word, as after an overflow. The
                    # LLM writes there otherwise; who may not ask it has nothing to write.
                    if not routes and told == self._told:
                        raise RowFailed(
                            "The SLM gave logits that are not finite numbers, and no LLM may be asked: look for what "
                            "is in the prompt, or load the SLM in a wider type."
                        )
                    self.stats.handoffs += 1
                if piece.end or request.finish:
                    return

    async def _by_llm(self, request: _Completion) -> AsyncGenerator[RoutedToken, None]:
        """The LLM's tokens up to where the SLM is asked again, or none if the SLM has to go on without it."""
        if self.degraded:
            return
        alone = self._llm_alone()
        most = request.limit - request.age
        pieces = self.llm.write(
            request.ids,
            request.params,
            most if alone else min(most, self.llm_span),
            request.seed("llm"),
            place=request.place,
            unseen=len(request.ids) - request.shown,
        )
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self.stats.llm_positions += piece.read
                    for token in self._tokens(request, piece, by_llm=True):
                        self.stats.llm_tokens += 1
                        request.shown = len(request.ids) - 1
                        yield token
                    if piece.end or request.finish or (alone and not self._llm_alone()):
                        return
        except LLMUnavailable as error:
            if self.on_llm_outage == "error":
                raise
            await self._degrade(error)

    def _tokens(self, request: _Completion, piece: Piece, *, by_llm: bool) -> Sequence[RoutedToken]:
        """A piece as tokens, cut where the completion ends."""
        tokens = []
        for k, token in enumerate(piece.ids):
            if not 0 <= token < self.shared_vocab:
                raise ValueError(
                    f"The {'LLM' if by_llm else 'SLM'} wrote token id {token} but the pair shares {self.shared_vocab} "
                    "ids: give the LLM's path, so that such ids can be kept from it."
                )
            last = k == len(piece.ids) - 1
            request.ids.append(token)
            if (last and piece.end == "stop") or request.stopped(self.tokenizer):
                request.finish = "stop"
            elif request.age >= request.limit:
                request.finish = "length"
            logprob = piece.logprobs[k] if piece.logprobs else None
            tokens.append(RoutedToken(token, by_llm, logprob, None, request.finish))
            if request.finish:
                break
        return tokens

    async def _degrade(self, error: LLMUnavailable) -> None:
        """Tell the SLM's engine to route nothing, until a probe finds the LLM again."""
        async with self._switch:
            if self.degraded:
                return
            await self._tell(NEVER)
            self.degraded = True
            logger.warning("The SLM goes on alone: %s", error)
            self._probe = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        while True:
            await asyncio.sleep(self.probe_seconds)
            try:
                if not await self.llm.healthy():
                    continue
                async with self._switch:
                    await self._tell(self._threshold)
                    self.degraded = False
            except Exception:  # such as an SLM's server that is away now; it may take the threshold at the next look
                logger.exception("The LLM could not be taken up again; the next try is in %g s.", self.probe_seconds)
                continue
            logger.warning("The LLM answers again.")
            return


class _Completion:
    """One completion in flight: prompt and text as ids, and how it ends."""

    def __init__(self, prompt: EncodedIds, params: SamplingParams, sample: int, place: int):
        self.ids, self.params, self.place = prompt, params, place
        self.start = len(prompt)
        self.limit = params.max_tokens
        self.shown = 0  # tokens that the LLM has read
        self.finish: str | None = None
        self._base = None if params.greedy else secrets.randbits(62) if params.seed is None else params.seed
        self._sample = sample
        # Every token of a string but its first spells at least one byte of it; a few more give the decoder context.
        self._window = max((len(text.encode()) for text in params.stop), default=0) + 4

    @property
    def age(self) -> int:
        return len(self.ids) - self.start

    def seed(self, side: str) -> int | None:
        """Of the piece that starts here; None for greedy decoding."""
        if self._base is None:
            return None
        text = f"{self._base} {self._sample} {self.age} {side}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2

    def stopped(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the newest token is a stop id or completes a stop string."""
        if self.ids[-1] in self.params.stop_token_ids:
            return True
        if not self.params.stop:
            return False
        tail = self.ids[max(self.start, len(self.ids) - self._window) :]
        text = tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.params.stop)
