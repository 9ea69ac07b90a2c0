"""How answers leave the routed server: as a status or a stream, to clients that may leave, through one gate."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokalign.routing.serve.api import ApiError
from tokalign.routing.serve.metrics import ServerMetrics

POSTS = ("/v1/completions", "/v1/chat/completions")
_PATHS = (*POSTS, "/v1/models", "/health", "/metrics")
STOPPING = ApiError(503, "The server is stopping: ask another one.", code="draining", retry_after=1)


class Reply:
    """One HTTP answer. What fails before it has started is a status, afterwards an event that ends the stream."""

    def __init__(self, scope: Scope, send: Send):
        self.started = False
        self._scope, self._send = scope, send

    async def start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def json(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        await self.start(status, {"content-type": "application/json", "content-length": str(len(data)), **headers})
        await self._send({"type": "http.response.body", "body": data})

    async def event(self, data: dict[str, Any] | str) -> None:
        # ASCII, because some clients take U+2028 for the end of a line.
        text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
        await self._send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        if not self.started:
            await self.json(error.status, error.body, error.headers)
            return
        self._scope["tokalign.broken"] = error.code or "error"
        await self.event(error.body)
        await self.end()


class Watched(Response):
    """Runs `work(scope, send)` as the answer and cancels it when the client leaves."""

    def __init__(self, work: Callable[[Scope, Send], Coroutine[Any, Any, None]]):
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task, watch = asyncio.create_task(self._work(scope, send)), asyncio.create_task(left())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)


class Gate:
    """In front of every endpoint: the key, draining, and the count of requests by status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, api_key: str | None, draining: Callable[[], bool]):
        self._app, self._metrics, self._key, self._draining = app, metrics, api_key, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, ended = 499, False

        async def counting(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        scope["tokalign.arrived"] = arrived = time.perf_counter()
        path = scope["path"] if scope["path"] in _PATHS else "other"
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await Reply(scope, counting).fail(refusal)
            else:
                await self._app(scope, receive, counting)
        except Exception:
            status = 500  # written by the middleware around this one
            raise
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            broken = scope.get("tokalign.broken") or ("client" if status == 200 and not ended else None)
            if broken:
                self._metrics.broken_streams.labels(broken).inc()
            if path in POSTS:
                self._metrics.latency.observe(time.perf_counter() - arrived)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._key is not None and scope["path"] != "/health":
            sent = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = sent.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key, self._key.encode()):
                return ApiError(
                    401, "The API key is missing or wrong: send it as a bearer token.", code="invalid_api_key"
                )
        if self._draining() and scope["method"] == "POST":
            return STOPPING
        return None
