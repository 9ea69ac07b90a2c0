r"""Critical-token DPO (arXiv 2411.19943) and its baselines: plain DPO, RPO, position-wise aggregation.

    tokalign critical-dpo --config recipes/llama-3-8b/critical_dpo.yaml --accelerate_config zero3
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/critical_dpo.py \
        --config recipes/llama-3-8b/critical_dpo.yaml
    tokalign critical-dpo --model_name_or_path runs/base --dataset_name runs/pairs_scored \
        --use_peft --lora_target_modules all-linear --learning_rate 4e-5 --output_dir runs/critical_dpo

`dataset_name` is a folder of scored pairs (`tokalign score contrast`) or a dataset on the hub with the same columns.
`--weight_side none` is plain DPO on the same rows (and takes any preference dataset that TRL takes);
`--loss_type sigmoid sft --loss_weights 1.0 1.0` adds RPO's NLL term to either. With `--eval_strategy steps` the split
`dataset_test_split` of `eval_dataset_name`, or else of `dataset_name`, is evaluated.
`model_name_or_path` may be any folder; merge an SFT adapter into its base before training on from it.
"""

from trl import ModelConfig

from tokalign.cli.train import TemplateDataArguments, train
from tokalign.trainers.critical_token_dpo import CriticalTokenDPOConfig, CriticalTokenDPOTrainer


def main(
    script_args: TemplateDataArguments, training_args: CriticalTokenDPOConfig, model_args: ModelConfig
) -> CriticalTokenDPOTrainer:
    """Train, save, return the trainer."""
    needs = "a folder of scored pairs (`tokalign score contrast`) or a dataset on the hub"
    return train(CriticalTokenDPOTrainer, script_args, training_args, model_args, needs=needs)
