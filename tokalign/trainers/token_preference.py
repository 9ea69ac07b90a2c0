"""What the trainers that read a token signal share: TRL's `DPOTrainer` with ids, signals and log-probs kept per token.

- Rows hold token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`), which are trained on as they are, and a signal: a
  list of numbers as long as the ids of its side. The collator puts each number beside its token, and the signal's row
  in `tokalign.signals.registry` says how it becomes the weight or the reward that the method needs.
- TRL's loss is given a stand-in for the policy, which keeps the per-token log-probs that TRL's fused LM head returns,
  and weights them, before TRL sums them over positions. The reference's sums lie in the batch, as if precomputed.
- `precompute_ref_log_probs` stores the reference's log-probs per token, where TRL stores sums.

A method is a subclass that says which signal it reads (`_reads`), what it needs of it (`_needs`) and what it does in
`compute_loss`; TRL computes everything else, so every loss type and option of `DPOTrainer` goes on working.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import trl
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, tqdm
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tokalign.internals.datasets import ArrowWriter, Hasher
from tokalign.internals.trl import (
    DataCollatorForPreference,
    get_config_model_id,
    global_then_local_main_first,
    head_needs_triton,
    pad,
    prepare_deepspeed,
)
from tokalign.prompts import UNRENDERED, give_variables, refused_row
from tokalign.signals.registry import REWARD_RANGE, get
from tokalign.stage.contract import IDS, SIDES, check_preferences, check_tokenizer, first_row, reader_of
from tokalign.stage.errors import ContractError
from tokalign.stage.manifest import manifest_of, note_beside_model

logger = get_logger(__name__)

REVISION = "revision_"  # prefix of the batch keys that only T-REG's collator adds
_ADDED = ("token_signal", "ref_token_logps")
NEEDED = {"weight": (0.0, 1.0), "reward": REWARD_RANGE}  # what a signal becomes for a method, and its limits
REFERENCE = {f"{side}_ids": f"ref_{side}_token_logps" for side in SIDES}  # columns of the reference cache


@dataclass
class TokenPreferenceConfig(DPOConfig):
    r"""
    What the configurations of these trainers share, besides [`~trl.DPOConfig`].

    Parameters:
        allow_other_tokenizer (`bool`, *optional*, defaults to `False`):
            Train on ids that another tokenizer has made: for those that mean the same to this model, although its
            tokenizer reads them otherwise. It is written into a `manifest.json` beside the model.
    """

    allow_other_tokenizer: bool = field(
        default=False,
        metadata={"help": "Train on ids that another tokenizer has made; it is noted beside the model."},
    )


@dataclass
class DataCollatorForTokenSignals(DataCollatorForPreference):
    """
    TRL's [`~trl.trainer.dpo_trainer.DataCollatorForPreference`] with per-token columns beside the ids, each value
    truncated and padded exactly as its token:

    - `"token_signal"`: the signal on the tokens of the sides that are read, 0 elsewhere. Left out if none is read.
    - `"ref_token_logps"`: precomputed reference log-probabilities, 0 elsewhere. Only if the examples hold
        `"ref_chosen_token_logps"` and `"ref_rejected_token_logps"`.

    Both are float32 of shape (2B, L) as `"input_ids"`, the chosen half first.

    Args:
        signal (`str`, *optional*):
            Signal to read: the columns `chosen_<signal>` and `rejected_<signal>`.
        sides (`tuple[str, ...]`, *optional*, defaults to `()`):
            Sides on which it is read.
    """

    signal: str | None = None
    sides: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if self.sides:
            batch["token_signal"] = self._align(examples, {side: f"{side}_{self.signal}" for side in self.sides})
        if "ref_chosen_token_logps" in examples[0]:
            batch["ref_token_logps"] = self._align(examples, {side: f"ref_{side}_token_logps" for side in SIDES})
        return batch

    def _align(self, examples: list[dict[str, Any]], columns: dict[str, str]) -> torch.Tensor:
        """The values of one column a side at their tokens' places in `input_ids`, 0 everywhere else."""
        rows = []
        for side in SIDES:
            for example in examples:
                values = np.zeros(len(example["prompt_ids"]) + len(example[f"{side}_ids"]), dtype=np.float32)
                if side in columns:
                    values[len(example["prompt_ids"]) :] = example[columns[side]]
                rows.append(torch.from_numpy(self._truncate(values)))
        return pad(rows, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)

    def _truncate(self, values: Any) -> Any:
        """A sequence's values, cut as TRL cuts its ids."""
        if self.max_length is None:
            return values
        return values[-self.max_length :] if self.truncation_mode == "keep_end" else values[: self.max_length]


