"""T-REG on two real processes under ZeRO equals one plain process, wherever the rewards come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.launch import probe
from tests.launch.support import launch, write_preferences

# two processes x 2 rows x 2 accumulated = the 8 rows a step of the one-process reference
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
WHOLE_STEP = {"per_device_train_batch_size": 8, "max_steps": 2}


@pytest.fixture(scope="module")
def datasets(tiny_path, tmp_path_factory) -> dict[str, str]:
    """The same pairs with token rewards and without."""
    rewarded = write_preferences(tmp_path_factory.mktemp("rewarded"), tiny_path, rows=16)
    plain = tmp_path_factory.mktemp("plain")
    rows = load_dataset("parquet", data_files=f"{rewarded}/*.parquet", split="train")
    rows.remove_columns([f"{side}_token_reward" for side in ("chosen", "rejected")]).to_parquet(plain / "train.parquet")
    return {"rewarded": rewarded, "plain": str(plain)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "runs"),
    [
        # a reference model under ZeRO-2, asked for the rewards of each batch
        ("zero2", [("plain", False, {"prompt_format": "raw", "templates": "TEMPLATES"})]),
        (
            "zero3",  # the reference (the adapter off) asked ahead for log-probs and rewards; and no reference at all
            [
                ("plain", True, {"prompt_format": "raw", "templates": "TEMPLATES", "precompute_ref_log_probs": True}),
                ("rewarded", True, {"base_loss": "simpo", "beta": 2.0}),
            ],
        ),
    ],
)
def test_two_processes_train_as_one(zero, runs, datasets, tiny_path, tmp_path) -> None:
    # a character-level tokenizer makes the package's own templates longer than the tiny model's 512 positions
    templates = tmp_path / "templates.json"
    templates.write_text('{"better": "Good: {prompt}{completion} ", "worse": "Bad: {prompt}{completion} "}')

    def run(dataset: str, lora: bool, arguments: dict, step: dict, name: str) -> dict:
        arguments = {key: str(templates) if value == "TEMPLATES" else value for key, value in arguments.items()}
        arguments |= step | {"output_dir": str(tmp_path / name)}
        return {
            "method": "treg",
            "model": tiny_path,
            "dataset": datasets[dataset],
            "lora": lora,
            "arguments": arguments,
        }

    plan, report = tmp_path / "plan.json", tmp_path / "report.json"
    plan.write_text(json.dumps([run(*options, STEP, f"two-{i}") for i, options in enumerate(runs)]))
    launch(f"{zero}.yaml", Path(probe.__file__), str(plan), str(report))
    for i, (seen, options) in enumerate(zip(json.loads(report.read_text()), runs, strict=True)):
        assert (seen["distributed_type"], seen["num_processes"], seen["zero_stage"]) == ("DEEPSPEED", 2, int(zero[-1]))
        alone = probe.build(run(*options, WHOLE_STEP, f"one-{i}"))
        alone.train()
        assert seen["losses"] == pytest.approx(probe.describe(alone)["losses"], abs=1e-5)
        assert len(seen["losses"]) == 2 and seen["losses"][0] != seen["losses"][1]
