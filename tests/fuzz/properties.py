"""What every target of the fuzzing shares: how a refusal has to read, and how an input is cut into parts.

A target is a function of bytes that returns if its property holds and raises `AssertionError`, or whatever the code
under test let through, if not. Hypothesis, atheris and the kept seeds all call the same functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Let code refuse its input, by one of `kinds` and in one sentence; anything else it raises is a failure."""
    try:
        yield
    except kinds as error:
        check_sentence(str(error))


def check_sentence(message: str) -> None:
    assert message.strip(), "a refusal without a word"
    assert message.rstrip().endswith((".", ")")), f"not a sentence: {message!r}"
    assert len(message) < 4000, f"a refusal of {len(message)} characters"


def lines_of(data: bytes, count: int) -> list[str]:
    """The first `count` lines of an input and all the rest as one text; bytes that are no UTF-8 become surrogates."""
    parts = data.decode("utf-8", "surrogateescape").split("\n", count)
    return parts + [""] * (count + 1 - len(parts))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
