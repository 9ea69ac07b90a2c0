"""Identity of what a stage was made with: tokenizers, weights, the values of a dataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError
from tokalign.stage.processes import process_state

BATCH = 1000  # rows in memory at a time while checking or hashing


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what the ids mean, equal over save and load, processes and machines.

    Covers vocabulary, merges, added tokens, normaliser, pre-tokeniser, decoder, begin/end/unknown token and chat
    template. Padding, truncation, the padding token and the post-processor are left out on purpose: trainers change
    them (`pad_token = eos_token`) without changing what any id means.
    """
    added = sorted((i, str(t.content), bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items())
    content: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": added,
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
        "chat_template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a slow (pure Python) tokenizer is identified by its vocabulary alone
        serialised = json.loads(backend.to_str())
        content["merges"] = serialised["model"].get("merges")
        content["pipeline"] = [serialised.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


_WEIGHTS: dict[tuple[tuple[str, int, int], ...], str] = {}  # hashes computed by this process


def weights_hash(path_or_id: str | Path) -> str:
    """Identity of a model's or adapter's weights.

    A local folder: sha256 over name, size and content of its `*.safetensors` files, read in blocks; kept for the life
    of the process. A hub id: the commit that the local cache resolves it to, or the id itself where nothing is cached.
    """
    folder = Path(path_or_id)
    if folder.is_file():
        raise ContractError(f"Model {path_or_id} is a file; give the folder that holds it and its config.json.")
    if not folder.is_dir():
        for name in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(str(path_or_id), name) if is_hub_id(str(path_or_id)) else None
            if isinstance(cached, str):
                return Path(cached).parent.name  # …/snapshots/<commit>/config.json
        if not is_hub_id(str(path_or_id)):
            raise ContractError(f"Model folder {path_or_id} does not exist; check the path.")
        return str(path_or_id)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ContractError(f"Model folder {folder} has no *.safetensors file; save it with save_pretrained.")
    key = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    if key not in _WEIGHTS:
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 22):
                    total.update(block)
        _WEIGHTS[key] = total.hexdigest()
    return _WEIGHTS[key]


def model_identity(path_or_id: str | Path | None, *, remote: bool = False) -> str | None:
    """What a job's parameters say of a model or adapter: `weights_hash`, or the name of one that a server holds.

    None for no model, and in every process but the main one: it alone compares and writes manifests, and hashing the
    140 GB of a large model takes minutes.

    Args:
        remote: the model may be a server's. A folder on this machine is hashed all the same.
    """
    if path_or_id is None or not process_state().is_main_process:
        return None
    return str(path_or_id) if remote and not Path(path_or_id).is_dir() else weights_hash(path_or_id)


def content_hash(dataset: Dataset) -> str:
    """sha256 over every value of a dataset in row order, streamed; the same however the rows are chunked on disk."""
    total = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=BATCH):
        for name, column in zip(table.column_names, table.columns, strict=True):
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            batch = pa.record_batch([array], names=[name])
            total.update(f"{name}\0{array.type}\0{len(array)}\0".encode())
            total.update(batch.serialize())
    return total.hexdigest()


def is_hub_id(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not text.endswith("/")
