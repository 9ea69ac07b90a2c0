"""vLLM's model classes with a head of ours: the router (`vllm.plugin`) or a probe of the user's (`vllm.probe`).

vLLM runs `compute_logits` eagerly, after the compiled and captured part of a forward pass, on the rows that will be
sampled: the last position of every request, and dummy rows while it measures memory.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.vllm.plugin import check_vllm_version
from tokalign.routing.decode.vllm.probe import LARGEST, OFFSET, make_probe
from tokalign.routing.router.model import TokenRouter


class RoutedHead:
    """Mixin: decides for each row who writes the next token, and stops the rows that the SLM loses.

    Attributes:
        router_threshold: a row is routed if and only if its score is at least this; above 1 the router does not run.
    """

    model: Any
    config: Any
    logits_processor: Any
    router_threshold: float

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        check_vllm_version()
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        settings = getattr(self.config, "token_router", None)
        if settings is None:
            raise ValueError(
                'A routed model needs --hf-overrides with "token_router": {"path": …, "route_token_id": …}: '
                "see tokalign.routing.decode.vllm.plugin."
            )
        with torch.device("cpu"):  # vLLM builds models under the device's and the weights' type
            router = TokenRouter.from_pretrained(settings["path"]).eval()
        router.check_slm(vllm_config.model_config.model)
        threshold = settings.get("threshold")
        self.router_threshold = check_threshold(router.threshold if threshold is None else threshold)
        self.route_token_id: int = settings["route_token_id"]
        self.shared_vocab: int = settings.get("shared_vocab") or self.config.vocab_size
        self._slm: str = vllm_config.model_config.model
        # In a tuple, or the router's weights would count as the model's and be missed in its checkpoint.
        self._router: tuple[TokenRouter] = (router,)
        self._ready = False

    @property
    def compute_logits_local(self) -> Any:
        """Not there: batch-sharded sampling would take each rank's logits past the router; vLLM then turns it off."""
        raise AttributeError("compute_logits_local")

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Logits (N, V) of `hidden_states` (N, d), or None on a rank that does not gather them.

        A routed row has 0 at the route token and −inf elsewhere. Other rows have −inf at the route token and at ids
        that the LLM does not have. A row whose logits are not finite, such as after an overflow, is routed whatever the
        threshold: the SLM has no word for it, and a token drawn from it would be none.
        """
        logits = super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if logits is None or not len(logits):
            return logits
        low, high = logits.aminmax(dim=-1)  # both are not a number if one of the row is
        routed = ~(low.isfinite() & high.isfinite())
        if self.router_threshold <= 1:
            (router,) = self._router
            if not self._ready:
                self._attach(router.to(logits.device))
                self._ready = True
            routed |= router.scores(hidden_states, logits) >= self.router_threshold
        logits[:, self.shared_vocab :] = -torch.inf
        logits[:, self.route_token_id] = -torch.inf
        logits.masked_fill_(routed[:, None], -torch.inf)
        logits[:, self.route_token_id].masked_fill_(routed, 0.0)
        return logits

    def _attach(self, router: TokenRouter) -> None:
        """Let the router look predicted tokens up in the served model's own input embedding.

        Where ranks hold a part each, the module sums the parts over them, which all must call for: they do where all
        have the logits. Otherwise, and on a pipeline stage without the embedding, the router reads its own copy.
        """
        embedding = self.model.embed_tokens
        here = not isinstance(embedding, PPMissingLayer)
        if here and (embedding.tp_size == 1 or self.logits_processor.use_all_gather):
            router.token_embedding = lambda ids: embedding(ids)  # type: ignore[method-assign]
        elif "token" in router.config.inputs:
            router.attach_embedding_of(self._slm)


class ProbedHead:
    """Mixin: writes the number of a probe for each row where a request can read it, and changes nothing else."""

    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        check_vllm_version()
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        settings = getattr(self.config, "token_probe", None)
        if settings is None:
            raise ValueError("A probed model needs the --hf-overrides of tokalign.routing.decode.vllm.probe.")
        with torch.device("cpu"):  # vLLM builds models under the device's and the weights' type
            probe = make_probe(settings)
        self.probe_token_id: int = settings["token_id"]
        # In a tuple, or its weights would count as the model's and be missed in its checkpoint
        self._probe: tuple[Any] = (probe.eval() if isinstance(probe, torch.nn.Module) else probe,)
        self._ready = False

    @property
    def compute_logits_local(self) -> Any:
        """Not there: see `RoutedHead`."""
        raise AttributeError("compute_logits_local")

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Logits (N, V) of `hidden_states` (N, d) in float32, the probe's number in those of the reserved id."""
        logits = super().compute_logits(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if logits is None or not len(logits):
            return logits
        (probe,) = self._probe
        if not self._ready and isinstance(probe, torch.nn.Module):
            probe.to(logits.device)
        self._ready = True
        logits = logits.float()  # a short type would round the number
        numbers = probe(hidden_states, logits)
        if numbers.shape != logits.shape[:1]:
            raise ValueError(
                f"The probe gave {tuple(numbers.shape)} for {len(logits)} rows: return one number for each row."
            )
        numbers = numbers.to(logits).clamp(-LARGEST, LARGEST)
        logits[:, self.probe_token_id] = -torch.inf
        logits[:, self.probe_token_id] = logits.logsumexp(-1) - OFFSET + numbers.nan_to_num(-torch.inf)
        return logits


class RoutedLlamaForCausalLM(RoutedHead, LlamaForCausalLM): ...


class RoutedQwen2ForCausalLM(RoutedHead, Qwen2ForCausalLM): ...


class RoutedQwen3ForCausalLM(RoutedHead, Qwen3ForCausalLM): ...


class RoutedGemmaForCausalLM(RoutedHead, GemmaForCausalLM): ...


class RoutedGemma2ForCausalLM(RoutedHead, Gemma2ForCausalLM): ...


class RoutedGemma3ForCausalLM(RoutedHead, Gemma3ForCausalLM): ...


class ProbedLlamaForCausalLM(ProbedHead, LlamaForCausalLM): ...


class ProbedQwen2ForCausalLM(ProbedHead, Qwen2ForCausalLM): ...


class ProbedQwen3ForCausalLM(ProbedHead, Qwen3ForCausalLM): ...


class ProbedGemmaForCausalLM(ProbedHead, GemmaForCausalLM): ...


class ProbedGemma2ForCausalLM(ProbedHead, Gemma2ForCausalLM): ...


class ProbedGemma3ForCausalLM(ProbedHead, Gemma3ForCausalLM): ...
