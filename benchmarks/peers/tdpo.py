r"""TDPO, token-level DPO (arXiv 2404.11999, ICML 2024): DPO with a forward-KL term, a peer for the benchmarks.

    python benchmarks/peers/tdpo.py --config recipes/ledger/dpo.yaml --learning_rate 3e-4 --output_dir runs/tdpo

(after `make quickstart`, which makes the base model and the pairs)

    u = Σ_t ρ_t(y_w) − Σ_t ρ_t(y_l),     D(y) = Σ_t KL( π_ref(·|x, y_<t) ‖ π(·|x, y_<t) )
    TDPO1:  ℓ = −log σ( β u − β (D(y_l) − D(y_w)) )
    TDPO2:  ℓ = −log σ( β u − α β (D(y_l) − sg D(y_w)) )

sg stops the gradient, so TDPO2 keeps the rejected side near the reference and leaves the chosen one free. α = 0 is DPO.

Rows are pairs as every preference trainer of this package reads them; columns of signals are not looked at. Cost beside
DPO's: no further pass through the layers, but the head runs twice more forward, and once more backward, over completion
tokens, for policy and reference; logits exist for `CHUNK` tokens at a time. `rewards/*` are DPO's implicit rewards.
Written for one device or data parallel processes, not for sharded weights (ZeRO-3, FSDP).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from trl import ModelConfig, TrlParser

from tokalign.cli.train import DataArguments, train
from tokalign.stage.processes import end_processes
from tokalign.trainers.token_preference import TokenPreferenceConfig, TokenPreferenceTrainer

CHUNK = 1024  # completion tokens whose logits exist at once
SCALED_HEADS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def forward_kl(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL( π_ref ‖ π ) in nats of every position, (N, V), (N, V) -> (N,); gradients flow into `logits`."""
    reference = reference_logits.float().log_softmax(-1)
    return (reference.exp() * (reference - logits.float().log_softmax(-1))).sum(-1)


def tdpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> torch.Tensor:
    """The loss of each pair (arXiv 2404.11999, TDPO1 and TDPO2; see the top of this file).

    Args:
        chosen_logratios, rejected_logratios: (B,) Σ_t ρ_t over the completion, nats.
        chosen_kl, rejected_kl: (B,) D, the forward KL summed over the completion's positions, nats.
        beta: DPO's β.
        alpha: weight of the KL term of "tdpo2" (paper: 0.5); "tdpo1" has none.
        variant: "tdpo1" or "tdpo2".

    Returns:
        (B,) losses.

    Raises:
        ValueError: unknown variant.
    """
    if variant == "tdpo1":
        difference = rejected_kl - chosen_kl
    elif variant == "tdpo2":
        difference = alpha * (rejected_kl - chosen_kl.detach())
    else:
        raise ValueError(f"variant must be 'tdpo1' or 'tdpo2', got {variant!r}.")
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - difference))


@dataclass
class TDPOConfig(TokenPreferenceConfig):
    r"""
    Configuration class for the [`TDPOTrainer`]; for all other parameters see [`~trl.DPOConfig`].

    `precompute_ref_log_probs` is switched off: TDPO compares whole distributions, and no log-probs hold them.

    Parameters:
        tdpo_alpha (`float`, *optional*, defaults to `0.5`):
            Weight α of TDPO2's KL term; 0 is DPO.
        tdpo_variant (`str`, *optional*, defaults to `"tdpo2"`):
            `"tdpo1"` or `"tdpo2"`.
    """

    tdpo_alpha: float = field(default=0.5, metadata={"help": "Weight of TDPO2's KL term; 0 is DPO."})
    tdpo_variant: str = field(default="tdpo2", metadata={"help": "'tdpo1' or 'tdpo2'.", "choices": ["tdpo1", "tdpo2"]})

    def __post_init__(self):
        super().__post_init__()
        if self.tdpo_variant not in ("tdpo1", "tdpo2"):
            raise ValueError(f"`tdpo_variant` must be 'tdpo1' or 'tdpo2', got {self.tdpo_variant!r}.")
        if list(self.loss_type) != ["sigmoid"] or self.loss_weights not in (None, [1.0]):
            raise ValueError(f"TDPO takes the place of the 'sigmoid' loss alone, but `loss_type` is {self.loss_type}.")
        if self.ld_alpha is not None or self.use_weighting or self.f_divergence_type != "reverse_kl":
            raise ValueError("TDPO is defined without `ld_alpha`, `use_weighting` and `f_divergence_type`; unset them.")
        self.precompute_ref_log_probs = False


