"""The OpenAI completions API in token ids, over a plain HTTP client.

`openai`'s client looks at every id of a prompt in Python. That is 190 ms behind 16,000 ids, during which an event loop
serves nobody else. Here a text that grows is written as JSON once, id by id as it grows (`EncodedIds`), and a request
copies those bytes. benchmarks/experiments/handoff.py measures both.

The HTTP library is the one that openai's client stands on, httpx or httpx2 (`tokalign.internals.openai`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np

from tokalign.generation.protocol import Ids
from tokalign.internals.openai import http

ROUNDING = 1e-3  # how far above 0 a log-prob may lie that a server computed in a short type
LONGEST_LINE = 1 << 24  # bytes of a stream without an end of line


# ------------------------------------------------------------------------------------------------------- ids on the way


class EncodedIds(list[int]):
    """Token ids with their JSON beside them. Ids may be added at the end; nothing else may be done to the list."""

    def __init__(self, ids: Iterable[int] = ()):
        super().__init__(ids)
        self._json = bytearray()
        self._encoded = 0  # ids that are in it
        self._commas: Any = None  # where they stand, once a part has been asked for

    def json(self, length: int | None = None) -> bytes:
        """The first `length` ids, or all of them, as JSON without the brackets."""
        if self._encoded < len(self):
            self._json += b"," if self._encoded else b""
            self._json += _json(self[self._encoded :])[1:-1]
            self._encoded, self._commas = len(self), None
        if length is None or length >= len(self):
            return bytes(self._json)
        if self._commas is None:
            self._commas = np.flatnonzero(np.frombuffer(self._json, np.uint8) == ord(","))
        return bytes(self._json[: self._commas[length - 1]]) if length else b""


class Prefix(Sequence[int]):
    """The first `length` ids of `whole` and then those of `tail`, without a copy: many of them share one `whole`.

    Any number of threads may ask for the JSON of those that exist.
    """

    def __init__(self, whole: EncodedIds, length: int, tail: Ids):
        self.whole, self.length, self.tail = whole, length, tail
        whole.json(length)  # now, in the thread that may add to it

    def __len__(self) -> int:
        return self.length + len(self.tail)

    def __iter__(self) -> Iterator[int]:
        return chain(islice(self.whole, self.length), self.tail)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        index = range(len(self))[index]
        return self.whole[index] if index < self.length else self.tail[index - self.length]

    def json(self) -> bytes:
        """As JSON without the brackets."""
        return b",".join(part for part in (self.whole.json(self.length), _json(list(self.tail))[1:-1]) if part)


def completion_body(prompt: Ids, fields: dict[str, Any]) -> bytes:
    """A request of the completions API: `fields`, of which there is at least one, and the prompt."""
    text = prompt.json() if isinstance(prompt, EncodedIds | Prefix) else _json(list(prompt))[1:-1]
    return b"".join((_json(fields)[:-1], b',"prompt":[', text, b"]}"))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------------------- failures


class ServerFailure(Exception):
    """A server gave no answer to this request.

    Attributes:
        status: of HTTP; 500 where there is none.
        passing: whether another attempt may do better.
        silent: whether it was waited for in vain.
    """

    def __init__(self, problem: str, status: int = 500, *, silent: bool = False):
        super().__init__(" ".join(problem.split())[:300])
        self.status, self.silent = status, silent

    @property
    def passing(self) -> bool:
        return self.status in (408, 409, 429) or self.status >= 500


class Unreachable(ServerFailure):
    """The connection failed, broke or fell silent."""


class BrokenAnswer(ServerFailure):
    """The server answered, but not with completions of the protocol; another attempt may do better."""


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except http.TimeoutException as error:
        raise Unreachable("the request timed out", silent=True) from error
    except (http.RequestError, http.InvalidURL) as error:
        raise Unreachable(str(error) or type(error).__name__) from error


def _answer(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenAnswer("the answer is not JSON") from error
    if not isinstance(answer, dict):
        raise BrokenAnswer("the answer is no object of JSON")
    return answer


def _check_status(response: Any) -> None:
    if not 200 <= response.status_code < 300:
        text = response.content[:1000].decode(errors="replace")
        raise ServerFailure(f"HTTP {response.status_code}: {text}", response.status_code)


# --------------------------------------------------------------------------------------------------------------- client

_JSON_TYPE = {"content-type": "application/json"}


def _options(key: str, timeout: float, connect: float | None) -> dict[str, Any]:
    """Of an HTTP client; how many connections there are is the caller's affair."""
    return {
        "headers": {"authorization": f"Bearer {key}"},
        "timeout": http.Timeout(timeout, connect=min(timeout, connect or timeout)),
        # uvicorn, which vLLM's servers run on, hangs up after 5 idle seconds: not while a request is on its way to it
        "limits": http.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
        "follow_redirects": True,
    }


