"""Structured GRPO under real ZeRO with two processes equals one process; colocated vLLM follows the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import grpo_probe
from tests.launch.support import ROOT, launch
from tests.trainers.structured import problems, save_byte_level_model, save_ledger_model, short_problems

# two processes x 4 rows x 2 accumulated = the 16 rows a step (4 groups of 4) of the one-process reference
TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
ONE = {"per_device_train_batch_size": 16}
SEEN = ("structured/structure", "structured/correctness", "structured/correctness/zero_groups", "reward")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_ledger_model(tmp_path_factory.mktemp("ledger"))


def plan(model: str, output: Path, *, lora: bool, table: bool = True, resume: str | None = None, **arguments) -> dict:
    arguments |= {"output_dir": str(output)}
    return {"model": model, "lora": lora, "table": table, "resume": resume, "arguments": arguments}


def launched(config: str, tmp_path: Path, runs: list[dict]) -> list[dict]:
    (tmp_path / "plan.json").write_text(json.dumps(runs))
    launch(config, Path(grpo_probe.__file__), str(tmp_path / "plan.json"), str(tmp_path / "report.json"))
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "lora"), [("zero2", False), ("zero3", True)])
def test_two_processes_train_as_one(zero, lora, model, tmp_path) -> None:
    """The same completions on both sides (a table instead of sampling): same rewards, losses, curriculum; and ZeRO-3
    samples from its gathered weights and resumes."""
    runs = [plan(model, tmp_path / "two", lora=lora, **TWO)]
    if zero == "zero3":
        sampled = TWO | {"max_completion_length": 8}
        whole = plan(model, tmp_path / "whole", lora=lora, table=False, **sampled)
        half = sampled | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        runs += [
            whole,
            plan(model, tmp_path / "half", lora=lora, table=False, **half),
            plan(model, tmp_path / "rest", lora=lora, table=False, resume=f"{tmp_path}/half/checkpoint-1", **sampled),
        ]
    reports = launched(f"{zero}.yaml", tmp_path, runs)
    for seen in reports:
        assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == ("DEEPSPEED", 2, int(zero[-1]))
    alone = grpo_probe.report(grpo_probe.run(plan(model, tmp_path / "one", lora=lora, **ONE)))
    assert reports[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(alone["losses"]) == 2 and alone["losses"][0] != alone["losses"][1]
    for ours, theirs in zip(reports[0]["log"], alone["log"], strict=True):
        assert [ours[key] for key in SEEN] == pytest.approx([theirs[key] for key in SEEN], abs=1e-5)
    if zero == "zero3":
        assert reports[0]["partitioned"]
        assert reports[3]["losses"] == pytest.approx(reports[1]["losses"], abs=1e-6)  # the first is in the checkpoint
        assert reports[1]["losses"][1] != 0.0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_colocated_vllm_follows_the_policy(lora, model, tmp_path) -> None:
    """Two processes, ZeRO-2, an engine each: after three steps at a high rate, the engine's log-probs are still the
    policy's (full weights, and LoRA by TRL's merge), which they can only be if every step is handed over."""
    run = plan(
        *(model, tmp_path / "run"),
        lora=lora,
        table=False,
        rollouts="vllm-colocate",
        max_steps=3,
        learning_rate=2e-2,
        max_completion_length=24,
        vllm_max_model_length=128,
        **TWO,
    )
    (seen,) = launched("zero2.yaml", tmp_path, [run])
    assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == ("DEEPSPEED", 2, 2)
    assert any(abs(loss) > 1e-6 for loss in seen["losses"])  # the policy moved
    gaps = [entry["sampling/sampling_logp_difference/max"] for entry in seen["log"]]
    assert len(gaps) == 3 and max(gaps) < 0.05  # without the hand-over it is 0.9 after one step


@pytest.mark.slow
def test_colocated_vllm_draws_the_constrained_baseline(tmp_path) -> None:
    """An evaluation with vLLM's rollouts, half of each group once more under its row's own schema."""
    model = save_byte_level_model(tmp_path / "model")
    run = plan(
        *(model, tmp_path / "run"),
        lora=False,
        table=False,
        rows=short_problems(8),
        rollouts="vllm-colocate",
        max_steps=1,
        max_completion_length=48,
        vllm_max_model_length=256,
        eval_strategy="steps",
        eval_steps=1,
        constrained_eval_share=0.5,
    )
    (tmp_path / "plan.json").write_text(json.dumps([run]))
    files = (str(tmp_path / "plan.json"), str(tmp_path / "report.json"))
    launch("cpu.yaml", Path(grpo_probe.__file__), *files, num_processes=1)
    (seen,) = json.loads((tmp_path / "report.json").read_text())
    assert seen["eval"]["eval_structured/validity"] == 0.0 < 0.5 < seen["eval"]["eval_constrained/validity"]
    assert seen["eval"]["eval_constrained/schema"] == seen["eval"]["eval_constrained/validity"]


@pytest.mark.slow
def test_the_recipe_runs_as_documented_with_vllm(model, tmp_path) -> None:
    """`python recipes/structured_grpo.py --config recipes/ledger/structured_grpo.yaml`, shortened."""
    from datasets import Dataset

    Dataset.from_list(problems(16)).to_parquet(tmp_path / "data" / "train.parquet")
    overrides = {
        "model_name_or_path": model,
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": "2",
        "per_device_train_batch_size": "8",
        "max_completion_length": "16",
    }
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    recipe = ROOT / "recipes" / "ledger" / "structured_grpo.yaml"
    launch("cpu.yaml", ROOT / "recipes" / "structured_grpo.py", "--config", str(recipe), *arguments, num_processes=1)
    log = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert [entry["step"] for entry in log if "structured/validity" in entry] == [1, 2]
    assert all("sampling/sampling_logp_difference/max" in entry for entry in log if "loss" in entry)  # vLLM's rollouts
    assert (tmp_path / "out" / "curriculum.png").stat().st_size > 5000
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
