"""vLLM servers on either side of a routed pair, spoken to by the OpenAI completions API in token ids.

The LLM's servers are ordinary; the SLM's was started with the plug-in. A request names its stop ids and takes ids back;
a server that answers with text alone is refused, since text is never encoded again.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import openai

from tokalign.generation.openai_engine import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    NEUTRAL_SAMPLING,
    BrokenAnswer,
    read_choice,
)
from tokalign.generation.protocol import SamplingParams
from tokalign.internals.openai import reading_stream
from tokalign.routing.decode.backend import LLMUnavailable
from tokalign.routing.decode.orchestrator import Piece

SPAN_AT_ONCE = 16  # tokens of the LLM that come in one answer; more are streamed
CONNECT_SECONDS = 5.0  # for a connection to the LLM
PROBE_SECONDS = 3.0  # for its answer to a look whether it is there
# The client lets json's own errors through, and stumbles over an answer that is no object
_CLIENT_FAILS = (openai.OpenAIError, ValueError, RecursionError, AttributeError)


def cut_piece(
    ids: list[int], logprobs: list[float] | None, finish: str | None, unread: int, route: int | None
) -> Piece:
    """A piece from an engine's own words; the token that marks a routed position is left out."""
    read = unread + len(ids) - 1 if ids else 0
    if ids and ids[-1] == route:
        return Piece(ids[:-1], logprobs and logprobs[:-1], read, "routed")
    end: Any = finish if finish in ("stop", "length") else None
    return Piece(ids, logprobs, read, end)


class _TextWithoutIds(ValueError):
    """The server speaks the protocol, but in text."""


class ServedSLM:
    """`SmallModel` behind a vLLM server that was started with the plug-in and the same route token.

    At the start it is told the threshold, and asked once, at threshold 0, whether it routes by the same token.

    Raises:
        ConnectionError: it does not answer.
        ValueError: it takes no threshold or routes by another token, or not at all.
    """

    def __init__(
        self, url: str, route_token_id: int, vocab_size: int, threshold: float, *, api_key: str, timeout: float,
        logprobs: bool = True,
    ):  # fmt: skip
        self.url, self.route_token_id, self.vocab_size, self.logprobs = url, route_token_id, vocab_size, logprobs
        self.model, self.max_length = _served_model([url], None, api_key, "SLM")
        with openai.OpenAI(base_url=url, api_key=api_key, timeout=30.0, max_retries=0) as client:
            self._agree(client, threshold)
        self._client = openai.AsyncOpenAI(base_url=url, api_key=api_key, timeout=timeout, max_retries=0)

    def _agree(self, client: openai.OpenAI, threshold: float) -> None:
        root = client.with_options(base_url=_root(self.url))
        try:
            root.post("/collective_rpc", cast_to=object, body=_threshold_call(0.0))
            try:
                answer: Any = client.completions.create(
                    model=self.model,
                    prompt=[0],
                    max_tokens=1,
                    temperature=0.0,
                    extra_body={"return_token_ids": True, "stop_token_ids": [self.route_token_id]},
                )
            finally:
                root.post("/collective_rpc", cast_to=object, body=_threshold_call(threshold))
        except _CLIENT_FAILS as error:
            raise self._failure(error) from error
        choices = getattr(answer, "choices", None)
        ids = getattr(choices[0], "token_ids", None) if isinstance(choices, list) and choices else None
        if ids != [self.route_token_id]:
            raise ValueError(
                f"The SLM's server {self.url} wrote {str(ids)[:80]} where all is routed, not the route token "
                f"{self.route_token_id}: start it with the command that `tokalign slm-server` "
                "prints."
            )

    def open(self, params: SamplingParams) -> ServedTurns:
        """See `SmallModel`."""
        return ServedTurns(self, params)

    async def set_threshold(self, value: float) -> None:
        """See `SmallModel`; over the server's development interface, which is the one that stock vLLM has."""
        root = self._client.with_options(base_url=_root(self.url))
        try:
            await root.post("/collective_rpc", cast_to=object, body=_threshold_call(value))
        except openai.OpenAIError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, openai.NotFoundError):
            return ValueError(
                f"The SLM's server {self.url} takes no new threshold: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, or run the SLM in this process."
            )
        return ConnectionError(f"The SLM's server {self.url} failed ({_one_line(error)}): check that it runs.")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class ServedTurns:
    """`Turns` over a server: a request a turn, over its prefix cache."""

    def __init__(self, slm: ServedSLM, params: SamplingParams):
        self.slm, self.params = slm, params
        self._read = 0

    async def write(self, prefix: list[int], most: int, seed: int | None) -> AsyncGenerator[Piece, None]:
        """See `Turns`."""
        slm = self.slm
        unseen = len(prefix) - self._read
        try:
            async with aclosing(
                _stream_completion(
                    slm._client,
                    slm.model,
                    prefix,
                    self.params,
                    most,
                    seed,
                    slm.logprobs,
                    unseen,
                    stop_token_ids=[slm.route_token_id, *self.params.stop_token_ids],
                    route=slm.route_token_id,
                )
            ) as pieces:
                self._read = len(prefix)
                async for piece in pieces:
                    self._read += len(piece.ids)
                    yield piece
        except (openai.OpenAIError, BrokenAnswer) as error:
            raise ConnectionError(
                f"The SLM's server {slm.url} failed ({_one_line(error)}): check that it runs."
            ) from error

    async def close(self) -> None:
        """See `Turns`; a server keeps nothing."""


