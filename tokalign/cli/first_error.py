r"""Mark the true first wrong token of ledger solutions: adds `first_error` (index in `rejected_ids`, −1: none).

    tokalign score first-error --dataset runs/quickstart/scored --problems runs/quickstart/world/train \
        --tokenizer runs/quickstart/base --output_dir runs/first_errors

Only a world that knows its ground truth can have this column; `tokalign compare` judges token signals by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from tokalign.signals.job import PairsArguments, load_pairs
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import allowance
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state
from tokalign.worlds.ledger import Problem, first_error


@dataclass(kw_only=True)
class Arguments(PairsArguments):
    """What to mark."""

    problems: str = field(metadata={"help": "Problems stage of `tokalign data ledger` that holds these ids."})
    tokenizer: str = field(metadata={"help": "Tokenizer of the stage: hub id or path."})
    rendering: str = field(default="worked", metadata={"help": "Rendering of the solutions: worked, json or rows."})


def main(arguments: Arguments) -> None:
    """Copy the stage with one more column."""
    process_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rows = load_pairs(arguments, tokenizer)
    problems = load_stage(arguments.problems, stage="problems")
    if "ledger" not in problems.column_names:
        raise ContractError(f"{arguments.problems} has no column `ledger`; build it with `tokalign data ledger`.")
    ledgers = dict(zip(problems["id"], problems["ledger"], strict=True))

    def mark(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in batch:
            if row["id"] not in ledgers:
                raise ContractError(
                    f"Problem {row['id']!r} is not in {arguments.problems}; pass the stage it came from."
                )
            problem = Problem.from_json(ledgers[row["id"]])
            index = first_error(problem, row["rejected_ids"], tokenizer, rendering=arguments.rendering)
            yield {**row, "first_error": -1 if index is None else index}

    run_job(
        mark,
        rows,
        arguments.output_dir,
        name="mark_first_errors",
        parameters={"rendering": arguments.rendering, "split": arguments.split},
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest=allowance(arguments.allow_other_tokenizer),
    )