class TDPOTrainer(TokenPreferenceTrainer):
    """
    Trainer for TDPO ([Token-level Direct Preference Optimization](https://huggingface.co/papers/2404.11999)). It takes
    the arguments of [`~trl.DPOTrainer`]; with `peft_config` the reference is the model with its adapter off.
    """

    args: TDPOConfig

    _config_class = TDPOConfig
    _tag_names = ["trl", "tokalign", "tdpo"]  # noqa: RUF012
    _name = "TDPO"
    _paper = {  # noqa: RUF012
        "title": "Token-level Direct Preference Optimization",
        "id": "2404.11999",
        "citation": textwrap.dedent("""\
            @inproceedings{zeng2024token,
                title     = {{Token-level Direct Preference Optimization}},
                author    = {Yongcheng Zeng and Guoqing Liu and Weiyu Ma and Ning Yang and Haifeng Zhang and Jun Wang},
                booktitle = {Proceedings of the 41st International Conference on Machine Learning},
                year      = 2024,
            }"""),
    }

    def _finish_init(self) -> None:
        config = self.model.config.get_text_config()
        if scaled := [name for name in SCALED_HEADS if getattr(config, name, None) not in (None, 1.0)]:
            raise ValueError(f"TDPO here takes a plain LM head, but the model's configuration sets `{scaled[0]}`.")

    def _reads(self, args: TDPOConfig) -> tuple[str, tuple[str, ...]]:
        return "", ()

    @contextmanager
    def _hidden_states(self) -> Iterator[list[torch.Tensor]]:
        """Inside, the last hidden states (2B, L, H) of every forward, in the order of the calls."""
        seen: list[torch.Tensor] = []
        models = [_causal_lm(m) for m in (self._policy(), self.ref_model) if m is not None]
        handles = [
            model.base_model.register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
            for model in models
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self._hidden_states() as hidden:
            reference = self._reference(inputs)
            # TRL's own loss is plain DPO's; its forward and metrics are what is kept
            _, outputs, answer = self._trl_loss(model, inputs, reference, return_outputs=return_outputs)
        mask = inputs["completion_mask"][:, 1:].bool()
        ratios = (answer.log_probs.sum(dim=1) - reference.sum(dim=1)).chunk(2)
        divergences = self._sequence_kl(hidden[1], hidden[0], mask).chunk(2)
        losses = tdpo_loss(
            *ratios, *divergences, beta=self.beta, alpha=self.args.tdpo_alpha, variant=self.args.tdpo_variant
        )
        metrics = self._metrics[self._mode()]
        for side, values in zip(("chosen", "rejected"), divergences, strict=True):
            metrics[f"tdpo/kl/{side}"].append(self.accelerator.gather(values.detach()).mean().item())
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _sequence_kl(self, policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """D of every sequence, (2B, L, H) hidden states and mask (2B, L − 1) -> (2B,)."""
        head = _causal_lm(self._policy()).get_output_embeddings()
        reference_head = head if self.ref_model is None else _causal_lm(self.ref_model).get_output_embeddings()

        def chunk_kl(policy_part: torch.Tensor, reference_part: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                reference_logits = F.linear(reference_part, reference_head.weight, reference_head.bias)
            return forward_kl(reference_logits, F.linear(policy_part, head.weight, head.bias))

        # Prompt-learning PEFT puts virtual tokens first, so places are counted from the end
        places = [states[:, :-1][:, -mask.size(1) :][mask] for states in (policy, reference)]
        parts = [
            # Recomputed in the backward pass: the logits of one chunk exist at a time
            checkpoint(chunk_kl, a, b, use_reentrant=False)
            for a, b in zip(*(states.split(CHUNK) for states in places), strict=True)
        ]
        per_token = torch.zeros(mask.shape, device=policy.device).masked_scatter(mask, torch.cat(parts))
        return per_token.sum(dim=1)


def _causal_lm(model: Any) -> Any:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass
class TDPOScriptArguments(DataArguments):
    """Data as our trainings take it, and one option of recipes/critical_dpo.py, so that DPO's YAML files serve both."""

    weight_side: str = field(
        default="none", metadata={"help": "Only 'none': TDPO weights no tokens.", "choices": ["none"]}
    )


def main(script_args: TDPOScriptArguments, training_args: TDPOConfig, model_args: ModelConfig) -> TDPOTrainer:
    """Train, save to `training_args.output_dir`, return the trainer."""
    if script_args.weight_side != "none":
        raise ValueError(f"`weight_side` is {script_args.weight_side!r}, but TDPO weights no tokens; set 'none'.")
    needs = "a folder of pairs or a dataset on the hub"
    trainer = train(TDPOTrainer, script_args, training_args, model_args, needs=needs)
    end_processes()
    return trainer


if __name__ == "__main__":
    main(*TrlParser((TDPOScriptArguments, TDPOConfig, ModelConfig)).parse_args_and_config())
