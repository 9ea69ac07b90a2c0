"""Build solutions whose steps people have labelled: the first wrong step, in characters and in tokens.

    tokalign data step-labels --source gsm8k.json --output_dir runs/processbench --tokenizer Qwen/Qwen2.5-0.5B-Instruct
    tokalign data step-labels --source mrben/math.jsonl --output_dir runs/mrben

Every row is one solution: `prompt`, `completion` (its steps, one a line), `steps`, `step_spans` (characters of the
completion), `first_wrong` (number of the first wrong step from 0, −1 where none is wrong), `rectified` (that step as
it should be; empty where the source does not say), `answer` (the reference; null where there is none), `question`
(the same for all solutions of one question) and `generator` (who wrote it). With `--tokenizer` a row also has the ids
that its model reads, `prompt_ids` and `completion_ids`, and `step_tokens`: of each step the indices of its tokens.
What comes after the first wrong step is neither right nor wrong.

The formats are known by their keys (`FORMATS`): ProcessBench (arXiv 2412.06559) and BIG-Bench Mistake (2311.08516)
count steps from 0, MR-BEN (2406.13975, under its own keys or short ones) and MR-GSM8K (2312.17080) from 1; PRM800K
(2305.20050) rates every step. MR-BEN and PRM800K say how the first wrong step should be.

PRM800K's labellers rate several candidates a step. The solution follows what they chose; where they rejected all, the
first candidate is the wrong step, and the solution ends there unless it was generated before (phase 2). A neutral
step (rating 0) is not wrong.

A row is dropped, and counted by its reason in the manifest, where it has no steps or a step that is no text, a first
wrong step outside of them, without text or not a whole number, or where its labels contradict each other: a right
solution with a wrong step or a wrong one without, no wrong step behind which the answer is wrong all the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokalign.data.problems import (
    ProblemArguments,
    build_problems,
    open_source,
    prompt_of,
    read_files,
    read_lines,
    source_files,
)
from tokalign.prompts import PromptRendering, TemplateArguments, rendering_of
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped
from tokalign.stage.pieces import spans_to_tokens, token_offsets

Row = Mapping[str, Any]
CONTRADICTION = "its labels contradict each other"
NO_NUMBER = "its first wrong step is not a whole number"
NONE_WRONG = ("N/A", "", None)


@dataclass(kw_only=True)
class StepLabelArguments(TemplateArguments, ProblemArguments):
    """What to build."""

    prompt_style: str = field(
        default="messages", metadata={"help": "'messages' or 'string', of prompt and completion alike."}
    )
    tokenizer: str = field(
        default="", metadata={"help": "Hub id or path of the model whose ids the rows shall have; '' for texts alone."}
    )


class Solution(NamedTuple):
    """One labelled solution, whatever the format of its row."""

    question: str
    steps: list[str]
    first_wrong: int  # from 0; −1 where none is wrong
    answer: str | None = None
    rectified: str = ""
    generator: str = ""


class Span(NamedTuple):
    """Characters `start` to `end` (not included) of the completion."""

    start: int
    end: int


def _number(value: Any, first: int) -> int | Dropped:
    """A number of a step as an index from 0, of a format that counts from `first`; it may stand in a text."""
    if isinstance(value, str) and value.strip().removeprefix("-").isdigit():
        value = int(value)
    if isinstance(value, float) and value.is_integer():  # a column with gaps becomes one of floats
        value = int(value)
    return value - first if isinstance(value, int) and not isinstance(value, bool) else Dropped(NO_NUMBER)


def _first_wrong(value: Any, correct: bool) -> int | Dropped:
    """Of a format that counts from 1 and says in a second field whether the solution is right."""
    if value in NONE_WRONG:
        return -1 if correct else Dropped(CONTRADICTION)
    if correct:
        return Dropped(CONTRADICTION)
    number = _number(value, 1)
    return Dropped("its first wrong step is outside the solution") if number == -1 else number


def _verdict(value: Any, wrong: str) -> bool | Dropped:
    said = str(value).strip().lower()
    return said == "correct" if said in ("correct", wrong) else Dropped(f"its verdict is neither correct nor {wrong}")


def _text(value: Any) -> str:
    return "" if value in NONE_WRONG else str(value).strip()


def processbench(row: Row) -> Solution | Dropped:
    number = _number(row["label"], 0)
    if isinstance(number, Dropped):
        return number
    if number == -1 and not row["final_answer_correct"]:
        return Dropped(CONTRADICTION)
    return Solution(row["problem"], row["steps"], number, generator=_text(row.get("generator")))


def _mrben(row: Row, prefix: str) -> Solution | Dropped:
    names = {
        "": ("question", "options", "steps", "correct", "first_error_step", "rectified_step", "answer", "model"),
        "Model_Solution_": (
            *("Question", "Options", "Model_Solution_Steps", "Model_Solution_Correctness"),
            *("Model_Solution_First_Error_Step", "Model_Solution_Rectified_First_Error_Step"),
            *("Ground_Truth_Answer", "Sampled_Model"),
        ),
    }[prefix]
    question, options, steps, correct, wrong, rectified, answer, model = (row.get(name) for name in names)
    right = _verdict(correct, "incorrect")
    number = right if isinstance(right, Dropped) else _first_wrong(wrong, right)
    if isinstance(number, Dropped):
        return number
    # several annotators may have rectified the step: the first who wrote something
    written = rectified if isinstance(rectified, list) else [rectified]
    return Solution(
        f"{question}\n{options}" if _text(options) else str(question or ""),
        steps,  # type: ignore[arg-type]  # looked at below, as of all formats
        number,
        _text(answer) or None,
        next((_text(text) for text in written if _text(text)), "") if number >= 0 else "",
        _text(model),
    )


def mr_gsm8k(row: Row) -> Solution | Dropped:
    right = _verdict(row["model_output_solution_correctness"], "wrong")
    number = right if isinstance(right, Dropped) else _first_wrong(row["model_output_solution_first_error_step"], right)
    if isinstance(number, Dropped):
        return number
    return Solution(row["question"], row["model_output_steps"], number, _text(row.get("ground_truth_answer")) or None)


def bigbench_mistake(row: Row) -> Solution | Dropped:
    number = -1 if row["mistake_index"] is None else _number(row["mistake_index"], 0)
    if isinstance(number, Dropped):
        return number
    # −1 is no way to say "none" here, and a wrong answer has a mistake before it
    if (number == -1) != (row["mistake_index"] is None) or (number == -1 and row["answer"] != row["target"]):
        return Dropped(CONTRADICTION)
    return Solution(row["input"], row["steps"], number, _text(row["target"]) or None)


def prm800k(row: Row) -> Solution | Dropped:
    question, label = row["question"], row["label"]
    if label.get("finish_reason") in ("bad_problem", "give_up"):
        return Dropped("the labeller gave it up")
    steps: list[str] = []
    wrong, rectified = -1, ""
    for step in label["steps"]:
        candidates, chosen, human = step["completions"] or [], step["chosen_completion"], step["human_completion"]
        human = human["text"] if isinstance(human, dict) else human
        if chosen is not None and not (isinstance(chosen, int) and 0 <= chosen < len(candidates)):
            return Dropped("its chosen candidate is not there")
        if chosen is None and not candidates:
            return Dropped("a step has no candidate")
        taken = candidates[0 if chosen is None else chosen]
        if taken["rating"] not in (-1, 0, 1):
            return Dropped("a step is not rated")
        if chosen is None and any(candidate["rating"] != -1 for candidate in candidates[:1]):
            return Dropped(CONTRADICTION)  # nothing was chosen, and the first candidate was not rejected
        steps.append(taken["text"])
        if taken["rating"] == -1:
            wrong = len(steps) - 1
            good = [candidate["text"] for candidate in candidates if candidate["rating"] == 1]
            rectified = _text(human) or next((_text(text) for text in good), "")
            break
    # Phase 1 goes on behind a rejected step, with a human's, so what ends as a "solution" may have a wrong step
    if wrong == -1 and label.get("finish_reason") == "found_error":
        return Dropped(CONTRADICTION)
    whole = question.get("pre_generated_steps") or []
    if whole[: len(steps)] == steps:
        steps = whole
    return Solution(question["problem"], steps, wrong, _text(question.get("ground_truth_answer")) or None, rectified)


class Format(NamedTuple):
    """A format: its name, the keys by which it is known, and what reads a row."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], Solution | Dropped]


