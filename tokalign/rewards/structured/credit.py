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

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokalign.rewards.structured.alignment import Leaf, below
from tokalign.rewards.structured.documents.document import MISSING, Document, Limits, Part, Source
from tokalign.rewards.structured.documents.json import decode_json
from tokalign.rewards.structured.documents.places import Place, Places, places_of
from tokalign.rewards.structured.documents.reading import answer_of, text_of
from tokalign.rewards.structured.grading import Walk
from tokalign.rewards.structured.shapes import ANY, Shape, type_of

# What a tool call's JSON may say besides its one form: `documents.tool_calls` reads all of these as "/arguments".
_CALL = re.compile(r"((?:/\d+)?)(?:/function)?(?:/parameters(?=/|\Z)|(?=/arguments))")
_OPENS = re.compile(r"[\[{]")


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


def credit_of(
    completion: Source,
    document: Document,
    leaves: Sequence[Leaf] | None,
    scores: dict[str, Any],
    *,
    best: float,
    limits: Limits,
    reasoning_end: str | None = None,
    plain_only: bool = False,
) -> Credit:
    """Spans of a completion that has been read and scored.

    Args:
        completion: text, or messages.
        document: what was read of it.
        leaves: of its alignment with the reference (or `leaves_of_schema`); None if every value has full credit.
        scores: of the completion.
        best: highest total that it could have.
        limits: of its reading.
        reasoning_end: as the reward has it.
        plain_only: a Markdown fence is text around the document.
    """
    text, answer = text_of(completion), answer_of(completion, reasoning_end)
    begin = 0 if answer is None else len(text) - len(answer)
    if document.value is MISSING:
        at = 0 if answer is None else _fault_place(document, text, begin, limits)
        return Credit([Span("", at, len(text), "broken", 0.0)] if text[at:].strip() else [], scores)
    places = None if document.parts is None else _places(document.parts, text, begin, limits)
    if places is None:
        return whole_credit(text, scores, best)
    spans = [] if document.whole and not plain_only else _around(document, text, begin, places.end)
    if leaves is None:
        spans += [Span(pointer, start, end, "key", 1.0) for pointer, (start, end) in places.names.items()]
        spans += [Span(pointer, start, end, "value", 1.0) for pointer, (start, end) in places.leaves.items()]
        return Credit(spans, scores)
    # What an open container lacks is charged where it breaks off, and what no container lacks at the document's end.
    last = (places.end, len(text)) if document.broken and places.end < len(text) else (places.end - 1, places.end)
    return Credit(spans + _of_leaves(leaves, places, last), scores)


def whole_credit(text: str, scores: dict[str, Any], best: float) -> Credit:
    """One span over the whole text, with its share of the best total."""
    share = scores["total"] / best if best else 0.0
    return Credit([Span("", 0, len(text), "document", share)] if text else [], scores, exact=False)


def leaves_of_schema(shape: Shape, value: Any, walk: Walk) -> list[Leaf]:
    """Leaves of a document that has no reference: of each value whether it fits its place, by the walk of its grade.

    Of alternatives the one that fits best counts, as in the grade. Raises `TooManyValues`.
    """
    leaves: list[Leaf] = []
    _judge(walk, shape, value, "", leaves)
    return leaves


def _judge(walk: Walk, shape: Shape | None, value: Any, at: str, leaves: list[Leaf]) -> None:
    """Note the leaves of a part; without a shape it stands where nothing of its type may stand."""
    right = shape is not None and min(walk.grade(shape, value)) == 1.0
    if not value or type(value) not in (dict, list):
        leaves.append(Leaf(at, at, float(right), 1, "value"))
        return
    if right:
        shape = ANY  # so is all that it holds
    elif shape is not None:
        taken = walk.taken.get((id(shape), id(value)))
        if taken is not None or shape.options:
            best = taken or max(shape.options, key=lambda option: walk.grade(option, value))
            _judge(walk, best, value, at, leaves)
            return
        if shape.allowed is not None and type_of(value) not in shape.allowed:
            shape = None
    if type(value) is dict:
        for key, item in value.items():
            child = None if shape is None else shape.known(key) or (ANY if key in shape.required else None)
            if shape is not None and child is None:
                leaves.append(Leaf(below(at, key), below(at, key), 0.0, 1, "invented"))
            else:
                _judge(walk, child, item, below(at, key), leaves)
        lacking: Iterable[Any] = () if shape is None else [key for key in shape.required if key not in value]
    else:
        most = None if shape is None else shape.max_items
        for index, item in enumerate(value):
            if most is not None and index >= most:
                leaves.append(Leaf(below(at, index), below(at, index), 0.0, 1, "invented"))
            else:
                _judge(walk, None if shape is None else shape.item(index), item, below(at, index), leaves)
        lacking = () if shape is None else range(len(value), shape.min_items)
    leaves += [Leaf(below(at, key), None, 0.0, 1, "missing", at) for key in lacking]


# ------------------------------------------------------------------------------------------------------------- places


def _places(parts: Sequence[Part], text: str, begin: int, limits: Limits) -> Places | None:
    """Places of all parts together; None where pointers would be longer than the text can bear."""
    if len(parts) == 1:
        return places_of(text, begin + parts[0].start, begin + parts[0].end, limits, parts[0].pointer)
    all_of = Places({}, {}, {}, {}, 0)
    whole: dict[str, Place] = {}
    end = 0
    for pointer, start, stop, is_json in parts:
        end = max(end, begin + stop)
        if not is_json:
            (all_of.leaves if pointer.endswith("/name") else whole)[pointer] = (begin + start, begin + stop)
            continue
        places = places_of(text, begin + start, begin + stop, limits, pointer)
        if places is None:
            return None
        for found, more in zip(all_of[:4], places[:4], strict=True):
            found.update(more)
    for pointer, place in whole.items():
        all_of.containers.setdefault(pointer, place)
    return all_of._replace(end=end)


def in_one_form(places: Places) -> Places:
    """Places of tool calls by the pointers of the one form that all calls are read into."""

    def named(found: dict[str, Place]) -> dict[str, Place]:
        return {_CALL.sub(r"\1/arguments" if "/parameters" in p else r"\1", p, count=1): at for p, at in found.items()}

    return Places(*map(named, places[:4]), places.end)
