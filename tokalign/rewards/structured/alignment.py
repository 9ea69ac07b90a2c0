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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tokalign.rewards.structured.content import TextMatch, equal, token_f1
from tokalign.rewards.structured.shapes import Shape

MISTYPED = 0.5  # credit of a string that spells the right scalar, or of a scalar where its spelling is right
_BUDGET = 1 << 15  # steps of exact alignments in one document: some 10 ms
_COLUMNS = 256  # of an index of records
_CONTAINERS = (dict, list)


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


@dataclass(slots=True, eq=False)
class Part:
    """A part of a reference, made ready once for all completions that are aligned with it.

    Attributes:
        value: of the reference.
        size: its leaves, less those that the schema fixes.
        plain: it holds no boolean, 0 or 1, which Python's own equality mistakes for one another.
        keys, items: parts of an object, of an array; None of a leaf, and of what the schema fixes.
        records: index of an array of records.
    """

    value: Any
    size: int
    plain: bool
    keys: dict[str, Part] | None = None
    items: list[Part] | None = None
    records: _Records | None = None


class Target(NamedTuple):
    """A reference made ready, and what aligns documents with it."""

    part: Part
    kind: type[Aligner]

    @property
    def value(self) -> Any:
        """The parsed reference."""
        return self.part.value


def target_of(reference: Any, shape: Shape | None = None, kind: type[Aligner] | None = None) -> Target:
    """Prepare a parsed reference under the shape of its schema; `kind` is `Aligner`, or how calls are aligned."""
    kind = kind or Aligner
    part = kind.part(reference, shape)
    return Target(part if part.size else kind.part(reference, None), kind)


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
    size = target.part.size
    aligner = target.kind(text_match, leaves)
    if leaves is None and aligner.same(value, target.part):
        return Alignment(size, size)
    return Alignment(aligner.top(value, target.part), size)


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


def below(pointer: str | None, key: Any) -> str | None:
    """JSON pointer of a key or index of what a pointer names; None of None."""
    if pointer is None:
        return None
    return f"{pointer}/{key}" if type(key) is int else f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def _part(reference: Any, shape: Shape | None) -> Part:
    """A part of a reference under its shape; None counts all leaves."""
    if shape is not None and (shape.options or shape.chosen is not None):
        shape = None  # with another alternative the constant would be another
    if type(reference) not in _CONTAINERS:
        part = Part(reference, 1, not (isinstance(reference, int | float) and reference in (0, 1)))
    elif not reference:
        part = Part(reference, 1, True)
    elif type(reference) is dict:
        keys: dict[str, Part] = {}
        for key, item in reference.items():
            child = None if shape is None else shape.known(key)
            keys[key] = _part(item, child)
            # Where a part may be left out, that it is there says something: one of constants alone counts.
            if not keys[key].size and (shape is None or key not in shape.required):
                keys[key] = _part(item, None)
        part = Part(reference, sum([one.size for one in keys.values()]), all(one.plain for one in keys.values()), keys)
    else:
        typed = shape is not None and (shape.items is not None or shape.prefix)
        items: list[Part] = []
        for index, item in enumerate(reference):
            items.append(_part(item, shape.item(index) if shape is not None and typed else None))
            if not items[-1].size and (shape is None or index >= shape.min_items):
                items[-1] = _part(item, None)
        plain = all(one.plain for one in items)
        part = Part(reference, sum([one.size for one in items]), plain, None, items, _Records.of(items, plain))
    if shape is not None and (
        (shape.allowed == _NULL and reference is None)
        or (shape.constant and shape.bounds is not None and shape.bounds.is_valid(reference))
    ):
        return Part(reference, 0, part.plain)
    return part


_NULL = frozenset(("null",))


