"""What the training verbs share: data by TRL's script arguments, the model's options, the run, and what is kept of it.

A method's own file is its arguments and a `main` of a few lines that names its trainer (arguments as in TRL's scripts).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from tokalign.internals.datasets import DatasetNotFoundError
from tokalign.prompts import RECORD, UNRENDERED, TemplateArguments, give_variables, refused_row, rendering_of
from tokalign.stage.contract import TEXT_ROWS, check_sft, check_tokenizer, first_row, reader_of
from tokalign.stage.errors import ContractError, OptionError
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER
from tokalign.stage.loading import Rows, check_one_tokenizer, manifest_at, open_rows
from tokalign.stage.manifest import SAMPLING, manifest_of, note_beside_model
from tokalign.trainers.checkpoints import resume_point
from tokalign.trainers.prompts import note_prompts, training_prompts
from tokalign.trainers.registry import TRAINERS

logger = logging.get_logger(__name__)


@dataclass
class DataArguments(ScriptArguments, DatasetMixtureConfig):
    """Data, by TRL's script arguments or as a mixture of data sets (`datasets:` in a YAML)."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder, file or hub id to evaluate on, where it is not `dataset_name`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.datasets and (self.streaming or self.test_split_size is not None):
            raise OptionError(
                "--streaming and --test_split_size are of the mixture `datasets:`; use --dataset_streaming and "
                "--dataset_test_split with --dataset_name."
            )
        if self.streaming and self.test_split_size is not None:
            raise OptionError("--test_split_size cannot split a stream; set --streaming false or --eval_dataset_name.")


@dataclass
class TemplateDataArguments(DataArguments, TemplateArguments):
    """Data, and what its chat template is given, for trainers whose configuration does not say that (GRPO's does)."""

    def __post_init__(self) -> None:  # TRL's classes before it do not pass the call on
        super().__post_init__()
        TemplateArguments.__post_init__(self)


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
        needs: what `dataset_name` is, for the error where no data is given.
        tokenizer: the tokenizer that must have made the ids of a stage, where the trainer does not check it itself.
        before_push: called with the trained trainer; what it writes to `output_dir` is pushed too.
        given: further arguments of the trainer, such as a `model` that is not to be loaded.

    Raises:
        OptionError: `dataset_name` or `model_name_or_path` is missing, or an option would not be read.
        ContractError: the dataset cannot be read, or has no rows.
    """
    check_given(script_args, model_args, needs)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if "model" in given:
        training_args.model_init_kwargs = None  # nothing is loaded
    train_dataset, eval_dataset = _datasets(script_args, training_args, tokenizer)
    resume = resume_point(training_args)
    renderer = given.get("processing_class") or tokenizer_of(model_args, training_args)
    given_variables = {**vars(training_args), **vars(script_args)}.get("chat_template_kwargs")
    rendering = training_prompts(
        train_dataset,
        renderer,
        given_variables,
        of=script_args.dataset_name or "the mixture",
        folder=training_args.output_dir,
        resumed=resume is not None,
        any_template=_allows(script_args) or _allows(training_args),
    )
    if rendering is not None and rendering.date is not None:
        given["processing_class"] = renderer  # told the date, where TRL would load one that reads the clock
    if isinstance(script_args, TemplateArguments):  # GRPO reads its configuration, the others the rows
        train_dataset = give_variables(train_dataset, given_variables)
        # Text that is evaluated on is rendered as the ids that are trained on were
        followed = given_variables if rendering is None else rendering.chat_template_kwargs
        eval_dataset = None if eval_dataset is None else give_variables(eval_dataset, followed)
    if rendering is not None and eval_dataset is not None:  # ids to evaluate on that were rendered otherwise: a warning
        asked = TemplateArguments(chat_template_kwargs=dict(rendering.chat_template_kwargs))
        recorded = (manifest_of(eval_dataset) or {}).get(RECORD)
        rendering_of(asked, renderer, recorded=recorded, of="the rows to evaluate on")
    try:
        trainer = trainer_class(
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            **{"model": model_of(model_args), **given},
        )
    except UNRENDERED as error:
        raise refused_row(train_dataset, renderer, error) from error
    _check_vocabulary(trainer)
    if script_args.ignore_bias_buffers:  # as TRL's scripts do; DDP reads it when it wraps the model
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [n for n, buffer in buffers if buffer.dtype == torch.bool]
    note_prompts(training_args.output_dir, rendering, renderer)
    trainer.train(resume_from_checkpoint=resume)
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


def _check_vocabulary(trainer: Any) -> None:
    """Refuse a tokenizer with more ids than the model's embedding has rows, before an id is looked up in vain."""
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    embedding = trainer.model.get_input_embeddings() if tokenizer is not None else None
    rows = getattr(embedding, "num_embeddings", None)  # the weight itself is elsewhere under ZeRO-3
    if rows is not None and len(tokenizer) > rows:
        raise ContractError(
            f"The tokenizer has {len(tokenizer)} ids, but the model's embedding has {rows} rows; use the model's own "
            "tokenizer, or resize the model (`model.resize_token_embeddings`) and save it."
        )


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


def check_given(script_args: DataArguments, model_args: ModelConfig, needs: str) -> None:
    """Refuse, before anything is loaded, a training without data or without a model."""
    if script_args.dataset_name is None and not script_args.datasets:
        raise OptionError(f"--dataset_name is required: {needs}.")
    model_of(model_args)