class Server:
    """A server, for any number of threads.

    Args:
        url: such as http://host:8000/v1.
        timeout: seconds for the first byte of an answer and between two; `connect` for the connection.
    """

    def __init__(self, url: str, *, key: str, timeout: float, connect: float | None = None):
        self.url = url.rstrip("/")
        self._http = http.Client(**_options(key, timeout, connect))

    def get(self, path: str) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            ServerFailure: there is none.
        """
        with _reaching():
            response = self._http.get(address(self.url, path))
        _check_status(response)
        return _answer(response.content)

    def post(self, path: str, body: bytes) -> bytes:
        """The answer as it came; see `get`."""
        with _reaching():
            response = self._http.post(address(self.url, path), content=body, headers=_JSON_TYPE)
        _check_status(response)
        return response.content

    def complete(self, body: bytes) -> dict[str, Any]:
        """The whole answer to a request for completions; see `get`."""
        return _answer(self.post("completions", body))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncServer:
    """The same in an event loop."""

    def __init__(self, url: str, *, key: str, timeout: float, connect: float | None = None):
        self.url = url.rstrip("/")
        self._http = http.AsyncClient(**_options(key, timeout, connect))

    async def get(self, path: str, timeout: float) -> None:
        """Only whether it answers; see `Server.get`."""
        with _reaching():
            _check_status(await self._http.get(address(self.url, path), timeout=timeout))

    async def post(self, path: str, body: bytes, timeout: float | None = None) -> bytes:
        """See `Server.post`."""
        patience = {} if timeout is None else {"timeout": timeout}
        with _reaching():
            response = await self._http.post(address(self.url, path), content=body, headers=_JSON_TYPE, **patience)
        _check_status(response)
        return response.content

    async def complete(self, body: bytes, timeout: float | None = None) -> dict[str, Any]:
        """See `Server.complete`."""
        return _answer(await self.post("completions", body, timeout))

    async def stream(self, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream of completions.

        Raises:
            ServerFailure: there is no stream, or it ends without saying so; what came before is good.
        """
        with _reaching():
            async with self._http.stream(
                "POST", address(self.url, "completions"), content=body, headers=_JSON_TYPE
            ) as response:
                if not response.is_success:
                    await response.aread()
                    _check_status(response)
                rest = b""
                async for data in response.aiter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    if len(rest) > LONGEST_LINE:
                        raise BrokenAnswer("a line of the stream does not end")
                    for line in lines:
                        if not line.startswith(b"data:"):
                            continue
                        if (text := line[5:].strip()) == b"[DONE]":
                            return
                        event = _answer(text)
                        if event.get("error"):
                            raise ServerFailure(f"the stream ended by {event['error']}", _status(event["error"]))
                        yield event
        raise BrokenAnswer("the stream ended early")

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def address(url: str, path: str) -> str:
    """Of a path in the API, or, if it begins with "/", of the server."""
    return url.removesuffix("/v1") + path if path.startswith("/") else f"{url}/{path}"


def _status(error: Any) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 500


# -------------------------------------------------------------------------------------------------------------- answers


def choices_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of an answer, none where it has none that could be."""
    choices = answer.get("choices")
    return [one for one in choices if isinstance(one, dict)] if isinstance(choices, list) else []


def read_choice(choice: dict[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    """Ids and log-probs of a choice in a server's answer, None where it has none.

    Raises:
        BrokenAnswer: ids that are none, or not one finite log-prob of at most 0 an id.
    """
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if ids is None:
        return None, None
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise BrokenAnswer("the answer's token ids are no list of ids")
    if logprobs is not None:
        # compared, since `math.isfinite` fails at an integer that no float holds
        listed = logprobs if isinstance(logprobs, list) else []
        numbers = [p for p in listed if type(p) in (int, float) and abs(p) <= sys.float_info.max]
        if numbers != logprobs or len(numbers) != len(ids):
            raise BrokenAnswer("the answer does not hold one log-prob a token")
        if any(p > ROUNDING for p in logprobs):
            raise BrokenAnswer(f"the answer holds the log-prob {max(logprobs):g}, and a probability is at most 1")
        logprobs = [min(p, 0.0) for p in logprobs]
    return ids, logprobs
