"""What the training verbs share, at a tiny size, through the command."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.trainers.preferences import as_text, preference_rows
from tokalign.cli.main import main
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.manifest import read_manifest, write_manifest

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
    names = {"model_name_or_path": tiny_path, "dataset_name": tmp_path / "train", "output_dir": tmp_path / "out"}
    trainer = main(["critical-dpo", *words({**SHORT, **names, **evaluation, "dtype": "float32"})])
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("stored", [True, False])
def test_sft_rows_of_another_tokenizer(tiny_path, tmp_path, stored):
    """TRL trains on `input_ids` as they are; whose they are, the manifest or the text tells."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rows = []
    for i in range(4):
        ids = [[*tokenizer(text)["input_ids"], 1] for text in (f"{i} + 1?", f"It is {i + 1}.")]
        row = {"id": str(i), "prompt": f"{i} + 1?", "completion": f"It is {i + 1}.", "prompt_ids": ids[0]}
        row |= {"completion_ids": ids[1], "input_ids": ids[0] + ids[1]}
        rows.append(row | {"completion_mask": [0] * len(ids[0]) + [1] * len(ids[1])})
    sampling = {"stop": ["\n\n"], "end_ids": [1], "end_token_id": 1, "base_model": True}
    manifest = {"name": "pairs", "status": "complete", "sampling": sampling}
    short = {key: value for key, value in SHORT.items() if key != "beta"} | {"max_steps": 1, "dtype": "float32"}

    def sft(name: str, rows: list[dict], made_with: str, *more: str):
        Dataset.from_list(rows).to_parquet(tmp_path / name / "train.parquet")
        if stored:
            write_manifest(tmp_path / name, manifest | {"tokenizer_hash": made_with})
        names = {
            "model_name_or_path": tiny_path,
            "dataset_name": tmp_path / name,
            "output_dir": tmp_path / f"{name}_out",
        }
        return main(["sft", *words({**short, **names}), *more])

    sft("own", rows, tokenizer_hash(tokenizer))
    assert (tmp_path / "own_out" / "manifest.json").exists() == stored
    if stored:  # evaluation will stop where these rollouts stopped
        assert read_manifest(tmp_path / "own_out")["sampling"] == sampling
    other = [row | {"completion_ids": [6 + (i + 20) % 80 for i in row["completion_ids"]]} for row in rows]
    message = "made with another tokenizer" if stored else "Row 0 .*`completion` is not what this tokenizer reads"
    with pytest.raises(ContractError, match=message):
        sft("other", other, "0" * 64)
    sft("other", other, "0" * 64, "--allow_other_tokenizer", "true")
    assert read_manifest(tmp_path / "other_out")["allow_other_tokenizer"] is True
