"""Which characters of a completion earned what: the structured reward, value by value.

One number a completion says nothing of where it went wrong. The reward reads the document, so it knows each value that
is right, wrong, missing or invented, and where its characters stand. `StructuredReward.credit` gives them as spans,
which `tokalign.stage.pieces.spans_to_tokens` turns into the completion's own tokens.

| component | characters | value |
|---|---|---|
| `value` | a value, its quotes included | its credit (`alignment`); without a reference 1 if it fits its schema |
| `key` | a name, its quotes and colon | 1 known to the reference (without one: to the schema), 0 invented |
| `missing` | the bracket that closes the object or array which lacks the value | 0 |
| `invented` | key and value, or the item, of what the reference does not have | 0 |
| `around` | text around the document | 0 |
| `broken` | from the place where reading broke off to the end | 0 |
| `document` | the whole text, where nothing finer can be told (`Credit.exact` is False) | total / best total |

What is in no span (brackets, commas, white space) is the document's form, which the scores judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Characters `start` to `end` (not included) of a completion's text, and what they earned.

    Attributes:
        pointer: JSON pointer in the reference; of what it does not have (and without a reference) in the document.
        component: see the top of this file.
        value: in [0, 1].
    """

    pointer: str
    start: int
    end: int
    component: str
    value: float


@dataclass(frozen=True)
class Credit:
    """What a completion earned, and by which characters.

    Attributes:
        spans: in the text that `documents.reading.text_of` gives.
        scores: what `StructuredReward.score` gives.
        exact: False where only the whole document can be credited: one span `document`.
    """

    spans: list[Span]
    scores: dict[str, Any]
    exact: bool = True
