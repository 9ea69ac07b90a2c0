r"""GRPO with structured-output rewards: teach a model to answer in the structure that a JSON Schema asks for.

    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/structured_grpo.py \
        --config recipes/qwen3-4b-instruct/structured_grpo.yaml
    python recipes/structured_grpo.py --model_name_or_path runs/sft --dataset_name runs/gsm8k_json \
        --schema schema.json --rollouts vllm-colocate --output_dir runs/structured_grpo

`dataset_name` is a folder of structured problems (data/gsm8k_json.py, data/bfcl.py, data/cooking.py, data/ledger.py) or
a dataset on the hub with a column `prompt`; `schema` (a JSON file) is for all rows, the column `schema` for each. With
`--rollouts vllm-server`, start `trl vllm-serve --model …` on other GPUs first. Besides the model, `output_dir` gets
`log_history.json` and `curriculum.png`: every component of the reward over the steps.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tokalign.stage.files import write_text_atomically
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import end_processes
from tokalign.trainers import StructuredGRPOConfig, StructuredGRPOTrainer
from tokalign.trainers.checkpoints import resume_point
from tokalign.view.curriculum import plot_curriculum


@dataclass
class StructuredGRPOScriptArguments(ScriptArguments):
    """TRL's script arguments and one of ours."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Folder or hub id to evaluate on, where it is not `dataset_name`."}
    )


def main(
    script_args: StructuredGRPOScriptArguments, training_args: StructuredGRPOConfig, model_args: ModelConfig
) -> StructuredGRPOTrainer:
    """Train, save to `training_args.output_dir`, draw the curriculum, return the trainer."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if script_args.dataset_name is None:
        raise ValueError("`dataset_name` is required: a folder of structured problems or a dataset on the hub.")
    if training_args.rollouts == "vllm-colocate" and training_args.use_cpu:
        from tokalign.generation.vllm_cpu import prepare_colocated_vllm

        prepare_colocated_vllm()
    eval_dataset = None
    if training_args.eval_strategy != "no":
        name = script_args.eval_dataset_name or script_args.dataset_name
        eval_dataset = load_stage(name, split=script_args.dataset_test_split)
    trainer = StructuredGRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_stage(script_args.dataset_name, split=script_args.dataset_train_split),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=resume_point(training_args))
    trainer.save_model(training_args.output_dir)
    if trainer.is_world_process_zero():
        output, history = Path(training_args.output_dir), trainer.state.log_history
        write_text_atomically(output / "log_history.json", json.dumps(history, indent=1) + "\n")
        plot_curriculum({"training": history}, output / "curriculum.png", trainer.structured.__name__)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()
    end_processes()
    return trainer


if __name__ == "__main__":
    main(*TrlParser((StructuredGRPOScriptArguments, StructuredGRPOConfig, ModelConfig)).parse_args_and_config())
