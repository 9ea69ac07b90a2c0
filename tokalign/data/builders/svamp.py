"""Build SVAMP (Patel et al. 2021, arXiv 2103.07191) as problems: short word problems in many variations.

    tokalign data svamp --source folder/with/svamp.jsonl --output_dir runs/svamp --validation_share 0.15
    tokalign data svamp --source ChilleD/SVAMP --output_dir runs/svamp

The worked solution is the source's equation, an operation a line, as GSM8K ends its own: "76 - 25 = 51", "#### 51".

SVAMP tells one story again with other numbers, or asks something else of it, so questions drawn at random would have
nearly all of their stories in training. Here problems whose stories (`Body`) share `RUN` consecutive words, numbers
aside, are of one group, and so are those that a third one links; a group is wholly in one split. Groups are drawn until
a split has its share. The validation split is drawn first and is the same for every `--split_seed`, so that what is
chosen on it has seen no test problem of any seed. The source's own splits, which part stories, are put together.

Dropped and counted in the manifest: rows whose equation does not give the answer.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from dataclasses import dataclass, field
from fractions import Fraction

from datasets import Dataset, concatenate_datasets

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source, written
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

RUN = 5  # words; with 6 some stories fall apart whose variations differ in an adjective
COLUMNS = ("Body", "Question", "Equation", "Answer")
OPERATORS = {ast.Add: ("+", operator.add), ast.Sub: ("-", operator.sub), ast.Mult: ("*", operator.mul)}
OPERATORS |= {ast.Div: ("/", operator.truediv)}


@dataclass
class SvampArguments(ProblemArguments):
    """What to build."""

    test_share: float = field(default=0.3, metadata={"help": "Share of the problems for the test split, by story."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the test split; another one draws other stories."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.test_share < 1 - self.validation_share:
            raise ContractError(
                f"--test_share is {self.test_share} and --validation_share {self.validation_share}; together they must "
                "leave something to train on."
            )


def number(value: Fraction) -> str:
    """A number as people write it: whole where it is."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def worked(equation: str) -> tuple[list[str], Fraction]:
    """The lines of an equation, innermost operation first, and its value.

    Raises:
        ValueError: no equation of numbers and the four operations, or a division by 0.
    """
    lines: list[str] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return Fraction(str(node.value))
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            sign, apply = OPERATORS[type(node.op)]
            left, right = value(node.left), value(node.right)
            found: Fraction = apply(left, right)
            lines.append(f"{number(left)} {sign} {number(right)} = {number(found)}")
            return found
        raise ValueError(f"{ast.dump(node)} is no number and none of the four operations")

    try:
        return lines, value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from None


def groups(bodies: list[str]) -> list[list[int]]:
    """Indices of the stories that share a run of words, by union of those at either end of a run, in order.

    A story shorter than a run is a run of its own.
    """
    parent = list(range(len(bodies)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, ...], int] = {}
    for i, body in enumerate(bodies):
        for run in runs(body):
            parent[root(i)] = root(first.setdefault(run, i))
    found: dict[int, list[int]] = {}
    for i in range(len(bodies)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())


def runs(body: str) -> set[tuple[str, ...]]:
    """Every `RUN` consecutive words of a story, without its numbers."""
    words = re.findall(r"[^\W\d_]+", body.casefold())
    return {tuple(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def by_story(rows: Dataset, validation_share: float, test_share: float, seed: int) -> dict[str, Dataset]:
    """The rows in splits that have no story in common; a split with no share is left out."""
    left = groups(rows["Body"])
    splits: dict[str, list[int]] = {}
    for split, share, draw in (("validation", validation_share, 0), ("test", test_share, seed)):
        random.Random(f"{split} {draw}").shuffle(left)
        chosen: list[int] = []
        kept: list[list[int]] = []
        for group in left:
            if len(chosen) + len(group) <= round(share * len(rows)):
                chosen += group
            else:
                kept.append(group)
        left, splits[split] = kept, chosen
    splits["train"] = [i for group in left for i in group]
    return {split: rows.select(sorted(splits[split])) for split in ("train", "validation", "test") if splits[split]}


def main(args: SvampArguments) -> None:
    """Write every split, and the card."""
    source = open_source(args.source)
    for split, rows in source.items():
        for name in COLUMNS:
            column(rows, (name,), f"Split {split} of {args.source}")
    rows = concatenate_datasets([part.select_columns(COLUMNS) for part in source.values()])
    rows = rows.map(lambda row: {"question": f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}"})

    def convert(row: dict, split: str) -> dict | Dropped:
        try:
            lines, found = worked(row["Equation"])
            right = found == Fraction(str(row["Answer"]))
        except ValueError:
            right = False
        if not right:
            return Dropped("the equation does not give the answer")
        solution = "\n".join([*lines, f"#### {number(found)}"])
        return {"answer": number(found), "solution": solution, "completion": written(solution, args)}

    build_problems(
        "svamp",
        by_story(rows, args.validation_share, args.test_share, args.split_seed),
        convert,
        args,
        title="SVAMP as tokalign problems",
        licence="mit",
        split_already=True,
        notes=(
            "Arithmetic word problems by Patel, Bhattamishra and Goyal. Problems whose stories share "
            f"{RUN} consecutive words, numbers aside, are in one split."
        ),
    )
