"""How far a value has the keys and types of a schema: the equation of the structured reward.

Validity under a schema is yes or no, and a policy that never says yes learns nothing from it. The grade says how far a
value is: every required key that is there counts, more if it has the right type; every invented key and every fault in
an optional part costs. It is made so that no fault pays, whatever the schema and the value (`Walk`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs

from tokalign.rewards.structured.shapes import ANY, Shape, type_of
from tokalign.rewards.structured.validators import short

PRESENT = 0.25  # credit of an object, and of a required key in it, whatever their values
BOUND = 0.5  # credit of a value of the right type that breaks a bound, pattern or enumeration
_CONTAINERS = (dict, list)


class TooManyValues(Exception):
    """A document with more values than a score may visit."""


@dataclass(frozen=True, slots=True)
class Grade:
    """How far a value has a schema's keys and types.

    Attributes:
        keys: in [0, 1], by keys and types alone; 1 if all required keys are there, all types and constants right and no
            key invented.
        full: the same, less for scalars that break a bound, pattern or enumeration.
        attempt: at least one key or item that the schema asks for is there with the right type.
        invented: keys, at any level, that the schema does not know.
        walk: the pass that found this, with its memory, to explain it by.
    """

    keys: float
    full: float
    attempt: bool
    invented: int = 0
    walk: Walk | None = field(default=None, repr=False, compare=False)


class Walk:
    """One pass over a value beside its shape.

    Let b be PRESENT for an object with required keys and 1 for one without, n the number of its required keys, and the
    credit of a key that is there PRESENT + (1 − PRESENT) g for the grade g of its value. Then
        g(object) = (b + Σ over required keys that are there credit)
                    / (b + n + invented keys + Σ over optional keys that are there (1 − credit)).
    Of an array, with the share m = min(1, (1 + items) / (1 + `minItems`)),
        g(array) = m / (1 + items beyond `maxItems` + Σ over items (1 − g(item))).
    A scalar has 1 if its type is right, else 0; the grade with bounds is BOUND where only a bound is broken. A scalar
    that should be a constant, and only has its type, has BOUND by both grades.

    A value of the right type is above 0 at every level, and faults are added up, never averaged. So each fault costs,
    wherever it is (a required key left out, a key invented, a type made wrong), and no number of sound parts hides it.
    The cost shrinks with depth, at most to 0.6 a level, and is lost in floating point at some 30 levels of objects. Of
    alternatives (`anyOf`, `oneOf`) the one with the best grade counts, or all that the value fits together
    (`Shape.chosen`) where that is more; a change is a fault if it is one under the best alternative before the change
    and under the best one after it.
    """

    def __init__(self, max_values: int):
        self.left = max_values
        self.invented = 0
        # (by keys and types, with bounds, invented keys) of containers: without this memory alternatives within
        # alternatives take time exponential in the depth
        self.known: dict[tuple[int, int], tuple[float, float, int]] = {}
        self.taken: dict[tuple[int, int], Shape] = {}  # where the shape that a choice came to had the best grade

    def top(self, shape: Shape, value: Any) -> Grade:
        """The grade of a whole document. It is 0 for a container without any key or item that the schema asks for."""
        keys, full = self.grade(shape, value)
        # Taken now: the questions below grade parts of the value once more, which must not count its invented keys
        # again.
        invented, taken = self.invented, self.taken.get((id(shape), id(value)))
        options = shape.options or [shape]
        options = options if taken is None else [*options, *(taken.options or [taken])]
        if type(value) in _CONTAINERS:
            asked = [child for option in options for child in self._asked(option, value)]
            # An object has credit for being one. Without this, `{}` and an object of invented keys alone would be
            # answers.
            if not asked:
                return Grade(0.0, 0.0, False, invented, self)
            return Grade(keys, full, any(self.grade(child, item)[0] > 0 for child, item in asked), invented, self)
        # a bare scalar is an answer only to a schema that names its type
        named = keys > 0 and all(option.allowed is not None for option in options)
        return Grade(keys, full, True) if named else Grade(0.0, 0.0, False)

    def fault(self, shape: Shape, value: Any, place: str) -> str | None:
        """The first fault in words, with its place (a JSON pointer); None if the grade is 1."""
        if min(self.grade(shape, value)) == 1.0:
            return None
        # The alternative that the grade took is the one that was meant, so its faults are the ones to name.
        taken = self.taken.get((id(shape), id(value)))
        if taken is not None:
            return self.fault(taken, value, place)
        if shape.options:
            return self.fault(max(shape.options, key=lambda option: self.grade(option, value)), value, place)
        where, kind = place[:200] or "the document", type_of(value)
        if shape.allowed is not None and kind not in shape.allowed:
            return f"{where}: {kind} where {' or '.join(sorted(shape.allowed)) or 'nothing'} is allowed"
        if isinstance(value, dict):
            for key in shape.required:
                if key not in value:
                    return f"{where}: the key {key[:100]!r} is missing"
            for key, item in value.items():
                child = shape.known(key) or (ANY if key in shape.required else None)
                if child is None:
                    return f"{where}: the key {key[:100]!r} is not in the schema"
                fault = self.fault(child, item, f"{place}/{key}")
                if fault is not None:
                    return fault
        elif isinstance(value, list):
            for index, item in enumerate(value):
                fault = self.fault(shape.item(index), item, f"{place}/{index}")
                if fault is not None:
                    return fault
            return f"{where}: {len(value)} items"
        else:
            try:
                shape.bounds.validate(value)
            except jsonschema_rs.ValidationError as error:
                return f"{where}: {short(error)}"
        return None

    def _asked(self, shape: Shape, value: Any) -> Iterator[tuple[Shape, Any]]:
        """(shape, value) of the keys or items of a container that the schema asks for."""
        if shape.types is not None and ("object" if isinstance(value, dict) else "array") not in shape.types:
            return
        if isinstance(value, list):
            yield from ((shape.item(index), item) for index, item in enumerate(value))
            return
        for key in shape.required or value:
            if key in value:
                child = shape.known(key) or (ANY if key in shape.required else None)
                if child is not None:
                    yield child, value[key]

    def grade(self, shape: Shape, value: Any) -> tuple[float, float]:
        """(by keys and types, with bounds) of a value."""
        if type(value) in _CONTAINERS:
            return self._container(shape, value)
        if shape.options:
            return self._best(shape.options, value)
        if shape.allowed is not None and type_of(value) not in shape.allowed:
            return 0.0, 0.0
        # A constant tells alternatives apart (`"kind": "circle"`). Had another constant of the right type full credit,
        # every alternative would fit equally well, and the wrong one could be graded beside the value.
        if shape.bounds is None or shape.bounds.is_valid(value):
            return 1.0, 1.0
        return (BOUND, BOUND) if shape.constant else (1.0, BOUND)

    def _container(self, shape: Shape, value: Any) -> tuple[float, float]:
        # By identity, which is safe because shapes and values live as long as the walk, and cheap for large values.
        at = (id(shape), id(value))
        if at in self.known:
            keys, full, invented = self.known[at]
            self.invented += invented
            return keys, full
        before = self.invented
        if shape.chosen is not None:
            self.known[at] = (0.0, 0.0, 0)  # an alternative to itself says nothing
        # The library sees in one call that a part has no fault; only parts with one are walked through in Python.
        if shape.perfect is not None and shape.perfect.is_valid(value):
            keys, full = 1.0, 1.0
        elif shape.options:
            keys, full = self._best(shape.options, value)
        elif shape.allowed is not None and type_of(value) not in shape.allowed:
            keys, full = 0.0, 0.0
        else:
            keys, full = self._object(shape, value) if type(value) is dict else self._array(shape, value)
        # A value may fit several alternatives, whose keys it may all have. Asked only where no single one suffices.
        if shape.chosen is not None and min(keys, full) < 1.0:
            keys, full = self._together(shape, value, (keys, full), before)
        self.known[at] = (keys, full, self.invented - before)
        return keys, full

    def _together(self, shape: Shape, value: Any, found: tuple[float, float], before: int) -> tuple[float, float]:
        """The better of the grade that was found and of that by all which holds for the value together."""
        self._visit(1 + len(shape.options))
        together = None if shape.chosen is None else shape.chosen(value)
        if together is None or together is shape:
            return found
        invented, self.invented = self.invented, before
        keys, full = self.grade(together, value)
        if (keys, full) > found:
            self.taken[(id(shape), id(value))] = together
        else:
            self.invented = invented
        return max(keys, found[0]), max(full, found[1])

    def _visit(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TooManyValues

    def _best(self, options: list[Shape], value: Any) -> tuple[float, float]:
        self._visit(len(options))
        # Each alternative starts from the same count of invented keys, and the best one's is kept: the keys that
        # another alternative does not know were never meant for it. Two alternatives may tie by types and differ by
        # bounds, so the best of `full` is taken by itself; otherwise their order in the schema would decide.
        before, best, invented = self.invented, (-1.0, 0.0), 0
        for option in options:
            self.invented = before
            keys, full = self.grade(option, value)
            if keys > best[0]:
                invented = self.invented
            best = (max(best[0], keys), max(best[1], full))
        self.invented = invented
        return best

    def _object(self, shape: Shape, value: Mapping[str, Any]) -> tuple[float, float]:
        if shape is ANY:
            return 1.0, 1.0
        self._visit(len(value))
        # The equation of the class, for both grades in one pass. Required keys are in numerator and denominator, so one
        # that is missing costs. All else is in the denominator alone: an optional key that is sound changes nothing, so
        # that padding does not pay, and each fault adds its own part, so that many sound keys cannot average it away.
        properties, required = shape.properties, shape.required
        base = PRESENT if required else 1.0
        credit_keys = credit_full = base
        whole_keys = whole_full = base + len(required)
        for key, item in value.items():
            known = properties.get(key) or shape.known(key)
            if known is None:
                if key not in required:
                    self.invented += 1
                    whole_keys += 1.0
                    whole_full += 1.0
                    continue
                known = ANY
            keys, full = self.grade(known, item)
            # PRESENT whatever the value: a wrong value is worth more than none, or deleting it would pay.
            if key in required:
                credit_keys += PRESENT + (1 - PRESENT) * keys
                credit_full += PRESENT + (1 - PRESENT) * full
            else:
                whole_keys += (1 - PRESENT) * (1 - keys)
                whole_full += (1 - PRESENT) * (1 - full)
        return credit_keys / whole_keys, credit_full / whole_full

    def _array(self, shape: Shape, value: list[Any]) -> tuple[float, float]:
        if shape is ANY:
            return 1.0, 1.0
        # Faults of items are summed, never averaged: a long list of sound items cannot hide a faulty one.
        fault_keys = fault_full = 0.0
        if shape.items is not None or shape.prefix:
            self._visit(len(value))
            for index, item in enumerate(value):
                keys, full = self.grade(shape.item(index), item)
                fault_keys += 1 - keys
                fault_full += 1 - full
        beyond = 0 if shape.max_items is None else max(0, len(value) - shape.max_items)
        # With 1 added above and below, the empty list keeps some credit for its type and each missing item costs.
        share = min(1.0, (1 + len(value)) / (1 + shape.min_items))
        return share / (1 + beyond + fault_keys), share / (1 + beyond + fault_full)
