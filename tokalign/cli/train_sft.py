r"""Supervised fine-tuning: base models from scratch, positive and negative adapters, and the SFT baseline.

    tokalign sft --config recipes/llama-3-8b/positive_sft.yaml --accelerate_config zero3
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py \
        --config recipes/llama-3-8b/positive_sft.yaml

`dataset_name` is a stage of this package (such as `positive/` from `tokalign pairs`, whose `input_ids` and
`completion_mask` TRL takes as they are) or any dataset that TRL's SFTTrainer accepts, on the hub or in a folder.
`--from_scratch` keeps architecture and tokenizer of `model_name_or_path` and draws fresh weights from `seed`.
"""

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from tokalign.cli.train import DataArguments, model_of, train


@dataclass
class SFTScriptArguments(DataArguments):
    """Data and start, besides TRL's script arguments."""

    allow_other_tokenizer: bool = field(
        default=False,
        metadata={"help": "Train on ids that another tokenizer has made; it is noted beside the model."},
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw fresh weights instead of loading them."})


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    """Train, save, return the trainer."""
    model = model_of(model_args)
    tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
    given = {}
    if script_args.from_scratch:
        set_seed(training_args.seed)
        given["model"] = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    needs = "a folder of SFT rows (`positive/` of `tokalign pairs`) or a dataset on the hub"
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
