"""The rich ledger world: problems told and solved in many ways, of which it is still known exactly which are right.

A problem has the events of the plain world (`tokalign.worlds.ledger`). Its story is drawn from paraphrases, and may
hold a number that has nothing to do with the question. A right solution looks like this:

    At the start there are 7.
    Then Anna: 7 + 5 = 12
    So Anna has 11, no: 12 - 2 = about 9, no: 10. That is more than 4.
    #### 10

It counts every event of the person asked about once; it may take additions and subtractions between two doublings or
halvings in any order, take several of them in one line, exchange operands, open and close as it likes, add true
remarks, and correct itself. All choices have long tails, and people have habits: which words come first depends on the
name, and on whose texts a model has read (`habits`). So right tokens are often surprising, and two good models often
differ in words that do not matter.

The authors of a weak model's data can have two false beliefs, in some of their solutions (`flawed`): that twice as many
is two more, and that another person's number is the one that counts. So wrong tokens are often sure,
as people's systematic errors are (Brown & Burton, "Diagnostic Models for Procedural Bugs in Basic Mathematical
Skills", Cognitive Science 2, 1978).

One grammar, `moves`, both writes solutions and reads them. A reader (`first_error`) keeps every state that the tokens
so far allow, and the first token that no state allows is the first after which no right solution can follow. That is
exact as every state has a way to the end: the balance at the end of a run of additions and subtractions is that of
the story, whatever their order, and one line may take all that are left of a run. States at a token are few, whatever
the length, so reading takes time in proportion to the length.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from tokalign.worlds.ledger_problems import (
    NAMES,
    THINGS,
    LedgerConfig,
    Problem,
    Telling,
    apply,
    draw_problem,
)
from tokalign.worlds.ledger_problems import problems as plain_problems

# --- words: in each list the first is the most usual, and the last are rare ------------------------------------------

RARE_NAMES = tuple(
    "Ida Jon Kim Lars Mia Nils Olga Paul Rosa Sven Tara Udo Vera Wim Yara Zoe Amos Bela Cyd Dora Emil Faye".split()
)
PEOPLE = (*NAMES, *RARE_NAMES, "All")
STARTS = (
    "{name} has {n} {thing}.",
    "{name} owns {n} {thing}.",
    "At first {name} has {n} {thing}.",
    "There are {n} {thing} in the bag of {name}.",
    "{n} {thing} belong to {name}.",
    "{name} starts with {n} {thing}.",
)
EVENTS = {
    "find": (
        "{name} finds {n} {thing}.",
        "{name} gets {n} {thing}.",
        "{name} buys {n} {thing}.",
        "Then {name} wins {n} more.",
        "{n} {thing} are given to {name}.",
        "{name} picks up {n}.",
        "A friend sends {n} {thing} to {name}.",
    ),
    "lose": (
        "{name} loses {n} {thing}.",
        "{name} sells {n} {thing}.",
        "{name} drops {n} {thing}.",
        "Then {n} {thing} break.",
        "{n} {thing} are stolen.",
        "{name} throws away {n}.",
        "A friend takes {n} {thing}.",
    ),
    "give": (
        "{name} gives {n} {thing} to {other}.",
        "{name} hands {n} {thing} to {other}.",
        "{other} gets {n} {thing} from {name}.",
    ),
    "double": (
        "{name} doubles the {thing}.",
        "Now {name} has twice as many.",
        "The number of {thing} doubles.",
        "{name} brings as many again.",
    ),
    "halve": (
        "{name} halves the {thing}.",
        "Half of the {thing} are gone.",
        "{name} keeps half of the {thing}.",
        "{name} parts with every other one.",
    ),
}
QUESTIONS = (
    "How many {thing} does {name} have?",
    "How many {thing} does {name} have now?",
    "What does {name} have in the end?",
    "How many are there at last?",
)
QUESTIONS_OF_ALL = ("How many {thing} do all have?", "How many {thing} are there in all?")
MISLEADING = ("{other} has {n} {thing}.", "A friend owns {n} {thing}.")
ASIDES_OF_A_STORY = (
    "A bag costs {n} euros.",
    "It is day {n}.",
    "{name} is {n} years old.",
    "The shop has {n} shelves.",
    "It rains.",
    "{name} is glad.",
)
OPENINGS = (
    "",
    "Let us see.",
    "Step by step.",
    "At the start there are {start}.",
    "Let us count.",
    "Think of {name} first.",
    "It begins with {start}.",
    "Here we go.",
    "This is easy.",
)
CONNECTIVES = ("", "Then", "Now", "Next,", "So", "After that", "Later", "And", "Well,", "Again,")
FORMS = ("{name}:", "{name} has", "That makes", "For {name} it is", "{name} has {total}:")
HEDGES = ("about", "maybe", "say")
REMARKS = (
    "",
    "That is more than {less}.",
    "Good.",
    "That is {parity}.",
    "That is {change} before.",
    "That is less than {more}.",
    "It is day {day}.",
    "{name} is glad.",
    "See page {day}.",
    "Fine.",
    "What a number!",
)
CLOSINGS = ("", "So {name} has {total}.", "That is all.", "In the end it is {total}.", "Done.")

# --- how often -------------------------------------------------------------------------------------------------------

TAIL = 1.2  # the choice of rank r has weight r^-TAIL
TOLD = 3.5  # a story's words have a shorter tail than a solution's: what is asked should be understood
RARE_NUMBERS = 0.06  # of the problems: numbers up to twice as large
ASIDE, MISLED = 0.3, 0.2  # of the stories
USUAL_ORDER = 0.85  # of lines with a choice of event: it is the first that is left
MERGED = 0.04  # of lines that could take another event
EXCHANGED = 0.05  # of lines with operands that may be exchanged
TOTAL_FIRST = 0.04  # of lines
SLIP_OF_NAME, SLIP_OF_LEFT, SLIP_OF_TOTAL = 0.01, 0.08, 0.1
PLAIN = {"opening": 1.5, "connective": 1.5, "remark": 2.0, "closing": 2.0}  # weight of saying nothing
SLIP = 3  # a slip that is corrected is at most so far off
DAYS = 28
MISLEADS = 9  # a number that misleads is at most so large, as what is found or lost: believed, it leads somewhere


class Change(NamedTuple):
    """What an event does to a balance: `op amount` as written; by `by` and `off` a wrong author's total differs."""

    op: str
    amount: int
    by: str
    off: int = 0

    def total(self, left: int) -> int:
        return apply(left, self.by, self.amount) + self.off