class ServedLLM:
    """`LargeModel` over vLLM servers, spread by request; failures go to the next server, then to a later attempt.

    A server that falls silent for `timeout` is not asked again for the same piece. It is healthy again when it has
    written a token: vLLM's /health also answers while its engine hangs.

    Args:
        timeout: seconds for the first byte of an answer, and between two of a stream.
        banned: ids that the SLM does not have; the servers are asked to avoid them.

    Raises:
        ConnectionError: none of them answers.
    """

    def __init__(
        self, urls: Sequence[str], name: str | None, *, api_key: str, timeout: float, max_retries: int,
        logprobs: bool = True, banned: Sequence[int] = (),
    ):  # fmt: skip
        self.urls, self.max_retries, self.logprobs = list(urls), max_retries, logprobs
        self.model, self.max_length = _served_model(self.urls, name, api_key, "LLM")
        patience = openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        self._clients = [
            openai.AsyncOpenAI(base_url=url, api_key=api_key, timeout=patience, max_retries=0) for url in self.urls
        ]
        self._silent: set[int] = set()  # servers that have hung since they were last well
        self._bias = {str(token): -100 for token in banned}

    async def write(
        self, prefix: list[int], params: SamplingParams, most: int, seed: int | None, *, place: int, unseen: int
    ) -> AsyncGenerator[Piece, None]:
        """See `LargeModel`. A stream that breaks is taken up again behind what has come of it."""
        prefix = list(prefix)
        problem = ""
        silent: set[int] = set()
        for attempt in itertools.count():
            rounds, turn = divmod(attempt, len(self.urls))
            if rounds > self.max_retries or len(silent) == len(self.urls):
                break
            if rounds and turn == 0:
                await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (rounds - 1)) * random.uniform(0.5, 1.5))
            at = (place + attempt) % len(self.urls)
            if at in silent:
                continue
            try:
                async with aclosing(
                    _stream_completion(
                        self._clients[at],
                        self.model,
                        prefix,
                        params,
                        most,
                        seed,
                        self.logprobs,
                        unseen,
                        stop_token_ids=list(params.stop_token_ids),
                        whole=most <= SPAN_AT_ONCE,
                        bias=self._bias,
                    )
                ) as pieces:
                    async for piece in pieces:
                        yield piece
                        prefix += piece.ids
                        most -= len(piece.ids)
                        unseen = 1
                        if piece.end:
                            return
                raise BrokenAnswer("the stream ended early")
            except (openai.APIError, BrokenAnswer) as error:
                status = getattr(error, "status_code", 500)
                if status not in (408, 409, 429) and status < 500:
                    raise ValueError(
                        f"The LLM's server {self.urls[at]} refused a request: {_one_line(error)} Check its model's "
                        f"name ({self.model}) and its longest context."
                    ) from error
                if isinstance(error, openai.APITimeoutError):
                    silent.add(at)
                    self._silent.add(at)
                problem = f"{self.urls[at]}: {_one_line(error)}"
        raise LLMUnavailable(f"The LLM cannot be reached ({problem}): check that its servers run.")

    async def healthy(self) -> bool:
        """Whether any server is well; all are asked at once."""
        looks = [asyncio.create_task(self._well(at)) for at in range(len(self.urls))]
        try:
            for look in asyncio.as_completed(looks):
                if await look:
                    return True
            return False
        finally:
            for task in looks:
                task.cancel()

    async def _well(self, at: int) -> bool:
        client = self._clients[at].with_options(timeout=PROBE_SECONDS)
        try:
            await client.with_options(base_url=_root(self.urls[at])).get("/health", cast_to=object)
            if at in self._silent:
                await client.completions.create(model=self.model, prompt=[0], max_tokens=1)
        except (openai.OpenAIError, ValueError):  # the latter for what is not JSON
            return False
        self._silent.discard(at)
        return True

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()


