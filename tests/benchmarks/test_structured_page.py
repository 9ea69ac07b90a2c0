"""Structured GRPO's tables from a small results dict: verdicts follow the differences, not the words; and what the
benchmark makes of the runs' figures and logs, against plain computations."""

from __future__ import annotations

import json

import pytest

from benchmarks.experiments.common import over_seeds
from benchmarks.experiments.structured_ledger import (
    ABLATED,
    ABLATIONS,
    CONSTRAINED,
    FIGURES,
    LITERAL,
    MAIN,
    TUNED,
    figures,
    figures_of,
    rises,
    smooth,
    tables,
)

SEEDS, ABLATION_SEEDS = 3, 3
LEVEL = {"base": 0.3, "SFT": 0.5, "DPO": 0.6, "GRPO": 0.8, LITERAL: 0.7, CONSTRAINED: 0.95}


def row(level: float, seed: int, **changed: float) -> dict[str, float]:
    """All figures of a run: `level` with a small effect of the seed, save for those in `changed`."""
    noise = 0.01 * seed
    found = dict.fromkeys(FIGURES, level + noise) | {name: value + noise for name, value in changed.items()}
    return found | {"tokens_per_second": 1000.0}


def log(rise: dict[str, int], steps: int = 12) -> list[dict[str, float]]:
    """A training log in which each component jumps from 0 to 1 at a step."""
    return [{"step": s, **{f"structured/{name}": float(s >= at) for name, at in rise.items()}} for s in range(steps)]


def cells() -> dict:
    sampled = {m: [row(LEVEL[m], s) for s in range(SEEDS)] for m in MAIN}
    # worse in content than GRPO, and half as fast
    sampled[CONSTRAINED] = [row(0.95, s, content_f1=0.4) | {"tokens_per_second": 500.0 - s} for s in range(SEEDS)]
    for method, figure in zip(ABLATIONS, ABLATED.values(), strict=True):
        sampled[method] = [row(0.8, s, **{figure: 0.5}) for s in range(ABLATION_SEEDS)]
    # without format nothing changes on average, once above and once below
    sampled["GRPO − format"] = [row(0.8 + change, s) for s, change in enumerate((0.02, -0.02, 0.01))]
    return {
        "sampled": sampled,
        "greedy": {m: sampled[m] for m in MAIN},
        "rows": {m: [row(LEVEL[m] / 2, s) for s in range(SEEDS)] for m in MAIN if m != CONSTRAINED},
    }


def histories() -> dict:
    return {
        "GRPO": [log({"validity": 3, "structure": 3 + late, "correctness": 2}) for late in (2, 3, 4)],
        LITERAL: [log({"validity": 3, "structure": 4, "correctness": 5}) for _ in range(SEEDS)],
    }


@pytest.fixture(name="results")
def results_fixture() -> dict:
    rates = {"3e-4": 3e-4, "1e-3": 1e-3}
    worth = {f"{rate:g}": {"structure": 0.5 + rate, "content_f1": 0.5} for rate in rates.values()}
    results = {
        "arguments": {
            "seeds": SEEDS,
            "ablation_seeds": ABLATION_SEEDS,
            "steps": 12,
            "completions": 16,
            "sft_documents": 10,
            "pairs_from": 20,
            "test_problems": 40,
            "validation_problems": 20,
            "learning_rates": list(rates.values()),
        },
        "validation": {
            "grid": dict.fromkeys(TUNED, worth),
            "learning_rate": dict.fromkeys(TUNED, 1e-3),
            "at_edge": ["DPO"],
        },
        **figures_of(cells()),
        **rises(histories()),
    }
    return json.loads(json.dumps(results))  # as it is read


def verdict_of(results: dict, table: str, claim: str) -> str:
    (row,) = [row for row in tables(results)[table][1] if row[0].startswith(claim)]
    return row[-1].strip("*")


@pytest.mark.parametrize(
    ("table", "claim", "expected"),
    [
        ("claims", "structure: GRPO > DPO", "holds"),
        ("claims", "content F1: DPO > SFT", "holds"),
        ("claims", f"structure: {CONSTRAINED} > GRPO", "holds"),
        ("claims", f"content F1: GRPO > {CONSTRAINED}", "holds"),
        ("claims", "constrained decoding is slower", "holds"),
        ("literal_claims", f"structure: GRPO > {LITERAL}", "holds"),
        ("ablation_claims", "structure: GRPO > GRPO − structure", "holds"),
        ("ablation_claims", "valid: GRPO > GRPO − format", "cannot be told here"),
        ("curriculum_claims", "validity before structure", "holds"),
        ("curriculum_claims", "structure before correctness", "does not hold"),
        ("transfer_claims", "structure: GRPO > SFT", "holds"),
    ],
)
def test_verdict_of_each_kind_of_claim(results, table, claim, expected):
    assert verdict_of(results, table, claim) == expected


