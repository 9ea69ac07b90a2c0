"""Router training (R2R, arXiv 2505.21600, section 3.3) on transformers' `Trainer`: wiring only.

    L = − mean_t [ w y_t ln σ(f_t) + (1 − y_t) ln (1 − σ(f_t)) ],      y_t = "divergent",    w = n_0 / n_1

over the labelled tokens of a stage `routing_labels`, in batches of tokens, not of responses. The features are read
from disk as they are needed (`tokalign.routing.router.features`); the model is `tokalign.routing.router.model`.

Deviation from the paper: the last tokens of an epoch that do not fill a global batch are left out of that epoch, so
that any number of processes sees the same batches; another shuffle, another remainder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from tokalign.prompts import RECORD
from tokalign.routing.labels.classes import DIVERGENT
from tokalign.routing.router.calibration import check_dataset, router_inputs
from tokalign.routing.router.card import write_model_card
from tokalign.routing.router.features import RouterDataset, WindowSampler
from tokalign.routing.router.metrics import average_precision, ranking_of, recall_at
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig, embedding_shape
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import weights_hash
from tokalign.statistics import area_under_roc


@dataclass
class RouterConfig(TrainingArguments):
    r"""
    Configuration class for the [`RouterTrainer`].

    This class includes only the parameters that are specific to routers, and the paper's values of the others. For
    those, please refer to the [`~transformers.TrainingArguments`] documentation.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `5e-5`):
            Of AdamW. The linear baselines start from zero and want more, e.g. 1e-2.
        weight_decay (`float`, *optional*, defaults to `5e-4`):
            Of AdamW.
        per_device_train_batch_size (`int`, *optional*, defaults to `1024`):
            Tokens a device. The paper's 1024 are the whole batch: divide by the number of processes.
        num_train_epochs (`float`, *optional*, defaults to `50`):
            At most; `patience` usually ends it.
        metric_for_best_model (`str`, *optional*, defaults to `"weighted_loss"`):
            What early stopping watches: the training loss over all tokens of `eval_dataset`, `"auroc"` or `"auprc"`.
            (`eval_loss` is transformers' mean of batch means.)
        patience (`int`, *optional*, defaults to `3`):
            Stop after so many evaluations without a better `metric_for_best_model`; 0 is never.
        pos_weight (`float`, *optional*):
            Weight w of divergent tokens. Defaults to n_0/n_1 of the training labels.
        shuffle_window (`int`, *optional*, defaults to `8`):
            Feature files that are shuffled together. More mix better, fewer read faster from disk.
        bf16 (`bool`, *optional*):
            Mixed precision. Defaults to whether the device has it.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of AdamW."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of AdamW."})
    per_device_train_batch_size: int = field(
        default=1024, metadata={"help": "Tokens a device; the paper's global batch is 1024."}
    )
    per_device_eval_batch_size: int = field(default=4096, metadata={"help": "Tokens a device in evaluation."})
    num_train_epochs: float = field(default=50, metadata={"help": "Most passes over the labels."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between logs."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: 'epoch', 'steps' or 'no'."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept, besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best router, not the last."})
    metric_for_best_model: str | None = field(
        default="weighted_loss", metadata={"help": "What 'best' is: 'weighted_loss', 'auroc' or 'auprc'."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run keeps counting its patience."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "A router has none, and looking for them costs time."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: batches come whole."})
    bf16: bool | None = field(  # type: ignore[assignment]  # None until resolved, as in TRL's configurations
        default=None, metadata={"help": "bf16 mixed precision; unset is where the device can."}
    )
    patience: int = field(default=3, metadata={"help": "Evaluations without improvement before stopping; 0 is never."})
    pos_weight: float | None = field(default=None, metadata={"help": "Weight of divergent tokens; unset is n0/n1."})
    shuffle_window: int = field(default=8, metadata={"help": "Feature files that are shuffled together."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # the last checkpoint, not a folder's name
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower() == "true"  # type: ignore[assignment]
        if self.eval_strategy == "no":  # there is nothing to choose the best by
            self.load_best_model_at_end, self.metric_for_best_model = False, None
        super().__post_init__()
        if self.patience < 0:
            raise ValueError(f"`patience` must not be negative, got {self.patience}; 0 is no early stopping.")
        if self.pos_weight is not None and not self.pos_weight > 0:
            raise ValueError(f"`pos_weight` must be positive, got {self.pos_weight}; unset is n0/n1.")
        if self.shuffle_window < 1:
            raise ValueError(f"`shuffle_window` must be at least 1 file, got {self.shuffle_window}.")


def new_router(slm: str | Path, dataset: RouterDataset, **shape: Any) -> TokenRouter:
    """An untrained router for the features of `dataset`, bound to the SLM that made them.

    If it reads the predicted token, the rows of the SLM's embedding still have to be attached:
    `router.attach_embedding_of(slm, ids)`.

    Args:
        slm: hub id or folder.
        shape: of `TokenRouterConfig`: `inputs`, `architecture`, `width` …

    Raises:
        ContractError: the features are of another SLM.
    """
    rows, width = embedding_shape(slm)
    made_by = dataset.manifest.get("models", {}).get("slm", {})
    own = weights_hash(slm)
    if made_by.get("weights_hash") not in (None, own):
        raise ContractError(
            f"The features of {dataset.folder} are of another SLM ({made_by.get('path')}, weights "
            f"{made_by['weights_hash'][:12]}) than {slm} ({own[:12]}); pass that SLM, by the same path or id, or label "
            "with this one."
        )
    return TokenRouter(
        TokenRouterConfig(
            hidden_size=dataset.hidden_size,
            embedding_size=width,
            shared_vocab=dataset.manifest.get("shared_vocab", rows),
            top_k=dataset.top_k,
            prompts=dataset.manifest.get(RECORD),
            slm={"name": str(slm), "weights_hash": own, "tokenizer_hash": made_by.get("tokenizer_hash")},
            **shape,
        )
    )


class RouterTrainer(Trainer):
    """Trainer of a [`~tokalign.routing.TokenRouter`].

    Args:
        model: a router, with its SLM's embedding attached if it reads the predicted token.
        args: a [`RouterConfig`].
        train_dataset, eval_dataset: [`~tokalign.routing.RouterDataset`]; `eval_dataset` is what early stopping watches,
            the calibration split.
        peft_config: trains an adapter on the given router, for another domain say, instead of the router itself. What
            is saved is the adapter: `PeftModel.from_pretrained(router, folder).merge_and_unload()` is the router of
            both, and the one to calibrate, since a threshold belongs to its scores.
        kwargs: of [`~transformers.Trainer`].

    Raises:
        ValueError: the features are not the router's, no divergent label, or fewer labels than one global batch.
    """

    args: RouterConfig
    train_dataset: RouterDataset

    def __init__(
        self,
        model: TokenRouter,
        args: RouterConfig | None = None,
        train_dataset: RouterDataset | None = None,
        eval_dataset: RouterDataset | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        args = args or RouterConfig()
        if not isinstance(args, RouterConfig):
            raise TypeError(
                f"`args` must be a RouterConfig, got {type(args).__name__}; it has the same fields and more."
            )
        for dataset in (train_dataset, eval_dataset):
            if dataset is not None:
                check_dataset(model, dataset)
        self.pos_weight = args.pos_weight
        if train_dataset is not None:
            self.pos_weight = _checked_pos_weight(args, train_dataset)
            model.config.pos_weight = self.pos_weight
        super().__init__(
            model=model if peft_config is None else get_peft_model(model, peft_config),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", _whole),
            compute_metrics=kwargs.pop("compute_metrics", self.router_metrics),
            **kwargs,
        )
        if args.patience and args.eval_strategy != "no":
            self.add_callback(EarlyStoppingCallback(early_stopping_patience=args.patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return WindowSampler(
            self.train_dataset, seed=seed, window=self.args.shuffle_window, multiple=_global_batch(self.args)
        )

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        batch = super()._prepare_inputs(inputs)
        router = self.accelerator.unwrap_model(self.model)
        return {**router_inputs(router, batch), "labels": batch["labels"], "pos_weight": self.pos_weight}

    def router_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`weighted_loss` in nats, AUROC, AUPRC, and the recall at an LLM rate of 12 % (the paper's is 11 to 15)."""
        logits = np.asarray(prediction.predictions, dtype=np.float64)
        labels = np.asarray(prediction.label_ids) > 0
        ranking = ranking_of(logits, labels * DIVERGENT, np.zeros(len(labels), dtype=int))
        hits, others, everything = ranking.sums()
        # −ln σ(f) = ln(1 + e^−f), −ln(1 − σ(f)) = ln(1 + e^f)
        losses = np.where(labels, self.pos_weight * np.logaddexp(0, -logits), np.logaddexp(0, logits))
        return {
            "weighted_loss": float(losses.mean()),
            "auroc": area_under_roc(hits, others),
            "auprc": average_precision(hits, others),
            "recall_at_0.12": float(recall_at(hits, everything, [0.12])[0]),
        }

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours: what the router is for, its threshold and its figures."""
        if self.is_world_process_zero():
            write_model_card(
                self.accelerator.unwrap_model(self.model), str(self.args.output_dir), **_card_options(kwargs)
            )


def _whole(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator: `RouterDataset` reads whole batches."""
    return batch


def _card_options(options: dict[str, Any]) -> dict[str, Any]:
    """`Trainer.push_to_hub` passes entries of its own kind of card."""
    return {name: options[name] for name in ("report", "dataset_name") if options.get(name) is not None}


def _checked_pos_weight(args: RouterConfig, dataset: RouterDataset) -> float:
    divergent = int((dataset.labels == DIVERGENT).sum())
    others = int((dataset.labels >= 0).sum()) - divergent
    if divergent == 0:
        raise ContractError(
            f"{dataset.folder} has no divergent token among {others}, so there is nothing to route; label more "
            "problems, or with a larger LLM."
        )
    if others == 0:
        raise ContractError(f"{dataset.folder} has nothing but divergent tokens; look at its report.json.")
    if others + divergent < len(dataset):
        raise ContractError(f"{dataset.folder} was opened with `invalid=True`; train without the tokens of no verdict.")
    if len(dataset) < (batch := _global_batch(args)):
        raise ValueError(
            f"{dataset.folder} has {len(dataset)} labelled tokens, fewer than one global batch of {batch}; lower "
            "per_device_train_batch_size or label more problems."
        )
    return args.pos_weight or others / divergent


def _global_batch(args: RouterConfig) -> int:
    """Tokens a step, over all processes and accumulated micro-batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
