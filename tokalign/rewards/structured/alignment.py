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
- Tool calls (`CallAligner`) pair in any order: of very many, equal ones first, and of what is left those of one
  function. A call of another function has nothing, nor has one made again.

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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal, NamedTuple

from tokalign.rewards.structured.content import TextMatch, equal, token_f1
from tokalign.rewards.structured.shapes import Shape

MISTYPED = 0.5  # credit of a string that spells the right scalar, or of a scalar where its spelling is right
_BUDGET = 1 << 15  # steps of exact alignments in one document: some 10 ms
_INDEXED = 255  # most records and keys of an index
_CONTAINERS = (dict, list)


class Alignment(NamedTuple):
    """What a document has of what the reference asks for, in leaves."""

    credit: float
    size: float

    @property
    def share(self) -> float:
        """Credit over size, in [0, 1]."""
        return self.credit / self.size if self.size else 1.0


class Leaf(NamedTuple):
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


_leaf = partial(tuple.__new__, Leaf)  # in two thirds of the time of `Leaf(…)`


@dataclass(slots=True, eq=False)
class Part:
    """A part of a reference, made ready once for all completions that are aligned with it.

    Attributes:
        value: of the reference.
        size: its leaves, less those that the schema fixes.
        plain: it holds no boolean, 0 or 1, which Python's own equality mistakes for one another.
        keys, items: parts of an object, of an array; None of a leaf, and of what the schema fixes.
    """

    value: Any
    size: int
    plain: bool
    keys: dict[str, Part] | None = None
    items: list[Part] | None = None
    _records: _Records | Literal[False] | None = False

    @property
    def records(self) -> _Records | None:
        """Index of an array of records, made when it is first needed; None of other parts."""
        if self._records is False:
            self._records = _Records.of(self.items or [], self.plain) if self.items else None
        return self._records


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
        return type(right) is not str and equal(_spelled(value), right)
    return type(right) is str and type(value) not in _CONTAINERS and equal(_spelled(right), value)


_WORDS = {"true": True, "false": False, "null": None}


def _spelled(text: str) -> Any:
    """The scalar that a text spells; the text itself if none."""
    text = text.strip()
    if text[:1] not in "+-.0123456789tfnTFN" or len(text) > 40 or "_" in text:
        return text
    if text.isdigit():
        return int(text)
    if (word := text.lower()) in _WORDS:
        return _WORDS[word]
    try:
        return float(text)
    except ValueError:
        return text


def below(pointer: str | None, key: Any) -> str | None:
    """JSON pointer of a key or index of what a pointer names; None of None."""
    if pointer is None:
        return None
    if type(key) is not int and ("/" in key or "~" in key):
        key = key.replace("~", "~0").replace("/", "~1")
    return f"{pointer}/{key}"


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
        part = Part(reference, sum([one.size for one in items]), plain, None, items)
    if shape is not None and (
        (shape.allowed == _NULL and reference is None)
        or (shape.constant and shape.bounds is not None and shape.bounds.is_valid(reference))
    ):
        return Part(reference, 0, part.plain)
    return part


_NULL = frozenset(("null",))


