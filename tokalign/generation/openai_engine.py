"""Generation by any server of the OpenAI completions API that takes and returns token ids (vLLM's does).

Prompts go out as ids and `return_token_ids` asks for ids back: a server that answers with text alone is refused, since
re-encoded text need not be the ids that the model wrote. Requests are spread over the servers in turn; one that fails
(connection, 429, 5xx, a broken answer) is repeated on the next server at once and, after a round of them all, after an
exponentially growing pause with jitter.

Bans: the API clips `logit_bias` to −100, which multiplies a probability by e^−100. An answer that holds a banned id all
the same is refused.

A `json_schema` goes out as vLLM's `structured_outputs`; the server's own `--structured-outputs-config` chooses the
library, and its log-probs are over the allowed ids. A server that does not know the field ignores it:
`tokalign.evaluation.structured` counts what comes back.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokalign.generation.arguments import EngineArguments
from tokalign.generation.completions import (
    BrokenAnswer,
    Server,
    ServerFailure,
    choices_of,
    completion_body,
    read_choice,
)
from tokalign.generation.constrained import needs_leading_space
from tokalign.generation.protocol import (
    Completion,
    Ids,
    SamplingParams,
    check_prompts,
    generate_with_early_bans,
    params_of_each,
    repeat_greedy,
)
from tokalign.stage.hashes import known_ids

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


class OpenAIEngine:
    """`Engine` over one or more servers. An `adapter` is the name under which the servers serve it."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, arguments: EngineArguments):
        if not arguments.base_urls:
            raise ValueError("engine=openai needs base_urls: give at least one, e.g. http://localhost:8000/v1.")
        if arguments.concurrency < 1:
            raise ValueError(f"concurrency is {arguments.concurrency}: allow at least 1 request in flight.")
        self.arguments = arguments
        self.urls = list(arguments.base_urls)
        key = os.environ.get(arguments.api_key_env) or "none"
        self._servers = [Server(url, key=key, timeout=arguments.timeout) for url in self.urls]
        self.tokenizer = AutoTokenizer.from_pretrained(
            arguments.tokenizer or arguments.model, trust_remote_code=arguments.trust_remote_code
        )
        self.vocab_size = len(known_ids(self.tokenizer))  # what the server's model has besides is not known
        self._leading_space = needs_leading_space(self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`.

        Raises:
            ConnectionError: one sentence naming the row and the servers tried, when all attempts have failed.
            ValueError: a server refused the request or does not return token ids.
        """
        each = params_of_each(params, len(prompts))
        check_prompts(prompts, self.vocab_size, None, each)
        for row, one in enumerate(each):
            if one.json_schema is not None and self._leading_space:
                raise ValueError(
                    f"Prompt {row} has a json_schema, which a server cannot hold this word-level tokenizer to: use "
                    "engine=transformers or vllm."
                )
        model = adapter or self.arguments.adapter or self.arguments.served_model or self.arguments.model
        return generate_with_early_bans(lambda prompts, each: self._run(prompts, each, model), prompts, each)

    def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            server.close()

    def _run(self, prompts: Sequence[Ids], each: Sequence[SamplingParams], model: str) -> list[list[Completion]]:
        stop = threading.Event()  # ends the pauses of the other requests once one has failed for good
        pool = ThreadPoolExecutor(self.arguments.concurrency)
        try:
            futures = [
                pool.submit(self._request, row, prompt, params, model, stop)
                for row, (prompt, params) in enumerate(zip(prompts, each, strict=True))
            ]
            return repeat_greedy([future.result() for future in futures], each)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _request(
        self, row: int, prompt: Ids, params: SamplingParams, model: str, stop: threading.Event
    ) -> list[Completion]:
        count = len(self.urls)
        attempts = self.arguments.max_retries + 1
        problem = "stopped"
        for attempt in range(attempts):
            rounds, turn = divmod(attempt, count)
            if rounds and turn == 0:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (rounds - 1))
                stop.wait(pause * random.uniform(0.5, 1.5))
            if stop.is_set():
                break
            at = (row + attempt) % count
            try:
                return self._ask(self._servers[at], prompt, params, model)
            except ServerFailure as error:
                if not error.passing:
                    raise ValueError(
                        f"Prompt {row} was refused by {self.urls[at]}: {error} Check the served model's "
                        f"name ({model}) and its longest context."
                    ) from error
                problem = f"{self.urls[at]}: {error}"
            except _NoTokenIds as error:
                raise ValueError(
                    f"{self.urls[at]} answered prompt {row} without token ids: serve the model with vLLM, or another "
                    "server that honours return_token_ids, because text is never encoded again."
                ) from error
        raise ConnectionError(
            f"Prompt {row} got no answer in {attempts} attempts at {', '.join(self.urls)} (last, {problem}): "
            "check that the servers run, then start again."
        )

    def _ask(self, server: Server, prompt: Ids, params: SamplingParams, model: str) -> list[Completion]:
        fields: dict[str, Any] = {
            "model": model,
            "n": params.draws,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
            "seed": secrets.randbits(62) if params.seed is None else params.seed % 2**62,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
            **params.vllm_options,
        }
        if params.json_schema is not None:
            fields["structured_outputs"] = {"json": params.json_schema}
        if params.stop_token_ids:
            fields["stop_token_ids"] = list(params.stop_token_ids)
        if params.stop:
            fields["stop"] = list(params.stop)
        if params.banned_token_ids:
            fields["logit_bias"] = {str(token): -100 for token in params.banned_token_ids}
        choices = choices_of(server.complete(completion_body(prompt, fields)))
        by_index = {index: choice for choice in choices if type(index := choice.get("index")) is int}
        if len(choices) != params.draws or by_index.keys() != set(range(params.draws)):
            raise BrokenAnswer(f"the answer does not hold {params.draws} choices")
        return [_completion(by_index[index], params) for index in range(params.draws)]


class _NoTokenIds(Exception):
    """The server speaks the protocol, but in text."""


def _completion(choice: dict[str, Any], params: SamplingParams) -> Completion:
    ids, logprobs = read_choice(choice)
    if ids is None:
        raise _NoTokenIds
    if logprobs is None:
        raise BrokenAnswer("the answer does not hold one log-prob a token")
    if len(ids) > params.max_tokens:
        raise BrokenAnswer(f"the completion has {len(ids)} tokens where {params.max_tokens} were asked for")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BrokenAnswer(f"the completion ended by {str(reason)[:40]!r}")
    banned = set(ids).intersection(params.banned_token_ids)
    if banned:
        raise ValueError(f"The server sampled the banned token id {min(banned)}: use engine=transformers or vllm.")
    return Completion(ids, logprobs, reason)
