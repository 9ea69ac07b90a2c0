"""What a stage or a job that cannot go on says: one sentence with row, column and remedy."""

from __future__ import annotations


class ContractError(ValueError):
    """Data that breaks the contract; the message is one sentence with row, column and remedy."""


class JobError(RuntimeError):
    """A job that cannot start or go on; the message says why in one sentence."""


class OptionError(ValueError):
    """Options that a command cannot take; the message names the option."""
