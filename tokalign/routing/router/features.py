"""The labelled positions that a router is trained on: features stay on disk, a batch reads the rows that it needs.

`tokalign.routing.labels.features` says what the features are and how their files look.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, Sampler

from tokalign.routing.labels.classes import DIVERGENT
from tokalign.routing.labels.features import finite_positions, open_features
from tokalign.stage.contract import check_lists, check_values
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import folder_of, load_stage
from tokalign.stage.manifest import manifest_of

_OPEN = 64  # files mapped at a time, several times a sampler's window


@functools.lru_cache(maxsize=_OPEN)
def _opened(file: str, written: int) -> dict[str, np.ndarray]:
    """`open_features`, kept; `written` (when the file was) tells a file from its successor of the same name."""
    return open_features(Path(file))


class RouterDataset(Dataset):
    """The labelled positions of a stage `routing_labels`, their features left on disk.

    Item i is one position; positions lie in file order, and 9 bytes each are in memory. Rows are read a batch at a
    time (`__getitems__`), so the collator is the identity.

    Args:
        stage: folder of one split, e.g. runs/labels/labels/train, or the folder of all splits with `split`.
        split: split to open, where `stage` holds several.
        invalid: also the positions without a verdict (label −1). They say nothing about what a router should do, but
            routed decoding meets such positions too, so they count when a rate is measured.

    Attributes:
        labels: (N,) int8: 0 identical, 1 neutral, 2 divergent, −1 no verdict.
        responses: (N,) int32, the stage's row that the position belongs to.
        hidden_size, top_k: width of `hidden` and `top_logits`.
        manifest: the stage's.
        epoch: which shuffle a `WindowSampler` gives.

    Raises:
        ContractError: a row's lists differ in length, or its features are missing, cut short or another run's.
    """

    def __init__(self, stage: str | Path, *, split: str = "train", invalid: bool = False):
        rows = load_stage(stage, split=split, stage="routing_labels")
        for column in ("features_file", "features_first"):
            if column not in rows.column_names:
                raise ContractError(f"{stage} has no column `{column}`; run `tokalign label`.")
        self.manifest = manifest_of(rows) or {}
        folder = folder_of(stage, split)
        if "features" not in self.manifest:
            raise ContractError(f"The manifest of {folder} has no `features`; run `tokalign label` again.")
        self.folder = folder
        self.features = (folder / self.manifest["features"]).resolve()
        self.epoch = 0
        self._ids: list[str] = []
        names, labels, firsts = self._read_rows(rows)
        self._files, file_of_row = np.unique(np.asarray(names), return_inverse=True)
        self._written = np.array([self._stamp(name) for name in self._files.tolist()])
        self._sizes()
        kept = [np.flatnonzero(row >= (-1 if invalid else 0)) for row in labels]
        order = np.argsort(file_of_row, kind="stable")
        counts = np.array([len(k) for k in kept])
        if not counts.sum():
            raise ContractError(f"{folder} has no token with a verdict: all labels are −1; look at its report.json.")
        self.labels = np.concatenate([labels[r][kept[r]] for r in order])
        self.responses = np.repeat(order.astype(np.int32), counts[order])
        self._positions = np.concatenate([kept[r] + firsts[r] for r in order]).astype(np.int32)
        per_file = np.bincount(file_of_row, weights=counts, minlength=len(self._files)).astype(np.int64)
        self.bounds = np.concatenate([[0], np.cumsum(per_file)])  # file f holds items bounds[f] to bounds[f + 1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`hidden` (B, d), `top_logits` (B, k), `entropy` (B,) float32, `predicted` (B,) int64, `labels` (B,) float32.

        `labels` is 1 for divergent, else 0.
        """
        items = np.asarray(indices, dtype=np.int64)
        files = np.searchsorted(self.bounds, items, side="right") - 1
        batch: dict[str, np.ndarray] = {}
        for file in np.unique(files):
            own = np.flatnonzero(files == file)
            own = own[np.argsort(self._positions[items[own]])]  # the disk is read in one direction
            views = self._views(file)
            for name, view in views.items():
                if name not in batch:
                    kind = np.int64 if name == "predicted" else np.float32
                    batch[name] = np.empty((len(items), *view.shape[1:]), dtype=kind)
                batch[name][own] = view[self._positions[items[own]]]
        for name, values in batch.items():
            if not (finite := finite_positions(values)).all():
                bad = items[np.argmin(finite)]
                row = int(self.responses[bad])
                raise ContractError(
                    f"Row {row} (id {self._ids[row]!r}): its `{name}` in {self.features / self._files[self._file(bad)]}"
                    " is not finite; delete the file and rerun the prefill stage of `tokalign label`."
                )
        batch["labels"] = (self.labels[items] == DIVERGENT).astype(np.float32)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def predicted_ids(self) -> np.ndarray:
        """The distinct ids that the SLM predicts, sorted: the rows of its embedding that a router needs here."""
        parts = [
            np.unique(self._views(f)["predicted"][self._positions[self.bounds[f] : self.bounds[f + 1]]])
            for f in range(len(self._files))
        ]
        return np.unique(np.concatenate(parts))

    def _file(self, item: int) -> int:
        return int(np.searchsorted(self.bounds, item, side="right")) - 1

    def _views(self, file: int) -> dict[str, np.ndarray]:
        return _opened(str(self.features / self._files[file]), int(self._written[file]))

    def _stamp(self, name: str) -> int:
        if not name or Path(name).name != name:  # a name from a file that may be anybody's
            raise ContractError(f"{self.folder}: `features_file` holds {name!r}, not the name of a file.")
        try:
            return (self.features / name).stat().st_mtime_ns
        except (OSError, ValueError):  # also for a name that no file can have
            raise ContractError(
                f"Feature file {self.features / name} is missing; rerun the prefill stage of `tokalign label`."
            ) from None

    def _sizes(self) -> None:
        """Widths of the features, one for all files."""
        for index, name in enumerate(self._files):
            views = self._views(index)
            widths = views["hidden"].shape[1], views["top_logits"].shape[1]
            if index == 0:
                self.hidden_size, self.top_k = widths
            elif widths != (self.hidden_size, self.top_k):
                raise ContractError(
                    f"Feature file {self.features / name} has hidden size {widths[0]} and {widths[1]} logits, the "
                    f"others {self.hidden_size} and {self.top_k}; rerun `tokalign label` in an empty folder."
                )

    def _read_rows(self, rows) -> tuple[list[str], list[np.ndarray], list[int]]:
        """File, labels and first position of every row; checks each row against its features."""
        names: list[str] = []
        labels: list[np.ndarray] = []
        firsts: list[int] = []
        remedy = "rerun `tokalign label`"
        check_lists(rows, str(self.folder), ("completion_ids", "slm_ids", "label"), remedy)
        columns = ["id", "completion_ids", "slm_ids", "label", "features_file", "features_first"]
        for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            arrays = {name: _one_array(table.column(name)) for name in columns}
            check_values(arrays, len(names))
            lists = {name: _lists(arrays[name]) for name in ("completion_ids", "slm_ids", "label")}
            for index in range(len(table)):
                number, row_id = len(names), arrays["id"][index].as_py()
                where = f"Row {number} (id {row_id!r})"
                length = len(lists["completion_ids"][index])
                for column in ("slm_ids", "label"):
                    if (entries := len(lists[column][index])) != length:
                        raise ContractError(
                            f"{where}: `{column}` has {entries} entries for {length} tokens in `completion_ids`; "
                            f"{remedy}."
                        )
                label = lists["label"][index]  # a null is NaN here, which no comparison passes
                if length and not (label.min() >= -1 and label.max() <= DIVERGENT):
                    raise ContractError(f"{where}: `label` holds a class outside −1 to {DIVERGENT}; {remedy}.")
                name, first = arrays["features_file"][index].as_py(), arrays["features_first"][index].as_py()
                if not isinstance(name, str) or type(first) is not int:
                    raise ContractError(
                        f"{where}: `features_file` is {name!r} and `features_first` is {first!r}, not the name of a "
                        f"file and a position in it; {remedy}."
                    )
                views = _opened(str(self.features / name), self._stamp(name))
                if first < 0 or first + length > len(views["predicted"]):
                    raise ContractError(
                        f"{where}: `features_first` is {first} and there are {length} tokens, but {name} has "
                        f"{len(views['predicted'])} positions; {remedy}."
                    )
                if not np.array_equal(views["predicted"][first : first + length], lists["slm_ids"][index]):
                    raise ContractError(
                        f"{where}: `slm_ids` is not what {name} says that the SLM predicts, so its features are of "
                        f"another run; {remedy}."
                    )
                names.append(name)
                labels.append(label.astype(np.int8))
                firsts.append(first)
                self._ids.append(row_id)
        return names, labels, firsts