class _Records:
    """Index of an array of scalars, or of objects of scalars with the same keys and with strings at the same ones.

    It gives the credits of an item against many of the array's at once, as `Aligner.pair` gives them one by one.
    """

    @classmethod
    def of(cls, items: Sequence[Part], plain: bool) -> _Records | None:
        """The index; None of other arrays."""
        named = items[0].keys is not None
        keys: list[tuple[str, bool, int]] = []
        for item in items if len(items) <= _INDEXED else ():
            parts = (item.keys or {}) if named else {"": item}
            own = [(key, type(part.value) is str, part.size) for key, part in parts.items()]
            if own != (keys or own) or any(type(part.value) in _CONTAINERS for part in parts.values()):
                return None
            keys = own
        return cls(items, keys, plain) if 0 < len(keys) <= _INDEXED else None

    def __init__(self, items: Sequence[Part], keys: list[tuple[str, bool, int]], plain: bool):
        self.named, self.plain = items[0].keys is not None, plain
        self.size = items[0].size
        self.strings = {key: string for key, string, _ in keys}
        self.rows = [item.value if self.named else {"": item.value} for item in items]
        self.are_strings, self.types = [*self.strings.values()], [*map(type, self.rows[0].values())]
        # The columns in which a value stands, each a byte of one number: adding these numbers counts the equal values
        # in all columns at once.
        self.places: dict[Any, int] = defaultdict(int)
        self.weighed = [key for key, _, size in keys if size]
        for column, row in enumerate(self.rows):
            for key in self.weighed:
                token = (key, row[key]) if plain else (key, row[key], type(row[key]) is bool)
                self.places[token] += 1 << (column << 3)

    def table(self, values: Sequence[Any], columns: range) -> list[Sequence[float] | None]:
        """Credits of items against these of the array's, a row an item; None for one that is no such record."""
        get, plain, named, width = self.places.get, self.plain, self.named, len(self.rows)
        known, types, are_strings = self.strings.keys(), self.types, self.are_strings
        table: list[Sequence[float] | None] = []
        for value in values:
            if (type(value) is dict) is not named or type(value) is list:
                table.append(None)
                continue
            row = value if named else {"": value}
            try:
                if plain:
                    counts = sum(map(get, row.items(), repeat(0)))
                else:
                    counts = sum([get((key, item, type(item) is bool), 0) for key, item in row.items()])
            except TypeError:  # it holds containers
                table.append(None)
                continue
            credits: Sequence[float] = counts.to_bytes(width, "little")
            if row.keys() != known or (
                [*map(type, row.values())] != types and [type(item) is str for item in row.values()] != are_strings
            ):
                credits = self._faulty(row, credits)
            table.append(credits if len(columns) == width else credits[columns.start : columns.stop])
        return table

    def _faulty(self, row: Mapping[str, Any], counts: Sequence[float]) -> Sequence[float]:
        """The credits of a record with keys of its own, or strings where the others have none or the reverse."""
        credits, invented = [*counts], 0
        for key, item in row.items():
            if key not in self.strings:
                invented += 1
            elif (type(item) is str) is not self.strings[key] and key in self.weighed:
                spelt = _spelled(item) if type(item) is str else item  # read once for all columns
                if type(spelt) is not str:
                    for column, right in enumerate(self.rows):
                        other = right[key] if type(item) is str else _spelled(right[key])
                        if spelt == other and equal(spelt, other):
                            credits[column] += MISTYPED
        if not invented:
            return credits
        share = self.size / (self.size + invented)
        return [own * share for own in credits]


# ------------------------------------------------------------------------------------------------------ the recursion

