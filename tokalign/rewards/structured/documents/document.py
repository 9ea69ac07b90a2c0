"""What reading a completion gives, what it may cost, and the fault that no reading can mend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["json", "yaml", "xml", "tool_call"]
FORMATS: tuple[Format, ...] = ("json", "yaml", "xml", "tool_call")
Source = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class _Missing:
    """The value of a text that holds no document (None is a document: JSON's null)."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True)
class Limits:
    """What a completion may cost.

    Args:
        max_bytes: longest completion in UTF-8 bytes; a longer one is not parsed.
        max_depth: deepest nesting of containers.
        max_values: most values (keys not counted) of one document.
    """

    max_bytes: int = 1 << 18
    max_depth: int = 64
    max_values: int = 10_000

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_depth", "max_values"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1.")
        if self.max_depth > 200:
            raise ValueError(f"max_depth is {self.max_depth}; Python's own recursion allows at most 200 here.")


@dataclass(frozen=True, slots=True)
class Document:
    """What was read.

    Attributes:
        value: the parsed document; MISSING where there is none.
        error: why the text is not exactly one strict document, None if it is.
        fenced: it stood in one Markdown fence.
        outside: characters of the text that do not belong to the document.
        broken: the value is the beginning of a document that breaks off, or goes on with what is no document.
    """

    value: Any
    error: str | None = None
    fenced: bool = False
    outside: int = 0
    broken: bool = False

    @property
    def whole(self) -> bool:
        """Whether the completion is exactly one strict document."""
        return self.error is None


class Fault(ValueError):
    """A document that no reading can mend: repeated keys, NaN, too deep. Its text says which."""


def unreadable(text: str, limits: Limits) -> str | None:
    """Why a text is not even looked at: too long, or not text."""
    # characters first: 50 MB must not be encoded to find out that they are too many
    if len(text) > limits.max_bytes:
        return f"longer than {limits.max_bytes} bytes"
    if text.isascii():
        return None
    try:
        return None if len(text.encode()) <= limits.max_bytes else f"longer than {limits.max_bytes} bytes"
    except UnicodeEncodeError:
        return "a lone surrogate, which is not text"
