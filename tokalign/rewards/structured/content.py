"""Typed equality of JSON values, and F1 over words and over leaves.

`leaf_f1` is for tables (`tokalign.evaluation.structured`); the reward's measure, by which leaving out a part that is
wrong gains nothing, is `tokalign.rewards.structured.alignment`. `True` is not 1, "1" is not 1; 1.0 is 1, as in JSON
Schema.
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
