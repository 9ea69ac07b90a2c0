"""Feature files, the dataset over them, and the sampler: against plain loops, and every refusal by its message."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.routing.labels import records_of, write_labels
from tokalign.routing.labels.features import open_features, write_features
from tokalign.routing.router.features import RouterDataset, WindowSampler
from tokalign.stage.errors import ContractError


def arrays(n: int = 6, d: int = 4, k: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "hidden": draw.normal(size=(n, d)).astype(np.float32),
        "top_logits": draw.normal(size=(n, k)),
        "predicted": draw.integers(0, 9, n),
        "entropy": draw.random(n),
    }


# ----------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read(tmp_path):
    written = arrays()
    name = write_features(tmp_path / "new", ["a", "b"], written)
    assert name.startswith("features-") and len(name) == len("features-0123456789abcdef.safetensors")
    views = open_features(tmp_path / "new" / name)
    reference = load_file(tmp_path / "new" / name)  # safetensors' own reader
    for key, view in views.items():
        np.testing.assert_array_equal(view, reference[key])
        np.testing.assert_array_equal(view, written[key].astype(view.dtype))
        assert not view.flags.writeable
    assert {key: view.dtype.name for key, view in views.items()} == {
        "hidden": "float16",
        "top_logits": "float16",
        "predicted": "int32",
        "entropy": "float32",
    }


def test_the_name_follows_from_the_ids_alone(tmp_path):
    names = {write_features(tmp_path, ids, arrays()) for ids in (["a", "b"], ["a", "b"], ["ab"], ["b", "a"])}
    assert len(names) == 3
    assert len(list(tmp_path.iterdir())) == 3  # a shard done again replaces its file, and nothing temporary stays


def test_a_shard_without_a_position(tmp_path):
    views = open_features(tmp_path / write_features(tmp_path, ["a"], arrays(0)))
    assert views["hidden"].shape == (0, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_values_beyond_float16_are_refused(tmp_path, value):
    bad = arrays()
    bad["hidden"][4, 1] = value
    with pytest.raises(ValueError, match=r"Position 4 of the responses 'a' to 'b' has a `hidden` that is not a finite"):
        write_features(tmp_path, ["a", "b"], bad)
    assert not list(tmp_path.iterdir())


def test_incomplete_features_are_refused(tmp_path):
    some = arrays()
    del some["entropy"]
    with pytest.raises(ValueError, match="Features need the tensors hidden, top_logits, predicted, entropy, not"):
        write_features(tmp_path, ["a"], some)
    with pytest.raises(ValueError, match="one length, not hidden 6, top_logits 6, predicted 5, entropy 6"):
        write_features(tmp_path, ["a"], arrays() | {"predicted": np.zeros(5)})


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / write_features(tmp_path, ["a"], arrays())
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def damaged(**changes) -> bytes:
        text = json.dumps(header | changes).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    hidden = header["hidden"]
    for content in (
        b"",
        whole[:5],
        whole[:20],
        b"\xff" * 64,
        whole[:-1],
        whole + b"0",
        (8).to_bytes(8, "little") + b"not json" + whole,
        damaged(hidden={}),
        damaged(hidden=hidden | {"dtype": "F32"}),
        damaged(hidden=hidden | {"shape": [-6, -4]}),
        damaged(hidden=hidden | {"shape": [60, 4]}),
        damaged(hidden=hidden | {"data_offsets": header["top_logits"]["data_offsets"]}),
    ):
        file.write_bytes(content)
        with pytest.raises(ContractError, match="is cut short or no safetensors file"):
            open_features(file)
    file.unlink()
    with pytest.raises(ContractError, match="is missing; rerun the prefill stage"):
        open_features(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": np.zeros(6)}, "does not hold the tensors"),
        ({"hidden": np.zeros((6, 4), np.float32)}, "`hidden` has type F32"),
        ({"hidden": np.zeros((6, 2, 2), np.float16)}, r"`hidden` has shape \[6, 2, 2\]"),
        ({"entropy": np.zeros((6, 1), np.float32)}, r"`entropy` has shape \[6, 1\]"),
        ({"hidden": np.zeros((4, 6), np.float16)}, "differ in length"),
    ],
)
def test_files_of_other_tensors_are_refused(tmp_path, changes, message):
    file = tmp_path / write_features(tmp_path, ["a"], arrays())
    save_file(load_file(file) | changes, file)
    with pytest.raises(ContractError, match=message):
        open_features(file)


# --------------------------------------------------------------------------------------------------------- dataset


@pytest.mark.parametrize("invalid", [False, True])
def test_the_dataset_equals_a_plain_loop(tmp_path, invalid):
    stage = write_labels(tmp_path)
    dataset = RouterDataset(stage, invalid=invalid)
    assert (dataset.hidden_size, dataset.top_k) == (8, 5)
    expected = []
    for row, record in enumerate(records_of(stage)):
        tensors = load_file(tmp_path / "prefill" / "features" / record["features_file"])
        for t, label in enumerate(record["label"]):
            if label >= 0 or invalid:
                at = record["features_first"] + t
                values = {name: tensor[at] for name, tensor in tensors.items()}
                expected.append((record["features_file"], row, label, values))
    expected.sort(key=lambda item: item[0])  # stable: file after file
    assert len(dataset) == len(expected)
    assert dataset.labels.tolist() == [label for _, _, label, _ in expected]
    assert dataset.responses.tolist() == [row for _, row, _, _ in expected]
    items = np.random.default_rng(1).permutation(len(dataset)).tolist()
    batch = dataset.__getitems__(items)
    for i, item in enumerate(items):
        _, _, label, values = expected[item]
        assert batch["labels"][i] == (label == 2)
        for name, value in values.items():
            np.testing.assert_array_equal(batch[name][i].numpy(), value.astype(batch[name].numpy().dtype))
    assert torch.equal(dataset[3]["hidden"], dataset.__getitems__([3])["hidden"][0])
    assert dataset.predicted_ids().tolist() == sorted({int(values["predicted"]) for _, _, _, values in expected})


def test_splits_open_by_their_folder_and_by_name(tmp_path):
    stage = write_labels(tmp_path)
    assert RouterDataset(stage.parent, split="train").labels.tolist() == RouterDataset(stage).labels.tolist()


def test_the_sampler_gives_each_item_once_an_epoch_and_stays_within_its_window(tmp_path):
    dataset = RouterDataset(write_labels(tmp_path, rows=60, files=7))
    sampler = WindowSampler(dataset, seed=3, window=2)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(dataset)))
    assert orders[0] == orders[2] != orders[1]
    assert list(WindowSampler(dataset, seed=4, window=2)) != orders[0]
    files = np.searchsorted(dataset.bounds, orders[0], side="right") - 1
    seen = [set(files[start : start + 8].tolist()) for start in range(0, len(files), 8)]
    assert max(map(len, seen)) <= 4  # a run of items touches one window, or two at its border
    first = list(dict.fromkeys(files.tolist()))
    window = np.flatnonzero(np.isin(files, first[:2]))
    assert window.tolist() == list(range(len(window)))  # both files of a window are through before the next begins


def test_the_sampler_leaves_out_what_does_not_fill_a_batch(tmp_path):
    dataset = RouterDataset(write_labels(tmp_path))
    whole, sampler = list(WindowSampler(dataset)), WindowSampler(dataset, multiple=50)
    assert len(dataset) % 50 and list(sampler) == whole[: len(sampler)]
    assert len(sampler) == len(dataset) // 50 * 50


# ------------------------------------------------------------------------------------------------------- bad input


def changed(row: int, **values):
    return lambda records: records[row].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r[7]["label"].pop(),
            r"Row 7 \(id '7'\): `label` has \d+ entries for \d+ tokens in `completion_ids`",
        ),
        (lambda r: r[7]["slm_ids"].append(1), r"Row 7 \(id '7'\): `slm_ids` has \d+ entries for \d+ tokens"),
        (lambda r: r[3]["label"].__setitem__(0, 3), r"Row 3 \(id '3'\): `label` holds a class outside −1 to 2"),
        (changed(5, features_first=10_000), r"Row 5 \(id '5'\): `features_first` is 10000 and there are"),
        (changed(5, features_first=-1), r"Row 5 \(id '5'\): `features_first` is -1"),
        (changed(5, features_file="features-0.safetensors"), "features-0.safetensors is missing; rerun the prefill"),
        (changed(5, features_file="../../x"), "holds '../../x', not the name of a file"),
        (lambda r: [x.update(label=[-1] * len(x["label"])) for x in r], "no token with a verdict"),
        (lambda r: [x.pop("features_file") for x in r], "has no column `features_file`"),
        (lambda r: r[0]["slm_ids"].__setitem__(0, 19 - r[0]["slm_ids"][0]), r"Row 0 .* features are of another run"),
    ],
)
def test_bad_rows_are_refused(tmp_path, change, message):
    with pytest.raises(ContractError, match=message):
        RouterDataset(write_labels(tmp_path, change=change))


def test_stages_without_features_are_refused(tmp_path):
    stage = write_labels(tmp_path)
    manifest = json.loads((stage / "manifest.json").read_text())
    del manifest["features"]
    (stage / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ContractError, match="has no `features`; run `tokalign label` again"):
        RouterDataset(stage)


def test_files_of_another_width_are_refused(tmp_path):
    stage = write_labels(tmp_path)
    file = sorted((tmp_path / "prefill" / "features").iterdir())[2]
    tensors = load_file(file)
    save_file(tensors | {"hidden": np.ascontiguousarray(tensors["hidden"][:, :5])}, file)
    with pytest.raises(ContractError, match="has hidden size 5 and 5 logits, the others 8 and 5"):
        RouterDataset(stage)


def test_nan_on_disk_is_refused_when_it_is_read(tmp_path):
    stage = write_labels(tmp_path)
    record = records_of(stage)[20]
    file = tmp_path / "prefill" / "features" / record["features_file"]
    tensors = load_file(file)
    tensors["hidden"][record["features_first"] : record["features_first"] + len(record["label"])] = np.nan
    save_file(tensors, file)
    dataset = RouterDataset(stage)
    with pytest.raises(ContractError, match=r"Row 20 \(id '20'\): its `hidden` in .* is not finite"):
        dataset.__getitems__(range(len(dataset)))
