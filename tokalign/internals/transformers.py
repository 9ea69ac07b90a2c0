"""transformers' private names and undocumented modules (run with the versions in docs/versions.md).

The layers of its KV cache are documented for reading, not for writing one's own; ours are subclasses all the same.
Held by tests/contracts/test_transformers.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations import is_fsdp_enabled, unset_hf_deepspeed_config
from transformers.models.llama import modeling_llama
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import cached_file

__all__ = [
    "TRAINER_STATE_NAME",
    "Cache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "attention_of",
    "attention_set",
    "base_of",
    "bytes_to_unicode",
    "configs_of",
    "file_or_none",
    "init",
    "is_fsdp_enabled",
    "let_old_code_load",
    "takes_attention",
    "unset_hf_deepspeed_config",
]

# Of Trainer: the methods that ours overrides.
TRAINER_OVERRIDDEN = ("_get_train_sampler", "_prepare_inputs")

# Of PreTrainedModel: what a model of one's own defines.
MODEL_DEFINED = ("_init_weights", "_no_split_modules")


def attention_of(config: PreTrainedConfig) -> str | None:
    """Which attention a loaded model runs: `sdpa`, `eager` …"""
    return config._attn_implementation


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that a model's modules read while they run, each once."""
    found = {
        id(config): config for m in model.modules() if isinstance(config := vars(m).get("config"), PreTrainedConfig)
    }
    return list(found.values())


def takes_attention(model: PreTrainedModel) -> bool:
    """Whether the code of a model asks transformers which attention to run; `is_backend_compatible` knows fewer."""
    files = {type(module).__module__ for module in model.modules()}
    return any("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[file]) for file in files if file in sys.modules)


@contextmanager
def attention_set(configs: list[PreTrainedConfig], name: str) -> Iterator[None]:
    """Let the attention that is registered under `name` run. The private field, because the setter reaches others."""
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def file_or_none(model: str, name: str) -> str | None:
    """Local path of a model's file, by folder or hub id; None where the model has no such file."""
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)


def base_of(model: str) -> str:
    """The model that an adapter sits on, by folder or hub id; a model that is no adapter is its own."""
    file = file_or_none(model, "adapter_config.json")
    return model if file is None else str(json.loads(Path(file).read_text("utf-8"))["base_model_name_or_path"])


def let_old_code_load() -> None:
    """Give back a text that transformers 5 has dropped: ArmoRM's code, and that of models built from it, imports it."""
    vars(modeling_llama).setdefault("LLAMA_INPUTS_DOCSTRING", "")
