"""Opening rows: a split that is not there is refused, and every other one is what `datasets` makes of it."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.support import ALPHABET, tiny_tokenizer
from tokalign.data.problems import open_source
from tokalign.signals.job import PairsArguments, load_pairs
from tokalign.stage import contract
from tokalign.stage.contract import first_repeated
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import folder_of, load_stage, open_rows
from tokalign.stage.manifest import manifest_of, write_manifest


def write(file, ids) -> None:
    rows = Dataset.from_dict({"id": ids, "prompt": ["1+1"] * len(ids), "answer": ["2"] * len(ids)})
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(file) if file.suffix == ".parquet" else rows.to_json(file)


LAYOUTS = {
    "sharded": ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    "plain": ("train.parquet", "test.parquet"),
    "json": ("train.jsonl", "test.jsonl"),
    "folders": ("train/a.parquet", "test/b.parquet"),
    "hub": ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
}


@pytest.mark.parametrize("split", ["train", "test", "train[:10%]", "train[-2:]", "train+test", "test+train[50%:]"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_is_the_one_of_datasets(tmp_path, layout, split):
    train, test = LAYOUTS[layout]
    folder = tmp_path / "rows"
    write(folder / train, [f"a{i}" for i in range(20)])
    write(folder / test, ["T", "U"])
    expected = load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
    assert load_stage(folder, split=split).to_list() == expected.to_list()


@pytest.mark.parametrize("split", ["validation", "train_prefs", "tset", "train+dev", "train[:"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_absent_split_is_never_another_one(tmp_path, layout, split):
    for file in LAYOUTS[layout]:
        write(tmp_path / file, ["a"])
    with pytest.raises(ContractError, match=r"has no split .* \(it has train, test\)"):
        load_stage(tmp_path, split=split)
    with pytest.raises(ContractError, match=r"has no split"):
        load_pairs(PairsArguments(dataset=str(tmp_path), split=split, output_dir="unused"), tiny_tokenizer())


def test_files_whose_names_say_no_split_are_train(tmp_path):
    write(tmp_path / "one.parquet", ["a"])
    write(tmp_path / "two.parquet", ["b"])
    assert load_stage(tmp_path)["id"][:] == ["a", "b"]
    with pytest.raises(ContractError, match=r"no split 'test' \(it has train\)"):
        load_stage(tmp_path, split="test")


def test_files_of_two_formats_are_not_half_read(tmp_path):
    write(tmp_path / "train.jsonl", ["a"])
    write(tmp_path / "test.parquet", ["T"])
    for split in ("train", "test"):
        with pytest.raises(ContractError, match="cannot be read as one dataset"):
            load_stage(tmp_path, split=split)
    with pytest.raises(ContractError, match=r"\.jsonl and \.parquet"):
        open_source(str(tmp_path))
    assert load_stage(tmp_path / "train.jsonl")["id"][:] == ["a"]


def test_stages_of_a_folder_are_its_splits(tmp_path):
    for name, ids in (("train", ["a", "b"]), ("calibration", ["c"]), ("my-own", ["d"])):
        rows = Dataset.from_dict({"id": ids})
        run_job(lambda batch: batch, rows, tmp_path / name, name=name, parameters={}, tokenizer=tiny_tokenizer())
    assert load_stage(tmp_path, split="train[1:]+calibration")["id"][:] == ["b", "c"]
    assert load_stage(tmp_path, split="my-own")["id"][:] == load_stage(tmp_path / "my-own")["id"][:] == ["d"]
    assert load_stage(tmp_path / "calibration", split="calibration")["id"][:] == ["c"]
    assert load_stage(tmp_path / "train", split="train[:1]")["id"][:] == ["a"]
    both = manifest_of(load_stage(tmp_path, split="train+calibration")) or {}
    assert "tokenizer_hash" in both and "rows" not in both and "name" not in both
    assert folder_of(tmp_path, "train[:1]") == folder_of(tmp_path / "train") == tmp_path / "train"
    with pytest.raises(ContractError, match="of several stages"):
        folder_of(tmp_path, "train+calibration")
    for folder, split in ((tmp_path, "test"), (tmp_path / "train", "test"), (tmp_path / "train", "train+test")):
        with pytest.raises(ContractError, match=r"has no split"):
            load_stage(folder, split=split)
    other = Dataset.from_dict({"id": ["e"]})
    tokenizer = tiny_tokenizer(ALPHABET[::-1])
    run_job(lambda batch: batch, other, tmp_path / "other", name="other", parameters={}, tokenizer=tokenizer)
    with pytest.raises(ContractError, match=r"different tokenizers"):
        load_stage(tmp_path, split="train+other")


def test_stages_beside_each_other_are_not_read_as_one_dataset(tmp_path):
    """`tokalign pairs` writes pairs, positive and negative into one folder; none of them is its "train"."""
    for name in ("pairs", "positive"):
        run_job(lambda batch: batch, Dataset.from_dict({"id": ["a"]}), tmp_path / name, name=name, parameters={})
    with pytest.raises(ContractError, match=r"has no split 'train' \(it has pairs, positive\)"):
        load_stage(tmp_path)
    write_manifest(tmp_path / "pairs", {"status": "running", "name": "pairs", "shards": 1})
    with pytest.raises(ContractError, match="is unfinished"):
        load_stage(tmp_path, split="pairs")


def test_a_file_is_a_source_with_slices(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        write(tmp_path / name, [f"a{i}" for i in range(10)])
        assert load_stage(tmp_path / name, split="train[:20%]", stage="problems")["id"][:] == ["a0", "a1"]


def test_a_stream_reads_when_it_is_asked(tmp_path):
    write(tmp_path / "plain" / "train.parquet", ["a", "b"])
    run_job(lambda batch: batch, Dataset.from_dict({"id": ["c"]}), tmp_path / "stage", name="s", parameters={})
    plain, stage = open_rows(tmp_path / "plain", streaming=True), open_rows(tmp_path / "stage", streaming=True)
    assert isinstance(plain, IterableDataset) and [row["id"] for row in plain] == ["a", "b"]
    assert [row["id"] for row in stage] == ["c"] and (manifest_of(stage) or {})["name"] == "s"
    with pytest.raises(ContractError, match=r"one whole split"):
        open_rows(tmp_path / "plain", split="train[:1]", streaming=True)


def test_configurations_are_read(tmp_path):
    for name in ("easy", "hard"):
        write(tmp_path / name / "train.parquet", [name])
    configs = [{"config_name": name, "data_files": f"{name}/train.parquet"} for name in ("easy", "hard")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert [row["id"] for row in open_rows(tmp_path, config="hard")] == ["hard"]
    with pytest.raises(ContractError, match=r"'easy', 'hard'"):
        open_rows(tmp_path)


# ------------------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize("at", [2, 1500])
def test_a_repeated_id_is_found_before_the_job(tmp_path, at):
    write(tmp_path / "rows.jsonl", [f"a{i if i != at else 1}" for i in range(at + 5)])
    with pytest.raises(
        ContractError, match=rf"^Row {at} of .*: `id` 'a1' occurs twice, first in row 1; give every row its own"
    ):
        load_stage(tmp_path / "rows.jsonl", stage="problems")


@pytest.mark.parametrize(("column", "value"), [("prompt", None), ("id", None), ("prompt", [])])
def test_what_cannot_be_asked_is_named(tmp_path, column, value):
    prompt = "1+1" if value is None else [{"role": "user", "content": "1+1"}]
    rows = [{"id": f"a{i}", "prompt": prompt, "answer": "2"} for i in range(4)]
    rows[2][column] = value
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ContractError, match=rf"^Row 2 of .*: `{column}` is missing"):
        load_stage(tmp_path / "rows.jsonl", stage="problems")


def test_looking_for_repeated_ids_holds_little(monkeypatch, tmp_path):
    """Digests find the candidates, values decide: values of equal digest are not taken for equal."""
    ids = [f"{i:0200d}" for i in range(20_000)]
    Dataset.from_dict({"id": ids}).to_parquet(tmp_path / "rows.parquet")
    rows = load_stage(tmp_path / "rows.parquet")
    tracemalloc.start()
    assert first_repeated(rows, "id") is None
    assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the ids are 4 MB of text
    tracemalloc.stop()
    monkeypatch.setattr(contract, "_digest", lambda value: len(str(value)))
    rows = Dataset.from_dict({"id": ["aa", "bb", None, None, "c", "bb"]})
    assert first_repeated(rows, "id") == (1, 5)
