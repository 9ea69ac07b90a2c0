"""Structured GRPO with a vLLM engine inside every training process: it follows the policy, resumes, and evaluates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.support import ROOT, launch, launch_plan
from tests.trainers.structured import problems, save_byte_level_model, save_ledger_model, short_problems

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_ledger_model(tmp_path_factory.mktemp("ledger"))


def plan(model: str, output: Path, *, lora: bool = False, resume: Path | None = None, **arguments) -> dict:
    """A run that samples 4 rows x 2 accumulated on each of two processes."""
    arguments = {
        "output_dir": str(output),
        "rollouts": "vllm-colocate",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    } | arguments
    resume = None if resume is None else str(resume)
    return {
        "method": "structured_grpo",
        "model": model,
        "lora": lora,
        "table": False,
        "resume": resume,
        "arguments": arguments,
    }


@pytest.fixture(scope="module")
def reports(model, tmp_path_factory) -> dict[str, dict]:
    """One launch of two processes under ZeRO-2, with an engine each for one run after another."""
    folder = tmp_path_factory.mktemp("colocated")
    fast = {"max_steps": 3, "learning_rate": 2e-2, "max_completion_length": 24, "vllm_max_model_length": 128}
    fast |= {"save_strategy": "steps", "save_steps": 2}
    runs = {}
    for lora, name in ((False, "full"), (True, "lora")):
        runs[name] = plan(model, folder / name, lora=lora, **fast)
        runs[f"{name} resumed"] = plan(
            model, folder / f"{name}-resumed", lora=lora, resume=folder / name / "checkpoint-2", **fast
        )
    runs["evaluated"] = plan(
        save_byte_level_model(folder / "model"),
        folder / "evaluated",
        rows=short_problems(8),
        max_steps=1,
        max_completion_length=48,
        vllm_max_model_length=256,
        eval_strategy="steps",
        eval_steps=1,
        constrained_eval_share=0.5,
    )
    return dict(zip(runs, launch_plan("zero2.yaml", folder, list(runs.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_colocated_vllm_follows_the_policy_and_resumes(name, reports) -> None:
    """After three steps at a high rate, the engine's log-probs are still the policy's (full weights, and LoRA by TRL's
    merge), which they can only be if every step is handed over. A resumed run samples what the uninterrupted one did:
    on the CPU the engine draws from its process's own generator, whose state is in the checkpoint."""
    whole, resumed = reports[name], reports[f"{name} resumed"]
    for seen in (whole, resumed):
        assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == ("DEEPSPEED", 2, 2)
        gaps = [entry["sampling/sampling_logp_difference/max"] for entry in seen["log"]]
        assert len(gaps) == 3 and max(gaps) < 0.05  # without the hand-over it is 0.9 after one step
    assert any(abs(loss) > 1e-6 for loss in whole["losses"])  # the policy moved
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert [entry["reward"] for entry in resumed["log"]] == [entry["reward"] for entry in whole["log"]]


@pytest.mark.slow
def test_colocated_vllm_draws_the_constrained_baseline(reports) -> None:
    """An evaluation with vLLM's rollouts, half of each group once more under its row's own schema."""
    (seen,) = reports["evaluated"]["evaluations"]
    assert seen["eval_structured/validity"] == 0.0 < 0.5 < seen["eval_constrained/validity"]
    assert seen["eval_constrained/schema"] == seen["eval_constrained/validity"]


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
