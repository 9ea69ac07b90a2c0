"""Answers in the JSON of OpenAI's completions and chat APIs, whole or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from typing import Any

from tokalign.routing.serve.api import Request
from tokalign.routing.serve.choices import Draw, Piece
from tokalign.routing.serve.detokenize import Detokenizer


class Answer:
    """Builds the answer to one request and counts what goes into it.

    Attributes:
        degraded: whether the SLM went on without the LLM at some time; the server sets it.
    """

    def __init__(self, request: Request, draws: list[Draw], detokenizer: Detokenizer, model: str):
        self.degraded = False
        self._request, self._draws, self._detokenizer = request, draws, detokenizer
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if request.chat and request.stream:
            self._head["object"] = "chat.completion.chunk"
        self._begun: set[int] = set()  # choices whose first chunk is out
        self._prompt_tokens = sum(len(prompt) for prompt in {id(d.prompt): d.prompt for d in draws}.values())
        self._tokens = self._llm_tokens = 0  # a greedy request's n equal completions count n times, as they are sent

    @property
    def llm_rate(self) -> float:
        return self._llm_tokens / self._tokens if self._tokens else 0.0

    def count(self, piece: Piece) -> None:
        copies = len(piece.draw.choices)
        self._tokens += copies * len(piece.tokens)
        self._llm_tokens += copies * sum(token.by_llm for token in piece.tokens)

    def whole(self, completions: list[Piece]) -> dict[str, Any]:
        """The answer without streaming; `completions` are one a draw, in their order."""
        choices = []
        for piece in completions:
            for index in piece.draw.choices:
                text = (
                    {"message": {"role": "assistant", "content": piece.text}}
                    if self._request.chat
                    else {"text": piece.text}
                )
                choices.append({"index": index, **text, **self._details(piece, prompt_ids=not self._request.chat)})
        answer = {**self._head, "choices": choices, "usage": self.usage(), "routing": self.routing()}
        if self._request.return_token_ids and self._request.chat:
            answer["prompt_token_ids"] = list(self._draws[0].prompt)
        return answer

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream that bring `piece`: none where it holds nothing that was asked for."""
        traced = self._request.routing_trace or self._request.return_token_ids or self._request.wants_logprobs
        result = []
        for index in piece.draw.choices:
            first = index not in self._begun
            if not (first or piece.text or piece.finish_reason or traced):
                continue
            self._begun.add(index)
            text: dict[str, Any] = {"text": piece.text}
            if self._request.chat:
                role = {"role": "assistant"} if first else {}
                text = {"delta": {**role, "content": piece.text} if first or piece.text else {}}
            choice = {"index": index, **text, **self._details(piece, prompt_ids=first and not self._request.chat)}
            chunk = {**self._head, "choices": [choice]}
            if first and self._request.chat and self._request.return_token_ids:
                chunk["prompt_token_ids"] = list(piece.draw.prompt)
            if self._request.stream_options.include_usage:
                chunk["usage"] = None
            if piece.finish_reason:
                chunk["routing"] = self.routing()
            result.append(chunk)
        return result

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for `stream_options.include_usage`."""
        return {**self._head, "choices": [], "usage": self.usage(), "routing": self.routing()}

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt_tokens + self._tokens,
        }

    def routing(self) -> dict[str, Any]:
        """This request's share of LLM tokens so far, and whether the LLM was missing."""
        return {"llm_rate": self.llm_rate, "degraded": self.degraded}

    def _details(self, piece: Piece, *, prompt_ids: bool) -> dict[str, Any]:
        """What a choice holds beside its text."""
        details: dict[str, Any] = {"logprobs": None, "finish_reason": piece.finish_reason}
        if self._request.wants_logprobs:
            details["logprobs"] = self._chat_logprobs(piece) if self._request.chat else self._logprobs(piece)
        if self._request.return_token_ids:
            details["token_ids"] = [token.id for token in piece.tokens]
            if prompt_ids:
                details["prompt_token_ids"] = list(piece.draw.prompt)
        if self._request.routing_trace:
            details["routing"] = {
                "written_by": ["llm" if token.by_llm else "slm" for token in piece.tokens],
                "scores": [token.score for token in piece.tokens],
            }
        return details

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        return {
            "tokens": [self._detokenizer.token(token.id) for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": None,
            "text_offset": piece.text_offset,
        }

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any]:
        content = []
        for token in piece.tokens:
            text = self._detokenizer.token(token.id)
            half = "\ufffd" in text  # its bytes are not those of the replacement character
            spelled = None if half else list(text.encode())
            content.append({"token": text, "logprob": token.logprob, "bytes": spelled, "top_logprobs": []})
        return {"content": content, "refusal": None}
