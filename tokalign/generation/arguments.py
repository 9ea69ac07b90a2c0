"""The arguments that name an engine and say how it is loaded; `tokalign.generation.engines` loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import PromptArguments, PromptRendering
from tokalign.stage.hashes import model_identity


@dataclass
class SamplingArguments(PromptArguments):
    """How a prompt is read, and what is drawn from the model."""

    num_rollouts: int = field(default=64, metadata={"help": "Completions a problem (paper: 64)."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy. Paper: about 10 wrong answers a problem."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus kept while sampling."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped and counted; unset is what the model can hold."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all completions."})

    def parameters(self, rendering: PromptRendering) -> dict[str, Any]:
        """What a job's parameters say of them; the template's variables stand in its record of the prompts."""
        given = {key: value for key, value in vars(self).items() if key != "chat_template_kwargs"}
        return {**given, "prompt_format": rendering.format}

    @property
    def params(self) -> SamplingParams:
        """What an engine is told of every problem; each gets a seed of its own."""
        return SamplingParams(
            n=self.num_rollouts,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop or ()),
        )


@dataclass
class EngineArguments:
    """The model, and what generates with it."""

    model: str = field(metadata={"help": "Hub id or path of the model (OpenAI engine: of its tokenizer too)."})
    engine: Literal["transformers", "vllm", "openai"] = field(
        default="transformers",
        metadata={
            "help": "What generates: `transformers` (any device), `vllm` in this process, or `openai`, any server "
            "of the OpenAI completions API that returns token ids (vLLM's does)."
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA adapter used unless a call names another: hub id or path (OpenAI engine: model name)."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Hub id or path of the tokenizer, where it is not the model's."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel of transformers, e.g. `sdpa` or `flash_attention_2`."}
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "transformers: `auto` spreads a model over all visible GPUs; unset is one a process."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoint. Only for sources you trust."}
    )
    token_budget: int = field(
        default=65536,
        metadata={"help": "transformers: most rows x (prompt + max_tokens) in one batch; bounds the KV cache."},
    )
    base_urls: list[str] | None = field(
        default=None,
        metadata={"help": "openai: server addresses such as http://host:8000/v1, used in turn."},
    )
    served_model: str | None = field(
        default=None, metadata={"help": "openai: the model's name on the servers, where it is not `model`."}
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "openai: environment variable that holds the key, if any."}
    )
    concurrency: int = field(
        default=64, metadata={"help": "openai: most requests in flight from this process, all servers together."}
    )
    timeout: float = field(default=600.0, metadata={"help": "openai: seconds that one request may take."})
    max_retries: int = field(
        default=6, metadata={"help": "openai: repeats of a failed request, with exponential backoff."}
    )
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "vllm: share of memory to take; unset is vLLM's own (0.3 on CPU)."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "vllm: longest prompt + completion."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: GPUs that share one model."})
    enforce_eager: bool | None = field(
        default=None, metadata={"help": "vllm: no graph capture; unset is vLLM's own (true on CPU)."}
    )
    max_lora_rank: int = field(
        default=16, metadata={"help": "vllm: largest rank of any adapter; 0 serves the base model alone."}
    )
    grammar_backend: Literal["xgrammar", "llguidance"] = field(
        default="xgrammar",
        metadata={"help": "transformers, vllm: library that constrains completions to a JSON Schema, where asked to."},
    )


def engine_identities(arguments: EngineArguments) -> dict[str, str | None]:
    """`model_identity` of the model and the adapter; of a server's model, the name that it has there."""
    remote = arguments.engine == "openai"
    model = (arguments.served_model if remote else None) or arguments.model
    return {"model": model_identity(model, remote=remote), "adapter": model_identity(arguments.adapter, remote=remote)}
