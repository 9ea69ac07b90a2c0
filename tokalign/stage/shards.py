"""What a parquet shard says about itself, so that damage is found before a row of it is believed.

Three things can be wrong with a file under a shard's name: its bytes (a disk, a copy that was cut short), its place (it
is another shard's, or another job's), and its number of rows. Pages carry checksums (CRC-32, part of the parquet
format), which guard the values; without them, most flipped bits inside a compressed page read as other values.
The footer has none in the format, so it carries its own: the counts that a job keeps there, with a digest of them and
of the columns' names and types.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from tokalign.stage.files import fsync_folder, removed_if_it_fails

METADATA = b"tokalign"  # key of a shard's counts in its parquet schema metadata
CHECKED = pads.ParquetFragmentScanOptions(page_checksum_verification=True)  # pages without a checksum pass
_IDENTITY = ("name", "parameters", "tokenizer_hash", "input", "shard_size")


def job_hash(manifest: Mapping[str, Any]) -> str | None:
    """Identity of the job that writes a stage, from its manifest; None for a stage that no job wrote."""
    if not set(_IDENTITY) <= manifest.keys():
        return None
    text = json.dumps([manifest[key] for key in _IDENTITY], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(table: pa.Table, counts: Mapping[str, Any]) -> pa.Table:
    """The table with its counts and their digest in the metadata, ready to be written."""
    counts = {key: value for key, value in counts.items() if key != "digest"}
    sink = pa.BufferOutputStream()
    pq.write_table(table.schema.empty_table(), sink)  # parquet gives some types back by another name
    text = json.dumps({**counts, "digest": _digest(counts, pq.read_schema(pa.BufferReader(sink.getvalue())))})
    return table.replace_schema_metadata({METADATA: text.encode()})


def _digest(counts: Mapping[str, Any], schema: pa.Schema) -> str:
    described = json.dumps([counts, [[field.name, str(field.type)] for field in schema]], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def counts_of(file: Path) -> dict[str, Any]:
    """The counts in a shard's footer."""
    return json.loads((pq.read_schema(file).metadata or {})[METADATA])


def shard_problem(file: Path, job: str, index: int, *, pages: bool) -> str | None:
    """What is wrong with shard `index` of a job, None if it is whole and in its place.

    Args:
        pages: read every page against its checksum too, a batch at a time; without it only the footer is read.
    """
    if not file.exists():
        return "is not there"
    try:
        footer = pq.read_metadata(file)
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError):
        return "is damaged (no readable footer)"
    try:
        counts = json.loads((schema.metadata or {})[METADATA])
        rows, own_job, own_index = counts["rows"], counts["job"], counts["shard"]
    except (KeyError, TypeError, ValueError):
        return "has no counts of this package in its metadata"
    if own_job != job:
        return "was written by another job"
    if own_index != index:
        return f"is shard {own_index} under another's name"
    if rows != footer.num_rows:
        return "does not hold the rows it counts"
    digest = counts.pop("digest", None)  # shards from before there were digests have none
    if digest is not None and digest != _digest(counts, schema):
        return "is damaged (its footer is not the one that was written)"
    return page_problem(file) if pages else None


def page_problem(file: Path) -> str | None:
    """Whether a page of a parquet file cannot be read or is not the one that was written."""
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            rows = sum(len(batch) for batch in opened.iter_batches(batch_size=1024))
            if rows != opened.metadata.num_rows:
                return "is damaged (its pages do not hold the rows that its footer counts)"
    except (pa.ArrowException, OSError, ValueError):
        return "is damaged (a page cannot be read or fails its checksum)"
    return None


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` of `count`."""
    return f"part-{index:05d}-of-{count:05d}.parquet"


def write_shard(table: pa.Table, counts: Mapping[str, Any], file: Path) -> None:
    """Write under a temporary name, then rename: under its own name a shard is whole, or it is not there."""
    table = sealed(table, counts)
    temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with removed_if_it_fails(temporary):
        with open(temporary, "wb") as stream:
            with pq.ParquetWriter(stream, table.schema, compression="zstd", write_page_checksum=True) as writer:
                if len(table):  # `load_dataset` fails on an empty row group, not on a file without any
                    writer.write_table(table)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    fsync_folder(file.parent)
