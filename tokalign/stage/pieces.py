"""Which characters of a completion's text each of its tokens stands for, without tokenising the text anew.

A token signal is one number a completion token, and what is known of a completion is often known of its characters: a
value that is wrong, a sentence, a call. `token_offsets` says where each of the completion's *own* ids stands in the
text, and `spans_to_tokens` which tokens a span of characters touches. `token_pieces` is the same for people, who want
to see every token as a box with its text in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

UNDECODED = "\ufffd"  # what decoders put where bytes are not (yet) a character
MAX_PENDING = 32  # tokens that may wait for a character to be complete; one character needs at most 4


class Range(Protocol):
    """Characters `start` to `end` (not included) of a text."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


class _Group(NamedTuple):
    """Tokens that become text together: where they end, that text, and how much of it stands before each token."""

    end: int
    text: str
    before: list[int]


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token such that the pieces join to `tokenizer.decode(ids)`, special tokens included.

    A token that only begins a character has the piece "" and the one that completes it has the character. After
    MAX_PENDING tokens without a whole character (bytes that are no text) the pieces may differ from the decoded text.
    """
    pieces: list[str] = []
    for _, text, before in _groups(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        group = [""] * len(before)
        # Undecodable bytes stay with the tokens that hold them; the rest belongs to the last token.
        waiting = 0
        while waiting < len(group) - 1 and text[waiting : waiting + 1] == UNDECODED:
            group[waiting] = UNDECODED
            waiting += 1
        group[-1] = text[waiting:]
        pieces += group
    return pieces


def _groups(tokenizer: Any, ids: Sequence[int], start: int = 0, context: int = 0, **options: bool) -> Iterator[_Group]:
    """Groups of tokens from `start` on, each with the text that it adds to what was decoded before it.

    Decoding tokens one at a time loses leading spaces (SentencePiece) and turns parts of a character into U+FFFD
    (byte-level BPE). So each token is decoded behind the tokens before it, in a window that starts at the last whole
    character but one, and a group goes on until its last character is whole.
    """

    def decode(begin: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[begin:end]), **options))  # str(): decode is typed for batches too

    shown, before = decode(context, start), [0]
    for end in range(start + 1, len(ids) + 1):
        text = decode(context, end)
        fresh = text[len(commonprefix([shown, text])) :]  # noqa: RUF071 (strings are meant, not paths)
        if text.endswith(UNDECODED) and end < len(ids) and end - start < MAX_PENDING:
            before.append(len(fresh.rstrip(UNDECODED)))
            continue
        yield _Group(end, fresh, before)
        context, start = start, end
        shown, before = decode(context, start), [0]


# What each id stands for at the beginning of a text and within it. A tokenizer's ids do not change their text, and the
# text of a completion decides in the end whether the pieces were right.
_KNOWN: WeakKeyDictionary[Any, dict[int, tuple[str, str]]] = WeakKeyDictionary()


def token_offsets(tokenizer: Any, ids: Sequence[int], text: str) -> list[tuple[int, int]] | None:
    """Range of characters in `text` of each token of a completion.

    Args:
        tokenizer: the one that made the ids, a transformers tokenizer.
        ids: the completion's own (T,), special tokens included.
        text: their decoding as TRL does it, with special tokens left out; or a part of it, as a chat parser keeps of a
            message whose reasoning it takes out (the last occurrence counts).

    Returns:
        (T,) ranges (start, end). Tokens that share a character each have it in their range; apart from that the ranges
        follow one another without a gap. A special token, and one outside the part that is `text`, has an empty range
        at its place. None if the tokens do not join to the text.
    """
    offsets = _join(tokenizer, ids, text)
    if offsets is not None:
        return offsets
    whole = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    at = whole.rfind(text)
    if at < 0 or len(whole) == len(text):
        return None
    offsets = _join(tokenizer, ids, whole)
    last = len(text)
    return offsets and [(min(max(a - at, 0), last), min(max(b - at, 0), last)) for a, b in offsets]


def _join(tokenizer: Any, ids: Sequence[int], text: str) -> list[tuple[int, int]] | None:
    """Ranges of tokens that join to exactly this text, None if they do not."""
    pieces = _pieces_of(tokenizer, ids)
    offsets: list[tuple[int, int]] = []
    at = index = context = 0
    begun = False  # whether a token that is not left out came before
    while index < len(ids):
        first, inner = pieces[ids[index]]
        piece = inner if begun else first
        # Nearly every token: its piece stands in the text where the one before it ended.
        if text.startswith(piece, at) and UNDECODED not in piece:
            if first or inner:
                begun, context = True, index
            offsets.append((at, at := at + len(piece)))
            index += 1
            continue
        # A part of a character, or a piece that its neighbours change: decoded behind the last token with a text.
        group = next(_groups(tokenizer, ids, index, context, skip_special_tokens=True))
        if not text.startswith(group.text, at):
            return None
        whole = len(group.text)
        # a token ends after the character that it begins; where bytes are no text, nobody can tell whose they are
        ends = [whole if group.text.endswith(UNDECODED) else before + 1 for before in group.before[1:]] + [whole]
        for token, begin, end in zip(ids[index : group.end], group.before, ends, strict=True):
            skipped = not any(pieces[token])  # a special token may stand between the bytes of one character
            offsets.append((at + begin, at + (begin if skipped else min(end, whole))))
        begun, context, index, at = True, index, group.end, at + len(group.text)
    return offsets if at == len(text) else None


def _pieces_of(tokenizer: Any, ids: Sequence[int]) -> dict[int, tuple[str, str]]:
    """(text at the beginning, text within) of each id, all ids that are new decoded in one batch."""
    known = _KNOWN.setdefault(tokenizer, {})
    if new := list(set(ids) - known.keys()):
        # twice the same token: what the second one adds is its text within a text, with the space that stands before it
        once = tokenizer.batch_decode([[i] for i in new], skip_special_tokens=True)
        twice = tokenizer.batch_decode([[i, i] for i in new], skip_special_tokens=True)
        known.update(
            (i, (one, two[len(one) :] if two.startswith(one) else UNDECODED))
            for i, one, two in zip(new, once, twice, strict=True)
        )
    return known


def spans_to_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Range]) -> list[list[int]]:
    """Indices of the tokens that each span of characters touches.

    Args:
        offsets: (T,) ranges of the tokens in the text (`token_offsets`).
        spans: ranges in the same text, in any order.

    Returns:
        A list of token indices a span. A token that straddles the border of two spans belongs to both, one with an
        empty range to none.
    """
    holding = [index for index, (start, end) in enumerate(offsets) if start < end]
    starts, ends = [offsets[index][0] for index in holding], [offsets[index][1] for index in holding]
    return [
        holding[bisect_right(ends, span.start) : bisect_left(starts, span.end)] if span.start < span.end else []
        for span in spans
    ]
