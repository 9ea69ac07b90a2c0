"""The ledger world: a made-up domain of word problems in which the first wrong token of any solution is known.

A problem gives some people a number of things, lets a few events change what they own, and asks for a balance:

    Anna has 7 coins. Ben has 4 coins. Anna finds 5 coins. Anna gives 2 coins to Ben. How many coins does Ben have?

and its worked solution keeps the ledger line by line:

    Anna: 7 + 5 = 12
    Anna: 12 - 2 = 10
    Ben: 4 + 2 = 6
    #### 6

All solutions that count as right are enumerable (sums and products commute; the two lines of a gift may come in
either order), so `first_error` is exact: the first token after which no right solution can follow. Public benchmarks
have no such ground truth; here a token signal can be judged against it.

Problems are drawn from a seed and split by *identity* (what happens, with names and things abstracted away), so no
split holds a renamed copy of another split's problem. Every text this module writes survives encode → decode unchanged.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign.worlds import ledger_rich
from tokalign.worlds.ledger_problems import (
    NAMES,
    SPLITS,
    THINGS,
    WORLDS,
    Event,
    LedgerConfig,
    Line,
    Problem,
    apply,
    draw_problem,
    problems,
)

__all__ = [
    "ASKED",
    "JSON_SCHEMA",
    "NAMES",
    "RENDERINGS",
    "REQUESTS",
    "REVISIONS",
    "ROWS_SCHEMA",
    "SCHEMAS",
    "SPLITS",
    "THINGS",
    "WORLDS",
    "Event",
    "LedgerConfig",
    "Line",
    "Problem",
    "build_tokenizer",
    "draw_problem",
    "first_error",
    "problems",
    "prompt",
    "sloppy_solution",
    "solution",
    "wrong_solution",
]

RENDERINGS = ("worked", "json", "rows")
REQUESTS = {"correct": "Write a correct solution.", "wrong": "Write a wrong solution."}
REVISIONS = {
    "correct": "Rewrite the draft so that it is correct.",
    "wrong": "Rewrite the draft so that it is wrong.",
}
SLIPS = ("total", "total", "total", "event")  # what goes wrong in a line, about as often as in a weak model's own
# The schema of the "json" rendering, for structured-output rewards and constrained decoding.
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "left": {"type": "integer"},
                    "op": {"enum": ["+", "-", "*", "/"]},
                    "right": {"type": "integer"},
                    "total": {"type": "integer"},
                },
                "required": ["name", "left", "op", "right", "total"],
                "additionalProperties": False,
            },
        },
        "answer": {"type": "integer"},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}
# The same content under another schema: what is learned on the one may carry over to the other, or not.
ROWS_SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [
                    {"type": "string"},
                    {"type": "integer"},
                    {"enum": ["+", "-", "*", "/"]},
                    {"type": "integer"},
                    {"type": "integer"},
                ],
                "items": False,
                "minItems": 5,
            },
        },
        "answer": {
            "type": "object",
            "properties": {"total": {"type": "integer"}},
            "required": ["total"],
            "additionalProperties": False,
        },
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}
SCHEMAS = {"json": JSON_SCHEMA, "rows": ROWS_SCHEMA}  # rendering -> schema
ASKED = {"json": "Answer in JSON.", "rows": "Answer all in JSON."}  # rendering -> what the prompt asks for


# --- renderings ------------------------------------------------------------------------------------------------------


def _render(steps: Sequence[Sequence[Line]], answer: int, rendering: str) -> str:
    lines = [line for step in steps for line in step]
    if rendering == "worked":
        return "\n".join([f"{x.name}: {x.left} {x.op} {x.right} = {x.total}" for x in lines] + [f"#### {answer}"])
    if rendering == "json":
        entries = [{"name": x.name, "left": x.left, "op": x.op, "right": x.right, "total": x.total} for x in lines]
        return json.dumps({"steps": entries, "answer": answer})
    if rendering == "rows":
        rows = [[x.name, x.left, x.op, x.right, x.total] for x in lines]
        return json.dumps({"steps": rows, "answer": {"total": answer}})
    raise ValueError(f"Unknown rendering {rendering!r}: use one of {', '.join(RENDERINGS)}.")


def solution(problem: Problem, *, rendering: str = "worked", rng: random.Random | None = None, habits: int = 0) -> str:
    """The solution in its plainest order; a worked one of the rich world as `rng` draws it (unset: always the same)."""
    if rendering == "worked" and problem.telling is not None:
        return ledger_rich.write(problem, rng or random.Random(problem.identity), habits=habits)
    return _render(problem.steps, problem.answer, rendering)


def wrong_solution(
    problem: Problem,
    rng: random.Random,
    *,
    rendering: str = "worked",
    slip_rate: float | None = None,
    wording: random.Random | None = None,
) -> str:
    """A deliberately bad solution: errors in some lines, and everything after follows from them.

    Drawn anew until the final answer is wrong (an error in a balance nobody asks about does not count).

    Args:
        slip_rate: None gives one line a wrong total. A rate is each line's chance of a slip, as a weak model makes
            several in one solution: a wrong total three times in four, another event than the story's else.
        wording: draws the words of a worked solution of the rich world, as `rng` of `solution` does; unset is `rng`.
    """
    if rendering == "worked" and problem.telling is not None:
        return ledger_rich.write(problem, wording or rng, ledger_rich.slipped(problem, rng, slip_rate))
    limit = max(30, max(line.total for step in problem.steps for line in step))
    lines_in_all = sum(len(step) for step in problem.steps)
    while True:
        if slip_rate is None:
            slips = {rng.randrange(lines_in_all): "total"}
        else:
            slips = {i: rng.choice(SLIPS) for i in range(lines_in_all) if rng.random() < slip_rate}
        index = itertools.count()
        balance = dict(zip(problem.names, problem.start, strict=True))
        steps: list[list[Line]] = []
        for step in problem.steps:
            lines = []
            for line in step:
                if line.name == "All":  # the running total of a question about everybody
                    done = [x for s in steps for x in s if x.name == "All"]
                    left = done[-1].total if done else balance[problem.names[0]]
                    right = balance[problem.names[len(done) + 1]]
                else:
                    left, right = balance[line.name], line.right
                slip = slips.get(next(index))
                op = line.op
                if slip == "event":
                    op, right = rng.choice((("+", rng.randint(1, 20)), ("-", rng.randint(1, 20)), ("*", 2), ("/", 2)))
                total = apply(left, op, right)
                if slip == "total":
                    total += rng.choice((-3, -2, -1, 1, 2, 3))
                lines.append(Line(line.name, left, op, right, total))
                balance[line.name] = total
            steps.append(lines)
        values = [v for s in steps for x in s for v in (x.left, x.right, x.total)]
        answer = steps[-1][-1].total if problem.asked < 0 else balance[problem.names[problem.asked]]
        if answer != problem.answer and min(values) >= 0 and max(values) <= limit:
            return _render(steps, answer, rendering)


def sloppy_solution(problem: Problem, rng: random.Random, *, rendering: str = "json") -> str:
    """The solution as JSON with one fault of structure, as documents in the wild have them; its numbers are right.

    A key missing or invented, a type wrong, a bracket missing, text before or after, or an end too early: what GRPO
    with structured rewards is to teach out of a model that has read such documents.

    Args:
        rendering: "json" or "rows".
    """
    document = json.loads(solution(problem, rendering=rendering))
    step = rng.choice(document["steps"])
    fault = rng.choice(
        ("missing", "missing step key", "invented", "type", "step type", "bracket", "before", "after", "cut")
    )
    if fault == "missing":
        del document[rng.choice(("steps", "answer"))]
    elif fault == "missing step key":
        keys = ("name", "left", "op", "right", "total")
        key = rng.choice(keys)
        del step[key if rendering == "json" else keys.index(key)]
    elif fault == "invented":
        document["total"] = problem.answer
    elif fault == "type":
        document["answer"] = [problem.answer]
    elif fault == "step type":
        name, total = ("name", "total") if rendering == "json" else (0, 4)
        step[total] = rng.choice(([step[total]], step[name]))
    text = json.dumps(document)
    if fault == "bracket":
        place = rng.choice([i for i, letter in enumerate(text) if letter in "{}[]"])
        text = text[:place] + text[place + 1 :]
    elif fault == "before":
        text = f"Answer in JSON: {text}"
    elif fault == "after":
        text = f"{text} {problem.names[0]} has {problem.answer} {problem.thing}."
    elif fault == "cut":
        ends = [i for i, letter in enumerate(text) if letter in ",}"]
        text = text[: rng.choice(ends[len(ends) // 2 : -1]) + 1]
    return text


def prompt(problem: Problem, *, rendering: str = "worked", request: str | None = None, draft: str | None = None) -> str:
    """The user's message: the problem, then what is asked for.

    Args:
        rendering: "worked" adds nothing, the others ask for their kind of JSON.
        request: None, "correct" or "wrong": ask for a good or a deliberately bad solution.
        draft: a solution to revise; with it, `request` says whether the revision shall be correct or wrong.
    """
    parts = [problem.text()]
    if draft is not None:
        parts.append(f"Draft:\n{draft}\n{REVISIONS[request or 'correct']}")
    elif request is not None:
        parts.append(REQUESTS[request])
    if rendering in ASKED:
        parts.append(ASKED[rendering])
    return " ".join(parts)


# --- the ground truth ------------------------------------------------------------------------------------------------


def _alternatives(problem: Problem, rendering: str) -> list[list[str]]:
    """Right texts, part by part: any choice of one alternative a part, joined, is a right solution."""
    steps = []
    for step in problem.steps:
        texts = []
        for order in itertools.permutations(step):
            for lines in itertools.product(*(line.orders() for line in order)):
                rendered = _render([lines], 0, rendering)
                if rendering == "worked":
                    texts.append(rendered.removesuffix("#### 0"))  # keeps the line's newline
                else:
                    texts.append(rendered.removeprefix('{"steps": [').split('], "answer": ')[0])
        steps.append(list(dict.fromkeys(texts)))
    if rendering == "worked":
        return [*steps, [f"#### {problem.answer}"]]
    joined: list[list[str]] = [['{"steps": [']]
    for i, texts in enumerate(steps):
        joined += [texts] if i == 0 else [[", "], texts]
    end = _render(problem.steps, problem.answer, rendering).split('], "answer": ')[1]
    return [*joined, [f'], "answer": {end}']]


def first_error(
    problem: Problem,
    completion_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rendering: str = "worked",
) -> int | None:
    """Index of the first token after which no right solution can follow; None if there is no such token.

    A completion that stops early (no end token) but is right as far as it goes has no wrong token.
    """
    if rendering == "worked" and problem.telling is not None:
        return ledger_rich.first_error(problem, completion_ids, tokenizer)
    parts = [
        [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        for texts in _alternatives(problem, rendering)
    ]
    parts.append([[tokenizer.eos_token_id]])
    position = 0
    for alternatives in parts:
        alive = alternatives
        for offset in range(len(alternatives[0])):  # all alternatives of a part are equally long
            if position == len(completion_ids):
                return None
            alive = [ids for ids in alive if ids[offset] == completion_ids[position]]
            if not alive:
                return position
            position += 1
    return position if position < len(completion_ids) else None


# --- tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_PIECE = r'"[A-Za-z]+"|"[-+*/]"|[A-Za-z]+|\d+|####|\n|[^\sA-Za-z\d]'


def build_tokenizer(
    config: LedgerConfig | None = None, *, digits: str = "whole", world: str = "plain"
) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the ledger world with a chat template.

    Args:
        config: its `max_number` bounds the number tokens.
        world: "plain" or "rich", which has more words.
        digits: "whole" makes one token of a number, "split" one of each digit (docs/log.md has the comparison).
    """
    config = config or LedgerConfig()
    words: dict[str, None] = dict.fromkeys(SPECIAL_TOKENS)
    if digits == "whole":
        # asides of the rich world name days and pages, whatever the balances are
        largest = max(config.max_number, ledger_rich.DAYS) if world == "rich" else config.max_number
        words |= dict.fromkeys(str(n) for n in range(largest + 1))
    elif digits == "split":
        words |= dict.fromkeys([str(d) for d in range(10)] + [f"@@{d}" for d in range(10)])
    else:
        raise ValueError(f"Unknown digits {digits!r}: use 'whole' or 'split'.")
    sentences = " ".join([*REQUESTS.values(), *REVISIONS.values()])
    words |= dict.fromkeys("+ - * / = : . , ? [ ] { } #### \n".split(" "))
    words |= dict.fromkeys((*NAMES, "All", *THINGS))
    words |= dict.fromkeys(f'"{x}"' for x in (*NAMES, "All", *"+-*/"))
    words |= dict.fromkeys(f'"{key}"' for key in ("steps", "name", "left", "op", "right", "total", "answer"))
    words |= dict.fromkeys("has finds loses gives to doubles halves the How many does do all have".split())
    words |= dict.fromkeys(sentences.replace(".", "").split())
    words |= dict.fromkeys(("Draft", "Answer", "in", "JSON"))
    if world == "rich":
        words |= dict.fromkeys(ledger_rich.WORDS)
        words |= dict.fromkeys(f'"{name}"' for name in ledger_rich.RARE_NAMES)

    backend = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<|unk|>", continuing_subword_prefix="@@")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
    tidy = [(" .", "."), (" ,", ","), (" ?", "?"), (" !", "!"), (" :", ":"), (" \n", "\n"), ("\n ", "\n")]
    tidy += [("{ ", "{"), (" }", "}"), ("[ ", "["), (" ]", "]")]
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="@@", cleanup=False),
            decoders.Fuse(),
            *(decoders.Replace(a, b) for a, b in tidy),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
