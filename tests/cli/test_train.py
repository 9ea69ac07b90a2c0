"""What the training verbs share, at a tiny size, through the command."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.trainers.preferences import as_text, preference_rows, with_signals
from tokalign.cli.main import main

SHORT = {"max_steps": 3, "learning_rate": 1e-2, "beta": 0.5, "report_to": "none", "use_cpu": True, "bf16": False}


def words(options: dict) -> list[str]:
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def test_dpo_is_the_stock_trainer(tiny_path, tmp_path):
    """Weights after three steps on text, and the log, are those of TRL's `DPOTrainer` with the same arguments."""
    (tmp_path / "text").mkdir()
    rows = as_text(preference_rows(tiny_path, 8))
    rows.to_parquet(tmp_path / "text" / "train.parquet")
    common = {**SHORT, "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no"}
    names = {"model_name_or_path": tiny_path, "dataset_name": tmp_path / "text", "output_dir": tmp_path / "ours"}
    ours = main(["dpo", *words({**common, **names, "dtype": "float32"})])
    stock = DPOTrainer(tiny_path, args=DPOConfig(output_dir=str(tmp_path / "stock"), **common), train_dataset=rows)
    stock.train()
    other = dict(stock.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-6, msg=name)
    for key in ("loss", "rewards/margins", "logps/chosen"):
        logs = [[entry[key] for entry in t.state.log_history if key in entry] for t in (ours, stock)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-6) and len(logs[0]) == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").num_parameters() == ours.model.num_parameters()


def test_dpo_weighs_nothing(tiny_path, tmp_path):
    with pytest.raises(ValueError, match="critical-dpo"):
        (tmp_path / "weighted.yaml").write_text("weight_side: rejected\n")
        main(["dpo", "--config", str(tmp_path / "weighted.yaml"), *words(SHORT), "--output_dir", str(tmp_path)])


def test_another_dataset_is_evaluated_on(tiny_path, tmp_path):
    for name, seed in (("train", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        Dataset.from_list(preference_rows(tiny_path, 4, seed=seed)).to_parquet(tmp_path / name / "part.parquet")
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset_name": tmp_path / "other"}
    evaluation["dataset_test_split"] = "train"  # the only one that the folder has
    names = {"model_name_or_path": tiny_path, "dataset_name": tmp_path / "train", "output_dir": tmp_path / "out"}
    trainer = main(["critical-dpo", *words({**SHORT, **names, **evaluation, "dtype": "float32"})])
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("verb", ["critical-dpo", "dpo", "treg", "sft"])
def test_a_stream_trains_as_stored_rows(tiny_path, tmp_path, verb):
    """In the order of the rows; without `max_steps` the Trainer says that a stream has no length."""
    rows = with_signals(preference_rows(tiny_path, 4))
    columns = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]} for row in rows]
    sft = [{"input_ids": row["prompt_ids"] + row["completion_ids"]} for row in columns]
    (tmp_path / "rows").mkdir()
    Dataset.from_list(sft if verb == "sft" else rows).to_parquet(tmp_path / "rows" / "train.parquet")
    names = {"model_name_or_path": tiny_path, "dataset_name": tmp_path / "rows", "output_dir": tmp_path / "out"}
    common = {**{k: v for k, v in SHORT.items() if verb != "sft" or k != "beta"}, **names, "dtype": "float32"}
    common |= {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    stored = main([verb, *words({**common, "train_sampling_strategy": "sequential"})])
    streamed = main([verb, *words({**common, "dataset_streaming": True})])
    assert isinstance(streamed.train_dataset, IterableDataset)
    other = dict(stored.model.named_parameters())
    for name, weight in streamed.model.named_parameters():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="max_steps"):
        main([verb, *words({**common, "dataset_streaming": True, "max_steps": -1})])
