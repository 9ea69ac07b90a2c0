"""Seeds are a function of their names alone, and of the same bytes as ever: recorded figures were drawn with them."""

from __future__ import annotations

from tokalign.stage.seeds import derived_seed, problem_seed


def test_seeds_are_those_of_the_recorded_figures() -> None:
    assert problem_seed(3, "p7", "rollouts") == 2827566682090801621
    assert problem_seed(0, 12, "rollouts") == 4432351714218405265  # an id may be a number
    assert problem_seed(3, "p7", "evaluation") == 41072299410845613
    assert derived_seed(3, "prefix", 7) == 4798723590230510738


def test_seeds_differ_by_seed_problem_and_use_and_engines_take_them() -> None:
    names = [(seed, f"p{k}") for seed in range(3) for k in range(50)]
    seeds = {problem_seed(*name, use) for name in names for use in ("rollouts", "evaluation")}
    seeds |= {derived_seed(*name) for name in names}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)