def model_of(model_args: ModelConfig) -> str:
    """Hub id or folder of the model to train."""
    if model_args.model_name_or_path is None:
        raise OptionError("--model_name_or_path is required: a folder or a hub id.")
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


def _datasets(script_args: DataArguments, training_args: Any, tokenizer: Any) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on where there is an evaluation."""
    evaluates = training_args.eval_strategy != "no"
    if script_args.eval_dataset_name and not evaluates:
        raise OptionError("--eval_dataset_name is read with --eval_strategy steps or epoch alone; set one of them.")
    mixture = None
    if script_args.datasets:
        if script_args.dataset_name is not None:
            logger.warning("`datasets` and `dataset_name` are both given; as in TRL's scripts, `datasets` is read.")
        mixture = _mixture(script_args, training_args.seed, tokenizer)

    def rows(split: str) -> Rows:
        if mixture is None:
            return _open(str(script_args.dataset_name), split, script_args, tokenizer)
        if split not in mixture:
            raise ContractError(
                f"The mixture has no split {split!r} (it has {', '.join(mixture)}); set --test_split_size, or "
                "--eval_dataset_name for the evaluation."
            )
        return mixture[split]

    train_dataset = rows(script_args.dataset_train_split)
    if not evaluates:
        return train_dataset, None
    name, split = script_args.eval_dataset_name, script_args.dataset_test_split
    if name is None:
        one_file = mixture is None and Path(str(script_args.dataset_name)).is_file()
        if one_file and split == ScriptArguments.dataset_test_split:
            raise OptionError(
                f"{script_args.dataset_name} is one split, which is trained on; give what to evaluate on as "
                "--eval_dataset_name, or set --eval_strategy no."
            )
        return train_dataset, rows(split)
    if Path(name).is_file() and split == ScriptArguments.dataset_test_split:
        split = "train"  # a file is one split, whatever it is used for
    return train_dataset, _open(name, split, script_args, tokenizer)


def _open(name: str, split: str, script_args: DataArguments, tokenizer: Any) -> Rows:
    """A split of a stage, or of any dataset with TRL's options for one (configuration, streaming)."""
    own = name == script_args.dataset_name or not Path(name).exists()
    rows = open_rows(
        name,
        split=split,
        config=script_args.dataset_config if own else None,  # names none of another folder's
        streaming=script_args.dataset_streaming,
        tokenizer=tokenizer,
        allow_other_tokenizer=_allows(script_args),
    )
    first_row(rows, f"The split {split!r} of {name}")
    return rows if tokenizer is None else _with_checked_ids(rows, tokenizer, script_args)


def _mixture(script_args: DataArguments, seed: int, tokenizer: Any) -> dict[str, Rows]:
    """TRL's mixture of data sets; what is a stage of this package in it is whole, and all stages are of one tokenizer.

    TRL splits off the test rows by NumPy's global generator, which every process would have in another state: each
    would evaluate on rows that others train on. So it is seeded first.
    """
    manifests = [manifest_at(part.path, part.split) for part in script_args.datasets]
    for part, manifest in zip(script_args.datasets, manifests, strict=True):
        if manifest is not None and tokenizer is not None:
            check_tokenizer(manifest, tokenizer, part.path, allow=_allows(script_args))
    hashes = [manifest.get("tokenizer_hash") for manifest in manifests if manifest is not None]
    check_one_tokenizer(hashes, "the mixture")
    set_seed(seed)
    try:
        mixture: dict[str, Rows] = dict(get_dataset(script_args))  # type: ignore[arg-type]
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ContractError(
            f"A part of the mixture cannot be read ({error}); check its path: of a file, `datasets` takes the format "
            "as `path`, such as json or parquet, and the file as `data_files`."
        ) from error
    said = {key: [(part or {}).get(key) for part in manifests] for key in ("tokenizer_hash", RECORD, SAMPLING)}
    for split, rows in mixture.items():
        first_row(rows, f"The split {split!r} of the mixture")
        if len(hashes) == len(manifests) and None not in hashes:
            agreed = {key: each[0] for key, each in said.items() if each[0] and each == each[:1] * len(each)}
            rows.info.description = json.dumps(agreed)
        if tokenizer is not None:
            mixture[split] = _with_checked_ids(rows, tokenizer, script_args)
    return mixture


def _with_checked_ids(dataset: Rows, tokenizer: Any, script_args: DataArguments) -> Rows:
    """Rows whose `input_ids` TRL will train on as they are, once they are known to be this tokenizer's."""
    if "input_ids" not in first_row(dataset, "The dataset"):
        return dataset
    reader, text_rows = reader_of(dataset, tokenizer), 0 if _allows(script_args) else TEXT_ROWS
    if isinstance(dataset, Dataset):
        check_sft(dataset, reader, text_rows=text_rows)
        return dataset

    def check(batch: dict[str, list]) -> dict[str, list]:
        check_sft(Dataset.from_dict(batch), reader, text_rows=text_rows)
        return batch

    return dataset.map(check, batched=True, batch_size=64)


def _allows(arguments: Any) -> bool:
    return getattr(arguments, ALLOW_OTHER_TOKENIZER, False)