class _Records:
    """Index of an array of scalars, or of objects of scalars that all have the same keys and strings at the same ones.

    It gives the credits of an item against many of the array's at once, as `Aligner.pair` gives them one by one.
    """

    @classmethod
    def of(cls, items: Sequence[Part], plain: bool) -> _Records | None:
        """The index; None of other arrays."""
        named = items[0].keys is not None
        found = None
        for item in items if len(items) <= _COLUMNS else ():
            if (item.keys is not None) is not named or (not named and type(item.value) in _CONTAINERS):
                return None
            row = item.value if named else {"": item.value}
            parts = item.keys if named else {"": item}
            own = {key: (type(value) is str, parts[key].size) for key, value in row.items()}
            if any(type(value) in _CONTAINERS for value in row.values()) or (found is not None and own != found):
                return None
            found = own
        return None if found is None else cls(items, found, plain)

    def __init__(self, items: Sequence[Part], keys: dict[str, tuple[bool, int]], plain: bool):
        self.named, self.plain = items[0].keys is not None, plain
        self.size = items[0].size
        self.strings = {key: string for key, (string, _) in keys.items()}
        self.rows = [item.value if self.named else {"": item.value} for item in items]
        # The columns in which a value stands, each a digit of one number: adding these numbers counts the equal values
        # in all columns at once.
        self.places: dict[Any, int] = defaultdict(int)
        self.weighed = [key for key, (_, size) in keys.items() if size]
        for column, row in enumerate(self.rows):
            for key in self.weighed:
                self.places[self._token(key, row[key])] += 1 << (column << 4)

    def _token(self, key: str, value: Any) -> Any:
        return (key, value) if self.plain else (key, value, type(value) is bool)

    def credits(self, value: Any, columns: range) -> list[float] | None:
        """Credits of an item against these columns; None of one that is no such record."""
        if (type(value) is dict) is not self.named or (not self.named and type(value) is list):
            return None
        row, places, strings = value if self.named else {"": value}, self.places, self.strings
        counts, odd = 0, []
        try:
            for key, item in row.items():
                counts += places.get((key, item) if self.plain else (key, item, type(item) is bool), 0)
                if (type(item) is str) is not strings.get(key):
                    odd.append(key)
        except TypeError:  # it holds containers
            return None
        credits: list[float] = [counts >> (column << 4) & 0xFFFF for column in columns]
        invented = 0
        for key in odd:
            if key not in strings:
                invented += 1
            elif key in self.weighed:
                for index, column in enumerate(columns):
                    credits[index] += MISTYPED * mistyped(row[key], self.rows[column][key])
        if invented:
            share = self.size / (self.size + invented)
            credits = [credit * share for credit in credits]
        return credits


# ------------------------------------------------------------------------------------------------------ the recursion

Compare = Callable[[Any, Part, str | None, str | None], float]
Found = list[tuple[int, int, float]]  # (item of the document, item of the reference, credit)


