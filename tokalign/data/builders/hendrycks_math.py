"""Build MATH (Hendrycks et al. 2021, arXiv 2103.03874) or its 500-problem subset as problems.

    tokalign data math --source EleutherAI/hendrycks_math --output_dir runs/math --validation_share 0.1
    tokalign data math --source HuggingFaceH4/MATH-500 --output_dir runs/math500

Not named `math.py`: the file of that name in data/ would shadow the standard library's `math` when it is run.

Where the source has no `answer` column, the answer is the last `\\boxed{…}` of the solution; a row without one is
dropped and counted in the manifest. A list of accepted answers is kept as `accepted`, its first element is `answer`.
"""

from dataclasses import dataclass

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source
from tokalign.rewards import extract_answer
from tokalign.stage.jobs import Dropped


@dataclass
class MathArguments(ProblemArguments):
    """What to build."""


def _convert(row: dict, split: str) -> dict | Dropped:
    solution, answer = row.get("solution"), row.get("answer")
    made: dict = {}
    if isinstance(answer, list):
        accepted = [text.strip() for text in answer if text and text.strip()]
        made["accepted"] = accepted
        answer = accepted[0] if accepted else None
    elif "answer" not in row:
        answer = extract_answer(solution) if isinstance(solution, str) and "boxed" in solution else None
    if not isinstance(answer, str) or not answer.strip():
        return Dropped("no final answer")
    made["answer"] = answer.strip()
    if "solution" in row:
        made["solution"] = solution
    return made | {name: row[name] for name in ("level", "subject", "type") if name in row}


def main(args: MathArguments) -> None:
    """Write every split of the source, and the card."""
    splits = open_source(args.source)
    for split, rows in splits.items():
        column(rows, ("answer", "solution"), f"Split {split} of {args.source}")
    build_problems(
        "math",
        splits,
        _convert,
        args,
        title="MATH as tokalign problems",
        licence="mit",
        notes="Competition mathematics; answers are LaTeX and are compared by `tokalign.rewards.answers_match`.",
    )
