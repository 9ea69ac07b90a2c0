"""`tokalign sample` and `tokalign pairs` on a tiny model: problems in; rollouts, pairs and SFT sets out."""

from __future__ import annotations

import shutil

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tokalign.cli import pairs as build_pairs
from tokalign.cli import sample as sample_rollouts
from tokalign.generation.arguments import EngineArguments, SamplingArguments, engine_identities
from tokalign.generation.protocol import Completion
from tokalign.prompts import render_prompt
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.hashes import tokenizer_hash, weights_hash
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest, stop_strings, write_manifest


class Scripted:
    """An engine that answers from a list of texts a problem, so that right and wrong are known."""

    def __init__(self, path: str, texts: list[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.texts = texts

    def generate(self, prompts, params, *, adapter=None):
        results = []
        for each in params:
            texts = [self.texts[(each.seed + i) % len(self.texts)] for i in range(each.n)]
            results.append([])
            for text in texts:
                ids = self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id]
                results[-1].append(Completion(ids, [-1.0] * len(ids), "stop"))
        return results

    def close(self) -> None:
        pass


def problems(folder, count: int = 10, prompt=lambda k: f"What is {k}+1?") -> str:
    rows = [{"id": f"p{k}", "prompt": prompt(k), "answer": "2", "level": k} for k in range(count)]
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder)


def sample(tmp_path, monkeypatch, tiny_path, texts, engine=None, **changes):
    make = engine or Scripted
    monkeypatch.setattr(sample_rollouts, "load_engine", lambda arguments: make(tiny_path, texts))
    where = tmp_path / "problems"
    arguments = sample_rollouts.SampleArguments(
        dataset=str(where) if where.exists() else problems(where), output_dir=str(tmp_path / "rollouts"), shard_size=4
    )
    sampling = SamplingArguments(**{"num_rollouts": 6, **changes})
    return sample_rollouts.main(arguments, sampling, EngineArguments(model=tiny_path))


def pair(tmp_path, **changes):
    values = {"dataset": str(tmp_path / "rollouts"), "output_dir": str(tmp_path / "out"), "shard_size": 3, **changes}
    return build_pairs.main(build_pairs.PairsArguments(**values))


TEXTS = ["1+1=2\n#### 2", "no\n#### 3", "no!\n#### 3", "so\n#### 4", "who knows"]


