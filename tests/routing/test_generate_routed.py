"""`tokalign generate` on a tiny pair: problems in, rollouts with their writers out."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.support import save_tiny
from tokalign.cli.main import main
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.costs import activated_parameters, full_cost
from tokalign.routing.decode.policies.value import ValueHead
from tokalign.stage.errors import JobError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest


def generate(**options):
    """`tokalign generate` with these options."""
    return main(["generate", *(part for name, value in options.items() for part in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    slm = save_tiny(tmp_path_factory.mktemp("slm"), seed=0)
    llm = save_tiny(tmp_path_factory.mktemp("llm"), seed=1, hidden_size=48, layers=3)
    problems = tmp_path_factory.mktemp("problems")
    rows = [{"id": i, "prompt": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(7)]
    rows.append({"id": 7, "prompt": "long " * 30, "answer": "1"})
    Dataset.from_list(rows).to_parquet(problems / "train.parquet")
    return {"slm": slm, "llm": llm, "dataset": str(problems), "max_tokens": 8, "shard_size": 3}


def test_rows_manifest_costs_and_resumption(pair, tmp_path):
    def run(name: str, **more):
        options = {"policy": "random", "rate": 0.4, "num_rollouts": 2, "temperature": 0.9, "max_prompt_length": 60}
        return generate(**pair, output_dir=tmp_path / name, **{**options, **more})

    manifest = run("whole")
    assert manifest == read_manifest(tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(pair["slm"])
    rows = load_stage(tmp_path / "whole", stage="rollouts", tokenizer=tokenizer).to_list()
    assert [(row["id"], row["sample"]) for row in rows] == [(i, k) for i in range(7) for k in range(2)]
    assert manifest["dropped"] == {"prompt longer than max_prompt_length": 1}
    stats = RoutedStats()
    for row in rows:
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert len(row["written_by"]) == len(row["scores"]) == len(row["logprobs"]) == len(row["completion_ids"])
        assert row["written_by"] == [int(score >= 1 - 0.4) for score in row["scores"]]
        by_llm = sum(row["written_by"])
        work = [row[name] for name in ("handoffs", "slm_positions", "llm_positions")]
        stats += RoutedStats(len(row["written_by"]) - by_llm, by_llm, *work)
    routing, sizes = manifest["routing"], manifest["routing"]["parameters"]
    assert 0 < sizes["slm"] < sizes["llm"] and sizes["router"] == 0
    assert (routing["slm_tokens"], routing["llm_tokens"]) == (stats.slm_tokens, stats.llm_tokens)
    assert routing["llm_rate"] == stats.llm_rate and 0.2 < stats.llm_rate < 0.6
    assert routing["activated_parameters"] == activated_parameters(stats, sizes["slm"], sizes["llm"])
    assert routing["full_cost"] == full_cost(stats, sizes["slm"], sizes["llm"])
    assert routing["tokens_per_second"] > 0
    assert len(manifest["parameters"]["weights"]["llm"]) == 64 and manifest["parameters"]["threshold"] == 0.6

    # Killed after a shard: the rest is done, and the rows and the summary are the same.
    run("killed")
    (tmp_path / "killed" / "part-00001-of-00003.parquet").unlink()
    again = run("killed")
    assert load_stage(tmp_path / "killed").to_list() == rows
    assert {k: v for k, v in again["routing"].items() if k != "tokens_per_second"} == {
        k: v for k, v in routing.items() if k != "tokens_per_second"
    }
    with pytest.raises(JobError, match=r"rate was 0\.4 and is 0\.5"):
        run("killed", rate=0.5)


@pytest.mark.parametrize(("policy", "writer"), [("always", 1), ("never", 0)])
def test_the_models_alone(pair, tmp_path, policy, writer):
    manifest = generate(**pair, output_dir=tmp_path, policy=policy, num_problems=2)
    rows = load_stage(tmp_path, stage="rollouts").to_list()
    assert len(rows) == 2 and {by for row in rows for by in row["written_by"]} == {writer}
    assert manifest["routing"]["llm_rate"] == writer
    sizes = manifest["routing"]["parameters"]
    assert manifest["routing"]["activated_parameters"] == sizes["llm" if writer else "slm"]


@pytest.mark.parametrize("slm", ["slm", "llm"])
def test_verified_rows_are_the_llms_and_say_what_the_slm_had_drawn(pair, tmp_path, slm):
    options = {**pair, "num_problems": 3, "num_rollouts": 2, "temperature": 0.9}
    generate(**options, output_dir=tmp_path / "alone", policy="always")
    options |= {"slm": pair[slm], "policy": "entropy", "threshold": 3.2, "verify": True, "most_draft": 3}
    manifest = generate(**options, output_dir=tmp_path / "verified")
    alone, rows = (load_stage(tmp_path / name, stage="rollouts").to_list() for name in ("alone", "verified"))
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in alone]
    seen = {pair for row in rows for pair in zip(row["written_by"], row["agreed"], strict=True)}
    if slm == "llm":  # it agrees with itself, and the LLM writes where the policy looks and behind a full draft
        assert {(0, True), (1, True)} <= seen <= {(0, True), (1, True), (1, None)}
    else:
        assert (1, False) in seen and (0, False) not in seen
    assert manifest["routing"]["drafted"] == sum(row["drafted"] for row in rows) > 0
    assert manifest["parameters"]["verify"] and manifest["parameters"]["most_draft"] == 3


def test_published_policies_by_their_options(pair, tmp_path):
    head = ValueHead([32, 8])
    head.save(tmp_path / "head.safetensors")
    for name, options in (
        ("hysteresis", {"threshold": 0.8, "back": 0.6, "most": 4}),
        ("value", {"value_head": tmp_path / "head.safetensors", "threshold": 0.5}),
        ("call", {"calls": "a=3", "threshold": 0.03}),
    ):
        manifest = generate(**pair, output_dir=tmp_path / name, policy=name, num_problems=3, **options)
        assert manifest["parameters"]["policy"] == name and manifest["rows"] == 3
        assert manifest["routing"]["parameters"]["router"] == (32 * 8 + 8 + 8 + 1 if name == "value" else 0)
    assert len(read_manifest(tmp_path / "value")["parameters"]["value_head"]) == 64  # what the file holds


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "--policy router needs --router"),
        ({"policy": "entropy"}, "--policy entropy needs --threshold"),
        ({"policy": "random"}, "--policy random needs --rate"),
        ({"policy": "random", "rate": 0.1, "threshold": 0.5}, "--threshold does not belong to --policy random"),
        ({"policy": "always", "router": "r"}, "--router does not belong to --policy always"),
        ({"policy": "hysteresis", "threshold": 0.8, "most": 4, "verify": True}, "--back and --most say how long"),
    ],
)
def test_arguments_that_do_not_belong_together(pair, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        generate(**pair, output_dir=tmp_path, **options)
    assert "\n" not in str(error.value)
