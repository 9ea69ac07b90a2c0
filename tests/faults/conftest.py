"""The jobs of benchmarks/experiments/faults.py, on inputs that are made once a session."""

import pytest


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """The server that starts jobs; tests that use it start scripts without importing PyTorch again."""
    from benchmarks.experiments import faults

    faults.prepare(tmp_path_factory.mktemp("cache"))
    return faults


@pytest.fixture(scope="session")
def inputs(forks, tmp_path_factory):
    return forks.make_inputs(tmp_path_factory.mktemp("faults") / "inputs")
