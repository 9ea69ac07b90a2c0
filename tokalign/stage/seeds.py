"""Seeds of parts of the work: what a row draws follows from the run's seed and the row, not from shard or process."""

from __future__ import annotations

import hashlib
from typing import Literal


def derived_seed(seed: int, *names: object) -> int:
    """Seed of the part of the work that `names` name, from 0 to 2**63 − 1: what engines take."""
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def problem_seed(seed: int, identity: object, use: Literal["rollouts", "evaluation"]) -> int:
    """Seed of one problem's samples. A test must not draw what training drew, so the two uses have seeds of their own.

    Args:
        seed: of the run.
        identity: the problem's `id`.
        use: what the samples are for.
    """
    # The bytes differ from those of `derived_seed`, because every recorded rollout and evaluation was drawn with them.
    if use == "rollouts":
        return int.from_bytes(hashlib.sha256(f"{seed}\0{identity}".encode()).digest()[:8], "big") >> 1
    return int.from_bytes(hashlib.sha256(f"{seed}:{identity}".encode()).digest()[:7], "big")