Compare = Callable[[Any, Part, str | None, str | None], float]
Pairs = list[tuple[int, int]]  # (item of the document, item of the reference)


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
            if at is not None and self.leaves is not None:
                self.leaves.append(_leaf((at, given, credit, 1, "value", None)))
            return credit
        alike = type(value) is type(part.value)
        if alike and value:
            return self._object(value, part, at, given) if part.keys else self.listed(value, part, at, given, self.pair)
        if at is not None:  # an empty container lacks all; a value of another kind stands in the place of all
            self.lost(part, at, None if alike else given, given)
        return 0.0

    def _leaf(self, value: Any, part: Part) -> float:
        right = part.value
        if type(value) is type(right) and (type(right) is not str or not self.words):
            return 1.0 if value == right else 0.0
        if equal(value, right):
            return 1.0
        if type(value) is str and type(right) is str:
            return token_f1(value, right) if self.words else 0.0
        return MISTYPED if mistyped(value, right) else 0.0

    def _object(self, value: dict[str, Any], part: Part, at: str | None, given: str | None) -> float:
        begin = len(self.leaves or ())
        keys, leaves = part.keys or {}, self.leaves
        credit, invented = 0.0, 0
        # in the value's order: the order of a set of strings, and with it the last bit, differs between processes
        for key, item in value.items():
            child = keys.get(key)
            if child is None:
                invented += 1
                if at is not None:
                    self.note(below(given, key), below(given, key), 0.0, "invented")
            elif at is not None:
                step = below("", key) if "/" in key or "~" in key else f"/{key}"
                if leaves is None or child.keys or child.items or not child.size:
                    credit += self.pair(item, child, f"{at}{step}", f"{given}{step}")
                    continue
                own = self._leaf(item, child)
                leaves.append(_leaf((f"{at}{step}", f"{given}{step}", own, 1, "value", None)))
                credit += own
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
        pairs: Pairs | None = None if at is None else []
        if in_order or not value:
            credit = self._in_order(value, part, compare, pairs)
        else:
            credit = self._in_any_order(value, part, compare, pairs)
        surplus = len(value) - len(items)
        invented = surplus * max(1.0, part.size / len(items)) if surplus > 0 else 0.0
        if pairs is not None:
            for row, column in pairs:
                compare(value[row], items[column], below(at, column), below(given, row))
            columns = {column for _, column in pairs}
            for column, child in enumerate(items):
                if column not in columns:
                    self.lost(child, below(at, column), None, given)
            rows = {row for row, _ in pairs}
            for row in range(len(value)):
                if row not in rows:
                    weight = invented / (len(value) - len(rows))
                    self.note(below(given, row), below(given, row), 0.0, "invented", weight)
        return self.diluted(credit, part.size, invented, begin) if invented else credit

    def diluted(self, credit: float, size: float, invented: float, begin: int) -> float:
        """Credit of a part of this size less what the document invents in it; its leaves are those from `begin` on."""
        share = size / (size + invented)
        if self.leaves:
            self.leaves[begin:] = [leaf._replace(weight=leaf.weight * share) for leaf in self.leaves[begin:]]
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

    def _in_order(self, value: list[Any], part: Part, compare: Compare, pairs: Pairs | None) -> float:
        """Credit of the alignment that keeps the order; its pairs are appended to `pairs`, where they are wanted."""
        # Equal items at either end belong together in some best alignment: whatever else one of them could be paired
        # with has no more credit. So most lists need no table.
        items = part.items or []
        rows, columns = len(value), len(items)
        least = min(rows, columns)
        start, end, ends = 0, 0, 0
        while start < least and self.same(value[start], items[start]):
            ends += items[start].size
            start += 1
        while end < least - start and self.same(value[rows - 1 - end], items[columns - 1 - end]):
            end += 1
            ends += items[columns - end].size
        if pairs is not None:
            pairs += [(i, i) for i in range(start)] + [(rows - i, columns - i) for i in range(1, end + 1)]
        rest = range(start, rows - end), range(start, columns - end)
        credit = self._best(value, part, compare, pairs, *rest)
        if credit is None:
            credit, row, column = 0.0, start, start
            for anchor in [*_anchors(value, items, *rest), (rows - end, columns - end)]:
                between = range(row, anchor[0]), range(column, anchor[1])
                within = self._best(value, part, compare, pairs, *between)
                if within is None:
                    both = list(zip(*between, strict=False))
                    within = sum([compare(value[i], items[j], None, None) for i, j in both])
                    if pairs is not None:
                        pairs += both
                credit += within
                if anchor[0] < rows - end:
                    credit += items[anchor[1]].size
                    if pairs is not None:
                        pairs.append(anchor)
                row, column = anchor[0] + 1, anchor[1] + 1
        return ends + credit

    def _in_any_order(self, value: list[Any], part: Part, compare: Compare, pairs: Pairs | None) -> float:
        """Credit of the best pairing; its pairs are appended to `pairs`, where they are wanted."""
        items = part.items or []
        columns: Sequence[int] = range(len(items))
        met: Counter[str] = Counter()
        equal_ones: Pairs = []
        affordable = self._affords(len(value), len(items), part)
        if not affordable:  # equal ones belong together in some best pairing, and are found in linear time
            equal_ones = self._equal_ones(value, items, compare)
            taken = {column for _, column in equal_ones}
            columns = [column for column in columns if column not in taken]
        paired = {row for row, _ in equal_ones}
        known = {_written(value[row]) for row in paired}
        rest = [(row, _written(item)) for row, item in enumerate(value) if row not in paired]
        affordable = affordable or self._affords(len(rest), len(columns), part)
        # An item that stands here more often than the reference has it is in no pair: it might have a part of another
        # right, and repeating what is known would pay.
        rows: list[int] = []
        table: list[list[float]] = []
        for row, text in rest:
            credits = [compare(value[row], items[column], None, None) for column in columns] if affordable else []
            wanted = sum([own == items[column].size for own, column in zip(credits, columns, strict=False)])
            if met[text] < wanted or not (met[text] or text in known):
                rows.append(row)
                table.append(credits)
            met[text] += 1
        credit = float(sum([items[column].size for _, column in equal_ones]))
        if affordable and rows and columns:
            from scipy.optimize import linear_sum_assignment  # only now: most references are one call

            best = list(zip(*linear_sum_assignment(table, maximize=True), strict=True))
            found = [(rows[row], columns[column]) for row, column in best]
            credit += sum([table[row][column] for row, column in best])
        else:
            found = _by_name(value, rows, items, columns)
            credit += sum([compare(value[row], items[column], None, None) for row, column in found])
        if pairs is not None:
            pairs += equal_ones + found
        return credit

    def _equal_ones(self, value: list[Any], items: list[Part], compare: Compare) -> Pairs:
        """Pairs of items with full credit: each with the first that has one of its `forms` and is still free."""
        free: dict[Any, deque[int]] = defaultdict(deque)
        for column, item in enumerate(items):
            for form in self.forms(item):
                free[_hashable(form)].append(column)
        found: Pairs = []
        taken: set[int] = set()
        for row, item in enumerate(value):
            columns = free.get(_hashable(item)) or deque()
            while columns and columns[0] in taken:
                columns.popleft()
            if columns and compare(item, items[columns[0]], None, None) == items[columns[0]].size:
                found.append((row, columns[0]))
                taken.add(columns.popleft())
        return found

    @staticmethod
    def forms(part: Part) -> list[Any]:
        """Documents that surely have full credit of a part."""
        return [part.value]

    def _best(
        self, value: list[Any], part: Part, compare: Compare, pairs: Pairs | None, rows: range, columns: range
    ) -> float | None:
        """The same of two stretches, exactly; None where the budget does not allow it."""
        if not rows or not columns:
            return 0.0
        if not self._affords(len(rows), len(columns), part):
            return None
        items, records = (part.items or [])[columns.start : columns.stop], None if self.words else part.records
        values = value[rows.start : rows.stop]
        known = [None] * len(rows) if records is None else records.table(values, columns)
        table: list[Sequence[float]] = [
            [compare(item, child, None, None) for child in items] if credits is None else credits
            for item, credits in zip(values, known, strict=True)
        ]
        if pairs is None:
            if len(rows) == len(columns) and all(max(row) == row[i] for i, row in enumerate(table)):
                return sum([row[i] for i, row in enumerate(table)], 0.0)  # no item has a better place
            return _most_in_order(table)[-1]
        best: list[list[float]] = []
        credit = _most_in_order(table, best)[-1]
        pairs += [(rows.start + row, columns.start + column) for row, column in _traced(table, best)]
        return credit

    def _affords(self, rows: int, columns: int, part: Part) -> bool:
        """Whether the budget allows a table of so many rows and columns of an array, which it is then less by."""
        steps = rows * columns * (1 + part.size // len(part.items or "1"))
        if steps > self.left:
            return False
        self.left -= steps
        return True


class CallAligner(Aligner):
    """Of tool calls, one or a list of them on either side."""

    def top(self, value: Any, part: Part) -> float:
        at = None if self.leaves is None else ""
        several, wanted = type(value) is list, type(part.value) is list
        if wanted and not part.items:
            return self.pair(value, part, at, at)
        if not several and not wanted:
            return self.call(value, part, at, at)
        whole = part if wanted else Part([part.value], part.size, part.plain, None, [part])
        credit = self.listed(value if several else [value], whole, at, at, self.call, in_order=False)
        leaves = self.leaves or []
        for index, (pointer, given, own, weight, kind, parent) in enumerate(leaves if not (several and wanted) else ()):
            if not several:  # the one call of a side stands in no list
                given, parent = given and given.removeprefix("/0"), parent and parent.removeprefix("/0")
            if kind == "invented":
                pointer = given or ""
            elif not wanted:
                pointer = pointer.removeprefix("/0")
            leaves[index] = Leaf(pointer, given, own, weight, kind, parent)
        return credit

    def call(self, value: Any, part: Part, at: str | None, given: str | None) -> float:
        """Credit of a tool call."""
        if type(value) is dict and part.keys and not equal(value.get("name"), part.value.get("name")):
            # another function: its arguments say nothing of this one's
            for key, child in part.keys.items() if at is not None else ():
                self.lost(child, below(at, key), below(given, key) if key == "name" and key in value else None, given)
            return 0.0
        return self.pair(value, part, at, given)


def _most_in_order(table: list[Sequence[float]], best: list[list[float]] | None = None) -> list[float]:
    """The most credit of pairs that keep the order, of all rows and the first j + 1 columns (Needleman and Wunsch).

    To `best`, where it is wanted, the same of the first i rows is appended for every i.
    """
    now = [0.0] * len(table[0])
    for row in table:
        if best is not None:
            best.append(now)
        before, now = now, []
        most = corner = 0.0
        for above, credit in zip(before, row, strict=True):
            corner += credit
            if corner > most:
                most = corner
            if above > most:
                most = above
            now.append(most)
            corner = above
    if best is not None:
        best.append(now)
    return now


def _traced(table: list[Sequence[float]], best: list[list[float]]) -> Pairs:
    """The pairs that make the most credit, and those of what is left between two of them, in order."""
    found: Pairs = []
    i, j = len(table), len(table[0])
    end = (i, j)
    while i and j:
        if best[i][j - 1] == best[i - 1][j - 1]:
            i -= 1
        elif j > 1 and best[i][j - 1] == best[i][j - 2]:
            j -= 1
        else:
            found += zip(range(i, end[0]), range(j, end[1]), strict=False)
            i, j = i - 1, j - 1
            found.append((i, j))
            end = (i, j)
    return [*zip(range(end[0]), range(end[1]), strict=False), *found]


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


def _by_name(value: list[Any], rows: Sequence[int], items: list[Part], columns: Sequence[int]) -> Pairs:
    """Pairs of calls of the same function, in order, where there are too many for the best ones."""
    free: dict[str, deque[int]] = defaultdict(deque)
    for column in columns:
        free[_name(items[column].value)].append(column)
    return [(row, free[name].popleft()) for row in rows if free.get(name := _name(value[row]))]


def _name(call: Any) -> str:
    return _written(call.get("name") if type(call) is dict else call)


def _hashable(value: Any) -> Any:
    """A value that is equal to another's where `content.equal` says so."""
    if type(value) is dict:
        return frozenset([(key, _hashable(item)) for key, item in value.items()])
    if type(value) is list:
        return tuple([_hashable(item) for item in value])
    return (bool, value) if type(value) is bool else value


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
