"""Routed runs read from disk: accuracy, costs, and query-level routing against the definition written out."""

from __future__ import annotations

import json
import random

import pytest
from datasets import Dataset

from tokalign.cli import evaluate_routing
from tokalign.evaluation.routing import query_level, run_summary
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.manifest import read_manifest, write_manifest

SIZES = {"slm": 10, "llm": 100, "router": 1}


def write_run(folder, policy: str, accuracy: float, *, seed: int, count: int = 40, **changes):
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        length = draw.randrange(2, 9)
        by_llm = {"always": [1] * length, "never": [0] * length}.get(policy)
        rows.append(
            {
                "id": f"p{i}",
                "prompt": "?",
                "answer": "1",
                "prompt_ids": [5, 6],
                "completion_ids": [7] * length,
                "completion": "x",
                "finish_reason": "stop",
                "logprobs": [-draw.random() * (i % 5 + 1) for _ in range(length)],
                "sample": 0,
                "correct": draw.random() < accuracy,
                "written_by": by_llm or [draw.randrange(2) for _ in range(length)],
                "slm_positions": 2 + length,
                "llm_positions": 1 + length,
                **changes,
            }
        )
    parameters = {"policy": policy, "threshold": 0.5}
    manifest = run_job(lambda b: b, Dataset.from_list(rows), folder, name="generate_routed", parameters=parameters)
    rate = sum(sum(row["written_by"]) for row in rows) / sum(len(row["written_by"]) for row in rows)
    manifest["routing"] = {"parameters": SIZES, "llm_rate": rate, "activated_parameters": 20.0, "full_cost": 50.0}
    write_manifest(folder, manifest)
    return rows


@pytest.fixture
def runs(tmp_path):
    return {
        name: (str(tmp_path / name), write_run(tmp_path / name, policy, accuracy, seed=seed))
        for seed, (name, policy, accuracy) in enumerate(
            (("slm", "never", 0.3), ("llm", "always", 0.95), ("routed", "router", 0.8))
        )
    }


def test_summary_is_of_the_rows_and_paired_with_the_llm(runs):
    folder, rows = runs["routed"]
    llm_folder, llm = runs["llm"]
    found = run_summary(folder, llm_folder)
    assert found["accuracy"] == sum(row["correct"] for row in rows) / 40 and found["n"] == 40
    assert found["ci95"][0] < found["accuracy"] < found["ci95"][1]
    wins = sum(a["correct"] and not b["correct"] for a, b in zip(rows, llm, strict=True))
    assert found["minus_llm"]["wins"] == wins and found["llm_rate"] == pytest.approx(0.5, abs=0.2)


def test_runs_whose_prompts_were_rendered_differently_are_not_compared(runs):
    for (name, (folder, _)), thinks in zip(runs.items(), (True, True, False), strict=True):
        prompts = {"format": "chat", "chat_template_kwargs": {"enable_thinking": thinks}, "date": name}
        write_manifest(folder, {**read_manifest(folder), "prompts": prompts})
    assert run_summary(runs["slm"][0], runs["llm"][0])  # the date alone may differ
    with pytest.raises(ContractError, match="rendered their prompts differently"):
        run_summary(runs["routed"][0], runs["llm"][0])


def test_query_level_equals_a_plain_loop(runs):
    (slm_folder, slm), (llm_folder, llm) = runs["slm"], runs["llm"]
    hardest = sorted(range(40), key=lambda i: sum(slm[i]["logprobs"]) / len(slm[i]["logprobs"]))
    rates = [0.0, 0.1, 0.35, 1.0]
    for rate, found in zip(rates, query_level(slm_folder, llm_folder, rates), strict=True):
        given = 0
        for count in range(41):  # the most problems, hardest first, whose tokens stay within the rate
            chosen = set(hardest[:count])
            large = sum(len(llm[i]["written_by"]) for i in chosen)
            small = sum(len(slm[i]["written_by"]) for i in range(40) if i not in chosen)
            if large <= rate * (large + small):
                given = count
            else:
                break
        chosen = set(hardest[:given])
        assert found["accuracy"] == sum((llm if i in chosen else slm)[i]["correct"] for i in range(40)) / 40
        large = sum(len(llm[i]["written_by"]) for i in chosen)
        small = sum(len(slm[i]["written_by"]) for i in range(40) if i not in chosen)
        assert found["llm_rate"] == large / (large + small)
        assert found["activated_parameters"] == (10 * small + 100 * large) / (large + small)
        work = 10 * sum(row["slm_positions"] for row in slm) + 100 * sum(llm[i]["llm_positions"] for i in chosen)
        assert found["full_cost"] == work / (large + small)
    assert found["llm_rate"] == 1 and found["accuracy"] == sum(row["correct"] for row in llm) / 40


def test_the_verb_writes_table_figure_and_json(runs, tmp_path):
    arguments = evaluate_routing.EvaluateRoutingArguments(
        runs["slm"][0],
        runs["llm"][0],
        str(tmp_path / "out"),
        runs=[f"router={runs['routed'][0]}", f"router={runs['llm'][0]}"],
    )
    points = evaluate_routing.main(arguments)
    assert json.loads((tmp_path / "out" / "routing.json").read_text()) == points
    assert (tmp_path / "out" / "routing.png").stat().st_size > 10_000
    assert [len(points[name]) for name in ("SLM only", "LLM only", "router", "query-level")] == [1, 1, 2, 5]


def test_runs_that_cannot_be_compared(runs, tmp_path):
    with pytest.raises(ValueError, match="write name=folder"):
        evaluate_routing.EvaluateRoutingArguments("a", "b", "c", runs=["runs/routed"])
    write_run(tmp_path / "fewer", "never", 0.5, seed=3, count=10)
    with pytest.raises(ContractError, match="hold other problems"):
        query_level(tmp_path / "fewer", runs["llm"][0], [0.1])
    write_run(tmp_path / "unverified", "never", 0.5, seed=3, correct=None)
    with pytest.raises(ContractError, match="without an `answer`"):
        run_summary(tmp_path / "unverified")
    write_run(tmp_path / "twice", "never", 0.5, seed=3, id="p0")
    with pytest.raises(ContractError, match="several completions a problem"):
        run_summary(tmp_path / "twice")
    manifest = json.loads((tmp_path / "fewer" / "manifest.json").read_text())
    del manifest["routing"]
    write_manifest(tmp_path / "fewer", manifest)
    with pytest.raises(ContractError, match="not a stage of"):
        run_summary(tmp_path / "fewer")
