"""Identity of what a stage was made with: tokenizers, weights, the values of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError
from tokalign.stage.processes import process_state

BATCH = 1000  # rows in memory at a time while checking or hashing


ALLOW_OTHER_TOKENIZER = "allow_other_tokenizer"  # the option's name everywhere, and what a manifest records it under


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what ids mean, equal over save and load, processes and machines.

    Covers the vocabulary, merges, normaliser, pre-tokeniser and decoder. Left out is what changes no id of it: tokens
    added to it (`added_tokens` lists them), which tokens begin, end and pad a text, padding, truncation, the
    post-processor and the chat template. So a padding token that is added later makes no other tokenizer.
    """
    return _sha256({"vocabulary": sorted(_own_vocabulary(tokenizer).items())} | _pipeline(tokenizer))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The tokens that were added to the vocabulary of `tokenizer_hash`, by id (a text, as JSON wants it)."""
    own = set(_own_vocabulary(tokenizer).values())
    return {str(i): str(t.content) for i, t in sorted(tokenizer.added_tokens_decoder.items()) if i not in own}


def other_tokenizer(manifest: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why the ids of a stage are not this tokenizer's, by its manifest; None where they are, or it does not say."""
    made_with = (manifest or {}).get("tokenizer_hash")
    if made_with is None:
        return None
    own = tokenizer_hash(tokenizer)
    if made_with != own:
        same = made_with == former_hash(tokenizer)
        return None if same else f"hash {str(made_with)[:12]}, this one's is {own[:12]}"
    theirs, mine = (manifest or {}).get("added_tokens"), added_tokens(tokenizer)
    for identity, token in theirs.items() if isinstance(theirs, dict) else ():
        if mine.get(identity, token) != token:  # an id that only they have is found where a row holds it
            return f"id {identity} is {token!r} there and {mine[identity]!r} here"
    return None


def allowance(allowed: bool) -> dict[str, bool]:
    """What a manifest says of rows that were made under `allow_other_tokenizer`."""
    return {ALLOW_OTHER_TOKENIZER: True} if allowed else {}


def known_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Booleans, one an id up to the highest: whether the tokenizer has a token of it. Some vocabularies have holes,
    and models often have rows above the highest id, to pad their matrices."""
    ids = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
    known = np.zeros(ids.max() + 1, dtype=bool)
    known[ids] = True
    return known


def _own_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.get_vocab(with_added_tokens=False)
    return {token: i for token, i in tokenizer.get_vocab().items() if i < tokenizer.vocab_size}


def _pipeline(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow (pure Python) tokenizer is identified by its vocabulary alone
        return {}
    serialised = json.loads(backend.to_str())
    pipeline = [serialised.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    return {"merges": serialised["model"].get("merges"), "pipeline": pipeline}


def former_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash in manifests from before 0.2; it held added and special tokens and the chat template too."""
    added = sorted((i, str(t.content), bool(t.special)) for i, t in tokenizer.added_tokens_decoder.items())
    content: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "added": added,
        "special": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
        "chat_template": tokenizer.chat_template,
    }
    return _sha256(content | _pipeline(tokenizer))


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


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
