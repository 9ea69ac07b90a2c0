"""The arguments of serving beside those of the pair, for `TrlParser`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokalign.prompts import TemplateArguments


@dataclass
class PairEngineArguments:
    """Where the two models run."""

    engine: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={"help": "`transformers`: both models in this process. `vllm`: the SLM here, the LLM at llm_urls."},
    )
    llm_urls: list[str] | None = field(
        default=None, metadata={"help": "vllm: the large model's servers, such as http://host:8001/v1."}
    )
    llm_name: str | None = field(
        default=None, metadata={"help": "vllm: its name on the servers; unset is the first that they list."}
    )
    llm_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "vllm: environment variable that holds the servers' key, if any."}
    )
    slm_url: str | None = field(
        default=None,
        metadata={
            "help": "vllm: a server of the SLM, started by the command that `tokalign slm-server` prints, instead of "
            "an engine in this process."
        },
    )
    llm_timeout: float = field(
        default=30.0, metadata={"help": "vllm: seconds of silence after which the LLM counts as out of reach."}
    )
    on_llm_outage: Literal["slm", "error"] = field(
        default="slm",
        metadata={"help": "vllm: without the LLM, go on with the SLM alone and say so, or answer 503."},
    )
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "vllm: share of memory for the SLM; unset is vLLM's own (0.3 on CPU)."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "vllm: the SLM's longest prompt + completion."})


@dataclass
class ServerArguments(TemplateArguments):
    """Address, name, key and budget of the server, and what its chat template is given."""

    target_rate: float | None = field(
        default=None, metadata={"help": "Share of LLM tokens that the threshold is steered to; unset leaves it alone."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; the default is this machine only."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    served_model: str | None = field(
        default=None, metadata={"help": "Name of the pair for clients; unset is `slm+llm`, without their folders."}
    )
    api_key_env: str = field(
        default="TOKALIGN_API_KEY",
        metadata={"help": "Environment variable with the key that clients must send; unset variable: none."},
    )


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one client, and all together, may ask for.

    Raises:
        ValueError: a limit below its least, or a request of `max_choices` that could never be admitted.
    """

    max_body_bytes: int = field(default=1_048_576, metadata={"help": "Longest request body, bytes."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Longest prompt; unset: what fits."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longest completion; unset: what fits."})
    max_choices: int = field(default=64, metadata={"help": "Most completions of one request, prompts x n."})
    max_running: int = field(default=64, metadata={"help": "Completions written at once."})
    max_queue: int = field(default=256, metadata={"help": "Completions that may wait; more are refused with 429."})
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds that a request may take, queue included."})
    header_timeout: float = field(
        default=10.0, metadata={"help": "Seconds in which a connection must have sent a request's headers."}
    )
    drain_timeout: float = field(default=30.0, metadata={"help": "Seconds for running requests after SIGTERM."})

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_tokens", "max_choices", "max_running"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: allow at least 1.")
        for name in ("max_queue", "request_timeout", "header_timeout", "drain_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: use 0 or more.")
        if self.max_choices > self.max_running + self.max_queue:
            raise ValueError(
                f"max_choices is {self.max_choices}, more than max_running {self.max_running} and max_queue "
                f"{self.max_queue} together: such a request could never be admitted."
            )
