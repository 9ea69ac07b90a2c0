"""The contract's checks: what is equal must hash equal, and every bad row is named with column and remedy."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import normalizers
from transformers import AutoTokenizer

from tests.support import ALPHABET, tiny_tokenizer
from tokalign.signals.registry import get
from tokalign.stage import hashes
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_json_atomically
from tokalign.stage.hashes import (
    added_tokens,
    allowance,
    content_hash,
    model_identity,
    other_tokenizer,
    tokenizer_hash,
    weights_hash,
)
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of, read_manifest, write_manifest


def preferences(tokenizer, count: int = 5) -> list[dict]:
    rows = []
    for k in range(count):
        chosen, rejected = tokenizer(f"yes {k}")["input_ids"] + [1], tokenizer(f"no {k}!")["input_ids"] + [1]
        rows.append(
            {
                "id": f"p{k}",
                "prompt": f"question {k}",
                "chosen": f"yes {k}",
                "rejected": f"no {k}!",
                "prompt_ids": tokenizer(f"question {k}")["input_ids"],
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "chosen_contrast": [0.5] * len(chosen),
                "rejected_contrast": [0.25] * len(rejected),
                "rejected_entropy": [2.5] * len(rejected),
            }
        )
    return rows


def test_tokenizer_hash_survives_saving_processes_and_what_trainers_change(tiny_path, tmp_path):
    tokenizer = tiny_tokenizer()
    own = tokenizer_hash(tokenizer)
    loaded = AutoTokenizer.from_pretrained(tiny_path)
    assert tokenizer_hash(loaded) == own
    loaded.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer; from tokalign.stage.hashes import tokenizer_hash; "
        "print(tokenizer_hash(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == own
    loaded.pad_token = loaded.eos_token
    loaded(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(loaded) == own


def test_tokenizer_hash_differs_where_ids_differ():
    own = tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(tiny_tokenizer(ALPHABET[1:] + ALPHABET[0])) != own
    lowered = tiny_tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_hash(lowered) != own


def added(*tokens: str, **special: str):
    """The tiny tokenizer with tokens, and perhaps other special ones, that were added later."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.add_special_tokens(special)
    return tokenizer


def test_what_changes_no_id_makes_no_other_tokenizer():
    """A padding token that a trainer adds, `eos_token` of `SFTConfig`, a chat template."""
    made_with = {"tokenizer_hash": tokenizer_hash(tiny_tokenizer()), "added_tokens": added_tokens(tiny_tokenizer())}
    later = [added("<|new|>"), added(pad_token="<|padding|>"), added(eos_token="<|user|>"), added()]
    later[-1].chat_template = "another"
    for tokenizer in later:
        assert other_tokenizer(made_with, tokenizer) is None
        theirs = {"tokenizer_hash": tokenizer_hash(tokenizer), "added_tokens": added_tokens(tokenizer)}
        assert other_tokenizer(theirs, tiny_tokenizer()) is None  # an id that is not here is found in the row
    two = {"tokenizer_hash": tokenizer_hash(added("<|a|>", "<|b|>")), "added_tokens": {"89": "<|a|>", "90": "<|b|>"}}
    assert added_tokens(added("<|a|>", "<|b|>")) == two["added_tokens"]
    reason = other_tokenizer(two, added("<|a|>", "<|c|>"))
    assert reason == "id 90 is '<|b|>' there and '<|c|>' here"


def test_a_manifest_of_an_earlier_version_names_its_tokenizer_still(tmp_path):
    """Its hash held added and special tokens and the template too (written out here as it was)."""
    tokenizer = tiny_tokenizer()
    serialised = json.loads(tokenizer.backend_tokenizer.to_str())
    former = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": [[i, str(t.content), bool(t.special)] for i, t in sorted(tokenizer.added_tokens_decoder.items())],
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
        "chat_template": tokenizer.chat_template,
        "merges": serialised["model"].get("merges"),
        "pipeline": [serialised.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")],
    }
    hashed = hashlib.sha256(json.dumps(former, sort_keys=True).encode()).hexdigest()
    assert other_tokenizer({"tokenizer_hash": hashed}, tokenizer) is None
    assert other_tokenizer({"tokenizer_hash": hashed}, tiny_tokenizer(ALPHABET[::-1])) is not None

    # A job that such a version began goes on, and what it finished is finished
    rows = Dataset.from_list([{"id": f"r{k}"} for k in range(4)])
    job = dict(name="job", parameters={}, tokenizer=tokenizer, shard_size=2)
    with pytest.MonkeyPatch.context() as before:
        before.setattr("tokalign.stage.jobs.tokenizer_hash", lambda tokenizer: hashed)
        run_job(lambda batch: batch, rows, tmp_path, **job)
    (tmp_path / "part-00001-of-00002.parquet").unlink()
    calls = []
    run_job(lambda batch: calls.append(len(batch)) or batch, rows, tmp_path, **job)
    assert calls == [2] and read_manifest(tmp_path)["tokenizer_hash"] == hashed
    load_stage(tmp_path, tokenizer=tokenizer)


