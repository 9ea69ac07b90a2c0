"""Constrained decoding inside `model.generate`: a transformers `LogitsProcessor` over `constrained.Grammars`.

The engines mask their own steps; this is for code that only calls `generate`, such as a trainer's evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from tokalign.generation.constrained import Grammars, Matcher


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
        self._matchers: list[Matcher | None] = []  # None once the completion has ended

    @property
    def used(self) -> bool:
        """Whether any step has been masked."""
        return bool(self._matchers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores (B, V) with −inf where a row's schema has no such continuation of `input_ids` (B, T)."""
        if not self._matchers:  # the width of the logits, which may exceed the vocabulary, is known only now
            self._grammars = Grammars(self._backend, self._tokenizer, scores.shape[1], self._end_ids)
            self._matchers = [self._grammars.matcher(schema, i) for i, schema in enumerate(self._schemas)]
        else:
            for i, token in enumerate(input_ids[:, -1].tolist()):
                matcher = self._matchers[i]
                if matcher is not None and token in self._end_ids:
                    self._matchers[i] = None
                elif matcher is not None:
                    matcher.accept(token)
        scores = scores.clone()  # generate may still need the scores that it gave
        self._grammars.mask_(scores, self._matchers, range(len(self._matchers)))
        return scores
