"""How far a document says what a reference says, leaf by leaf: the one definition that correctness and credit share.

A *leaf* is a scalar or an empty container, and the size n of a part of the reference is the number of its leaves. What
a document has of a part is its credit, in [0, n]:

- A scalar has 1 where type and value are equal (True is not 1, 1.0 is 1), and `MISTYPED` where one of the two is a
  string that spells the other (`"18"` for 18). With `text_match="tokens"`, two strings have the F1 over their words.
- Of two kinds (object, array, scalar), and of an empty container with a full one, nothing is right.
- An object has the sum over the keys that both have, times n / (n + keys that only the document has).
- An array has the sum over the pairs of the alignment that keeps the order and has the most credit (of several, one
  with the most pairs), times n / (n + surplus · m): the surplus is the number of items more than the reference has, m
  the mean size of the reference's items, at least 1. So an item inserted, dropped or moved costs about one item.
- Tool calls (`CallAligner`) pair in any order, and a call of another function has nothing.

The share credit / n of the whole is the reward's correctness. What is wrong has no credit, so leaving it out gains
nothing. What is invented takes from its own container alone, so each leaf put right raises the share, whatever else is
wrong; and repeats and enumerations gain no more than one guess.

Leaves that the schema itself fixes have weight 0: copying the schema is no answer. These are a required constant (or
enumeration of one value, or null) below no alternative; if they are all that there is, they count.

Time: the exact alignment costs rows × leaves of columns, and `_BUDGET` bounds the sum over a document. What is left of
longer lists is first cut at equal items and then paired in order, in linear time.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tokalign.rewards.structured.content import TextMatch, equal, token_f1
from tokalign.rewards.structured.shapes import Shape

MISTYPED = 0.5  # credit of a string that spells the right scalar, or of a scalar where its spelling is right
_BUDGET = 1 << 15  # steps of exact alignments in one document: some 10 ms
_CONTAINERS = (dict, list)

Fixed = dict[Any, Any] | Literal[True] | None
"""Leaves of weight 0: True is a whole part, a dict has such by key or index, None is a part without."""


class Alignment(NamedTuple):
    """What a document has of what the reference asks for, in leaves."""

    credit: float
    size: float

    @property
    def share(self) -> float:
        """Credit over size, in [0, 1]."""
        return self.credit / self.size if self.size else 1.0


@dataclass(slots=True)
class Leaf:
    """One leaf of an alignment; over all leaves, Σ weight = size and Σ credit · weight = credit.

    Attributes:
        pointer: JSON pointer in the reference, so that equal paths of a group compare; of what is invented, in the
            document.
        given: JSON pointer in the document of the value that stands for it; None if it is missing.
        credit: in [0, 1].
        weight: its part of the size: less than 1 in a container that holds something invented, and 0 for an item out
            of place, whose place is charged as missing.
        kind: "value" (right, wrong or of a wrong type), "missing", or "invented" (a key or item too many).
        parent: of what is missing, the document's pointer of the container that lacks it.
    """

    pointer: str
    given: str | None
    credit: float
    weight: float
    kind: Literal["value", "missing", "invented"]
    parent: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A parsed reference, ready to be aligned with; see `target_of`.

    Attributes:
        value: the reference.
        fixed: its leaves of weight 0.
        size: its size.
        plain: it holds no boolean, 0 or 1, which Python's own equality mistakes for one another.
        kind: what aligns documents with it.
    """

    value: Any
    fixed: Fixed
    size: float
    plain: bool
    kind: type[Aligner]


def target_of(reference: Any, shape: Shape | None = None, kind: type[Aligner] | None = None) -> Target:
    """Prepare a parsed reference under the shape of its schema; `kind` is `Aligner`, or how calls are aligned."""
    kind = kind or Aligner
    fixed = None if shape is None else kind.fixed_by(reference, shape)
    size = kind.size(reference, fixed)
    if not size:  # the schema leaves nothing open: then what it fixes is the answer
        fixed, size = None, kind.size(reference, None)
    return Target(reference, fixed, size, _is_plain(reference), kind)


def align(
    value: Any, target: Target, *, text_match: TextMatch = "exact", leaves: list[Leaf] | None = None
) -> Alignment:
    """Credit and size of a document against a reference; see the top of this file.

    Args:
        value: parsed document.
        target: of the reference.
        text_match: "exact", or "tokens" for the F1 over words of two strings (free text).
        leaves: a list to append the leaves to; None spares that work.
    """
    if leaves is None and (value == target.value if target.plain else equal(value, target.value)):
        return Alignment(target.size, target.size)
    return Alignment(target.kind(text_match, leaves).top(value, target.value, target.fixed), target.size)


