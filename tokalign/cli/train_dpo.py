r"""Plain DPO: loss, gradients and metrics of TRL's `DPOTrainer`, by the recipe of critical-token DPO, unweighted.

    tokalign dpo --config recipes/llama-3-8b/dpo.yaml --accelerate_config zero3
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/critical_dpo.py \
        --config recipes/llama-3-8b/dpo.yaml
    tokalign dpo --model_name_or_path runs/base --dataset_name pairs.jsonl --output_dir runs/dpo

`dataset_name` is any preference dataset that TRL takes, or a folder of pairs of this package (`tokalign pairs`), whose
ids are trained on as they are. A difference to a run of `tokalign critical-dpo` is then the method's.
"""

from dataclasses import dataclass, field

from trl import ModelConfig

from tokalign.cli.train import TemplateDataArguments, train
from tokalign.trainers.critical_token_dpo import CriticalTokenDPOConfig, CriticalTokenDPOTrainer


@dataclass
class PlainDPOConfig(CriticalTokenDPOConfig):
    """Plain DPO: every option of TRL's DPOConfig; those of critical-token DPO are at rest."""

    weight_side: str = field(default="none", metadata={"help": "No token is weighted.", "choices": ["none"]})

    def __post_init__(self):
        if self.weight_side != "none":
            raise ValueError(f"weight_side is {self.weight_side!r}; `tokalign critical-dpo` is the one with weights.")
        super().__post_init__()


def main(
    script_args: TemplateDataArguments, training_args: PlainDPOConfig, model_args: ModelConfig
) -> CriticalTokenDPOTrainer:
    """Train, save, return the trainer."""
    needs = "a folder of pairs (`tokalign pairs`) or a preference dataset on the hub"
    return train(CriticalTokenDPOTrainer, script_args, training_args, model_args, needs=needs)
