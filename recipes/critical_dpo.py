r"""Critical-token DPO (arXiv 2411.19943) and its baselines: plain DPO, RPO, position-wise aggregation.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/critical_dpo.py \
        --config recipes/llama-3-8b/critical_dpo.yaml
    python recipes/critical_dpo.py --model_name_or_path runs/base --dataset_name runs/pairs_scored \
        --use_peft --lora_target_modules all-linear --learning_rate 4e-5 --output_dir runs/critical_dpo

`dataset_name` is a folder of scored pairs (scripts/score_contrast.py) or a dataset on the hub with the same columns.
`--weight_side none` is plain DPO on the same rows (and takes any preference dataset that TRL takes);
`--loss_type sigmoid sft --loss_weights 1.0 1.0` adds RPO's NLL term to either. With `--eval_strategy steps` the split
`dataset_test_split` of `eval_dataset_name`, or else of `dataset_name`, is evaluated.
`model_name_or_path` may be any folder; merge an SFT adapter into its base before training on from it.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tokalign.stage.loading import load_stage
from tokalign.stage.processes import end_processes
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer
from tokalign.trainers.checkpoints import resume_point


@dataclass
class CriticalDPOScriptArguments(ScriptArguments):
    """TRL's script arguments and one of ours."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id to evaluate on, where it is not `dataset_name`."}
    )


def main(
    script_args: CriticalDPOScriptArguments, training_args: CriticalTokenDPOConfig, model_args: ModelConfig
) -> CriticalTokenDPOTrainer:
    """Train, save to `training_args.output_dir`, return the trainer."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` is required: a folder of scored pairs or a dataset on the hub.")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        name = script_args.eval_dataset_name or script_args.dataset_name
        eval_dataset = load_stage(name, split=script_args.dataset_test_split)
    trainer = CriticalTokenDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_stage(script_args.dataset_name, split=script_args.dataset_train_split),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()
    end_processes()
    return trainer


if __name__ == "__main__":
    main(*TrlParser((CriticalDPOScriptArguments, CriticalTokenDPOConfig, ModelConfig)).parse_args_and_config())
