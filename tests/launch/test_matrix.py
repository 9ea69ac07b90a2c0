"""Every method on the real stack: {one process, two under ZeRO-2, two under ZeRO-3} × {full, LoRA}.

A cell trains a few steps, saves before the last ones, and resumes from there in a new trainer: the resumed run's losses
and weights are the uninterrupted run's, and two processes' losses are one process's. All cells of a column are carried
out one after another by the same processes, in one launch; the column of one process runs in this one.

A router has no pretrained weights that LoRA would spare; its cell shows that RouterTrainer takes TRL's `peft_config`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from tests.launch import probe
from tests.launch.support import launch_plan, write_preferences
from tests.routing.labels import write_labels
from tests.support import tiny_model
from tests.trainers.structured import save_ledger_model
from tokalign.stage.hashes import weights_hash

COLUMNS = ("one process", "zero2", "zero3")
CELLS = [(method, lora) for method in probe.METHODS for lora in (False, True)]
# Rows a step of each method, for all processes together; two processes halve them twice, to accumulate as well.
STEP = {"critical_token_dpo": 8, "treg": 8, "structured_grpo": 16, "router": 64}
# (checkpoint to resume from, last step); the router's are in the middle of its second epoch and at its end
STEPS = {"critical_token_dpo": (1, 2), "treg": (1, 2), "structured_grpo": (1, 2), "router": (3, 4)}
COMPONENTS = ("structured/structure", "structured/correctness", "structured/correctness/zero_groups", "reward")
CREDIT = ("credit/by_token/mean", "credit/field/abs_mean", "credit/field/coverage")


@pytest.fixture(scope="module")
def world(tiny_path, tmp_path_factory) -> dict[str, str]:
    """Models and data on disk, by name."""
    folder = tmp_path_factory.mktemp("matrix")
    rewarded = write_preferences(folder / "rewarded", tiny_path, rows=16)
    rows = load_dataset("parquet", data_files=f"{rewarded}/*.parquet", split="train")
    rows.remove_columns([f"{side}_token_reward" for side in ("chosen", "rejected")]).to_parquet(
        folder / "plain" / "train.parquet"
    )
    # A character-level tokenizer makes the package's own templates longer than the tiny model's 512 positions.
    templates = folder / "templates.json"
    templates.write_text('{"better": "Good: {prompt}{completion} ", "worse": "Bad: {prompt}{completion} "}')
    slm = str(folder / "slm")
    tiny_model(20, hidden_size=8).save_pretrained(slm)
    made_by = {"models": {"slm": {"path": slm, "weights_hash": weights_hash(slm), "tokenizer_hash": "t"}}}
    for seed, (split, count) in enumerate({"train": 28, "calibration": 20}.items()):
        labels = write_labels(folder, rows=count, split=split, seed=seed, manifest=made_by)
    return {
        "tiny": tiny_path,
        "ledger": save_ledger_model(folder / "ledger"),
        "slm": slm,
        "rewarded": rewarded,
        "plain": str(folder / "plain"),
        "templates": str(templates),
        "labels": str(labels.parent),
    }


def batch(method: str, column: str) -> dict[str, int]:
    if column == "one process":
        return {"per_device_train_batch_size": STEP[method]}
    return {"per_device_train_batch_size": STEP[method] // 4, "gradient_accumulation_steps": 2}


def plan_of(world: dict[str, str], column: str, folder: Path) -> dict[tuple, dict]:
    """The runs of a column: (method, lora, "whole" or "resumed") and a few more -> run of tests/launch/probe.py."""
    self_rewarded = {"prompt_format": "raw", "templates": world["templates"]}
    ahead = {"precompute_ref_log_probs": True}  # by the reference under LoRA, which is the adapter switched off
    saving = {"save_strategy": "steps", "save_steps": 1}
    watched = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": None, "patience": 0, "shuffle_window": 2}
    plan = {}

    def run(name: str, method: str, lora: bool, reads: dict, arguments: dict, resume: str | None = None) -> dict:
        reads = {key: world.get(value, value) for key, value in reads.items()}
        arguments = batch(method, column) | {"max_steps": STEPS[method][1]} | arguments
        arguments |= {"output_dir": str(folder / f"{name}-{lora}")}
        return {"method": method, "lora": lora, "resume": resume, "arguments": arguments, **reads}

    def add(name: str, method: str, lora: bool, reads: dict, arguments: dict) -> None:
        """A run that is never interrupted, and one that goes on from a checkpoint that it left."""
        whole = run(name, method, lora, reads, saving | arguments)
        checkpoint = f"{whole['arguments']['output_dir']}/checkpoint-{STEPS[method][0]}"
        plan[name, lora, "whole"] = whole
        plan[name, lora, "resumed"] = run(f"{name}-resumed", method, lora, reads, saving | arguments, checkpoint)

    for lora in (False, True):
        rewarded, plain = {"model": "tiny", "dataset": "rewarded"}, {"model": "tiny", "dataset": "plain"}
        add("critical_token_dpo", "critical_token_dpo", lora, rewarded, ahead if lora else {})
        add("treg", "treg", lora, plain, self_rewarded | (ahead if lora else {}))
        add("structured_grpo", "structured_grpo", lora, {"model": "ledger", "table": True}, {"credit": "field"})
        add("router", "router", lora, {"model": "slm", "dataset": "labels"}, watched)  # ends with the best, by default
    # The reference is asked at every step, by switching the adapter off.
    plan["reference", True, "whole"] = run("reference", "critical_token_dpo", True, rewarded, {})
    # Without a reference model, on rewards of the dataset.
    plan["simpo", True, "whole"] = run("simpo", "treg", True, rewarded, {"base_loss": "simpo", "beta": 2.0})
    if column == "zero3":  # samples from its gathered weights
        sampled = {"model": "ledger", "table": False}
        add("sampled", "structured_grpo", True, sampled, {"max_completion_length": 8})
    return plan


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict[str, dict]:
    """The column of one process: plan and reports."""
    plan = plan_of(world, "one process", tmp_path_factory.mktemp("alone"))
    return {"plan": plan, "reports": dict(zip(plan, probe.carry_out(list(plan.values())), strict=True))}


@pytest.fixture(scope="module", params=COLUMNS)
def column(request, world, tmp_path_factory) -> dict:
    """A column: its name, plan and reports."""
    if request.param == "one process":
        return {"name": request.param, **request.getfixturevalue("alone")}
    folder = tmp_path_factory.mktemp(request.param)
    plan = plan_of(world, request.param, folder)
    reports = launch_plan(f"{request.param}.yaml", folder, list(plan.values()))
    return {"name": request.param, "plan": plan, "reports": dict(zip(plan, reports, strict=True))}


def saved_weights(folder: str) -> dict[str, torch.Tensor]:
    (file,) = [
        path for path in Path(folder).iterdir() if path.name in ("model.safetensors", "adapter_model.safetensors")
    ]
    return load_file(file)


def check_resumed(column: dict, name: str, lora: bool) -> None:
    """The resumed run is the uninterrupted one: its losses (those before are in the checkpoint) and its weights."""
    whole, resumed = (column["reports"][name, lora, which] for which in ("whole", "resumed"))
    steps = column["plan"][name, lora, "whole"]["arguments"]["max_steps"]
    assert len(whole["losses"]) == len(resumed["losses"]) == steps and len(set(whole["losses"])) == steps
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    one, other = (column["plan"][name, lora, which] for which in ("whole", "resumed"))
    weights, again = (saved_weights(run["arguments"]["output_dir"]) for run in (one, other))
    torch.testing.assert_close(again, weights, rtol=0, atol=1e-6)
    before = saved_weights(other["resume"])
    at = int(other["resume"].rpartition("-")[2])  # and it began there: checkpoints are saved after every step
    kept = {path.name for path in Path(other["arguments"]["output_dir"]).glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in range(at + 1, steps + 1)}
    assert before.keys() == weights.keys() and any("lora_" in key for key in weights) == lora
    # The steps after the checkpoint did something, so what is equal above was computed again.
    assert max((weights[key] - before[key]).abs().max().item() for key in weights) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lora"), CELLS)
def test_a_resumed_run_is_an_uninterrupted_one(column, method, lora) -> None:
    launched = ("NO", 1, None) if column["name"] == "one process" else ("DEEPSPEED", 2, int(column["name"][-1]))
    for which in ("whole", "resumed"):
        seen = column["reports"][method, lora, which]
        assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == launched
        assert seen["partitioned"] == (column["name"] == "zero3")
    check_resumed(column, method, lora)
    if (column["name"], method, lora) == ("zero3", "structured_grpo", True):
        check_resumed(column, "sampled", lora)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lora"), [*CELLS, ("reference", True), ("simpo", True)])
def test_two_processes_train_as_one(column, alone, method, lora) -> None:
    """Of the column of one process: the same again, which costs nothing."""
    two, one = (reports[method, lora, "whole"] for reports in (column["reports"], alone["reports"]))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][0] != one["losses"][1]
    if method == "structured_grpo":  # the same completions: the same rewards and curriculum
        for ours, theirs in zip(two["log"], one["log"], strict=True):
            for key in (*COMPONENTS, *CREDIT):
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5)
    if method == "router":  # over all calibration tokens, gathered from both
        for ours, theirs in zip(two["evaluations"], one["evaluations"], strict=True):
            for key in ("eval_weighted_loss", "eval_auroc", "eval_auprc"):
                assert ours[key] == pytest.approx(theirs[key], abs=1e-4)
        epochs = [entry["epoch"] for entry in one["evaluations"]]
        assert epochs == [0.5, 1.0, 1.5, 2.0]  # so the checkpoint to resume from lies within the second