class Aligner:
    """One alignment. Its methods return credits; `at` and `given` are pointers, None where no leaves are wanted."""

    def __init__(self, text_match: TextMatch, leaves: list[Leaf] | None):
        self.words = text_match == "tokens"
        self.leaves = leaves
        self.left = _BUDGET

    @staticmethod
    def part(reference: Any, shape: Shape | None) -> Part:
        """A reference made ready under the shape of its schema; None counts what it fixes."""
        return _part(reference, shape)

    @staticmethod
    def same(value: Any, part: Part) -> bool:
        """Whether a value is surely all that the part asks for."""
        return bool(value == part.value) if part.plain else equal(value, part.value)

    def top(self, value: Any, part: Part) -> float:
        """Credit of a whole document."""
        at = None if self.leaves is None else ""
        return self.pair(value, part, at, at)

    def pair(self, value: Any, part: Part, at: str | None, given: str | None) -> float:
        """Credit of a value."""
        if not part.size:
            return 0.0
        full = part.keys or part.items
        if not full:
            credit = self._leaf(value, part)
            if at is not None:
                self.note(at, given, credit, "value")
            return credit
        alike = type(value) is type(part.value)
        if alike and value:
            return self._object(value, part, at, given) if part.keys else self.listed(value, part, at, given, self.pair)
        if at is not None:  # an empty container lacks all; a value of another kind stands in the place of all
            self.lost(part, at, None if alike else given, given)
        return 0.0

    def _leaf(self, value: Any, part: Part) -> float:
        right = part.value
        if equal(value, right):
            return 1.0
        if type(value) is str and type(right) is str:
            return token_f1(value, right) if self.words else 0.0
        return MISTYPED if mistyped(value, right) else 0.0

    def _object(self, value: dict[str, Any], part: Part, at: str | None, given: str | None) -> float:
        begin = len(self.leaves or ())
        keys = part.keys or {}
        credit, invented = 0.0, 0
        # in the value's order: the order of a set of strings, and with it the last bit, differs between processes
        for key, item in value.items():
            child = keys.get(key)
            if child is None:
                invented += 1
                if at is not None:
                    self.note(below(given, key), below(given, key), 0.0, "invented")
            elif at is not None:
                credit += self.pair(item, child, below(at, key), below(given, key))
            elif child.plain and item == child.value:
                credit += child.size
            else:
                credit += self.pair(item, child, None, None)
        if at is not None:
            for key, child in keys.items():
                if key not in value:
                    self.lost(child, below(at, key), None, given)
        return self.diluted(credit, part.size, invented, begin) if invented else credit

    def listed(
        self, value: list[Any], part: Part, at: str | None, given: str | None, compare: Compare, in_order: bool = True
    ) -> float:
        """Credit of a list of what `compare` compares, whose items may or may not come in any order."""
        begin = len(self.leaves or ())
        items = part.items or []
        surplus = len(value) - len(items)
        invented = surplus * max(1.0, part.size / len(items)) if surplus > 0 else 0.0
        if in_order or not self._affords(len(value), items):
            found = self._in_order(value, items, part.records, compare)
        else:
            found = _assigned([[compare(item, child, None, None) for child in items] for item in value])
        if at is None:
            credit = sum([own for _, _, own in found], 0.0)
        else:
            credit = 0.0
            for row, column, _ in found:
                credit += compare(value[row], items[column], below(at, column), below(given, row))
            columns = {column for _, column, _ in found}
            for column, child in enumerate(items):
                if column not in columns:
                    self.lost(child, below(at, column), None, given)
            rows = {row for row, _, _ in found}
            for row in range(len(value)):
                if row not in rows:
                    weight = invented / (len(value) - len(rows))
                    self.note(below(given, row), below(given, row), 0.0, "invented", weight)
        return self.diluted(credit, part.size, invented, begin) if invented else credit

    def diluted(self, credit: float, size: float, invented: float, begin: int) -> float:
        """Credit of a part of this size less what the document invents in it; its leaves are those from `begin` on."""
        share = size / (size + invented)
        for leaf in self.leaves[begin:] if self.leaves else ():
            leaf.weight *= share
        return credit * share

    def lost(self, part: Part, at: str | None, given: str | None, parent: str | None) -> None:
        """Note the leaves of a part without credit: they stand at `given`, or are missing in `parent`."""
        if part.keys or part.items:
            for key, child in part.keys.items() if part.keys else enumerate(part.items or ()):
                self.lost(child, below(at, key), given, parent)
        elif part.size and given is None:
            self.note(at, None, 0.0, "missing", 1, parent)
        elif part.size:
            self.note(at, given, 0.0, "value")

    def note(
        self, pointer: Any, given: str | None, credit: float, kind: Any, weight: float = 1, parent: Any = None
    ) -> None:
        """Append a leaf, where leaves are wanted."""
        if self.leaves is not None and pointer is not None:
            self.leaves.append(Leaf(pointer, given, credit, weight, kind, parent))

    # --------------------------------------------------------------------------------------------------------- pairing

    def _in_order(self, value: list[Any], items: list[Part], records: _Records | None, compare: Compare) -> Found:
        """The pairs of the alignment that keeps the order."""
        # Equal items at either end belong together in some best alignment: whatever else one of them could be paired
        # with has no more credit. So most lists need no table.
        rows, columns = len(value), len(items)
        least = min(rows, columns)
        start, end = 0, 0
        while start < least and self.same(value[start], items[start]):
            start += 1
        while end < least - start and self.same(value[rows - 1 - end], items[columns - 1 - end]):
            end += 1
        found: Found = [(i, i, items[i].size) for i in range(start)]
        rest = range(start, rows - end), range(start, columns - end)
        best = self._best(value, items, records, compare, *rest)
        if best is None:
            row, column = start, start
            for anchor in [*_anchors(value, items, *rest), (rows - end, columns - end)]:
                part = range(row, anchor[0]), range(column, anchor[1])
                best = self._best(value, items, records, compare, *part)
                if best is None:
                    best = [(i, j, compare(value[i], items[j], None, None)) for i, j in zip(*part, strict=False)]
                found += best
                if anchor[0] < rows - end:
                    found.append((*anchor, items[anchor[1]].size))
                row, column = anchor[0] + 1, anchor[1] + 1
        else:
            found += best
        return found + [(rows - i, columns - i, items[columns - i].size) for i in range(end, 0, -1)]

    def _best(
        self,
        value: list[Any],
        items: list[Part],
        records: _Records | None,
        compare: Compare,
        rows: range,
        columns: range,
    ) -> Found | None:
        """The exact alignment of two stretches; None where the budget does not allow it."""
        if not rows or not columns:
            return []
        if not self._affords(len(rows), items[columns.start : columns.stop]):
            return None
        table: list[list[float]] = []
        for row in rows:
            credits = None if records is None or self.words else records.credits(value[row], columns)
            table.append(credits or [compare(value[row], items[column], None, None) for column in columns])
        return [(rows[row], columns[column], credit) for row, column, credit in _best_in_order(table)]

    def _affords(self, rows: int, items: Sequence[Part]) -> bool:
        """Whether the budget allows a table of so many rows and these columns, which it is then less by."""
        steps = rows * (sum([item.size for item in items]) + len(items))
        if steps > self.left:
            return False
        self.left -= steps
        return True


