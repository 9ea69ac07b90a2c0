"""The table of token signals: what each one's numbers mean, and how they become a weight or a reward.

A *token signal* is one number per completion token. Whoever reads one (the contract's checks, the trainers, the
heatmap, the comparison) asks this table for its range, its unit and which end is suspicious, and has no list of its
own. A new signal is one file that computes it and one row here; a user's own is `register(Signal(...))` in their own
file, or an entry point of the group `tokalign.signals` whose value is a `Signal`.

Every trainer states the range that it needs. Two are known, and a signal that is not in one already becomes it by its
row's rule `to_weight`:

    weight  w_t in [0, 1]        1 where the token is suspicious (critical-token DPO: w_t = 1 − s_t, arXiv 2411.19943v3)
    reward  r̂_t in [−0.5, 0.5]   positive where the token is good (T-REG, arXiv 2412.02685): r̂_t = 0.5 − w_t
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

ENTRY_POINTS = "tokalign.signals"
REWARD_RANGE = (-0.5, 0.5)


@dataclass(frozen=True)
class Signal:
    """One row of the table.

    Attributes:
        name: of the columns `chosen_<name>` and `rejected_<name>`.
        title: what people call it.
        low, high: smallest and largest value; infinite where there is none.
        unit: of the values: "probability", "share", "nats", "reward".
        suspicious: the end at which a token is likely wrong.
        to_weight: values (any float array or tensor) -> weights in [0, 1], 1 at the suspicious end; None where no rule
            is known, and then a trainer refuses the signal.
        passes: forward passes over prompt and completion that a scored completion costs; None where only the job that
            made it can count them.
        counted: column in which that job keeps the tokens that went through a model for all sides of a row, where
            the prompts that were read are not the row's own or tokens were sampled.
        command: what makes it.
        paper: arXiv number, empty where there is none.
        sides: on which it is defined, of "chosen" and "rejected", in this order.
        meaning: what the suspicious end says, for a legend.
        module: the file whose `main` is the command `tokalign score <verb>`; empty where there is none.
        online: "module:name" of the credit function that gives it during GRPO (`tokalign.trainers.credits`); empty
            where there is none, and then it cannot be named as `credit`.
    """

    name: str
    title: str
    low: float
    high: float
    unit: str
    suspicious: Literal["low", "high"]
    to_weight: Callable[[Any], Any] | None = None
    passes: float | None = None
    counted: str = ""
    command: str = "your own scorer"
    paper: str = ""
    sides: tuple[str, ...] = ("chosen", "rejected")
    meaning: str = ""
    module: str = ""
    online: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"A signal's name becomes a column's: {self.name!r} must be a Python identifier.")
        if not self.low < self.high:
            raise ValueError(f"Signal {self.name!r}: low ({self.low}) must be below high ({self.high}).")
        if self.suspicious not in ("low", "high"):
            raise ValueError(f"Signal {self.name!r}: suspicious must be 'low' or 'high', got {self.suspicious!r}.")
        if self.sides not in (("chosen", "rejected"), ("chosen",), ("rejected",)):
            raise ValueError(f"Signal {self.name!r}: sides must be 'chosen', 'rejected' or both, got {self.sides}.")

    def to_reward(self, values: Any) -> Any:
        """Rewards in [−0.5, 0.5] of values, 0.5 where nothing is suspicious: r̂ = 0.5 − w."""
        return self.rule("reward")(values)

    def rule(self, needed: Literal["weight", "reward"]) -> Callable[[Any], Any]:
        """What turns values into what a consumer needs.

        Raises:
            ValueError: the row has none; the sentence names the remedy.
        """
        # A reward stays what it is to the last bit, which 0.5 − (0.5 − r̂) would not
        if needed == "reward" and (self.low, self.high, self.suspicious) == (*REWARD_RANGE, "low"):
            return lambda values: values
        to_weight = self.to_weight
        if to_weight is None:
            raise ValueError(
                f"No rule turns the signal {self.name!r} into a {needed}: give the row that you register with "
                "`tokalign.signals.register` a `to_weight`."
            )
        return to_weight if needed == "weight" else lambda values: 0.5 - to_weight(values)

    def suspicion(self, values: Any) -> Any:
        """Values turned so that low is suspicious, which is what `agreement` and the heatmap order tokens by."""
        return values if self.suspicious == "low" else -values


def _probability_to_weight(values: Any) -> Any:
    return 1.0 - values


def _reward_to_weight(values: Any) -> Any:
    return 0.5 - values


def _logprob_to_weight(values: Any) -> Any:
    return 1.0 - math.e**values  # 1 − P(token), from nats


def _entropy_to_weight(values: Any) -> Any:
    return 1.0 - math.e ** (-values)  # 0 for a distribution on one token, towards 1 for one that is spread out


_SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal(
            name="contrast",
            title="contrastive score",
            low=0.0,
            high=1.0,
            unit="probability",
            suspicious="low",
            to_weight=_probability_to_weight,
            passes=2,
            command="tokalign score contrast",
            paper="2411.19943",
            meaning="low: likely critical",
            module="tokalign.signals.contrast",
            online="tokalign.trainers.credits.contrast:ContrastCredit",
        ),
        Signal(
            name="rollout_accuracy",
            title="rollout accuracy",
            low=0.0,
            high=1.0,
            unit="share",
            suspicious="low",
            to_weight=_probability_to_weight,
            counted="rollout_tokens",
            command="tokalign score rollout",
            paper="2411.19943",
            sides=("rejected",),
            meaning="low: few continuations reach the right answer",
            module="tokalign.cli.rollout",
        ),
        Signal(
            name="token_reward",
            title="T-REG reward",
            low=REWARD_RANGE[0],
            high=REWARD_RANGE[1],
            unit="reward",
            suspicious="low",
            to_weight=_reward_to_weight,
            passes=2,
            counted="token_reward_tokens",
            command="tokalign score token-reward",
            paper="2412.02685",
            meaning="below 0 worse, above 0 better",
            module="tokalign.signals.prompting",
        ),
        Signal(
            name="implicit_reward",
            title="DPO implicit reward",
            low=REWARD_RANGE[0],
            high=REWARD_RANGE[1],
            unit="reward",
            suspicious="low",
            to_weight=_reward_to_weight,
            passes=2,
            command="tokalign score likelihood",
            paper="2412.02685",
            meaning="below 0 worse, above 0 better",
            module="tokalign.signals.likelihood",
            online="tokalign.trainers.credits.implicit_reward:ImplicitRewardCredit",
        ),
        Signal(
            name="logprob",
            title="log-prob",
            low=-math.inf,
            high=0.0,
            unit="nats",
            suspicious="low",
            to_weight=_logprob_to_weight,
            passes=1,
            command="tokalign score likelihood",
            meaning="low: improbable token",
            module="tokalign.signals.likelihood",
        ),
        Signal(
            name="claim",
            title="claim score",
            low=0.0,
            high=1.0,
            unit="share",
            suspicious="low",
            to_weight=_probability_to_weight,
            passes=1,
            command="tokalign score claim",
            meaning="low: improbable number or name",
            module="tokalign.signals.claim",
        ),
        Signal(
            name="entropy",
            title="entropy",
            low=0.0,
            high=math.inf,
            unit="nats",
            suspicious="high",
            to_weight=_entropy_to_weight,
            passes=1,
            command="tokalign score likelihood",
            meaning="high: uncertain next token",
            module="tokalign.signals.likelihood",
            online="tokalign.trainers.credits.entropy:EntropyCredit",
        ),
    )
}


def register(signal: Signal) -> Signal:
    """Add a signal of one's own; the same row twice is fine, another row under a name that is taken is not.

    Raises:
        ValueError: the name belongs to another signal.
    """
    if _SIGNALS.setdefault(signal.name, signal) != signal:
        raise ValueError(f"There is a signal {signal.name!r} already: choose another name.")
    return signal


def names() -> list[str]:
    """Names of all signals, those of installed packages included."""
    _load_entry_points()
    return list(_SIGNALS)


def get(name: str) -> Signal:
    """The row of a signal.

    Raises:
        ValueError: nobody has registered it; the sentence names the remedy.
    """
    if name not in _SIGNALS:
        _load_entry_points()
    if name not in _SIGNALS:
        raise ValueError(
            f"There is no token signal {name!r} (there are {', '.join(_SIGNALS)}): register yours with "
            "`tokalign.signals.register(Signal(...))`, which says its range, or, for the `tokalign` command, by an "
            f"entry point of the group {ENTRY_POINTS!r}."
        )
    return _SIGNALS[name]


def known(name: str) -> Signal | None:
    """The row of a signal, None where nobody has registered it: for readers that only show numbers."""
    return _SIGNALS[name] if name in names() else None


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        signal = point.load()
        if not isinstance(signal, Signal):
            raise TypeError(f"The entry point {point.name!r} of {ENTRY_POINTS} is not a Signal: {point.value}.")
        register(signal)
