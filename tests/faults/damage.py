"""Damage to a shard of a finished job in every way that a disk or a copy does it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tokalign.stage.jobs import run_job
from tokalign.stage.manifest import read_manifest
from tokalign.stage.shards import counts_of, job_hash, shard_name, shard_problem

SHARDS, ROWS = 3, 64  # and rows a shard


def write_stage(folder: Path, *, seed: int = 0) -> None:
    """A finished job of three shards with the kinds of columns that stages have; no two seeds write the same rows."""
    draw = random.Random(seed)
    rows = [
        {
            "id": f"problem-{seed}-{number}",
            "prompt": [{"role": "user", "content": f"What is {number} times {draw.randrange(100)}?"}],
            "completion_ids": [draw.randrange(32000) for _ in range(20)],
            "logprobs": [-draw.random() for _ in range(20)],
            "correct": draw.random() < 0.5,
        }
        for number in range(SHARDS * ROWS)
    ]
    run_job(lambda batch: batch, Dataset.from_list(rows), folder, name="rows", parameters={}, shard_size=ROWS)


def flip(raw: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit of them flipped."""
    damaged = bytearray(raw)
    damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def read_plain(raw: bytes) -> list[dict[str, Any]] | None:
    """Rows as any reader gets them, without checks; None where it fails."""
    try:
        return pq.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError, ValueError):
        return None


def flipped_bits(folder: Path, flips: int, draw: random.Random) -> dict[str, int]:
    """Single bits flipped anywhere in a shard: found, without effect on any value, or accepted with another value.

    `plain_*` is what a plain parquet file of the same rows and a reader without checks would have done.
    """
    job = job_hash(read_manifest(folder)) or ""
    file, trial = folder / shard_name(1, SHARDS), folder / "trial.parquet"
    raw, rows = file.read_bytes(), pq.read_table(file).to_pylist()
    kept = {key: value for key, value in counts_of(file).items() if key != "digest"}
    plain_file = pa.BufferOutputStream()
    pq.write_table(pq.read_table(file), plain_file, compression="zstd")
    plain = plain_file.getvalue().to_pybytes()
    found = dict.fromkeys(("flips", "found", "harmless", "wrong", "plain_found", "plain_harmless", "plain_wrong"), 0)
    for _ in range(flips):
        found["flips"] += 1
        trial.write_bytes(flip(raw, draw))
        if shard_problem(trial, job, 1, pages=True) is not None:
            found["found"] += 1
        else:
            same = read_plain(trial.read_bytes()) == rows and kept.items() <= counts_of(trial).items()
            found["harmless" if same else "wrong"] += 1
        read = read_plain(flip(plain, draw))
        found["plain_found" if read is None else "plain_harmless" if read == rows else "plain_wrong"] += 1
    trial.unlink()
    return found


DAMAGES = ("cut short", "empty", "a flipped bit in a page", "another job's shard", "another shard of this job")


def spoil(folder: Path, other: Path, kind: str) -> Path:
    """Damage the second shard of the stage `folder`; `other` is a stage of the same shape."""
    file = folder / shard_name(1, SHARDS)
    raw = file.read_bytes()
    column = pq.read_metadata(file).row_group(0).column(3)
    inside = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 20
    contents = {
        "cut short": raw[: len(raw) // 2],
        "empty": b"",
        "a flipped bit in a page": raw[:inside] + bytes([raw[inside] ^ 4]) + raw[inside + 1 :],
        "another job's shard": (other / file.name).read_bytes(),
        "another shard of this job": (folder / shard_name(0, SHARDS)).read_bytes(),
    }
    file.write_bytes(contents[kind])
    return file
