"""Compositions: signals as scores in [0, 1], first errors as routing labels, and the page with its verdicts."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from compositions import (
    AGREED,
    CONTRAST,
    DETECTION,
    DETECTOR_CLAIMS,
    DPO,
    METHODS,
    OWN,
    REFERENCE,
    ROUTERS,
    WEIGHTS,
    composed_columns,
    detector_rows,
    summarise_detection,
)
from datasets import Dataset
from ledger_comparison import difference, summary
from ledger_stages import over_seeds
from pages import compositions as pages

from tests.trainers.preferences import preference_rows

ROW = {
    "id": "p",
    "prompt_ids": [5],
    "rejected_ids": [7, 8, 9],
    "rejected_token_reward": [-0.5, 0.0, 0.25],
    "rejected_entropy": [0.0, 2.0, 0.5],
    "rejected_logprob": [0.0, math.log(0.25), math.log(0.5)],
    "first_error": 1,
}


def test_signals_become_scores_that_are_low_where_they_suspect():
    found = composed_columns(ROW, [7, 6, 9], seed=0)
    assert found["rejected_s_reward"] == [0.0, 0.5, 0.75]
    assert found["rejected_s_entropy"] == [1.0, 0.0, 0.75]
    assert found["rejected_s_logprob"] == pytest.approx([1.0, 0.25, 0.5])
    assert found["rejected_s_llm"] == [AGREED, 0.0, AGREED]
    assert all(len(values) == 3 and 0 <= min(values) <= max(values) <= 1 for values in found.values())
    assert {f"rejected_{signal}" for signal in WEIGHTS.values() if signal.startswith("s_")} == set(found)


def test_a_composed_score_trains(tiny_path, tmp_path, monkeypatch):
    (tmp_path / "pairs").mkdir()
    rows = [row | {"rejected_s_llm": row["rejected_contrast"]} for row in preference_rows(tiny_path, 4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs" / "train.parquet")
    script = Path(__file__).parents[2] / METHODS["LLM disagrees"].recipe
    options = ["--model_name_or_path", tiny_path, "--dataset_name", str(tmp_path / "pairs"), "--signal", "s_llm"]
    options += ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(script), *options, "--report_to", "none"])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_random_scores_depend_on_the_pair_and_the_seed_alone():
    def draw(row, seed):
        return composed_columns(row, row["rejected_ids"], seed)["rejected_s_random"]

    assert draw(ROW, 0) == draw(dict(ROW), 0)
    others = [draw(ROW, 1), draw(ROW | {"id": "q"}, 0), draw(ROW | {"rejected_ids": [7, 8, 1]}, 0)]
    assert all(other != draw(ROW, 0) for other in others)


def test_an_answer_without_any_entropy_has_nothing_suspicious():
    assert composed_columns(ROW | {"rejected_entropy": [0.0] * 3}, [7, 8, 9], 0)["rejected_s_entropy"] == [1.0] * 3


def test_choices_of_another_answer_are_refused():
    with pytest.raises(ValueError, match="longer"):
        composed_columns(ROW, [7, 8], 0)


def test_the_first_error_is_the_one_divergent_token():
    rows = detector_rows(Dataset.from_list([ROW, ROW | {"first_error": 0}]))
    assert rows["label"] == [[0, 2, 0], [2, 0, 0]]
    assert rows["completion_ids"] == [[7, 8, 9]] * 2 and rows["prompt_ids"] == [[5]] * 2
    assert rows["sample"] == [0, 1]  # two answers of one problem keep names of their own


# ------------------------------------------------------------------------------------------------------------ page


def results() -> dict:
    """Three seeds: entropy beats DPO, random loses, everything else is level with it up to noise."""
    noise = (0.01, -0.01, 0.0)
    level = {"entropy": 0.1, "random": -0.1}
    by_method = {
        name: [
            {key: 0.5 + level.get(name, 0.0) + (noise[(i + n) % 3] if n else 0.0) for key in ("greedy", "sampled")}
            for i in range(3)
        ]
        for n, name in enumerate(("base", DPO, *(m for m in METHODS if m != DPO)))
    }
    names = [*WEIGHTS, *ROUTERS]
    reports = [
        {
            "solutions": 20,
            "signals": {n: dict.fromkeys(DETECTION, 0.9 if n == REFERENCE else 0.6 + 0.01 * i) for n in names},
        }
        for i in range(3)
    ]
    pairs = [(name, other) for name in METHODS for other in (DPO, REFERENCE) if name != other]
    return {
        "arguments": {"seeds": 3, "test_problems": 600},
        "validation": {
            "grid": {key: {"0.0003": {"greedy": 0.5}, "0.001": {"greedy": 0.6}} for key in METHODS},
            "learning_rate": dict.fromkeys(METHODS, 1e-3),
            "at_edge": ["entropy"],
        },
        "pairs": [199, 200, 200],
        "agreed": AGREED,
        "methods": summary(by_method),
        "differences": [difference(by_method, *names) for names in (*pairs, (CONTRAST, OWN))],
        "mean_weight": {name: over_seeds([0.5, 0.5, 0.5]) for name in (DPO, *WEIGHTS)},
        "detection": summarise_detection(reports),
    }


def cells(text: str, start: str) -> list[str]:
    """Of the first line that starts so: the table of rows comes before that of detectors."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_page_gives_the_verdicts_row_by_row(tmp_path):
    run = {
        "command": "python benchmarks/compositions.py",
        "date": "2026-01-01",
        "seconds": 61,
        "machine": {"cpu": "a CPU", "cores": "2 cores", "threads": "1 thread"},
        "versions": {"torch": "2"},
        "results": json.loads(json.dumps(results())),  # as it is read
    }
    text = pages.page({"compositions": run})
    assert [w in cells(text, "entropy")[6] for w in ("+10.", "**holds**")] == [True, True]
    assert [w in cells(text, "random")[6] for w in ("-10.", "**does not hold**")] == [True, True]
    assert "**cannot be told here**" in cells(text, "log-prob")[6]
    assert cells(text, DPO)[6] == cells(text, "base")[6] == cells(text, REFERENCE)[7] == ""
    assert f"Against the row *{DPO}*, of 9: 1 better (entropy), 1 worse (random), 7 not to be told apart." in text
    assert "199 to 200 pairs" in text and "60 wrong answers" in text and "perhaps not at their best: entropy." in text
    for router, other in DETECTOR_CLAIMS:
        verdict = cells(text, f"{router} finds the first error better than {other}")[-1]
        assert verdict == ("**does not hold**" if other == REFERENCE else "**cannot be told here**")
    pages.figures({"compositions": run}, tmp_path)
    assert set(re.findall(r"figures/(\S+\.png)", text)) == {file.name for file in tmp_path.glob("*.png")}


def test_every_row_of_the_table_is_explained():
    assert set(METHODS) == set(pages.SOURCES)
    assert (pages.DPO, pages.REFERENCE, pages.OWN, pages.CONTRAST) == (DPO, REFERENCE, OWN, CONTRAST)
