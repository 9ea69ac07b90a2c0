"""Build the ledger world (`tokalign.worlds.ledger`): problems, worked solutions for SFT, tokenizer, untrained models.

    tokalign data ledger --output_dir runs/ledger

writes `train/`, `validation/`, `test/` (problems), `sft/` (prompt and completion messages over train identities),
and one folder for each preset of ledger_models.py (tokenizer and architecture, to be trained by `tokalign sft
--from_scratch`).

    tokalign data ledger --output_dir runs/ledger_json --problem_rendering json --renderings json

makes structured problems: they ask for JSON, `answer` is the solution as JSON text, and `schema` and `completion` stand
beside it. The rendering `rows` is the same content under another schema.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from datasets import Dataset

from tokalign.data.card import command_of, write_dataset_card
from tokalign.data.structured import assistant, json_text, user
from tokalign.stage.jobs import run_job
from tokalign.worlds import ledger, ledger_rich
from tokalign.worlds.ledger_models import PRESETS, write_untrained

STRUCTURED = {  # columns of structured problems that others have not, or have with another content
    "answer": "the right document, as JSON text",
    "solution": "the same",
    "schema": "JSON Schema of the document, as JSON text",
    "completion": "the right document, as one assistant message, for SFT",
}
SLIP_RATE = 0.4  # of a wrong draft's lines: several errors a draft, as in a weak model's own


@dataclass
class LedgerArguments:
    """What to build."""

    output_dir: str = field(metadata={"help": "Folder to write to."})
    train: int = field(default=2000, metadata={"help": "Problems of the train split (for rollouts)."})
    validation: int = field(default=1000, metadata={"help": "Problems of the validation split."})
    test: int = field(default=2000, metadata={"help": "Problems of the test split."})
    sft: int = field(default=40000, metadata={"help": "Worked solutions for the base models, over train identities."})
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    world: str = field(
        default="plain",
        metadata={"help": "'plain': one way to say a thing; 'rich': many (`tokalign.worlds.ledger_rich`)."},
    )
    sft_renderings: int = field(
        default=3,
        metadata={"help": "Rich world: times that a problem of `sft` is told and solved."},
    )
    flaw_rate: float = field(
        default=0.0,
        metadata={"help": "Rich world: share of the SFT rows that false beliefs change which follow them."},
    )
    habits: int = field(
        default=0, metadata={"help": "Rich world: which words people prefer in right and flawed SFT solutions, a seed."}
    )
    digits: str = field(default="whole", metadata={"help": "Number tokens: 'whole' or 'split'."})
    # Difficulty; unset is that of the world (`tokalign.worlds.ledger_problems.WORLDS`)
    people: int | None = field(default=None, metadata={"help": "People in a problem; two make a much harder world."})
    min_events: int | None = field(default=None, metadata={"help": "Fewest events of a problem."})
    max_events: int | None = field(default=None, metadata={"help": "Most events of a problem."})
    max_start: int | None = field(default=None, metadata={"help": "Largest balance at the start."})
    max_change: int | None = field(default=None, metadata={"help": "Largest change by one event."})
    max_number: int | None = field(default=None, metadata={"help": "No balance exceeds it."})
    renderings: list[str] = field(
        default_factory=lambda: ["worked"], metadata={"help": "SFT renderings to mix evenly: worked, json, rows."}
    )
    problem_rendering: str = field(
        default="worked",
        metadata={"help": "What problems ask for: 'worked', or 'json' or 'rows' (structured problems)."},
    )
    request_share: float = field(
        default=0.0, metadata={"help": "Share of SFT rows that ask for a correct or a wrong solution by name."}
    )
    draft_share: float = field(
        default=0.0, metadata={"help": "Share of SFT rows that show a draft and ask to rewrite it correct or wrong."}
    )
    sloppy_share: float = field(
        default=0.0,
        metadata={"help": "Share of SFT rows in JSON that have a fault of structure (`tokalign.worlds.ledger`)."},
    )


def _problem_rows(split: str, n: int, args: LedgerArguments, config: ledger.LedgerConfig):
    rendering = args.problem_rendering
    draw = ledger_rich.problems if args.world == "rich" else ledger.problems
    for problem in draw(split, n, seed=args.seed, config=config):
        solution = ledger.solution(problem, rendering=rendering)
        row = {
            "id": problem.identity,
            "prompt": user(ledger.prompt(problem, rendering=rendering)),
            "answer": str(problem.answer),
            "solution": solution,
            "ledger": problem.to_json(),
        }
        if rendering in ledger.SCHEMAS:
            schema = json_text(ledger.SCHEMAS[rendering])
            row |= {"answer": solution, "schema": schema, "completion": assistant(solution)}
        yield row


def _revision(problem: ledger.Problem, rng: random.Random, rendering: str) -> tuple[str, str]:
    """Prompt and completion of a row that asks to rewrite a draft.

    "Correct" sees right and wrong drafts and answers with the solution. "Wrong" sees wrong drafts only and answers with
    the draft, so that the two requests part exactly at the draft's errors (docs/log.md: with right drafts for both, a
    small model had not learned to heed the request after 1,000 steps).
    """
    request = rng.choice(("correct", "wrong"))
    # In the rich world a draft and its revision choose their words alike
    wording = None if problem.telling is None else rng.random()
    right = ledger.solution(problem, rendering=rendering, rng=random.Random(wording))
    if request == "correct" and rng.random() < 0.5:
        draft = right
    else:
        words = None if wording is None else random.Random(wording)
        draft = ledger.wrong_solution(problem, rng, rendering=rendering, slip_rate=SLIP_RATE, wording=words)
    text = draft if request == "wrong" else right
    return ledger.prompt(problem, rendering=rendering, request=request, draft=draft), text


def _sft_problems(args: LedgerArguments, config: ledger.LedgerConfig, rng: random.Random) -> Iterator[ledger.Problem]:
    """One problem a row; in the rich world several tellings of each, of identities that no other part has."""
    if args.world == "plain":
        yield from ledger.problems("train", args.sft, seed=args.seed + 1, config=config)
        return
    distinct = math.ceil(args.sft / args.sft_renderings)
    for row, problem in enumerate(ledger_rich.problems("sft", distinct, seed=args.seed, config=config)):
        for _ in range(min(args.sft_renderings, args.sft - row * args.sft_renderings)):
            yield ledger_rich.tell(problem, rng, config.max_number)


def _answer(problem: ledger.Problem, rng: random.Random, rendering: str, args: LedgerArguments) -> str:
    """The solution of an SFT row: right, but for false beliefs of its author where those matter."""
    rich = problem.telling is not None and rendering == "worked"
    if rich and rng.random() < args.flaw_rate and (counted := ledger_rich.flawed(problem)) is not None:
        return ledger_rich.write(problem, rng, counted, habits=args.habits)
    return ledger.solution(problem, rendering=rendering, rng=rng, habits=args.habits)


def _sft_rows(args: LedgerArguments, config: ledger.LedgerConfig):
    rng = random.Random(args.seed)
    sloppy = random.Random(f"sloppy-{args.seed}")
    drafts = random.Random(f"drafts-{args.seed}")  # its own, so that rows without a draft are those of draft_share 0
    for problem in _sft_problems(args, config, random.Random(f"tellings-{args.seed}")):
        rendering, request = rng.choice(args.renderings), None
        if rng.random() < args.request_share:
            request = rng.choice(("correct", "wrong"))
        if request == "wrong":
            text = ledger.wrong_solution(problem, rng, rendering=rendering)
        else:
            text = _answer(problem, rng, rendering, args)
        if rendering in ledger.SCHEMAS and request is None and sloppy.random() < args.sloppy_share:
            text = ledger.sloppy_solution(problem, sloppy, rendering=rendering)
        asked = ledger.prompt(problem, rendering=rendering, request=request)
        if drafts.random() < args.draft_share:
            asked, text = _revision(problem, drafts, rendering)
        yield {
            "id": problem.identity,
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": text}],
        }


def main(args: LedgerArguments) -> None:
    """Write every part; parts that are already there are kept."""
    if args.world not in ledger.WORLDS:
        raise ValueError(f"Unknown world {args.world!r}: use one of {', '.join(ledger.WORLDS)}.")
    output = Path(args.output_dir)
    chosen = {f.name: getattr(args, f.name) for f in fields(ledger.LedgerConfig)}
    config = replace(ledger.WORLDS[args.world], **{name: n for name, n in chosen.items() if n is not None})
    tokenizer = ledger.build_tokenizer(config, digits=args.digits, world=args.world)
    parameters = {k: v for k, v in asdict(args).items() if k != "output_dir"} | asdict(config)
    if args.world == "plain":  # a folder built before the rich world existed is still this one
        parameters = {
            k: v for k, v in parameters.items() if k not in ("world", "sft_renderings", "flaw_rate", "habits")
        }
    if args.problem_rendering == "worked":
        del parameters["problem_rendering"]  # a folder built before the option existed is still this one
    if not args.sloppy_share:
        del parameters["sloppy_share"]
    for split in ledger.SPLITS:
        rows = Dataset.from_list(list(_problem_rows(split, getattr(args, split), args, config)))
        run_job(lambda batch: batch, rows, output / split, name="ledger problems", parameters=parameters)
    rows = Dataset.from_list(list(_sft_rows(args, config)))
    run_job(lambda batch: batch, rows, output / "sft", name="ledger solutions", parameters=parameters, shard_size=8192)
    for preset in PRESETS:
        write_untrained(preset, tokenizer, output / preset)
    write_dataset_card(
        output,
        title="Ledger world",
        source="generated by tokalign (tokalign data ledger)",
        licence="apache-2.0",
        columns={
            "id": "hash of what happens in the problem, names and things left out",
            "prompt": "the problem as one user message",
            "answer": "the balance asked for",
            "solution": "worked solution",
            "ledger": "the problem as JSON, from which the first wrong token of any solution follows",
            **(STRUCTURED if args.problem_rendering != "worked" else {}),
        },
        splits={split: getattr(args, split) for split in ledger.SPLITS},
        command=command_of("data ledger", args),
        notes="Splits share no identity; `sft/` uses identities of the train split only.",
    )
