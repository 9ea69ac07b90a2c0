"""Critical-token DPO (arXiv 2411.19943v3, ICML 2025) on TRL's `DPOTrainer`.

    ℓ = −log σ( β Σ_t ρ_t(y⁺) − β Σ_t (1 − s_t) ρ_t(y⁻) ),     ρ_t = log π(y_t|x,y_<t) − log π_ref(y_t|x,y_<t)

s_t is the contrastive score of a rejected token, low on critical ones, read from the dataset's `rejected_contrast`
column. TRL's loss sums per-token log-probabilities that the model returns; a forward hook multiplies them by 1 − s_t
first, policy and reference alike, and TRL computes everything else. So every loss type and option of `DPOTrainer`
goes on working, and scores of 0 give `DPOTrainer` to the last bit.

What the weights do to the rest, each decided here (see docs/critical_token_dpo.md):

- `rewards/*` are the weighted implicit rewards, which the loss uses; `logps/*` are unweighted, so their curves show
  how the policy's log-probabilities move;
- the `sft` term (RPO) is the plain NLL of the chosen completion, whatever the weights;
- WPO (`use_weighting`) weights a pair by the unweighted log-probabilities;
- `ipo` and `sigmoid_norm` divide by the number of tokens, not by the sum of the weights.
"""

from __future__ import annotations

import hashlib
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, pad

from tokalign.data.contract import STAGES, ContractError, check_preferences, manifest_of, tokenizer_hash
from tokalign.losses import critical_token_dpo_loss

logger = get_logger(__name__)