class Account(NamedTuple):
    """A balance and the runs of changes that are left: those of the first may be taken in any order."""

    balance: int
    runs: tuple[tuple[Change, ...], ...]


class State(NamedTuple):
    """Where a solution stands: what comes next, the accounts, and what the line under way has said."""

    place: str
    accounts: tuple[Account, ...]
    who: int = 0
    value: int = 0
    change: Change | None = None


Move = tuple[str, State, float]  # words, what follows them, weight of the choice


# --- problems --------------------------------------------------------------------------------------------------------


def problems(part: str, n: int, *, seed: int = 0, config: LedgerConfig | None = None) -> Iterator[Problem]:
    """`n` problems of a part, no identity twice: a split of the plain world, or "sft".

    "sft" and "train" share the identities of the plain split "train" without overlap, so that no seed's training
    problems are what any base model has read.

    Raises:
        ValueError: as in the plain world.
    """
    split = "train" if part == "sft" else part

    def mine(problem: Problem) -> bool:
        return split != "train" or (int(problem.identity, 16) // 100 % 2 == 0) == (part == "sft")

    return plain_problems(split, n, seed=seed, config=config, draw=draw, keep=mine)


def draw(rng: random.Random, config: LedgerConfig) -> Problem:
    """A problem with its telling: names with a long tail, rare large numbers, paraphrases, asides."""
    wide = replace(config, max_start=2 * config.max_start, max_change=2 * config.max_change)
    problem = draw_problem(rng, wide if rng.random() < RARE_NUMBERS else config)
    pool, names = [*NAMES, *RARE_NAMES], []
    for _ in problem.names:
        names.append(pool.pop(_rank(rng, len(pool), TAIL)))
    return tell(problem.renamed(names, rng.choice(THINGS)), rng, config.max_number)


def tell(problem: Problem, rng: random.Random, largest: int) -> Problem:
    """The problem with words of its own. largest: no number of a solution exceeds it."""

    def say(templates: Sequence[str], **words: object) -> str:
        return templates[_rank(rng, len(templates), TOLD)].format(thing=problem.thing, **words)

    names, misleading = problem.names, -1
    friend = rng.choice([name for name in NAMES if name not in names])
    sentences = [say(STARTS, name=name, n=n) for name, n in zip(names, problem.start, strict=True)]
    if rng.random() < MISLED:
        misleading = rng.randint(1, MISLEADS)
        sentences.insert(rng.randrange(2), say(MISLEADING, other=friend, n=misleading))
    for event in problem.events:
        other = names[event.to] if event.to >= 0 else friend
        sentences.append(say(EVENTS[event.kind], name=names[event.who], other=other, n=event.amount))
    if rng.random() < ASIDE:
        aside = say(ASIDES_OF_A_STORY, name=names[0], n=rng.randint(1, DAYS))
        sentences.insert(rng.randint(1, len(sentences)), aside)
    asked = say(QUESTIONS_OF_ALL) if problem.asked < 0 else say(QUESTIONS, name=names[problem.asked])
    return replace(problem, telling=Telling(" ".join([*sentences, asked]), largest, misleading))


def _rank(rng: random.Random, n: int, tail: float) -> int:
    """A number below n, the smaller the likelier: a long tail (Zipf)."""
    return rng.choices(range(n), [(r + 1) ** -tail for r in range(n)])[0]


# --- what is to be counted -------------------------------------------------------------------------------------------


def accounts(problem: Problem) -> tuple[Account, ...]:
    """Of every person: the balance at the start, and the changes in runs that may be taken in any order."""
    runs: list[list[list[Change]]] = [[] for _ in problem.names]

    def add(who: int, op: str, amount: int) -> None:
        free = op in "+-"
        if not (free and runs[who] and runs[who][-1][0].op in "+-"):
            runs[who].append([])
        runs[who][-1].append(Change(op, amount, op))

    for event in problem.events:
        if event.kind == "give":
            add(event.who, "-", event.amount)
            add(event.to, "+", event.amount)
        else:
            op = {"find": "+", "lose": "-", "double": "*", "halve": "/"}[event.kind]
            add(event.who, op, event.amount or 2)
    return tuple(
        Account(start, tuple(tuple(run) for run in own)) for start, own in zip(problem.start, runs, strict=True)
    )


def flawed(problem: Problem) -> tuple[Account, ...] | None:
    """What an author with false beliefs counts; None where the beliefs do not matter.

    Twice as many is two more; and where the story tells what somebody else has, that number stands in for the first
    that was found or lost.
    """
    right = accounts(problem)
    assert problem.telling is not None
    counted, misled = [], problem.telling.misleading < 0
    for who, account in enumerate(right):
        balance, runs = account
        for i, run in enumerate(runs if problem.asked in (-1, who) else ()):
            changes = []
            for change in run:
                if change.op == "*":
                    believed = change._replace(by="+")
                    if believed.total(balance) != change.total(balance):  # 2 + 2 is 2 * 2
                        change = believed
                elif change.op in "+-" and not misled:
                    misled = True
                    change = change._replace(amount=problem.telling.misleading)
                changes.append(change)
                balance = change.total(balance)
            runs = (*runs[:i], tuple(changes), *runs[i + 1 :])
        counted.append(account._replace(runs=runs))
    return None if tuple(counted) == right or _answer(problem, tuple(counted)) is None else tuple(counted)


def _answer(problem: Problem, counted: tuple[Account, ...]) -> int | None:
    """The answer that counting so leads to; None where a balance at the end of a run is no number of the world."""
    assert problem.telling is not None
    balances = []
    for balance, runs in counted:
        for run in runs:
            for change in run:
                balance = change.total(balance)
            if not 0 <= balance <= problem.telling.largest:
                return None
        balances.append(balance)
    total = sum(balances) if problem.asked < 0 else balances[problem.asked]
    return total if total <= problem.telling.largest else None


def slipped(problem: Problem, rng: random.Random, slip_rate: float | None) -> tuple[Account, ...]:
    """The changes with wrong totals or other events here and there (`ledger.wrong_solution`)."""
    right = accounts(problem)
    places = [(i, j, k) for i, a in enumerate(right) for j, run in enumerate(a.runs) for k in range(len(run))]

    def slip(change: Change, here: tuple[int, int, int]) -> Change:
        if here not in slips:
            return change
        if slip_rate is None or rng.random() < 0.75:
            return change._replace(off=rng.choice((-3, -2, -1, 1, 2, 3)))
        # as no slip leaves its run, an event is mistaken for one that may be taken where it stands
        op, amount = (rng.choice("+-"), rng.randint(1, 20)) if change.op in "+-" else (rng.choice("*/"), 2)
        return Change(op, amount, op)

    while True:
        slips = {rng.choice(places)} if slip_rate is None else {p for p in places if rng.random() < slip_rate}
        counted = tuple(
            Account(
                a.balance, tuple(tuple(slip(c, (i, j, k)) for k, c in enumerate(run)) for j, run in enumerate(a.runs))
            )
            for i, a in enumerate(right)
        )
        if _answer(problem, counted) not in (None, problem.answer):
            return counted


# --- the grammar of solutions ----------------------------------------------------------------------------------------


class Grammar:
    """Everything that a solution of a problem may say, word by word.

    Args:
        problem: of the rich world.
        counted: what is counted; the right changes if absent.
        habits: which habits people have; what may be said does not depend on it.
    """

    def __init__(self, problem: Problem, counted: tuple[Account, ...] | None = None, habits: int = 0):
        assert problem.telling is not None
        self.problem, self.largest, self.habits = problem, problem.telling.largest, habits
        self.names = (*problem.names, "All")
        self.others = (*NAMES, *RARE_NAMES)
        self.start = State("opening", counted or accounts(problem))

    def moves(self, state: State) -> list[Move]:
        """What may be said next, what follows, and the weight of saying it; nothing behind the answer."""
        return getattr(self, f"_{state.place}")(state)

    def _choices(self, slot: str, templates: Sequence[str], name: str) -> list[tuple[int, str, float]]:
        """Templates with weights of a long tail, in the order of this person's habits; the first, plain, is apart."""
        shift = zlib.crc32(f"{self.habits} {slot} {name}".encode())
        plain, rest = PLAIN.get(slot), len(templates) - 1
        weights = [plain] if plain else [1.0]
        weights += [((i + shift) % rest + 1.0) ** -TAIL for i in range(rest)]
        if plain is None:  # no way of saying nothing: all are shifted
            weights = [((i + shift) % (rest + 1) + 1.0) ** -TAIL for i in range(rest + 1)]
        return list(zip(range(rest + 1), templates, weights, strict=True))

    def _opening(self, state: State) -> list[Move]:
        name, start = self.names[0], self.problem.start[0]
        words = {"name": name, "start": start}
        line = state._replace(place="line")
        return [
            (f"{text.format(**words)}\n" if text else "", line, weight)
            for _, text, weight in self._choices("opening", OPENINGS, name)
        ]

    def _line(self, state: State) -> list[Move]:
        asked, everybody = self.problem.asked, not any(account.runs for account in state.accounts)
        people = len(self.problem.names)
        if asked < 0 and everybody and len(state.accounts) == people and people > 1:
            # The balances of all are added up, in their order: one more account
            runs = tuple((Change("+", account.balance, "+"),) for account in state.accounts[1:])
            return self._line(state._replace(accounts=(*state.accounts, Account(state.accounts[0].balance, runs))))
        answered = everybody if asked < 0 else not state.accounts[asked].runs
        found: list[Move] = []
        if answered:
            total = state.accounts[asked].balance
            words = {"name": self.names[asked], "total": total}
            closings = self._choices("closing", CLOSINGS, self.names[asked]) if asked >= 0 else [(0, "", 1.0)]
            for _, text, weight in closings:
                said = f"{text.format(**words)}\n" if text else ""
                found.append((f"{said}#### {total}", state._replace(place="end"), weight))
        if not everybody:
            share = 0.0 if answered else 1.0  # what nobody asks about may be counted, but is not written
            for who, account in enumerate(state.accounts):
                if account.runs:
                    for _, text, weight in self._choices("connective", CONNECTIVES, self.names[who]):
                        subject = state._replace(place="subject", who=who)
                        found.append((f"{text} " if text else "", subject, share * weight))
                    share *= 0.2
        return found

    def _subject(self, state: State) -> list[Move]:
        found = self._named(state)
        named, name = state._replace(place="named"), self.names[state.who]
        slips = [other for other in self.others if other != name]
        total = sum(weight for *_, weight in found)
        return found + [(f"{x}, no: ", named, SLIP_OF_NAME * total / len(slips)) for x in slips]

    def _named(self, state: State) -> list[Move]:
        name, account = self.names[state.who], state.accounts[state.who]
        found: list[Move] = []
        *usual, total_first = FORMS
        for _, text, weight in self._choices("form", usual, self.names[0]):
            if text == "That makes" and len(self.names) > 2:
                continue  # whose balance it is would not be said
            found.append((f"{text.format(name=name)} ", state._replace(place="left"), weight))
        weight = TOTAL_FIRST * sum(weight for *_, weight in found)  # nobody's habit, as it is hard
        for change, share in self._next(account):
            total = change.total(account.balance)
            if 0 <= total <= self.largest:
                said = total_first.format(name=name, total=total)
                after = state._replace(place="left", change=change, value=total)
                found.append((f"{said} ", after, weight * share))
        return found

    def _next(self, account: Account) -> list[tuple[Change, float]]:
        """The changes that may be next, with weights: usually the story's order, else by a long tail."""
        run = account.runs[0]
        weights = [USUAL_ORDER] + [(1 - USUAL_ORDER) / (len(run) - 1)] * (len(run) - 1) if len(run) > 1 else [1.0]
        merged: dict[Change, float] = {}
        for change, weight in zip(run, weights, strict=True):
            merged[change] = merged.get(change, 0.0) + weight
        return list(merged.items())

    def _left(self, state: State) -> list[Move]:
        account = state.accounts[state.who]
        left = account.balance
        found = [(f"{left} ", state._replace(place="right", value=left), 1 - SLIP_OF_LEFT)]
        slips = [x for x in range(max(0, left - SLIP), min(self.largest, left + SLIP) + 1) if x != left]
        found += [
            (f"{x}, no: {left} ", state._replace(place="right", value=left), SLIP_OF_LEFT / len(slips)) for x in slips
        ]
        options = [(state.change, 1.0)] if state.change is not None else self._next(account)
        for change, share in options:
            total = change.total(left)
            if change.op in "+*" and change.amount != left and 0 <= total <= self.largest:
                after = self._taken(state, change, total)
                found.append((f"{change.amount} {change.op} {left}", after, EXCHANGED * share))
        return found

    def _taken(self, state: State, change: Change, value: int) -> State:
        """The state once a change has been taken: the next is the total, or what follows where that stood first."""
        account = state.accounts[state.who]
        first, *rest = account.runs
        left = list(first)
        left.remove(change)
        runs = (tuple(left), *rest)
        changed = (*state.accounts[: state.who], Account(account.balance, runs), *state.accounts[state.who + 1 :])
        place = "total" if state.change is None else "finished"
        return state._replace(place=place, accounts=changed, value=value)

    def _right(self, state: State) -> list[Move]:
        account = state.accounts[state.who]
        options = [(state.change, 1.0)] if state.change is not None else self._next(account)
        found: list[Move] = []
        for change, share in options:
            after = self._taken(state, change, change.total(state.value))
            if state.change is None and after.accounts[state.who].runs[0]:
                after = after._replace(place="more")
            found.append((f"{change.op} {change.amount}", after, share))
        return found

    def _more(self, state: State) -> list[Move]:
        """Another change in the same line, or its total; out of range, no total may stand here."""
        ended = state._replace(place="total")
        inside = 0 <= state.value <= self.largest
        found = [("", ended, 1 - MERGED)] if inside else []
        if not state.accounts[state.who].runs[0]:
            return found
        return found + [(f" {words}", after, MERGED * share) for words, after, share in self._right(state)]

    def _total(self, state: State) -> list[Move]:
        total, finished = state.value, state._replace(place="finished")
        if not 0 <= total <= self.largest:
            return []
        found = [(f" = {total}", finished, 1 - SLIP_OF_TOTAL)]
        slips = [x for x in range(max(0, total - SLIP), min(self.largest, total + SLIP) + 1) if x != total]
        for hedge, x in itertools.product(HEDGES, slips):
            share = SLIP_OF_TOTAL / len(slips) / len(HEDGES)
            found.append((f" = {hedge} {x}, no: {total}", finished, share))
        return found

    def _finished(self, state: State) -> list[Move]:
        """The end of a line, with or without a remark; its total is the balance from here on."""
        account, name, total = state.accounts[state.who], self.names[state.who], state.value
        runs = account.runs if account.runs[0] else account.runs[1:]
        closed = (*state.accounts[: state.who], Account(total, runs), *state.accounts[state.who + 1 :])
        following = State("line", closed)
        gap = abs(total - account.balance)
        comparison = f"{gap} {'more' if total > account.balance else 'less'} than"
        found: list[Move] = []
        for _, text, weight in self._choices("remark", REMARKS, name):
            if not text:
                found += [("\n", following, 0.9 * weight), (".\n", following, 0.1 * weight)]
                continue
            words: list[dict[str, Any]] = [
                {"name": name, "parity": "odd" if total % 2 else "even", "change": comparison}
            ]
            if "{change}" in text and not gap:
                continue
            for key, values in (("less", range(total)), ("more", range(total + 1, self.largest + 1)), ("day", DAY)):
                if f"{{{key}}}" in text:
                    words = [{key: value} for value in values]
            found += [(f". {text.format(**own)}\n", following, weight / len(words)) for own in words]
        return found

    def _end(self, state: State) -> list[Move]:
        return []


DAY = range(1, DAYS + 1)


def write(problem: Problem, rng: random.Random, counted: tuple[Account, ...] | None = None, *, habits: int = 0) -> str:
    """A solution drawn from `Grammar`, right if what is counted is; drawn anew where it leads nowhere."""
    grammar = Grammar(problem, counted, habits)
    for _ in range(100):
        text, state = "", grammar.start
        while state.place != "end":
            options = [move for move in grammar.moves(state) if move[2]]
            if not options:
                break
            words, state, _weight = rng.choices(options, [weight for *_, weight in options])[0]
            text += words
        else:
            return text
    raise ValueError(f"No solution of this problem stays within the numbers: {problem.text()}")


_IDS: MutableMapping[PreTrainedTokenizerBase, dict[str, tuple[int, ...]]] = WeakKeyDictionary()  # of words


def first_error(problem: Problem, completion_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """`ledger.first_error` for worked solutions of the rich world."""
    grammar, known = Grammar(problem), _IDS.setdefault(tokenizer, {})
    unknown = tokenizer.unk_token_id

    def ids(text: str) -> tuple[int, ...]:
        if text not in known:
            known[text] = tuple(tokenizer.encode(text, add_special_tokens=False))
        return known[text]

    def expand(states: set[State]) -> set[tuple[tuple[int, ...], State]]:
        """What may be read next: words, as ids, with the state behind them; moves without words are followed."""
        found: set[tuple[tuple[int, ...], State]] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state.place == "end":
                found.add(((tokenizer.eos_token_id,), state._replace(place="over")))
            elif state.place != "over":
                for text, after, _ in grammar.moves(state):
                    if not text:
                        waiting.append(after)
                    elif unknown not in (words := ids(text)):
                        found.add((words, after))
        return found

    alive = expand({grammar.start})
    for position, token in enumerate(completion_ids):
        read = {(words[1:], state) for words, state in alive if words[0] == token}
        if not read:
            return position
        alive = {pair for pair in read if pair[0]} | expand({state for words, state in read if not words})
    return None


def _words() -> tuple[str, ...]:
    """Every word of the rich world, for the tokenizer."""
    lists = (STARTS, *EVENTS.values(), QUESTIONS, QUESTIONS_OF_ALL, MISLEADING, ASIDES_OF_A_STORY)
    lists += (OPENINGS, CONNECTIVES, FORMS, HEDGES, REMARKS, CLOSINGS, RARE_NAMES, ("even odd more less than no !",))
    return tuple(dict.fromkeys(re.findall(r"[A-Za-z]+|!", re.sub(r"{\w+}", "", " ".join(itertools.chain(*lists))))))


WORDS = _words()
