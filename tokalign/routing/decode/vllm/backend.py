"""Routed decoding on stock vLLM: the SLM in this process (its engine core is a process of its own) or behind a server
that was started with the plug-in, the LLM behind one or more ordinary vLLM servers.

The SLM keeps one request's place in one of two ways. A *session* is vLLM's resumable request (`StreamingInput`): the
keys and values stay where they are and the engine itself drops the token that marked the routed position, so a
hand-back reads the LLM's tokens and nothing else. A *request* is a new one over the prefix cache, which reads up to one
block again. Sessions need an engine in this process without asynchronous scheduling: with it, vLLM 0.30 has scheduled
the next step when the stop is found and would keep the marking token in the text. Without a word from the caller the
engine schedules as vLLM chooses, and sessions are used where that is not asynchronous (the CPU).

Start the LLM so that a hand-off is cheap (prefix caching is vLLM's default; on the CPU ask for small blocks):

    python -m vllm.entrypoints.openai.api_server --model LLM --enable-prompt-tokens-details [--block-size 32]
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from tokalign.generation.completions import EncodedIds
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.orchestrator import Orchestrator, Piece
from tokalign.routing.decode.vllm.plugin import (
    check_vllm_version,
    describe_pair,
    routed_engine_options,
    routed_overrides,
)
from tokalign.routing.decode.vllm.servers import ServedLLM, ServedSLM, cut_piece
from tokalign.routing.router.model import TokenRouter

CPU_BLOCK = 32  # tokens in a block of the KV cache; vLLM's own choice on the CPU is 128, all read again at a hand-off


class VLLMBackend(Orchestrator):
    """`RoutedBackend` on stock vLLM. Build it where its event loop will run; it starts the SLM's engine.

    Args:
        slm: hub id or folder of the small model.
        router: hub id or folder of a `TokenRouter` for it.
        llm_urls: servers of the large model, such as http://host:8000/v1. A request stays with one of them.
        llm: hub id or folder of the large model, to compare tokenizers and vocabularies; None trusts the caller.
        llm_name: its name on the servers; None is the first that they list.
        threshold: None is the router's own.
        slm_url: a server of the small model that was started with the plug-in, instead of an engine in this process.
            `tokalign slm-server` prints its command; it needs VLLM_SERVER_DEV_MODE=1 in its environment, to be told
            thresholds.
        slm_options: more arguments of vLLM's `AsyncEngineArgs`.
        handback: "session" or "request", see above; None chooses.
        logprobs: whether to give log-probs; without them the SLM's engine saves a softmax a step.
        llm_span, on_llm_outage, probe_seconds: see `Orchestrator`.
        max_retries: repeats of a failed request to the LLM, on the next server or after a pause, before it counts as
            out of reach.
        timeout: seconds for the first byte of the SLM's server, and between two of a stream.
        llm_timeout: the same for the LLM's servers; one that is silent for so long counts as out of reach.

    Raises:
        ValueError: one sentence, for a pair, router or route token that does not fit.
        ConnectionError: no server of the LLM answers, or the SLM's does not.
    """

    def __init__(
        self,
        slm: str,
        router: str,
        llm_urls: Sequence[str],
        *,
        llm: str | None = None,
        llm_name: str | None = None,
        threshold: float | None = None,
        slm_url: str | None = None,
        route_token_id: int | None = None,
        dtype: str = "auto",
        slm_options: dict[str, Any] | None = None,
        handback: Literal["session", "request"] | None = None,
        logprobs: bool = True,
        llm_span: int = 1,
        on_llm_outage: Literal["slm", "error"] = "slm",
        probe_seconds: float = 5.0,
        max_retries: int = 1,
        timeout: float = 600.0,
        llm_timeout: float = 30.0,
        api_key_env: str = "OPENAI_API_KEY",
        trust_remote_code: bool = False,
    ):
        if not llm_urls:
            raise ValueError("llm_urls is empty: give at least one server of the LLM, e.g. http://localhost:8000/v1.")
        own = TokenRouter.from_pretrained(router)
        own.check_slm(slm)
        threshold = check_threshold(own.threshold if threshold is None else threshold)
        pair = describe_pair(slm, llm, route_token_id, trust_remote_code=trust_remote_code)
        shared, vocab_size = pair.shared_vocab, pair.config.vocab_size
        key = os.environ.get(api_key_env) or "none"
        large = ServedLLM(
            llm_urls, llm_name, api_key=key, timeout=llm_timeout, max_retries=max_retries, logprobs=logprobs,
            banned=range(shared, pair.llm_vocab or shared),
        )  # fmt: skip
        small: EngineSLM | ServedSLM
        if slm_url is None:
            overrides = routed_overrides(
                pair.config, router, pair.route_token_id, threshold=threshold, shared_vocab=shared
            )
            options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **(slm_options or {})}
            small = EngineSLM(slm, overrides, options, handback=handback, logprobs=logprobs)
        else:
            if handback == "session":
                raise ValueError("handback is 'session', which only an SLM in this process has: leave slm_url out.")
            small = ServedSLM(
                slm_url, pair.route_token_id, vocab_size, threshold, api_key=key, timeout=timeout, logprobs=logprobs
            )
        super().__init__(
            small,
            large,
            pair.tokenizer,
            threshold=threshold,
            shared_vocab=shared,
            llm_span=llm_span,
            on_llm_outage=on_llm_outage,
            probe_seconds=probe_seconds,
        )


class EngineSLM:
    """`SmallModel` over vLLM's `AsyncLLM` with the plug-in.

    Args:
        overrides: from `routed_overrides`.
        options: arguments of `AsyncEngineArgs`.
    """

    def __init__(
        self,
        model: str,
        overrides: dict[str, Any],
        options: dict[str, Any],
        *,
        handback: Literal["session", "request"] | None = None,
        logprobs: bool = True,
    ):
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "Routed decoding on vLLM needs vLLM: install tokalign[vllm], or use --engine transformers."
            )
        import torch
        from vllm import AsyncEngineArgs

        from tokalign.internals.vllm import AsyncLLM

        check_vllm_version()
        if handback not in (None, "session", "request"):
            raise ValueError(f"handback is {handback!r}: use 'session', 'request' or None.")
        if handback == "session" and options.get("async_scheduling"):
            raise ValueError("handback is 'session', which async_scheduling breaks: leave one of them out.")
        defaults: dict[str, Any] = {"enable_prefix_caching": True, "logprobs_mode": "raw_logprobs"}
        if not torch.cuda.is_available():  # see tokalign.generation.vllm_engine
            defaults |= {"gpu_memory_utilization": 0.3, "enforce_eager": True, "enable_chunked_prefill": False}
            defaults["block_size"] = CPU_BLOCK
        if handback == "session":
            defaults["async_scheduling"] = False
        arguments = defaults | options | routed_engine_options(overrides)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, disable_log_stats=True, **arguments))
        overlapped = self.engine.vllm_config.scheduler_config.async_scheduling
        self.sessions = handback != "request" and not overlapped
        self.route_token_id: int = overrides["token_router"]["route_token_id"]
        self.logprobs = 0 if logprobs else None
        self.vocab_size: int = self.engine.model_config.get_vocab_size()
        self.max_length: int = self.engine.model_config.max_model_len

    @property
    def dead(self) -> BaseException | None:
        """See `SmallModel`; vLLM's engine does not come back."""
        return self.engine.dead_error if self.engine.errored else None

    def open(self, params: SamplingParams) -> EngineTurns:
        """See `SmallModel`."""
        return EngineTurns(self, params)

    async def set_threshold(self, value: float) -> None:
        """See `SmallModel`."""
        await self.engine.collective_rpc("set_router_threshold", args=(value,))

    async def close(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()
        del self.engine  # or its finaliser complains when the interpreter has gone


class EngineTurns:
    """`Turns` in an engine of this process: one session, or one request after the other."""

    def __init__(self, slm: EngineSLM, params: SamplingParams):
        self.slm, self.params = slm, params
        self._outputs: Any = None  # of the session
        self._inputs: asyncio.Queue[Any] = asyncio.Queue()
        self._held = 0  # tokens that the session has kept

    async def write(self, prefix: EncodedIds, most: int, seed: int | None) -> AsyncGenerator[Piece, None]:
        """See `Turns`."""
        from vllm import TokensPrompt

        sampling = self._sampling(most, seed)
        if not self.slm.sessions:
            prompt = TokensPrompt(prompt_token_ids=list(prefix))  # the engine keeps it
            outputs = self.slm.engine.generate(prompt, sampling, uuid.uuid4().hex)
            async with aclosing(outputs):
                first = True
                async for output in outputs:
                    unread = len(prefix) - (output.num_cached_tokens or 0) if first else 1
                    first = False
                    yield self._piece(output, unread)
            return

        if self._outputs is not None and len(prefix) <= self._held:
            await self.close()  # nothing new to read, after an outage: a session cannot take that up again
        new = prefix[self._held :]
        await self._inputs.put((TokensPrompt(prompt_token_ids=new), sampling))
        if self._outputs is None:
            self._outputs = self.slm.engine.generate(self._stream(self._inputs), sampling, uuid.uuid4().hex)
        self._held = len(prefix)
        unread = len(new)
        complete = False
        try:
            async for output in self._outputs:
                piece = self._piece(output, unread)
                # A session keeps the limit of its first turn, so the engine may have run on; that is not counted.
                if len(piece.ids) > most or (len(piece.ids) == most and piece.end != "stop"):
                    piece = Piece(
                        piece.ids[:most], piece.logprobs and piece.logprobs[:most], unread + most - 1, "length"
                    )
                unread, most = 1, most - len(piece.ids)
                self._held += len(piece.ids)
                complete = piece.end == "routed"
                yield piece
                if piece.end:
                    break
        finally:
            if not complete:
                await self.close()

    async def _stream(self, inputs: asyncio.Queue[Any]) -> AsyncGenerator[Any, None]:
        from tokalign.internals.vllm import StreamingInput

        while True:
            prompt, sampling = await inputs.get()
            yield StreamingInput(prompt=prompt, sampling_params=sampling)

    async def close(self) -> None:
        """See `Turns`."""
        if self._outputs is not None:
            outputs, self._outputs = self._outputs, None
            self._inputs, self._held = asyncio.Queue(), 0
            await outputs.aclose()

    def _sampling(self, most: int, seed: int | None) -> Any:
        from vllm import SamplingParams as VLLMParams
        from vllm.sampling_params import RequestOutputKind

        return VLLMParams(
            temperature=self.params.temperature,
            top_p=self.params.top_p,
            **self.params.vllm_options,
            max_tokens=most,
            seed=seed,
            stop_token_ids=[self.slm.route_token_id, *self.params.stop_token_ids],
            logprobs=self.slm.logprobs,
            detokenize=False,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _piece(self, output: Any, unread: int) -> Piece:
        """`unread`: tokens that had to be read to write the first of these; each later one reads one more."""
        (one,) = output.outputs
        ids = list(one.token_ids)
        logprobs = None
        if one.logprobs is not None:
            logprobs = [step[token].logprob for step, token in zip(one.logprobs, ids, strict=True)]
        return cut_piece(ids, logprobs, one.finish_reason, unread, self.slm.route_token_id)
