"""Train preference trainers as told by a JSON file, and write what the launcher really gave us and the losses.

Run by the tests beside it, alone or under `accelerate launch`:
    python tests/launch/probe.py plan.json report.json
The plan is a list of runs: {"model", "dataset", "lora", "arguments": {fields of the trainer's config}, "resume"}, and
"method" where it is not critical-token DPO.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from transformers import AutoTokenizer

from tokalign.data.contract import load_stage
from tokalign.jobs import end_processes
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer, TRegConfig, TRegTrainer
from tokalign.trainers.token_preference import TokenPreferenceTrainer

METHODS: dict[str, tuple[type[TokenPreferenceTrainer], Any]] = {
    "critical_token_dpo": (CriticalTokenDPOTrainer, CriticalTokenDPOConfig),
    "treg": (TRegTrainer, TRegConfig),
}

ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,  # in the training arguments, where DeepSpeed survives it
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_length": 64,
    "save_strategy": "no",
}


def build(run: dict[str, Any]) -> TokenPreferenceTrainer:
    """The trainer of one run of the plan."""
    trainer, config = METHODS[run.get("method", "critical_token_dpo")]
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(
        model=run["model"],
        args=config(**ARGUMENTS | run["arguments"]),
        train_dataset=load_stage(run["dataset"], stage="preferences", tokenizer=tokenizer),
        processing_class=tokenizer,
        peft_config=lora if run["lora"] else None,
    )


def describe(trainer: TokenPreferenceTrainer) -> dict[str, Any]:
    """What accelerate and DeepSpeed ended up with, after training."""
    state = trainer.accelerator.state
    report: dict[str, Any] = {
        "distributed_type": state.distributed_type.value,
        "num_processes": state.num_processes,
        "zero_stage": None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.is_deepspeed_enabled:
        zero = trainer.deepspeed.config["zero_optimization"]
        report["zero_stage"] = zero["stage"]
        report["offload"] = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
        report["partitioned"] = all(hasattr(p, "ds_id") for p in trainer.model.parameters())
    return report


def train(run: dict[str, Any]) -> TokenPreferenceTrainer:
    """One run of the plan, trained and saved."""
    trainer = build(run)
    trainer.train(resume_from_checkpoint=run.get("resume"))
    trainer.save_model(trainer.args.output_dir)
    return trainer


def carry_out(plan_path: str, report_path: str, train: Callable[..., Any], describe: Callable[..., Any]) -> None:
    """Train every run of the plan and write what is to be said of each."""
    with open(plan_path) as file:
        plan = json.load(file)
    reports = []
    for run in plan:
        trainer = train(run)
        reports.append(describe(trainer))
    if trainer.accelerator.is_main_process:
        with open(report_path, "w") as file:
            json.dump(reports, file)
    trainer.end()
    end_processes()


if __name__ == "__main__":
    carry_out(*sys.argv[1:], train, describe)
