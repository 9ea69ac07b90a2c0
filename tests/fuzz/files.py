"""Targets that read files of strangers: manifests, parquet, features, templates, router configs.

The property is one throughout: a hostile file is refused in one sentence by the package's own kind of error, or what
was read is what the contract promises.
"""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import StrictDataclassError

from tests.fuzz.properties import is_number, refusals
from tests.support import tiny_tokenizer
from tokalign.data.revision import load_templates
from tokalign.routing.labels.features import TENSORS, open_features, write_features
from tokalign.routing.labels.judge import load_judge_template
from tokalign.routing.router.card import write_model_card
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.signals.registry import get
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import MANIFEST, manifest_of, read_manifest
from tokalign.stage.shards import shard_name

POSITIONS = 6  # of the features that lie beside fuzzed labels
SIGNALS = ("contrast", "token_reward")


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, which also takes what the datasets library caches."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        datasets.disable_progress_bars()
        with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", f"{name}/cache"):
            yield Path(name)


tokenizer = lru_cache(tiny_tokenizer)


def preferences() -> pa.Table:
    """One right row of every column that a preference stage and the signals need."""
    text = {"chosen": "ab", "rejected": "ac"}
    ids = {f"{side}_ids": tokenizer()(text[side])["input_ids"] for side in text}
    row = {"id": "0", "prompt": "p", **text, "prompt_ids": tokenizer()("p")["input_ids"], **ids}
    row |= {f"{side}_{signal}": [0.25, 0.5] for side in text for signal in SIGNALS}
    return pa.Table.from_pylist([row])


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


# ------------------------------------------------------------------------------------------------------------ targets


def manifest(data: bytes) -> None:
    """A `manifest.json` of any bytes beside one right shard."""
    with folder() as stage:
        (stage / MANIFEST).write_bytes(data)
        (stage / shard_name(0, 1)).write_bytes(parquet(preferences()))
        with refusals(ContractError):
            assert isinstance(read_manifest(stage), dict)
        with refusals(ContractError):
            rows = load_stage(stage, stage="preferences", tokenizer=tokenizer(), signals=SIGNALS)
            assert len(rows) == 1 and manifest_of(rows) == read_manifest(stage)


def shard(data: bytes) -> None:
    """A parquet file of any bytes: opened as a stage, then checked as preferences."""
    with folder() as stage:
        (stage / "train.parquet").write_bytes(data)
        with refusals(ContractError):
            rows = load_stage(stage, stage="preferences", signals=SIGNALS)
            check_preferences(rows, tokenizer(), signals=[get(name) for name in SIGNALS])
            numbers = [name for name in rows.column_names if name.endswith(("_ids", *SIGNALS))]
            for row in rows.select_columns(numbers):  # what passed is what a trainer may rely on
                for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
                    assert row[column] and all(type(i) is int and 0 <= i < len(tokenizer()) for i in row[column])
                for side in ("chosen", "rejected"):
                    for signal, low in (("contrast", 0.0), ("token_reward", -0.5)):
                        scores = row[f"{side}_{signal}"]
                        assert len(scores) == len(row[f"{side}_ids"])
                        assert all(isinstance(s, float | int) and low <= s <= 1 for s in scores)


def labels(data: bytes) -> None:
    """Routing labels of any bytes beside right features."""
    with folder() as stage:
        (stage / shard_name(0, 1)).write_bytes(data)
        name = write_features(stage / "features", ["0"], features_arrays())
        assert name == features_name()
        (stage / MANIFEST).write_text(json.dumps({"status": "complete", "features": "features", "shards": 1}))
        with refusals(ContractError):
            dataset = RouterDataset(stage, invalid=True)
            assert set(dataset.labels.tolist()) <= {-1, 0, 1, 2}
            given = [label for row in load_stage(stage, stage="routing_labels") for label in row["label"]]
            assert sorted(given) == sorted(dataset.labels.tolist()), "another label than the file's"
            batch = dataset.__getitems__(range(len(dataset)))
            assert all(len(values) == len(dataset) for values in batch.values())


def features_arrays() -> dict[str, np.ndarray]:
    count = np.arange(POSITIONS)
    return {
        "hidden": count[:, None] + np.zeros((1, 3)),
        "top_logits": count[:, None] - np.arange(2)[None],
        "predicted": count % 5,
        "entropy": count / 10,
    }


@lru_cache
def features_bytes() -> bytes:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        return (Path(name) / write_features(Path(name), ["0"], features_arrays())).read_bytes()


@lru_cache
def features_name() -> str:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        return write_features(Path(name), ["0"], features_arrays())


def features(data: bytes) -> None:
    """A feature file of any bytes: refused, or four tensors of one length that share no byte."""
    with folder() as place:
        file = place / "features.safetensors"
        file.write_bytes(data)
        with refusals(ContractError):
            views = open_features(file)
            assert {name: view.dtype for name, view in views.items()} == {n: np.dtype(t) for n, t in TENSORS.items()}
            assert len({len(view) for view in views.values()}) == 1
            overlapping = [
                pair for pair in itertools.combinations(views, 2) if np.may_share_memory(*map(views.get, pair))
            ]
            assert not overlapping  # exact, for arrays whose bytes lie together
            for view in views.values():
                view.sum()  # every byte lies in the file


def template(data: bytes) -> None:
    """A template of any bytes, as the judge's and as the revision prompts."""
    with folder() as place:
        file = place / "mine.json"
        file.write_bytes(data)
        with refusals(ContractError):
            judge = load_judge_template(file)
            assert judge.same != judge.different and "{question}" in judge.user
        with refusals(ContractError):
            revision = load_templates(file)
            assert revision.better != revision.worse and "{completion}" in revision.worse


def router_config(data: bytes) -> None:
    """Our fields of a router's `config.json`: refused, or a shape that can be built and a threshold that compares.

    What else the file may hold is read by transformers, before any of our code.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    with folder() as place:
        own = {name: value for name, value in content.items() if name in TokenRouterConfig.__annotations__}
        (place / "config.json").write_text(json.dumps({**own, "model_type": "token_router"}))
        try:
            config = TokenRouterConfig.from_pretrained(place)
        except (ValueError, OSError, StrictDataclassError) as error:  # in transformers' own words
            assert str(error).strip()
            return
        sizes = (config.hidden_size, config.embedding_size, config.shared_vocab, config.top_k, config.width)
        assert all(type(size) is int and size >= 1 for size in (*sizes, config.expansion)) and config.num_blocks >= 0
        assert config.threshold is None or is_number(config.threshold)
        if max(*sizes, config.expansion, config.num_blocks) <= 64:
            router = TokenRouter(config)
            text = write_model_card(router, place / "card").read_text(encoding="utf-8")
            assert text.startswith("---") and "# Token router" in text
