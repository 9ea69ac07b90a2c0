"""What clients may ask of the routed server, in the words of OpenAI's completions and chat APIs.

A request becomes prompt ids and `SamplingParams`, or one sentence with status 400. Fields are read as vLLM's server
reads them: what would change the answer and cannot be done here is refused by name, a field that nobody knows is
ignored and named in the answer's header. Beyond OpenAI's API there are vLLM's `top_k`, `min_p`, `repetition_penalty`,
`return_token_ids`, `stop_token_ids`, `skip_special_tokens` and `chat_template_kwargs`, and `routing_trace` (who wrote
each token, and its score).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
MOST_IGNORED = 16  # names of ignored fields that an answer tells

# Fields that change nothing in the answer: clients send them for their own accounting.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "prediction",
}
# Fields of OpenAI's and vLLM's servers that would change the answer, and the values with which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_UNSUPPORTED_IN_MESSAGES = ("audio", "function_call", "tool_call_id", "tool_calls", "tools")
_TEXT_OF_PART = {  # the field of each type of content that has text
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
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
    model_config = ConfigDict(extra="allow", strict=True)

    @property
    def ignored(self) -> set[str]:
        """Names of the fields that nobody here knows."""
        return set(self.model_extra or ())


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool = False  # pads events against who counts their bytes: there is no TLS here to hide them


class Request(_Model):
    """What both endpoints take."""

    model: str | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
    def limit(self) -> int | None:
        """Most tokens that the client asks for."""
        return self.max_tokens

    @property
    def ignored(self) -> set[str]:
        return super().ignored | self.stream_options.ignored

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


class Message(_Model):
    role: str
    content: str | list[str | dict[str, Any]]
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # the name that it had before

    @property
    def ignored(self) -> set[str]:
        parts = [part for part in self.content if isinstance(part, dict)]
        return super().ignored.union(*({*part} - {"type", _TEXT_OF_PART.get(str(part.get("type")))} for part in parts))

    def rendered(self, roles: Mapping[str, str]) -> dict[str, str]:
        """As the chat template takes it.

        Args:
            roles: the name by which the template knows each role.
        """
        if self.role not in roles:
            known = ", ".join(roles)
            raise ApiError(400, f"Role {self.role[:40]!r} is not known here: use one of {known}.", param="messages")
        parts = [self.content] if isinstance(self.content, str) else [_text(part) for part in self.content]
        message = {"role": roles[self.role], "content": "\n".join(parts)}
        if self.name is not None:
            message["name"] = self.name
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        if self.role == "assistant" and reasoning is not None:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return message


class ChatRequest(Request):
    """/v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    reasoning_effort: str | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    chat_template_kwargs: dict[str, bool | int | float | str] = {}

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def ignored(self) -> set[str]:
        return super().ignored.union(*(message.ignored for message in self.messages))

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def alternatives(self) -> int:
        return self.top_logprobs

    def prompts(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> list[list[int]]:
        if tokenizer.chat_template is None:
            raise ApiError(400, "This model has no chat template: use /v1/completions.", param="messages")
        roles = {role: role for role in ("system", "developer", "user", "assistant")}
        # Most templates know no developer and would leave the message out without a word
        if "developer" not in str(tokenizer.chat_template):
            roles["developer"] = "system"
        messages = [message.rendered(roles) for message in self.messages]
        # What the template is, say, or that it is followed by the answer's beginning, is not the client's to set
        if taken := reserved(self.chat_template_kwargs):
            raise ApiError(400, f"`chat_template_kwargs` cannot set `{taken}`: give variables of the template.")
        try:
            # A server runs for weeks: its template is told today's date
            effort = self.reasoning_effort
            asked = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
            given = {**variables, **asked, **self.chat_template_kwargs}
            return [render_prompt(messages, tokenizer, chat_template_kwargs=given, date=now())]
        except (ContractError, ValueError) as error:  # e.g. roles that must alternate
            raise ApiError(400, _one_line(error), param="messages") from error


def _text(part: str | dict[str, Any]) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = str(part.get("type"))
    text = part.get(_TEXT_OF_PART.get(kind, ""))
    if not isinstance(text, str):
        raise ApiError(400, f"Content of type {kind[:40]!r} is not supported: send text.", param="messages")
    return text


def parse(raw: bytes, kind: type[Request]) -> Request:
    """The request in the body `raw`; a field that is null is one that is not there."""
    try:
        data = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON ({_one_line(error)}): send one JSON object.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is not a JSON object: send one, as OpenAI's API describes it.")
    data = {name: value for name, value in data.items() if value is not None and name not in _IGNORED}
    if isinstance(data.get("messages"), list):
        data["messages"] = [_message(message) for message in data["messages"]]
    if isinstance(data.get("stream_options"), dict):
        data["stream_options"] = {k: value for k, value in data["stream_options"].items() if value is not None}
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


def _message(message: Any) -> Any:
    """A message without its empty fields: clients send an answer's message back as they got it."""
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None and value != []}
    for name in _UNSUPPORTED_IN_MESSAGES:
        if name in message:
            raise ApiError(
                400, f"`{name}` in a message is not supported by this server: leave it out.", param="messages"
            )
    # What an assistant has only thought, or called, has no text
    return {"content": "", **message} if message.get("role") == "assistant" else message


def ignored_header(names: Iterable[str]) -> str:
    """Some of the fields that were ignored, as the value of a header; they are of a client, and may be anything."""
    printable: Iterator[str] = (re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:60] for name in sorted(names))
    return ", ".join(list(printable)[:MOST_IGNORED])


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in one sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # A union adds the branch's name to the place; the field itself is enough.
    place = [str(part) for part in first["loc"]]
    field = place[0][:60]
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
    wanted = request.limit
    seed = None if request.seed == -1 else request.seed  # vLLM's word for none; it takes other negative numbers too
    if seed is not None and -(2**63) <= seed < 0:
        seed += 2**63
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
                    top_k=request.top_k,
                    min_p=request.min_p,
                    repetition_penalty=request.repetition_penalty,
                    presence_penalty=request.presence_penalty,
                    frequency_penalty=request.frequency_penalty,
                    seed=seed,
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
