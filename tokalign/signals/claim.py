r"""Claim score: doubt about a token, as far as the token says something that can be wrong.

    s_t = 1 − a_t · min(1, −log π(y_t|x, y_<t) / 6)

    a_t = 1     in a number
          0.5   in an operator
          0.2   in a content word that the prompt or the completion has before
          0.1   in a content word that is new
          0.05  elsewhere

A low log-prob means an error or another way to say a thing, and on real text mostly the second: words are improbable
where a sentence turns to something else, right or wrong. Numbers are what a solution computes or copies; names and
nouns that come back are what it speaks of. There the model's doubt is about the matter. Six nats are full doubt, so
that one odd token does not stand for a step. s_t is in [0, 1], 1 where nothing is doubted, and 1 − s_t is a weight as
the trainers take it. An error is rarely one very improbable token: the mean of a step tells more than its lowest token.
Costs one forward pass.

    tokalign score claim --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset runs/pairs --output_dir runs/claim

reads preference pairs and writes them again with `chosen_claim` and `rejected_claim`. There is no paper; docs/log.md
(2026-12-01) has what was tried beside it, and on which texts the numbers above were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokalign.signals.job import ScoreArguments, load_pairs, score_pairs
from tokalign.signals.likelihood import LikelihoodScorer
from tokalign.stage.pieces import token_pieces
from tokalign.stage.processes import process_state

NUMBER, OPERATOR, REPEATED, NEW, OTHER = 1.0, 0.5, 0.2, 0.1, 0.05
FULL_DOUBT = 6.0  # nats
OPERATORS = frozenset("+-*/=×÷^%<>−·")
LONG = 4  # letters from which a lower-case word is taken for one with content; capitalised ones are at any length


def claims(pieces: Sequence[str], ids: Sequence[int], prompt_ids: Iterable[int]) -> list[float]:
    """How much each token claims, a_t of the equation.

    Args:
        pieces: text of the completion's tokens, with the space before it (`token_pieces`).
        ids: the same tokens' ids.
        prompt_ids: tokens that stand before them.
    """
    seen, amounts = set(prompt_ids), []
    for piece, token in zip(pieces, ids, strict=True):
        word = piece.strip()
        # A token that goes on with a word has no space before it, and follows from how the word began
        begins = piece[:1] == " " and any(letter.isalpha() for letter in word)
        if word[:1].isdigit():
            amounts.append(NUMBER)
        elif word and OPERATORS.issuperset(word):
            amounts.append(OPERATOR)
        elif begins and (word[0].isupper() or len(word) >= LONG):
            amounts.append(REPEATED if token in seen else NEW)
        else:
            amounts.append(OTHER)
        seen.add(token)
    return amounts


class ClaimScorer(LikelihoodScorer):
    """Claim scores of completions.

    Args:
        model: path, hub id, or a loaded causal LM, which then receives the adapter.
        tokenizer: the model's tokenizer, which says what each token is.
        adapter: PEFT adapter path, or None for the model itself.
        options: `token_budget`, `tile_bytes`, `dtype`, `device_map` as of `CompletionScorer`.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: str | Path | None = None,
        **options: Any,
    ):
        super().__init__(model, tokenizer, adapter, signals=("logprob",), **options)
        self.tokenizer = tokenizer

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        names: Sequence[str] | None = None,
    ) -> dict[str, list[list[float]]]:
        """`claim`: one list a row in the given order, one number in [0, 1] a completion token.

        Arguments and errors as of `LikelihoodScorer.score`.
        """
        logps = super().score(prompts, completions, names=names)["logprob"]
        scores = []
        for prompt, ids, of_row in zip(prompts, completions, logps, strict=True):
            amounts = claims(token_pieces(self.tokenizer, ids), ids, prompt)
            scores.append([1 - a * min(1.0, -logp / FULL_DOUBT) for a, logp in zip(amounts, of_row, strict=True)])
        return {"claim": scores}


@dataclass(kw_only=True)
class Arguments(ScoreArguments):
    """Claim scores of pairs."""

    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter of the model."})


def main(arguments: Arguments) -> None:
    process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    score_pairs(
        arguments,
        load_pairs(arguments, tokenizer),
        tokenizer,
        ClaimScorer(arguments.model, tokenizer, arguments.adapter, **arguments.model_options()),
        name="score_claim",
        signals=["claim"],
        weights={"model": arguments.model, "adapter": arguments.adapter},
        parameters={"claims": [NUMBER, OPERATOR, REPEATED, NEW, OTHER, LONG], "full_doubt": FULL_DOUBT},
    )
