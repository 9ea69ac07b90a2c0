"""The jobs of benchmarks/reliability.py, on inputs that are made once a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """The server that starts jobs; tests that use it start scripts without importing PyTorch again."""
    import faults

    faults.prepare(tmp_path_factory.mktemp("cache"))
    return faults


@pytest.fixture(scope="session")
def inputs(forks, tmp_path_factory):
    from fault_inputs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("faults") / "inputs")
