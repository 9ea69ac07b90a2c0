"""vLLM servers on either side of a routed pair, spoken to by the OpenAI completions API in token ids.

The LLM's servers are ordinary; the SLM's was started with the plug-in. A request names its stop ids and takes ids back;
a server that answers with text alone is refused, since text is never encoded again.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from tokalign.generation.completions import (
    AsyncServer,
    BrokenAnswer,
    EncodedIds,
    Server,
    ServerFailure,
    Unreachable,
    choices_of,
    completion_body,
    read_choice,
)
from tokalign.generation.openai_engine import FIRST_PAUSE, LONGEST_PAUSE
from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.routing.decode.backend import LLMUnavailable
from tokalign.routing.decode.orchestrator import Piece

SPAN_AT_ONCE = 16  # tokens of the LLM that come in one answer; more are streamed
CONNECT_SECONDS = 5.0  # for a connection to the LLM
PROBE_SECONDS = 3.0  # for its answer to a look whether it is there
STARTING_SECONDS = 30.0  # for an answer while a pair is put together


def cut_piece(
    ids: list[int], logprobs: list[float] | None, finish: str | None, unread: int, route: int | None
) -> Piece:
    """A piece from an engine's own words; the token that marks a routed position is left out."""
    read = unread + len(ids) - 1 if ids else 0
    if ids and ids[-1] == route:
        return Piece(ids[:-1], logprobs and logprobs[:-1], read, "routed")
    end: Any = finish if finish in ("stop", "length") else None
    return Piece(ids, logprobs, read, end)


