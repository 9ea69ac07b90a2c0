"""recipes/critical_dpo.py from a folder of scored pairs and from TRL's text, through its command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.trainers.preferences import as_text, preference_rows

RECIPE = Path(__file__).parents[2] / "recipes" / "critical_dpo.py"


def _run(monkeypatch, *arguments: str) -> None:
    common = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments, *common, "--dtype", "float32"])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.parametrize("weight_side", ["rejected", "none"])
def test_scored_pairs(tiny_path, tmp_path, monkeypatch, weight_side):
    pairs = tmp_path / "pairs"
    for split, seed in (("train", 0), ("test", 1)):
        (pairs / split).mkdir(parents=True)
        Dataset.from_list(preference_rows(tiny_path, 4, seed=seed)).to_parquet(pairs / split / "part-0.parquet")
    names = ["--model_name_or_path", tiny_path, "--dataset_name", str(pairs), "--output_dir", str(tmp_path / "out")]
    lora = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]
    rpo = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5"]
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--precompute_ref_log_probs"]
    _run(monkeypatch, *names, *lora, *rpo, *evaluation, "--weight_side", weight_side)
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    assert "default" in PeftModel.from_pretrained(base, tmp_path / "out").peft_config


def test_plain_dpo_on_text(tiny_path, tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    as_text(preference_rows(tiny_path, 4)).to_parquet(tmp_path / "text" / "train.parquet")
    names = ["--model_name_or_path", tiny_path, "--dataset_name", str(tmp_path / "text")]
    _run(monkeypatch, *names, "--output_dir", str(tmp_path / "out"), "--weight_side", "none")
    assert (tmp_path / "out" / "model.safetensors").exists()
