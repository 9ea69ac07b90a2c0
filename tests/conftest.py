"""Fixtures shared by all tests: one tiny model and tokenizer on disk a session."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> str:
    """Directory with a tiny Llama and its tokenizer."""
    from tests.support import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))
