"""`RoutedBackend` on transformers: one worker thread runs the batch, any number of asyncio tasks read from it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.routing.decode.backend import RoutedStats, RoutedToken, RowFailed, check_threshold
from tokalign.routing.decode.generator import RoutedGenerator

logger = logging.getLogger(__name__)

MOST_FAILURES = 5  # steps in a row that fail without a token between them, before the backend gives up


@dataclass(eq=False)
class _Waiting:
    """One completion that a task waits for."""

    prompt: Ids
    params: SamplingParams
    sample: int
    loop: asyncio.AbstractEventLoop
    tokens: asyncio.Queue[RoutedToken | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False


class TransformersBackend:
    """See `RoutedBackend`. The models are in this process, so the LLM cannot be out of reach.

    Args:
        generator: the pair and its policy; from now on the backend's alone.

    Attributes:
        dead: why the decoding thread has ended by itself; None while it lives. Then no request is served any more.
    """

    degraded = False
    dead: BaseException | None = None

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
        self._worker = threading.Thread(target=self._run, name="routed-decoding", daemon=True)
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
        self.generator.policy.threshold = check_threshold(value)

    async def llm_healthy(self) -> bool:
        return self.dead is None and self._worker.is_alive()

    async def generate(self, prompt_ids: Ids, params: SamplingParams, *, sample: int = 0) -> AsyncIterator[RoutedToken]:
        """See `RoutedBackend.generate`."""
        self.generator.check([prompt_ids], [params])
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        request = _Waiting(prompt_ids, params, sample, asyncio.get_running_loop())
        with self._changed:
            if self.dead is not None:
                raise _died(self.dead)
            if self._closing:
                raise RuntimeError("The backend was closed: start another one.")
            self._arrived.append(request)
            self._changed.notify()
        ended = False
        try:
            while not ended:
                token = await request.tokens.get()
                if isinstance(token, Exception):
                    ended = True
                    # Each request its own: a shared one would gather the frames of all that it is raised in
                    raise type(token)(*token.args)
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

    def _run(self) -> None:
        """The thread's life: whatever ends it is kept and told to everybody who waits."""
        try:
            self._work()
            end = RuntimeError("The backend was closed while the request was running.")
        except BaseException as error:  # a thread's exception is seen by nobody else
            logger.critical("The decoding thread has ended: no request will be answered.", exc_info=error)
            self.dead = error.with_traceback(None)  # its frames would keep the caches in memory
            end = _died(self.dead)
        with self._changed:
            self._closing = True  # under the lock: who comes later is refused at once
            self._in_flight.update(enumerate(self._arrived, start=-len(self._arrived)))
            self._arrived.clear()
        self._fail(end)
        self._totals, self._batch = self.stats, self.generator.batch()

    def _work(self) -> None:
        """Serve until the backend closes.

        An error that is not of one row leaves caches in an unknown state. It ends the requests in flight, and the batch
        starts afresh for those that wait to begin. After `MOST_FAILURES` in a row without a token the device or the
        process is broken, and the last of them is raised.
        """
        failures = 0
        while True:
            try:
                if not self._take():
                    return
                if written := self._batch.step():
                    self._deliver(written)
                    failures = 0
            except Exception as error:
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                logger.exception("A decoding step failed: the requests in flight end, and the batch starts afresh.")
                waiting = [row.key for row in self._batch.waiting if not row.age]
                again = [self._in_flight.pop(key) for key in waiting if key in self._in_flight]
                self._fail(
                    RuntimeError(
                        f"The decoding step that this request was part of failed ({type(error).__name__}: {error}): "
                        "send it again."
                    )
                )
                self._totals, self._batch = self.stats, self.generator.batch()
                with self._changed:
                    self._arrived.extendleft(reversed(again))

    def _take(self) -> bool:
        """Wait until there is work, then let requests in and cancelled ones out; False once the backend closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._arrived or self._batch)
            if self._closing:
                return False
        # Not under the lock, for which event loops wait: to free a row may be to copy what the others hold.
        for _ in range(len(self._arrived)):
            request = self._in_flight[0] = self._arrived.popleft()  # at once, so that it is told whatever fails
            if not request.cancelled:
                key = self._batch.add(request.prompt, request.params, sample=request.sample)
                self._in_flight[key] = request
            del self._in_flight[0]
        # Out of the list before out of the batch: if that fails, the batch goes as a whole.
        for key in [key for key, request in self._in_flight.items() if request.cancelled]:
            del self._in_flight[key]
            self._batch.cancel(key)
        return True

    def _deliver(self, written: list[tuple[int, RoutedToken | RowFailed, RoutedStats]]) -> None:
        """Hand each token, or what ended a row, to the task that waits for it; one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, RoutedToken | RowFailed]]] = {}
        for key, token, _ in written:
            goes_on = isinstance(token, RoutedToken) and token.finish_reason is None
            request = self._in_flight[key] if goes_on else self._in_flight.pop(key)
            by_loop.setdefault(request.loop, []).append((request, token))
        for loop, given in by_loop.items():
            _call(loop, partial(_put, given))

    def _fail(self, error: Exception) -> None:
        failed = list(self._in_flight.values())
        self._in_flight.clear()
        for request in failed:
            _call(request.loop, partial(_put, [(request, error)]))


def _died(error: BaseException) -> RuntimeError:
    return RuntimeError(
        f"The backend's decoding thread has ended ({type(error).__name__}: {error}): start another one."
    )


def _put(given: list[tuple[_Waiting, Any]]) -> None:
    for request, token in given:
        request.tokens.put_nowait(token)


def _call(loop: asyncio.AbstractEventLoop, function: partial) -> None:
    """Run in the loop's thread, if the loop is still there to hear it."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # the loop has been closed, and its tasks with it
        if not loop.is_closed():
            raise
