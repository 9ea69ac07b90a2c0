"""Benchmarks are scripts that import one another by name; the tests of their pure parts do the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
