"""The engine that a configuration names, loaded. Each engine's libraries are imported when it is asked for."""

from __future__ import annotations

from tokalign.generation.arguments import EngineArguments
from tokalign.generation.protocol import Engine


def load_engine(arguments: EngineArguments) -> Engine:
    """The engine that `arguments.engine` names, loaded and ready. Only its own dependencies are imported."""
    if arguments.engine == "transformers":
        from tokalign.generation.transformers_engine import TransformersEngine

        return TransformersEngine(arguments)
    if arguments.engine == "vllm":
        from tokalign.generation.vllm_engine import VLLMEngine

        return VLLMEngine(arguments)
    if arguments.engine == "openai":
        from tokalign.generation.openai_engine import OpenAIEngine

        return OpenAIEngine(arguments)
    raise ValueError(f"engine is {arguments.engine!r}: use `transformers`, `vllm` or `openai`.")
