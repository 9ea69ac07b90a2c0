"""The SLM itself calls the LLM, by a token that it has learned to write (RelayLLM, arXiv 2601.05167).

In the paper the SLM writes `<call>n</call>` and the LLM continues for n tokens; the tag stays in the SLM's text and is
taken out of the LLM's. Here a call is *one* token, and each call has its own number: `{"<call_10>": 10, "<call_50>":
50}`. It is a routed proposal like any other: it is dropped, so neither model reads it and no completion shows it.

Deviations: the number is one of those given and not written in digits; the SLM does not see its own call afterwards,
so train it on text that goes on without the tag; a completion has any number of calls (five in the released code).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


class CallPolicy(RoutingPolicy):
    """Scores in [0, 1]: 1 where the SLM has drawn a call, else the probability that it gives to calls.

    Args:
        calls: token (its text, or its id) -> how many tokens the LLM may write. Both models must share the tokens.
        threshold: 1 is the paper's, the SLM must have drawn a call; a lower one also calls where one was likely.
    """

    def __init__(self, calls: Mapping[str | int, int], threshold: float = 1.0):
        if not calls or min(calls.values()) < 1:
            raise ValueError(
                f"calls is {dict(calls)}: give each call the number of tokens that it asks for, at least 1."
            )
        self.threshold = check_threshold(threshold)
        self._calls = dict(calls)
        self._ids = torch.tensor([token for token in calls if isinstance(token, int)], dtype=torch.int64)
        self._counts = torch.tensor(list(calls.values()))

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        likely = tokens.logits.float().softmax(-1)[:, self._ids].sum(-1).clamp(max=1 - 2.0**-24)  # below a drawn one's
        return torch.where(self._drawn(tokens).any(-1), 1.0, likely)

    def spans(self, tokens: NextTokens) -> torch.Tensor:
        # Of the call that was drawn; where none was, of the likeliest.
        drawn = self._drawn(tokens)
        likeliest = tokens.logits[:, self._ids].argmax(-1)
        return self._counts[torch.where(drawn.any(-1), drawn.int().argmax(-1), likeliest)]

    def _drawn(self, tokens: NextTokens) -> torch.Tensor:
        """Which call each row has drawn (N, calls)."""
        assert tokens.drawn is not None
        return tokens.drawn[:, None] == self._ids

    def attach(self, slm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Finds the calls among the tokens."""
        ids, vocabulary = [], tokenizer.get_vocab()
        for token in self._calls:
            if (number := vocabulary.get(token) if isinstance(token, str) else token) is None:
                raise ValueError(f"The SLM's tokenizer has no token {token!r}: name one that the SLM calls by.")
            ids.append(number)
        self._ids, self._counts = torch.tensor(ids, device=slm.device), self._counts.to(slm.device)
