"""The rich ledger world: many right solutions, and a first error that enumeration and a plain reader confirm."""

from __future__ import annotations

import bisect
import itertools
import json
import random
import re
from collections import Counter

import pytest

from tokalign.worlds import ledger, ledger_builder, ledger_rich
from tokalign.worlds.ledger import LedgerConfig, Problem, build_tokenizer, first_error, wrong_solution
from tokalign.worlds.ledger_problems import WORLDS, Event

RICH = WORLDS["rich"]
TWO = LedgerConfig(people=2, min_events=2, max_events=4, max_start=12, max_change=9, max_number=20)
CONFIGS = pytest.mark.parametrize("config", [RICH, TWO], ids=["one person", "two people"])


@pytest.fixture(scope="module", params=["whole", "split"])
def tokenizer(request):
    return build_tokenizer(RICH, digits=request.param, world="rich")


def encode(tokenizer, text):
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def some(n, config=RICH, seed=0):
    return list(ledger_rich.problems("train", n, seed=seed, config=config))


@CONFIGS
def test_every_text_survives_the_tokenizer_and_right_ones_have_no_error(tokenizer, config):
    rng = random.Random(0)
    for problem in some(40, config):
        right, wrong = ledger.solution(problem, rng=rng), wrong_solution(problem, rng, slip_rate=0.4)
        counted = ledger_rich.flawed(problem)
        flawed = [] if counted is None else [ledger_rich.write(problem, rng, counted)]
        for text in (ledger.prompt(problem, request="wrong", draft=wrong), right, *flawed):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        ids = encode(tokenizer, right)
        assert first_error(problem, ids, tokenizer) is None
        assert first_error(problem, ids[:-4], tokenizer) is None  # right as far as it goes
        assert first_error(problem, [*ids, ids[0]], tokenizer) == len(ids)  # nothing may stand behind the end
        for text in (wrong, *flawed):
            assert first_error(problem, encode(tokenizer, text), tokenizer) is not None


# --- a plain reader ---------------------------------------------------------------------------------------------------


def is_right(problem: Problem, text: str) -> bool:
    """Reads a whole solution of one person as a teacher would, with no regard to how the grammar is made."""
    *lines, final = text.split("\n")
    balance, pending = problem.start[0], [[e.kind, e.amount] for e in problem.events]
    for line in lines:
        corrected = re.sub(r"(?:about |maybe |say )?\w+, no: ", "", line)
        equation = re.search(r"(\d+)((?: [-+*/] \d+)+)(?: = (\d+))?", corrected)
        stated = re.search(r"has (\d+):", corrected)
        if equation is None:
            if any(int(n) not in (problem.start[0], problem.answer) for n in re.findall(r"\d+", line)):
                return False
            continue
        terms = [(op, int(n)) for op, n in re.findall(r"([-+*/]) (\d+)", equation[2])]
        first = int(equation[1])
        if first != balance:  # operands exchanged
            (op, second), *more = terms
            if more or second != balance or op not in "+*":
                return False
            terms = [(op, first)]
        before = balance
        for op, n in terms:
            kind = {"+": "find", "-": "lose", "*": "double", "/": "halve"}[op]
            # the events up to the next doubling or halving may be taken in any order
            free = list(itertools.takewhile(lambda e: e[0] in ("find", "lose"), pending)) or pending[:1]
            match = next((e for e in free if e[0] == kind and (e[1] or 2) == n), None)
            if match is None:
                return False
            pending.remove(match)
            balance = ledger.apply(balance, op, n)
        said = [int(n) for n in (equation[3], stated and stated[1]) if n]
        if said != [balance]:
            return False
        gap = balance - before
        for words, least, most in (  # what a remark's number may be
            (r"more than (\d+)", 0, balance - 1),
            (r"less than (\d+)", balance + 1, 99),
            (r"(\d+) more than before", gap, gap),
            (r"(\d+) less than before", -gap, -gap),
        ):
            if (match := re.search(words, line)) and not least <= int(match[1]) <= most:
                return False
        if ("odd" in line and balance % 2 == 0) or ("even" in line and balance % 2):
            return False
    return not pending and final == f"#### {problem.answer}" and balance == problem.answer


