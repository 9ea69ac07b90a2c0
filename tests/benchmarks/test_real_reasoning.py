"""Reasoning of a real model: the controls of the weights, which seeds count, what pages say of one seed or three."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.experiments import real_reasoning
from benchmarks.experiments.real_reasoning import (
    ALL,
    BEFORE,
    CLAIMS,
    CONSTANT,
    METHODS,
    OURS,
    ROWS,
    SETS,
    SFT,
    SHOWN,
    TUNED,
    WARM,
    Experiment,
    RealReasoningArguments,
    accuracies,
    controls,
    grid_cell,
    tables,
)
from benchmarks.render import ROOT, fill, write_json


def test_controls_keep_the_mean_and_the_values_of_an_answer() -> None:
    row = {
        "id": "svamp-train-1",
        "rejected_ids": [5, 6, 7, 8, 9, 4],
        "rejected_contrast": [0.9, 0.1, 0.8, 0.7, 1.0, 0.2],
    }
    made = controls(row, 0.6, seed=0)
    assert made["rejected_s_constant"] == [0.6] * 6
    assert sorted(made["rejected_s_shuffled"]) == sorted(row["rejected_contrast"])
    assert made["rejected_s_shuffled"] != row["rejected_contrast"]
    assert controls(row, 0.6, seed=0) == made != controls(row, 0.6, seed=1)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    sizes = {"validation": [2, 1], "test": [3, 1], "continuations": 4, "learning_rates": [1e-4, 3e-4, 1e-3]}
    return Experiment(RealReasoningArguments(output_dir=str(tmp_path), data="data", **sizes))


def write_cells(experiment: Experiment, seeds: int) -> None:
    """Critical-token DPO solves one problem more than all others; rates differ in sampled accuracy."""

    def put(name: str, cell: dict) -> None:
        write_json(experiment.folder / f"{name}.json", {"settings": experiment.settings, "cell": cell})

    def answers(*svamp: float, sampled: float = 0.5) -> dict:
        problems = {f"svamp-test-{i}": [right, sampled] for i, right in enumerate(svamp)}
        return {"problems": problems | {"gsm8k-test-7": [0.0, 0.0]}, "seconds": 90.0, "tokens": 1000}

    put(BEFORE, {"problems": {"svamp-test-0": True, "svamp-test-1": False, "gsm8k-test-7": False}})
    for method in TUNED:
        for rate, sampled in zip(experiment.args.learning_rates, (0.1, 0.2, 0.3), strict=True):
            put(grid_cell(method, rate), answers(1.0, 0.0, sampled=sampled))
    for seed in range(seeds):
        for row in ROWS:
            put(f"seed-{seed} {row}", answers(1.0, 0.0, float(row == OURS)))
        put(f"seed-{seed} warm", {"seconds": 5.0, "problems": 9})
        put(f"seed-{seed} rollouts", {"seconds": 5.0, "right": 0.3, "pairs": 4, "positive": 5, "negative": 6})
        put(f"seed-{seed} contrast", {"seconds": 60.0, "mean": 0.75, "sd_in_answer": 0.1})
        put(f"seed-{seed} rewards", {"seconds": 5.0, "chosen": 0.1, "rejected": 0.0})
        put(f"seed-{seed} reference", {"seconds": 5.0})
        put(f"seed-{seed} estimate", {"rows": [[2, 0, 4], [1, 1, 2], [-1, -1, -1]]})


@pytest.mark.parametrize("seeds", [1, 3])
def test_pages_are_rendered_from_the_seeds_that_are_there(experiment: Experiment, seeds: int) -> None:
    write_cells(experiment, seeds)
    results = json.loads(json.dumps(experiment.save()))
    assert results["arguments"]["seeds"] == seeds
    assert results["validation"]["learning_rate"] == dict.fromkeys(METHODS, 1e-3)
    assert results["sets"]["svamp"][OURS]["greedy"]["mean"] == pytest.approx(2 / 3)
    assert results["sets"][ALL][WARM]["greedy"]["mean"] == pytest.approx(1 / 4)
    shown = tables(results)
    verdicts = {row[0]: row for row in shown["critical.claims"][1]}
    word = "holds" if seeds == 3 else "cannot be told here"
    assert verdicts[f"{OURS} > {CONSTANT}, greedy"][-1] == f"**{word}**"
    assert (
        verdicts[f"{OURS} > {CONSTANT}, greedy"][2] == "+25.0" + (" (+25.0 – +25.0)" if seeds == 3 else "") + " points"
    )
    assert verdicts[f"{OURS} > {CONSTANT}, greedy"][4].startswith("+25.0 (+")
    assert verdicts[f"{OURS} > {SFT}, sampled"][-1] == "**cannot be told here**"
    assert shown["critical.to_beat"] == "+25.0 points greedy and +0.0 points sampled"
    cost = {row[0]: row[-1] for row in shown["critical.methods"][1]}
    assert cost[OURS] == "1 min 30 s + 1 min 0 s" and cost["DPO"] == "1 min 30 s" and cost[WARM] == "–"
    assert shown["mean_weight"] == "0.25" and shown["before"] == "50.0 % of SVAMP and 0.0 % of GSM8K, at most 2 steps"
    assert shown["answers"] == str(3 * seeds) and shown["critical"] == str(2 * seeds)
    assert shown["pass_at_k"][1][0][:2] == ["pass@1", "with the critical token"]
    assert len(real_reasoning.figures(results)) == 2
    for page in ("critical_token_dpo", "treg"):
        text = (ROOT / "docs" / "results" / f"{page}.md").read_text(encoding="utf-8")
        runs = {"real_reasoning": shown | {"run": (("command",), [["`make real`"]])}}
        fill(text, runs.get)  # raises where a mark asks for what the tables have not


def test_a_seed_counts_when_all_its_cells_are_there(experiment: Experiment) -> None:
    write_cells(experiment, 2)
    (experiment.folder / f"seed-1 {SFT}.json").unlink()
    assert len(list(experiment.complete())) == 1
    (experiment.folder / "seed-0 estimate.json").unlink()
    assert experiment.save() is None


def test_every_row_is_on_a_page_and_every_claim_between_rows() -> None:
    assert set().union(*SHOWN.values()) == set(ROWS)
    assert {row for pairs in CLAIMS.values() for pair in pairs for row in pair} <= set(ROWS)
    assert set(accuracies({"problems": {"svamp-test-1": [1, 1], "gsm8k-test-1": [0, 0.5]}})) == {*SETS, ALL}
