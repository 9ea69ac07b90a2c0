"""Build GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as structured problems: the worked solution as a JSON document.

    tokalign data gsm8k-json --source openai/gsm8k --output_dir runs/gsm8k_json --validation_share 0.1
    tokalign data gsm8k-json --source folder/with/train.jsonl/and/test.jsonl --output_dir runs/gsm8k_json

    {"steps": [{"text": "3 + 2 = 5 hens.", "calculation": "3+2", "result": 5}], "answer": 5}

A step is a line of the solution with a calculator mark `<<3+2=5>>`; the public rows have at most one mark a line, and
of several the last one counts. A line without a mark is put, with a space, before the text of the next step, or after
the last step's text if no step follows. Numbers are read without thousands separators, "$" and "%" (a unit, as in
GSM8K's own final answers: 50 % is 50) and exactly: 3/4 becomes 0.75, and 1/3 has no exact JSON number.

Dropped and counted in the manifest: rows without `####`, with a final answer that is not an integer, without a mark,
or with a result that is no exact number.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source
from tokalign.data.structured import SchemaPromptArguments, ask, assistant, json_text, user
from tokalign.stage.jobs import Dropped

SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "calculation": {"type": "string"},
                    "result": {"type": "number"},
                },
                "required": ["text", "calculation", "result"],
                "additionalProperties": False,
            },
        },
        "answer": {"type": "integer"},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}
_SCHEMA_TEXT = json_text(SCHEMA)
_MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_ANY_MARK = re.compile(r"<<[^<>]*>>")
_UNITS = re.compile(r"^(-?)\$\s*|\s*%$")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"-?(?:\d{1,15}(?:\.\d{0,15})?|\.\d{1,15}|\d{1,15}/0*[1-9]\d{0,14})")


@dataclass
class Gsm8kJsonArguments(SchemaPromptArguments, ProblemArguments):
    """What to build."""

    prompt_style: str = field(
        default="messages", metadata={"help": "'messages' or 'string', of prompt and completion alike."}
    )


def number(text: str) -> int | float | None:
    """The number that a text states, an integer where it is whole; None if JSON cannot state it exactly."""
    text = _SEPARATOR.sub("", _UNITS.sub(r"\1", text.strip()))
    if not _NUMBER.fullmatch(text):
        return None
    exact = Fraction(text)
    if exact.denominator == 1:
        return int(exact)
    return float(exact) if Fraction(repr(float(exact))) == exact else None


def document(solution: str) -> dict | Dropped:
    """The document that a worked solution is, or why there is none."""
    worked, end, final = solution.rpartition("####")
    if not end:
        return Dropped("no final answer after ####")
    answer = number(final)
    if not isinstance(answer, int):
        return Dropped("final answer is not an integer")
    steps: list[dict] = []
    waiting: list[str] = []
    for line in filter(None, map(str.strip, worked.splitlines())):
        waiting.append(_ANY_MARK.sub("", line))
        marks = _MARK.findall(line)
        if not marks:
            continue
        calculation, result = marks[-1][0].strip(), number(marks[-1][1])
        if result is None:
            return Dropped("result is not an exact number")
        steps.append({"text": " ".join(waiting), "calculation": calculation, "result": result})
        waiting = []
    if not steps:
        return Dropped("no calculator mark")
    steps[-1]["text"] = " ".join([steps[-1]["text"], *waiting])
    return {"steps": steps, "answer": answer}


def main(args: Gsm8kJsonArguments) -> None:
    """Write every split of the source, and the card."""
    splits = open_source(args.source, "main")
    asked = ""
    for split, rows in splits.items():
        where = f"Split {split} of {args.source}"
        column(rows, ("answer",), where)
        asked = column(rows, ("question", "problem"), where)

    def convert(row: dict, split: str) -> dict | Dropped:
        made = document(row["answer"]) if isinstance(row["answer"], str) else Dropped("no final answer after ####")
        if isinstance(made, Dropped):
            return made
        prompt, text = ask(row[asked].strip(), SCHEMA, args), json_text(made)
        messages = args.prompt_style == "messages"
        return {
            "prompt": user(prompt) if messages else prompt + "\n",
            "answer": text,
            "schema": _SCHEMA_TEXT,
            "completion": assistant(text) if messages else text,
        }

    build_problems(
        "gsm8k_json",
        splits,
        convert,
        args,
        title="GSM8K-JSON as tokalign structured problems",
        licence="mit",
        notes=(
            "Grade-school mathematics word problems by OpenAI; steps are the lines of the worked solution that have a "
            "calculator mark. `answer` is the document as JSON text, `completion` the same for SFT, `schema` its JSON "
            "Schema; the final number is the document's own `answer`."
        ),
    )