def test_a_plain_reader_agrees_on_right_and_wrong():
    rng, wrong = random.Random(1), 0
    for problem in some(150):
        assert is_right(problem, ledger_rich.write(problem, rng))
        assert not is_right(problem, wrong_solution(problem, rng))
        if counted := ledger_rich.flawed(problem):
            wrong += 1
            assert not is_right(problem, ledger_rich.write(problem, rng, counted))
    assert 20 < wrong < 75  # false beliefs matter in some of the problems, not in most


def test_a_number_changed_is_found_where_it_stands(tokenizer):
    """Against the plain reader: a changed number is wrong exactly if the reader says so of the whole text."""
    rng, found = random.Random(2), Counter()
    for problem in some(60, seed=3):
        text = ledger_rich.write(problem, rng)
        numbers = list(re.finditer(r"\d+", text))
        place = rng.choice(numbers)
        other = str((int(place[0]) + rng.choice((-1, 1, 2))) % RICH.max_number)
        changed = text[: place.start()] + other + text[place.end() :]
        error = first_error(problem, encode(tokenizer, changed), tokenizer)
        if error is not None:
            # no later than the line under way; a number that is corrected may be any near one
            assert error >= len(tokenizer.encode(text[: place.start()], add_special_tokens=False))
        aside = re.search(rf"(day|page) {other}\b", changed) is not None or ", no:" in changed
        if not aside:
            assert (error is None) == is_right(problem, changed), changed
            found[error is None] += 1
    assert found[False] > 25


# --- enumeration ------------------------------------------------------------------------------------------------------


