"""The target of a router's threshold, for `TrlParser`: `tokalign router` and `tokalign calibrate` share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TargetArguments:
    """The target of the threshold, one of the three."""

    target_rate: float | None = field(default=None, metadata={"help": "Largest share of tokens that may be routed."})
    target_recall: float | None = field(default=None, metadata={"help": "Least share of divergent tokens routed."})
    target_accuracy: float | None = field(
        default=None, metadata={"help": "Least share of responses all of whose divergent tokens are routed."}
    )

    @property
    def given(self) -> dict[str, Any]:
        """Those that are set, as arguments of `calibrate`."""
        return {name: value for name, value in vars(self).items() if value is not None}