def test_from_problems_to_pairs_and_sft_sets(tmp_path, monkeypatch, tiny_path):
    manifest = sample(tmp_path, monkeypatch, tiny_path, TEXTS)
    assert manifest["rows"] == 60 and manifest["rows_in"] == 10 and manifest["seed"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rollouts = load_stage(tmp_path / "rollouts", stage="rollouts", tokenizer=tokenizer)
    for row in rollouts:
        assert row["correct"] == (row["completion"] == TEXTS[0])
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert tokenizer.decode(row["prompt_ids"]) == f"<|user|>{row['prompt']}<|end|><|assistant|>"
        assert row["level"] == int(row["id"][1:])  # columns of the problem stay
    assert [row["sample"] for row in rollouts][:7] == [0, 1, 2, 3, 4, 5, 0]

    manifests = pair(tmp_path)
    assert manifests["pairs"]["tokenizer_hash"] == tokenizer_hash(tokenizer)
    pairs = load_stage(tmp_path / "out" / "pairs", stage="preferences", tokenizer=tokenizer)
    check_preferences(pairs, tokenizer)
    assert manifests["pairs"]["rows"] == len(pairs) >= 10
    assert set(pairs["chosen"]) == {TEXTS[0]} and set(pairs["rejected_answer"]) <= {"3", "4"}
    assert len(load_stage(tmp_path / "out" / "positive", stage="sft")) == 10
    negative = load_stage(tmp_path / "out" / "negative", stage="sft")
    assert list(negative["completion_ids"]) == list(pairs["rejected_ids"])
    assert pair(tmp_path) == manifests  # nothing runs twice
    with pytest.raises(JobError, match=r"coverage was 0.5 and is 0.9"):
        pair(tmp_path, coverage=0.9)


def test_sft_rows_reach_the_trainer_as_they_are(tmp_path, monkeypatch, tiny_path):
    from trl import SFTConfig, SFTTrainer

    sample(tmp_path, monkeypatch, tiny_path, TEXTS)
    pair(tmp_path)
    rows = load_stage(tmp_path / "out" / "positive")
    config = SFTConfig(output_dir=str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = SFTTrainer(model=tiny_path, args=config, train_dataset=rows)
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        assert prepared["input_ids"] == row["prompt_ids"] + row["completion_ids"]
        assert prepared["labels"] == [-100] * len(row["prompt_ids"]) + row["completion_ids"]


def test_a_rollout_with_an_id_of_no_token_is_dropped_and_counted(tmp_path, monkeypatch, tiny_path):
    """vLLM draws from every row of the model's matrix, of which some only pad it."""

    class Padded(Scripted):
        def generate(self, prompts, params, *, adapter=None):
            results = super().generate(prompts, params)
            results[0][2].token_ids[1] = len(self.tokenizer) + 3
            for completion in results[1]:
                completion.token_ids[0] = 2**30
            return results

    manifest = sample(tmp_path, monkeypatch, tiny_path, TEXTS, Padded)
    reason = "a completion holds an id that the tokenizer does not know"
    assert manifest["dropped"] == {reason: 3} and manifest["left_out"] == {reason: 3 * 7}  # in each of three shards
    assert manifest["rows"] == 60 - 3 * 7
    rollouts = load_stage(tmp_path / "rollouts")
    assert rollouts["id"].count("p0") == 5 and "p1" not in rollouts["id"]


class StopsAtBlankLine(Scripted):
    """A base model: it ends an answer with a blank line, by which it is stopped, and never by an end token."""

    def generate(self, prompts, params, *, adapter=None):
        results = super().generate(prompts, params)
        for completion in (completion for completions in results for completion in completions):
            completion.token_ids[-1:] = self.tokenizer("\n\n")["input_ids"]
            completion.logprobs.append(-1.0)
        return results


@pytest.fixture
def base_path(tiny_path, tmp_path) -> str:
    """The tiny model without a chat template, as base models come."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_path, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("options", "ended"), [({}, True), ({"end_token": False}, False)])
def test_rows_that_a_stop_string_ended_get_the_models_end_token(tmp_path, monkeypatch, base_path, options, ended):
    """Or a model that is trained on them never learns to end its answers."""
    manifest = sample(tmp_path, monkeypatch, base_path, TEXTS, StopsAtBlankLine, stop=["\n\n"], prompt_format="raw")
    sampling = {"stop": ["\n\n"], "end_ids": [1], "end_token_id": 1, "base_model": True}
    assert manifest["sampling"] == sampling and stop_strings(manifest) == ["\n\n"]
    manifests = pair(tmp_path, **options)
    assert manifests["pairs"]["sampling"] == sampling
    assert manifests["pairs"]["parameters"].get("end_token_id") == (1 if ended else None)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    blank = tokenizer("\n\n")["input_ids"]
    pairs = load_stage(tmp_path / "out" / "pairs", tokenizer=tokenizer)
    check_preferences(pairs, tokenizer)
    positive = load_stage(tmp_path / "out" / "positive")
    for ids in [*pairs["chosen_ids"], *pairs["rejected_ids"], *positive["completion_ids"], *positive["input_ids"]]:
        assert ids[-3:] == [*blank, 1] if ended else ids[-2:] == blank
    assert all(sum(row["completion_mask"]) == len(row["completion_ids"]) for row in positive)


def test_end_tokens_where_the_manifest_does_not_say_them(tmp_path, monkeypatch, base_path):
    """Rollouts of an earlier version, and rows that ended by themselves."""
    sample(tmp_path, monkeypatch, base_path, TEXTS, StopsAtBlankLine, stop=["\n\n"], prompt_format="raw")
    manifest = read_manifest(tmp_path / "rollouts")
    del manifest["sampling"]
    write_manifest(tmp_path / "rollouts", manifest)
    assert stop_strings(manifest) == ["\n\n"]
    assert "end_token_id" not in pair(tmp_path)["pairs"]["parameters"]
    with pytest.raises(ContractError, match=r"does not say which id ends a completion .* give end_token_id"):
        pair(tmp_path, end_token=True, output_dir=str(tmp_path / "again"))
    pair(tmp_path, end_token_id=1, output_dir=str(tmp_path / "given"))
    assert {ids[-1] for ids in load_stage(tmp_path / "given" / "pairs")["chosen_ids"]} == {1}


def test_rows_that_end_by_themselves_stay_as_they_are(tmp_path, monkeypatch, base_path):
    sample(tmp_path, monkeypatch, base_path, TEXTS, stop=["\n\n"], prompt_format="raw")
    pair(tmp_path)
    rollouts = {tuple(ids) for ids in load_stage(tmp_path / "rollouts")["completion_ids"]}
    assert {tuple(ids) for ids in load_stage(tmp_path / "out" / "pairs")["chosen_ids"]} <= rollouts


def test_an_answer_behind_a_stop_string_is_not_read(tmp_path, monkeypatch, tiny_path):
    """Which the token that completes the string may hold."""
    sample(tmp_path, monkeypatch, tiny_path, ["#### 2\n\n#### 3"], stop=["\n\n"])
    rollouts = load_stage(tmp_path / "rollouts")
    assert set(rollouts["extracted"]) == {"2"} and all(rollouts["correct"])
    assert set(rollouts["completion"]) == {"#### 2\n\n#### 3"}  # the text is still what the ids say


def test_shards_do_not_change_rollouts_of_the_real_engine(tmp_path, tiny_path):
    where = problems(tmp_path / "problems", 5)
    results = []
    for shard_size in (5, 2):
        folder = tmp_path / f"by{shard_size}"
        arguments = sample_rollouts.SampleArguments(dataset=where, output_dir=str(folder), shard_size=shard_size)
        sampling = SamplingArguments(num_rollouts=2, max_tokens=8)
        sample_rollouts.main(arguments, sampling, EngineArguments(model=tiny_path))
        results.append(load_stage(folder, stage="rollouts").remove_columns("logprobs").to_list())
    assert results[0] == results[1] and len(results[0]) == 10
    assert len({tuple(row["completion_ids"]) for row in results[0]}) > 5


def test_other_weights_are_refused_on_resume(tmp_path, monkeypatch, tiny_path):
    from tests.support import save_tiny

    sample(tmp_path, monkeypatch, tiny_path, TEXTS)
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(JobError, match=r"weights was .* and is "):
        sample(tmp_path, monkeypatch, other, TEXTS)
    with pytest.raises(JobError, match=r"temperature was 1.0 and is 0.7"):
        sample(tmp_path, monkeypatch, tiny_path, TEXTS, temperature=0.7)


def test_what_a_manifest_says_of_an_engines_model(tiny_path):
    weights = weights_hash(tiny_path)
    for arguments, expected in (
        ({"model": tiny_path}, (weights, None)),
        ({"model": tiny_path, "adapter": tiny_path, "served_model": "unused"}, (weights, weights)),
        ({"model": tiny_path, "engine": "openai", "adapter": "positive"}, (weights, "positive")),
        ({"model": tiny_path, "engine": "openai", "served_model": "base"}, ("base", None)),
        ({"model": "hub/name", "engine": "openai"}, ("hub/name", None)),
    ):
        assert tuple(engine_identities(EngineArguments(**arguments)).values()) == expected


def test_long_prompts_are_dropped_and_counted(tmp_path, monkeypatch, tiny_path, capsys):
    problems(tmp_path / "problems", 9, lambda k: "x" * (100 if k in (2, 4, 5, 6, 7) else 3))
    manifest = sample(tmp_path, monkeypatch, tiny_path, TEXTS, max_prompt_length=20)
    assert manifest["dropped"] == {"prompt longer than max_prompt_length": 5} and manifest["rows"] == 24
    assert "dropped: prompt longer than max_prompt_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "p0"}, "Row 3 of .*: `id` 'p0' occurs twice, first in row 0"),
        ({"prompt": None}, "Row 3 of .*: `prompt`"),
    ],
)
def test_what_cannot_be_sampled_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, tiny_path, change, message):
    rows = [{"id": f"p{k}", "prompt": f"{k}+1", "answer": "2"} for k in range(5)]
    Dataset.from_list([row | change if k == 3 else row for k, row in enumerate(rows)]).to_json(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sample_rollouts, "load_engine", None)
    arguments = sample_rollouts.SampleArguments(dataset=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "out"))
    with pytest.raises(ContractError, match=message):
        sample_rollouts.main(arguments, SamplingArguments(), EngineArguments(model=tiny_path))
    assert not (tmp_path / "out").exists()


def test_prompt_formats(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = tokenizer.decode(render_prompt(messages, tokenizer, "chat"))
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"
    assert tokenizer.decode(render_prompt("u", tokenizer, "raw")) == "u"
    with pytest.raises(ContractError, match=r"`prompt` holds messages"):
        render_prompt(messages, tokenizer, "raw")
    tokenizer.chat_template = None
    with pytest.raises(ContractError, match="no chat template: use prompt_format `raw`"):
        render_prompt("u", tokenizer, "chat")


@pytest.mark.parametrize(
    ("texts", "message"),
    [(TEXTS[:1], "every rollout is correct"), (TEXTS[1:4], "no rollout is correct")],
)
def test_nothing_to_pair(tmp_path, monkeypatch, tiny_path, texts, message):
    sample(tmp_path, monkeypatch, tiny_path, texts)
    with pytest.raises(ContractError, match=f"Nothing is left of 10 problems for build_pairs: pairs: {message}"):
        pair(tmp_path)
    assert read_manifest(tmp_path / "out" / "pairs")["dropped"]