def mistyped(value: Any, right: Any) -> bool:
    """Whether exactly one of two scalars is a string, and it spells the other as JSON does."""
    if type(value) is str:
        text, other = value, right
    elif type(right) is str:
        text, other = right, value
    else:
        return False
    text = text.strip()
    if other is None or isinstance(other, bool):
        return text.lower() == ("null" if other is None else str(other).lower())
    if not isinstance(other, int | float) or "_" in text:
        return False
    try:
        return (int(text) if text.lstrip("+-").isdigit() else float(text)) == other
    except ValueError:
        return False


def size_of(reference: Any, fixed: Fixed) -> float:
    """Leaves of a part of a reference, less those of weight 0."""
    if fixed is True:
        return 0
    if not reference or type(reference) not in _CONTAINERS:
        return 1
    items = reference.items() if type(reference) is dict else enumerate(reference)
    if fixed is None:
        return sum([size_of(item, None) if type(item) in _CONTAINERS else 1 for _, item in items])
    return sum([size_of(item, fixed.get(key)) for key, item in items])


def _is_plain(reference: Any) -> bool:
    if type(reference) is dict:
        return all(map(_is_plain, reference.values()))
    if type(reference) is list:
        return all(map(_is_plain, reference))
    return not (isinstance(reference, int | float) and reference in (0, 1))  # True and False among them


def _fixed(reference: Any, shape: Shape) -> Fixed:
    if shape.options or shape.chosen is not None:
        return None
    if shape.allowed == frozenset(("null",)):
        return True if reference is None else None
    if shape.constant and shape.bounds is not None and shape.bounds.is_valid(reference):
        return True
    # Where a part may be left out, that it is there says something: one of constants alone counts.
    found: dict[Any, Any] = {}
    if type(reference) is dict:
        for key, item in reference.items():
            child = shape.known(key)
            inner = None if child is None else _fixed(item, child)
            if inner is not None and (key in shape.required or size_of(item, inner)):
                found[key] = inner
    elif type(reference) is list and (shape.items is not None or shape.prefix):
        for index, item in enumerate(reference):
            inner = _fixed(item, shape.item(index))
            if inner is not None and (index < shape.min_items or size_of(item, inner)):
                found[index] = inner
    return found or None


def below_fixed(fixed: Fixed, key: Any) -> Fixed:
    """The leaves of weight 0 below a key or index."""
    return None if fixed is None or fixed is True else fixed.get(key)


def below(pointer: str | None, key: Any) -> str | None:
    """JSON pointer of a key or index of what a pointer names; None of None."""
    if pointer is None:
        return None
    return f"{pointer}/{key}" if type(key) is int else f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


# ------------------------------------------------------------------------------------------------------ the recursion

Score = Callable[[int, int], float]
Compare = Callable[[Any, Any, Fixed, str | None, str | None], float]


