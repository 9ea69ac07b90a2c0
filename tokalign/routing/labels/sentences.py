"""Where sentences end, told by token ids: a judge reads the current sentence of each branch and one more."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tokalign.generation.protocol import Ids

_MARKS = frozenset(".!?;。！？；\n")


@dataclass(frozen=True)
class SentenceRule:
    """Where sentences end, by token id.

    A token ends a sentence if it holds one of . ! ? ; 。！？； or a newline with no letter or digit behind it, and
    there is a letter or digit since the last such end. So "…" and a blank line after a full stop are no sentences of
    their own. Known limit: a full stop that is a token of its own inside a number ("3" "." "14") counts as an end.

    Attributes:
        marks: ids with such a mark.
        words: ids with a letter or digit.
        sentences: how many ends make a branch: the current sentence and one more.
    """

    marks: frozenset[int]
    words: frozenset[int]
    sentences: int = 2

    def open_before(self, ids: Ids) -> list[bool]:
        """For every position 0 … T of a completion: whether a sentence has begun and not ended before it."""
        states = [False]
        for token in ids:
            states.append(token not in self.marks and (states[-1] or token in self.words))
        return states

    def cut(self, ids: Ids, begun: bool) -> int | None:
        """Tokens of `ids` up to and with the one that ends the last sentence wanted; None if it does not end there.

        Args:
            begun: `open_before` of the first of `ids`.
        """
        left = self.sentences
        for t, token in enumerate(ids):
            begun = begun or token in self.words
            if begun and token in self.marks:
                begun, left = False, left - 1
                if left == 0:
                    return t + 1
        return None


def sentence_rule(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> SentenceRule:
    """The rule of a tokenizer: every id is read once, as the text that it stands for alone."""
    # A special token ends turns, not sentences, and ids beyond the tokenizer have no text
    special = set(tokenizer.all_special_ids)
    known = [i for i in range(min(vocab_size, len(tokenizer))) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in known], clean_up_tokenization_spaces=False)
    marks, words = [], []
    for token, text in zip(known, texts, strict=True):
        # U+FFFD is a part of a character that several tokens spell: text all the same
        last = max((k for k, letter in enumerate(text) if letter.isalnum() or letter == "�"), default=-1)
        if last >= 0:
            words.append(token)
        if _MARKS.intersection(text[last + 1 :]):
            marks.append(token)
    return SentenceRule(frozenset(marks), frozenset(words))
