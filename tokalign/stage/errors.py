"""What a stage or a job that cannot go on says: one sentence with row, column and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any


class ContractError(ValueError):
    """Data that breaks the contract; the message is one sentence with row, column and remedy."""


class JobError(RuntimeError):
    """A job that cannot start or go on; the message says why in one sentence."""


class OptionError(ValueError):
    """Options that a command cannot take; the message names the option."""


def refuse_unread(arguments: Any, names: Iterable[str], reader: str) -> None:
    """Refuse options of a dataclass that are set though this run reads none of them.

    Args:
        names: the options.
        reader: the option with which they are read, such as "--rule frequency".
    """
    for option in fields(arguments):
        if option.name in names and getattr(arguments, option.name) != option.default:
            raise OptionError(f"--{option.name} is read with {reader} alone; leave it out, or set that.")
