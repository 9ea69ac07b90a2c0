"""An OpenAI-compatible HTTP server of a routed pair: completions, chat, streams, health and Prometheus metrics.

It serves any `RoutedBackend`. A request passes the gate (key, draining), its body is read and checked up to the limits,
its completions queue for the server's places, and a client that leaves cancels them on both models. The status is
decided by the first token: until then every failure is an HTTP error, after that an error event that ends the stream.
See docs/routed_serving.md.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import fastapi
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope, Send

from tokalign.internals.uvicorn import punctual_protocol
from tokalign.routing.decode.backend import RoutedBackend, RoutedToken
from tokalign.routing.serve.answers import Answer
from tokalign.routing.serve.api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Request,
    ignored_header,
    parse,
    sampling_params,
)
from tokalign.routing.serve.arguments import ServerLimits
from tokalign.routing.serve.asgi import STOPPING, Gate, Reply, Watched
from tokalign.routing.serve.budget import BudgetController
from tokalign.routing.serve.choices import Delta, Draw, Places, deltas, draws_of
from tokalign.routing.serve.detokenize import Detokenizer
from tokalign.routing.serve.metrics import ServerMetrics

logger = logging.getLogger(__name__)

_HEALTH_SECONDS = 5.0  # longest wait for the LLM's own answer
_FAREWELL_SECONDS = 2.0  # longest that a client may take to read why its request failed
_MOST_TOLD = 1000  # names of ignored fields that the log tells, each once: a client can make up more
_FAILED = ApiError(500, "The server failed at this request; its log says why.")


class BackendDied(RuntimeError):
    """The backend cannot serve any more, and neither can the server."""


@dataclass(frozen=True)
class ServerSettings(ServerLimits):
    """Names and limits of a server.

    Attributes:
        model: name under which the pair is served.
        api_key: clients must send it as bearer token, to everything but /health; None asks for none.
        llm_required: whether /health is 503 while the LLM is out of reach (`on_llm_outage` "error").
        chat_template_kwargs: variables of the chat template, where a client gives none.
    """

    model: str
    api_key: str | None = field(default=None, repr=False)
    llm_required: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("The API key is empty or not ASCII: set its variable to a key, or leave it unset.")


def exposure_warning(host: str, api_key: str | None) -> str | None:
    """A sentence for a server that others can reach and that asks for no key."""
    if api_key is not None or host == "localhost":
        return None
    with suppress(ValueError):  # a host name
        if ipaddress.ip_address(host).is_loopback:
            return None
    return f"Serving on {host} without an API key: everyone who reaches this address can use both models."


class _Server:
    """What the endpoints share."""

    def __init__(self, backend: RoutedBackend, settings: ServerSettings, budget: BudgetController | None):
        self.backend, self.settings, self.budget = backend, settings, budget
        self.places = Places(settings.max_running, settings.max_queue)
        self.detokenizer = Detokenizer(backend.tokenizer)
        self.vocab = len(backend.tokenizer)
        self.draining = self.stopping = False
        self.metrics = ServerMetrics(backend, self, budget)
        self.created = int(time.time())
        self.answering: set[asyncio.Timeout] = set()  # the time limit of each request that is being answered
        # One thread: encoding holds up neither the streams nor, by its own state, another encoding.
        self._encoder = ThreadPoolExecutor(1, "encode")
        backend.tokenizer("")  # sets padding and truncation once, which is no longer safe when streams decode
        self._moved = asyncio.Event()
        self._told: set[str] = set()

    @property
    def running(self) -> int:
        return self.places.running

    @property
    def waiting(self) -> int:
        return self.places.waiting

    def on_token(self, token: RoutedToken) -> None:
        """Tell the budget; without the LLM there is nothing to steer."""
        if self.budget is not None and not self.backend.degraded and self.budget.observe(int(token.by_llm), 1):
            self._moved.set()

    async def steer(self) -> None:
        """Hand the budget's threshold to the backend whenever it has moved."""
        assert self.budget is not None
        while True:
            await self._moved.wait()
            self._moved.clear()
            try:
                await self.backend.set_threshold(self.budget.threshold)
            except Exception:  # an engine that cannot be reached now may be at the next move
                logger.exception("The threshold could not be moved to %g.", self.budget.threshold)

    async def health(self) -> tuple[int, dict[str, Any]]:
        if self.backend.dead is not None:
            return 503, {"status": "dead", "running": self.running, "queued": self.waiting}
        if self.draining:
            return 503, {"status": "draining", "running": self.running, "queued": self.waiting}
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                llm = await self.backend.llm_healthy()
        except TimeoutError:
            llm = False
        reachable = llm and not self.backend.degraded
        status = "ok" if reachable else "unavailable" if self.settings.llm_required else "degraded"
        body = {"status": status, "llm": llm, "degraded": self.backend.degraded}
        return (503 if status == "unavailable" else 200), body | {"running": self.running, "queued": self.waiting}

    async def read(self, request: fastapi.Request, kind: type[Request]) -> Request:
        """The checked request in the body."""
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":  # what a foreign web page can send without asking is something else
            raise ApiError(415, "Send the body as JSON, with the header `Content-Type: application/json`.")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.settings.max_body_bytes:
                limit = self.settings.max_body_bytes
                raise ApiError(413, f"The body is longer than {limit} bytes: send a shorter prompt.")
        asked = parse(bytes(body), kind)
        new = asked.ignored - self._told
        if new and len(self._told) < _MOST_TOLD:
            self._told |= new
            logger.warning("Fields of requests that are ignored, told once each: %s.", ignored_header(new))
        if asked.model is not None:
            self.check_model(asked.model)
        return asked

    def check_model(self, name: str) -> None:
        """Refuse, with 404, any name but the pair's."""
        if name != self.settings.model:
            raise ApiError(
                404,
                f"There is no model {name[:80]!r} here: use {self.settings.model!r}.",
                param="model",
                code="model_not_found",
            )

    async def encode(self, asked: Request) -> list[list[int]]:
        """Its prompts' ids, within the limits."""
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(
            self._encoder, asked.prompts, self.backend.tokenizer, self.settings.chat_template_kwargs
        )
        most, choices = self.settings.max_prompt_tokens, len(prompts) * max(1, asked.n)
        if choices > self.settings.max_choices:
            raise ApiError(
                400,
                f"The request asks for {choices} completions, but this server writes at most "
                f"{self.settings.max_choices} a request: send several.",
                param="n",
            )
        for row, prompt in enumerate(prompts):
            if most is not None and len(prompt) > most:
                raise ApiError(
                    400,
                    f"Prompt {row} has {len(prompt)} tokens, but this server takes {most}: shorten it.",
                    param="prompt",
                )
        return prompts

    async def answer(
        self, asked: Request, prompts: list[list[int]], scope: Scope, send: Send, *, seconds: float
    ) -> None:
        """Write the completions and send them, whole or as they come, within `seconds`."""
        reply = Reply(scope, send)
        try:
            async with asyncio.timeout(seconds) as limit:
                self.answering.add(limit)
                try:
                    await self._answer(asked, prompts, scope, reply)
                finally:
                    self.answering.discard(limit)
        except Exception as error:
            if self.stopping and isinstance(error, TimeoutError):
                error = STOPPING
            with suppress(TimeoutError):  # a client that reads nothing does not read this either
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await reply.fail(_refusal_of(error))

    async def _answer(self, asked: Request, prompts: list[list[int]], scope: Scope, reply: Reply) -> None:
        most, longest = self.settings.max_tokens, self.backend.max_length
        params = sampling_params(asked, prompts, most_tokens=most, max_length=longest, vocab=self.vocab)
        draws = draws_of(prompts, params)
        answer = Answer(asked, draws, self.detokenizer, self.settings.model)
        with self.places.admit(len(draws)) as ticket:
            news = deltas(
                self.backend,
                self.detokenizer,
                draws,
                ticket,
                skip_special_tokens=asked.skip_special_tokens,
                on_token=self.on_token,
            )
            async with aclosing(news):  # type: ignore[type-var]
                counted = self._counted(news, answer, scope)
                await (self._send_stream if asked.stream else self._send_whole)(asked, answer, counted, draws, reply)

    async def _counted(self, news: AsyncIterator[Delta], answer: Answer, scope: Scope) -> AsyncIterator[Delta]:
        first = True
        async for delta in news:
            if first:
                self.metrics.first_token.observe(time.perf_counter() - scope["tokalign.arrived"])
                first = False
            answer.count(delta)
            answer.degraded |= self.backend.degraded
            yield delta

    async def _send_whole(
        self, asked: Request, answer: Answer, news: AsyncIterator[Delta], draws: list[Draw], reply: Reply
    ) -> None:
        whole = {id(draw): Delta(draw) for draw in draws}
        async for delta in news:
            whole[id(delta.draw)].add(delta)
        headers = {"x-routing-llm-rate": f"{answer.llm_rate:.4f}", **_notes(asked, answer)}
        await reply.json(200, answer.whole(list(whole.values())), headers)

    async def _send_stream(
        self, asked: Request, answer: Answer, news: AsyncIterator[Delta], draws: list[Draw], reply: Reply
    ) -> None:
        async for delta in news:
            if not reply.started:
                kind = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
                await reply.start(200, {**kind, **_notes(asked, answer)})
            for chunk in answer.chunks(delta):
                await reply.event(chunk)
        if asked.stream_options.include_usage:
            await reply.event(answer.usage_chunk())
        await reply.event("[DONE]")
        await reply.end()

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones; what is left at the end of the time is told so."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout):
                while self.answering:
                    await asyncio.sleep(0.02)
        self.stopping = True
        for limit in self.answering:
            limit.reschedule(asyncio.get_running_loop().time())

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)


