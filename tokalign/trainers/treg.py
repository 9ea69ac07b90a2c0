"""T-REG (arXiv 2412.02685, ACL 2025) on TRL's `DPOTrainer`: preference training regularised by token rewards.

    L = L_base + α w ( L_reg(x, y_w) + L_reg(x, y_l) ),     L_reg(x, y) = − Σ_t β r̂_t log π(y_t|x, y_<t)

r̂_t ∈ [−0.5, 0.5] is what the model itself thinks of a token, by contrastive prompting: the columns
`chosen_token_reward` and `rejected_token_reward` (`tokalign score token-reward`), or, where the dataset has none, the
reference's answer to the same two revision prompts, asked for each batch. w = σ(r(y_l) − r(y_w)) is the factor of the
base loss's own gradient, without a gradient of its own. TRL computes the base loss, but for SimPO's, which it does not
have: −log σ(β mean log π(y_w) − β mean log π(y_l) − γ). α = 0 leaves nothing but the base loss.

The rows of the paper's ablation, by configuration (recipes/ledger/ has them all):

    DPO                         alpha: 0
    + SFT on y_w                alpha: 0, loss_type: [sigmoid, sft]
    T-REG, w fixed              sequence_weight: static
    T-REG, implicit reward      reward_source: implicit, or signal: implicit_reward (of a DPO model trained before)
    T-REG                       the defaults
    SimPO, SimPO-REG            base_loss: simpo, with alpha: 0 or not

Choices of ours, where the paper leaves one:

- with SimPO the regulariser is divided by the number of tokens, as SimPO's sequence reward is, and w holds its margin
  γ, as SimPO's gradient does; `regularizer_reduction: sum` is the sum over tokens that DPO has;
- DPO's implicit reward becomes a token reward by the same map as contrastive prompting, σ(log π − log π_ref) − 0.5;
- w uses DPO's implicit rewards whatever TRL loss type the base is;
- WPO (`use_weighting`) says how much a pair counts, so its weight multiplies the pair's regulariser as it does the
  pair's base loss: α keeps its meaning, and w stays the factor of the base loss's own gradient.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import AutoConfig

from tokalign.data.revision import load_templates, revision_prompts, templates_hash
from tokalign.internals.trl import global_then_local_main_first, pad
from tokalign.losses import pair_weight, sequence_rewards, token_reward_regularizer, wpo_weights
from tokalign.prompts import RECORD, PromptRendering
from tokalign.signals.prompting import token_reward
from tokalign.stage.errors import ContractError
from tokalign.stage.manifest import manifest_of
from tokalign.trainers.token_preference import (
    REVISION,
    SIDES,
    DataCollatorForTokenSignals,
    TokenPreferenceConfig,
    TokenPreferenceTrainer,
    drop_rows,
)

SELF_GENERATED = "token_reward"  # the signal that the reference can give on the fly
REWARDS = {f"{side}_ids": f"{side}_{SELF_GENERATED}" for side in SIDES}
PROMPTS = {(side, kind): f"{side}_{kind}_prompt_ids" for kind in ("better", "worse") for side in SIDES}


@dataclass
class TRegConfig(TokenPreferenceConfig):
    r"""
    Configuration class for the [`TRegTrainer`].

    This class includes only the parameters that are specific to T-REG. For the others, please refer to the
    [`~trl.DPOConfig`] documentation.

    Parameters:
        > Parameters that control the base loss

        base_loss (`str`, *optional*, defaults to `"dpo"`):
            What is regularised. Possible values are: `"dpo"` (whatever `loss_type` says) and `"simpo"` (SimPO, which
            has no reference; set `beta` to SimPO's, 2 to 10).
        simpo_gamma (`float`, *optional*, defaults to `0.5`):
            SimPO's target reward margin γ. SimPO's own recipes give it as γ/β (0.5 for gemma-2-9b-it: γ = 5 at
            β = 10).

        > Parameters that control the regulariser

        alpha (`float`, *optional*, defaults to `0.25`):
            Weight of the regulariser (paper: 0.1, 0.25 or 0.5). 0 is the base loss, and reads no rewards.
        sequence_weight (`str`, *optional*, defaults to `"gradient"`):
            Weight w of a pair. Possible values are: `"gradient"` (the paper: σ(r(y_l) − r(y_w)), as in the base
            loss's gradient) and `"static"` (1).
        regularizer_reduction (`str`, *optional*):
            `"sum"` over tokens or `"mean"`. Defaults to the base loss's own: sum for DPO, mean for SimPO.

        > Parameters that control the token rewards

        reward_source (`str`, *optional*, defaults to `"signal"`):
            Where r̂ comes from. Possible values are: `"signal"` (columns of the dataset; where they are absent and
            `signal` is `"token_reward"`, the reference is asked on the fly) and `"implicit"` (DPO's implicit reward of
            the policy in training).
        signal (`str`, *optional*, defaults to `"token_reward"`):
            Token signal that holds the rewards: the columns `chosen_<signal>` and `rejected_<signal>`. One that is not
            a reward becomes one by its row in `tokalign.signals.registry`: r̂ = 0.5 − its weight.
        reward_offset (`float`, *optional*):
            For data stored with an offset: subtracted from the values as they are, in place of the signal's own rule;
            the differences must lie in [−0.5, 0.5].
        templates (`str`, *optional*, defaults to `"general"`):
            Revision prompts for rewards on the fly: `"general"`, `"math"`, `"code"`, `"ledger"`, or the path of a JSON
            file (see `tokalign/data/revision.py`).
        prompt_format (`str`, *optional*, defaults to `"chat"`):
            How revision prompts become ids: `"chat"` by the chat template, `"raw"` as they are (base models).
    """

    base_loss: str = field(
        default="dpo", metadata={"help": "What is regularised: 'dpo' or 'simpo'.", "choices": ["dpo", "simpo"]}
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's target reward margin γ."})
    alpha: float = field(default=0.25, metadata={"help": "Weight of the regulariser; 0 is the base loss."})
    sequence_weight: str = field(
        default="gradient",
        metadata={
            "help": "Weight of a pair's regulariser: 'gradient' (the paper) or 'static' (1).",
            "choices": ["gradient", "static"],
        },
    )
    regularizer_reduction: str | None = field(
        default=None,
        metadata={
            "help": "'sum' over tokens or 'mean'; unset is sum for DPO and mean for SimPO.",
            "choices": ["sum", "mean"],
        },
    )
    reward_source: str = field(
        default="signal",
        metadata={
            "help": "Where token rewards come from: 'signal' (the dataset, or the reference where it has none) or "
            "'implicit' (the policy's DPO reward).",
            "choices": ["signal", "implicit"],
        },
    )
    signal: str = field(
        default=SELF_GENERATED,
        metadata={"help": "Signal with the rewards: the columns `chosen_<signal>` and `rejected_<signal>`."},
    )
    reward_offset: float | None = field(
        default=None,
        metadata={"help": "Subtracted from stored values, to bring them into [-0.5, 0.5]; unset: the signal's rule."},
    )
    templates: str = field(
        default="general", metadata={"help": "Revision prompts of rewards on the fly: a name or a JSON file."}
    )
    prompt_format: str = field(
        default="chat",
        metadata={
            "help": "Revision prompts by the chat template ('chat') or as they are ('raw').",
            "choices": ["chat", "raw"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, values in (
            ("base_loss", ("dpo", "simpo")),
            ("sequence_weight", ("gradient", "static")),
            ("regularizer_reduction", (None, "sum", "mean")),
            ("reward_source", ("signal", "implicit")),
            ("prompt_format", ("chat", "raw")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {list(values)}, got {getattr(self, name)!r}.")
        if self.alpha < 0:
            raise ValueError(f"`alpha` must not be negative, got {self.alpha}; 0 is the base loss.")
        if self.base_loss == "simpo":
            if sorted(self.loss_type) not in (["sigmoid"], ["sft", "sigmoid"]):
                raise ValueError(
                    "`base_loss='simpo'` takes the place of the 'sigmoid' loss and combines with 'sft' only, but "
                    f"`loss_type` is {self.loss_type}; use `base_loss='dpo'` for the others."
                )
            if self.ld_alpha is not None or self.use_weighting or self.f_divergence_type != "reverse_kl":
                raise ValueError(
                    "`base_loss='simpo'` has no log-ratio to a reference for `ld_alpha`, `use_weighting` or "
                    "`f_divergence_type` to act on; unset them or use `base_loss='dpo'`."
                )
            if self.sync_ref_model and self.reward_source != "implicit":
                raise ValueError("`base_loss='simpo'` has no reference for `sync_ref_model` to update; unset it.")

    @property
    def reduction(self) -> str:
        """The regulariser's reduction, after defaults."""
        return self.regularizer_reduction or ("mean" if self.base_loss == "simpo" else "sum")


@dataclass
class DataCollatorForTReg(DataCollatorForTokenSignals):
    """
    [`~tokalign.trainers.token_preference.DataCollatorForTokenSignals`] that also lays out the sequences from which the
    reference gives token rewards, if the examples hold the prompts for them: `"revision_input_ids"`,
    `"revision_attention_mask"` and `"revision_completion_mask"` of shape (4B, L'), ordered chosen after the better
    prompt, rejected after the better, chosen after the worse, rejected after the worse. The completion mask is 1 on
    the tokens that the policy is trained on, so that truncation is the same.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if next(iter(PROMPTS.values())) in examples[0]:
            batch |= self._revision_batch(examples)
        return batch

    def _revision_batch(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
        for (side, _), column in PROMPTS.items():
            for example in examples:
                prompt, completion = example[column], example[f"{side}_ids"]
                # What the policy sees of the completion: TRL cuts prompt + completion, and predicts no first token
                positions = self._truncate(list(range(len(example["prompt_ids"]) + len(completion))))
                first, last = positions[0] + 1, positions[-1]
                kept = [first <= len(example["prompt_ids"]) + t <= last for t in range(len(completion))]
                ids = [*prompt, *completion]
                rows["input_ids"].append(torch.tensor(ids))
                rows["attention_mask"].append(torch.ones(len(ids), dtype=torch.long))
                rows["completion_mask"].append(torch.tensor([0] * len(prompt) + [int(k) for k in kept]))
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "completion_mask": 0}
        return {
            f"{REVISION}{name}": pad(
                tensors, fill[name], padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
            )
            for name, tensors in rows.items()
        }


class TRegTrainer(TokenPreferenceTrainer):
    """
    Trainer for T-REG, proposed in the paper [T-REG: Preference Optimization with Token-Level Reward
    Regularization](https://huggingface.co/papers/2412.02685). It takes the arguments of [`~trl.DPOTrainer`] and keeps
    its features; see the top of this file for the configurations of the paper's ablation.

    Example:

    ```python
    >>> from tokalign.stage.contract import load_stage
    >>> from tokalign.trainers import TRegConfig, TRegTrainer

    >>> trainer = TRegTrainer(
    ...     model="meta-llama/Meta-Llama-3-8B-Instruct",
    ...     args=TRegConfig(output_dir="runs/treg", alpha=0.25),
    ...     train_dataset=load_stage("runs/pairs_rewarded", signals=["token_reward"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`TRegConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Defaults to [`DataCollatorForTReg`]. Another one must also return `"token_signal"`, the rewards.

    All other arguments are those of [`~trl.DPOTrainer`]. A dataset without reward columns may also be TRL's own text.
    """

    args: TRegConfig

    _config_class = TRegConfig
    _needs = "reward"
    _collator = DataCollatorForTReg
    _own_columns = tuple(PROMPTS.values())
    _unscored = "`alpha=0` for the base loss"

    _tag_names = ["trl", "tokalign", "t-reg"]  # noqa: RUF012
    _name = "T-REG"
    _paper = {  # noqa: RUF012
        "title": "T-REG: Preference Optimization with Token-Level Reward Regularization",
        "id": "2412.02685",
        "citation": textwrap.dedent("""\
            @inproceedings{zhou2025treg,
                title     = {{T-REG: Preference Optimization with Token-Level Reward Regularization}},
                author    = {Wenxuan Zhou and Shujian Zhang and Lingxiao Zhao and Tao Meng},
                booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
                year      = 2025,
            }"""),
    }

    # ------------------------------------------------------------------------------------------------------- set-up

    def _start_init(self, model: Any, args: TRegConfig, train_dataset: Any) -> None:
        asks = args.alpha > 0 and args.reward_source == "signal" and args.signal == SELF_GENERATED
        columns = set() if train_dataset is None else set(next(iter(train_dataset)))  # TRL refuses None
        self._on_the_fly = asks and not columns & set(REWARDS.values())
        self._compares = args.base_loss == "dpo" or (args.alpha > 0 and args.reward_source == "implicit")
        if self._on_the_fly:
            self._templates = load_templates(args.templates)
            self._positions = _positions(model, args)
        # SimPO without a reference: TRL shall not build one, and finds `_precompute_ref_logps` with nothing to do
        self._precompute = args.precompute_ref_log_probs
        args.precompute_ref_log_probs = self._precompute or not (self._compares or self._on_the_fly)

    def _finish_init(self) -> None:
        self.precompute_ref_logps = self.args.precompute_ref_log_probs = self._precompute
        if self.args.base_loss == "simpo":
            self._simpo_weight = self._take_over("sigmoid")

    def _reads(self, args: TRegConfig) -> tuple[str, tuple[str, ...]]:
        reads = args.alpha > 0 and args.reward_source == "signal" and not self._on_the_fly
        return args.signal, SIDES if reads else ()

    def _collates(self) -> tuple[str, tuple[str, ...]]:
        if self._on_the_fly and self.precompute_ref_logps:
            return self.args.signal, SIDES  # asked once, before training
        return super()._collates()

    def _conversion(self, signal: str, args: TRegConfig) -> tuple[tuple[float, float], Callable[[Any], Any]]:
        offset = args.reward_offset
        if offset is None:
            return super()._conversion(signal, args)
        return (offset - 0.5, offset + 0.5), lambda values: values - offset

    # -------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._on_the_fly:
            dataset = self._add_revision_prompts(dataset, args, dataset_name)
        return dataset

    def _add_revision_prompts(self, dataset: Any, args: TRegConfig, name: str) -> Any:
        """Ids of the two revision prompts of each side; rows for which the model lacks positions are dropped."""
        columns = set(next(iter(dataset)))
        if columns.issuperset(PROMPTS.values()):
            return dataset  # prepared before
        if columns.issuperset(REWARDS.values()):
            if self._precompute:
                return dataset  # the training rows get their rewards now, and all are read from then on
            raise ContractError(
                f"The {name} dataset holds token rewards and the train dataset none, so the reference is asked for all "
                f"of them; score the training pairs with `tokalign score token-reward` too, or remove the columns "
                f"{' and '.join(f'`{column}`' for column in REWARDS.values())} from the {name} dataset."
            )
        if missing := {"prompt", *SIDES} - columns:
            raise ContractError(
                f"The {name} dataset has no column `{sorted(missing)[0]}`, whose text the revision prompts quote; add "
                "it, or score the pairs with `tokalign score token-reward`."
            )
        templates, tokenizer = self._templates, self._tokenizer
        record = (manifest_of(dataset) or {}).get(RECORD) or {}
        rendering = PromptRendering(args.prompt_format, record.get("chat_template_kwargs") or {}, record.get("date"))

        def add(row: dict[str, Any], number: int) -> dict[str, list[int]]:
            row = {"id": number, **row}
            ids: dict[str, list[int]] = {}
            for side in SIDES:
                both = revision_prompts(row, side, templates, tokenizer, rendering)
                ids |= {PROMPTS[side, kind]: part for kind, part in zip(("better", "worse"), both, strict=True)}
            return ids

        stored = isinstance(dataset, Dataset)
        with global_then_local_main_first():
            dataset = dataset.map(
                add,
                with_indices=True,
                **({"num_proc": args.dataset_num_proc, "desc": f"Revision prompts of {name}"} if stored else {}),
            )
        if self._positions is None:
            return dataset
        positions = self._positions

        def fits(*ids: list[int]) -> bool:
            *prompts, chosen, rejected = (len(part) for part in ids)
            chosen_prompt, rejected_prompt = max(prompts[0], prompts[2]), max(prompts[1], prompts[3])
            return max(chosen_prompt + chosen, rejected_prompt + rejected) <= positions

        return drop_rows(
            dataset,
            fits,
            [*PROMPTS.values(), *(f"{side}_ids" for side in SIDES)],
            args.dataset_num_proc,
            name,
            why=f"a revision prompt and its completion exceed the model's {positions} positions",
            remedy="shorten the completions or the templates, or use a model with a longer context",
        )

    # --------------------------------------------------------------------------------------------------- reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """What the reference is asked for: log-probs where a log-ratio is needed, rewards where none are read."""
        if self._compares or (isinstance(dataset, IterableDataset) and self._on_the_fly):
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        if self._on_the_fly:
            asking = self.data_collator
            if self._uses_own_collator:
                asking = DataCollatorForTReg(**vars(asking) | {"signal": None, "sides": ()})
            dataset = self._cache_token_columns(
                dataset,
                batch_size,
                REWARDS,
                ("token rewards", templates_hash(self._templates), self.args.prompt_format),
                self._ask_reference,
                f"Token rewards of the {name} dataset",
                asking,
            )
            dataset = dataset.remove_columns([c for c in PROMPTS.values() if c in dataset.column_names])
        return dataset

    def _ask_reference(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """r̂ (2B, L − 1) beside the predicted tokens, 0 elsewhere: both revision prompts through the reference."""
        revision = {key.removeprefix(REVISION): value for key, value in inputs.items() if key.startswith(REVISION)}
        if not revision:
            raise ContractError(
                "The batch has no revision prompts; let the data collator return them as DataCollatorForTReg does, or "
                "score the pairs with `tokalign score token-reward`."
            )
        better, worse = self._reference_logps(model, revision).float().chunk(2)
        better_mask, worse_mask = revision["completion_mask"][:, 1:].bool().chunk(2)
        mask = inputs["completion_mask"][:, 1:].bool()
        rewards = torch.zeros(mask.shape, device=better.device)
        # The same completion tokens in the same order, row by row, in all three layouts
        rewards[mask.to(better.device)] = token_reward(better[better_mask], worse[worse_mask])
        return rewards

    # -------------------------------------------------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        simpo = self.args.base_loss == "simpo"
        reference = self._reference(inputs) if self._compares else None
        # SimPO compares with no reference, even where DPO's implicit reward is what its tokens are rewarded by
        compared = None if simpo else reference
        loss, outputs, answer = self._trl_loss(model, inputs, compared, return_outputs=return_outputs)
        policy, mask = answer.log_probs, inputs["completion_mask"][:, 1:]
        # One margin for SimPO's loss and for w, so that w is the factor of the loss's own gradient
        chosen, rejected = sequence_rewards(policy, mask, compared, beta=self.beta).chunk(2)
        margin = chosen - rejected - (self.args.simpo_gamma if simpo else 0.0)
        if simpo:
            loss = loss - self._simpo_weight * F.logsigmoid(margin).mean()
            self._log_simpo(chosen.detach(), rejected.detach())
        if self.args.alpha > 0:
            rewards = self._token_rewards(inputs, policy, reference)
            squares = answer.log_sum_sq_probs
            pairs = 1.0 if squares is None else wpo_weights(policy, squares, mask)  # without WPO all count alike
            loss = loss + self.args.alpha * self._regularizer(policy, margin, rewards, mask, pairs)
        return (loss, outputs) if return_outputs else loss

    def _token_rewards(
        self, inputs: dict[str, Any], policy: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor:
        """r̂ (2B, L − 1) beside the predicted tokens, from wherever the configuration says."""
        if self.args.reward_source == "implicit":
            assert reference is not None
            return token_reward(policy.detach().float(), reference.float())
        stored = self._token_signal(inputs, elsewhere=0.0)
        return self._ask_reference(self.ref_model or self.model, inputs) if stored is None else stored

    def _regularizer(
        self,
        policy: torch.Tensor,
        margin: torch.Tensor,
        rewards: torch.Tensor,
        mask: torch.Tensor,
        pairs: torch.Tensor | float,
    ) -> torch.Tensor:
        """Mean over pairs of w ( L_reg(x, y_w) + L_reg(x, y_l) ), each times its own of `pairs`, and what it logs."""
        rewards = rewards.to(policy.device).masked_fill(mask == 0, 0.0)
        weight = pair_weight(margin, self.args.sequence_weight)
        sides = token_reward_regularizer(policy, mask, rewards, beta=self.beta, reduction=self.args.reduction).chunk(2)
        regularizer = pairs * weight * (sides[0] + sides[1])
        metrics = self._metrics[self._mode()]
        for name, values in (("treg/regularizer", regularizer), ("treg/sequence_weight", weight)):
            metrics[name].append(self.accelerator.gather(values.detach()).mean().item())
        # By token, not by row: sums and counts of all processes before the division
        totals = torch.stack([rewards.sum(dim=1), mask.sum(dim=1)], dim=1).view(2, -1, 2).sum(dim=1)
        totals = self.accelerator.gather(totals[None]).sum(dim=0)
        for side, (total, count) in zip(SIDES, totals.tolist(), strict=True):
            metrics[f"treg/token_reward/{side}"].append(total / max(count, 1.0))
        return regularizer.mean()

    def _log_simpo(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Put SimPO's implicit rewards, (B,) a side, where TRL has just logged what it knows without a reference."""
        chosen, rejected = self.accelerator.gather(torch.stack([chosen, rejected], dim=1)).unbind(dim=1)
        metrics = self._metrics[self._mode()]
        for name, value in (
            ("rewards/chosen", chosen.mean()),
            ("rewards/rejected", rejected.mean()),
            ("rewards/accuracies", (chosen > rejected).float().mean()),
            ("rewards/margins", (chosen - rejected).mean()),
        ):
            metrics[name][-1] = value.item()


def _positions(model: Any, args: TRegConfig) -> int | None:
    """How many positions the model has; None if its configuration does not say."""
    options: Any = args.model_init_kwargs or {}
    config = (
        AutoConfig.from_pretrained(model, revision=options.get("revision")) if isinstance(model, str) else model.config
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)
