"""How far a document says what the reference says, value by value and type by type.

`agreement` (the reward) weighs every key of an object the same, at each level, over the keys of *either* side:
    a(object) = Σ over common keys a(child) / |keys of value ∪ keys of reference|,
    a(array)  = Σ over positions a(item) / max(len(value), len(reference)),
    a(scalar) = 1 if type and value are equal, else 0.
Leaving out a part that is wrong gains nothing, which F1 over all leaves would pay for. `leaf_f1` is that F1, for tables
(`tokalign.evaluation.structured`). `True` is not 1, "1" is not 1; 1.0 is 1, as in JSON Schema.

References of allowed values, as the Berkeley Function-Calling Leaderboard has them, are compared in
`tokalign.rewards.structured.calls`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

TextMatch = Literal["exact", "tokens"]


def equal(value: Any, reference: Any) -> bool:
    """Typed equality of JSON values, at any depth."""
    if isinstance(value, bool) or isinstance(reference, bool):
        return value is reference
    if isinstance(value, int | float) and isinstance(reference, int | float):
        return value == reference
    if type(value) is not type(reference):
        return False
    if isinstance(value, dict):
        return value.keys() == reference.keys() and all(equal(item, reference[key]) for key, item in value.items())
    if isinstance(value, list):
        return len(value) == len(reference) and all(map(equal, value, reference))
    return value == reference


def agreement(value: Any, reference: Any, *, text_match: TextMatch = "exact") -> float:
    """Share of the reference that the value says, in [0, 1]; see the top of this file.

    Args:
        value: parsed document.
        reference: parsed reference.
        text_match: "exact", or "tokens" for the F1 over words of two strings (free text).
    """
    kind = type(value)
    if kind is not type(reference):
        return 1.0 if equal(value, reference) else 0.0  # 1 and 1.0
    # Divided by the keys of either side: leaving out a wrong key does not shrink the denominator, and inventing one
    # enlarges it, so neither pays.
    total = 0.0
    if kind is dict:
        common = 0
        # in the value's order: the order of a set of strings, and with it the last bit, differs between processes
        for key, item in value.items():
            if key in reference:
                common += 1
                total += agreement(item, reference[key], text_match=text_match)
        either = len(value) + len(reference) - common
        return total / either if either else 1.0
    if kind is list:
        for item, other in zip(value, reference, strict=False):
            total += agreement(item, other, text_match=text_match)
        longest = max(len(value), len(reference))
        return total / longest if longest else 1.0
    if value == reference:
        return 1.0
    return token_f1(value, reference) if kind is str and text_match == "tokens" else 0.0


def token_f1(text: str, reference: str) -> float:
    """F1 over the words of two texts, case aside."""
    return _f1(Counter(text.casefold().split()), Counter(reference.casefold().split()))


def leaf_f1(value: Any, reference: Any) -> float:
    """F1 over typed leaves, each with the path to it; an empty container is a leaf."""
    return _f1(Counter(_leaves(value, ())), Counter(_leaves(reference, ())))


def _f1(given: Counter[Any], wanted: Counter[Any]) -> float:
    total = given.total() + wanted.total()
    return 1.0 if total == 0 else 2 * (given & wanted).total() / total


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    elif isinstance(value, dict | list):
        yield path, type(value).__name__
    else:
        kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
        yield path, kind, value