class Aligner:
    """One alignment. Its methods return credits; `at` and `given` are pointers, None where no leaves are wanted."""

    def __init__(self, text_match: TextMatch, leaves: list[Leaf] | None):
        self.words = text_match == "tokens"
        self.leaves = leaves
        self.left = _BUDGET

    @staticmethod
    def size(reference: Any, fixed: Fixed) -> float:
        """Size of a part of a reference."""
        return size_of(reference, fixed)

    @staticmethod
    def fixed_by(reference: Any, shape: Shape) -> Fixed:
        """Leaves of a reference that the schema of this shape fixes."""
        return _fixed(reference, shape)

    def top(self, value: Any, reference: Any, fixed: Fixed) -> float:
        """Credit of a whole document."""
        at = None if self.leaves is None else ""
        return self.pair(value, reference, fixed, at, at)

    def pair(self, value: Any, reference: Any, fixed: Fixed, at: str | None, given: str | None) -> float:
        """Credit of a value."""
        if fixed is True:
            return 0.0
        kind = type(reference)
        if kind not in _CONTAINERS or not reference:
            credit = self._leaf(value, reference)
            if at is not None:
                self.note(at, given, credit, "value")
            return credit
        if type(value) is kind and value:
            both = self._objects if kind is dict else self._arrays
            return both(value, reference, fixed, at, given)
        if at is not None:  # an empty container lacks all; a value of another kind stands in the place of all
            self.lost(reference, fixed, at, None if type(value) is kind else given, given)
        return 0.0

    def _leaf(self, value: Any, reference: Any) -> float:
        if equal(value, reference):
            return 1.0
        if type(value) is str and type(reference) is str:
            return token_f1(value, reference) if self.words else 0.0
        return MISTYPED if mistyped(value, reference) else 0.0

    def _objects(
        self, value: dict[str, Any], reference: dict[str, Any], fixed: Fixed, at: str | None, given: str | None
    ) -> float:
        begin = len(self.leaves or ())
        credit, invented = 0.0, 0
        # in the value's order: the order of a set of strings, and with it the last bit, differs between processes
        for key, item in value.items():
            if key in reference:
                credit += self.pair(item, reference[key], below_fixed(fixed, key), below(at, key), below(given, key))
            else:
                invented += 1
                if at is not None:
                    self.note(below(given, key), below(given, key), 0.0, "invented")
        if at is not None:
            for key, item in reference.items():
                if key not in value:
                    self.lost(item, below_fixed(fixed, key), below(at, key), None, given)
        return self.diluted(credit, size_of(reference, fixed), invented, begin) if invented else credit

    def _arrays(self, value: list[Any], reference: list[Any], fixed: Fixed, at: str | None, given: str | None) -> float:
        return self.listed(value, reference, fixed, at, given, self.pair)

    def listed(
        self,
        value: Sequence[Any],
        reference: Sequence[Any],
        fixed: Fixed,
        at: str | None,
        given: str | None,
        compare: Compare,
        in_order: bool = True,
    ) -> float:
        """Credit of a list of what `compare` compares, whose items may or may not come in any order."""
        begin = len(self.leaves or ())
        sizes = [self.size(item, below_fixed(fixed, column)) for column, item in enumerate(reference)]
        known: dict[tuple[int, int], float] = {}

        def scored(row: int, column: int) -> float:
            if (row, column) not in known:
                known[row, column] = compare(value[row], reference[column], below_fixed(fixed, column), None, None)
            return known[row, column]

        if in_order or not self.affords(value, sizes):
            found = self.in_order(value, reference, sizes, scored)
        else:
            found = _assigned([[scored(row, column) for column in range(len(sizes))] for row in range(len(value))])
        size = sum(sizes)
        invented = max(0, len(value) - len(sizes)) * max(1.0, size / len(sizes))
        if at is None:
            credit = sum([scored(row, column) for row, column in found], 0.0)
        else:
            credit = 0.0
            for row, column in found:
                inner = below_fixed(fixed, column)
                credit += compare(value[row], reference[column], inner, below(at, column), below(given, row))
            columns = {column for _, column in found}
            for column in range(len(sizes)):
                if column not in columns:
                    self.lost(reference[column], below_fixed(fixed, column), below(at, column), None, given)
            rows = {row for row, _ in found}
            for row in range(len(value)):
                if row not in rows:
                    weight = invented / (len(value) - len(rows))
                    self.note(below(given, row), below(given, row), 0.0, "invented", weight)
        return self.diluted(credit, size, invented, begin) if invented else credit

    def diluted(self, credit: float, size: float, invented: float, begin: int) -> float:
        """Credit of a part of this size less what the document invents in it; its leaves are those from `begin` on."""
        share = size / (size + invented)
        for leaf in self.leaves[begin:] if self.leaves else ():
            leaf.weight *= share
        return credit * share

    def lost(self, reference: Any, fixed: Fixed, at: str | None, given: str | None, parent: str | None) -> None:
        """Note the leaves of a part without credit: they stand at `given`, or are missing in `parent`."""
        if fixed is True:
            return
        if reference and type(reference) in _CONTAINERS:
            for key, item in reference.items() if type(reference) is dict else enumerate(reference):
                self.lost(item, below_fixed(fixed, key), below(at, key), given, parent)
        elif given is None:
            self.note(at, None, 0.0, "missing", 1, parent)
        else:
            self.note(at, given, 0.0, "value")

    def note(
        self, pointer: Any, given: str | None, credit: float, kind: Any, weight: float = 1, parent: Any = None
    ) -> None:
        """Append a leaf, where leaves are wanted."""
        if self.leaves is not None and pointer is not None:
            self.leaves.append(Leaf(pointer, given, credit, weight, kind, parent))

    # ---------------------------------------------------------------------------------------------------------- pairing

    def in_order(
        self, value: Sequence[Any], reference: Sequence[Any], sizes: Sequence[float], scored: Score
    ) -> list[tuple[int, int]]:
        """(row, column) pairs of the alignment that keeps the order."""
        # Equal items at either end belong together in some best alignment: whatever else one of them could be paired
        # with has no more credit. So most lists need no table.
        rows, columns = len(value), len(reference)
        start, end = 0, 0
        while start < min(rows, columns) and equal(value[start], reference[start]):
            start += 1
        while end < min(rows, columns) - start and equal(value[rows - 1 - end], reference[columns - 1 - end]):
            end += 1
        found = [(i, i) for i in range(start)]
        middle = (range(start, rows - end), range(start, columns - end))
        best = self._best(*middle, sizes, scored)
        if best is not None:
            found += best
        else:
            row, column = middle[0].start, middle[1].start
            for anchor in [*_anchors(value, reference, *middle), (rows - end, columns - end)]:
                part = (range(row, anchor[0]), range(column, anchor[1]))
                best = self._best(*part, sizes, scored)
                found += zip(*part, strict=False) if best is None else best
                found.append(anchor)
                row, column = anchor[0] + 1, anchor[1] + 1
            found.pop()
        return found + [(rows - i, columns - i) for i in range(end, 0, -1)]

    def _best(self, rows: range, columns: range, sizes: Sequence[float], scored: Score) -> list[tuple[int, int]] | None:
        """The exact alignment of two stretches; None where the budget does not allow it."""
        if not self.affords(rows, [sizes[column] for column in columns]):
            return None
        if not rows or not columns:
            return []
        table = [[scored(row, column) for column in columns] for row in rows]
        return [(rows[row], columns[column]) for row, column in _best_in_order(table)]

    def affords(self, rows: Sized, sizes: Sequence[float]) -> bool:
        """Whether the budget allows a table of these rows and of columns of these sizes, which it is then less by."""
        steps = len(rows) * (int(sum(sizes)) + len(sizes))
        if steps > self.left:
            return False
        self.left -= steps
        return True


