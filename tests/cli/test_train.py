"""What the training verbs share, at a tiny size, through the command."""

from __future__ import annotations

import json
import string

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.support import tiny_model, tiny_tokenizer
from tests.trainers.preferences import as_text, preference_rows, with_signals
from tokalign.cli.main import main
from tokalign.internals.trl import ids_of_dpo_trainer
from tokalign.prompts import PromptRendering
from tokalign.stage.errors import ContractError, OptionError
from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.loading import load_stage
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


def test_what_the_template_is_given_reaches_training_and_is_followed_by_evaluation(tmp_path, caplog):
    """As a column for TRL, as a record beside the model, and from there to whoever samples from it or evaluates it."""
    path, off = str(tmp_path / "tiny"), {"enable_thinking": False}
    tokenizer = tiny_tokenizer(string.printable, kind="thinking")
    tokenizer.save_pretrained(path)
    tiny_model(len(tokenizer)).save_pretrained(path)
    rows = as_text(preference_rows(path, 4)).add_column("id", list("abcd"))
    (tmp_path / "text").mkdir()
    rows.to_parquet(tmp_path / "text" / "train.parquet")
    names = {"model_name_or_path": path, "dataset_name": tmp_path / "text", "output_dir": tmp_path / "out"}
    once = {**SHORT, **names, "max_steps": 1, "chat_template_kwargs": json.dumps(off)}
    trainer = main(["dpo", *words(once)])
    stock = ids_of_dpo_trainer(rows.map(lambda row: {"chat_template_kwargs": off}), tokenizer)
    assert trainer.train_dataset["prompt_ids"] == stock["prompt_ids"]
    assert tokenizer.decode(stock[0]["prompt_ids"]).endswith("<think></think>")
    record = read_manifest(tmp_path / "out")["prompts"]
    assert record == PromptRendering("chat", off).record(tokenizer)
    problems = [{"id": "p", "prompt": "1 + 1", "answer": "2"}]
    Dataset.from_list(problems).to_parquet(tmp_path / "problems.parquet")
    asked = {"model": tmp_path / "out", "max_tokens": 2}
    given = {"problems": tmp_path / "problems.parquet", "split": "train", "output_dir": tmp_path / "eval"}
    metrics = main(["evaluate", "answers", *words({**asked, **given})])
    assert metrics["chat_template_kwargs"] == off and read_manifest(tmp_path / "eval")["prompts"] == record
    given = {"dataset": tmp_path / "problems.parquet", "output_dir": tmp_path / "sampled", "num_rollouts": 1}
    assert main(["sample", *words({**asked, **given})])["prompts"] == record
    assert load_stage(tmp_path / "sampled")[0]["prompt_ids"] == PromptRendering("chat", off).ids(problems[0], tokenizer)
    scored = {"model": path, "dataset": tmp_path / "text", "output_dir": tmp_path / "scored"}
    main(["score", "likelihood", *words({**scored, "chat_template_kwargs": json.dumps(off)})])
    assert load_stage(tmp_path / "scored")["prompt_ids"] == stock["prompt_ids"]
    assert read_manifest(tmp_path / "scored")["prompts"] == record
    # Text that is evaluated on is rendered as the ids that are trained on; a mixture says what all its stages say
    del once["chat_template_kwargs"]
    evaluation = {"eval_dataset_name": tmp_path / "text", "dataset_test_split": "train", "eval_strategy": "epoch"}
    trainer = main(["dpo", *words({**once, **evaluation, "dataset_name": tmp_path / "scored"})])
    assert trainer.eval_dataset["prompt_ids"] == stock["prompt_ids"]
    (tmp_path / "mixed.yaml").write_text(
        f"datasets: [{{path: {tmp_path / 'scored'}}}, {{path: {tmp_path / 'scored'}}}]"
    )
    mixed = {**once, "config": tmp_path / "mixed.yaml", "output_dir": tmp_path / "mixed"}
    del mixed["dataset_name"]
    main(["dpo", *words(mixed)])
    assert read_manifest(tmp_path / "mixed")["prompts"] == record
    (tmp_path / "mixed.yaml").write_text(f"datasets: [{{path: {tmp_path / 'scored'}}}, {{path: rows.jsonl}}]")
    with pytest.raises(ContractError, match="A part of the mixture cannot be read"):
        main(["dpo", *words(mixed)])
    evaluation |= {"dataset_name": tmp_path / "text", "eval_dataset_name": tmp_path / "scored"}
    caplog.clear()
    main(["dpo", *words({**once, **evaluation})])
    assert "otherwise than those of the rows to evaluate on (chat_template_kwargs {}, there" in caplog.text
    once |= {"dataset_name": tmp_path / "scored", "chat_template_kwargs": '{"enable_thinking": true}'}
    with pytest.raises(ContractError, match=r"Prompts are rendered otherwise than those of .*scored"):
        main(["critical-dpo", *words({**once, "weight_side": "none"})])


