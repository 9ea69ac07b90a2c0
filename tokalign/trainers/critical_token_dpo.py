"""Critical-token DPO (arXiv 2411.19943v3, ICML 2025) on TRL's `DPOTrainer`.

    ℓ = −log σ( β Σ_t ρ_t(y⁺) − β Σ_t (1 − s_t) ρ_t(y⁻) ),     ρ_t = log π(y_t|x,y_<t) − log π_ref(y_t|x,y_<t)

s_t is the contrastive score of a rejected token, low on critical ones, read from the dataset's `rejected_contrast`
column. Any other token signal can take its place: its row in `tokalign.signals.registry` says how it becomes a weight
w_t = 1 − s_t in [0, 1], so no rejected token is ever pushed up. TRL's loss sums per-token log-probabilities that the
model returns; they are multiplied by w_t first, policy and reference alike, and TRL computes everything else. So every
loss type and option of `DPOTrainer` goes on working, and weights of 1 give `DPOTrainer` to the last bit.

What the weights do to the rest, each decided here (see docs/critical_token_dpo.md):

- `rewards/*` are the weighted implicit rewards, which the loss uses; `logps/*` are unweighted, so their curves show
  how the policy's log-probabilities move;
- the `sft` term (RPO) is the plain NLL of the chosen completion, whatever the weights;
- WPO (`use_weighting`) weights a pair by the unweighted log-probabilities;
- `ipo` and `sigmoid_norm` divide by the number of tokens, not by the sum of the weights.

The released code computes something else than its paper's equation; `aggregation`, `chosen_weight` and
`end_token_weight` reproduce it (recipes/llama-3-8b-released/).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from tokalign.generation.vocabulary import end_ids
from tokalign.losses import critical_token_dpo_position_loss
from tokalign.stage.errors import ContractError
from tokalign.stage.manifest import manifest_of
from tokalign.trainers.token_preference import TokenPreferenceConfig, TokenPreferenceTrainer

logger = get_logger(__name__)

ALIKE, ENOUGH = 0.01, 256  # weights that differ by less are one number, once so many tokens have been seen
WEIGHTED = {"rejected": ("rejected",), "chosen": ("chosen",), "both": ("chosen", "rejected"), "none": ()}


@dataclass
class CriticalTokenDPOConfig(TokenPreferenceConfig):
    r"""
    Configuration class for the [`CriticalTokenDPOTrainer`].

    This class includes only the parameters that are specific to critical-token DPO. For the others, please refer to
    the [`~trl.DPOConfig`] documentation; its `beta` is the paper's γ: 0.1, as in the released configuration and in
    TRL, where the paper's text says 1.0.

    Parameters:
        > Parameters that control the token weights

        signal (`str`, *optional*, defaults to `"contrast"`):
            Token signal that gives the weights: the dataset columns `chosen_<signal>` and `rejected_<signal>`, a list
            of numbers as long as the ids of that side. Its row in `tokalign.signals.registry` makes weights in [0, 1]
            of them (1 − s_t of `contrast`); one of your own is registered with `tokalign.signals.register`.
        weight_side (`str`, *optional*, defaults to `"rejected"`):
            Side whose tokens are weighted. Possible values are: `"rejected"` (the paper), `"chosen"`, `"both"`, and
            `"none"`, which reads no signal and is plain DPO.
        aggregation (`str`, *optional*, defaults to `"sequence"`):
            How positions become a loss. Possible values are: `"sequence"` (the paper: one logistic function of the
            two weighted sums) and `"position"` (the released code: a logistic function at each position and the mean
            over all of them, prompt and padding included; only with the loss types `"sigmoid"` and `"sft"`).
        chosen_weight (`str`, *optional*, defaults to `"same"`):
            Weights of the chosen side, where `weight_side` weights it. Possible values are: `"same"` (w_t, by the rule
            of the rejected side: 1 − s_t of `contrast`) and `"complement"` (1 − w_t, so s_t: the released code).
        end_token_weight (`float`, *optional*):
            Weight of the token that ends a completion, on the weighted sides. If `None`, it has its signal's as any
            other token; 1 in the released code, which scores no end token.
        estimate_beta (`float`, *optional*):
            β of the contrastive estimate that made the scores. Not used in training: recorded from the manifest of
            the dataset, so that it is saved with the arguments. Setting it to another value than the data's is an
            error.
    """

    signal: str = field(
        default="contrast",
        metadata={
            "help": "Token signal that gives the weights: the dataset columns `chosen_<signal>` and "
            "`rejected_<signal>`, which become weights in [0, 1] by the signal's own rule."
        },
    )
    weight_side: str = field(
        default="rejected",
        metadata={
            "help": "Side whose tokens are weighted: 'rejected' (the paper), 'chosen', 'both', or 'none' (plain DPO).",
            "choices": list(WEIGHTED),
        },
    )
    aggregation: str = field(
        default="sequence",
        metadata={
            "help": "How positions become a loss: 'sequence' (the paper) or 'position' (the released code).",
            "choices": ["sequence", "position"],
        },
    )
    chosen_weight: str = field(
        default="same",
        metadata={
            "help": "Weights of the chosen side: 'same' rule as the rejected one, or its 'complement' (released code).",
            "choices": ["same", "complement"],
        },
    )
    end_token_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of a completion's end token, 1 in the released code; unset: the signal's."},
    )
    estimate_beta: float | None = field(
        default=None,
        metadata={"help": "Beta of the contrastive estimate, recorded from the dataset's manifest."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.weight_side not in WEIGHTED:
            raise ValueError(f"`weight_side` must be one of {list(WEIGHTED)}, got {self.weight_side!r}.")
        if self.aggregation not in ("sequence", "position"):
            raise ValueError(f"`aggregation` must be 'sequence' or 'position', got {self.aggregation!r}.")
        if self.chosen_weight not in ("same", "complement"):
            raise ValueError(f"`chosen_weight` must be 'same' or 'complement', got {self.chosen_weight!r}.")
        if self.chosen_weight == "complement" and "chosen" not in WEIGHTED[self.weight_side]:
            raise ValueError(
                f"`chosen_weight='complement'` is of a side that `weight_side={self.weight_side!r}` does not weight; "
                "set `weight_side` to 'both' or 'chosen', or leave `chosen_weight` out."
            )
        if self.end_token_weight is not None and not (WEIGHTED[self.weight_side] and 0 <= self.end_token_weight <= 1):
            raise ValueError(
                f"`end_token_weight` is {self.end_token_weight} and `weight_side` {self.weight_side!r}; it must lie in "
                "[0, 1], and a side must be weighted."
            )
        if self.aggregation == "position":
            if sorted(self.loss_type) not in (["sigmoid"], ["sft", "sigmoid"]):
                raise ValueError(
                    "`aggregation='position'` replaces the 'sigmoid' loss and combines with 'sft' only, but "
                    f"`loss_type` is {self.loss_type}; use `aggregation='sequence'` for the others."
                )
            if self.ld_alpha is not None or self.use_weighting or self.f_divergence_type != "reverse_kl":
                raise ValueError(
                    "`aggregation='position'` has no sequence log-ratio for `ld_alpha`, `use_weighting` or "
                    "`f_divergence_type` to act on; unset them or use `aggregation='sequence'`."
                )
        if self.use_weighting and "sft" in self.loss_type and "chosen" in WEIGHTED[self.weight_side]:
            raise ValueError(
                "`use_weighting` with an 'sft' loss scales the NLL inside TRL, where it cannot be kept free of "
                "chosen-side token weights; use `weight_side='rejected'` or drop one of the two."
            )


class CriticalTokenDPOTrainer(TokenPreferenceTrainer):
    """
    Trainer for critical-token DPO, proposed in the paper [Critical Tokens Matter: Token-Level Contrastive Estimation
    Enhances LLM's Reasoning Capability](https://huggingface.co/papers/2411.19943). It takes the arguments of
    [`~trl.DPOTrainer`] and keeps its features; see the top of this file for what the token weights touch.

    The dataset's rows hold token ids and their scores (`prompt_ids`, `chosen_ids`, `rejected_ids`,
    `rejected_contrast`, written by `tokalign score contrast`). The ids are trained on as they are: text is never
    tokenised again. With `weight_side="none"` rows of text are tokenised by TRL, and training equals `DPOTrainer`'s.

    Example:

    ```python
    >>> from tokalign.stage.contract import load_stage
    >>> from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer

    >>> trainer = CriticalTokenDPOTrainer(
    ...     model="meta-llama/Meta-Llama-3-8B",
    ...     args=CriticalTokenDPOConfig(output_dir="runs/critical_dpo"),
    ...     train_dataset=load_stage("runs/pairs_scored", signals=["contrast"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`CriticalTokenDPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Defaults to [`~tokalign.trainers.token_preference.DataCollatorForTokenSignals`]. Another one must also
            return `"token_signal"`, the scores.

    All other arguments are those of [`~trl.DPOTrainer`].
    """

    args: CriticalTokenDPOConfig

    _config_class = CriticalTokenDPOConfig
    _needs = "weight"
    _unscored = "`weight_side='none'` for plain DPO"
    _tag_names = ["trl", "tokalign", "critical-token-dpo"]  # noqa: RUF012
    _name = "Critical-token DPO"
    _paper = {  # noqa: RUF012
        "title": "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability",
        "id": "2411.19943",
        "citation": textwrap.dedent("""\
            @article{lin2024critical,
                title   = {{Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability}},
                author  = {Zicheng Lin and Tian Liang and Jiahao Xu and Xing Wang and Ruilin Luo and Chufan Shi and Siheng Li and Yujiu Yang and Zhaopeng Tu},
                journal = {arXiv preprint arXiv:2411.19943},
                year    = 2024,
            }"""),  # noqa: E501
    }

    def _finish_init(self) -> None:
        self._seen = (0.0, 1.0, 0.0)  # tokens, smallest and largest weight since training began
        model = self.accelerator.unwrap_model(self.model)
        self._end_ids = sorted(end_ids(getattr(model, "generation_config", None), self._tokenizer))
        if self.args.aggregation == "position":  # a loss of ours, in the place of TRL's
            self._position_weight = self._take_over("sigmoid")

    def _reads(self, args: CriticalTokenDPOConfig) -> tuple[str, tuple[str, ...]]:
        return args.signal, WEIGHTED[args.weight_side]

    def _check_manifest(self, dataset: Dataset | IterableDataset, args: CriticalTokenDPOConfig, name: str) -> None:
        super()._check_manifest(dataset, args, name)
        beta = (manifest_of(dataset) or {}).get("parameters", {}).get("beta")
        if WEIGHTED[args.weight_side] and beta is not None:
            if args.estimate_beta is not None and args.estimate_beta != beta:
                raise ContractError(
                    f"The scores of the {name} dataset were made with beta {beta}, but `estimate_beta` is "
                    f"{args.estimate_beta}; unset it, or score the pairs again with that beta."
                )
            args.estimate_beta = beta

    # -------------------------------------------------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights, reference = self._token_weights(inputs), self._reference(inputs)
        loss, outputs, answer = self._trl_loss(model, inputs, reference, weights, return_outputs)
        policy, mask = answer.log_probs, inputs["completion_mask"][:, 1:]
        if weights is not None:
            # What TRL made of weighted log-probs and should not have: RPO's NLL, and the curves of the log-probs
            weights = weights.to(policy.device)
            self._log_weights(weights, self._read_tokens(inputs).to(policy.device))
            loss = loss + self._sft_correction(policy, weights, mask)
            self._log_unweighted(policy.detach(), mask)
        if self.args.aggregation == "position":
            ratios, masks = (policy - reference).chunk(2), mask.chunk(2)
            factors = (torch.ones_like(policy) if weights is None else weights).chunk(2)
            losses = critical_token_dpo_position_loss(*ratios, *masks, *factors, beta=self.beta)
            loss = loss + self._position_weight * losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _token_weights(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """w_t (2B, L − 1) beside the predicted tokens, 1 where none is read; None if no side is weighted."""
        weights = self._token_signal(inputs, elsewhere=1.0)
        if weights is None:
            return None
        read, ids = self._read_tokens(inputs), inputs["input_ids"][:, 1:]
        if self.args.chosen_weight == "complement":
            chosen = torch.arange(len(read), device=read.device)[:, None] < len(read) // 2
            weights = torch.where(read & chosen, 1.0 - weights, weights)
        if self.args.end_token_weight is not None:
            # The last token alone, and only if it is one that ends completions: truncation may have cut that off
            last = read & ~F.pad(read[:, 1:], (0, 1))
            ends = torch.isin(ids, torch.tensor(self._end_ids, dtype=ids.dtype, device=ids.device))
            weights = torch.where(last & ends, self.args.end_token_weight, weights)
        return weights

    def _sft_correction(self, policy: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | float:
        """Plain NLL of the chosen completions minus the weighted one that TRL's `sft` term has computed."""
        if "chosen" not in WEIGHTED[self.args.weight_side] or "sft" not in self.loss_types:
            return 0.0
        difference = ((weights - 1.0) * policy).chunk(2)[0]
        sft_weight = sum(w for name, w in zip(self.loss_types, self.loss_weights, strict=True) if name == "sft")
        return sft_weight * difference[mask.chunk(2)[0].bool()].mean()

    def _log_weights(self, weights: torch.Tensor, read: torch.Tensor) -> None:
        """Log the weights on the weighted side's tokens, of all processes; warn once if they tell no tokens apart."""
        infinity = torch.full_like(weights, torch.inf)
        lowest, highest = torch.where(read, weights, infinity).min(), torch.where(read, weights, -infinity).max()
        mine = torch.stack([torch.where(read, weights, 0.0).sum(), read.sum(), lowest, highest])
        total, count, low, high = self.accelerator.gather(mine[None]).unbind(dim=1)
        tokens, low, high = count.sum().item(), low.min().item(), high.max().item()
        if tokens == 0:  # truncation has cut them all
            return
        metrics = self._metrics[self._mode()]
        metrics["token_weight/mean"].append(total.sum().item() / tokens)
        # TRL logs the mean of what is listed: a list of one keeps the extremes of all batches since the last log
        metrics["token_weight/min"] = [min([low, *metrics["token_weight/min"]])]
        metrics["token_weight/max"] = [max([high, *metrics["token_weight/max"]])]

        before = self._seen
        self._seen = tokens, low, high = before[0] + tokens, min(before[1], low), max(before[2], high)
        if before[0] < ENOUGH <= tokens and high - low < ALIKE:
            logger.warning(
                f"All weights of the first {tokens:.0f} tokens lie between {low:.3f} and {high:.3f}: the signal "
                f"{self.args.signal!r} tells no tokens apart, so this is DPO up to β (with one side weighted, up to "
                "that side's strength); check how it was scored, or set `weight_side='none'`."
            )

    def _log_unweighted(self, policy: torch.Tensor, mask: torch.Tensor) -> None:
        """Put the policy's own log-probs where TRL has just logged the weighted ones."""
        sums = self._sequence_logps(policy, mask).view(2, -1).T.contiguous()
        chosen, rejected = self.accelerator.gather(sums).mean(dim=0).tolist()
        metrics = self._metrics[self._mode()]
        metrics["logps/chosen"][-1], metrics["logps/rejected"][-1] = chosen, rejected