def test_ids_of_another_tokenizer_can_be_allowed_and_what_is_made_of_them_says_so(tmp_path, caplog):
    Dataset.from_list(preferences(tiny_tokenizer())).to_parquet(tmp_path / "train.parquet")
    write_manifest(tmp_path, {"name": "pairs", "status": "complete", "tokenizer_hash": "0" * 64})
    with pytest.raises(ContractError, match="or set `allow_other_tokenizer` if they mean the same"):
        load_stage(tmp_path, tokenizer=tiny_tokenizer())
    rows = load_stage(tmp_path, tokenizer=tiny_tokenizer(), allow_other_tokenizer=True)
    assert "made with another tokenizer (hash 000000000000" in caplog.text
    extra = allowance(True)
    run_job(lambda batch: batch, rows, tmp_path / "scored", name="scored", parameters={}, extra_manifest=extra)
    again = load_stage(tmp_path / "scored")
    manifest = run_job(lambda batch: batch, again, tmp_path / "again", name="again", parameters={})
    assert manifest["allow_other_tokenizer"] is True and allowance(False) == {}


def test_weights_hash_is_of_the_content(tiny_path, tmp_path):
    from safetensors.torch import save_file
    from torch import tensor

    copies = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, value in zip(copies, (1.0, 1.0, 2.0), strict=True):
        folder.mkdir()
        save_file({"w": tensor([value])}, folder / "adapter_model.safetensors")
    assert weights_hash(copies[0]) == weights_hash(copies[1]) != weights_hash(copies[2])
    before = weights_hash(copies[0])
    save_file({"w": tensor([3.0])}, copies[0] / "adapter_model.safetensors")  # the process's cache must notice
    assert weights_hash(copies[0]) != before
    assert weights_hash("some/model-on-the-hub") == "some/model-on-the-hub"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContractError, match=r"no \*.safetensors"):
        weights_hash(tmp_path / "empty")
    with pytest.raises(ContractError, match=r"does not exist"):
        weights_hash(tmp_path / "nowhere")
    with pytest.raises(ContractError, match=r"is a file; give the folder"):
        weights_hash(copies[0] / "adapter_model.safetensors")


def test_model_identity_is_the_hash_or_a_servers_name_in_the_main_process_alone(tiny_path, monkeypatch):
    assert model_identity(tiny_path) == model_identity(tiny_path, remote=True) == weights_hash(tiny_path)
    assert model_identity("served-name/of/three-parts", remote=True) == "served-name/of/three-parts"
    assert model_identity(None) is None
    with pytest.raises(ContractError, match="does not exist"):
        model_identity("served-name/of/three-parts")
    monkeypatch.setattr(hashes, "process_state", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(hashes, "weights_hash", None)  # other processes read no weights
    assert model_identity(tiny_path) is None


def test_content_hash_is_of_the_values_and_not_of_their_storage(tmp_path):
    rows = [{"id": f"r{k}", "x": None if k % 3 else k, "l": [k] * (k % 4)} for k in range(2500)]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "train.parquet")
    stored = load_stage(tmp_path)
    shuffled = dataset.select(range(2499, -1, -1)).select(range(2499, -1, -1))  # an indices mapping, same order
    assert content_hash(dataset) == content_hash(stored) == content_hash(shuffled)
    changed = copy.deepcopy(rows)
    changed[2001]["l"][0] += 1
    assert content_hash(Dataset.from_list(changed)) != content_hash(dataset)
    assert content_hash(dataset.select(range(2499, -1, -1))) != content_hash(dataset)


