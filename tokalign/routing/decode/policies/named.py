"""A policy from a command's options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tokalign.routing.decode.policies.alone import AlwaysLLM, NeverLLM
from tokalign.routing.decode.policies.call import CallPolicy
from tokalign.routing.decode.policies.entropy import EntropyPolicy
from tokalign.routing.decode.policies.hysteresis import HysteresisPolicy
from tokalign.routing.decode.policies.protocol import RoutingPolicy
from tokalign.routing.decode.policies.random import RandomPolicy
from tokalign.routing.decode.policies.value import ValueHead, ValuePolicy
from tokalign.routing.router.model import TokenRouterConfig

PolicyName = Literal["router", "entropy", "random", "hysteresis", "value", "call", "always", "never"]
NEEDS: dict[str, set[str]] = {
    "router": {"router"},
    "entropy": {"threshold"},
    "random": {"rate"},
    "hysteresis": {"threshold"},
    "value": {"value_head"},
    "call": {"calls"},
    "always": set(),
    "never": set(),
}
MAY: dict[str, set[str]] = {
    "router": {"threshold"},
    "hysteresis": {"back", "most"},
    "value": {"threshold"},
    "call": {"threshold"},
}


def prompts_of_labels(router: str) -> dict[str, Any] | None:
    """How the prompts of the labels were rendered that a router, by hub id or folder, was trained on; None: unknown."""
    return TokenRouterConfig.from_pretrained(router).prompts


def named_policy(
    name: PolicyName,
    *,
    router: str | None = None,
    threshold: float | None = None,
    rate: float | None = None,
    back: float | None = None,
    most: int | None = None,
    value_head: str | None = None,
    calls: Sequence[str] | None = None,
) -> RoutingPolicy | None:
    """The policy of a command's options; None for `router`, which is loaded with the pair.

    Args:
        calls: TOKEN=NUMBER each, see `CallPolicy`.

    Raises:
        ValueError: an option that the policy lacks, or one that does not belong to it.
    """
    given = {
        "router": router,
        "threshold": threshold,
        "rate": rate,
        "back": back,
        "most": most,
        "value_head": value_head,
        "calls": calls or None,
    }
    for option, value in given.items():
        if value is not None and option not in NEEDS[name] | MAY.get(name, set()):
            raise ValueError(f"--{option} does not belong to --policy {name}: leave one of them out.")
        if value is None and option in NEEDS[name]:
            raise ValueError(f"--policy {name} needs --{option}: give it, or choose another policy.")
    own = {} if threshold is None else {"threshold": threshold}
    if name == "entropy":
        return EntropyPolicy(**own)
    if name == "random" and rate is not None:
        return RandomPolicy(rate)
    if name == "hysteresis":
        return HysteresisPolicy(**own, back=back, most=most)
    if name == "value" and value_head is not None:
        return ValuePolicy(ValueHead.load(value_head), **own)
    if name == "call" and calls is not None:
        return CallPolicy(dict(map(_call, calls)), **own)
    alone: dict[str, Any] = {"always": AlwaysLLM(), "never": NeverLLM()}  # frozen: nobody moves their thresholds
    return alone.get(name)


def _call(text: str) -> tuple[str, int]:
    token, _, number = text.rpartition("=")
    if not token or not number.isdecimal():
        raise ValueError(f"--calls has {text!r}: write a token and how many tokens it asks for, e.g. '<call>=20'.")
    return token, int(number)
