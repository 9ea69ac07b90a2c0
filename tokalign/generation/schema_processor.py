"""Constrained decoding inside `model.generate`: a transformers `LogitsProcessor` over `constrained.Grammars`.

The engines mask their own steps; this is for code that only calls `generate`, such as a trainer's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from tokalign.generation.constrained import Grammars, Matcher


@dataclass
class _Row:
    matcher: Matcher
    request: int


class SchemaLogitsProcessor(LogitsProcessor):
    """Masks what row i's schema forbids. One instance serves one call of `generate`, one completion a prompt.

    Args:
        tokenizer: the model's, a fast one.
        schemas: JSON text of a schema for each row of the batch.
        end_ids: ids that end a completion.
        backend: "xgrammar" or "llguidance".

    Raises:
        ValueError: a schema that the library cannot make a grammar of; ImportError: the library is missing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schemas: Sequence[str],
        end_ids: Sequence[int],
        *,
        backend: str = "xgrammar",
    ):
        self._tokenizer, self._schemas, self._end_ids, self._backend = tokenizer, list(schemas), list(end_ids), backend
        self._rows: list[Any] = []
        self._done: list[bool] = []

    @property
    def used(self) -> bool:
        """Whether any step has been masked."""
        return bool(self._rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores (B, V) with −inf where a row's schema has no such continuation of `input_ids` (B, T)."""
        if not self._rows:  # the width of the logits, which may exceed the vocabulary, is known only now
            self._grammars = Grammars(self._backend, self._tokenizer, scores.shape[1], self._end_ids)
            self._rows = [_Row(self._grammars.matcher(schema, i), i) for i, schema in enumerate(self._schemas)]
            self._done = [False] * len(self._rows)
        else:
            for i, token in enumerate(input_ids[:, -1].tolist()):
                if not self._done[i] and token in self._end_ids:
                    self._done[i] = True
                elif not self._done[i]:
                    self._rows[i].matcher.accept(token)
        scores = scores.clone()  # generate may still need the scores that it gave
        self._grammars.mask_(scores, self._rows, self._done)
        return scores
