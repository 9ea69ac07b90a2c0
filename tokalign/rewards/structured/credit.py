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
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tokalign.rewards.structured.alignment import Aligner, Leaf, Target, below
from tokalign.rewards.structured.content import equal
from tokalign.rewards.structured.documents.document import MISSING, Document, Fault, Limits, Part, Source
from tokalign.rewards.structured.documents.json import check_limits, decode_json
from tokalign.rewards.structured.documents.places import Place, Places, places_of
from tokalign.rewards.structured.documents.reading import answer_of, text_of
from tokalign.rewards.structured.grading import TooManyValues, Walk
from tokalign.rewards.structured.shapes import ANY, Shape, type_of

# What a tool call's JSON may say besides its one form: `documents.tool_calls` reads all of these as "/arguments".
_CALL = re.compile(r"((?:/\d+)?)(?:/function(?=/))?(/parameters(?=/|\Z))?")
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


def is_all_right(document: Document, targets: Sequence[Target]) -> bool:
    """Whether a document is so equal to its reference that each value has full credit, and under its own pointer."""
    if len(targets) != 1 or document.broken or document.value is MISSING:
        return False
    part, kind = targets[0]
    same = document.value == part.value if part.plain else equal(document.value, part.value)
    return same and kind is Aligner and _count(part.value) == part.size  # else the schema fixes some, which say nothing


def _count(value: Any) -> int:
    """Leaves of a value."""
    if not value or type(value) not in (dict, list):
        return 1
    return sum([_count(item) for item in (value.values() if type(value) is dict else value)])


def credit_of(
    completion: Source,
    document: Document,
    judged: list[Leaf] | Shape | None,
    scores: dict[str, Any],
    *,
    best: float,
    limits: Limits,
    reasoning_end: str | None = None,
    plain_only: bool = False,
    calls: bool = False,
) -> Credit:
    """Spans of a completion that has been read and scored.

    Args:
        completion: text, or messages.
        document: what was read of it.
        judged: leaves of its alignment with the reference; without one the shape of its schema; None if every value has
            full credit.
        scores: of the completion.
        best: highest total that it could have.
        limits: of its reading.
        reasoning_end: as the reward has it.
        plain_only: a Markdown fence is text around the document.
        calls: the document is made of tool calls.
    """
    text, answer = text_of(completion), answer_of(completion, reasoning_end)
    begin = 0 if answer is None else len(text) - len(answer)
    if document.value is MISSING:
        return Credit(_broken(text, 0 if answer is None else _fault_place(document, text, begin, limits)), scores)
    places = None if document.parts is None else _places(document.parts, text, begin, limits)
    if places is None:
        return whole_credit(text, scores, best)
    if calls:
        places = _in_one_form(places)
    spans = [] if document.whole and not plain_only else _around(document, text, begin, places.end)
    leaves = judged if isinstance(judged, list) else []
    if isinstance(judged, Shape):
        try:
            leaves = faults_of_schema(judged, document.value, limits.max_values)
        except (TooManyValues, RecursionError):
            judged = []
    if judged == []:  # never aligned: a document of more values than may be visited
        return Credit(_broken(text, begin), scores)
    # What an open container lacks is charged where it breaks off, and what no container lacks at the document's end.
    last = (places.end, len(text)) if document.broken and places.end < len(text) else (places.end - 1, places.end)
    return Credit(spans + _spans(leaves, places, last, others_right=not isinstance(judged, list)), scores)


def whole_credit(text: str, scores: dict[str, Any], best: float) -> Credit:
    """One span over the whole text, with its share of the best total."""
    share = scores["total"] / best if best else 0.0
    return Credit([Span("", 0, len(text), "document", share)] if text else [], scores, exact=False)


def faults_of_schema(shape: Shape, value: Any, max_values: int) -> list[Leaf]:
    """Leaves that the schema faults in a document without a reference: values that do not fit, missing, invented.

    Of alternatives the one that fits best counts, as in the grade. Raises `TooManyValues`.
    """
    faults: list[Leaf] = []
    _judge(Walk(max_values), shape, value, "", faults)
    return faults


def _judge(walk: Walk, shape: Shape | None, value: Any, at: str, faults: list[Leaf]) -> None:
    """Note the faults of a part; without a shape it stands where nothing of its type may stand."""
    if shape is not None and min(walk.grade(shape, value)) == 1.0:
        return
    if not value or type(value) not in (dict, list):
        faults.append(Leaf(at, at, 0.0, 1, "value"))
        return
    if shape is not None:
        taken = walk.taken.get((id(shape), id(value)))
        if taken is not None or shape.options:
            best = taken or max(shape.options, key=lambda option: walk.grade(option, value))
            _judge(walk, best, value, at, faults)
            return
        if shape.allowed is not None and type_of(value) not in shape.allowed:
            shape = None
    for key, item in value.items() if type(value) is dict else enumerate(value):
        child = None if shape is None else _child(shape, key)
        if child is None and shape is not None:
            faults.append(Leaf(_at(at, key), _at(at, key), 0.0, 1, "invented"))
        else:
            _judge(walk, child, item, _at(at, key), faults)
    if shape is not None and type(value) is dict:
        faults += [Leaf(_at(at, key), None, 0.0, 1, "missing", at) for key in shape.required if key not in value]
    elif shape is not None and len(value) < shape.min_items:  # one leaf, however many items are missing
        faults.append(Leaf(_at(at, len(value)), None, 0.0, 1, "missing", at))