FORMATS = (
    Format("ProcessBench", ("problem", "steps", "label", "final_answer_correct"), processbench),
    Format(
        "MR-BEN",
        ("Question", "Model_Solution_Steps", "Model_Solution_Correctness", "Model_Solution_First_Error_Step"),
        lambda row: _mrben(row, "Model_Solution_"),
    ),
    Format("MR-BEN", ("question", "steps", "correct", "first_error_step"), lambda row: _mrben(row, "")),
    Format(
        "MR-GSM8K",
        (
            *("question", "model_output_steps", "model_output_solution_correctness"),
            "model_output_solution_first_error_step",
        ),
        mr_gsm8k,
    ),
    Format("BIG-Bench Mistake", ("input", "steps", "mistake_index", "target", "answer"), bigbench_mistake),
    Format("PRM800K", ("question", "label"), prm800k),
)


def format_of(row: Row, where: str) -> Format:
    """The format that a row has the keys of.

    Raises:
        ContractError: it has those of none.
    """
    for known in FORMATS:
        if all(key in row for key in known.keys):
            return known
    forms = "; ".join(f"{known.name} ({', '.join(known.keys)})" for known in FORMATS)
    raise ContractError(f"{where} has the keys {', '.join(row)}, which are those of no format of step labels: {forms}.")