def test_messages_that_the_template_refuses_are_named(tiny_path, tmp_path):
    tiny_tokenizer(kind="no system role").save_pretrained(tmp_path / "tiny")
    AutoModelForCausalLM.from_pretrained(tiny_path).save_pretrained(tmp_path / "tiny")
    asked, answer = [{"role": "user", "content": "1"}], [{"role": "assistant", "content": "2"}]
    prompts = [asked, [{"role": "system", "content": "be brief"}, *asked]]
    (tmp_path / "rows").mkdir()
    rows = [{"prompt": prompt, "completion": answer} for prompt in prompts]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    names = {"model_name_or_path": tmp_path / "tiny", "dataset_name": tmp_path / "rows", "output_dir": tmp_path / "o"}
    with pytest.raises(ContractError, match="Row 1: the chat template has no place for a system message"):
        main(["sft", *words({key: value for key, value in {**SHORT, **names}.items() if key != "beta"})])


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, "Row 1: `tools` is not JSON"),
        ({"chosen": None}, "Row 1: `chosen` is missing; write it, or drop the row"),
        ({"chat_template_kwargs": {"tokenize": True}}, "Row 1: `chat_template_kwargs` cannot set `tokenize`"),
        ({"chat_template_kwargs": {}}, None),  # the other row has none of its own
    ],
)
def test_a_row_that_trl_cannot_read_is_named(tmp_path, change, message):
    path = str(tmp_path / "tiny")
    tokenizer = tiny_tokenizer(string.printable, kind="tools")
    tokenizer.save_pretrained(path)
    tiny_model(len(tokenizer)).save_pretrained(path)
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "1"}], **sides}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, {**row, **change})))
    names = {"model_name_or_path": path, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"}
    options = words({**SHORT, **names, "max_steps": 1})
    if message is None:
        assert main(["dpo", *options]).state.global_step == 1
        return
    with pytest.raises(ContractError, match=message):
        main(["dpo", *options])


def test_one_file_and_an_evaluation_need_the_rows_to_evaluate_on(tiny_path, tmp_path):
    Dataset.from_list(preference_rows(tiny_path, 4)).to_json(tmp_path / "rows.jsonl")
    names = {"model_name_or_path": tiny_path, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"}
    with pytest.raises(OptionError, match=r"one split, which is trained on.* --eval_dataset_name"):
        main(["dpo", *words({**SHORT, **names, "eval_strategy": "steps", "eval_steps": 3})])


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list([{"prompt": "1", "chosen": "2", "rejected": "3"}]).to_json(tmp_path / "rows.jsonl")
    names = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "rows.jsonl"}
    sizes = f"has {len(tokenizer)} ids, .* embedding has {len(tokenizer) - 2} rows"
    with pytest.raises(ContractError, match=sizes):
        main(["dpo", *words({**SHORT, **names, "output_dir": tmp_path / "out"})])


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
