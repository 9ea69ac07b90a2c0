"""datasets' private names and undocumented modules (run with the versions in docs/versions.md).

Held by tests/contracts/test_datasets.py.
"""

from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher

__all__ = ["ArrowWriter", "DatasetGenerationError", "DatasetNotFoundError", "Hasher"]

# Of Dataset: the hash of its content, and where a file derived from it is kept under a hash's name.
DATASET_USED = ("_fingerprint", "_get_cache_file_path")
