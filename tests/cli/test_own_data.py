"""`tokalign own-data` uses the model that it is given, and invents none unless asked."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tokalign.cli import own_data, stages
from tokalign.cli.own_data import OwnDataArguments
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage


def commands(folder: Path, source: Path, monkeypatch, **options: object) -> list[str]:
    """The command lines of a run in which only the problems are built."""
    call = stages.call
    monkeypatch.setattr(stages, "call", lambda verb, words: call(verb, words) if verb == "data gsm8k" else None)
    own_data.main(OwnDataArguments(source=str(source), output_dir=str(folder), **options))
    return [stage["command"] for stage in json.loads((folder / "state.json").read_text()).values()]


@pytest.fixture
def source(tmp_path) -> Path:
    rows = [{"question": f"{i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "train.jsonl"


@pytest.fixture
def model(tiny_path, tmp_path) -> str:
    """A folder with a tokenizer that can be asked."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("options", [{}, {"model": "m", "stand_in": True}])
def test_one_model_must_be_named(options) -> None:
    with pytest.raises(ContractError, match=r"--model .* or --stand_in true"):
        OwnDataArguments(source="x", **options)


def test_every_stage_starts_from_the_given_model(source, model, tmp_path, monkeypatch) -> None:
    sizes = {"problems": 10, "warm_up": 20, "test_problems": 15, "rollouts": 3}
    lines = commands(tmp_path / "out", source, monkeypatch, model=model, **sizes)
    assert not (tmp_path / "out" / "stand_in").exists() and not any("from_scratch" in line for line in lines)
    warm = str(tmp_path / "out" / "base")
    starts = [words[words.index(option) + 1] for words, option in named(lines, "--model", "--model_name_or_path")]
    assert starts == [model] + [warm] * (len(starts) - 1)
    assert [line.split()[1] for line in lines].count("evaluate") == 2

    parts = {name: load_stage(tmp_path / "out" / name) for name in ("warm_up", "few", "held_out")}
    assert [len(part) for part in parts.values()] == [20, 10, 15]
    assert len({key for part in parts.values() for key in part["id"]}) == 45  # nobody is tested on what it has read
    assert (
        "####" in parts["few"][0]["prompt"][0]["content"] and "####" in parts["warm_up"][0]["completion"][0]["content"]
    )


def named(lines: list[str], *options: str) -> list[tuple[list[str], str]]:
    return [(words, option) for line in lines for option in options if option in (words := shlex.split(line))]


def test_without_a_warm_up_the_model_is_as_it_came(source, model, tmp_path, monkeypatch) -> None:
    lines = commands(tmp_path / "out", source, monkeypatch, model=model, warm_up=0, problems=10, test_problems=5)
    assert {words[words.index(o) + 1] for words, o in named(lines, "--model", "--model_name_or_path")} == {model}


def test_a_model_that_cannot_be_asked_is_refused_at_once(source, tiny_path, tmp_path, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base_model")
    with pytest.raises(ContractError, match="no chat template"):
        commands(tmp_path / "out", source, monkeypatch, model=str(tmp_path / "base_model"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ContractError, match="tokalign data model smollm2"):
        own_data.check_chat_template(str(tmp_path / "nothing"))
