r"""T-REG (arXiv 2412.02685) and its base losses: DPO or SimPO, with or without token-reward regularisation.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/treg.py \
        --config recipes/llama-3-8b-instruct/treg.yaml
    python recipes/treg.py --model_name_or_path runs/base --dataset_name runs/pairs_rewarded \
        --use_peft --lora_target_modules all-linear --learning_rate 5e-6 --output_dir runs/treg

`dataset_name` is a folder of pairs with token rewards (scripts/score_token_rewards.py). Pairs without them, or any text
preference dataset that TRL takes, work too: the reference is then asked for the rewards while training, which costs
two forward passes more a completion, each step (with `--precompute_ref_log_probs` once, before training).
`--alpha 0` is the base loss; tokalign/trainers/treg.py lists the paper's ablation by arguments. With
`--eval_strategy steps` the split `dataset_test_split` of `eval_dataset_name`, or else of `dataset_name`, is evaluated.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tokalign.stage.loading import load_stage
from tokalign.stage.processes import end_processes
from tokalign.trainers import TRegConfig, TRegTrainer
from tokalign.trainers.checkpoints import resume_point


@dataclass
class TRegScriptArguments(ScriptArguments):
    """TRL's script arguments and one of ours."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id to evaluate on, where it is not `dataset_name`."}
    )


def main(script_args: TRegScriptArguments, training_args: TRegConfig, model_args: ModelConfig) -> TRegTrainer:
    """Train, save to `training_args.output_dir`, return the trainer."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` is required: a folder of pairs or a preference dataset on the hub.")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        name = script_args.eval_dataset_name or script_args.dataset_name
        eval_dataset = load_stage(name, split=script_args.dataset_test_split)
    trainer = TRegTrainer(
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
    main(*TrlParser((TRegScriptArguments, TRegConfig, ModelConfig)).parse_args_and_config())
