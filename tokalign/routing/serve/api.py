"""What clients may ask of the routed server, in the words of OpenAI's completions and chat APIs.

A request becomes prompt ids and `SamplingParams`, or one sentence with status 400: what the server cannot do is
refused, not ignored. Beyond OpenAI's API there are vLLM's `return_token_ids`, `stop_token_ids`, `skip_special_tokens`
and `chat_template_kwargs`, and `routing_trace` (who wrote each token, and its score).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import now, render_prompt, reserved
from tokalign.stage.errors import ContractError

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256  # of one string: looking for it decodes as many of the last tokens at every token
MOST_STOP_IDS = 64
COMPLETION_TOKENS = 16  # OpenAI's default `max_tokens` of /v1/completions; a chat may fill the context

# Fields that change nothing in the answer: clients send them for their own accounting.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
}
# Fields of other servers, and the values with which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """A refusal as OpenAI's clients expect it.

    Args:
        status: HTTP status.
        message: one sentence.
        param: field of the request that is at fault.
        code: for programs.
        retry_after: seconds after which to try again; None also tells OpenAI's client not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {"x-should-retry": "false"}  # a longer wait for the same refusal helps nobody
        return {"retry-after": str(self.retry_after)}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    include_usage: bool = False


class Request(_Model):
    """What both endpoints take."""

    model: str | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    routing_trace: bool = False

    @property
    def chat(self) -> bool:
        return isinstance(self, ChatRequest)

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError

    @property
    def alternatives(self) -> int:
        """How many other tokens' log-probs are asked for a position."""
        raise NotImplementedError

    def prompts(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of each prompt; runs off the event loop, so it touches nothing but the tokenizer.

        Args:
            variables: of the chat template, where the client gives none.
        """
        raise NotImplementedError


class CompletionRequest(Request):
    """/v1/completions."""

    prompt: Any
    logprobs: int | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    def prompts(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> list[list[int]]:
        several: Any = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if several and all(type(item) is int for item in several):
            several = [several]
        texts = all(isinstance(item, str) for item in several)
        ids = all(isinstance(item, list) and all(type(token) is int for token in item) for item in several)
        if not several or not (texts or ids):
            raise ApiError(
                400, "`prompt` must be a string, a list of token ids, or a non-empty list of either.", param="prompt"
            )
        return [list(tokenizer(item)["input_ids"]) for item in several] if texts else several


class TextPart(_Model):
    type: str
    text: str


class Message(_Model):
    role: str
    content: str | list[TextPart]


class ChatRequest(Request):
    """/v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    chat_template_kwargs: dict[str, bool | int | float | str] = {}

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def alternatives(self) -> int:
        return self.top_logprobs

    def prompts(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> list[list[int]]:
        if tokenizer.chat_template is None:
            raise ApiError(400, "This model has no chat template: use /v1/completions.", param="messages")
        messages = [{"role": message.role, "content": _text(message)} for message in self.messages]
        # What the template is, say, or that it is followed by the answer's beginning, is not the client's to set
        if taken := reserved(self.chat_template_kwargs):
            raise ApiError(400, f"`chat_template_kwargs` cannot set `{taken}`: give variables of the template.")
        try:
            # A server runs for weeks: its template is told today's date
            given = {**variables, **self.chat_template_kwargs}
            return [render_prompt(messages, tokenizer, chat_template_kwargs=given, date=now())]
        except (ContractError, ValueError) as error:  # e.g. roles that must alternate
            raise ApiError(400, _one_line(error), param="messages") from error


def _text(message: Message) -> str:
    if message.role not in ("system", "user", "assistant"):
        raise ApiError(
            400, f"Role {message.role[:40]!r} is not known here: use system, user or assistant.", param="messages"
        )
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text":
            raise ApiError(400, f"Content of type {part.type[:40]!r} is not supported: send text.", param="messages")
    return "".join(part.text for part in message.content)


def parse(raw: bytes, kind: type[Request]) -> Request:
    """The request in the body `raw`; a field that is null is one that is not there."""
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON ({_one_line(error)}): send one JSON object.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is not a JSON object: send one, as OpenAI's API describes it.")
    data = {name: value for name, value in data.items() if value is not None and name not in _IGNORED}
    if isinstance(data.get("messages"), list):  # clients send an answer's message back with all its empty fields
        data["messages"] = [
            {name: value for name, value in message.items() if value is not None and value != []}
            if isinstance(message, dict)
            else message
            for message in data["messages"]
        ]
    for name, nothing in _UNSUPPORTED.items():
        if name in data and data.pop(name) not in nothing:
            raise ApiError(400, f"`{name}` is not supported by this server: leave it out.", param=name)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.alternatives:
        raise ApiError(
            400,
            "Only the written tokens' own log-probs are known: use `logprobs` 0 (completions), or true without "
            "`top_logprobs` (chat).",
            param="logprobs",
        )
    return request


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in one sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union adds the branch's name to the place; the field itself is enough.
    place = [str(part) for part in first["loc"]]
    field = place[0][:60]
    if first["type"] == "extra_forbidden":
        inside = f" (at {'.'.join(place)[:120]})" if len(place) > 1 else ""
        return ApiError(
            400, f"`{place[-1][:60]}`{inside} is not a field that this server knows: leave it out.", param=field
        )
    if first["type"] == "missing":
        return ApiError(400, f"`{'.'.join(place)}` is missing.", param=field)
    return ApiError(400, f"`{field}` is not valid: {first['msg'].lower()}.", param=field)


def sampling_params(
    request: Request, prompts: list[list[int]], *, most_tokens: int | None, max_length: int, vocab: int
) -> list[SamplingParams]:
    """One `SamplingParams` a prompt.

    Args:
        most_tokens: the server's limit on `max_tokens`, if any.
        max_length: prompt and completion together, what both models hold.
        vocab: ids are below this.
    """
    stops = [request.stop] if isinstance(request.stop, str) else request.stop
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"`stop` has {len(stops)} strings: give at most {MOST_STOPS}.", param="stop")
    longest = max(map(len, stops), default=0)
    if longest > MOST_STOP_CHARACTERS:
        raise ApiError(
            400,
            f"`stop` has a string of {longest} characters: give at most {MOST_STOP_CHARACTERS} each.",
            param="stop",
        )
    if len(request.stop_token_ids) > MOST_STOP_IDS:
        raise ApiError(
            400,
            f"`stop_token_ids` has {len(request.stop_token_ids)} ids: give at most {MOST_STOP_IDS}.",
            param="stop_token_ids",
        )
    asked = [getattr(request, name, None) for name in ("max_tokens", "max_completion_tokens")]
    if None not in asked:
        raise ApiError(400, "`max_tokens` and `max_completion_tokens` are one thing: give one.", param="max_tokens")
    wanted = asked[0] if asked[0] is not None else asked[1] if len(asked) > 1 else None
    if wanted is not None and most_tokens is not None and wanted > most_tokens:
        raise ApiError(
            400,
            f"`max_tokens` is {wanted}, but this server writes at most {most_tokens}: ask for less.",
            param="max_tokens",
        )
    all_params = []
    for row, prompt in enumerate(prompts):
        _check_ids(prompt, f"Prompt {row}", vocab)
        room = max_length - len(prompt)
        if room < 1 or (wanted is not None and wanted > room):
            more = "" if wanted is None else f" and `max_tokens` is {wanted}"
            raise ApiError(
                400,
                f"Prompt {row} has {len(prompt)} tokens{more}, but the models hold {max_length} together: shorten one.",
                param="prompt" if not request.chat else "messages",
                code="context_length_exceeded",
            )
        default = room if request.chat else min(COMPLETION_TOKENS, room)
        limit = wanted if wanted is not None else min(default, most_tokens or default)
        try:
            all_params.append(
                SamplingParams(
                    n=request.n,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    max_tokens=limit,
                    seed=request.seed,
                    stop=tuple(stops),
                    stop_token_ids=tuple(request.stop_token_ids),
                )
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).split(" ")[0]) from None
    if request.stop_token_ids:
        _check_ids(request.stop_token_ids, "`stop_token_ids`", vocab)
    return all_params


def _check_ids(ids: list[int], what: str, vocab: int) -> None:
    if not ids:
        raise ApiError(400, f"{what} is empty: give at least one token.", param="prompt")
    if min(ids) < 0 or max(ids) >= vocab:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ApiError(400, f"{what} has token id {wrong}, but ids go from 0 to {vocab - 1}.", param="prompt")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
