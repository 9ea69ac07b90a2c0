"""A head on the SLM's last hidden state says what it is worth to hand over (CITER, arXiv 2502.01976).

    s_t = σ(f(h_t)),   f = Linear ∘ ReLU ∘ Linear ∘ … : the probability that the LLM's token is to be preferred

CITER trains f on preferences between the two models' tokens: by what follows them (does the rollout still reach the
answer?) where neither token is the reference's. Labels by outcome (`tokalign label --verdict outcome`) say the same.
Deviations: a plain MLP of any depth without the paper's normalisation and dropout, which a saved head does not need; no
training loop that labels anew with each router.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.routing.decode.backend import check_threshold
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy


class ValueHead(nn.Module):
    """f: (N, sizes[0]) -> (N,), logits."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, [*sizes[1:], 1], strict=True))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.to(next(self.parameters()).dtype)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x).squeeze(-1)

    def save(self, file: str | Path) -> None:
        save_file(self.state_dict(), file)

    @classmethod
    def load(cls, file: str | Path) -> ValueHead:
        """From a safetensors file with `layers.0.weight`, `layers.0.bias`, `layers.1.weight` …

        Raises:
            ValueError: another file.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"{file} is no value head ({error}): give a safetensors file.") from None
        weights = [tensors.get(f"layers.{i}.weight") for i in range(len(tensors) // 2)]
        sizes = [weight.shape[1] for weight in weights if weight is not None and weight.ndim == 2]
        head = cls(sizes) if sizes else None
        expected = {} if head is None else {name: tensor.shape for name, tensor in head.state_dict().items()}
        if head is None or expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError(
                f"{file} is no value head: it must hold `layers.0.weight`, `layers.0.bias` and so on, each layer as "
                "wide as the one before, and 1 at the end."
            )
        head.load_state_dict(tensors)
        return head.eval()


class ValuePolicy(RoutingPolicy):
    """Scores of a `ValueHead`, in [0, 1]."""

    needs_hidden = True

    def __init__(self, head: ValueHead, threshold: float = 0.5):
        self.head = head.eval()
        self.threshold = check_threshold(threshold)

    def scores(self, tokens: NextTokens) -> torch.Tensor:
        return self.head(tokens.hidden).float().sigmoid()

    def attach(self, slm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Moves the head beside the SLM."""
        reads, has = self.head.layers[0].in_features, slm.config.get_text_config().hidden_size
        if reads != has:
            raise ValueError(
                f"The value head reads {reads} numbers, the SLM's hidden state has {has}: use its own SLM."
            )
        self.head.to(slm.device)
