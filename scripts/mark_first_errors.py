"""Mark the true first wrong token of ledger solutions: adds `first_error` (index in `rejected_ids`, −1: none).

Only a world that knows its ground truth can have this column; scripts/compare_signals.py judges token signals by it.

    python scripts/mark_first_errors.py --dataset runs/scored --problems runs/world/train \
        --tokenizer runs/base --output_dir runs/marked
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.worlds.ledger import Problem, first_error


@dataclass
class MarkFirstErrorsArguments:
    """What to mark."""

    dataset: str = field(metadata={"help": "Preferences stage over ledger problems."})
    problems: str = field(metadata={"help": "Problems stage from data/ledger.py that holds these ids."})
    tokenizer: str = field(metadata={"help": "Tokenizer of the stage: hub id or path."})
    output_dir: str = field(metadata={"help": "Folder of the marked stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    rendering: str = field(default="worked", metadata={"help": "Rendering of the solutions: worked, json or rows."})


def main(args: MarkFirstErrorsArguments) -> None:
    """Copy the stage with one more column."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rows = load_stage(args.dataset, split=args.split, stage="preferences", tokenizer=tokenizer)
    problems = load_stage(args.problems, stage="problems")
    if "ledger" not in problems.column_names:
        raise ContractError(f"{args.problems} has no column `ledger`; build it with data/ledger.py.")
    ledgers = dict(zip(problems["id"], problems["ledger"], strict=True))

    def mark(batch):
        for row in batch:
            if row["id"] not in ledgers:
                raise ContractError(f"Problem {row['id']!r} is not in {args.problems}; pass the stage it came from.")
            problem = Problem.from_json(ledgers[row["id"]])
            index = first_error(problem, row["rejected_ids"], tokenizer, rendering=args.rendering)
            yield {**row, "first_error": -1 if index is None else index}

    run_job(
        mark,
        rows,
        args.output_dir,
        name="mark_first_errors",
        parameters={"rendering": args.rendering, "split": args.split},
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    main(*TrlParser((MarkFirstErrorsArguments,)).parse_args_and_config())
