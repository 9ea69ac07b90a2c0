"""Where the parts of a JSON document stand in its text: one pass beside the parser, which does not say.

The parser (`documents.json`) has read the text, so nothing is checked twice: a master regular expression cuts the text
into members (separator, name, colon, scalar or bracket), and each character is looked at a bounded number of times.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from tokalign.rewards.structured.documents.document import Limits

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_SPACE = r"[ \t\n\r]*+"
# Groups, which tile the text: separators; a key, its colon and the space behind it; then one of scalar, opening
# bracket, closing bracket, what is no JSON. No quantifier gives back what it took, so the cost is linear.
_MEMBER = re.compile(
    rf"([ \t\n\r,]*+)(?:({_STRING})({_SPACE}:)({_SPACE}))?"
    rf"(?:({_STRING}|[-+.\w]++)|([{{\[])|([}}\]])|(.++))",
    re.DOTALL,
)
_LONGEST = 1024  # characters of a container's pointer; longer ones, times their members, could fill the memory
_ITEMS, _EMPTY, _KEYS = 0, -1, -2  # what a container has: so many items (from 0 on), or keys, or none yet

Place = tuple[int, int]


class Places(NamedTuple):
    """Places (start, end) of a document's parts by JSON pointer, in the document's order.

    Attributes:
        names: of keys with quotes and colon, by the pointer of their value.
        leaves: of scalars and empty containers.
        containers: of the others, each behind what it holds.
        unclosed: of those that the text breaks off in, to the place where it does.
        end: where the document ends or breaks off.
    """

    names: dict[str, Place]
    leaves: dict[str, Place]
    containers: dict[str, Place]
    unclosed: dict[str, Place]
    end: int


def places_of(text: str, start: int, end: int, limits: Limits, root: str = "") -> Places | None:
    """Places in the one document, or the beginning of one, that stands in `text[start:end]`.

    It ends before the first thing that cannot stand there: the rest of a broken document, a repeated key. None if a key
    is so long that the pointers would be much longer than the text. `root` is the pointer of the document itself.
    """
    names: dict[str, Place] = {}
    leaves: dict[str, Place] = {}
    containers: dict[str, Place] = {}
    around: list[tuple[str, int, int]] = []  # containers around the present one: pointer, start, and what they have
    at, begin, has = "", -1, _ITEMS
    last = position = start
    # All members in one call, and their places by adding up lengths: half the time of asking each match for its own.
    for before, key, colon, space, scalar, opening, closing, _ in _MEMBER.findall(text, start, end):
        position += len(before)
        if closing:
            if not around or (closing == "}") is not (has < 0) or key:
                break
            last = position = position + 1
            (leaves if has in (_ITEMS, _EMPTY) else containers)[at] = (begin, last)
            at, begin, has = around.pop()
            if not around:
                break
            continue
        if key:
            if has >= 0:
                break
            try:
                name = json.loads(key) if "\\" in key else key[1:-1]
            except json.JSONDecodeError:
                break
            if "/" in name or "~" in name:
                name = name.replace("~", "~0").replace("/", "~1")
            pointer = f"{at}/{name}"
            if pointer in names:
                break
            named = position + len(key) + len(colon)
            names[pointer] = (position, named)
            position = named + len(space)
            has = _KEYS
        elif has < 0:
            break
        elif around:
            pointer = f"{at}/{has}"
            has += 1
        else:
            pointer = root
        if scalar:
            last = position + len(scalar)
            leaves[pointer] = (position, last)
            position = last
            if not around:
                break
        elif opening:
            if len(around) >= limits.max_depth:
                break
            if len(pointer) > _LONGEST:
                return None
            around.append((at, begin, has))
            at, begin, has = pointer, position, _EMPTY if opening == "{" else _ITEMS
            last = position = position + 1
        else:
            break
    unclosed = {pointer: (begin, last) for pointer, begin, _ in [*around, (at, begin, has)][1:]} if around else {}
    return Places(names, leaves, containers, unclosed, last)
