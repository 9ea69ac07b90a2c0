"""Compositions: signals as scores in [0, 1], first errors as routing labels, and the verdicts in the tables."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset

from benchmarks.experiments import compositions
from benchmarks.experiments.common import DETECTION, difference, over_seeds, summary
from benchmarks.experiments.compositions import (
    AGREED,
    CONTRAST,
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
from tests.trainers.preferences import preference_rows
from tokalign.cli.main import main

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


def test_a_composed_score_trains(tiny_path, tmp_path):
    (tmp_path / "pairs").mkdir()
    rows = [row | {"rejected_s_llm": row["rejected_contrast"]} for row in preference_rows(tiny_path, 4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs" / "train.parquet")
    options = ["--model_name_or_path", tiny_path, "--dataset_name", str(tmp_path / "pairs"), "--signal", "s_llm"]
    options += ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "out")]
    main([METHODS["LLM disagrees"].recipe, *options, "--report_to", "none"])
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


def test_the_tables_give_the_verdicts_row_by_row():
    shown = compositions.tables(json.loads(json.dumps(results())))  # as it is read
    rows = {row[0]: row for row in shown["methods"][1]}
    assert [word in rows["entropy"][6] for word in ("+10.", "**holds**")] == [True, True]
    assert [word in rows["random"][6] for word in ("-10.", "**does not hold**")] == [True, True]
    assert "**cannot be told here**" in rows["log-prob"][6]
    assert rows[DPO][6] == rows["base"][6] == rows[REFERENCE][7] == ""
    assert rows["LLM disagrees"][1].endswith("written another token, 0.9 elsewhere (routing labels by prefill)")
    assert shown["counts"][1][0] == [DPO, "1 of 9: entropy", "1 of 9: random", "7 of 9"]
    assert shown["pairs"] == "199 to 200" and shown["solutions"] == "60"
    assert dict(zip(METHODS, shown["grid"][1], strict=True))["entropy"] == ["entropy", "50.0", "**60.0** (edge)"]
    verdicts = {row[0]: row[-1] for row in shown["detection_claims"][1]}
    for router, other in DETECTOR_CLAIMS:
        word = "**does not hold**" if other == REFERENCE else "**cannot be told here**"
        assert verdicts[f"{router} finds it better than {other}"] == word
    assert set(compositions.figures(results())) == {"compositions_accuracy.png", "compositions_detection.png"}


def test_every_row_of_the_table_is_explained():
    assert set(METHODS) == set(compositions.SOURCES)
