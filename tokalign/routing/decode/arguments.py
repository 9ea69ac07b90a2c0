"""The arguments of a routed pair, for `TrlParser`: those that generation and serving share, and the samples' own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokalign.generation.arguments import SamplingArguments


@dataclass
class PairArguments:
    """The pair and its router.

    The fields are arguments of `RoutedGenerator.from_pretrained`.
    """

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    llm: str = field(metadata={"help": "Large model with the same tokenizer: hub id or path."})
    router: str | None = field(default=None, metadata={"help": "Trained router of the small model: hub id or path."})
    threshold: float | None = field(
        default=None,
        metadata={"help": "A token goes to the LLM from this score on: unset is the router's own; entropy: nats."},
    )
    score: Literal["argmax", "drawn"] = field(
        default="argmax",
        metadata={"help": "transformers, sampling: the router sees the SLM's likeliest token, or the one it drew."},
    )
    llm_span: int = field(
        default=1, metadata={"help": "Most LLM tokens in a row, where the policy does not tell it (hysteresis, call)."}
    )
    verify: bool = field(
        default=False,
        metadata={
            "help": "transformers: every token is the LLM's own choice; the SLM drafts, the LLM reads the drafts."
        },
    )
    most_draft: int = field(default=16, metadata={"help": "With verify: longest draft before the LLM looks."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."}
    )
    attn_implementation: Literal["sdpa", "eager"] | None = field(
        default=None, metadata={"help": "Attention kernel of transformers."}
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "transformers: device of the SLM, e.g. `cuda:0`, or `auto`; unset is this process's device."},
    )
    llm_device_map: str | None = field(
        default=None, metadata={"help": "transformers: likewise for the LLM; unset is device_map."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoints. Only for sources you trust."}
    )
    llm_wait: str = field(
        default="quarter",
        metadata={
            "help": "transformers: the LLM runs when so many rows wait for it, or a quarter of those in flight; "
            "`auto` measures the models, 0 is at once."
        },
    )
    prefill_chunk: int = field(
        default=512,
        metadata={"help": "transformers: most tokens of long prompts read a step, beside rows that write."},
    )
    token_budget: int = field(
        default=65536,
        metadata={"help": "transformers: most tokens in flight, prompts and what is written; bounds both KV caches."},
    )


@dataclass
class RoutedSamplingArguments(SamplingArguments):
    """Prompts and completions: one greedy answer a problem, unless told otherwise."""

    num_rollouts: int = field(default=1, metadata={"help": "Completions a problem."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})


@dataclass
class SLMServerArguments:
    """The SLM that a stock vLLM server is to run, and its router."""

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    router: str = field(metadata={"help": "Trained router of the small model: hub id or path."})
    llm: str | None = field(
        default=None, metadata={"help": "Large model, to compare vocabularies; give it as to the backend."}
    )
    threshold: float | None = field(default=None, metadata={"help": "At the start; unset is the router's own."})
    route_token_id: int | None = field(default=None, metadata={"help": "Unset chooses one as the backend does."})
    port: int = field(default=8002, metadata={"help": "Port of the server."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoints. Only for sources you trust."}
    )
