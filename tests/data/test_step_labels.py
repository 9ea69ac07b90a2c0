"""Step-labelled solutions of every format: the first wrong step, its characters, its tokens; rows not to believe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import save_tiny
from tokalign.data.builders import step_labels
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("TOKALIGN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
STEPS = ["We add 2 and 3.", "2 + 3 = 6.", "So it is 6."]
BENCH = {"id": "gsm8k-0", "generator": "a model", "problem": "2 + 3?", "steps": STEPS, "final_answer_correct": False}
MRBEN = {"model": "M", "question": "2 + 3?", "options": "A: 5 \nB: 6", "answer": "A", "steps": STEPS}
BEN_WRONG = MRBEN | {"correct": "incorrect", "first_error_step": "2", "rectified_step": ["", "2 + 3 = 5.\n"]}
BIG = {"input": "2 + 3 =", "steps": STEPS, "target": "5", "answer": "6"}
GSM = {"uuid": "u", "question": "2 + 3?", "model_output_steps": STEPS, "ground_truth_answer": 5}
GSM_WRONG = GSM | {"model_output_solution_correctness": "wrong", "model_output_solution_first_error_step": "2"}
RIGHT = {"correct": "correct", "first_error_step": "N/A", "rectified_step": "N/A"}


def named(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MR-BEN under the keys of its own release."""
    own = {
        **{"question": "Question", "options": "Options", "steps": "Model_Solution_Steps", "model": "Sampled_Model"},
        **{"correct": "Model_Solution_Correctness", "first_error_step": "Model_Solution_First_Error_Step"},
        **{"rectified_step": "Model_Solution_Rectified_First_Error_Step", "answer": "Ground_Truth_Answer"},
    }
    return {own[key]: value for key, value in row.items()}


def rated(*ratings: int, texts: list[str] = STEPS, **step: Any) -> dict[str, Any]:
    """A step of PRM800K whose candidates have these ratings."""
    candidates = [{"text": texts[i], "rating": rating, "flagged": None} for i, rating in enumerate(ratings)]
    return {"completions": candidates, "human_completion": None, "chosen_completion": None} | step


def prm(*steps: dict[str, Any], reason: str, whole: list[str] | None = None) -> dict[str, Any]:
    question = {"problem": "2 + 3?", "ground_truth_answer": "5", "pre_generated_steps": whole}
    return {"question": question, "label": {"steps": list(steps), "finish_reason": reason}}


GOOD = rated(1, chosen_completion=0)
REJECTED = rated(-1, 0, 1, texts=["2 + 3 = 6.", "Hm.", "2 + 3 = 5."])


def read(row: dict[str, Any]) -> Any:
    return step_labels.read(row, step_labels.format_of(row, "The row"))


@pytest.mark.parametrize(
    ("row", "first_wrong", "steps", "rectified", "answer"),
    [
        (BENCH | {"label": 1}, 1, STEPS, "", None),
        (BENCH | {"label": -1, "final_answer_correct": True}, -1, STEPS, "", None),
        (BENCH | {"label": 2, "final_answer_correct": True}, 2, STEPS, "", None),
        (BEN_WRONG, 1, STEPS, "2 + 3 = 5.", "A"),
        (MRBEN | RIGHT, -1, STEPS, "", "A"),
        (named(BEN_WRONG), 1, STEPS, "2 + 3 = 5.", "A"),
        (BIG | {"mistake_index": 0}, 0, STEPS, "", "5"),
        (BIG | {"mistake_index": None, "answer": "5"}, -1, STEPS, "", "5"),
        (BIG | {"mistake_index": 1.0, "answer": "5"}, 1, STEPS, "", "5"),
        (GSM_WRONG, 1, STEPS, "", "5"),
        (GSM_WRONG | {"model_output_solution_first_error_step": 1}, 0, STEPS, "", "5"),
        (prm(GOOD, GOOD, reason="solution"), -1, [STEPS[0]] * 2, "", "5"),
        (prm(GOOD, REJECTED, reason="found_error"), 1, [STEPS[0], "2 + 3 = 6."], "2 + 3 = 5.", "5"),
        (
            prm(GOOD, REJECTED, reason="found_error", whole=[STEPS[0], "2 + 3 = 6.", "So it is 6."]),
            1,
            [STEPS[0], "2 + 3 = 6.", "So it is 6."],
            "2 + 3 = 5.",
            "5",
        ),
        (
            prm(GOOD, rated(-1, -1, human_completion={"text": "It is 5.", "rating": None}), GOOD, reason="solution"),
            1,
            [STEPS[0], STEPS[0]],
            "It is 5.",
            "5",
        ),
    ],
)
def test_every_format_names_its_first_wrong_step(row, first_wrong, steps, rectified, answer) -> None:
    made = read(row)
    assert (made.first_wrong, made.steps, made.rectified, made.answer) == (first_wrong, steps, rectified, answer)


