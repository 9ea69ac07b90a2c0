"""Routing in the ledger world: figures over hand-made seeds, what a rerun keeps, and the verdicts in the tables."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise

import pytest

from benchmarks.experiments import routing_ledger
from benchmarks.experiments.routing_ledger import (
    LLM,
    NEURAL,
    POLICIES,
    ROUTED,
    ROUTERS,
    SLM,
    RoutingLedgerArguments,
    RoutingSeed,
    at_equal_rate,
    figures,
    summarise,
    tables,
)

RATES = [0.04, 0.12]


def point(accuracy: float, llm_rate: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "llm_rate": llm_rate,
        "activated_parameters": 1e6 * (1 + 9 * llm_rate),
        "full_cost": 4e6 if llm_rate < 1 else 2e7,
    }


def made_up_seed(number: int, *, lead: float = 0.05, cost: float = 4e6) -> dict:
    """A seed whose neural router is `lead` above the others, and 0.01 below the LLM at the higher rate."""
    rng = random.Random(number)
    llm = 0.95 + 0.002 * rng.random()
    points = {SLM: {"": point(0.5 + 0.002 * rng.random(), 0.0)}, LLM: {"": point(llm, 1.0)}}
    for name in POLICIES:
        top = llm - 0.01 - (0 if name == NEURAL else lead) + 0.001 * rng.random()
        points[name] = {"0.04": point(top - 0.1, 0.04), "0.12": point(top, 0.12)}
    for by_rate in points[NEURAL].values():
        by_rate["full_cost"] = cost
    labels = {"identical": 0.96, "neutral": 0.001 * rng.random(), "divergent": 0.03, "invalid": 0.01, "tokens": 5000}
    labels["neutral - divergent"] = labels["neutral"] - labels["divergent"]
    routers = {
        name: {"auroc": 0.98 + 0.001 * rng.random(), "auprc": 0.7, "recall at 0.05": 0.8, "recall at 0.12": 1.0}
        for name in ROUTERS
    }
    return {"points": points, "labels": labels, "routers": routers}


def made_up_results(seeds: list[dict], clock: list[dict] = ()) -> dict:
    arguments = {"seeds": len(seeds), "train_problems": 2000, "validation_problems": 200, "test_problems": 600}
    sizes = {"slm": 1e6, "llm": 1e7, "router": 1e5}
    results = {"arguments": arguments, "parameters": sizes, "clock": list(clock)} | summarise(seeds, RATES)
    return json.loads(json.dumps(results))  # as it comes from the file


def verdict_of(results: dict, claim: str) -> str:
    """Of the one claim that starts so, in any table."""
    shown = [content[1] for content in tables(results).values() if not isinstance(content, str)]
    (row,) = [row for rows in shown for row in rows if row[0].startswith(claim)]
    return row[-1].strip("*")


def test_accuracy_at_equal_rate_is_linear_between_the_neighbours() -> None:
    rng = random.Random(0)
    served = {name: sorted(rng.uniform(0.01, 0.3) for _ in range(4)) for name in POLICIES}
    points = {SLM: {"": point(0.4, 0.0)}, LLM: {"": point(0.9, 1.0)}}
    for name in POLICIES:
        points[name] = {str(i): point(rng.random(), rate) for i, rate in enumerate(served[name])}
    for rate in (0.005, 0.08, 0.15, 0.6):
        found = at_equal_rate(points, rate)
        for name in POLICIES:
            line = [points[SLM][""], *points[name].values(), points[LLM][""]]
            for left, right in pairwise(line):
                if left["llm_rate"] <= rate <= right["llm_rate"]:
                    share = (rate - left["llm_rate"]) / (right["llm_rate"] - left["llm_rate"])
                    expected = left["accuracy"] + share * (right["accuracy"] - left["accuracy"])
            assert found[name] == pytest.approx(expected)


def test_figures_over_seeds_are_those_of_each_seed() -> None:
    seeds = [made_up_seed(number) for number in range(3)]
    results = summarise(seeds, RATES)
    for i, seed in enumerate(seeds):
        neural, slm, llm = seed["points"][NEURAL]["0.12"], seed["points"][SLM][""], seed["points"][LLM][""]
        below = neural["accuracy"] - llm["accuracy"]
        assert results["minus_llm"]["0.12"]["values"][i] == pytest.approx(below)
        gained = (neural["accuracy"] - slm["accuracy"]) / (llm["accuracy"] - slm["accuracy"])
        assert results["recovered"]["0.12"]["values"][i] == pytest.approx(gained)
        assert results["saving"]["full_cost"]["0.12"]["values"][i] == pytest.approx(2e7 / 4e6)
        for entry in results["differences"]:
            gap = neural["accuracy"] - seed["points"][entry["worse"]]["0.12"]["accuracy"]
            if entry["rate"] == "0.12":
                assert entry["accuracy"]["values"][i] == pytest.approx(gap)
        (auroc,) = [d["auroc"] for d in results["router_differences"] if d["worse"] == "entropy"]
        routers = seed["routers"]
        assert auroc["values"][i] == pytest.approx(routers[NEURAL]["auroc"] - routers["entropy"]["auroc"])
    assert len(results["differences"]) == (len(POLICIES) - 1) * len(RATES)


def test_the_verdicts_follow_the_figures() -> None:
    results = made_up_results([made_up_seed(number) for number in range(4)])
    assert verdict_of(results, "neural router > entropy at 12 %") == "holds"
    assert verdict_of(results, "routed − LLM alone, at 12 %") == "holds"  # a point below, the paper 4
    assert verdict_of(results, "activated parameters fall, at 12 %") == "holds"
    assert verdict_of(results, "so does the full cost, at 12 %") == "holds"
    assert verdict_of(results, "more tokens differ without harm") == "does not hold"
    worse = [made_up_seed(number, lead=-0.05, cost=4e7) for number in range(4)]
    results = made_up_results(worse)
    assert verdict_of(results, "neural router > random at 4 %") == "does not hold"
    assert verdict_of(results, "so does the full cost, at 12 %") == "does not hold"
    for seed in worse:
        seed["points"][NEURAL]["0.12"]["accuracy"] -= 0.04
    assert verdict_of(made_up_results(worse), "routed − LLM alone, at 12 %") == "does not hold"
    mixed = made_up_results([made_up_seed(number, lead=(-1) ** number * 0.05) for number in range(4)])
    assert verdict_of(mixed, "neural router > entropy at 12 %") == "cannot be told here"


@pytest.mark.parametrize(("ratio", "word"), [(1.3, "holds"), (0.9, "does not hold"), (1.0, "cannot be told here")])
def test_the_clock_is_judged_against_equal_speed(ratio: float, word: str) -> None:
    def entry(mean: float) -> dict:
        return {"mean": mean, "ci95": [0.95 * mean, 1.05 * mean], "seeds": 7, "values": [], "p": 0.0}

    clock = {
        "batch": 16,
        "problems": 64,
        "llm_rate": 0.12,
        "tokens_per_second": {LLM: entry(400.0), ROUTED: entry(400.0 * ratio)},
        "ratio": {LLM: entry(1.0), ROUTED: entry(ratio)},
    }
    results = made_up_results([made_up_seed(number) for number in range(2)], [clock])
    assert verdict_of(results, "routed is faster than the LLM alone, batch 16") == word
    assert f"{ratio:.2f} ({0.95 * ratio:.2f} – {1.05 * ratio:.2f}) ×" in tables(results)["clock_claims"][1][0]
    assert set(figures(results)) == {"routing_frontier.png", "routing_labels_clock.png"}


def test_without_a_clock_and_with_one_seed_nothing_is_claimed() -> None:
    results = made_up_results([made_up_seed(0)])
    shown = tables(results)
    assert shown["clock"][1] == shown["clock_claims"][1] == []
    assert set(re.findall(r"\*\*(.*?)\*\*", json.dumps(shown))) == {"cannot be told here"}
    assert len(figures(results)) == 2


def test_thresholds_are_searched_once_for_the_same_settings(tmp_path, monkeypatch) -> None:
    searched = []

    def serve(self, name: str) -> dict[str, float]:
        searched.append(name)
        return {f"{rate:g}": rate / 2 for rate in self.args.rates}

    monkeypatch.setattr(RoutingSeed, "_serve", serve)
    run = RoutingSeed.__new__(RoutingSeed)
    run.args, run.out = RoutingLedgerArguments(slm="s", llm="l", rates=RATES), tmp_path
    run.slm, run.llm = "s", "l"
    assert run.thresholds(NEURAL) == {0.04: 0.02, 0.12: 0.06}
    run.args.test_problems = 5
    run.thresholds(NEURAL)
    assert searched == [NEURAL]
    run.args.rates = [0.2]
    assert run.thresholds(NEURAL) == {0.2: 0.1} and len(searched) == 2
    run.thresholds("entropy")
    assert searched[2:] == ["entropy"]


class MadeUpRun:
    """A RoutingSeed without models."""

    def __init__(self, args: RoutingLedgerArguments, seed: int):
        self.seed, self.made = seed, made_up_seed(seed)

    def label_and_train(self) -> None: ...

    def points(self) -> dict:
        return self.made["points"]

    def label_shares(self) -> dict:
        return self.made["labels"]

    def router_figures(self, name: str) -> dict:
        return self.made["routers"][name]


def test_the_clock_is_timed_when_asked_and_kept_otherwise(tmp_path, monkeypatch) -> None:
    timed = []

    def clock(run: MadeUpRun, args: RoutingLedgerArguments) -> list[dict]:
        timed.append(run.seed)
        entry = {ROUTED: {"mean": 1.0, "ci95": [None, None], "seeds": 1}}
        return [{"batch": len(timed), "llm_rate": 0.12, "tokens_per_second": entry, "ratio": entry}]

    monkeypatch.setattr(routing_ledger, "RoutingSeed", MadeUpRun)
    monkeypatch.setattr(routing_ledger, "clock", clock)
    monkeypatch.setattr(routing_ledger, "sizes", lambda run: {"slm": 1, "llm": 10, "router": 1})

    def batches(**options) -> list[int]:
        args = RoutingLedgerArguments(output_dir=str(tmp_path), slm="s", llm="l", seeds=2, rates=RATES, **options)
        routing_ledger.main(args)
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["frontier"][NEURAL]["0.12"]["accuracy"]["seeds"] == 2
        return [timing["batch"] for timing in results["clock"]]

    assert batches(clock=False) == []
    assert batches(clock=True) == [1]
    assert batches(clock=False) == [1]
    assert batches(clock=True) == [2]
    assert timed == [routing_ledger.FIRST_SEED] * 2  # never the seed whose problems the base models know