SIDES = {"rejected": ("rejected",), "chosen": ("chosen",), "both": ("chosen", "rejected"), "none": ()}
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass
class CriticalTokenDPOConfig(DPOConfig):
    r"""
    Configuration class for the [`CriticalTokenDPOTrainer`].

    This class includes only the parameters that are specific to critical-token DPO. For the others, please refer to
    the [`~trl.DPOConfig`] documentation; its `beta` is the paper's γ (1.0 in the paper's text, 0.1 in its released
    configuration and here).

    Parameters:
        > Parameters that control the token weights

        signal (`str`, *optional*, defaults to `"contrast"`):
            Token signal that holds the scores s_t: the dataset columns `chosen_<signal>` and `rejected_<signal>`, a
            list of numbers as long as the ids of that side. A token's weight is 1 − s_t.
        weight_side (`str`, *optional*, defaults to `"rejected"`):
            Side whose tokens are weighted. Possible values are: `"rejected"` (the paper), `"chosen"`, `"both"`, and
            `"none"`, which reads no signal and is plain DPO.
        aggregation (`str`, *optional*, defaults to `"sequence"`):
            How positions become a loss. Possible values are: `"sequence"` (the paper: one logistic function of the
            two weighted sums) and `"position"` (the released code: a logistic function at each position and the mean
            over all of them, prompt and padding included; only with the loss types `"sigmoid"` and `"sft"`).
        estimate_beta (`float`, *optional*):
            β of the contrastive estimate that made the scores. Not used in training: recorded from the manifest of
            the dataset, so that it is saved with the arguments. Setting it to another value than the data's is an
            error.
    """

    signal: str = field(
        default="contrast",
        metadata={
            "help": "Token signal that holds the scores s_t: the dataset columns `chosen_<signal>` and "
            "`rejected_<signal>`. A token's weight is 1 - s_t."
        },
    )
    weight_side: str = field(
        default="rejected",
        metadata={
            "help": "Side whose tokens are weighted: 'rejected' (the paper), 'chosen', 'both', or 'none' (plain DPO).",
            "choices": list(SIDES),
        },
    )
    aggregation: str = field(
        default="sequence",
        metadata={
            "help": "How positions become a loss: 'sequence' (the paper) or 'position' (the released code).",
            "choices": ["sequence", "position"],
        },
    )
    estimate_beta: float | None = field(
        default=None,
        metadata={"help": "Beta of the contrastive estimate, recorded from the dataset's manifest."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.weight_side not in SIDES:
            raise ValueError(f"`weight_side` must be one of {list(SIDES)}, got {self.weight_side!r}.")
        if self.aggregation not in ("sequence", "position"):
            raise ValueError(f"`aggregation` must be 'sequence' or 'position', got {self.aggregation!r}.")
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
        if self.use_weighting and "sft" in self.loss_type and "chosen" in SIDES[self.weight_side]:
            raise ValueError(
                "`use_weighting` with an 'sft' loss scales the NLL inside TRL, where it cannot be kept free of "
                "chosen-side token weights; use `weight_side='rejected'` or drop one of the two."
            )


@dataclass
class DataCollatorForCriticalTokens(DataCollatorForPreference):
    """
    TRL's [`~trl.trainer.dpo_trainer.DataCollatorForPreference`] with per-token columns beside the ids, each value
    truncated and padded exactly as its token:

    - `"token_weights"`: 1 − s_t on the tokens of the weighted sides, 1 elsewhere. Left out if no side is weighted.
    - `"ref_token_logps"`: precomputed reference log-probabilities, 0 elsewhere. Only if the examples hold
        `"ref_chosen_token_logps"` and `"ref_rejected_token_logps"`.

    Both are float32 of shape (2B, L) as `"input_ids"`, the chosen half first.

    Args:
        signal (`str`, *optional*, defaults to `"contrast"`):
            Signal that holds the scores.
        sides (`tuple[str, ...]`, *optional*, defaults to `("rejected",)`):
            Sides that are weighted.
    """

    signal: str = "contrast"
    sides: tuple[str, ...] = ("rejected",)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if self.sides:
            columns = {side: f"{side}_{self.signal}" if side in self.sides else None for side in ("chosen", "rejected")}
            batch["token_weights"] = 1.0 - self._align(examples, columns)
        if "ref_chosen_token_logps" in examples[0]:
            columns = {side: f"ref_{side}_token_logps" for side in ("chosen", "rejected")}
            batch["ref_token_logps"] = self._align(examples, columns)
        return batch

    def _align(self, examples: list[dict[str, Any]], columns: dict[str, str | None]) -> torch.Tensor:
        """The values of one column a side at their tokens' places in `input_ids`, 0 everywhere else."""
        rows = []
        for side, column in columns.items():
            for example in examples:
                values = np.zeros(len(example["prompt_ids"]) + len(example[f"{side}_ids"]), dtype=np.float32)
                if column is not None:
                    values[len(example["prompt_ids"]) :] = example[column]
                if self.max_length is not None:
                    cut_start = self.truncation_mode == "keep_end"
                    values = values[-self.max_length :] if cut_start else values[: self.max_length]
                rows.append(torch.from_numpy(values))
        return pad(rows, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


class CriticalTokenDPOTrainer(DPOTrainer):
    """
    Trainer for critical-token DPO, proposed in the paper [Critical Tokens Matter: Token-Level Contrastive Estimation
    Enhances LLM's Reasoning Capability](https://huggingface.co/papers/2411.19943). It takes the arguments of
    [`~trl.DPOTrainer`] and keeps its features; see the top of this file for what the token weights touch.

    The dataset's rows hold token ids and their scores (`prompt_ids`, `chosen_ids`, `rejected_ids`,
    `rejected_contrast`, written by `scripts/score_contrast.py`). The ids are trained on as they are: text is never
    tokenised again. With `weight_side="none"` rows of text are tokenised by TRL, and training equals `DPOTrainer`'s.

    Example:

    ```python
    >>> from tokalign.data.contract import load_stage
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
            Defaults to [`DataCollatorForCriticalTokens`]. Another one must also return `"token_weights"`.

    All other arguments are those of [`~trl.DPOTrainer`].
    """

    args: CriticalTokenDPOConfig
    model: Any  # whatever accelerate has made of it
    ref_model: Any

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

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: CriticalTokenDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CriticalTokenDPOConfig(f"{name.split('/')[-1]}-critical-token-DPO")
        if not isinstance(args, CriticalTokenDPOConfig):
            raise TypeError(f"`args` must be a CriticalTokenDPOConfig, got {type(args).__name__}.")
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise ContractError("`train_dataset` has no rows; check what the stage that wrote it dropped and why.")
        # What the forward hook shares with the loss, for the length of one call
        self._token_weights: torch.Tensor | None = None
        self._token_logps: list[torch.Tensor] = []
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self._is_vision_dataset:
            raise ContractError(
                "Datasets with an `image` or `images` column are not supported, since their ids do not exist before "
                "collation; use trl.DPOTrainer for them."
            )
        if data_collator is None:  # TRL has built its own by now, with the padding token that it settled on
            self.data_collator = DataCollatorForCriticalTokens(
                **vars(self.data_collator), signal=args.signal, sides=SIDES[args.weight_side]
            )
        # TRL combines its losses with these weights; the position form takes the place of its 'sigmoid'
        self.loss_weights = list(self.loss_weights)
        self._position_weight = 0.0
        if args.aggregation == "position":
            index = self.loss_types.index("sigmoid")
            self._position_weight, self.loss_weights[index] = self.loss_weights[index], 0.0

    # -------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = set(next(iter(dataset)))
        sides = SIDES[args.weight_side]
        if not columns.issuperset(IDS):
            if not sides:
                return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            if not columns & set(IDS):
                raise ContractError(
                    f"The {dataset_name} dataset holds text only (columns {', '.join(sorted(columns))}), and token "
                    "weights need token ids and their scores; score the pairs with scripts/score_contrast.py, or set "
                    "`weight_side='none'` for plain DPO."
                )
        self._check_manifest(dataset, args, dataset_name)
        if sides or columns.issuperset(STAGES["preferences"]):
            dataset = self._check_rows(dataset, args)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            dataset = _drop_long_prompts(dataset, args.max_length, args.dataset_num_proc, dataset_name)
        return dataset

    def _check_rows(
        self, dataset: Dataset | IterableDataset, args: CriticalTokenDPOConfig
    ) -> Dataset | IterableDataset:
        """The contract's checks, at once on stored rows and as they come on streamed ones."""
        sides = SIDES[args.weight_side]
        options: dict[str, Any] = {"signals": [args.signal] if sides else [], "sides": sides}
        if not sides:  # text that TRL has prepared before carries an added end token, so there the ids alone count
            options["text_rows"] = 0
        tokenizer = self._tokenizer
        if isinstance(dataset, Dataset):
            check_preferences(dataset, tokenizer, **options)
            return dataset

        def check(batch: dict[str, list]) -> dict[str, list]:
            check_preferences(Dataset.from_dict(batch), tokenizer, **options)
            return batch

        return dataset.map(check, batched=True, batch_size=64)

    def _check_manifest(self, dataset: Dataset | IterableDataset, args: CriticalTokenDPOConfig, name: str) -> None:
        manifest = manifest_of(dataset)
        if manifest is None:
            return
        made_with = manifest.get("tokenizer_hash")
        if made_with is not None and made_with != tokenizer_hash(self._tokenizer):
            raise ContractError(
                f"The ids of the {name} dataset were made with another tokenizer (hash {made_with[:12]}, this model's "
                f"is {tokenizer_hash(self._tokenizer)[:12]}); train the model that they were made for, or rerun the "
                "stages with this one."
            )
        beta = manifest.get("parameters", {}).get("beta")
        if SIDES[args.weight_side] and beta is not None:
            if args.estimate_beta is not None and args.estimate_beta != beta:
                raise ContractError(
                    f"The scores of the {name} dataset were made with beta {beta}, but `estimate_beta` is "
                    f"{args.estimate_beta}; unset it, or score the pairs again with that beta."
                )
            args.estimate_beta = beta

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            scores = [f"{side}_{self.args.signal}" for side in SIDES[self.args.weight_side]]
            columns: Any = self._signature_columns  # typed None in transformers
            columns += [*scores, "ref_chosen_token_logps", "ref_rejected_token_logps"]

    # --------------------------------------------------------------------------------------------------- reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Per-token where TRL stores sums, so one cache serves every signal, weighting and aggregation."""
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that this cannot be
        if "ref_chosen_token_logps" in dataset.column_names:
            return dataset
        key = (dataset._fingerprint, self._reference_hash(), self.args.max_length, self.args.truncation_mode)
        # Fingerprints, shards and the folders of in-memory datasets differ between processes: rank 0's path counts
        path = [dataset._get_cache_file_path(Hasher.hash(("per token", *key)))]
        broadcast_object_list(path, from_process=0)
        # Nodes may share a disk or not, so all must have the file before any skips the collective loop
        found = torch.tensor([os.path.exists(path[0])], device=self.accelerator.device, dtype=torch.int32)
        if not self.accelerator.gather(found).all():
            self._write_ref_logps(dataset, name, batch_size, path[0])
        return concatenate_datasets([dataset, Dataset.from_file(path[0])], axis=1)

    def _reference_hash(self) -> str:
        """TRL's hash of the reference, with this rank's shards under ZeRO-3, where TRL sees empty tensors."""
        total = hashlib.sha256(str(self._precompute_model_hash).encode())
        for parameter in (self.ref_model or self.model).parameters():
            if getattr(parameter, "ds_tensor", None) is not None:
                total.update(parameter.ds_tensor.detach().float().cpu().numpy().tobytes())
        return total.hexdigest()

    def _write_ref_logps(self, dataset: Dataset, name: str, batch_size: int, path: str) -> None:
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            # Before training the policy's parameters are not placed yet; as in TRL, one engine serves all passes
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        ids = dataset.select_columns(list(IDS))
        columns = {"chosen_ids": "ref_chosen_token_logps", "rejected_ids": "ref_rejected_token_logps"}
        writer = None
        if self.accelerator.is_local_main_process:  # a node's processes read one file
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{self.accelerator.process_index}.incomplete"
            features = Features({column: List(Value("float32")) for column in columns.values()})
            writer = ArrowWriter(features=features, path=temporary)
        row = 0
        for batch in tqdm(loader, desc=f"Reference log-probs of the {name} dataset"):
            batch, _, _ = _take_token_columns(batch)
            with self._token_hook(None):
                super().compute_ref_log_probs(model, batch)
            per_token = self._last_token_logps(batch)[0].chunk(2)
            per_token = self.accelerator.pad_across_processes(tuple(half.contiguous() for half in per_token), dim=1)
            chosen, rejected = self.accelerator.gather_for_metrics(per_token)
            if writer is None:
                continue
            for halves in zip(chosen.float().cpu().numpy(), rejected.float().cpu().numpy(), strict=True):
                example = ids[row]
                values = {
                    column: self._completion_values(half, len(example["prompt_ids"]), len(example[side]))
                    for half, (side, column) in zip(halves, columns.items(), strict=True)
                }
                writer.write(values)
                row += 1
        if writer is not None:
            writer.finalize()
            os.replace(temporary, path)
        self.accelerator.wait_for_everyone()

    def _completion_values(self, shifted: np.ndarray, prompt_length: int, completion_length: int) -> np.ndarray:
        """Log-probs of the completion's tokens, 0 for those that truncation cuts, from a row of the model's output."""
        total = prompt_length + completion_length
        kept = total if self.args.max_length is None else min(total, self.args.max_length)
        first = total - kept if self.args.truncation_mode == "keep_end" else 0
        values = np.zeros(total, dtype=np.float32)
        values[first + 1 : first + kept] = shifted[: kept - 1]
        return values[prompt_length:]

    def compute_ref_log_probs(self, model, inputs):
        """Computes the weighted reference log probabilities for a single padded batch."""
        inputs, weights, _ = _take_token_columns(inputs)
        with self._token_hook(weights):
            return super().compute_ref_log_probs(model, inputs)

    # -------------------------------------------------------------------------------------------------------- loss

    @contextmanager
    def _token_hook(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Inside, every fused forward of policy and reference is recorded and its log-probs weighted (2B, L)."""
        self._token_weights = None if weights is None else weights[:, 1:]
        self._token_logps = []
        # The modules that DDP, DeepSpeed and FSDP wrap and call, and the PEFT model (which runs the base model's
        # `forward` without its hooks). TRL calls `ref_model` itself, wrapped or not.
        policy = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        handles = [m.register_forward_hook(self._weight_log_probs) for m in (policy, self.ref_model) if m is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._token_weights = None

    def _weight_log_probs(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None:  # an ordinary forward, as for `compute_metrics`
            return
        self._token_logps.append(log_probs)
        if self._token_weights is None:
            return
        # Prompt-learning PEFT puts virtual tokens first
        extra = log_probs.size(1) - self._token_weights.size(1)
        weights = F.pad(self._token_weights.to(log_probs.device), (extra, 0), value=1.0)
        output.log_probs = log_probs * weights
        if getattr(output, "log_sum_sq_probs", None) is not None:
            # WPO subtracts this from the log-probs it is given: the unweighted ones are what it should see
            output.log_sum_sq_probs = output.log_sum_sq_probs + (weights - 1.0) * log_probs.detach()

    def _last_token_logps(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Unweighted log-probs (2B, L − 1) of the forwards of the last call: policy, reference if it ran."""
        if not self._token_logps:
            raise RuntimeError(
                "The forward hook that weights tokens did not run, so this would have been plain DPO: the model was "
                "called around its hooks (compiled before training?) or TRL no longer returns `log_probs`."
            )
        seen, self._token_logps = self._token_logps, []
        length = inputs["input_ids"].size(1) - 1
        return [log_probs[:, -length:] for log_probs in seen]

    def _sequence_logps(self, per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """TRL's sum over positions, (2B, L − 1) -> (2B,), where `ld_alpha` scales what the other side lacks."""
        if self.ld_alpha is None:
            return per_token.sum(dim=1)
        position = mask.cumsum(dim=1)
        shared = mask.sum(dim=1).view(2, -1).amin(dim=0).repeat(2).unsqueeze(1)
        tail = (per_token * (position > shared)).sum(dim=1)
        return (per_token * ((position > 0) & (position <= shared))).sum(dim=1) + self.ld_alpha * tail

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs, weights, reference = _take_token_columns(inputs)
        if weights is None and SIDES[self.args.weight_side]:
            raise ContractError(
                "The batch has no `token_weights`; let the data collator return them (2B, L, beside `input_ids`) as "
                "DataCollatorForCriticalTokens does, or set `weight_side='none'`."
            )
        mask = inputs["completion_mask"][:, 1:]
        if not self.precompute_ref_logps:
            reference = None
        else:
            if reference is None:
                raise ContractError(
                    "The batch has no `ref_token_logps`; let the data collator return them as "
                    "DataCollatorForCriticalTokens does, or set `precompute_ref_log_probs=False`."
                )
            reference = reference[:, 1:]
            weighted = reference if weights is None else reference * weights[:, 1:]
            sums = self._sequence_logps(weighted, mask).chunk(2)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums
        with self._token_hook(weights):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        policy, *computed = self._last_token_logps(inputs)
        if weights is not None:
            weights = weights[:, 1:].to(policy.device)
            loss = loss + self._sft_correction(policy, weights, mask)
            self._log_unweighted(policy.detach(), mask)
        if self.args.aggregation == "position":
            chosen_score, rejected_score = (None, None) if weights is None else (1.0 - weights).chunk(2)
            chosen_ratios, rejected_ratios = (policy - (computed[0] if reference is None else reference)).chunk(2)
            chosen_mask, rejected_mask = mask.chunk(2)
            losses = critical_token_dpo_loss(
                chosen_ratios,
                rejected_ratios,
                chosen_mask,
                rejected_mask,
                rejected_score,
                beta=self.beta,
                aggregation="position",
                chosen_score=chosen_score,
            )
            loss = loss + self._position_weight * losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _sft_correction(self, policy: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | float:
        """Plain NLL of the chosen completions minus the weighted one that TRL's `sft` term has computed."""
        if "chosen" not in SIDES[self.args.weight_side] or "sft" not in self.loss_types:
            return 0.0
        difference = ((weights - 1.0) * policy).chunk(2)[0]
        sft_weight = sum(w for name, w in zip(self.loss_types, self.loss_weights, strict=True) if name == "sft")
        return sft_weight * difference[mask.chunk(2)[0].bool()].mean()

    def _log_unweighted(self, policy: torch.Tensor, mask: torch.Tensor) -> None:
        """Put the policy's own log-probs where TRL has just logged the weighted ones."""
        sums = self._sequence_logps(policy, mask).view(2, -1).T.contiguous()
        chosen, rejected = self.accelerator.gather(sums).mean(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["logps/chosen"][-1], metrics["logps/rejected"][-1] = chosen, rejected


def _take_token_columns(inputs: Any) -> tuple[dict[str, Any], torch.Tensor | None, torch.Tensor | None]:
    """Split a batch into what TRL knows, token weights and reference log-probs: extra keys would reach the model."""
    inputs = dict(inputs)
    return inputs, inputs.pop("token_weights", None), inputs.pop("ref_token_logps", None)


def _drop_long_prompts(
    dataset: Dataset | IterableDataset, max_length: int, num_proc: int | None, name: str
) -> Dataset | IterableDataset:
    """Drop rows whose prompt alone fills `max_length`, as TRL does: truncation would leave no completion token."""

    def fits(prompt_ids: list[int]) -> bool:
        return len(prompt_ids) < max_length

    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits, input_columns=["prompt_ids"])
    with global_then_local_main_first():
        kept = dataset.filter(
            fits, input_columns=["prompt_ids"], num_proc=num_proc, desc=f"Dropping long prompts from {name} dataset"
        )
    if len(kept) == 0:
        raise ContractError(
            f"Every prompt of the {name} dataset has at least `max_length` = {max_length} tokens, which leaves no room "
            "for a completion; raise `max_length`."
        )
    if len(kept) < len(dataset):
        logger.warning(
            f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the {name} dataset: the prompt alone fills "
            f"`max_length` = {max_length}."
        )
    return kept
