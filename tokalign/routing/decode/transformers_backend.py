"""`RoutedBackend` on transformers: one worker thread runs the batch, any number of asyncio tasks read from it."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial

from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.routing.decode.backend import RoutedStats, RoutedToken
from tokalign.routing.decode.generator import RoutedGenerator


@dataclass(eq=False)
class _Waiting:
    """One completion that a task waits for. `key` is the batch's, once the worker has added it."""

    prompt: Ids
    params: SamplingParams
    sample: int
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[RoutedToken | BaseException] = field(default_factory=asyncio.Queue)
    key: int | None = None
    cancelled: bool = False


class TransformersBackend:
    """See `RoutedBackend`. The models are in this process, so the LLM cannot be out of reach.

    Args:
        generator: the pair and its policy; from now on the backend's alone.
    """

    degraded = False

    def __init__(self, generator: RoutedGenerator):
        self.generator = generator
        self.tokenizer = generator.tokenizer
        self.max_length: int = generator.max_length or 2**31 - 1
        self._totals = RoutedStats()  # of batches that were given up after an error
        self._batch = generator.batch()
        self._arrived: deque[_Waiting] = deque()
        self._in_flight: dict[int, _Waiting] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="routed-decoding", daemon=True)
        self._worker.start()

    @property
    def stats(self) -> RoutedStats:
        total = replace(self._totals)
        total += self._batch.stats
        return total

    @property
    def threshold(self) -> float:
        return self.generator.policy.threshold

    async def set_threshold(self, value: float) -> None:
        self.generator.policy.threshold = value

    async def llm_healthy(self) -> bool:
        return self._worker.is_alive()

    async def generate(self, prompt_ids: Ids, params: SamplingParams, *, sample: int = 0) -> AsyncIterator[RoutedToken]:
        """See `RoutedBackend.generate`."""
        self.generator.check([prompt_ids], [params])
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        request = _Waiting(prompt_ids, params, sample, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise RuntimeError("The backend was closed: start another one.")
            self._arrived.append(request)
            self._changed.notify()
        ended = False
        try:
            while not ended:
                token = await request.tokens.get()
                if isinstance(token, BaseException):
                    ended = True
                    raise token
                ended = token.finish_reason is not None
                yield token
        finally:
            if not ended:
                with self._changed:
                    request.cancelled = True
                    self._changed.notify()

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._worker.join)

    # The worker's thread; nothing else touches the batch.

    def _work(self) -> None:
        while self._take():
            try:
                written = self._batch.step()
            except Exception as error:  # reaches every waiting task; the state of the caches is unknown
                self._fail(error)
                self._start_afresh()
                continue
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, RoutedToken]]] = {}
            for key, token, _ in written:
                request = self._in_flight[key] if token.finish_reason is None else self._in_flight.pop(key)
                by_loop.setdefault(request.loop, []).append((request, token))
            for loop, given in by_loop.items():
                _call(loop, partial(_deliver, given))
        self._fail(RuntimeError("The backend was closed while the request was running."))
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Drop all rows and their keys and values, but not the counts."""
        self._totals, self._batch = self.stats, self.generator.batch()

    def _take(self) -> bool:
        """Wait until there is work, then let requests in and cancelled ones out; False once the backend closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._arrived or self._batch)
            arrived, self._arrived = self._arrived, deque()
            for request in arrived:
                if not request.cancelled:
                    request.key = self._batch.add(request.prompt, request.params, sample=request.sample)
                    self._in_flight[request.key] = request
            for key in [key for key, request in self._in_flight.items() if request.cancelled]:
                self._batch.cancel(key)
                del self._in_flight[key]
            return not self._closing

    def _fail(self, error: Exception) -> None:
        with self._changed:
            failed = [*self._in_flight.values(), *self._arrived]
            self._arrived.clear()
        self._in_flight.clear()
        for request in failed:
            _call(request.loop, partial(request.tokens.put_nowait, error))


def _deliver(given: list[tuple[_Waiting, RoutedToken]]) -> None:
    for request, token in given:
        request.tokens.put_nowait(token)


def _call(loop: asyncio.AbstractEventLoop, function: partial) -> None:
    """Run in the loop's thread, if the loop is still there to hear it."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop has been closed, and its tasks with it
        if not loop.is_closed():
            raise