OUTSIDE, CONTRADICTION = "outside the solution", "contradict"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (BENCH | {"label": 3}, OUTSIDE),
        (BENCH | {"label": -2}, OUTSIDE),
        (BENCH | {"label": -1}, CONTRADICTION),
        (BENCH | {"label": "two"}, "not a whole number"),
        (BENCH | {"label": True}, "not a whole number"),
        (BENCH | {"label": 1, "steps": []}, "no steps"),
        (BENCH | {"label": 1, "steps": "one text"}, "no steps"),
        (BENCH | {"label": 1, "steps": ["a", None]}, "a step is no text"),
        (BENCH | {"label": 1, "steps": ["a", " "]}, "has no text"),
        (BEN_WRONG | {"correct": "correct"}, CONTRADICTION),
        (BEN_WRONG | {"first_error_step": "N/A"}, CONTRADICTION),
        (BEN_WRONG | {"first_error_step": "0"}, OUTSIDE),
        (BEN_WRONG | {"first_error_step": "4"}, OUTSIDE),
        (BEN_WRONG | {"correct": "maybe"}, "neither correct nor incorrect"),
        (BIG | {"mistake_index": None}, CONTRADICTION),
        (BIG | {"mistake_index": -1}, CONTRADICTION),
        (GSM_WRONG | {"model_output_solution_correctness": "incorrect"}, "neither correct nor wrong"),
        (GSM_WRONG | {"model_output_solution_first_error_step": 1.5}, "not a whole number"),
        (prm(GOOD, reason="give_up"), "gave it up"),
        (prm(GOOD, reason="found_error"), CONTRADICTION),
        (prm(GOOD, rated(0, -1), reason="found_error"), CONTRADICTION),
        (prm(rated(1, chosen_completion=4), reason="solution"), "not there"),
        (prm(rated(chosen_completion=None), reason="solution"), "no candidate"),
        (prm(rated(None, chosen_completion=0), reason="solution"), "not rated"),
        (prm({"completions": None}, reason="solution"), "no row of PRM800K"),
    ],
)
def test_rows_that_cannot_be_believed_are_dropped_with_their_reason(row, reason) -> None:
    assert reason in read(row).reason


def test_keys_of_no_format_are_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no format of step labels: ProcessBench \(problem, steps, label"):
        build(tmp_path, [{"question": "?", "answer": "5"}])


def build(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl", **options: Any) -> Dataset:
    source = folder / name
    listed = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    source.write_text(listed, encoding="utf-8")
    arguments = {"source": str(source), "output_dir": str(folder / "out"), **options}
    step_labels.main(step_labels.StepLabelArguments(**arguments))
    return load_stage(folder / "out", split="test" if name.endswith(".json") else "train", stage="step_labels")


def test_rows_are_dropped_and_counted_and_fields_may_mix_their_types(tmp_path: Path) -> None:
    wrong = GSM_WRONG | {"model_output_solution_first_error_step": 9}
    right = GSM | {"model_output_solution_correctness": "correct", "model_output_solution_first_error_step": "N/A"}
    rows = build(tmp_path, [GSM_WRONG, wrong, right, {"question": "?"}], "MR-GSM8K.json")
    assert rows["first_wrong"] == [1, -1] and rows["id"] == ["step-labels-test-0", "step-labels-test-2"]
    assert rows["question"][0] == rows["question"][1]
    assert rows[0]["prompt"] == [{"role": "user", "content": "2 + 3?"}]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "\n".join(STEPS)}]
    assert read_manifest(tmp_path / "out" / "test")["dropped"] == {
        "its first wrong step is outside the solution": 1,
        "no `model_output_steps`": 1,
    }


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=6))
def test_spans_are_the_steps_characters(steps: list[str]) -> None:
    text = "\n".join(steps)
    assert [text[start:end] for start, end in step_labels.step_spans(steps)] == steps


@pytest.mark.parametrize("style", ["messages", "string"])
def test_tokens_of_a_step_are_those_of_the_completions_own_ids_that_touch_it(tmp_path: Path, style: str) -> None:
    model = save_tiny(tmp_path / "model")
    rows = build(tmp_path, [BENCH | {"label": 1}], tokenizer=model, prompt_style=style)
    row = rows[0]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    answer = row["completion"] if style == "string" else row["completion"][0]["content"]
    assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True).strip() == answer
    for step, tokens in zip(row["steps"], row["step_tokens"], strict=True):
        assert tokenizer.decode([row["completion_ids"][t] for t in tokens]) == step
    if style == "messages":  # what the model reads in a conversation
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True)
        whole = whole if isinstance(whole, list) else whole["input_ids"]
        assert row["prompt_ids"] + row["completion_ids"] == whole
    assert read_manifest(tmp_path / "out" / "train")["tokenizer_hash"]


@pytest.mark.skipif(not (DATA / "mrben" / "math.jsonl").exists(), reason=f"no step-labelled solutions under {DATA}")
def test_the_published_files_are_read_whole(tmp_path: Path) -> None:
    kept = {
        "mrben/math": (918, 769),
        "bigbench_mistake/multistep_arithmetic": (282, 238),
        "bigbench_mistake/logical_deduction": (300, 294),
        "bigbench_mistake/tracking_shuffled_objects": (292, 260),
    }
    for name, (solutions, wrong) in kept.items():
        out = tmp_path / name
        options = {"source": str(DATA / f"{name}.jsonl"), "output_dir": str(out)}
        step_labels.main(step_labels.StepLabelArguments(**options))
        rows = load_stage(out, split="train", stage="step_labels")
        assert (len(rows), sum(first >= 0 for first in rows["first_wrong"])) == (solutions, wrong), name
