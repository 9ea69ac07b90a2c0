"""What the reference's cache and the readers of files rely on in datasets."""

from __future__ import annotations

import os

import pytest
from datasets import Dataset, Features, List, Value, load_dataset

from tokalign.internals.datasets import (
    DATASET_USED,
    ArrowWriter,
    DatasetGenerationError,
    DatasetNotFoundError,
    Hasher,
    loadable,
)


def test_fingerprints_follow_the_content_and_name_files(tmp_path) -> None:
    assert DATASET_USED == ("_fingerprint", "_get_cache_file_path")
    rows, same, others = (Dataset.from_list([{"ids": [value]}]) for value in (1, 1, 2))
    assert rows._fingerprint == same._fingerprint != others._fingerprint
    rows.to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path), split="train")
    # Of a dataset in memory the name is drawn anew, in a folder of the process.
    assert os.path.basename(stored._get_cache_file_path("abc")) == "cache-abc.arrow"
    assert Hasher.hash(("a", 1)) == Hasher.hash(("a", 1)) != Hasher.hash(("a", 2))


def test_what_is_written_row_by_row_is_a_dataset(tmp_path) -> None:
    path = str(tmp_path / "rows.arrow")
    writer = ArrowWriter(features=Features({"scores": List(Value("float32"))}), path=path)
    writer.write({"scores": [0.5, 1.0]})
    writer.finalize()
    writer.close()
    assert os.path.exists(path) and Dataset.from_file(path)[:] == {"scores": [[0.5, 1.0]]}


def test_files_that_cannot_be_read_raise_these(tmp_path) -> None:
    assert issubclass(DatasetNotFoundError, FileNotFoundError)  # of a name on the hub; of a folder, the plain error
    for name in ("ids", "scores"):
        Dataset.from_list([{name: 1}]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DatasetGenerationError):
        load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache"))


def test_a_file_without_rows_is_no_hindrance(tmp_path) -> None:
    rows = Dataset.from_list([{"x": 1}, {"x": 2}])
    rows.to_parquet(tmp_path / "0.parquet")
    rows.select([]).to_parquet(tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes(b"no parquet")
    files = [tmp_path / f"{i}.parquet" for i in range(3)]
    names = [str(file) for file in loadable(files[:2])]
    loaded = load_dataset("parquet", data_files=names, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["x"][:] == [1, 2] and files[2] in loadable(files)
    assert loadable(files[1:2]) == files[1:2]
