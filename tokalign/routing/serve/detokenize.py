"""Token ids to text while they arrive: never half a character, never text that may still become a stop string.

The pieces of a stream join to `tokenizer.decode` of all its ids, cut before the first stop string. Each token decodes a
short window of ids, not the whole completion, so a stream costs time linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_LONGEST_WINDOW, _SHORTEST_WINDOW = 24, 12  # ids
_UNSETTLED = 4  # first characters of a window that may differ from the whole text's: a cut character, a stripped space


class Detokenizer:
    """What all streams of one tokenizer share: `stream()` starts one, `token()` spells a single id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.special = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
        spellings = {token: i for token, i in tokenizer.get_vocab().items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
        # Byte fallback decodes a run of such tokens as one: a later byte can spoil characters before it.
        self.bytes = set(spellings.values()) if len(spellings) == 256 else set()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token(self, token_id: int) -> str:
        """The text of one id by itself; half a character is U+FFFD."""
        return self.decode([token_id])

    def stream(self, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> TextStream:
        """A stream that ends before the first of the strings `stop`."""
        return TextStream(self, tuple(stop), self.special if skip_special_tokens else set())


class TextStream:
    """The text of one completion. `push` ids, then `finish`; once `stopped`, there is no more text."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...], skipped: set[int]):
        self.stopped = False
        self.length = 0  # characters decoded, those held back included
        self._detokenizer, self._stop, self._skipped = detokenizer, stop, skipped
        self._window: list[int] = []
        self._text = ""  # of the window
        self._done = 0  # characters of it that have left the window
        self._limit = _LONGEST_WINDOW
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Text that this id makes certain."""
        if token_id in self._skipped or self.stopped:
            return ""
        self._window.append(token_id)
        self._text = self._detokenizer.decode(self._window)
        if token_id in self._detokenizer.bytes:
            return ""
        certain = len(self._text) - self._text.endswith(_HALF)
        new = self._text[self._done : certain]
        self._done = max(self._done, certain)
        if len(self._window) > self._limit:
            self._shorten()
        return self._release(new)

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        if self.stopped:
            return ""
        new = self._text[self._done :]
        self._done = len(self._text)
        text = self._release(new) + self._held
        self._held = ""
        return text

    def _shorten(self) -> None:
        """Go on from the last few ids, if they spell the end of the text as the whole window does."""
        tail = self._window[-_SHORTEST_WINDOW:]
        text = self._detokenizer.decode(tail)
        waiting = len(self._text) - self._done
        if len(text) > 2 * _UNSETTLED + waiting and self._text.endswith(text[_UNSETTLED:]):
            self._window, self._text, self._done = tail, text, len(text) - waiting
            self._limit = _LONGEST_WINDOW
        else:
            self._limit = 2 * len(self._window)

    def _release(self, new: str) -> str:
        """`new` and what was held before it, up to a stop string or what may become one."""
        self.length += len(new)
        text = self._held + new
        starts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
