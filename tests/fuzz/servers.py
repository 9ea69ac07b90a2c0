"""Targets that speak HTTP: requests of any client to the routed server, answers of any server to our clients.

An input reads like HTTP: a line, header lines, an empty line, a body.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from contextlib import aclosing
from functools import lru_cache, partial
from typing import Any
from unittest import mock

from tests.fuzz.properties import check_sentence, is_number, refusals
from tests.routing.serving import FakeBackend
from tests.support import tiny_tokenizer
from tokalign.generation import EngineArguments, SamplingParams
from tokalign.generation.completions import EncodedIds
from tokalign.generation.openai_engine import OpenAIEngine
from tokalign.internals.openai import http
from tokalign.routing.decode.vllm.servers import ServedLLM, ServedSLM
from tokalign.routing.serve.server import ServerSettings, create_app

SECONDS = 30.0  # a request that takes longer hangs
ROUTE = 5
REFUSED = (ValueError, ConnectionError)
loop = lru_cache(asyncio.new_event_loop)


def message(data: bytes) -> tuple[str, list[tuple[bytes, bytes]], bytes]:
    """The first line, headers and body of an input."""
    head, _, body = data.partition(b"\n\n")
    first, *rest = head.split(b"\n")
    pairs = [line.partition(b":") for line in rest]
    headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
    return first.decode("latin-1"), headers, body


# ------------------------------------------------------------------------------------------------- requests to a server


@lru_cache
def application() -> Any:
    backend = FakeBackend(script=[7, 8, 9])
    return create_app(backend, ServerSettings("pair", max_body_bytes=1 << 16, max_choices=8))


def request(data: bytes) -> None:
    """One request to the routed server: status 200 or 4xx in OpenAI's form, whatever was sent."""
    first, headers, body = message(data)
    method, _, path = first.partition(" ")
    status, sent, answer = loop().run_until_complete(asyncio.wait_for(exchange(method, path, headers, body), SECONDS))
    assert status == 200 or 400 <= status < 500, (status, answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        check_sentence(error["message"])
        assert len(answer) < 4000
    elif sent.get(b"content-type", b"").startswith(b"text/event-stream"):
        *events, done, rest = answer.decode().split("\n\n")
        assert done == "data: [DONE]" and not rest
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all("error" not in chunk for chunk in chunks)
        assert any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
    elif sent.get(b"content-type") == b"application/json" and method == "POST":
        whole = json.loads(answer)
        assert whole["choices"] and all(c["finish_reason"] in ("stop", "length") for c in whole["choices"])


async def exchange(
    method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the application's answer; the body comes to it in two parts."""
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    sent: list[dict[str, Any]] = []
    ended = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not parts:
            await ended.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(news: dict[str, Any]) -> None:
        sent.append(news)
        if news["type"] == "http.response.body" and not news.get("more_body", False):
            ended.set()

    path, _, query = path.partition("?")
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""},
        **{"method": method.upper(), "path": path, "raw_path": path.encode(), "query_string": query.encode()},
        **{"headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)},
    }
    await application()(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(part.get("body", b"") for part in sent[1:])


# ------------------------------------------------------------------------------------------------ answers from a server

MODELS = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "o"}]}


def transport(kind: str, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> Any:
    """Servers that answer `kind` of request with these bytes and all others as they should."""

    def answer(asked: Any) -> Any:
        where = "models" if asked.url.path.endswith("/models") else "completions"
        if where != kind and where == "models":
            return http.Response(200, json=MODELS)
        return http.Response(status, headers=headers, content=body)

    return http.MockTransport(answer)


@lru_cache
def tokenizer_folder() -> tempfile.TemporaryDirectory[str]:
    """A tokenizer on disk, until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-tokenizer-")
    tiny_tokenizer().save_pretrained(folder.name)
    return folder


def answer(data: bytes) -> None:
    """What a model server says, to the engine and to both sides of a routed pair; the first line is kind and status.

    Each makes of it ids, log-probs and a reason that can be trusted, or refuses it in one sentence.
    """
    first, headers, body = message(data)
    kind, _, code = first.partition(" ")
    status = int(code) if code.isascii() and code.isdigit() and 200 <= int(code) <= 599 else 200
    servers = transport(kind, status, headers, body)
    vocab = len(application().state.server.backend.tokenizer)
    with (
        mock.patch.object(http, "Client", partial(http.Client, transport=servers)),
        mock.patch.object(http, "AsyncClient", partial(http.AsyncClient, transport=servers)),
    ):
        with refusals(*REFUSED):
            arguments = EngineArguments(
                tokenizer_folder().name, engine="openai", base_urls=["http://s/v1"], max_retries=0
            )
            (pair,) = OpenAIEngine(arguments).generate([[7, 8]], SamplingParams(n=2, max_tokens=4))
            for completion in pair:
                check_piece(completion.token_ids, completion.logprobs)
                assert len(completion.token_ids) <= 4 and all(token < vocab for token in completion.token_ids)
                assert completion.finish_reason in ("stop", "length")
        with refusals(*REFUSED):
            llm = ServedLLM(["http://s/v1"], None, api_key="none", timeout=5.0, max_retries=0)
            assert isinstance(llm.model, str) and type(llm.max_length) is int and llm.max_length > 0
            for most in (1, 40):  # in one answer, and as a stream
                with refusals(*REFUSED):
                    loop().run_until_complete(asyncio.wait_for(write_llm(llm, most), SECONDS))
        with refusals(*REFUSED):
            ServedSLM("http://s/v1", ROUTE, vocab, 0.5, api_key="none", timeout=5.0)


async def write_llm(llm: ServedLLM, most: int) -> None:
    """Ids beyond the vocabulary, and more tokens than were asked for, are the orchestrator's to judge."""
    params = SamplingParams(max_tokens=most)
    async with aclosing(llm.write(EncodedIds([7, 8]), params, most, 1, place=0, unseen=2)) as pieces:
        async for piece in pieces:
            check_piece(piece.ids, piece.logprobs)
            assert piece.end in (None, "stop", "length", "routed")
            assert type(piece.read) is int and piece.read >= 0


def check_piece(ids: list[int], logprobs: list[float] | None) -> None:
    assert all(type(token) is int and token >= 0 for token in ids), ids
    assert logprobs is None or (len(logprobs) == len(ids) and all(map(is_number, logprobs))), logprobs
