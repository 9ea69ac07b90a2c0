r"""Supervised fine-tuning: base models from scratch, positive/negative adapters, and SFT baselines.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py \
        --config recipes/llama-3-8b/positive_sft.yaml
    python recipes/sft.py --config recipes/ledger/base_slm.yaml

`dataset_name` is a stage of this package (a folder with a manifest, e.g. `positive/` from scripts/build_pairs.py, whose
`input_ids` and `completion_mask` TRL takes as they are) or any dataset on the hub that TRL's SFTTrainer accepts.
`--from_scratch` keeps architecture and tokenizer of `model_name_or_path` and draws fresh weights from `seed`.
"""

from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from tokalign.stage.loading import load_stage
from tokalign.stage.processes import end_processes
from tokalign.trainers.checkpoints import resume_point


@dataclass
class SFTScriptArguments(ScriptArguments):
    """TRL's script arguments and one of ours."""

    from_scratch: bool = field(default=False, metadata={"help": "Draw fresh weights instead of loading them."})


def main(script_args: SFTScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> SFTTrainer:
    """Train, save to `training_args.output_dir`, return the trainer."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    model = model_args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(model, revision=model_args.model_revision)
    if script_args.from_scratch:
        set_seed(training_args.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        training_args.model_init_kwargs = None
    evaluates = training_args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=load_stage(script_args.dataset_name, split=script_args.dataset_train_split, tokenizer=tokenizer),
        eval_dataset=load_stage(script_args.dataset_name, split=script_args.dataset_test_split) if evaluates else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.end_training()
    end_processes()
    return trainer


if __name__ == "__main__":
    main(*TrlParser((SFTScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config())
