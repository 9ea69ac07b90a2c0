"""What a router reads at each position of a completion: how it is computed, and the files that keep it beside labels.

"Position t" is where token t of a completion is chosen, so its features are the small model's (SLM's) at the token
before it: `hidden` (what its LM head reads), `top_logits` (the largest logits over the ids that the pair shares),
`predicted` (their argmax) and `entropy` (nats). One function computes them for the labels that a router is trained on
and for the tokens that it routes. One safetensors file holds the positions of one shard of responses, one after the
other; a stage's rows say where their own begin (`features_file`, `features_first`).

Size: 2 (d + k) + 8 bytes a position, 3.28 GB a million positions at d = 1536 and k = 100. Files are memory-mapped, so
a dataset larger than memory is read where it lies; nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokalign.generation.sampling import entropy
from tokalign.stage.errors import ContractError
from tokalign.stage.files import fsync_folder

INPUTS = ("hidden", "token", "logits", "entropy")  # what a router may read
TENSORS = {"hidden": np.float16, "top_logits": np.float16, "predicted": np.int32, "entropy": np.float32}
_NAMES = {np.float16: "F16", np.float32: "F32", np.int32: "I32"}  # as a header spells the types
_LONGEST = 1 << 31  # of a dimension; numpy takes no number of any size


def row_features(
    hidden: torch.Tensor | None, logits: torch.Tensor, *, top_k: int, shared_vocab: int, needs: Collection[str]
) -> dict[str, torch.Tensor]:
    """A router's inputs from what the SLM computes, for N next tokens: for labels, for both engines, for the policies.

    Args:
        hidden: (N, d), what the SLM's LM head got; read only if needed.
        logits: (N, V) of any type, V >= `shared_vocab`.
        needs: of "hidden", "token", "logits", "entropy"; nothing else is computed.

    Returns:
        `hidden` (N, d) and `top_logits` (N, top_k) in their own types, `predicted` (N,) int64, `entropy` (N,) float32
        in nats over the shared ids.
    """
    shared = logits[:, :shared_vocab]
    features: dict[str, torch.Tensor] = {}
    if "hidden" in needs:
        if hidden is None:
            raise ValueError("This router reads the SLM's hidden states; pass them, or train one without them.")
        features["hidden"] = hidden
    if "logits" in needs:
        features["top_logits"] = shared.topk(top_k, dim=-1).values
    if "token" in needs:
        features["predicted"] = shared.argmax(dim=-1)
    if "entropy" in needs:
        features["entropy"] = entropy(shared.float())
    return features


def write_features(folder: Path, ids: Sequence[str], arrays: dict[str, np.ndarray]) -> str:
    """Write the features of the responses `ids`, one after the other, atomically; the name of the file.

    The name follows from `ids`, so a shard that is done again replaces its own file.

    Args:
        folder: made if absent.
        ids: of the responses, in order.
        arrays: `hidden` (N, d), `top_logits` (N, k), `predicted` (N,), `entropy` (N,), of any numeric type; N counts
            the positions of all responses.

    Raises:
        ValueError: a tensor is missing, lengths differ, or a value is not finite in the type that is stored.
    """
    if arrays.keys() != TENSORS.keys():
        raise ValueError(f"Features need the tensors {', '.join(TENSORS)}, not {', '.join(arrays)}.")
    with np.errstate(over="ignore"):  # an overflow is found below
        stored = {name: np.ascontiguousarray(arrays[name], dtype=dtype) for name, dtype in TENSORS.items()}
    positions = {len(array) for array in stored.values()}
    if len(positions) != 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in stored.items())
        raise ValueError(f"Features of one shard must have one length, not {lengths}.")
    for name, array in stored.items():
        if not (finite := finite_positions(array)).all():
            raise ValueError(
                f"Position {int(np.argmin(finite))} of the responses {ids[0]!r} to {ids[-1]!r} has a `{name}` that is "
                f"not a finite {np.dtype(TENSORS[name]).name}; drop the response, or run the SLM in fp32 if it "
                "overflowed."
            )
    folder.mkdir(parents=True, exist_ok=True)
    name = f"features-{hashlib.sha256(chr(0).join(ids).encode()).hexdigest()[:16]}.safetensors"
    for left_over in folder.glob(f".{name}.*.tmp"):  # by a killed process; a shard is one process's at a time
        left_over.unlink()
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        save_file(stored, temporary)
    except SafetensorError as error:  # how it tells of a full disk; the half-written file takes room
        temporary.unlink(missing_ok=True)
        raise OSError(f"{folder} does not take the file {name} ({error}); make room and start again.") from error
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, folder / name)
    fsync_folder(folder)
    return name


def _finite(array: np.ndarray) -> np.ndarray:
    """Whether all values of a position are finite (N,)."""
    return np.isfinite(array).all(axis=tuple(range(1, array.ndim)))


def finite_positions(array: np.ndarray) -> np.ndarray:
    """Whether all values of a position are finite (N,)."""
    return np.isfinite(array).all(axis=tuple(range(1, array.ndim)))


def open_features(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a feature file: read-only views of the mapped file, nothing is read yet.

    Raises:
        ContractError: the file is missing, cut short, or does not hold what `write_features` writes.
    """
    remedy = "rerun the prefill stage of `tokalign label`"
    try:
        with safe_open(file, framework="numpy") as stored:
            order = stored.offset_keys()
            headers = {name: stored.get_slice(name) for name in order}
            kinds = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
    except FileNotFoundError:
        raise ContractError(f"Feature file {file} is missing; {remedy}.") from None
    except SafetensorError as error:
        raise ContractError(f"Feature file {file} is cut short or no safetensors file ({error}); {remedy}.") from None
    if kinds.keys() != TENSORS.keys():
        raise ContractError(f"Feature file {file} does not hold the tensors {', '.join(TENSORS)}; {remedy}.")
    for name, (dtype, shape) in kinds.items():
        if dtype != _NAMES[TENSORS[name]]:
            raise ContractError(f"Feature file {file}: `{name}` has type {dtype}; {remedy}.")
        if len(shape) != (2 if name in ("hidden", "top_logits") else 1) or max(shape) >= _LONGEST:
            raise ContractError(f"Feature file {file}: `{name}` has shape {str(shape)[:80]}; {remedy}.")
    if len({shape[0] for _, shape in kinds.values()}) != 1:
        raise ContractError(f"Feature file {file}: its tensors differ in length; {remedy}.")
    # The library copies what it reads, and a batch's rows lie anywhere in a file. So the file is mapped here, by what
    # the library has checked: its tensors fill the end of the file in this order, without a gap.
    raw = np.memmap(file, dtype=np.uint8, mode="r")
    views, end = {}, len(raw)
    for name in reversed(order):
        _, shape = kinds[name]
        start = end - np.dtype(TENSORS[name]).itemsize * int(np.prod(shape, dtype=object))
        views[name], end = raw[start:end].view(TENSORS[name]).reshape(shape), start
    return views