class CallAligner(Aligner):
    """Of tool calls, one or a list of them on either side."""

    def top(self, value: Any, reference: Any, fixed: Fixed) -> float:
        at = None if self.leaves is None else ""
        several, wanted = type(value) is list, type(reference) is list
        if not several and not wanted:
            return self.call(value, reference, fixed, at, at)
        fixed = fixed if wanted or fixed is None else {0: fixed}
        given, reference = value if several else [value], reference if wanted else [reference]
        credit = self.listed(given, reference, fixed, at, at, self.call, in_order=False)
        for leaf in self.leaves or () if not (several and wanted) else ():  # the one call of a side stands in no list
            if not several and leaf.kind != "missing":
                leaf.given = "" if leaf.given is None else leaf.given.removeprefix("/0")
            if not several and leaf.parent is not None:
                leaf.parent = leaf.parent.removeprefix("/0")
            if leaf.kind == "invented":
                leaf.pointer = leaf.given or ""
            elif not wanted:
                leaf.pointer = leaf.pointer.removeprefix("/0")
        return credit

    def call(self, value: Any, reference: Any, fixed: Fixed, at: str | None, given: str | None) -> float:
        """Credit of a tool call."""
        if type(value) is dict and type(reference) is dict and not equal(value.get("name"), reference.get("name")):
            # another function: its arguments say nothing of this one's
            for key, item in reference.items() if at is not None else ():
                named = below(given, key) if key == "name" and key in value else None
                self.lost(item, below_fixed(fixed, key), below(at, key), named, given)
            return 0.0
        return self.pair(value, reference, fixed, at, given)


def _assigned(table: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(row, column) of the best pairing in any order."""
    from scipy.optimize import linear_sum_assignment  # only now: most references are one call

    rows, columns = linear_sum_assignment(table, maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def _best_in_order(table: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(row, column) of the best alignment that keeps the order: the dynamic programme of Needleman and Wunsch."""
    # A little for each pair, so that wrong items have a place too; a power of two, which keeps the sums exact.
    little = 2.0 ** -(min(len(table), len(table[0])).bit_length() + 12)
    # best[i][j]: of the first i rows and j columns
    best = [[0.0] * (len(table[0]) + 1)]
    for row in table:
        above, now, left = best[-1], [0.0], 0.0
        for j, credit in enumerate(row):
            left = max(above[j] + credit + little, above[j + 1], left)
            now.append(left)
        best.append(now)
    found: list[tuple[int, int]] = []
    i, j = len(table), len(table[0])
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


def _anchors(value: Sequence[Any], reference: Sequence[Any], rows: range, columns: range) -> list[tuple[int, int]]:
    """Pairs of equal items in order: the k-th of a kind with the k-th of that kind, as many as keep the order."""
    places: dict[str, list[int]] = defaultdict(list)
    for column in columns:
        places[_written(reference[column])].append(column)
    met: Counter[str] = Counter()
    tails: list[int] = []  # columns at which the longest increasing sequences of each length end
    ends: list[int] = []  # which pair that is
    pairs: list[tuple[int, int, int]] = []  # (row, column, the pair before it)
    for row in rows:
        text = _written(value[row])
        own, count = places.get(text, ()), met[text]
        met[text] += 1
        if count < len(own):
            length = bisect_left(tails, own[count])
            tails[length : length + 1] = [own[count]]
            ends[length : length + 1] = [len(pairs)]
            pairs.append((row, own[count], ends[length - 1] if length else -1))
    found: list[tuple[int, int]] = []
    last = ends[-1] if ends else -1
    while last >= 0:
        row, column, last = pairs[last]
        found.append((row, column))
    return found[::-1]


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
