"""Structured GRPO's tables from a small results dict: verdicts follow the differences, not the words; and what the
benchmark makes of the runs' figures, curves and logs, against plain computations."""

from __future__ import annotations

import json
from itertools import product

import pytest

from benchmarks.experiments.common import over_seeds
from benchmarks.experiments.structured_ledger import (
    ABLATED,
    BETA,
    BOUND,
    CONSTRAINED,
    CREDITS,
    EARLIER,
    EXACT,
    FIELD,
    FIGURES,
    LEFT_OUT,
    LITERAL,
    MAIN,
    MARGIN,
    SEQUENCE,
    TUNED,
    StructuredLedgerArguments,
    best_of,
    figures,
    figures_of,
    learning,
    options_of,
    rate_of,
    rises,
    smooth,
    steps_to_reach,
    tables,
)
from tokalign.rewards.structured.reward import WEIGHTS

SEEDS, ABLATION_SEEDS, STEPS = 3, 3, 12
LEVEL = {"base": 0.3, "SFT": 0.5, "DPO": 0.6, SEQUENCE: 0.8, FIELD: 0.9, LITERAL: 0.7, CONSTRAINED: 0.95}


def row(level: float, seed: int, **changed: float) -> dict[str, float]:
    """All figures of a run: `level` with a small effect of the seed, save for those in `changed`."""
    noise = 0.01 * seed
    found = dict.fromkeys((*FIGURES, "greedy_exact_match"), level + noise)
    return found | {name: value + noise for name, value in changed.items()} | {"tokens_per_second": 1000.0}


def log(rise: dict[str, int], steps: int = STEPS) -> list[dict[str, float]]:
    """A training log in which each component jumps from 0 to 1 at a step."""
    return [{"step": s, **{f"structured/{name}": float(s >= at) for name, at in rise.items()}} for s in range(steps)]


def cells() -> dict:
    sampled = {m: [row(LEVEL[m], s) for s in range(SEEDS)] for m in MAIN}
    # worse in content than GRPO, and half as fast
    sampled[CONSTRAINED] = [row(0.95, s, content_f1=0.4) | {"tokens_per_second": 500.0 - s} for s in range(SEEDS)]
    for method, figure in zip(LEFT_OUT, ABLATED.values(), strict=True):
        sampled[method] = [row(0.9, s, **{figure: 0.5}) for s in range(ABLATION_SEEDS)]
    # without format nothing changes on average, once above and once below
    sampled["GRPO − format"] = [row(0.9 + change, s) for s, change in enumerate((0.02, -0.02, 0.01))]
    sampled[EARLIER] = [row(0.9, s, exact_match=0.1, greedy_exact_match=0.2) for s in range(ABLATION_SEEDS)]
    return {
        "sampled": sampled,
        "greedy": sampled,
        "rows": {m: [row(LEVEL[m] / 2, s) for s in range(SEEDS)] for m in MAIN if m != CONSTRAINED},
    }


def histories() -> dict:
    rise = [log({"validity": 3, "structure": 3 + late, "correctness": 2}) for late in (2, 3, 4)]
    literal = [log({"validity": 3, "structure": 4, "correctness": 5}) for _ in range(SEEDS)]
    return {SEQUENCE: rise, FIELD: rise, LITERAL: literal}


def curves() -> tuple[dict, list]:
    """From 0.5, sequence credit comes to 0.8 at step 12, and field credit to 0.9 at step 6, where it stays."""
    starts = cells()["sampled"]["SFT"]
    sequence = [{key: [[6, 0.65 + 0.01 * s], [12, 0.8 + 0.01 * s]] for key in EXACT} for s in range(SEEDS)]
    by_field = [{key: [[6, 0.9 + 0.01 * s], [12, 0.9 + 0.01 * s]] for key in EXACT} for s in range(SEEDS)]
    return {SEQUENCE: sequence, FIELD: by_field}, starts


@pytest.fixture(name="results")
def results_fixture() -> dict:
    rates = {"3e-4": 3e-4, "1e-3": 1e-3}
    worth = {f"{rate:g}": {"structure": 0.5 + rate, "content_f1": 0.5, "exact_match": 0.25} for rate in rates.values()}
    sizes = {"seeds": SEEDS, "ablation_seeds": ABLATION_SEEDS, "steps": STEPS, "completions": 16, "sft_documents": 10}
    problems = {"pairs_from": 24, "test_problems": 40, "validation_problems": 20}
    results = {
        "arguments": {**sizes, **problems, "learning_rates": list(rates.values())},
        "validation": {
            "grid": dict.fromkeys(TUNED, worth),
            "learning_rate": dict.fromkeys(TUNED, 1e-3),
            "at_edge": ["DPO"],
            "credit": FIELD,
        },
        **figures_of(cells()),
        **rises(histories()),
        **learning(*curves()),
    }
    return json.loads(json.dumps(results))  # as it is read


