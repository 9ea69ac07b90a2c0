"""Fixtures shared by all tests: one tiny model and tokenizer on disk a session."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models are not worth a second thread: its waiting costs more than it computes (test_contrast.py: 35 s of CPU time
# with two, 13 s with one). Read when torch is imported, and handed down to the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# vLLM on few cores: an engine that is bound to all of them waits actively for the other processes' turns.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")  # as vLLM's own CPU tests: no kernels compiled for one tiny model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> str:
    """Directory with a tiny Llama and its tokenizer."""
    from tests.support import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))