def test_load_stage_reads_the_manifest_and_compares_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    Dataset.from_list(preferences(tokenizer)).to_parquet(tmp_path / "train.parquet")
    manifest = {"name": "pairs", "status": "complete", "tokenizer_hash": tokenizer_hash(tokenizer), "rows": 5}
    write_manifest(tmp_path, manifest)
    dataset = load_stage(tmp_path, stage="preferences", tokenizer=tokenizer, signals=["contrast"])
    assert manifest_of(dataset) == manifest == read_manifest(tmp_path)
    assert manifest_of(dataset.map(lambda row: {"new": 1}).filter(lambda row: True)) == manifest
    assert dataset.cache_files, "rows must stay on disk"
    other = tiny_tokenizer(ALPHABET[::-1])
    with pytest.raises(ContractError, match=r"made with another tokenizer.*rerun the stage"):
        load_stage(tmp_path, tokenizer=other)
    with pytest.raises(ContractError, match=r"no column `answer`.*'rollouts'.*tokalign sample"):
        load_stage(tmp_path, stage="rollouts")
    with pytest.raises(ContractError, match=r"neither `chosen_token_reward` nor `rejected_token_reward`"):
        load_stage(tmp_path, signals=["token_reward"])
    write_manifest(tmp_path, manifest | {"status": "running"})
    with pytest.raises(ContractError, match=r"is unfinished, rerun the job that writes it"):
        load_stage(tmp_path)
    write_manifest(tmp_path, manifest | {"shards": 2})
    with pytest.raises(ContractError, match=r"lacks shard part-00000-of-00002.parquet"):
        load_stage(tmp_path)


def test_load_stage_without_a_manifest_and_by_split(tmp_path):
    Dataset.from_list([{"id": "a", "prompt": "p", "answer": "1"}]).to_parquet(tmp_path / "train-00000.parquet")
    Dataset.from_list([{"id": "b", "prompt": "p", "answer": "1"}]).to_parquet(tmp_path / "test-00000.parquet")
    assert load_stage(tmp_path, stage="problems")["id"][0] == "a"
    dataset = load_stage(tmp_path, split="test", stage="problems")
    assert list(dataset["id"]) == ["b"] and manifest_of(dataset) is None
    with pytest.raises(ContractError, match=r"does not exist; run `tokalign pairs` first"):
        load_stage(tmp_path / "nowhere", stage="preferences")
    with pytest.raises(ContractError, match=r"neither a folder here nor a dataset on the hub"):
        load_stage("nobody/nothing", stage="problems")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContractError, match=r"holds no files of rows"):
        load_stage(tmp_path / "empty")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ContractError, match=r"is not JSON"):
        load_stage(tmp_path)