def verdict_of(results: dict, table: str, claim: str) -> str:
    (row,) = [row for row in tables(results)[table][1] if row[0].startswith(claim)]
    return row[-1].strip("*")


@pytest.mark.parametrize(
    ("table", "claim", "expected"),
    [
        ("claims", f"structure: {SEQUENCE} > DPO", "holds"),
        ("claims", "content F1: DPO > SFT", "holds"),
        ("claims", f"structure: {CONSTRAINED} > {SEQUENCE}", "holds"),
        ("claims", f"content F1: {SEQUENCE} > {CONSTRAINED}", "holds"),
        ("claims", "constrained decoding is slower", "holds"),
        ("credit_claims", f"exact match, sampled: {FIELD} > {SEQUENCE}", "holds"),
        ("credit_claims", f"exact match, greedy: {SEQUENCE} > SFT", "holds"),
        ("literal_claims", f"structure: {SEQUENCE} > {LITERAL}", "holds"),
        ("goals", f"{SEQUENCE}: structure ≥ 95 %", "does not hold"),
        ("goals", f"{FIELD}: exact match, greedy ≥ 60 %", "holds"),
        ("goals", f"{FIELD}: content F1 above", "holds"),
        ("goals", f"{FIELD}: steps saved on the way to sequence credit's last exact match, greedy", "holds"),
        ("ablation_claims", f"structure: {FIELD} > GRPO − structure", "holds"),
        ("ablation_claims", f"valid: {FIELD} > GRPO − format", "cannot be told here"),
        ("ablation_claims", f"exact match, greedy: {FIELD} > {EARLIER}", "holds"),
        ("curriculum_claims", f"{FIELD}: validity before structure", "holds"),
        ("curriculum_claims", f"{SEQUENCE}: structure before correctness", "does not hold"),
        ("transfer_claims", f"structure: {SEQUENCE} > SFT", "holds"),
        ("transfer_claims", f"exact match, sampled: {FIELD} > {SEQUENCE}", "holds"),
    ],
)
def test_verdict_of_each_kind_of_claim(results, table, claim, expected):
    assert verdict_of(results, table, claim) == expected


def test_verdicts_and_the_words_that_follow_them_turn_with_the_figures(results):
    assert tables(results)["field_sequence_sampled"] == f"{FIELD} is above {SEQUENCE}"
    for entry in results["differences"]:
        if (entry["better"], entry["worse"]) == (SEQUENCE, "DPO"):
            entry["structure"] = over_seeds([-0.1, -0.11, -0.12])
        if (entry["better"], entry["worse"]) == (FIELD, SEQUENCE):
            entry["exact_match"], entry["greedy_exact_match"] = over_seeds([-0.1, 0.1, 0.0]), over_seeds([-0.2] * 3)
    results["slowdown"] = over_seeds([0.9, 1.1, 1.0])
    results["saved"]["exact_match"] = over_seeds([0.4, 0.41, 0.42])
    shown = tables(results)
    assert verdict_of(results, "claims", f"structure: {SEQUENCE} > DPO") == "does not hold"
    assert verdict_of(results, "claims", "constrained decoding is slower") == "cannot be told here"
    assert (
        verdict_of(results, "goals", f"{FIELD}: steps saved on the way to sequence credit's last exact match, sampled")
        == "does not hold"
    )
    assert shown["field_sequence_sampled"] == f"{FIELD} cannot be told from {SEQUENCE}"
    assert shown["field_sequence_greedy"] == f"{FIELD} is below {SEQUENCE}"
    met = sum(row[-1] == "**holds**" for row in shown["goals"][1])
    assert (shown["goals_met"], shown["goals_asked"]) == (str(met), str(len(shown["goals"][1]))) and met > 0


