r"""Serve a small and a large model as one behind OpenAI's API: the router decides who writes each token.

Both models in this process, on transformers:

    tokalign serve --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router

The small model in this process on stock vLLM (`tokalign[serve,vllm]`), the large one in stock vLLM servers, each on
a GPU of its own:

    CUDA_VISIBLE_DEVICES=0 python -m vllm.entrypoints.openai.api_server --model Qwen/Qwen3-8B --port 8001 \
        --enable-prompt-tokens-details
    CUDA_VISIBLE_DEVICES=1 tokalign serve --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router \
        --engine vllm --llm_urls http://localhost:8001/v1 --target_rate 0.15

Then `curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [{"role": "user",
"content": "Hello"}]}'`. docs/routed_serving.md has the options, limits, metrics and what happens without the LLM.
"""

from __future__ import annotations

import asyncio
import logging

from tokalign.routing.decode.arguments import PairArguments
from tokalign.routing.serve.arguments import PairEngineArguments, ServerArguments, ServerLimits


def main(pair: PairArguments, engine: PairEngineArguments, server: ServerArguments, limits: ServerLimits) -> None:
    try:
        from tokalign.routing.serve import start
    except ModuleNotFoundError as error:
        raise SystemExit(f"Serving needs {error.name}: install tokalign[serve].") from error
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    start.logger.setLevel(logging.INFO)
    try:
        asyncio.run(start.serve(pair, engine, server, limits))
    except (ValueError, ConnectionError, ImportError, start.BackendDied) as error:  # in one sentence
        raise SystemExit(str(error)) from error