def _child(shape: Shape, key: Any) -> Shape | None:
    """Shape of a key or item, None for one too many."""
    if type(key) is int:
        return None if shape.max_items is not None and key >= shape.max_items else shape.item(key)
    return shape.known(key) or (ANY if key in shape.required else None)


def _at(pointer: str, key: Any) -> str:
    return str(below(pointer, key))


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


def _in_one_form(places: Places) -> Places:
    """Places of tool calls by the pointers of the one form that all calls are read into."""

    def named(found: dict[str, Place]) -> dict[str, Place]:
        return {_CALL.sub(_in_call, pointer, count=1): place for pointer, place in found.items()}

    names, leaves, containers, unclosed, end = places
    return Places(named(names), named(leaves), named(containers), named(unclosed), end)


def _in_call(match: re.Match[str]) -> str:
    return match[1] + ("/arguments" if match[2] else "")


def _broken(text: str, at: int) -> list[Span]:
    return [Span("", at, len(text), "broken", 0.0)] if text[at:].strip() else []


def _around(document: Document, text: str, begin: int, end: int) -> list[Span]:
    """The text before, between and behind the parts, or from where the document broke off to the end of the text."""
    if document.whole and not document.fenced:
        return []
    spans: list[Span] = []
    for start, stop in sorted((begin + part.start, begin + part.end) for part in document.parts or ()):
        if text[begin:start].strip():
            spans.append(Span("", begin, start, "around", 0.0))
        begin = max(begin, stop)
    if document.broken:
        return spans + _broken(text, end)
    return spans + ([Span("", end, len(text), "around", 0.0)] if text[end:].strip() else [])


_span = partial(tuple.__new__, Span)  # in half the time of `Span(…)`, and a document has two a value


def _spans(leaves: Sequence[Leaf], places: Places, last: Place, *, others_right: bool) -> list[Span]:
    """Spans of values, of what is missing or invented, and of the keys.

    Args:
        leaves: those that are known.
        places: of the document.
        last: of what no closed container lacks.
        others_right: values that are not among the leaves have full credit; otherwise they have no span.
    """
    names, own, holding, unclosed, _ = places
    spans: list[tuple[Any, ...]] = []
    invented: list[Place] = []
    for pointer, given, credit, _, kind, parent in leaves:
        if given is None:
            start, end = _closing(places, parent or "", last)
        elif given in own:
            start, end = own[given]
        else:
            start, end = holding.get(given) or unclosed.get(given) or _nearest(places, given) or last
        if kind == "invented":
            start = names[given][0] if given in names else start
            invented.append((start, end))
        spans.append((pointer, start, end, kind, credit))
    invented.sort()
    if others_right:
        wrong = {leaf.given for leaf in leaves}
        spans += [
            (pointer, start, end, "value", 1.0)
            for pointer, (start, end) in own.items()
            if pointer not in wrong and not (invented and _within(invented, start))
        ]
    for pointer, (start, end) in names.items():
        value = 0.0 if invented and _within(invented, start) else 1.0
        spans.append((pointer, start, end, "key", value))
    return [*map(_span, spans)]


def _within(places: Sequence[Place], position: int) -> bool:
    """Whether a position is in one of some sorted places, none of which lies within another."""
    before = bisect_right(places, (position, sys.maxsize)) - 1
    return before >= 0 and position < places[before][1]


def _nearest(places: Places, pointer: str) -> Place | None:
    """Place of the innermost part around a value without one of its own, as in arguments that are JSON in a string."""
    for above in _above(pointer):
        place = places.leaves.get(above) or places.containers.get(above) or places.unclosed.get(above)
        if place is not None:
            return place
    return None


def _closing(places: Places, pointer: str, last: Place) -> Place:
    """The bracket that closes a container, or the innermost one around it that is closed."""
    for above in (pointer, *_above(pointer)):
        place = places.containers.get(above) or places.leaves.get(above)
        if place is not None:
            return place[1] - 1, place[1]
        if above in places.unclosed:
            break
    return last


def _above(pointer: str) -> Iterator[str]:
    while pointer:
        pointer = pointer.rpartition("/")[0]
        yield pointer


def _fault_place(document: Document, text: str, begin: int, limits: Limits) -> int:
    """Where the text of a completion that is no document begins to be none; all of it where nobody can tell."""
    if document.parts:
        return begin + document.parts[0].end
    opening = _OPENS.search(text, begin)
    if len(text) > limits.max_bytes or opening is None:
        return begin
    try:
        check_limits(text[opening.start() :], limits)
    except Fault:
        return begin  # too deep, or too many values: nothing that has one place
    places = places_of(text, opening.start(), len(text), limits)
    if places is None:
        return begin
    for start, end in places.leaves.values():  # a number out of range, NaN, a lone surrogate
        try:
            decode_json(text[start:end])
        except ValueError:
            return start
    return places.end if places.unclosed else begin  # a repeated key