def read(row: Row, form: Format) -> Solution | Dropped:
    """The solution of a row, with its steps and the place of the first wrong one looked at."""
    if missing := [key for key in form.keys if key not in row]:
        return Dropped(f"no `{missing[0]}`")
    try:
        made = form.read(row)
    except (KeyError, TypeError, AttributeError) as error:
        return Dropped(f"it is no row of {form.name} ({type(error).__name__})")
    if isinstance(made, Dropped):
        return made
    if not isinstance(made.steps, list) or not made.steps:
        return Dropped("no steps")
    if not all(isinstance(step, str) for step in made.steps):
        return Dropped("a step is no text")
    if not -1 <= made.first_wrong < len(made.steps):
        return Dropped("its first wrong step is outside the solution")
    if made.first_wrong >= 0 and not made.steps[made.first_wrong].strip():
        return Dropped("its first wrong step has no text")
    return made


def step_spans(steps: list[str]) -> list[Span]:
    """Characters of each step in the steps joined by newlines; a step without text has an empty span."""
    spans, at = [], 0
    for step in steps:
        spans.append(Span(at, at + len(step)))
        at += len(step) + 1
    return spans


def step_ids(
    prompt: str | list[dict[str, str]],
    completion: str,
    spans: list[Span],
    tokenizer: PreTrainedTokenizerBase,
    rendering: PromptRendering,
) -> dict[str, Any] | Dropped:
    """`prompt_ids`, `completion_ids` and `step_tokens`: the ids that the model reads, cut nowhere and made once."""
    row = {"prompt": prompt}
    prompt_ids = rendering.ids(row, tokenizer)
    if isinstance(prompt, str):
        whole = list(tokenizer(prompt + completion)["input_ids"])
    else:
        answered = {"prompt": [*prompt, {"role": "assistant", "content": completion}]}
        whole = rendering.ids(answered, tokenizer, add_generation_prompt=False)
    if whole[: len(prompt_ids)] != prompt_ids:
        return Dropped("prompt and completion share a token")
    ids = whole[len(prompt_ids) :]
    offsets = token_offsets(tokenizer, ids, completion)
    if offsets is None:
        return Dropped("its tokens do not join to its text")
    return {"prompt_ids": prompt_ids, "completion_ids": ids, "step_tokens": spans_to_tokens(offsets, spans)}


