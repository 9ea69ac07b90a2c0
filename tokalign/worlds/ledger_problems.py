"""Problems of the ledger world: who owns how much, what happens, and what is asked; drawn from a seed and split.

`tokalign.worlds.ledger` says what the world is and renders them; `tokalign.worlds.ledger_rich` tells and solves them in
more than one way.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace

NAMES = ("Anna", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")
THINGS = ("coins", "apples", "books", "cards", "pens", "shells")
SPLITS = {"train": (0, 80), "validation": (80, 90), "test": (90, 100)}  # per cent of identities


@dataclass(frozen=True)
class LedgerConfig:
    """Difficulty of the problems.

    Args:
        people: how many people own things.
        min_events, max_events: number of events; a gift changes two balances, the others one.
        max_start: largest balance at the start.
        max_change: largest number of things found, lost or given in one event.
        max_number: no balance ever exceeds it; also the largest number token of the tokenizer.
    """

    people: int = 1
    min_events: int = 3
    max_events: int = 5
    max_start: int = 30
    max_change: int = 20
    max_number: int = 60


# Difficulty by world: in the rich one there is more to read and more to choose, and less to compute.
WORLDS = {
    "plain": LedgerConfig(),
    "rich": LedgerConfig(min_events=2, max_events=3, max_start=10, max_change=9, max_number=20),
}


@dataclass(frozen=True)
class Line:
    """One entry of the ledger: `name: left op right = total`."""

    name: str
    left: int
    op: str
    right: int
    total: int

    def orders(self) -> list[Line]:
        """The line and, where the operation commutes, the line with its operands exchanged."""
        if self.op in "+*" and self.left != self.right:
            return [self, Line(self.name, self.right, self.op, self.left, self.total)]
        return [self]


@dataclass(frozen=True)
class Event:
    """Something that happens to `who` (and, for a gift, to `to`): `kind` is find, lose, give, double or halve."""

    kind: str
    who: int
    amount: int = 0
    to: int = -1


@dataclass(frozen=True)
class Telling:
    """How the rich world tells a problem.

    Args:
        text: the problem in words.
        largest: no number of a solution exceeds it.
        misleading: a number in the text that has nothing to do with the balance but looks as if; −1: none.
    """

    text: str
    largest: int
    misleading: int = -1


@dataclass(frozen=True)
class Problem:
    """A word problem: who owns how much, what happens, and about whom the question is asked.

    `asked` is the index of a person, or −1 for everybody together. A problem of the rich world has a `telling`.
    """

    names: tuple[str, ...]
    thing: str
    start: tuple[int, ...]
    events: tuple[Event, ...]
    asked: int
    steps: tuple[tuple[Line, ...], ...] = field(compare=False)
    answer: int = field(compare=False)
    telling: Telling | None = field(default=None, compare=False)

    @property
    def identity(self) -> str:
        """Hash of what happens, names and things left out; it decides the split and is the problem's id."""
        content = (self.start, [(e.kind, e.who, e.amount, e.to) for e in self.events], self.asked)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    @property
    def split(self) -> str:
        """The split that this problem's identity belongs to."""
        per_cent = int(self.identity, 16) % 100
        return next(name for name, (low, high) in SPLITS.items() if low <= per_cent < high)

    def to_json(self) -> str:
        """The problem as JSON text; `Problem.from_json` reads it back."""
        events = [[e.kind, e.who, e.amount, e.to] for e in self.events]
        told = [] if self.telling is None else [astuple(self.telling)]
        return json.dumps([self.names, self.thing, self.start, events, self.asked, *told])

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The problem that `to_json` wrote, solved anew."""
        names, thing, start, rows, asked, *told = json.loads(text)
        events = tuple(Event(*row) for row in rows)
        solved = _solve(names, start, events, asked)
        if solved is None:
            raise ValueError(f"This ledger problem has an impossible balance: {text[:200]}.")
        telling = Telling(*told[0]) if told else None
        return cls(tuple(names), thing, tuple(start), events, asked, tuple(solved[0]), solved[1], telling)

    def renamed(self, names: Sequence[str], thing: str) -> Problem:
        """The same happens to others, with another thing; told plainly."""
        return Problem.from_json(json.dumps([names, thing, *json.loads(replace(self, telling=None).to_json())[2:]]))

    def text(self) -> str:
        """The problem in words."""
        if self.telling is not None:
            return self.telling.text
        sentences = [f"{name} has {n} {self.thing}." for name, n in zip(self.names, self.start, strict=True)]
        for event in self.events:
            who, thing = self.names[event.who], self.thing
            sentences.append(
                {
                    "find": f"{who} finds {event.amount} {thing}.",
                    "lose": f"{who} loses {event.amount} {thing}.",
                    "give": f"{who} gives {event.amount} {thing} to {self.names[event.to]}.",
                    "double": f"{who} doubles the {thing}.",
                    "halve": f"{who} halves the {thing}.",
                }[event.kind]
            )
        if self.asked >= 0:
            sentences.append(f"How many {self.thing} does {self.names[self.asked]} have?")
        else:
            sentences.append(f"How many {self.thing} do all have?")
        return " ".join(sentences)


def apply(left: int, op: str, right: int) -> int:
    return {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}[op](left, right)


def _solve(problem_names: Sequence[str], start: Sequence[int], events: Sequence[Event], asked: int):
    """Ledger lines, one tuple an event (its lines may come in any order), and the answer; None if a balance is bad."""
    balance = list(start)
    steps: list[tuple[Line, ...]] = []

    def change(who: int, op: str, right: int) -> Line:
        left = balance[who]
        balance[who] = apply(left, op, right)
        return Line(problem_names[who], left, op, right, balance[who])

    for event in events:
        if event.kind == "find":
            steps.append((change(event.who, "+", event.amount),))
        elif event.kind == "lose":
            steps.append((change(event.who, "-", event.amount),))
        elif event.kind == "give":
            steps.append((change(event.who, "-", event.amount), change(event.to, "+", event.amount)))
        elif event.kind == "double":
            steps.append((change(event.who, "*", 2),))
        else:
            if balance[event.who] % 2:
                return None
            steps.append((change(event.who, "/", 2),))
        if min(balance) < 0:
            return None
    if asked >= 0:
        return steps, balance[asked]
    total = balance[0]
    for other in balance[1:]:
        steps.append((Line("All", total, "+", other, total + other),))
        total += other
    return steps, total


def draw_problem(rng: random.Random, config: LedgerConfig | None = None) -> Problem:
    """One problem from `rng`, of any split; balances stay within [0, max_number]."""
    config = config or LedgerConfig()
    while True:
        names = tuple(rng.sample(NAMES, config.people))
        start = tuple(rng.randint(1, config.max_start) for _ in names)
        events = []
        for _ in range(rng.randint(config.min_events, config.max_events)):
            kind = rng.choice(("find", "find", "lose", "lose", "give", "give", "double", "halve"))
            who = rng.randrange(config.people)
            if kind == "give":
                if config.people == 1:
                    continue
                to = rng.choice([i for i in range(config.people) if i != who])
                events.append(Event(kind, who, rng.randint(1, config.max_change), to))
            elif kind in ("find", "lose"):
                events.append(Event(kind, who, rng.randint(1, config.max_change)))
            else:
                events.append(Event(kind, who))
        asked = rng.randrange(-1 if config.people > 1 else 0, config.people)
        solved = _solve(names, start, events, asked) if len(events) >= config.min_events else None
        if solved is None:
            continue
        steps, answer = solved
        # A question about somebody to whom nothing happened would need no ledger.
        touched = asked < 0 or any(line.name == names[asked] for step in steps for line in step)
        if touched and max(line.total for step in steps for line in step) <= config.max_number:
            return Problem(names, rng.choice(THINGS), start, tuple(events), asked, tuple(steps), answer)


def problems(
    split: str,
    n: int,
    *,
    seed: int = 0,
    config: LedgerConfig | None = None,
    draw: Callable[[random.Random, LedgerConfig], Problem] = draw_problem,
    keep: Callable[[Problem], bool] = lambda problem: True,
) -> Iterator[Problem]:
    """`n` problems of a split, no identity twice.

    Args:
        draw: draws one problem of any split. keep: which problems of the split may be taken.

    Raises:
        ValueError: unknown split, or the difficulty is so low that the split runs out of distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < n:
        problem = draw(rng, config or LedgerConfig())
        if problem.split != split or problem.identity in seen or not keep(problem):
            misses += 1
            if misses > 1000 + 200 * n:
                raise ValueError(
                    f"Only {len(seen)} distinct problems of the {n} asked for exist in split {split!r} at this "
                    "difficulty: raise `max_events` or the numbers, or ask for fewer."
                )
            continue
        seen.add(problem.identity)
        yield problem