class ServedSLM:
    """`SmallModel` behind a vLLM server that was started with the plug-in and the same route token.

    At the start it is told the threshold, and asked once, at threshold 0, whether it routes by the same token.

    Raises:
        ConnectionError: it does not answer.
        ValueError: it takes no threshold or routes by another token, or not at all.
    """

    dead = None  # a server may come back

    def __init__(
        self, url: str, route_token_id: int, vocab_size: int, threshold: float, *, api_key: str, timeout: float,
        logprobs: bool = True,
    ):  # fmt: skip
        self.url, self.route_token_id, self.vocab_size, self.logprobs = url, route_token_id, vocab_size, logprobs
        self.model, self.max_length = _served_model([url], None, api_key, "SLM")
        server = Server(url, key=api_key, timeout=STARTING_SECONDS)
        try:
            self._agree(server, threshold)
        finally:
            server.close()
        self._server = AsyncServer(url, key=api_key, timeout=timeout)

    def _agree(self, server: Server, threshold: float) -> None:
        fields = {"model": self.model, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
        try:
            server.post("/collective_rpc", _threshold_call(0.0))
            try:
                answer = server.complete(completion_body([0], fields | {"stop_token_ids": [self.route_token_id]}))
            finally:
                server.post("/collective_rpc", _threshold_call(threshold))
        except ServerFailure as error:
            raise self._failure(error) from error
        choices = choices_of(answer)
        ids = choices[0].get("token_ids") if choices else None
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
        try:
            await self._server.post("/collective_rpc", _threshold_call(value))
        except ServerFailure as error:
            raise self._failure(error) from error

    def _failure(self, error: ServerFailure) -> Exception:
        if error.status == 404:
            return ValueError(
                f"The SLM's server {self.url} takes no new threshold: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment, or run the SLM in this process."
            )
        return ConnectionError(f"The SLM's server {self.url} failed ({error}): check that it runs.")

    async def close(self) -> None:
        """Close the connections."""
        await self._server.close()


class ServedTurns:
    """`Turns` over a server: a request a turn, over its prefix cache."""

    def __init__(self, slm: ServedSLM, params: SamplingParams):
        self.slm, self.params = slm, params
        self._read = 0

    async def write(self, prefix: EncodedIds, most: int, seed: int | None) -> AsyncGenerator[Piece, None]:
        """See `Turns`."""
        slm = self.slm
        unseen = len(prefix) - self._read
        try:
            async with aclosing(
                _stream_completion(
                    slm._server,
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
        except ServerFailure as error:
            raise ConnectionError(f"The SLM's server {slm.url} failed ({error}): check that it runs.") from error

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
        self._servers = [AsyncServer(url, key=api_key, timeout=timeout, connect=CONNECT_SECONDS) for url in self.urls]
        self._silent: set[int] = set()  # servers that have hung since they were last well
        self._bias = {str(token): -100 for token in banned}

    async def write(
        self, prefix: EncodedIds, params: SamplingParams, most: int, seed: int | None, *, place: int, unseen: int
    ) -> AsyncGenerator[Piece, None]:
        """See `LargeModel`. A stream that breaks is taken up again behind what has come of it."""
        start = len(prefix)  # the caller's list grows by what is given out
        written: list[int] = []
        problem = ""
        silent: set[int] = set()
        answered: int | None = None  # the server that failed at it last, if that one answers at all
        for attempt in range(len(self.urls) * (self.max_retries + 1)):
            if len(silent) == len(self.urls):
                break
            rounds, turn = divmod(attempt, len(self.urls))
            if rounds and turn == 0:
                await asyncio.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (rounds - 1)) * random.uniform(0.5, 1.5))
            at = (place + attempt) % len(self.urls)
            if at in silent:
                continue
            try:
                async with aclosing(
                    _stream_completion(
                        self._servers[at],
                        self.model,
                        EncodedIds([*prefix[:start], *written]) if written else prefix,
                        params,
                        most - len(written),
                        seed,
                        self.logprobs,
                        1 if written else unseen,
                        stop_token_ids=list(params.stop_token_ids),
                        whole=most <= SPAN_AT_ONCE,
                        bias=self._bias,
                    )
                ) as pieces:
                    async for piece in pieces:
                        written += piece.ids
                        yield piece
                        if piece.end:
                            return
                raise BrokenAnswer("the stream ended early")
            except ServerFailure as error:
                if not error.passing:
                    raise ValueError(
                        f"The LLM's server {self.urls[at]} refused a request: {error} Check its model's "
                        f"name ({self.model}) and its longest context."
                    ) from error
                if error.silent:
                    silent.add(at)
                    self._silent.add(at)
                busy = error.status in (408, 409, 429, 503)
                answered = None if busy or isinstance(error, Unreachable) else at
                problem = f"{self.urls[at]}: {error}"
        # A text that a model cannot read (its numbers overflow, say) is no outage: nobody else is to go without the LLM
        if answered is not None and await self._writes(answered):
            raise ConnectionError(
                f"The LLM's servers fail at this request and answer others ({problem}): look for what is in its text."
            )
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
        try:
            await self._servers[at].get("/health", PROBE_SECONDS)
        except ServerFailure:
            return False
        if at in self._silent and not await self._writes(at):
            return False
        self._silent.discard(at)
        return True

    async def _writes(self, at: int) -> bool:
        """Whether a server writes a token now."""
        body = completion_body([0], {"model": self.model, "max_tokens": 1})
        try:
            return bool(choices_of(await self._servers[at].complete(body, PROBE_SECONDS)))
        except ServerFailure:
            return False

    async def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            await server.close()


async def _stream_completion(
    server: AsyncServer,
    model: str,
    prefix: Ids,
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

    Raises:
        ServerFailure: there is no answer, or only half of one.
        ValueError: it is text without ids.
    """
    length = len(prefix)  # it grows by what is given out
    fields: dict[str, Any] = {
        "model": model,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": most,
        "seed": seed,
        "logprobs": 0 if logprobs else None,
        "stream": not whole,
        "return_token_ids": True,
        "skip_special_tokens": False,
        "stop_token_ids": stop_token_ids,
        **params.vllm_options,
    }
    if bias:
        fields["logit_bias"] = bias
    if whole:
        yield _piece_of(await server.complete(completion_body(prefix, fields)), unseen, length, route)
        return
    fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    first = True
    async with aclosing(server.stream(completion_body(prefix, fields))) as events:
        async for event in events:
            if event.get("choices"):
                yield _piece_of(event, unseen if first else 1, length if first else 0, route)
                first = False


def _piece_of(answer: dict[str, Any], unseen: int, prompt: int, route: int | None) -> Piece:
    choices = choices_of(answer)
    if len(choices) != 1:
        raise BrokenAnswer("the answer holds several choices" if choices else "the answer holds no choice")
    ids, logprobs = read_choice(choices[0])
    if ids is None:
        raise ValueError(
            "A server answered without token ids: serve both models with vLLM, because text is never encoded again."
        )
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    if prompt and isinstance(details, dict):
        cached = details.get("cached_tokens")
        unseen = prompt - (cached if type(cached) is int and 0 <= cached <= prompt else 0)
    return cut_piece(ids, logprobs, choices[0].get("finish_reason"), unseen, route)


def _served_model(urls: Sequence[str], name: str | None, api_key: str, side: str) -> tuple[str, int]:
    """The model's name and longest context on the first server that answers."""
    problem = ""
    for url in urls:
        server = Server(url, key=api_key, timeout=STARTING_SECONDS)
        try:
            models = server.get("models").get("data")
        except ServerFailure as error:
            problem = f"{url}: {error}"
            continue
        finally:
            server.close()
        lengths = {}
        for model in models if isinstance(models, list) else ():
            if not isinstance(model, dict) or not isinstance(model.get("id"), str):
                continue
            length = model.get("max_model_len")
            if length is None or (type(length) is int and length > 0):
                lengths[model["id"]] = length or 2**31
        if not lengths:
            problem = f"{url}: it lists no model"
            continue
        model_name = next(iter(lengths)) if name is None else name
        if model_name not in lengths:
            raise ValueError(f"{url} serves {', '.join(lengths)[:300]}, not {name}: correct llm_name.")
        return model_name, lengths[model_name]
    raise ConnectionError(f"No server of the {side} answers ({problem}): start it, or correct its address.")


def _threshold_call(value: float) -> bytes:
    return json.dumps({"method": "set_router_threshold", "args": [value]}).encode()
