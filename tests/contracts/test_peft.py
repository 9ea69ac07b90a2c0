"""What telling a policy from its reference relies on in PEFT."""

from __future__ import annotations

import inspect

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tokalign.internals.peft import adapters_are_off


def test_a_model_says_that_its_adapters_are_off() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)), LoraConfig(target_modules="all-linear")
    )
    assert not adapters_are_off(model)
    with model.disable_adapter():
        assert adapters_are_off(model)
    assert not adapters_are_off(model)


def test_an_adapter_is_chosen_for_inference() -> None:
    """`CompletionScorer` switches adapters without asking for gradients."""
    assert "inference_mode" in inspect.signature(PeftModel.set_adapter).parameters
