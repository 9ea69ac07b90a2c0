"""Instructions that a judge will read the answers to: AlpacaEval's questions file in, its file of model outputs out.

The judges' own programs compare; here a model only answers. The form is the plainest there is, a JSON list with
`instruction` and `output`, and other judges read it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokalign.stage.errors import ContractError

INSTRUCTION = ("instruction", "prompt")


def read_questions(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines, each with its `instruction` (or `prompt`, which is put there).

    Raises:
        ContractError: no such file, no JSON, or a row without an instruction in words.
    """
    file = Path(path)
    if not file.is_file():
        raise ContractError(f"There is no questions file {path}; download it from the benchmark and check the path.")
    text = file.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text if text.lstrip().startswith("[") else f"[{','.join(lines)}]")
    except json.JSONDecodeError as error:
        raise ContractError(f"{path} is neither a JSON list nor JSON lines ({error}); download it again.") from None
    if not rows:
        raise ContractError(f"{path} holds no questions; download it again.")
    questions = []
    for number, row in enumerate(rows):
        asked = next((row[name] for name in INSTRUCTION if name in row), None) if isinstance(row, dict) else None
        if not isinstance(asked, str) or not asked.strip():
            raise ContractError(f"Row {number} of {path} has no `instruction` in words; mend or remove it.")
        questions.append({**row, "instruction": asked})
    return questions


def as_problems(questions: Sequence[dict[str, Any]], system_prompt: str | None = None) -> list[dict[str, Any]]:
    """The questions as problems without an answer to verify, named by their number."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    prompts = [[*system, {"role": "user", "content": question["instruction"]}] for question in questions]
    return [{"id": str(number), "prompt": prompt, "answer": None} for number, prompt in enumerate(prompts)]


def answer_entries(
    questions: Sequence[dict[str, Any]], rollouts: Sequence[dict[str, Any]], generator: str
) -> list[dict[str, Any]]:
    """The entries of an answer file: each question's own columns, `output`, and the `generator` that wrote it."""
    entries = []
    for rollout in rollouts:
        own = {k: v for k, v in questions[int(rollout["id"])].items() if k not in ("output", "generator")}
        entries.append({**own, "output": rollout["completion"].strip(), "generator": generator})
    return entries
