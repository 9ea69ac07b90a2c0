"""datasets' private names and undocumented modules (run with the versions in docs/versions.md).

Held by tests/contracts/test_datasets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher
from packaging.version import Version

__all__ = ["ArrowWriter", "DatasetGenerationError", "DatasetNotFoundError", "Hasher", "loadable"]

# Of Dataset: the hash of its content, and where a file derived from it is kept under a hash's name.
DATASET_USED = ("_fingerprint", "_get_cache_file_path")


def loadable(files: Sequence[Path]) -> list[Path]:
    """Parquet files of one split that `load_dataset` can take together.

    Before datasets 5.1 it fails at a file without rows. A file that cannot be read is left in, for it to say so.
    """
    if Version(datasets.__version__) >= Version("5.1"):
        return list(files)
    return [file for file in files if _may_have_rows(file)] or list(files)


def _may_have_rows(file: Path) -> bool:
    try:
        return pq.read_metadata(file).num_rows > 0
    except (pa.ArrowException, OSError, ValueError):
        return True