class CallAligner(Aligner):
    """Of tool calls, one or a list of them on either side."""

    def top(self, value: Any, part: Part) -> float:
        at = None if self.leaves is None else ""
        several, wanted = type(value) is list, part.items is not None
        if not several and not wanted:
            return self.call(value, part, at, at)
        whole = part if wanted else Part([part.value], part.size, part.plain, None, [part])
        credit = self.listed(value if several else [value], whole, at, at, self.call, in_order=False)
        for leaf in self.leaves or () if not (several and wanted) else ():  # the one call of a side stands in no list
            if not several:
                leaf.given = leaf.given and leaf.given.removeprefix("/0")
                leaf.parent = leaf.parent and leaf.parent.removeprefix("/0")
            if leaf.kind == "invented":
                leaf.pointer = leaf.given or ""
            elif not wanted:
                leaf.pointer = leaf.pointer.removeprefix("/0")
        return credit

    def call(self, value: Any, part: Part, at: str | None, given: str | None) -> float:
        """Credit of a tool call."""
        if type(value) is dict and part.keys and not equal(value.get("name"), part.value.get("name")):
            # another function: its arguments say nothing of this one's
            for key, child in part.keys.items() if at is not None else ():
                self.lost(child, below(at, key), below(given, key) if key == "name" and key in value else None, given)
            return 0.0
        return self.pair(value, part, at, given)


def _assigned(table: list[list[float]]) -> Found:
    """The best pairing in any order."""
    from scipy.optimize import linear_sum_assignment  # only now: most references are one call

    rows, columns = linear_sum_assignment(table, maximize=True)
    return [(int(row), int(column), table[row][column]) for row, column in zip(rows, columns, strict=True)]


def _best_in_order(table: list[list[float]]) -> Found:
    """The best alignment that keeps the order: the dynamic programme of Needleman and Wunsch."""
    if len(table) == len(table[0]) and all(max(row) == row[i] for i, row in enumerate(table)):
        return [(i, i, row[i]) for i, row in enumerate(table)]  # no row has a better place
    # A little for each pair, so that wrong items have a place too; a power of two, which keeps the sums exact.
    little = 2.0 ** -(min(len(table), len(table[0])).bit_length() + 20)
    # best[i][j]: of the first i rows and j columns
    best = [[0.0] * (len(table[0]) + 1)]
    for row in table:
        above, now, left = best[-1], [0.0], 0.0
        for j, credit in enumerate(row):
            left = max(above[j] + credit + little, above[j + 1], left)
            now.append(left)
        best.append(now)
    found: Found = []
    i, j = len(table), len(table[0])
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j, table[i][j]))
    return found[::-1]


def _anchors(value: Sequence[Any], items: Sequence[Part], rows: range, columns: range) -> list[tuple[int, int]]:
    """Pairs of equal items in order: the k-th of a kind with the k-th of that kind, as many as keep the order."""
    places: dict[str, list[int]] = defaultdict(list)
    for column in columns:
        places[_written(items[column].value)].append(column)
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
