"""Model families whose classes in vLLM have a head of ours (`tokalign.routing.decode.vllm.models`)."""

from __future__ import annotations

from transformers import PreTrainedConfig

ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)


def check_architecture(config: PreTrainedConfig) -> str:
    """The model's architecture.

    Raises:
        ValueError: it is none of these.
    """
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The model's architecture is {architecture} but the plug-in for vLLM knows {', '.join(ARCHITECTURES)}: "
            "use the transformers engine."
        )
    return architecture