def sentence_lists(monkeypatch, openings, connectives):
    """A world so small that all its right solutions can be spelled out."""
    small = {
        "OPENINGS": openings,
        "CONNECTIVES": connectives,
        "FORMS": ("{name}:", "{name} has", "{name} has {total}:"),
        "HEDGES": ("about",),
        "REMARKS": ("", "That is {parity}."),
        "CLOSINGS": ("", "Done."),
        "NAMES": ("Anna", "Ben"),
        "RARE_NAMES": (),
        "SLIP": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(ledger_rich, name, value)


def every_line(left, changes, total, connectives):
    """All lines that take these changes, in this order."""
    near = [x for x in (left - 1, left + 1) if x >= 0]
    chain = "".join(f" {op} {n}" for op, n in changes)
    (op, n), *more = changes
    terms = [f"{left}{chain}", *(f"{x}, no: {left}{chain}" for x in near)]
    if not more and op in "+*" and n != left:
        terms.append(f"{n} {op} {left}")
    ends = [f" = {total}", *(f" = about {x}, no: {total}" for x in (total - 1, total + 1) if x >= 0)]
    bodies = [f"{subject} {t}{e}" for subject in ("Anna:", "Anna has") for t in terms for e in ends]
    if not more:
        bodies += [f"Anna has {total}: {t}" for t in terms]
    closings = ["\n", ".\n", f". That is {'odd' if total % 2 else 'even'}.\n"]
    for start, slip in itertools.product(connectives, ("", "Ben, no: ")):
        for body, closing in itertools.product(bodies, closings):
            yield f"{start}{' ' if start else ''}{slip}{body}{closing}"


def every_solution(balance, runs, connectives):
    """All ways to count what is left, by plain recursion over ordered subsets of the first run."""
    if not runs:
        yield from (f"#### {balance}", f"Done.\n#### {balance}")
        return
    run, *rest = runs
    for size in range(1, len(run) + 1):
        for taken in set(itertools.permutations(run, size)):
            total = balance
            for op, n in taken:
                total = ledger.apply(total, op, n)
            if not 0 <= total <= 60:
                continue
            left = list(run)
            for change in taken:
                left.remove(change)
            follows = list(every_solution(total, [left, *rest] if left else rest, connectives))
            for line in every_line(balance, taken, total, connectives):
                yield from (line + text for text in follows)


@pytest.mark.parametrize(
    "start, events",
    [
        (58, [("find", 4), ("lose", 9)]),  # not the sum first: 62 is no number of this world
        (3, [("double", 0), ("lose", 2)]),
        (5, [("find", 5)]),
    ],
)
def test_reading_is_exact_by_enumeration(monkeypatch, start, events):
    """The grammar says all right texts and no other; the first error is where the longest shared prefix ends."""
    one = len(events) == 1  # the product of all choices, twice, would be millions
    openings, connectives = (("", "Here we go."), ("", "So")) if one else (("",), ("",))
    sentence_lists(monkeypatch, openings, connectives)
    happened = [[kind, 0, n, -1] for kind, n in events]
    telling = '["Anna has coins.", 60, -1]'
    text = f'[["Anna"], "coins", [{start}], {happened!s}, 0, {telling}]'.replace("'", '"')
    problem = Problem.from_json(text)
    signs = {"find": "+", "lose": "-", "double": "*", "halve": "/"}
    runs = []
    for kind, n in events:
        if kind in ("find", "lose") and runs and runs[-1][-1][0] in "+-":
            runs[-1].append((signs[kind], n))
        else:
            runs.append([(signs[kind], n or 2)])
    texts = list(every_solution(start, runs, connectives))
    rights = {f"{opening}\n{text}" if opening else text for opening in openings for text in texts}

    grammar, said, waiting = ledger_rich.Grammar(problem), set(), [("", ledger_rich.Grammar(problem).start)]
    while waiting:
        words, state = waiting.pop()
        if state.place == "end":
            said.add(words)
        waiting += [(words + more, after) for more, after, _ in grammar.moves(state)]
    assert said == rights

    tokenizer = build_tokenizer(LedgerConfig(max_number=60), world="rich")
    drawn = sorted(rights)
    rng = random.Random(0)
    places = rng.sample(range(len(drawn)), min(len(drawn), 200))
    encoded = tokenizer(drawn, add_special_tokens=False)["input_ids"]
    ordered = sorted((*ids, tokenizer.eos_token_id) for ids in encoded)
    vocabulary = sorted({i for ids in ordered for i in ids})

    def shared(ids):
        """Length of the longest prefix of `ids` that a right solution has: it is in one of its neighbours."""
        at = bisect.bisect(ordered, tuple(ids))
        return max(
            sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, right, strict=False)))
            for right in ordered[max(0, at - 1) : at + 1]
        )

    for place in places:
        ids = list(ordered[place])
        assert first_error(problem, ids, tokenizer) is None
        for _ in range(3):
            broken = ids[:]
            broken[rng.randrange(len(ids))] = rng.choice(vocabulary)
            expected = shared(broken)
            assert first_error(problem, broken, tokenizer) == (None if expected == len(broken) else expected)


def test_reading_takes_time_in_proportion_to_the_length(tokenizer, monkeypatch):
    """Moves that are looked up for each token do not grow with the length."""
    looked, moves = Counter(), ledger_rich.Grammar.moves
    per_token = {}
    for events in (4, 40):
        happened = [[("find", "lose")[i % 2], 0, 1 + i % 6, -1] for i in range(events)]
        problem = Problem.from_json(json.dumps([["Anna"], "coins", [20], happened, 0, ["", RICH.max_number, -1]]))
        ids = encode(tokenizer, ledger_rich.write(problem, random.Random(0)))

        def counting(self, state, events=events):
            looked[events] += 1
            return moves(self, state)

        monkeypatch.setattr(ledger_rich.Grammar, "moves", counting)
        assert first_error(problem, ids, tokenizer) is None
        monkeypatch.setattr(ledger_rich.Grammar, "moves", moves)
        per_token[events] = looked[events] / len(ids)
    assert per_token[40] < 2 * per_token[4]


