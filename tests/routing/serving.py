"""A fake routed pair with every way to fail, and a real server in a thread around any backend."""

from __future__ import annotations

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import tiny_tokenizer
from tokalign.routing.decode.backend import LLMUnavailable, RoutedStats, RoutedToken
from tokalign.routing.serve.server import GracefulServer, ServerSettings, create_app


class FakeBackend:
    """Writes letters that the prompt, seed and sample fix; every fourth token is the LLM's.

    Attributes:
        script: ids that every completion consists of, instead of letters.
        pause: seconds a token.
        dies_at: the LLM cannot be reached from this token on.
        fails_at: something unforeseen, or `failure`, happens there.
        gate: completions wait for it before their first token, if set.
    """

    max_length = 512

    def __init__(
        self, tokenizer=None, *, script=None, pause=0.0, dies_at=None, fails_at=None, failure=None, degraded=False
    ):
        self.tokenizer = tokenizer or tiny_tokenizer()
        self.script, self.pause, self.dies_at, self.fails_at = script, pause, dies_at, fails_at
        self.failure = failure or RuntimeError("secret detail")
        self.degraded, self.healthy, self.dead = degraded, True, None
        self.threshold = 0.5
        self.stats = RoutedStats()
        self.gate = None
        self.open = self.most_open = self.cancelled = 0
        self.calls, self.thresholds, self.closed = [], [], False

    async def generate(self, prompt_ids, params, *, sample=0):
        self.calls.append((list(prompt_ids), params, sample))
        if 13 in prompt_ids and len(prompt_ids) == 1:
            raise ValueError("Prompt 13 brings bad luck: choose another.")
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        finished = False
        try:
            while self.gate is not None and not self.gate.is_set():
                await asyncio.sleep(0.005)
            ids = []
            for step in range(params.max_tokens):
                await asyncio.sleep(self.pause)
                if step == self.dies_at:
                    raise LLMUnavailable("http://llm:8000 does not answer")
                if step == self.fails_at:
                    raise self.failure
                by_llm = step % 4 == 3 and not self.degraded
                ids.append(self._next(prompt_ids, params, sample, step))
                text = self.tokenizer.decode(ids)
                stop = ids[-1] in (self.tokenizer.eos_token_id, *params.stop_token_ids)
                stop = stop or any(s in text for s in params.stop)
                finished = stop or step + 1 == params.max_tokens
                self.stats.slm_tokens += not by_llm
                self.stats.llm_tokens += by_llm
                self.stats.handoffs += by_llm
                reason = ("stop" if stop else "length") if finished else None
                yield RoutedToken(ids[-1], by_llm, -0.5, 0.75 if by_llm else 0.25, reason)
                if finished:
                    return
        finally:
            self.open -= 1
            self.cancelled += not finished

    def _next(self, prompt, params, sample, step):
        if self.script is not None:
            return self.script[step] if step < len(self.script) else self.tokenizer.eos_token_id
        seed = 0 if params.greedy else (random.getrandbits(60) if params.seed is None else params.seed, sample)
        digest = hashlib.sha256(repr((list(prompt), seed, step)).encode()).digest()
        return 6 + digest[0] % 26  # letters of the tiny tokenizer

    async def set_threshold(self, value):
        self.threshold = value
        self.thresholds.append(value)

    async def llm_healthy(self):
        return self.healthy

    async def close(self):
        self.closed = True


@contextmanager
def serving(backend, budget=None, **settings) -> Iterator[GracefulServer]:
    """A server on a free port; `.url` is its address, `.thread` ends when it has stopped."""
    app = create_app(backend, ServerSettings(**{"model": "pair", **settings}), budget)
    server = GracefulServer(app, port=0)
    server.config.log_level = "warning"
    server.config.configure_logging()
    server.thread = threading.Thread(target=server.run, daemon=True)
    server.thread.start()
    wait_for(lambda: server.started)
    server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.handle_exit(15, None)
            time.sleep(0.05)
            if server.thread.is_alive():
                server.handle_exit(15, None)  # does not wait for what still runs
        server.thread.join(10)
        assert not server.thread.is_alive()


def wait_for(condition, seconds=5.0) -> None:
    """Until `condition()` holds; AssertionError if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