async def _stream_completion(
    client: openai.AsyncOpenAI,
    model: str,
    prefix: list[int],
    params: SamplingParams,
    most: int,
    seed: int | None,
    logprobs: bool,
    unseen: int,
    *,
    stop_token_ids: list[int],
    route: int | None = None,
    whole: bool = False,
    bias: dict[str, int] | None = None,
) -> AsyncGenerator[Piece, None]:
    """One request to a vLLM server, in pieces as they come or, if `whole`, in one.

    Args:
        unseen: tokens of `prefix` that the server reads at least; more if it says how many it had in its cache.
    """
    body: dict[str, Any] = {"return_token_ids": True, "skip_special_tokens": False, "stop_token_ids": stop_token_ids}
    usage = {} if whole else {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    try:
        answer: Any = await client.completions.create(
            model=model,
            prompt=prefix,
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=most,
            seed=seed,
            logprobs=0 if logprobs else None,
            stream=not whole,
            extra_body=body | usage | NEUTRAL_SAMPLING,
            logit_bias=bias or None,
        )
        if whole:
            yield _piece_of(answer, unseen, len(prefix), route)
            return
        first = True
        async with answer:
            with reading_stream():
                async for chunk in answer:
                    if getattr(chunk, "choices", None):
                        yield _piece_of(chunk, unseen if first else 1, len(prefix) if first else 0, route)
                        first = False
    except _TextWithoutIds:
        raise
    except (ValueError, RecursionError) as error:  # the client lets json's own errors through
        raise BrokenAnswer("the answer is not JSON") from error


def _piece_of(answer: Any, unseen: int, prompt: int, route: int | None) -> Piece:
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or len(choices) != 1:
        raise BrokenAnswer("the answer holds several choices" if choices else "the answer holds no choice")
    ids, logprobs = read_choice(choices[0])
    if ids is None:
        raise _TextWithoutIds(
            "A server answered without token ids: serve both models with vLLM, because text is never encoded again."
        )
    details = getattr(getattr(answer, "usage", None), "prompt_tokens_details", None)
    cached = getattr(details, "cached_tokens", None)
    if prompt and details is not None:
        unseen = prompt - (cached if type(cached) is int and 0 <= cached <= prompt else 0)
    return cut_piece(ids, logprobs, getattr(choices[0], "finish_reason", None), unseen, route)


def _served_model(urls: Sequence[str], name: str | None, api_key: str, side: str) -> tuple[str, int]:
    """The model's name and longest context on the first server that answers."""
    problem = ""
    for url in urls:
        try:
            with openai.OpenAI(base_url=url, api_key=api_key, timeout=30.0, max_retries=0) as client:
                listed: Any = client.models.list()
        except _CLIENT_FAILS as error:
            problem = f"{url}: {_one_line(error)}"
            continue
        models = getattr(listed, "data", None)
        lengths = {}
        for model in models if isinstance(models, list) else ():
            length = getattr(model, "max_model_len", None)
            if isinstance(getattr(model, "id", None), str) and (length is None or (type(length) is int and length > 0)):
                lengths[model.id] = length or 2**31
        if not lengths:
            problem = f"{url}: it lists no model"
            continue
        model_name = next(iter(lengths)) if name is None else name
        if model_name not in lengths:
            raise ValueError(f"{url} serves {', '.join(lengths)[:300]}, not {name}: correct llm_name.")
        return model_name, lengths[model_name]
    raise ConnectionError(f"No server of the {side} answers ({problem}): start it, or correct its address.")


def _threshold_call(value: float) -> dict[str, Any]:
    return {"method": "set_router_threshold", "args": [value]}


def _root(url: str) -> str:
    """A server's address without the /v1 of its API."""
    return url.rstrip("/").removesuffix("/v1")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