def _notes(asked: Request, answer: Answer) -> dict[str, str]:
    """Headers about what was not done as asked."""
    notes = {"x-routing-degraded": "slm-only"} if answer.degraded else {}
    return notes | {"x-routing-ignored": ignored_header(names)} if (names := asked.ignored) else notes


def _refusal_of(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "The request took longer than this server allows: ask for fewer tokens.", code="timeout")
    logger.error("A request failed.", exc_info=error)
    return _FAILED


def create_app(backend: RoutedBackend, settings: ServerSettings, budget: BudgetController | None = None) -> FastAPI:
    """The server of `backend` as an ASGI application, which closes the backend when it ends.

    Args:
        budget: steers the backend's threshold; None leaves it alone.
    """
    server = _Server(backend, settings, budget)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        steering = asyncio.create_task(server.steer()) if budget is not None else None
        try:
            yield
        finally:
            if steering is not None:
                steering.cancel()
            server.close()
            await backend.close()

    app = FastAPI(
        redirect_slashes=False,
        title="tokalign routed serving",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    app.state.server = server
    gate = {"metrics": server.metrics, "api_key": settings.api_key, "draining": lambda: server.draining}
    app.add_middleware(Gate, **gate)  # type: ignore[arg-type]

    @app.exception_handler(ApiError)
    async def refused(request: fastapi.Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}."
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(request: fastapi.Request, error: Exception) -> JSONResponse:
        return JSONResponse(_FAILED.body, _FAILED.status, headers=_FAILED.headers)

    async def post(request: fastapi.Request, kind: type[Request]) -> fastapi.Response:
        try:
            async with asyncio.timeout(settings.request_timeout):
                asked = await server.read(request, kind)
                prompts = await server.encode(asked)
        except TimeoutError as error:
            raise _refusal_of(error) from error
        except ClientDisconnect as error:
            raise ApiError(400, "The client left before its request was complete.") from error
        rest = settings.request_timeout - (time.perf_counter() - request.scope["tokalign.arrived"])
        return Watched(lambda scope, send: server.answer(asked, prompts, scope, send, seconds=rest))

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request) -> fastapi.Response:
        return await post(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request) -> fastapi.Response:
        return await post(request, ChatRequest)

    card = {"id": settings.model, "object": "model", "created": server.created, "owned_by": "tokalign"}
    card["max_model_len"] = backend.max_length

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")  # names of models have slashes
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return card

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        status, body = await server.health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics() -> fastapi.Response:
        return fastapi.Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class GracefulServer(uvicorn.Server):
    """uvicorn that drains at the first SIGTERM or Ctrl-C: new requests get 503 while the running ones finish.

    uvicorn alone closes its port at once, and a load balancer learns of it by refused connections. A second signal
    does not wait for running requests. When the backend dies the server ends too: a process that is gone is started
    again, one that answers nothing is not.

    Args:
        app: from `create_app`.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000):
        # The access log would double every request; /metrics counts them.
        self.shared: _Server = app.state.server
        protocol = punctual_protocol(self.shared.settings.header_timeout)
        super().__init__(
            uvicorn.Config(app, host, port, http=protocol, access_log=False, timeout_graceful_shutdown=5, lifespan="on")
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._died: BaseException | None = None

    async def serve(self, sockets: list[Any] | None = None) -> None:
        """Serve until a signal has drained it.

        Raises:
            BackendDied: it ended because the backend did.
        """
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if (error := self._died) is not None:
            raise BackendDied(f"The backend has died ({type(error).__name__}: {error}): start the server again.")

    async def on_tick(self, counter: int) -> bool:
        self._died = self.shared.backend.dead  # asked while it is there: closing frees it
        return await super().on_tick(counter) or self._died is not None

    def handle_exit(self, sig: int, frame: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
            self.should_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        logger.info("Draining: %d completions run, %d wait.", self.shared.running, self.shared.waiting)
        await self.shared.drain()
        self.should_exit = True
