"""What the training verbs share: data by TRL's script arguments, the model's options, the run, and what is kept of it.

A method's own file is its arguments and a `main` of a few lines that names its trainer (arguments as in TRL's scripts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from tokalign.stage.contract import TEXT_ROWS, check_sft, reader_of
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import note_beside_model
from tokalign.trainers.checkpoints import resume_point
from tokalign.trainers.registry import TRAINERS


@dataclass
class DataArguments(ScriptArguments):
    """Data, besides TRL's script arguments."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id to evaluate on, where it is not `dataset_name`."}
    )


def train(
    trainer_class: type[Any],
    script_args: DataArguments,
    training_args: Any,
    model_args: ModelConfig,
    *,
    needs: str,
    tokenizer: Any = None,
    before_push: Callable[[Any], None] | None = None,
    **given: Any,
) -> Any:
    """Train or resume, save to `training_args.output_dir`, push if asked to, and return the trainer.

    Args:
        trainer_class: a TRL trainer or one of ours; `training_args` is its configuration.
        needs: what `dataset_name` is, for the error where it is not given.
        tokenizer: the tokenizer that must have made the ids of a stage, where the trainer does not check it itself.
        before_push: called with the trained trainer; what it writes to `output_dir` is pushed too.
        given: further arguments of the trainer, such as a `model` that is not to be loaded.

    Raises:
        ValueError: `dataset_name` or `model_name_or_path` is missing.
        ContractError: the dataset cannot be read.
    """
    if script_args.dataset_name is None:
        raise ValueError(f"--dataset_name is required: {needs}.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if "model" in given:
        training_args.model_init_kwargs = None  # nothing is loaded
    eval_dataset = None
    if training_args.eval_strategy != "no":
        name = script_args.eval_dataset_name or script_args.dataset_name
        eval_dataset = _load(name, script_args.dataset_test_split, script_args, tokenizer)
    trainer = trainer_class(
        args=training_args,
        train_dataset=_load(script_args.dataset_name, script_args.dataset_train_split, script_args, tokenizer),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **{"model": model_of(model_args), **given},
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.save_model(training_args.output_dir)
    if tokenizer is not None and training_args.should_save:
        name, allowed = trainer_class.__name__, _allows(script_args)
        note_beside_model(training_args.output_dir, name, trainer.train_dataset, allowed=allowed)
    if before_push is not None:
        before_push(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()
    return trainer


def main_of_trainer(module: str) -> Callable[..., Any]:
    """The verb of a trainer that has no file of its own in cli/; its row says what the data is."""
    row = next(row for row in TRAINERS if module == f"tokalign.trainers.{row.module}")
    config_class, trainer_class = (getattr(import_module(module), name) for name in row.classes)

    def main(script_args: DataArguments, training_args: Any, model_args: ModelConfig) -> Any:
        """Train, save, return the trainer."""
        return train(trainer_class, script_args, training_args, model_args, needs=row.data)

    main.__annotations__["training_args"] = config_class
    return main


def model_of(model_args: ModelConfig) -> str:
    """Hub id or folder of the model to train."""
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is required: a folder or a hub id.")
    return model_args.model_name_or_path


def _load(name: str, split: str, script_args: DataArguments, tokenizer: Any = None) -> Dataset | IterableDataset:
    """A split of a stage, or of a dataset on the hub with TRL's options for one (configuration, streaming)."""
    if Path(name).is_file():
        split = "train"  # a file is one split, whatever it is used for
    if Path(name).exists() or not (script_args.dataset_config or script_args.dataset_streaming):
        dataset = load_stage(name, split=split, tokenizer=tokenizer, allow_other_tokenizer=_allows(script_args))
    else:
        dataset = load_dataset(name, script_args.dataset_config, split=split, streaming=script_args.dataset_streaming)
    return dataset if tokenizer is None else _with_checked_ids(dataset, tokenizer, script_args)


def _with_checked_ids(dataset: Dataset | IterableDataset, tokenizer: Any, script_args: DataArguments) -> Any:
    """Rows whose `input_ids` TRL will train on as they are, once they are known to be this tokenizer's."""
    if "input_ids" not in next(iter(dataset), {}):
        return dataset
    reader, text_rows = reader_of(dataset, tokenizer), 0 if _allows(script_args) else TEXT_ROWS
    if isinstance(dataset, Dataset):
        check_sft(dataset, reader, text_rows=text_rows)
        return dataset

    def check(batch: dict[str, list]) -> dict[str, list]:
        check_sft(Dataset.from_dict(batch), reader, text_rows=text_rows)
        return batch

    return dataset.map(check, batched=True, batch_size=64)


def _allows(script_args: DataArguments) -> bool:
    return getattr(script_args, ALLOW_OTHER_TOKENIZER, False)
