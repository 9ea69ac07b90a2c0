"""The experiment on real structured text: how rows are divided, its measures, and the page from the seeds there are."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.experiments.real_structured import (
    COMPARED,
    DECODING,
    FIELD,
    LONGER,
    MEASURES,
    METHODS,
    MORE,
    SEQUENCE,
    SFT,
    TUNED,
    ZERO,
    RealStructuredArguments,
    best_of,
    divided,
    figures,
    outcome,
    over_rows,
    ratio,
    results_of,
    tables,
)
from benchmarks.render import FAILS, HOLDS, MARK, OPEN, ROOT

ROWS = 60


def arguments(task: str = "snips", **changed) -> RealStructuredArguments:
    return RealStructuredArguments(task=task, data="data", **changed)


def side(level: float, seed: int) -> dict:
    """Answers of which a share of `level` is right: the same rows in every seed but for one."""
    right = [(float(i < level * ROWS - seed), 1.0) for i in range(ROWS)]
    return {"rows": dict.fromkeys(MEASURES, right), "tokens": 30.0, "seconds": 20.0}


def cells(levels: dict[str, float], seeds: int) -> dict:
    def cell(method: str, seed: int) -> dict:
        cost = {"train_seconds": 100.0 + seed, "read": 200, "judged": 160 if method in TUNED else 0}
        return {each: side(levels.get(method, 0.5), seed) for each in DECODING} | cost

    made = {f"{seed} {method}": cell(method, seed) for seed in range(seeds) for method in METHODS}
    return made | {ZERO: cell(ZERO, 0)}


def validation() -> dict:
    cell = {"0.0001": dict.fromkeys(MEASURES, 0.5), "0.0003": dict.fromkeys(MEASURES, 0.4)}
    names = (SFT, *TUNED)
    return {"grid": dict.fromkeys(names, cell), "learning_rate": dict.fromkeys(names, 1e-4), "at_edge": list(names)}


def results(levels: dict[str, float], seeds: int = 3) -> dict:
    made = results_of(arguments(), validation(), cells(levels, seeds))
    assert made is not None
    return json.loads(json.dumps(made))  # as a page will read it


def test_no_function_is_called_in_training_and_in_test():
    def row(number: int) -> dict:
        call = {"name": f"f{number % 40}", "arguments": {}}
        return {"id": str(number), "answer": json.dumps([call, call] if number % 3 else call)}

    parts = divided(
        "bfcl", {"train": [row(i) for i in range(100)], "test": [row(i) for i in range(100, 200)]}, arguments("bfcl")
    )
    names = {
        split: {json.dumps(json.loads(one["answer"])).split('"')[3] for one in rows} for split, rows in parts.items()
    }
    assert all(names.values()) and sum(map(len, parts.values())) == 200
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert not names["validation"] & names["test"]


def test_validation_rows_of_snips_are_no_training_rows():
    rows = {"train": [{"id": str(i)} for i in range(50)], "test": [{"id": f"t{i}"} for i in range(30)]}
    parts = divided("snips", rows, arguments(validation_rows=10, test_rows=20))
    assert {name: len(each) for name, each in parts.items()} == {"train": 40, "validation": 10, "test": 20}
    assert len({row["id"] for each in parts.values() for row in each}) == 70


def test_slot_f1_is_over_all_slots_together():
    def row(completion: str, answer: dict, valid: bool = True) -> dict:
        return {"completion": completion, "answer": json.dumps(answer), "validity": valid}

    answers = [
        row('{"intent": "A", "x": "1", "y": "wrong"}', {"intent": "A", "x": "1", "y": "2"}),
        row('{"intent": "B", "x": "1", "z": "3"}', {"intent": "A", "x": "1"}),  # one invented, and another intent
        row('{"intent": "A", "x"', {"intent": "A", "x": "1"}, valid=False),
    ]
    outcomes = np.array([[outcome("snips", "slot_f1", one) for one in answers]])
    precision, recall = 2 / 4, 2 / 4  # two of four given slots are right, two of four that were asked for
    assert ratio(outcomes) == pytest.approx(2 * precision * recall / (precision + recall))


def test_over_rows_is_the_paired_difference_with_its_interval():
    rng = np.random.default_rng(1)
    worse = np.stack([(rng.random((3, 200)) < 0.4).astype(float), np.ones((3, 200))], axis=-1)
    better = worse.copy()
    better[:, :40, 0] = 1.0
    found = over_rows(better, worse)
    difference = (better - worse)[..., 0].mean(axis=0)
    half = 1.96 * difference.std() / np.sqrt(200)
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["ci95"] == pytest.approx([difference.mean() - half, difference.mean() + half], abs=0.01)


def test_a_claim_needs_both_intervals():
    made = tables(results({FIELD: 0.8, SEQUENCE: 0.6, LONGER: 0.5}))
    by_claim = {(row[0], row[1]): row[-1].strip("*") for row in made["free_claims"][1]}
    assert by_claim[f"{FIELD} > {SEQUENCE}", "slot F1"] == HOLDS
    assert by_claim[f"{FIELD} > {MORE}", "exact match"] == HOLDS
    assert by_claim[f"{SEQUENCE} > {LONGER}", "slot F1"] == HOLDS
    assert f"above {SEQUENCE} in slot F1" in made["goals"]
    worse = tables(results({FIELD: 0.4, SEQUENCE: 0.6}))
    assert worse["free_claims"][1][0][-1].strip("*") == FAILS and f"below {SEQUENCE}" in worse["goals"]


def test_a_page_renders_from_one_seed_and_tells_nothing_by_it():
    made = tables(results({FIELD: 0.9, SEQUENCE: 0.2}, seeds=1))
    assert made["seeds"] == "1" and {row[-1].strip("*") for row in made["free_claims"][1]} == {OPEN}
    assert list(figures(results({}, seeds=1))) == ["real_structured_snips.png"]
    page = (ROOT / "docs" / "results" / "structured_grpo.md").read_text(encoding="utf-8")
    for task in ("snips", "bfcl"):
        asked = {
            name.partition(".")[2] for _, name in MARK.findall(page) if name.startswith(f"real_structured-{task}.")
        }
        assert asked and asked - {"run"} <= made.keys()


def test_a_seed_counts_when_all_its_methods_are_there():
    there = cells({}, 2)
    del there[f"1 {METHODS[-1]}"]
    made = results_of(arguments(), validation(), there)
    assert made is not None and made["arguments"]["seeds"] == 1
    del there[f"0 {METHODS[-1]}"]
    assert results_of(arguments(), validation(), there) is None


def test_the_rate_is_chosen_by_both_measures():
    cells = {1e-4: {"slot_f1": 0.6, "exact_match": 0.2}, 3e-4: {"slot_f1": 0.5, "exact_match": 0.35}}
    assert best_of(cells) == 3e-4
    assert best_of({rate: dict.fromkeys(COMPARED, 0.5) for rate in (3e-4, 1e-4)}) == 1e-4