def test_tables_show_figures_paper_and_grid(results):
    shown = tables(results)
    methods = {row[0]: row for row in shown["methods"][1]}
    assert methods[SEQUENCE][1:3] == ["92.1 / 89.7 / 84.5", "0.001"] and methods[SEQUENCE][3].startswith("81.0 (")
    assert methods[FIELD][1] == "–" and methods[FIELD][3].startswith("91.0 (")
    assert shown["claims"][1][2][:3] == [f"structure: {SEQUENCE} > DPO", "+7.2", "+20.0 (+20.0 – +20.0) points"]
    assert shown["ablation_claims"][1][1][:2] == [f"structure: {FIELD} > GRPO − structure", "+44.1"]
    assert shown["goals"][1][0][1:3] == ["51.0 (48.5 – 53.5)", "81.0 (78.5 – 83.5) %"]
    assert shown["dearest"].startswith("40.0 points (GRPO − ")
    transfer = {row[0]: row for row in shown["transfer"][1]}
    assert transfer[SEQUENCE][1] == "85.4 / 91.2" and transfer[SEQUENCE][2].startswith("41.0")
    assert {row[0]: row[2] for row in shown["grid"][1]}["DPO"] == "**50.1 / 25.0** (edge)"
    assert (shown["sft_documents"], shown["steps"], shown["completions"]) == ("10", "12", "16")


def test_tables_of_a_run_without_ablation_and_with_one_seed(results):
    one = cells()
    for by_method in one.values():
        for method in list(by_method):
            if method in (*LEFT_OUT, EARLIER):
                by_method.pop(method, None)
            else:
                by_method[method] = by_method[method][:1]
    runs, starts = curves()
    results["arguments"] |= {"seeds": 1, "ablation_seeds": 0}
    results |= figures_of(one) | rises({m: logs[:1] for m, logs in histories().items()})
    results |= learning({credit: seeds[:1] for credit, seeds in runs.items()}, starts[:1])
    shown = tables(results)
    assert shown["ablation"][1] == shown["ablation_claims"][1] == []
    assert "**holds**" not in json.dumps(shown) and "**does not hold**" not in json.dumps(shown)
    assert figures(results)  # with nothing to draw an interval from


def test_a_colour_means_one_thing_in_all_pictures(results):
    drawn = figures(results)
    assert {name.removeprefix("structured_grpo_") for name in drawn} == {
        "methods.png",
        "learning.png",
        "curriculum.png",
        "transfer.png",
    }
    meanings: dict[str, set[str]] = {}
    for picture in drawn.values():
        for axis in picture.axes:
            for line in axis.get_lines():
                if not str(line.get_label()).startswith("_"):
                    meanings.setdefault(str(line.get_color()), set()).add(str(line.get_label()))
    del meanings["grey"]  # lines to read others by
    assert all(len(labels) == 1 for labels in meanings.values()) and len(meanings) == 5


# --------------------------------------------------------------------------------------------- what rates are chosen by


def cell(structure: float, exact_match: float) -> dict[str, float]:
    return {"structure": structure, "exact_match": exact_match}


def test_the_rate_of_most_right_answers_among_those_whose_structure_is_good_enough():
    assert best_of({1: cell(0.90, 0.30), 2: cell(BOUND, 0.20), 3: cell(0.99, 0.10)}) == 2
    assert best_of({1: cell(0.95, 0.20), 2: cell(0.99, 0.25)}) == 2
    # none is good enough: what is within the margin of the best structure
    assert best_of({1: cell(0.86 - MARGIN, 0.14), 2: cell(0.86, 0.04), 3: cell(0.70, 0.30)}) == 1
    assert best_of({1: cell(0.5, 0.0), 2: cell(0.5, 0.0)}) == 1


def test_the_rule_over_all_triples_of_cells():
    some = [cell(structure, exact) for structure in (0.80, 0.89, 0.94, BOUND, 1.0) for exact in (0.0, 0.2, 0.4)]
    for cells in product(some, repeat=3):
        chosen = cells[best_of(dict(enumerate(cells)))]
        most = max(c["structure"] for c in cells)
        enough = BOUND if most >= BOUND else most - MARGIN
        assert chosen["structure"] >= enough
        assert all(c["exact_match"] <= chosen["exact_match"] for c in cells if c["structure"] >= enough)


def test_all_methods_see_as_many_samples_as_grpo():
    assert StructuredLedgerArguments(steps=12, completions=16, problems=24).pairs_from == 24
    with pytest.raises(ValueError, match="24 problems"):
        StructuredLedgerArguments(steps=12, completions=16, problems=23)
    with pytest.raises(ValueError, match="multiple"):
        StructuredLedgerArguments(steps=10)


