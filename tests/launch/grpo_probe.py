"""Run structured GRPO as told by a JSON file, and write what the launcher really gave us, losses and curriculum.

Run by the tests beside it, alone or under `accelerate launch`:
    python tests/launch/grpo_probe.py plan.json report.json
The plan is a list of runs: {"model", "lora", "table", "arguments": {fields of StructuredGRPOConfig}, "resume"}. Without
"table", completions are sampled, and since a random model earns no structure, `odd_length` is a reward beside it.
"""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from tests.launch.probe import carry_out, describe
from tests.trainers.structured import make_trainer, odd_length
from tokalign.generation.vllm_cpu import prepare_colocated_vllm
from tokalign.trainers import StructuredGRPOTrainer


def run(plan: dict[str, Any]) -> StructuredGRPOTrainer:
    """One run of the plan, trained and saved."""
    if plan["arguments"].get("rollouts") == "vllm-colocate":
        prepare_colocated_vllm()
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = dict(plan["arguments"])
    if arguments.get("eval_strategy"):
        arguments["eval_dataset"] = Dataset.from_list(arguments["rows"])
    trainer = make_trainer(
        plan["model"],
        arguments.pop("output_dir"),
        table=plan["table"],
        peft_config=lora if plan["lora"] else None,
        reward_funcs=None if plan["table"] else [odd_length],
        **arguments,
    )
    trainer.train(resume_from_checkpoint=plan.get("resume"))
    trainer.save_model(trainer.args.output_dir)
    return trainer


def report(trainer: StructuredGRPOTrainer) -> dict[str, Any]:
    """What accelerate and DeepSpeed ended up with, and the log."""
    keep = ("structured/", "sampling/", "reward", "loss")
    log = [{k: v for k, v in e.items() if k.startswith(keep)} for e in trainer.state.log_history if "loss" in e]
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    return describe(trainer) | {"log": log, "eval": evaluations[-1] if evaluations else None}


if __name__ == "__main__":
    carry_out(*sys.argv[1:], run, report)