def _one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lists(array: pa.Array) -> list[np.ndarray]:
    """Each row's list; a missing one is empty, a missing value in one is NaN."""
    if pa.types.is_null(array.type):
        return [np.empty(0)] * len(array)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(array).to_numpy(zero_copy_only=False)
    if values.dtype == object:  # lists that hold nothing but None
        values = np.full(len(values), np.nan)
    return np.split(values, np.cumsum(lengths)[:-1])


class WindowSampler(Sampler[int]):
    """The items of a `RouterDataset`, shuffled so that reads from disk stay together.

    Files are shuffled, then items among the files of a window: a step reads a few files only, whatever the size of
    the whole. The order follows from seed and epoch, so every process and a resumed run draw the same.

    Args:
        window: files that are shuffled together.
        multiple: size of a global batch. The items at the end of the order that do not fill one are left out of the
            epoch, so that any number of processes sees the same batches; another epoch leaves out others.
    """

    def __init__(self, dataset: RouterDataset, *, seed: int = 0, window: int = 8, multiple: int = 1):
        self.dataset, self.seed, self.window, self.multiple = dataset, seed, window, multiple

    def set_epoch(self, epoch: int) -> None:
        # Kept by the dataset: accelerate 1.15 reaches it, not the sampler, when two processes resume within an epoch.
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.multiple * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.dataset.epoch])
        bounds = self.dataset.bounds
        files = generator.permutation(len(bounds) - 1)
        left = len(self)
        for start in range(0, len(files), self.window):
            items = np.concatenate([np.arange(bounds[f], bounds[f + 1]) for f in files[start : start + self.window]])
            shuffled = generator.permutation(items)[:left]
            left -= len(shuffled)
            yield from shuffled.tolist()
