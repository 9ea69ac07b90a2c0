"""Serve a small and a large model as one behind OpenAI's API: the router decides who writes each token.

Both models in this process, on transformers:

    python scripts/serve_routed.py --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router

The small model in this process on stock vLLM, the large one in stock vLLM servers:

    python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B --port 8001 --enable-prompt-tokens-details
    python scripts/serve_routed.py --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router \
        --engine vllm --llm_urls http://localhost:8001/v1 --target_rate 0.12

Then `curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user",
"content": "Hello"}]}'`. docs/routed_serving.md has the options, limits, metrics and what happens without the LLM.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import TrlParser

from tokalign.routing.decode.backend import RoutedBackend
from tokalign.routing.serve.budget import BudgetController
from tokalign.routing.serve.server import GracefulServer, ServerSettings, create_app, exposure_warning

logger = logging.getLogger(__name__)


@dataclass
class ServeRoutedArguments:
    """Arguments of serving."""

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    llm: str = field(metadata={"help": "Large model with the same tokenizer: hub id or path."})
    router: str = field(metadata={"help": "Trained router of the small model: hub id or path."})
    threshold: float | None = field(
        default=None, metadata={"help": "A token goes to the LLM from this score on; unset is the router's own."}
    )
    target_rate: float | None = field(
        default=None, metadata={"help": "Share of LLM tokens that the threshold is steered to; unset leaves it alone."}
    )
    llm_span: int = field(default=1, metadata={"help": "Most tokens that the LLM writes before it asks the SLM."})
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
        metadata={"help": "vllm: a server of the SLM started with the plug-in, instead of an engine in this process."},
    )
    llm_timeout: float = field(
        default=30.0, metadata={"help": "vllm: seconds of silence after which the LLM counts as out of reach."}
    )
    on_llm_outage: Literal["slm", "error"] = field(
        default="slm",
        metadata={"help": "vllm: without the LLM, go on with the SLM alone and say so, or answer 503."},
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
    max_body_bytes: int = field(default=2**20, metadata={"help": "Longest request body."})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "Longest prompt; unset: what fits."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longest completion; unset: what fits."})
    max_choices: int = field(default=64, metadata={"help": "Most completions of one request, prompts x n."})
    max_running: int = field(default=64, metadata={"help": "Completions written at once."})
    max_queue: int = field(default=256, metadata={"help": "Completions that may wait; more are refused with 429."})
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds that a request may take, queue included."})
    drain_timeout: float = field(default=30.0, metadata={"help": "Seconds for running requests after SIGTERM."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "transformers: device of the SLM, e.g. `cuda:0`, or `auto`."}
    )
    llm_device_map: str | None = field(default=None, metadata={"help": "transformers: the LLM's; unset: device_map."})
    token_budget: int = field(
        default=65536, metadata={"help": "transformers: most rows x (prompt + max_tokens) at once; bounds both caches."}
    )
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "vllm: share of memory for the SLM; unset is vLLM's own (0.3 on CPU)."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "vllm: the SLM's longest prompt + completion."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoints. Only for sources you trust."}
    )


def settings_of(arguments: ServeRoutedArguments) -> ServerSettings:
    """The server's limits and names. The key comes from the environment: a command line is readable by all users."""
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in (arguments.slm, arguments.llm)]
    limits = ("max_body_bytes", "max_prompt_tokens", "max_tokens", "max_choices", "max_running", "max_queue")
    limits += ("request_timeout", "drain_timeout")
    return ServerSettings(
        model=arguments.served_model or "+".join(names),
        api_key=os.environ.get(arguments.api_key_env),
        llm_required=arguments.engine == "vllm" and arguments.on_llm_outage == "error",
        **{name: getattr(arguments, name) for name in limits},
    )


def load_backend(arguments: ServeRoutedArguments) -> RoutedBackend:
    """The pair, ready to generate in the running event loop.

    Raises:
        ValueError, ConnectionError: one sentence, for a pair that cannot be served.
    """
    remote = {"llm_urls": arguments.llm_urls, "slm_url": arguments.slm_url, "llm_name": arguments.llm_name}
    if arguments.engine == "transformers":
        for name, value in remote.items():
            if value is not None:
                raise ValueError(f"--{name} belongs to --engine vllm: add that, or leave it out.")
        from tokalign.routing.decode.generator import RoutedGenerator
        from tokalign.routing.decode.transformers_backend import TransformersBackend

        return TransformersBackend(
            RoutedGenerator.from_pretrained(
                arguments.slm,
                arguments.llm,
                arguments.router,
                threshold=arguments.threshold,
                dtype=arguments.dtype,
                device_map=arguments.device_map,
                llm_device_map=arguments.llm_device_map,
                trust_remote_code=arguments.trust_remote_code,
                llm_span=arguments.llm_span,
                token_budget=arguments.token_budget,
                max_rows=arguments.max_running,
            )
        )
    from tokalign.routing.decode.vllm.backend import VLLMBackend
    from tokalign.routing.router.model import TokenRouter

    TokenRouter.from_pretrained(arguments.router).check_slm(arguments.slm)
    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("gpu_memory_utilization", "max_model_len")
        if getattr(arguments, name) is not None
    }
    return VLLMBackend(
        arguments.slm,
        arguments.router,
        arguments.llm_urls or [],
        llm=arguments.llm,
        llm_name=arguments.llm_name,
        threshold=arguments.threshold,
        slm_url=arguments.slm_url,
        dtype=arguments.dtype,
        slm_options=options,
        llm_span=arguments.llm_span,
        on_llm_outage=arguments.on_llm_outage,
        timeout=arguments.request_timeout,
        llm_timeout=arguments.llm_timeout,
        api_key_env=arguments.llm_key_env,
        trust_remote_code=arguments.trust_remote_code,
    )


async def serve(arguments: ServeRoutedArguments) -> None:
    """Load, serve until SIGTERM, drain and close."""
    settings = settings_of(arguments)
    if arguments.target_rate is not None:  # a bad rate should not cost the loading of two models
        BudgetController(arguments.target_rate, 0.5)
    backend = load_backend(arguments)
    try:
        budget = None if arguments.target_rate is None else BudgetController(arguments.target_rate, backend.threshold)
    except ValueError:
        await backend.close()
        raise
    warning = exposure_warning(arguments.host, settings.api_key)
    if warning is not None:
        logger.warning(warning)
    logger.info("Serving %s at threshold %g.", settings.model, backend.threshold)
    await GracefulServer(create_app(backend, settings, budget), arguments.host, arguments.port).serve()


def main(arguments: ServeRoutedArguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        asyncio.run(serve(arguments))
    except (ValueError, ConnectionError, ImportError) as error:  # what is wrong with the pair, in one sentence
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    parser = TrlParser(ServeRoutedArguments)
    main(*parser.parse_args_and_config())
