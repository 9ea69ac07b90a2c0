"""What TRL's colocated vLLM needs on a machine without a GPU. Tests and laptops only; nothing of a method is in here.

vLLM's CPU backend packs linear weights into the layout of a kernel, after which a trainer can no longer load new ones
("'Parameter' object has no attribute 'weight_loader'"). With packing off, weights stay as they are. Measured with
vllm-cpu 0.30 on a tiny random model: trainer's and engine's log-probs at most 0.005 apart while the policy moves fast.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def prepare_colocated_vllm(kv_cache_gib: int = 1) -> None:
    """Make TRL's `vllm_mode="colocate"` trainable on the CPU; does nothing where there is a GPU.

    Call it before the trainer is built.

    Args:
        kv_cache_gib: memory for vLLM's KV cache, unless `VLLM_CPU_KVCACHE_SPACE` is set already.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("rollouts=vllm-colocate needs vLLM: run `make install-test`, or use --rollouts transformers.")
    from tokalign.internals.vllm import keep_weights_loadable

    keep_weights_loadable()