def test_good_preferences_pass():
    tokenizer = tiny_tokenizer()
    check_preferences(Dataset.from_list(preferences(tokenizer)), tokenizer, signals=["contrast"])
    check_preferences(Dataset.from_list(preferences(tokenizer)), signals=["entropy"], sides=["rejected"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rejected_ids", [], "`rejected_ids` is empty; drop the row"),
        ("chosen_ids", None, "`chosen_ids` is missing"),
        ("prompt_ids", [7, 10_000], "`prompt_ids` holds id 10000, but the tokenizer has"),
        ("prompt_ids", [7, -1], "`prompt_ids` holds -1"),
        ("rejected_contrast", [0.5], "has 1 scores for 6 ids in `rejected_ids`; score these rows again"),
        ("rejected_contrast", None, "`rejected_contrast` is missing"),
        ("rejected_contrast", [0.5, float("nan")] + [0.5] * 4, "holds nan, not a finite number"),
        ("rejected_contrast", [0.5, None] + [0.5] * 4, "holds nan, not a finite number"),
        ("rejected_contrast", [0.5, float("inf")] + [0.5] * 4, "holds inf, not a finite number"),
        ("chosen_contrast", [0.5, 1.5] + [0.5] * 4, r"holds 1.5, but this signal lies in \[0, 1\]"),
        ("chosen", "yes 9", "`chosen` is not what this tokenizer reads in `chosen_ids`; use the tokenizer"),
    ],
)
@pytest.mark.parametrize("at", [3, 1203])
def test_a_bad_row_is_named(column, value, message, at):
    tokenizer = tiny_tokenizer()
    rows = (preferences(tokenizer) * (at // 5 + 1))[: at + 2]
    rows[at] = {**rows[at], "id": "bad", column: value}
    with pytest.raises(ContractError, match=rf"^Row {at} \(id 'bad'\): .*{message}"):
        check_preferences(Dataset.from_list(rows), tokenizer, signals=[get("contrast")], text_rows=at + 1)


def test_a_missing_column_is_named():
    dataset = Dataset.from_list(preferences(tiny_tokenizer()))
    with pytest.raises(ContractError, match=r"no column `chosen_ids`.*tokalign pairs"):
        check_preferences(dataset.remove_columns("chosen_ids"))
    with pytest.raises(ContractError, match=r"no column `rejected_contrast`; score it with tokalign score contrast"):
        check_preferences(dataset.remove_columns("rejected_contrast"), signals=[get("contrast")])


def test_manifest_is_json_for_people(tmp_path):
    write_manifest(tmp_path, {"name": "größer", "rows": 1})
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == {"name": "größer", "rows": 1}
    assert not list(tmp_path.glob(".*"))


def test_a_stage_is_not_read_as_a_split_that_it_does_not_have(tmp_path):
    """Evaluating on `test` must never fall back to the rows that trained the model."""
    rows = Dataset.from_list([{"id": "a", "prompt": "1+1", "answer": "2"}])
    for name in ("stage", "test"):
        run_job(lambda batch: batch, rows, tmp_path / name, name="problems", parameters={})
    with pytest.raises(ContractError, match="has no split 'test'"):
        load_stage(tmp_path / "stage", split="test")
    assert len(load_stage(tmp_path / "stage")) == len(load_stage(tmp_path / "test", split="test")) == 1
    assert len(load_stage(tmp_path, split="test")) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "figures.json"
    write_json_atomically(file, {"Name": "Zoë", "ci95": [0.25, None]})
    text = file.read_text(encoding="utf-8")
    assert json.loads(text) == {"Name": "Zoë", "ci95": [0.25, None]} and "Zoë" in text and text.endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(file, {"accuracy": float("nan")})
    assert file.read_text(encoding="utf-8") == text and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.parquet"])
def test_one_file_is_one_split(tmp_path, name):
    rows = Dataset.from_list([{"id": str(i), "prompt": "1+1", "answer": "2"} for i in range(3)])
    file = tmp_path / name
    rows.to_parquet(file) if file.suffix == ".parquet" else rows.to_json(file)
    assert load_stage(file, stage="problems").to_list() == rows.to_list()
    with pytest.raises(ContractError, match="has no split 'test'"):
        load_stage(file, split="test")
    file.write_text("{not rows")
    with pytest.raises(ContractError, match="cannot be read as rows"):
        load_stage(file)
    other = tmp_path / "pairs.docx"
    other.write_text("x")
    with pytest.raises(ContractError, match="is not a file of rows"):
        load_stage(other)


def test_text_around_an_answer_in_messages_is_the_templates(tmp_path):
    """Where no manifest names the tokenizer, the answer must stand in what the ids read as."""
    tokenizer = tiny_tokenizer()
    rows = preferences(tokenizer)
    for row in rows:
        row["chosen"] = [{"role": "assistant", "content": row["chosen"]}]
        row["chosen_ids"] = [*row["chosen_ids"], *tokenizer("\n")["input_ids"]]
        del row["chosen_contrast"]
    check_preferences(Dataset.from_list(rows), tokenizer)
    rows[1]["chosen"] = [{"role": "assistant", "content": "something else"}]
    with pytest.raises(ContractError, match=r"Row 1 .*`chosen` is not what this tokenizer reads"):
        check_preferences(Dataset.from_list(rows), tokenizer)
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    made_with = {"tokenizer_hash": tokenizer_hash(tokenizer), "added_tokens": {}}
    write_manifest(tmp_path, {"name": "pairs", "status": "complete", **made_with})
    check_preferences(load_stage(tmp_path), tokenizer)  # the manifest says whose ids these are


def test_a_text_that_was_edited_is_not_what_its_ids_say(tmp_path):
    """`DPOTrainer` would train on the new text, ours on the old ids: nobody is left to believe the first."""
    tokenizer = tiny_tokenizer()
    Dataset.from_list(preferences(tokenizer)).to_parquet(tmp_path / "train.parquet")
    made_with = {"tokenizer_hash": tokenizer_hash(tokenizer), "added_tokens": {}}
    write_manifest(tmp_path, {"name": "pairs", "status": "complete", **made_with})
    edited = load_stage(tmp_path).map(lambda row: {"chosen": row["chosen"] + ", thanks"})
    with pytest.raises(ContractError, match=r"Row 0 .*`chosen` is not what .* leave the columns of ids out"):
        check_preferences(edited, tokenizer)


def test_rows_need_no_id_and_no_text():
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list(preferences(tokenizer)).remove_columns("id")
    check_preferences(rows, tokenizer, signals=["contrast"])
    check_preferences(rows.remove_columns(["prompt", "chosen", "rejected"]), tokenizer)
    broken = rows.to_list()
    broken[3]["chosen_ids"] = []
    with pytest.raises(ContractError, match=r"^Row 3: `chosen_ids` is empty"):
        check_preferences(Dataset.from_list(broken), tokenizer)
    with pytest.raises(ContractError, match=r"^Row 0: `chosen` is not what this tokenizer reads"):
        check_preferences(rows, tiny_tokenizer(ALPHABET[::-1]))


def test_rows_of_two_tokenizers_are_found_wherever_they_meet():
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(ALPHABET[::-1])
    rows = preferences(tokenizer, 400) + preferences(other, 100)
    with pytest.raises(ContractError, match=r"^Row 4\d\d .*not what this tokenizer reads"):
        check_preferences(Dataset.from_list(rows), tokenizer)


def test_an_end_that_ends_nothing_here_is_another_tokenizers():
    """Two tokenizers of one vocabulary whose special tokens differ read the same text, but not the same end."""
    tokenizer = tiny_tokenizer()
    rows = preferences(tokenizer)
    for row in rows:
        row["rejected_ids"][-1] = 2
    with pytest.raises(ContractError, match=r"`rejected_ids` ends with id 2, which is '<\|user\|>' here and ends no"):
        check_preferences(Dataset.from_list(rows), tokenizer)
    check_preferences(Dataset.from_list(rows), tokenizer, text_rows=0)
    tokenizer.chat_template += "{{ '<|user|>' }}"  # this one does end with it
    check_preferences(Dataset.from_list(rows), tokenizer)


def test_texts_that_the_tokenizer_does_not_keep_whole_are_read_as_it_keeps_them():
    """A tokenizer that lowers capitals; TRL's rows, whose end token is text too; a prompt's end that joined."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    row = {"prompt": "Who?", "chosen": "ME", "rejected": "You<|end|>"}
    row |= {f"{name}_ids": tokenizer(text)["input_ids"] for name, text in row.items()}
    row["prompt_ids"], row["chosen_ids"] = row["prompt_ids"][:-1], [row["prompt_ids"][-1], *row["chosen_ids"], 1]
    check_preferences(Dataset.from_list([row]), tokenizer)
    row["chosen"] = "He"
    with pytest.raises(ContractError, match="`chosen` is not what"):
        check_preferences(Dataset.from_list([row]), tokenizer)


@pytest.mark.parametrize("bad", [1, 5])
@pytest.mark.parametrize("identity", [500, 90])
def test_an_id_of_no_token_is_an_accident_in_one_row_and_another_tokenizers_in_many(bad, identity):
    """90 lies in a hole between the vocabulary and a token that was added behind it."""
    tokenizer = tiny_tokenizer()
    rows = preferences(tokenizer)
    for row in rows[-bad:]:
        row["rejected_ids"].append(identity)
        row["rejected_contrast"].append(0.5)
    vocabulary = tokenizer.get_vocab() | {"<|far|>": 91}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)
        with pytest.raises(
            ContractError, match=f"holds id {identity}, but the tokenizer has no token of that"
        ) as error:
            check_preferences(Dataset.from_list(rows), tokenizer)
    remedy = "drop the row" if bad == 1 else r"use the tokenizer that made these ids \(5 of 5 rows"
    assert re.search(remedy, str(error.value))