def test_every_grpo_has_an_anchor_but_the_earlier_one_and_ablations_follow_the_better_credit():
    assert options_of(SEQUENCE, FIELD) == {"beta": BETA, "credit": "sequence"}
    assert options_of(FIELD, SEQUENCE) == {"beta": BETA, "credit": "field"}
    assert options_of(LITERAL, FIELD) == {"beta": BETA, "credit": "sequence", "reward_preset": "rl-struct"}
    for credit, name in zip(CREDITS, ("sequence", "field"), strict=True):
        options = options_of("GRPO − validity", credit)
        assert options["credit"] == name and options["beta"] == BETA
        assert json.loads(options["component_weights"]).items() < WEIGHTS.items()
        assert options_of("GRPO − correctness", credit)["credit"] == "sequence"
    assert options_of(EARLIER, FIELD)["beta"] == 0 and options_of(EARLIER, FIELD)["credit"] == "sequence"
    validation = {"learning_rate": {m: rate for rate, m in enumerate(TUNED, 1)}, "credit": FIELD}
    rates = validation["learning_rate"]
    assert [rate_of(m, validation) for m in (*TUNED, "base")] == [*rates.values(), None]
    assert rate_of(CONSTRAINED, validation) == rates["SFT"] and rate_of("GRPO − format", validation) == rates[FIELD]


# ----------------------------------------------------------------------------------------------------- curves and logs


def test_steps_to_reach_a_level():
    curve = [[0, 0.1], [10, 0.2], [20, 0.1], [30, 0.4]]
    assert steps_to_reach(curve, 0.15) == pytest.approx(5)
    assert steps_to_reach(curve, 0.2) == 10 and steps_to_reach(curve, 0.25) == pytest.approx(25)
    assert steps_to_reach(curve, 0.05) == 0 and steps_to_reach(curve, 0.5) is None


def test_what_field_credit_saves_on_the_way_to_sequence_credits_end():
    runs, starts = curves()
    found = learning(runs, starts)
    # from 0.5 to 0.9 in six steps; sequence credit ends at 0.8
    assert found["reach"][FIELD]["exact_match"] == pytest.approx([6 * 0.3 / 0.4] * 3)
    assert found["reach"][SEQUENCE]["exact_match"] == [12, 12, 12]
    assert found["saved"]["exact_match"]["values"] == pytest.approx([1 - 4.5 / 12] * 3)
    assert [step for step, _ in found["learning"][FIELD]["exact_match"]] == [0, 6, 12]
    assert found["learning"][SEQUENCE]["exact_match"][1][1]["mean"] == pytest.approx(0.66)
    for seed in runs[FIELD]:
        seed["exact_match"] = [[6, 0.55], [12, 0.6]]
    never = learning(runs, starts)
    assert never["reach"][FIELD]["exact_match"] == [None] * 3
    assert never["saved"]["exact_match"]["values"] == [0.0] * 3


def test_half_way_steps_and_their_order():
    found = rises(histories())
    assert found["half_way_step"][FIELD]["validity"] == [5, 5, 5]  # 3 of 5 values are 1 at step 5
    assert found["half_way_step"][FIELD]["structure"] == [7, 8, 9]
    assert found["half_way_step"][FIELD]["correctness"] == [3, 3, 3]  # 2 of the first 4 values
    assert [entry["steps"]["values"] for entry in found["curriculum"]] == [[2, 3, 4], [-4, -5, -6]] * 2
    assert found["curves"][SEQUENCE]["structure"][6] == [6, pytest.approx(2 / 3, abs=1e-4)]


def test_a_component_that_never_rises_does_not_count():
    logs = [log({"validity": 3, "structure": structure, "correctness": 5}) for structure in (99, 4)]
    found = rises(dict.fromkeys((*CREDITS, LITERAL), logs))
    assert found["half_way_step"][FIELD]["structure"] == [None, 6]
    assert found["curriculum"][0]["steps"]["values"] == [1]


def test_running_mean_against_a_loop():
    points = [(step, float(step * step)) for step in range(8)]
    for i, (step, value) in enumerate(smooth(points, window=3)):
        part = [points[j][1] for j in range(i + 1) if i - j < 3]
        assert (step, value) == (i, pytest.approx(sum(part) / len(part)))


def test_differences_pair_the_seeds_that_both_methods_have():
    found = figures_of(cells())
    entry = next(e for e in found["differences"] if (e["better"], e["worse"]) == (FIELD, "GRPO − validity"))
    assert entry["validity"]["values"] == pytest.approx([0.4, 0.4, 0.4])
    assert found["slowdown"]["values"] == pytest.approx([1000 / 500, 1000 / 499, 1000 / 498])
