r"""Supervised fine-tuning: base models from scratch, positive and negative adapters, and the SFT baseline.

    tokalign sft --config recipes/llama-3-8b/positive_sft.yaml --accelerate_config zero3
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py \
        --config recipes/llama-3-8b/positive_sft.yaml

`dataset_name` is a stage of this package (such as `positive/` from `tokalign pairs`, whose `input_ids` and
`completion_mask` TRL takes as they are) or any dataset that TRL's SFTTrainer accepts, on the hub or in a folder.
`--from_scratch` keeps architecture and tokenizer of `model_name_or_path` and draws fresh weights from `seed`.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    set_seed,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from tokalign.cli.train import TemplateDataArguments, check_given, model_of, train
from tokalign.stage.errors import OptionError


@dataclass
class SFTScriptArguments(TemplateDataArguments):
    """Data and start, besides TRL's script arguments."""

    allow_other_tokenizer: bool = field(
        default=False,
        metadata={"help": "Train on ids that another tokenizer has made; it is noted beside the model."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw fresh weights instead of loading them."})


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    """Train, save, return the trainer."""
    needs = "a folder of SFT rows (`positive/` of `tokalign pairs`) or a dataset on the hub"
    check_given(script_args, model_args, needs)
    model = model_of(model_args)
    loaded = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model, **loaded)
    given = {}
    if script_args.from_scratch:
        set_seed(training_args.seed)
        given["model"] = _fresh(AutoConfig.from_pretrained(model, **loaded), training_args, model_args)
    return train(
        SFTTrainer,
        script_args,
        training_args,
        model_args,
        needs=needs,
        tokenizer=tokenizer,
        processing_class=tokenizer,
        **given,
    )


def _fresh(config: PretrainedConfig, training_args: SFTConfig, model_args: ModelConfig) -> PreTrainedModel:
    """A model of random weights, by the options that a loaded one would have."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise OptionError("--from_scratch draws fresh weights, which cannot be quantised; leave --load_in_… out.")
    if training_args.model_init_kwargs:
        raise OptionError("--from_scratch loads no model, so --model_init_kwargs is not read; leave it out.")
    options: dict[str, Any] = {"trust_remote_code": training_args.trust_remote_code}
    if model_args.dtype not in (None, "auto"):
        options["dtype"] = model_args.dtype
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return AutoModelForCausalLM.from_config(config, **options)
