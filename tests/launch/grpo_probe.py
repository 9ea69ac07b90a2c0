"""Run structured GRPO as told by a JSON file, and write what the launcher really gave us, losses and curriculum.

Run by the tests beside it, alone or under `accelerate launch`:
    python tests/launch/grpo_probe.py plan.json report.json
The plan is a list of runs: {"model", "lora", "table", "arguments": {fields of StructuredGRPOConfig}, "resume"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from peft import LoraConfig

from tests.launch.probe import describe
from tests.trainers.structured import make_trainer
from tokalign.generation.vllm_cpu import prepare_colocated_vllm
from tokalign.jobs import end_processes
from tokalign.trainers import StructuredGRPOTrainer


def run(plan: dict[str, Any]) -> StructuredGRPOTrainer:
    """One run of the plan, trained and saved."""
    if plan["arguments"].get("rollouts") == "vllm-colocate":
        prepare_colocated_vllm()
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = dict(plan["arguments"])
    trainer = make_trainer(
        plan["model"],
        arguments.pop("output_dir"),
        table=plan["table"],
        peft_config=lora if plan["lora"] else None,
        **arguments,
    )
    trainer.train(resume_from_checkpoint=plan.get("resume"))
    trainer.save_model(trainer.args.output_dir)
    return trainer


def report(trainer: StructuredGRPOTrainer) -> dict[str, Any]:
    """What accelerate and DeepSpeed ended up with, and the log."""
    keep = ("structured/", "sampling/", "reward", "loss")
    log = [{k: v for k, v in e.items() if k.startswith(keep)} for e in trainer.state.log_history if "loss" in e]
    return describe(trainer) | {"log": log}


def main(plan_path: str, report_path: str) -> None:
    with open(plan_path) as file:
        plan = json.load(file)
    reports = []
    for one in plan:
        trainer = run(one)
        reports.append(report(trainer))
    if trainer.accelerator.is_main_process:
        with open(report_path, "w") as file:
            json.dump(reports, file)
    trainer.end()
    end_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