class TokenPreferenceTrainer(DPOTrainer):
    """Base of the preference trainers of this package; it takes the arguments of [`~trl.DPOTrainer`]."""

    args: Any
    model: Any  # whatever accelerate has made of it
    ref_model: Any

    _config_class: ClassVar[type[DPOConfig]]
    _needs: ClassVar[Literal["weight", "reward"]]  # what a signal becomes
    _collator: ClassVar[type[DataCollatorForTokenSignals]] = DataCollatorForTokenSignals
    _own_columns: ClassVar[tuple[str, ...]] = ()  # further columns that the collator reads

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
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
            args = self._config_class(f"{name.split('/')[-1]}-{self._name.replace(' ', '-')}")
        if not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a {self._config_class.__name__}, got {type(args).__name__}.")
        if head_needs_triton() and args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"TRL {trl.__version__} computes log-probs by a Triton kernel, which needs a GPU; install trl>=1.16 or "
                "set the environment variable TRITON_INTERPRET=1 (slow, for tests)."
            )
        if isinstance(train_dataset, Dataset | IterableDataset):  # TRL refuses the rest
            first_row(train_dataset, "`train_dataset`")
        self._uses_own_collator = data_collator is None
        self._start_init(model, args, train_dataset)
        # Before any weights are loaded: a signal that nobody has registered ends the run here
        signal, sides = self._reads(args)
        self._allowed: tuple[float, float] | None = None
        self._convert: Callable[[Any], Any] = lambda values: values
        if sides:
            self._allowed, self._convert = self._conversion(signal, args)
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
        self.loss_types, self.loss_weights = list(self.loss_types), list(self.loss_weights)
        self._finish_init()
        if self._uses_own_collator:  # in place of TRL's, with the padding token that TRL has settled on
            signal, sides = self._collates()
            self.data_collator = self._collator(**vars(self.data_collator) | {"signal": signal, "sides": sides})

    def _start_init(self, model: Any, args: Any, train_dataset: Any) -> None:
        """What a method decides before TRL builds anything."""

    def _finish_init(self) -> None:
        """What a method sets up once TRL has built everything."""

    def _reads(self, args: Any) -> tuple[str, tuple[str, ...]]:
        """The signal that the dataset must hold and the sides on which it is read; no sides: none is needed."""
        raise NotImplementedError

    def _conversion(self, signal: str, args: Any) -> tuple[tuple[float, float], Callable[[Any], Any]]:
        """Smallest and largest value that the signal may have, and what makes of values what the method needs.

        Raises:
            ValueError: the signal is not registered, or its row has no rule.
        """
        row = get(signal)
        return (row.low, row.high), row.rule(self._needs)

    def _collates(self) -> tuple[str, tuple[str, ...]]:
        """The signal and the sides that a batch holds: those of the dataset, unless the reference added some."""
        return self._reads(self.args)

    # -------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = set(first_row(dataset, f"The {dataset_name} dataset"))
        signal, sides = self._reads(args)
        if not columns.issuperset(IDS):
            if not sides:
                try:
                    dataset = give_variables(dataset, None)
                    return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
                except UNRENDERED as error:
                    raise refused_row(dataset, self._tokenizer, error) from error
            if not columns & set(IDS):
                raise ContractError(
                    f"The {dataset_name} dataset holds text only (columns {', '.join(sorted(columns))}), and the "
                    f"signal {signal!r} needs token ids and their scores; score the pairs with "
                    f"`{get(signal).command}`, or set {self._unscored}."
                )
        self._check_manifest(dataset, args, dataset_name)
        dataset = self._check_rows(dataset, args)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            limit = args.max_length  # as TRL does: truncation would leave no completion token
            dataset = drop_rows(
                dataset,
                lambda prompt_ids: len(prompt_ids) < limit,
                ["prompt_ids"],
                args.dataset_num_proc,
                dataset_name,
                why=f"the prompt alone fills `max_length` = {limit}",
                remedy="raise `max_length`",
            )
        return dataset

    _unscored = ""  # the option by which the method reads no signal, for the error above

    def _check_rows(self, dataset: Dataset | IterableDataset, args: Any) -> Dataset | IterableDataset:
        """The contract's checks, at once on stored rows and as they come on streamed ones."""
        signal, sides = self._reads(args)
        options: dict[str, Any] = {"signals": [get(signal)] if sides else [], "sides": sides}
        if self._allowed is not None:
            options["ranges"] = {signal: self._allowed}
        if args.allow_other_tokenizer:
            options["text_rows"] = 0
        reader = reader_of(dataset, self._tokenizer)
        if isinstance(dataset, Dataset):
            check_preferences(dataset, reader, **options)
            return dataset

        def check(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
            check_preferences(Dataset.from_dict(batch), reader, first=numbers[0], **options)
            return batch

        return dataset.map(check, with_indices=True, batched=True, batch_size=64)

    def _check_manifest(self, dataset: Dataset | IterableDataset, args: Any, name: str) -> None:
        allow = args.allow_other_tokenizer
        check_tokenizer(manifest_of(dataset), self._tokenizer, f"the {name} dataset", allow=allow)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder, allowed = output_dir or self.args.output_dir, self.args.allow_other_tokenizer
            note_beside_model(folder, self._name, self.train_dataset, allowed=allowed)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            signal, sides = self._collates()
            columns: Any = self._signature_columns  # typed None in transformers
            columns += [*(f"{side}_{signal}" for side in sides), *REFERENCE.values(), *self._own_columns]

    # --------------------------------------------------------------------------------------------------- reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Per-token where TRL stores sums, so one cache serves every signal, weighting and aggregation."""
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that this cannot be

        description = f"Reference log-probs of the {name} dataset"
        return self._cache_token_columns(
            dataset, batch_size, REFERENCE, "per token", self._reference_logps, description
        )

    def _reference_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Per-token log-probs (2B, L − 1) under the reference: `model`, with its adapter off where it has one."""
        batch = trl_inputs(batch)  # other keys would reach the model
        stand_in = _StandIn(model, batch["input_ids"].size(1) - 1)
        self.compute_ref_log_probs(stand_in, batch)
        return stand_in.log_probs

    def _cache_token_columns(
        self,
        dataset: Dataset,
        batch_size: int,
        columns: dict[str, str],
        key: Any,
        compute: Callable[[Any, dict[str, Any]], torch.Tensor],
        description: str,
        collator: Any = None,
    ) -> Dataset:
        """`dataset` with one more column a side, computed by the reference before training and kept on disk.

        Args:
            columns: ids column -> new column.
            key: what the values depend on besides rows, reference, `max_length` and truncation.
            compute: reference model and collated batch -> (2B, L − 1) values beside `input_ids[:, 1:]`.
            collator: of these batches, where it is not the trainer's.
        """
        if set(columns.values()) <= set(dataset.column_names):
            return dataset
        everything = (key, dataset._fingerprint, self._reference_hash(), self.args.max_length)
        # Fingerprints, shards and the folders of in-memory datasets differ between processes: rank 0's path counts
        path = [dataset._get_cache_file_path(Hasher.hash((*everything, self.args.truncation_mode)))]
        broadcast_object_list(path, from_process=0)
        # Nodes may share a disk or not, so all must have the file before any skips the collective loop
        found = torch.tensor([os.path.exists(path[0])], device=self.accelerator.device, dtype=torch.int32)
        if not self.accelerator.gather(found).all():
            self._write_token_columns(dataset, batch_size, columns, path[0], compute, description, collator)
        return concatenate_datasets([dataset, Dataset.from_file(path[0])], axis=1)

    def _reference_hash(self) -> str:
        """TRL's hash of the reference, with this rank's shards under ZeRO-3, where TRL sees empty tensors."""
        total = hashlib.sha256(str(self._precompute_model_hash).encode())
        for parameter in (self.ref_model or self.model).parameters():
            if getattr(parameter, "ds_tensor", None) is not None:
                total.update(parameter.ds_tensor.detach().float().cpu().numpy().tobytes())
        return total.hexdigest()

    def _write_token_columns(
        self,
        dataset: Dataset,
        batch_size: int,
        columns: dict[str, str],
        path: str,
        compute: Callable[[Any, dict[str, Any]], torch.Tensor],
        description: str,
        collator: Any,
    ) -> None:
        loader = self.accelerator.prepare(
            DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_size=batch_size,
                collate_fn=collator or self.data_collator,
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
        # Nor under FSDP, where TRL shards a copy for a full fine-tuning and has nothing for an adapter's base
        unplaced = self.is_fsdp_enabled and self.ref_model is None and self.optimizer is None
        home = next(model.parameters()).device
        if unplaced:
            model.to(self.accelerator.device)
        ids = dataset.select_columns(list(IDS))
        writer = None
        if self.accelerator.is_local_main_process:  # a node's processes read one file
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{self.accelerator.process_index}.incomplete"
            features = Features({column: List(Value("float32")) for column in columns.values()})
            writer = ArrowWriter(features=features, path=temporary)
        row = 0
        for batch in tqdm(loader, desc=description):
            per_token = compute(model, dict(batch)).chunk(2)
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
        if unplaced:
            model.to(home)  # from where accelerate shards it
        if writer is not None:
            writer.finalize()
            os.replace(temporary, path)
        self.accelerator.wait_for_everyone()

    def _completion_values(self, shifted: np.ndarray, prompt_length: int, completion_length: int) -> np.ndarray:
        """Values of the completion's tokens, 0 for those that truncation cuts, from a row of the model's output."""
        total = prompt_length + completion_length
        kept = total if self.args.max_length is None else min(total, self.args.max_length)
        first = total - kept if self.args.truncation_mode == "keep_end" else 0
        values = np.zeros(total, dtype=np.float32)
        values[first + 1 : first + kept] = shifted[: kept - 1]
        return values[prompt_length:]

    def _reference(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The reference's per-token log-probs (2B, L − 1) of a batch: precomputed, or by a forward now."""
        if not self.precompute_ref_logps:
            return self._reference_logps(self.ref_model or self.model, inputs)
        if "ref_token_logps" not in inputs:
            raise ContractError(
                "The batch has no `ref_token_logps`; let the data collator return them as "
                "DataCollatorForTokenSignals does, or set `precompute_ref_log_probs=False`."
            )
        return inputs["ref_token_logps"][:, 1:]

    # -------------------------------------------------------------------------------------------------------- loss

    def _trl_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        reference: torch.Tensor | None,
        weights: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> tuple[torch.Tensor, Any, _StandIn]:
        """What `DPOTrainer` computes and logs where a token's log-prob counts by its weight.

        Args:
            reference: (2B, L − 1) log-probs; None stands for 0, where the loss compares with none.
            weights: (2B, L − 1) factors of policy and reference alike; None is 1.

        Returns:
            The loss, the outputs (None unless asked for) and what the policy returned.
        """
        batch = trl_inputs(inputs)
        mask = batch["completion_mask"][:, 1:]
        if reference is None:
            reference = torch.zeros(mask.shape, device=mask.device)
        elif weights is not None:
            reference = reference * weights.to(reference.device)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = self._sequence_logps(reference, mask).chunk(2)
        stand_in = _StandIn(model, mask.size(1), weights)
        # TRL then reads the reference's sums from the batch and runs no reference itself
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = DPOTrainer.compute_loss(self, stand_in, batch, return_outputs)
        finally:
            self.precompute_ref_logps = before
        return *(result if return_outputs else (result, None)), stand_in

    def _take_over(self, loss_type: str) -> float:
        """Take one of TRL's losses out of its sum, for a method's own in its place; returns the weight of that."""
        index = self.loss_types.index(loss_type)
        self.loss_types.pop(index)
        return self.loss_weights.pop(index)

    def _read_tokens(self, inputs: dict[str, Any]) -> torch.Tensor:
        """True (2B, L − 1) on the predicted completion tokens of the sides whose signal is read."""
        sides = self._collates()[1]
        halves = zip(SIDES, inputs["completion_mask"][:, 1:].bool().chunk(2), strict=True)
        return torch.cat([half if side in sides else torch.zeros_like(half) for side, half in halves])

    def _token_signal(self, inputs: dict[str, Any], elsewhere: float) -> torch.Tensor | None:
        """What the method needs (2B, L − 1) beside the predicted tokens of a batch; None if no signal is read.

        `elsewhere` stands where none is read: the rule need not map the collator's padding of 0 to it.

        Raises:
            ContractError: the rule of a user's own signal leaves the range that the method needs.
        """
        if not self._collates()[1]:
            return None
        if "token_signal" not in inputs:
            raise ContractError(
                "The batch has no `token_signal`; let the data collator return it (2B, L, beside `input_ids`) as "
                "DataCollatorForTokenSignals does."
            )
        values = torch.where(self._read_tokens(inputs), self._convert(inputs["token_signal"][:, 1:]), elsewhere)
        (least, most), (low, high) = NEEDED[self._needs], (limit.item() for limit in values.aminmax())
        if not (least - 1e-6 <= low and high <= most + 1e-6):  # also true for NaN
            raise ContractError(
                f"The signal {self._collates()[0]!r} gives a {self._needs} from {low:g} to {high:g}, and {self._name} "
                f"needs it in [{least:g}, {most:g}]; correct the `to_weight` that the signal is registered with."
            )
        return values

    def _sequence_logps(self, per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """TRL's sum over positions, (2B, L − 1) -> (2B,), where `ld_alpha` scales what the other side lacks."""
        if self.ld_alpha is None:
            return per_token.sum(dim=1)
        position = mask.cumsum(dim=1)
        shared = mask.sum(dim=1).view(2, -1).amin(dim=0).repeat(2).unsqueeze(1)
        tail = (per_token * (position > shared)).sum(dim=1)
        return (per_token * ((position > 0) & (position <= shared))).sum(dim=1) + self.ld_alpha * tail

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


class _StandIn:
    """What TRL calls in a model's place: keeps the per-token log-probs and hands them on, times their weights.

    Attributes:
        log_probs: (2B, L − 1) of the predicted tokens, unweighted.
        log_sum_sq_probs: (2B, L − 1) log Σ_v π(v)², which WPO compares with; None without `use_weighting`.
    """

    def __init__(self, model: Any, length: int, weights: torch.Tensor | None = None):
        self.model, self.length, self.weights = model, length, weights

    def __call__(self, **arguments: Any) -> Any:
        output = self.model(**arguments)
        full = getattr(output, "log_probs", None)
        if full is None:  # an ordinary forward, for `compute_metrics`
            return output
        self.log_probs = full[:, -self.length :]  # prompt-learning PEFT puts virtual tokens first
        squares = getattr(output, "log_sum_sq_probs", None)
        self.log_sum_sq_probs = None if squares is None else squares[:, -self.length :]
        if self.weights is not None:
            weights = F.pad(self.weights.to(full.device), (full.size(1) - self.length, 0), value=1.0)
            output.log_probs = full * weights
            if squares is not None:
                # WPO subtracts this from the log-probs it is given: the unweighted ones are what it should see
                output.log_sum_sq_probs = squares + (weights - 1.0) * full.detach()
        return output


def trl_inputs(inputs: Any) -> dict[str, Any]:
    """A batch without what our collators add to TRL's: extra keys would reach the model."""
    return {k: v for k, v in inputs.items() if k not in _ADDED and not k.startswith(REVISION)}


def drop_rows(
    dataset: Dataset | IterableDataset,
    fits: Callable[..., bool],
    columns: list[str],
    num_proc: int | None,
    name: str,
    *,
    why: str,
    remedy: str,
) -> Dataset | IterableDataset:
    """Rows for which `fits(*columns)` holds; the others are counted in a warning, and all of them are an error."""
    if isinstance(dataset, IterableDataset):
        return dataset.filter(fits, input_columns=columns)
    with global_then_local_main_first():
        kept = dataset.filter(fits, input_columns=columns, num_proc=num_proc, desc=f"Dropping rows of {name} dataset")
    if len(kept) == 0:
        raise ContractError(f"No row of the {name} dataset is left: {why}; {remedy}.")
    if len(kept) < len(dataset):
        logger.warning(f"Dropped {len(dataset) - len(kept)} of {len(dataset)} rows of the {name} dataset: {why}.")
    return kept
