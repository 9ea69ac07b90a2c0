"""The classes of a token, in the column `label`."""

from __future__ import annotations

IDENTICAL, NEUTRAL, DIVERGENT, INVALID = 0, 1, 2, -1
LABELS = {IDENTICAL: "identical", NEUTRAL: "neutral", DIVERGENT: "divergent", INVALID: "invalid"}
