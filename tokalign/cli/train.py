"""What the training verbs share: data by TRL's script arguments, the model's options, the run, and what is kept of it.

A method's own file is its arguments and a `main` of a few lines that names its trainer (arguments as in TRL's scripts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from tokalign.prompts import TemplateArguments, give_variables, refused_row
from tokalign.stage.loading import load_stage
from tokalign.trainers.checkpoints import resume_point
from tokalign.trainers.prompts import note_prompts, training_prompts
from tokalign.trainers.registry import TRAINERS


@dataclass
class DataArguments(ScriptArguments):
    """Data, besides TRL's script arguments."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id to evaluate on, where it is not `dataset_name`."}
    )


@dataclass
class TemplateDataArguments(DataArguments, TemplateArguments):
    """Data, and what its chat template is given, for trainers whose configuration does not say that (GRPO's does)."""


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
        eval_dataset = _load(name, script_args.dataset_test_split, script_args)
    train_dataset = _load(script_args.dataset_name, script_args.dataset_train_split, script_args, tokenizer)
    resume = resume_point(training_args)
    renderer = given.get("processing_class") or tokenizer_of(model_args, training_args)
    given_variables = {**vars(training_args), **vars(script_args)}.get("chat_template_kwargs")
    rendering = training_prompts(
        train_dataset,
        renderer,
        given_variables,
        of=script_args.dataset_name,
        folder=training_args.output_dir,
        resumed=resume is not None,
    )
    if rendering is not None and rendering.date is not None:
        given["processing_class"] = renderer  # told the date, where TRL would load one that reads the clock
    if isinstance(script_args, TemplateArguments):  # GRPO reads its configuration, the others the rows
        train_dataset = give_variables(train_dataset, given_variables)
        eval_dataset = None if eval_dataset is None else give_variables(eval_dataset, given_variables)
    try:
        trainer = trainer_class(
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            **{"model": model_of(model_args), **given},
        )
    except TemplateError as error:
        raise refused_row(train_dataset, renderer, error) from error
    note_prompts(training_args.output_dir, rendering, renderer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training_args.output_dir)
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

    # A configuration with such a field of its own, as GRPO's, says itself what the template is given
    own = "chat_template_kwargs" in {field.name for field in fields(config_class)}

    def main(script_args: DataArguments, training_args: Any, model_args: ModelConfig) -> Any:
        """Train, save, return the trainer."""
        return train(trainer_class, script_args, training_args, model_args, needs=row.data)

    main.__annotations__ |= {
        "script_args": DataArguments if own else TemplateDataArguments,
        "training_args": config_class,
    }
    return main


def model_of(model_args: ModelConfig) -> str:
    """Hub id or folder of the model to train."""
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is required: a folder or a hub id.")
    return model_args.model_name_or_path


def tokenizer_of(model_args: ModelConfig, training_args: Any) -> Any:
    """The model's tokenizer, as TRL's trainers load it."""
    return AutoTokenizer.from_pretrained(
        model_of(model_args),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        truncation_side="left",
        padding_side="left",
    )


def _load(name: str, split: str, script_args: DataArguments, tokenizer: Any = None) -> Dataset | IterableDataset:
    """A split of a stage, or of a dataset on the hub with TRL's options for one (configuration, streaming)."""
    if Path(name).is_file():
        split = "train"  # a file is one split, whatever it is used for
    if Path(name).exists() or not (script_args.dataset_config or script_args.dataset_streaming):
        return load_stage(name, split=split, tokenizer=tokenizer)
    return load_dataset(name, script_args.dataset_config, split=split, streaming=script_args.dataset_streaming)
