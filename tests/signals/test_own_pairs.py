"""Own pairs in one command: text in, the ids that TRL's `DPOTrainer` makes of it, a signal, training on the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.signals.support import save_adapter
from tests.support import save_tiny
from tests.trainers.preferences import settings
from tokalign.cli.main import main
from tokalign.data.text_pairs import IDS, tokenize_pairs
from tokalign.signals.registry import get
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(form: str) -> list[dict]:
    """Six pairs in a form that TRL documents for preferences; "mixed" is how some hub datasets are written."""
    rows = []
    for i in range(6):
        prompt, chosen, rejected = f"What is {i}+1? ", f"It is {i + 1}.", f"Perhaps {i + 2}, or so."
        if form == "text":
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        elif form == "implicit text":
            row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        elif form == "messages":
            row = {"chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}
            row["prompt"] = said("system", "Be brief.") + said("user", prompt)
        else:
            answers = {"chosen": chosen, "rejected": rejected}
            row = {side: said("user", prompt) + said("assistant", text) for side, text in answers.items()}
            row |= {"prompt": prompt} if form == "mixed" else {}
        rows.append(row | {"answer": str(i + 1)})
    return rows


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def score(what: str, *options: object) -> None:
    main(["score", what, *map(str, options)])


@pytest.mark.parametrize("form", ["text", "implicit text", "messages", "implicit messages", "mixed"])
def test_ids_are_those_of_the_stock_trainer(form, tiny_path, tmp_path):
    rows = pairs(form)
    source = write(tmp_path / "pairs.jsonl", rows)
    score("likelihood", "--model", tiny_path, "--dataset", source, "--output_dir", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    scored = load_stage(tmp_path / "out", stage="preferences", tokenizer=tokenizer)
    check_preferences(scored, tokenizer, signals=[get("logprob")])
    assert scored["id"][:] == [str(i) for i in range(6)] and scored["answer"][:] == [row["answer"] for row in rows]

    if form == "mixed":  # which the stock trainer does not read
        rows = [{side: row[side] for side in ("chosen", "rejected")} for row in rows]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_path),
        args=DPOConfig(**settings(tmp_path / "dpo")),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
    )
    for name in IDS:
        assert scored[name][:] == trainer.train_dataset[name][:]
    # the texts are the user's own, without the end token that training adds
    last = scored[0]["rejected"]
    assert (last if isinstance(last, str) else last[-1]["content"]).strip() == "Perhaps 2, or so."


@pytest.mark.parametrize("form", ["text", "messages"])
def test_scored_pairs_train_critical_token_dpo(form, tiny_path, tmp_path):
    adapters = [
        part
        for seed, name in enumerate(("positive", "negative"))
        for part in (f"--{name}", save_adapter(tmp_path / name, tiny_path, seed=seed))
    ]
    source = write(tmp_path / "pairs.jsonl", pairs(form))
    score("contrast", "--model", tiny_path, *adapters, "--dataset", source, "--output_dir", tmp_path / "scored")
    trainer = CriticalTokenDPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_path),
        args=CriticalTokenDPOConfig(**settings(tmp_path / "dpo", max_steps=2)),
        train_dataset=load_stage(tmp_path / "scored"),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_a_folder_of_parquet_goes_in_and_is_scored_once(tiny_path, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    Dataset.from_list(pairs("messages")).to_parquet(tmp_path / "mine" / "train.parquet")
    options = ("--model", tiny_path, "--dataset", tmp_path / "mine", "--output_dir", tmp_path / "out")
    score("token-reward", *options)
    score("token-reward", *options)
    assert "already finished" in capsys.readouterr().err
    assert len(load_stage(tmp_path / "out", signals=[get("token_reward")])) == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"chosen": "b", "rejected": "c"}, {"chosen": None, "rejected": "c"}], "Row 1 of .*`chosen` is missing"),
        ([{"prompt": "a", "chosen": [], "rejected": said("assistant", "c")}], "Row 0 of .*`chosen` is missing"),
        ([{"question": "a", "answer": "b"}], r"neither pairs as text .*it has question, answer.*rename its columns"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_ids": [1]}], "has no column `prompt_ids`"),
    ],
)
def test_what_is_no_pair_is_named(rows, message, tiny_path, tmp_path):
    source = write(tmp_path / "odd.jsonl", rows)
    with pytest.raises(ContractError, match=message) as error:
        score("likelihood", "--model", tiny_path, "--dataset", source, "--output_dir", tmp_path / "out")
    assert str(error.value).count("\n") == 0


def test_messages_need_a_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "tiny"))
    tokenizer.chat_template = None
    with pytest.raises(ContractError, match="has no chat template; give texts"):
        tokenize_pairs(Dataset.from_list(pairs("messages")), tokenizer, "mine")