# --- problems and the builder's rows ----------------------------------------------------------------------------------


def test_no_seed_trains_on_what_a_base_has_read():
    seen = {
        (part, seed): {p.identity for p in ledger_rich.problems(part, 200, seed=seed)}
        for part, seed in itertools.product(("sft", "train", "validation", "test"), range(3))
    }
    for (part, _), (other, _) in itertools.combinations(seen, 2):
        if part != other:
            assert not any(seen[a] & seen[b] for a in seen if a[0] == part for b in seen if b[0] == other)


@CONFIGS
def test_a_problem_survives_its_json_and_its_documents_are_the_plain_worlds(config):
    for problem in some(30, config):
        again = Problem.from_json(problem.to_json())
        assert (again, again.text(), again.answer, again.steps) == (
            problem,
            problem.text(),
            problem.answer,
            problem.steps,
        )
        told = problem.renamed(problem.names, problem.thing)
        assert told.telling is None and told.events == problem.events and all(isinstance(e, Event) for e in told.events)
        for rendering in ledger.SCHEMAS:
            assert ledger.solution(problem, rendering=rendering) == ledger.solution(told, rendering=rendering)


def rows_of(**options):
    arguments = ledger_builder.LedgerArguments(output_dir="unused", world="rich", sft=300, **options)
    return list(ledger_builder._sft_rows(arguments, RICH))


def checked(rows):
    """Of each row of the first problems whether its solution is right; the problems are found by identity."""
    tokenizer = build_tokenizer(RICH, world="rich")
    problems = {p.identity: p for p in ledger_rich.problems("sft", 100, config=RICH)}
    for row in rows:
        text = row["completion"][0]["content"]
        problem = next(p for name in (*ledger_rich.PEOPLE,) for p in [problems[row["id"]]] if name in p.names)
        yield first_error(problem, encode(tokenizer, text), tokenizer) is None


def test_the_builder_tells_a_problem_three_times_in_other_words():
    rows = rows_of()
    texts, prompts = {}, {}
    for row in rows:
        texts.setdefault(row["id"], set()).add(row["completion"][0]["content"])
        prompts.setdefault(row["id"], set()).add(row["prompt"][0]["content"])
    assert len(texts) == 100 and min(map(len, texts.values())) >= 2
    assert sum(map(len, texts.values())) > 295  # two draws are rarely the same
    assert sum(map(len, prompts.values())) > 200
    assert all(checked(rows))


def test_flawed_authors_are_as_many_as_asked_for():
    right = list(checked(rows_of(flaw_rate=1.0)))
    some_flawed = list(checked(rows_of(flaw_rate=0.5)))
    assert 40 < right.count(False) < 150
    assert 0.3 < some_flawed.count(False) / right.count(False) < 0.7


def test_drafts_are_fixed_in_their_own_words():
    kept = total = 0
    for row in rows_of(draft_share=1.0):
        asked, text = row["prompt"][0]["content"], row["completion"][0]["content"]
        request = next(name for name, sentence in ledger.REVISIONS.items() if sentence in asked)
        draft = asked.split("Draft:\n")[1].split("\n" + ledger.REVISIONS[request])[0]
        if request == "wrong":
            assert text == draft
        elif draft != text:
            total += 1
            words = [re.sub(r"\d+", "#", t).split() for t in (draft, text)]
            kept += sum((Counter(words[0]) & Counter(words[1])).values()) > 0.7 * len(words[1])
    assert total > 40 and kept > 0.7 * total


def test_the_builder_writes_a_rich_world(tmp_path):
    sizes = {"train": 5, "validation": 5, "test": 5, "sft": 6}
    ledger_builder.main(ledger_builder.LedgerArguments(str(tmp_path / "a"), **sizes, world="rich"))
    assert "--world rich" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ValueError, match="Unknown world 'poor': use one of plain, rich"):
        ledger_builder.main(ledger_builder.LedgerArguments(str(tmp_path / "b"), **sizes, world="poor"))
