"""How far a document says what a reference says, leaf by leaf: the one definition that correctness and credit share.

A *leaf* is a scalar or an empty container. A pair of values has a credit and a size, and the share credit / size:

- Scalars have size 1, and credit 1 where type and value are equal (True is not 1, 1.0 is 1). A string that spells the
  scalar, or the other way round (`"18"` for 18), has `MISTYPED`. With `text_match="tokens"`, two strings have the F1
  over their words.
- Values of two kinds (object, array, scalar), and an empty container for a full one or the reverse, have credit 0 and
  the reference's size.
- An object sums over the keys of either side. A key that only the reference has adds its size; one that only the
  document has adds 1.
- An array sums over the pairs of the alignment that keeps the order and has the most credit (of several the one with
  the most pairs, then the least size), and over the reference's items that are in no pair. Each item that the document
  has more than the reference adds the mean size of the reference's items, at least 1. So an item inserted, dropped or
  moved costs about one item, and repeats and enumerations never pay.
- Tool calls (`CallAligner`) pair in any order, and a call of another function has no credit at all.

Leaves that the schema itself fixes have weight 0: copying the schema is no answer. These are a required constant (or
enumeration of one value, or null) below no alternative; if they are all that there is, they count.

A leaf put right raises the credit of the best alignment by as much as that of any other, so it raises the share.

Time: the exact alignment costs rows × leaves of columns, and `_BUDGET` bounds the sum over a document. What is left of
longer lists is first cut at equal items and then paired in order, in linear time.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of an alignment; over all leaves, Σ weight = size and Σ credit · weight = credit.

    Attributes:
        pointer: JSON pointer in the reference, so that equal paths of a group compare; of what is invented, in the
            document.
        given: JSON pointer in the document of the value that stands for it; None if it is missing.
        credit: in [0, 1].
        weight: its part of the size; 0 for an item out of place whose place is charged as missing.
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
    return Alignment(*target.kind(text_match, leaves).top(value, target.value, target.fixed))


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

Pair = tuple[float, float]


class Aligner:
    """One alignment; `at` and `given` are the pointers in reference and document, None where no leaves are wanted."""

    def __init__(self, text_match: TextMatch, leaves: list[Leaf] | None):
        self.words = text_match == "tokens"
        self.leaves = leaves
        self.left = _BUDGET

    @staticmethod
    def size(reference: Any, fixed: Fixed) -> float:
        """Size of a part of a reference, its missing leaves of weight 0 aside."""
        return size_of(reference, fixed)

    @staticmethod
    def fixed_by(reference: Any, shape: Shape) -> Fixed:
        """Leaves of a reference that the schema of this shape fixes."""
        return _fixed(reference, shape)

    def top(self, value: Any, reference: Any, fixed: Fixed) -> Pair:
        """(credit, size) of a whole document."""
        at = None if self.leaves is None else ""
        return self.pair(value, reference, fixed, at, at)

    def pair(self, value: Any, reference: Any, fixed: Fixed, at: str | None, given: str | None) -> Pair:
        """(credit, size) of a value."""
        if fixed is True:
            return 0.0, 0
        kind = type(reference)
        if kind in _CONTAINERS and reference:
            if type(value) is kind and value:
                both = self.objects if kind is dict else self.arrays
                return both(value, reference, fixed, at, given)
            # an empty container lacks all; a value of another kind stands in the place of all
            empty = type(value) is kind
            return 0.0, self.lost(reference, fixed, at, None if empty else given, given)
        credit = self.scalar(value, reference)
        if at is not None:
            self.note(at, given, credit, 1, "value")
        return credit, 1

    def scalar(self, value: Any, reference: Any) -> float:
        """Credit of a leaf."""
        if equal(value, reference):
            return 1.0
        if type(value) is str and type(reference) is str:
            return token_f1(value, reference) if self.words else 0.0
        return MISTYPED if mistyped(value, reference) else 0.0

    def objects(
        self, value: dict[str, Any], reference: dict[str, Any], fixed: Fixed, at: str | None, given: str | None
    ) -> Pair:
        """(credit, size) of two objects with keys."""
        credit: float = 0.0
        size: float = 0
        common = 0
        for key, item in value.items():
            if key in reference:
                common += 1
                own, whole = self.pair(item, reference[key], below_fixed(fixed, key), below(at, key), below(given, key))
                credit += own
                size += whole
            else:
                size += 1
                if at is not None:
                    self.note(below(given, key), below(given, key), 0.0, 1, "invented")
        if common < len(reference):
            for key, item in reference.items():
                if key not in value:
                    size += self.lost(item, below_fixed(fixed, key), below(at, key), None, given)
        return credit, size

    def arrays(
        self,
        value: list[Any],
        reference: list[Any],
        fixed: Fixed,
        at: str | None,
        given: str | None,
    ) -> Pair:
        """(credit, size) of two arrays with items."""
        return self.listed(value, reference, fixed, at, given, self.pair, ordered=True)

    def listed(
        self,
        value: Sequence[Any],
        reference: Sequence[Any],
        fixed: Fixed,
        at: str | None,
        given: str | None,
        pair: Callable[[Any, Any, Fixed, str | None, str | None], Pair],
        ordered: bool,
    ) -> Pair:
        """(credit, size) of two lists of what `pair` compares."""
        known: dict[tuple[int, int], Pair] = {}

        def scored(row: int, column: int) -> Pair:
            if (row, column) not in known:
                known[row, column] = pair(value[row], reference[column], below_fixed(fixed, column), None, None)
            return known[row, column]

        sizes = [self.size(item, below_fixed(fixed, column)) for column, item in enumerate(reference)]
        steps = len(value) * (sum(sizes) + len(sizes))
        if not ordered and steps <= self.left:
            self.left -= int(steps)
            found = assigned([[scored(row, column) for column in range(len(reference))] for row in range(len(value))])
        else:
            found = self.ordered(value, reference, sizes, scored)
        credit: float = 0.0
        size: float = 0
        for row, column in found:
            if at is None:
                own, whole = scored(row, column)
            else:
                own, whole = pair(
                    value[row], reference[column], below_fixed(fixed, column), below(at, column), below(given, row)
                )
            credit += own
            size += whole
        surplus = len(value) - len(reference)
        mean = max(1.0, sum(sizes) / len(sizes))
        if surplus > 0:
            size += surplus * mean
        if len(found) < len(reference):
            taken = {column for _, column in found}
            for column, item in enumerate(reference):
                if column not in taken:
                    size += self.lost(item, below_fixed(fixed, column), below(at, column), None, given)
        if at is not None and len(found) < len(value):
            taken = {row for row, _ in found}
            weight = max(0, surplus) * mean / (len(value) - len(found))
            for row in range(len(value)):
                if row not in taken:
                    self.note(below(given, row), below(given, row), 0.0, weight, "invented")
        return credit, size

    def lost(self, reference: Any, fixed: Fixed, at: str | None, given: str | None, parent: str | None) -> float:
        """Size of a part of the reference without credit; each leaf stands at `given`, or is missing in `parent`."""
        if at is None or fixed is True:
            return size_of(reference, fixed)
        if reference and type(reference) in _CONTAINERS:
            items = reference.items() if type(reference) is dict else enumerate(reference)
            return sum([self.lost(item, below_fixed(fixed, key), below(at, key), given, parent) for key, item in items])
        if given is None:
            self.note(at, None, 0.0, 1, "missing", parent)
        else:
            self.note(at, given, 0.0, 1, "value")
        return 1

    def note(self, pointer: Any, *rest: Any) -> None:
        """Append a leaf, where leaves are wanted."""
        if self.leaves is not None:
            self.leaves.append(Leaf(pointer, *rest))

    # ---------------------------------------------------------------------------------------------------------- arrays

    def ordered(
        self,
        value: list[Any],
        reference: list[Any],
        sizes: Sequence[float],
        scored: Callable[[int, int], Pair],
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
        found += self.between(value, reference, sizes, scored, (start, rows - end), (start, columns - end), True)
        return found + [(rows - i, columns - i) for i in range(end, 0, -1)]

    def between(
        self,
        value: list[Any],
        reference: list[Any],
        sizes: Sequence[float],
        scored: Callable[[int, int], Pair],
        rows: tuple[int, int],
        columns: tuple[int, int],
        cut: bool,
    ) -> list[tuple[int, int]]:
        """The same of two stretches [begin, end): exact within the budget, else cut at equal items or in order."""
        many, few = rows[1] - rows[0], columns[1] - columns[0]
        if not many or not few:
            return []
        if many == few == 1:
            return [(rows[0], columns[0])]
        steps = many * (sum(sizes[columns[0] : columns[1]]) + few)
        if steps <= self.left:
            self.left -= int(steps)
            table = [[scored(row, column) for column in range(*columns)] for row in range(*rows)]
            return [(rows[0] + row, columns[0] + column) for row, column in _best_in_order(table)]
        if not cut:
            return list(zip(range(*rows), range(*columns), strict=False))
        found: list[tuple[int, int]] = []
        row, column = rows[0], columns[0]
        for anchor in [*_anchors(value, reference, rows, columns), (rows[1], columns[1])]:
            found += self.between(value, reference, sizes, scored, (row, anchor[0]), (column, anchor[1]), False)
            if anchor[0] < rows[1]:
                found.append(anchor)
            row, column = anchor[0] + 1, anchor[1] + 1
        return found


class CallAligner(Aligner):
    """Of tool calls, one or a list of them on either side."""

    def top(self, value: Any, reference: Any, fixed: Fixed) -> Pair:
        at = None if self.leaves is None else ""
        several, wanted = type(value) is list, type(reference) is list
        if not several and not wanted:
            return self.call(value, reference, fixed, at, at)
        fixed = fixed if wanted or fixed is None else {0: fixed}
        pair = self.listed(
            value if several else [value], reference if wanted else [reference], fixed, at, at, self.call, ordered=False
        )
        if self.leaves is not None and not (several and wanted):  # the one call of a side stands in no list
            self.leaves[:] = [_unlisted(leaf, several, wanted) for leaf in self.leaves]
        return pair

    def call(self, value: Any, reference: Any, fixed: Fixed, at: str | None, given: str | None) -> Pair:
        """(credit, size) of two tool calls."""
        if type(value) is dict and type(reference) is dict and not equal(value.get("name"), reference.get("name")):
            # another function: its arguments say nothing of this one's
            size: float = 0
            for key, item in reference.items():
                named = below(given, key) if key == "name" and key in value else None
                size += self.lost(item, below_fixed(fixed, key), below(at, key), named, given)
            return 0.0, size
        return self.pair(value, reference, fixed, at, given)


def _unlisted(leaf: Leaf, several: bool, wanted: bool) -> Leaf:
    given, parent = leaf.given, leaf.parent
    if not several:
        given, parent = given and given.removeprefix("/0"), parent and parent.removeprefix("/0")
    pointer = leaf.pointer if wanted or leaf.kind == "invented" else leaf.pointer.removeprefix("/0")
    return replace(leaf, pointer=pointer, given=given, parent=parent)


def _scores(table: Sequence[Sequence[Pair]]) -> list[list[float]]:
    """One number a pair, by whose sum alignments are ordered: by credit, then number of pairs, then least size."""
    # A pair's size is that of the reference's item and what the document invents in it; only the latter depends on the
    # row, so the least of a column is taken off. Powers of two keep the sums exact.
    least = [min(column) for column in zip(*[[size for _, size in row] for row in table], strict=True)]
    excess = max(size - least[j] for row in table for j, (_, size) in enumerate(row))
    pairs = min(len(table), len(least))
    one = 2.0 ** -(pairs.bit_length() + 2)
    small = one * 2.0 ** -(int(excess * pairs).bit_length() + 1)
    return [[credit + one - small * (size - least[j]) for j, (credit, size) in enumerate(row)] for row in table]


def assigned(table: Sequence[Sequence[Pair]]) -> list[tuple[int, int]]:
    """(row, column) of the best pairing in any order, by row."""
    from scipy.optimize import linear_sum_assignment  # only now: most references are one call

    rows, columns = linear_sum_assignment(_scores(table), maximize=True)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def _best_in_order(table: Sequence[Sequence[Pair]]) -> list[tuple[int, int]]:
    """(row, column) of the best alignment that keeps the order: the dynamic programme of Needleman and Wunsch."""
    scores = _scores(table)
    # best[i][j]: of the first i rows and j columns
    best = [[0.0] * (len(scores[0]) + 1)]
    for row in scores:
        above, now, left = best[-1], [0.0], 0.0
        for j, score in enumerate(row):
            left = max(above[j] + score, above[j + 1], left)
            now.append(left)
        best.append(now)
    found: list[tuple[int, int]] = []
    i, j = len(scores), len(scores[0])
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found[::-1]


def _anchors(
    value: list[Any], reference: list[Any], rows: tuple[int, int], columns: tuple[int, int]
) -> list[tuple[int, int]]:
    """Pairs of equal items in order: the k-th of a kind with the k-th of that kind, as many as keep the order."""
    places: dict[str, list[int]] = defaultdict(list)
    for column in range(*columns):
        places[_written(reference[column])].append(column)
    met: Counter[str] = Counter()
    tails: list[int] = []  # columns at which the longest increasing sequences of each length end
    ends: list[int] = []  # which pair that is
    pairs: list[tuple[int, int, int]] = []  # (row, column, the pair before it)
    for row in range(*rows):
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
