r"""GRPO with structured-output rewards: teach a model to answer in the structure that a JSON Schema asks for.

    tokalign structured-grpo --config recipes/qwen3-4b-instruct/structured_grpo.yaml --accelerate_config ddp
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/structured_grpo.py \
        --config recipes/qwen3-4b-instruct/structured_grpo.yaml
    tokalign structured-grpo --model_name_or_path runs/sft --dataset_name runs/gsm8k_json \
        --schema schema.json --rollouts vllm-colocate --output_dir runs/structured_grpo

`dataset_name` is a folder of structured problems (`tokalign data gsm8k-json|snips|bfcl|cooking|ledger|problems`) or a
dataset on the hub with a column `prompt`; `schema` (a JSON file) is for all rows, the column `schema` for each. With
`--rollouts vllm-server`, start `trl vllm-serve --model …` on other GPUs first. Besides the model, `output_dir` gets
`log_history.json` and `curriculum.png`: every component of the reward over the steps.
"""

import json
from pathlib import Path

from trl import ModelConfig

from tokalign.cli.train import DataArguments, train
from tokalign.stage.files import write_text_atomically
from tokalign.trainers.structured_grpo import StructuredGRPOConfig, StructuredGRPOTrainer
from tokalign.view.curriculum import plot_curriculum


def main(
    script_args: DataArguments, training_args: StructuredGRPOConfig, model_args: ModelConfig
) -> StructuredGRPOTrainer:
    """Train, save, draw the curriculum, return the trainer."""
    if training_args.rollouts == "vllm-colocate" and training_args.use_cpu:
        from tokalign.generation.vllm_cpu import prepare_colocated_vllm

        prepare_colocated_vllm()
    needs = "a folder of structured problems or a dataset on the hub"
    return train(
        StructuredGRPOTrainer, script_args, training_args, model_args, needs=needs, before_push=write_curriculum
    )


def write_curriculum(trainer: StructuredGRPOTrainer) -> None:
    """The log and its picture beside the model."""
    if trainer.is_world_process_zero():
        output, history = Path(str(trainer.args.output_dir)), trainer.state.log_history
        write_text_atomically(output / "log_history.json", json.dumps(history, indent=1) + "\n")
        plot_curriculum({"training": history}, output / "curriculum.png", trainer.structured.__name__)
