r"""T-REG (arXiv 2412.02685) and its base losses: DPO or SimPO, with or without token-reward regularisation.

    tokalign treg --config recipes/llama-3-8b-instruct/treg.yaml --accelerate_config zero3
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/treg.py \
        --config recipes/llama-3-8b-instruct/treg.yaml
    tokalign treg --model_name_or_path runs/base --dataset_name runs/pairs_rewarded \
        --use_peft --lora_target_modules all-linear --learning_rate 5e-6 --output_dir runs/treg

`dataset_name` is a folder of pairs with token rewards (`tokalign score token-reward`). Pairs without them, or any text
preference dataset that TRL takes, work too: the reference is then asked for the rewards while training, which costs
two forward passes more a completion, each step (with `--precompute_ref_log_probs` once, before training).
`--alpha 0` is the base loss; tokalign/trainers/treg.py lists the paper's ablation by arguments. With
`--eval_strategy steps` the split `dataset_test_split` of `eval_dataset_name`, or else of `dataset_name`, is evaluated.
"""

from trl import ModelConfig

from tokalign.cli.train import TemplateDataArguments, train
from tokalign.trainers.treg import TRegConfig, TRegTrainer


def main(script_args: TemplateDataArguments, training_args: TRegConfig, model_args: ModelConfig) -> TRegTrainer:
    """Train, save, return the trainer."""
    needs = "a folder of pairs or a preference dataset on the hub"
    return train(TRegTrainer, script_args, training_args, model_args, needs=needs)