def splits_of(source: str) -> list[str]:
    """The splits that a source has."""
    return ["test"] if _is_list(source) else list(source_files(source) or open_source(source))


def _is_list(source: str) -> bool:
    """Whether the source is a `.json` file, which holds a list of rows, as ProcessBench and MR-GSM8K are given."""
    return Path(source).is_file() and Path(source).suffix == ".json"


def _rows(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, as their file has them: a field may hold a number in one row and a text in the next."""
    if _is_list(source):
        try:
            rows = json.loads(Path(source).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ContractError(f"{source} is not JSON ({error.msg}, line {error.lineno}); repair it.") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ContractError(f"{source} is not a list of JSON objects; give one row a line (.jsonl), or a list.")
        yield from rows
        return
    files = source_files(source).get(split, [])
    if files and files[0].suffix == ".jsonl":
        for file in files:
            yield from read_lines(file)
    else:
        yield from open_source(source)[split]


def solutions_of(source: str, split: str) -> Iterator[dict[str, str]]:
    """A split's solutions as JSON text beside their question, or why a row is dropped: columns of one type."""
    form = None
    for row in _rows(source, split):
        form = form or format_of(row, f"The first row of {source}")
        made = read(row, form)
        if isinstance(made, Dropped):
            yield {"question": "?", "solution": json.dumps({"dropped": made.reason})}
        else:
            yield {"question": made.question, "solution": json.dumps(made._asdict())}


def main(args: StepLabelArguments) -> None:
    """Write every split of the source, and the card."""
    with TemporaryDirectory() as folder:
        splits = {}
        for split in splits_of(args.source):
            file = Path(folder) / f"{split}.jsonl"
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in solutions_of(args.source, split))
            if not file.stat().st_size:
                raise ContractError(f"Split {split} of {args.source} holds no row; check --source.")
            splits[split] = read_files([file], cache_dir=folder)
        _build(args, splits)


def _build(args: StepLabelArguments, splits: Mapping[str, Dataset]) -> None:
    tokenizer = rendering = None
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        folder = Path(args.output_dir) / next(iter(splits))
        form = "chat" if args.prompt_style == "messages" else "raw"
        rendering = rendering_of(args, tokenizer, folder=folder, prompt_format=form)

    def convert(row: dict, split: str) -> dict | Dropped:
        made = json.loads(row["solution"])
        if "dropped" in made:
            return Dropped(made["dropped"])
        text, spans = "\n".join(made["steps"]), step_spans(made["steps"])
        identity = " ".join(made["question"].split()).casefold().encode()
        columns = {
            **{name: made[name] for name in ("answer", "steps", "first_wrong", "rectified", "generator")},
            "question": hashlib.blake2b(identity, digest_size=8).hexdigest(),
            "completion": [{"role": "assistant", "content": text}] if args.prompt_style == "messages" else text,
            "step_spans": [list(span) for span in spans],
        }
        if tokenizer is None or rendering is None:
            return columns
        ids = step_ids(prompt_of(made["question"], args), text, spans, tokenizer, rendering)
        return ids if isinstance(ids, Dropped) else columns | ids

    build_problems(
        "step-labels",
        splits,
        convert,
        args,
        title="Step-labelled solutions as tokalign rows",
        licence="other",
        tokenizer=tokenizer,
        prompts=None if rendering is None or tokenizer is None else rendering.record(tokenizer),
        notes=(
            "Solutions whose steps people have labelled. `first_wrong` counts from 0 and is −1 where no step is wrong; "
            "`step_spans` are characters of the completion, `step_tokens` indices of `completion_ids`. What comes "
            "after the first wrong step is neither right nor wrong. The licence is the source's."
        ),
    )
