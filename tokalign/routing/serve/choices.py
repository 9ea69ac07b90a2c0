"""The completions of one request while they are written: places, draws, merged deltas, and cancellation.

A request asks for `n` completions of each prompt. Each is one `backend.generate`, in a task of its own that waits for
one of the server's places; the n of a greedy request are one and the same and are written once. Whatever ends the
request (its last token, an error, a timeout, the client's leaving) closes all its iterators, which frees both models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.routing.decode.backend import LLMUnavailable, RoutedBackend, RoutedToken, RowFailed
from tokalign.routing.serve.api import ApiError
from tokalign.routing.serve.detokenize import Detokenizer

logger = logging.getLogger(__name__)

OUTAGE_RETRY = 5  # seconds that a client is told to wait for the LLM
_AHEAD = 64  # deltas that a slow client may leave unread before its completions wait


class Places:
    """Completions that may run at once, and a bounded queue for the rest, first come first served."""

    def __init__(self, max_running: int, max_queue: int):
        self.running = self.waiting = 0
        self._most = max_running + max_queue
        self._free = asyncio.Semaphore(max_running)

    @contextmanager
    def admit(self, count: int) -> Iterator[Ticket]:
        """Let `count` completions queue, or refuse them all at once with status 429."""
        if self.running + self.waiting + count > self._most:
            raise ApiError(
                429,
                f"The server writes {self.running} completions and {self.waiting} wait: try again in a second.",
                code="queue_full",
                retry_after=1,
            )
        self.waiting += count
        ticket = Ticket(self, count)
        try:
            yield ticket
        finally:  # those that never got as far as a place
            self.waiting -= ticket.left

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """One completion's place, when it is free."""
        await self._free.acquire()
        ticket.left -= 1
        self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()


@dataclass
class Ticket:
    """Completions of one admitted request: `left` have not begun."""

    places: Places
    left: int


@dataclass(frozen=True)
class Draw:
    """One completion to be written, and which choices of the answer it is."""

    prompt: Ids
    params: SamplingParams
    sample: int
    choices: tuple[int, ...]


@dataclass
class Delta:
    """What is new of one completion. `text_offset` is where each token's text begins."""

    draw: Draw
    text: str = ""
    tokens: list[RoutedToken] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.text_offset += other.text_offset
        self.finish_reason = other.finish_reason


def draws_of(prompts: list[list[int]], params: list[SamplingParams]) -> list[Draw]:
    """The completions that have to be computed; choices are numbered prompt by prompt, as in OpenAI's API."""
    draws = []
    for row, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        choices = [row * each.n + k for k in range(each.n)]
        if each.greedy:
            draws.append(Draw(prompt, each, 0, tuple(choices)))
        else:
            draws += [Draw(prompt, each, k, (choice,)) for k, choice in enumerate(choices)]
    return draws


async def deltas(
    backend: RoutedBackend,
    detokenizer: Detokenizer,
    draws: list[Draw],
    ticket: Ticket,
    *,
    skip_special_tokens: bool,
    on_token: Callable[[RoutedToken], None],
) -> AsyncIterator[Delta]:
    """News of all `draws` as they come, one token a delta. Close it to cancel them.

    A backend checks a request before it awaits anything, so a ValueError until then is about the request and the
    client may read it. What goes wrong later is the engines' or their servers': addresses and what those say go to the
    log alone.

    Raises:
        ApiError: 400 where the backend refused the request, 500 with its reason where one completion failed alone, 502
            where a model's server failed or refused it, 503 where the LLM is out of reach.
        Exception: anything else that went wrong in the backend.
    """
    news: asyncio.Queue[Delta | Exception] = asyncio.Queue(_AHEAD)

    async def write(draw: Draw) -> None:
        waited = asyncio.Event()
        try:
            async with ticket.places.place(ticket):
                asyncio.get_running_loop().call_soon(waited.set)  # runs once the backend lets anything else run
                stream = detokenizer.stream(draw.params.stop, skip_special_tokens=skip_special_tokens)
                async with aclosing(backend.generate(draw.prompt, draw.params, sample=draw.sample)) as tokens:  # type: ignore[type-var]
                    async for token in tokens:
                        on_token(token)
                        offset = stream.length
                        delta = Delta(draw, stream.push(token.id), [token], [offset], token.finish_reason)
                        if token.finish_reason is not None:
                            delta.text += stream.finish()
                        if (
                            stream.stopped
                        ):  # the text is cut here, though a special token kept the backend from seeing it
                            delta.finish_reason = "stop"
                        await news.put(delta)
                        if delta.finish_reason is not None:
                            return
            raise RuntimeError("The backend ended a completion without a finish reason.")
        except LLMUnavailable as error:
            logger.warning("The LLM is out of reach: %s", error)
            message = "The large model cannot be reached: try again later."
            await news.put(ApiError(503, message, code="llm_unavailable", retry_after=OUTAGE_RETRY))
        except Exception as error:
            if isinstance(error, RowFailed):
                logger.error("A completion failed: %s", error)
                await news.put(ApiError(500, str(error), code="completion_failed"))
            elif isinstance(error, ValueError) and not waited.is_set():
                await news.put(ApiError(400, str(error)))
            elif isinstance(error, ConnectionError) or (isinstance(error, ValueError) and error.__cause__ is not None):
                logger.error("A model's server failed or refused a request: %s", error)
                message = "A model behind this server failed or refused the request; the server's log says why."
                await news.put(ApiError(502, message, code="upstream_error"))
            else:
                await news.put(error)

    tasks = [asyncio.create_task(write(draw)) for draw in draws]
    going = len(tasks)
    try:
        while going:
            delta = await news.get()
            if isinstance(delta, Exception):
                raise delta
            going -= delta.finish_reason is not None
            yield delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
