"""From the command's arguments to a running server: the pair on its engine, the settings, the budget."""

from __future__ import annotations

import logging
import os
from dataclasses import MISSING, fields, replace
from typing import Any

from tokalign.prompts import rendering_of
from tokalign.routing.decode.arguments import PairArguments
from tokalign.routing.decode.backend import RoutedBackend
from tokalign.routing.decode.policies import prompts_of_labels
from tokalign.routing.serve.arguments import PairEngineArguments, ServerArguments, ServerLimits
from tokalign.routing.serve.budget import BudgetController
from tokalign.routing.serve.server import BackendDied, GracefulServer, ServerSettings, create_app, exposure_warning

__all__ = ["BackendDied", "load_backend", "serve", "server_settings"]

logger = logging.getLogger(__name__)

# Options of a pair that vLLM has in other words: where its models stand and how their rows are batched
TRANSFORMERS_ONLY = {
    *("device_map", "llm_device_map", "attn_implementation"),
    *("llm_wait", "prefill_chunk", "token_budget", "most_draft"),
}


async def serve(
    pair: PairArguments, engine: PairEngineArguments, server: ServerArguments, limits: ServerLimits
) -> None:
    """Load, serve until SIGTERM, drain and close.

    Raises:
        ValueError, ConnectionError, ImportError: one sentence, for what cannot be served.
        BackendDied: so that the process ends with an error, and whoever watches it starts it again.
    """
    settings = server_settings(pair, engine, server, limits)
    if server.target_rate is not None:  # a bad rate should not cost the loading of two models
        BudgetController(server.target_rate, 0.5)
    backend = load_backend(pair, engine, limits)
    try:
        budget = None if server.target_rate is None else BudgetController(server.target_rate, backend.threshold)
    except ValueError:
        await backend.close()
        raise
    # Prompts as the router knows them: those of its labels, unless the command says otherwise
    recorded = prompts_of_labels(str(pair.router))
    rendering = rendering_of(server, backend.tokenizer, recorded=recorded, of="the router's labels")
    settings = replace(settings, chat_template_kwargs=rendering.chat_template_kwargs)
    warning = exposure_warning(server.host, settings.api_key)
    if warning is not None:
        logger.warning(warning)
    logger.info("Serving %s at threshold %g.", settings.model, backend.threshold)
    await GracefulServer(create_app(backend, settings, budget), server.host, server.port).serve()


def server_settings(
    pair: PairArguments, engine: PairEngineArguments, server: ServerArguments, limits: ServerLimits
) -> ServerSettings:
    """The server's limits and names. The key comes from the environment: a command line is readable by all users."""
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in (pair.slm, pair.llm)]
    return ServerSettings(
        model=server.served_model or "+".join(names),
        api_key=os.environ.get(server.api_key_env),
        llm_required=engine.engine == "vllm" and engine.on_llm_outage == "error",
        **vars(limits),
    )


def changed(arguments: PairArguments | PairEngineArguments) -> set[str]:
    """Options that are not at their defaults, without those that have none and the engine itself."""
    return {
        each.name
        for each in fields(arguments)
        if each.name != "engine" and each.default is not MISSING and getattr(arguments, each.name) != each.default
    }


def load_backend(pair: PairArguments, engine: PairEngineArguments, limits: ServerLimits) -> RoutedBackend:
    """The pair, ready to generate in the running event loop.

    Raises:
        ValueError, ConnectionError, ImportError: one sentence, for a pair that cannot be served.
    """
    if pair.router is None:
        raise ValueError("Serving needs --router, the trained router of the small model.")
    if engine.engine == "transformers":
        for name in changed(engine):
            raise ValueError(f"--{name} belongs to --engine vllm: add that, or leave it out.")
        from tokalign.routing.decode.generator import RoutedGenerator
        from tokalign.routing.decode.transformers_backend import TransformersBackend

        generator = RoutedGenerator.from_pretrained(**vars(pair), max_rows=limits.max_running)
        return TransformersBackend(generator)
    if pair.verify:
        raise ValueError(
            "--verify needs --engine transformers: vLLM's own speculative decoding drafts by a small model."
        )
    if pair.score != "argmax":
        raise ValueError(
            "--score drawn needs --engine transformers: vLLM draws a token after the router has scored it."
        )
    for name in changed(pair) & TRANSFORMERS_ONLY:
        raise ValueError(f"--{name} belongs to --engine transformers: vLLM's own options say that, leave it out.")
    from tokalign.routing.decode.vllm.backend import VLLMBackend

    options = {name: getattr(engine, name) for name in ("gpu_memory_utilization", "max_model_len")}
    slm_options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return VLLMBackend(
        pair.slm,
        pair.router,
        engine.llm_urls or [],
        llm=pair.llm,
        llm_name=engine.llm_name,
        threshold=pair.threshold,
        slm_url=engine.slm_url,
        dtype=pair.dtype,
        slm_options=slm_options,
        llm_span=pair.llm_span,
        on_llm_outage=engine.on_llm_outage,
        timeout=limits.request_timeout,
        llm_timeout=engine.llm_timeout,
        api_key_env=engine.llm_key_env,
        trust_remote_code=pair.trust_remote_code,
    )