def test_verdicts_turn_with_the_figures(results):
    for entry in results["differences"]:
        if (entry["better"], entry["worse"]) == ("GRPO", "DPO"):
            entry["structure"] = over_seeds([-0.1, -0.11, -0.12])
    results["slowdown"] = over_seeds([0.9, 1.1, 1.0])
    assert verdict_of(results, "claims", "structure: GRPO > DPO") == "does not hold"
    assert verdict_of(results, "claims", "constrained decoding is slower") == "cannot be told here"


def test_tables_show_figures_paper_and_grid(results):
    shown = tables(results)
    methods = {row[0]: row for row in shown["methods"][1]}
    assert methods["GRPO"][1:3] == ["92.1 / 89.7 / 84.5", "0.001"] and methods["GRPO"][3].startswith("81.0 (")
    assert shown["claims"][1][2][:3] == ["structure: GRPO > DPO", "+7.2", "+20.0 (+20.0 – +20.0) points"]
    assert shown["dearest"].startswith("30.0 points (GRPO − ")
    transfer = {row[0]: row for row in shown["transfer"][1]}
    assert transfer["GRPO"][1] == "85.4 / 91.2" and transfer["GRPO"][2].startswith("41.0")
    assert {row[0]: row[2] for row in shown["grid"][1]}["DPO"] == "**25.1** (edge)"
    assert (shown["sft_documents"], shown["steps"], shown["completions"]) == ("10", "12", "16")


def test_tables_of_a_run_without_ablation_and_with_one_seed(results):
    one = cells()
    for by_method in one.values():
        for method in list(by_method):
            if method in ABLATIONS:
                del by_method[method]
            else:
                by_method[method] = by_method[method][:1]
    results["arguments"] |= {"seeds": 1, "ablation_seeds": 0}
    results |= figures_of(one) | rises({m: logs[:1] for m, logs in histories().items()})
    shown = tables(results)
    assert shown["ablation"][1] == shown["ablation_claims"][1] == []
    assert "**holds**" not in json.dumps(shown) and "**does not hold**" not in json.dumps(shown)


def test_three_pictures(results):
    assert {name.removeprefix("structured_grpo_") for name in figures(results)} == {
        "methods.png",
        "curriculum.png",
        "transfer.png",
    }


def test_half_way_steps_and_their_order():
    found = rises(histories())
    assert found["half_way_step"]["GRPO"]["validity"] == [5, 5, 5]  # 3 of 5 values are 1 at step 5
    assert found["half_way_step"]["GRPO"]["structure"] == [7, 8, 9]
    assert found["half_way_step"]["GRPO"]["correctness"] == [3, 3, 3]  # 2 of the first 4 values
    assert [entry["steps"]["values"] for entry in found["curriculum"]] == [[2, 3, 4], [-4, -5, -6]]
    assert found["curves"]["GRPO"]["structure"][6] == [6, pytest.approx(2 / 3, abs=1e-4)]


def test_a_component_that_never_rises_does_not_count():
    logs = [log({"validity": 3, "structure": structure, "correctness": 5}) for structure in (99, 4)]
    found = rises({"GRPO": logs, LITERAL: logs})
    assert found["half_way_step"]["GRPO"]["structure"] == [None, 6]
    assert found["curriculum"][0]["steps"]["values"] == [1]


def test_running_mean_against_a_loop():
    points = [(step, float(step * step)) for step in range(8)]
    for i, (step, value) in enumerate(smooth(points, window=3)):
        part = [points[j][1] for j in range(i + 1) if i - j < 3]
        assert (step, value) == (i, pytest.approx(sum(part) / len(part)))


def test_differences_pair_the_seeds_that_both_methods_have():
    found = figures_of(cells())
    entry = next(e for e in found["differences"] if e["worse"] == "GRPO − validity")
    assert entry["validity"]["values"] == pytest.approx([0.3, 0.3, 0.3])
    assert found["slowdown"]["values"] == pytest.approx([1000 / 500, 1000 / 499, 1000 / 498])
