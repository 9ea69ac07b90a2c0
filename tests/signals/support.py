"""Tiny adapters with a non-zero B matrix, so that they change the model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MLP = ("gate_proj", "up_proj", "down_proj")


def save_adapter(
    path: str | Path, base: str, *, seed: int, target_modules: tuple[str, ...] = MLP, **config: object
) -> str:
    """A random LoRA adapter of the model at `base`, written to `path`."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=list(target_modules), init_lora_weights=False, **config),
    )
    model.save_pretrained(path)
    return str(path)
