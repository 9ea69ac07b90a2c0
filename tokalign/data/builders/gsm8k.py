"""Build GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as problems: question, final answer, worked solution.

    tokalign data gsm8k --source openai/gsm8k --output_dir runs/gsm8k --validation_share 0.1
    tokalign data gsm8k --source folder/with/train.jsonl/and/test.jsonl --output_dir runs/gsm8k

A row without `#### <answer>` is dropped and counted in the split's manifest, and so is one of more than `--max_steps`
calculations. `--calculator_marks keep` leaves the source's `<<48/2=24>>` in the worked solutions.
"""

import re
from dataclasses import dataclass, field

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source, written
from tokalign.rewards import extract_answer
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

_MARK = re.compile(r"<<[^<>]*>>")


@dataclass
class Gsm8kArguments(ProblemArguments):
    """What to build."""

    calculator_marks: str = field(default="strip", metadata={"help": "'strip' or 'keep' the <<48/2=24>> in solutions."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Only problems whose solution has at most so many calculations, 0 of them too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calculator_marks not in ("strip", "keep"):
            raise ContractError(f"--calculator_marks is {self.calculator_marks!r}; use 'strip' or 'keep'.")


def main(args: Gsm8kArguments) -> None:
    """Write every split of the source, and the card."""
    splits = open_source(args.source, "main")
    for split, rows in splits.items():
        column(rows, ("answer",), f"Split {split} of {args.source}")

    def convert(row: dict, split: str) -> dict | Dropped:
        solution = row["answer"]
        if not isinstance(solution, str) or "####" not in solution:
            return Dropped("no final answer after ####")
        answer = extract_answer(solution[solution.rindex("####") :])
        if answer is None:
            return Dropped("no final answer after ####")
        if args.max_steps is not None and len(_MARK.findall(solution)) > args.max_steps:
            return Dropped(f"more than {args.max_steps} calculations")
        if args.calculator_marks == "strip":
            solution = _MARK.sub("", solution)
        solution = solution.strip()
        return {"answer": answer, "solution": solution, "completion": written(solution, args)}

    build_problems(
        "gsm8k",
        splits,
        convert,
        args,
        title="GSM8K as tokalign problems",
        licence="mit",
        notes="Grade-school mathematics word problems by OpenAI.",
    )
