"""Train as told by a JSON file, and write what the launcher really gave us, the losses and the log.

Run by the tests beside it, alone or under `accelerate launch`:
    python tests/launch/probe.py plan.json report.json
The plan is a list of runs, carried out one after another by the same processes: {"method", "model", "lora",
"arguments": {fields of the method's config}, "resume": a checkpoint or None, where the arguments say}, and what a
method reads beside them:
preferences and router "dataset" (a stage), structured GRPO "table" (its completions are known beforehand). A random
model earns no structure, so where it samples, `odd_length` is a reward beside it. Its tokens have a credit each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from tests.trainers import structured
from tokalign.generation.vllm_cpu import prepare_colocated_vllm
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.trainer import RouterConfig, RouterTrainer, new_router
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import end_processes
from tokalign.trainers import (
    CriticalTokenDPOConfig,
    CriticalTokenDPOTrainer,
    StructuredGRPOTrainer,
    TRegConfig,
    TRegTrainer,
)
from tokalign.trainers.checkpoints import resume_point
from tokalign.trainers.token_preference import TokenPreferenceTrainer

ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,  # in the training arguments, where DeepSpeed survives it
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}
LOGGED = ("structured/", "credit/", "sampling/", "reward", "loss")


def let_fsdp_have_cpus(args: TrainingArguments) -> None:
    """Under fsdp2.yaml accelerate looks for processes with GPUs, and would start plain data parallel without them."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        assert args.device.type == "cpu"  # which makes the process group
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def adapter(run: dict[str, Any], task_type: str | None = "CAUSAL_LM") -> LoraConfig | None:
    if not run["lora"]:
        return None
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type=task_type)


def critical_token_dpo(run: dict[str, Any]) -> TokenPreferenceTrainer:
    return _preference(run, CriticalTokenDPOTrainer, CriticalTokenDPOConfig)


def treg(run: dict[str, Any]) -> TokenPreferenceTrainer:
    return _preference(run, TRegTrainer, TRegConfig)


def _preference(run: dict[str, Any], trainer: type[TokenPreferenceTrainer], config: Any) -> TokenPreferenceTrainer:
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    args = config(**ARGUMENTS | {"max_length": 64} | run["arguments"])
    let_fsdp_have_cpus(args)
    return trainer(
        model=run["model"],
        args=args,
        train_dataset=load_stage(run["dataset"], stage="preferences", tokenizer=tokenizer),
        processing_class=tokenizer,
        peft_config=adapter(run),
    )


def structured_grpo(run: dict[str, Any]) -> StructuredGRPOTrainer:
    arguments = dict(run["arguments"])
    if arguments.get("rollouts") == "vllm-colocate":
        prepare_colocated_vllm()
    if arguments.get("eval_strategy"):
        arguments["eval_dataset"] = Dataset.from_list(arguments["rows"])
    return structured.make_trainer(
        run["model"],
        arguments.pop("output_dir"),
        table=run["table"],
        peft_config=adapter(run),
        reward_funcs=None if run["table"] else [structured.odd_length],
        credit_funcs=[structured.ByToken()],
        **arguments,
    )


def router(run: dict[str, Any]) -> RouterTrainer:
    """A router of one block, from the same weights every time, on the splits train and calibration."""
    train, calibration = (RouterDataset(run["dataset"], split=split) for split in ("train", "calibration"))
    args = RouterConfig(**ARGUMENTS | run["arguments"])  # before the model, as in the recipe: it turns ZeRO-3 on
    set_seed(0)
    model = new_router(run["model"], train, width=16, num_blocks=1, dropout=0.0)
    model.attach_embedding_of(run["model"])
    return RouterTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=calibration,
        peft_config=adapter(run, task_type=None),
    )


METHODS: dict[str, Callable[[dict[str, Any]], Trainer]] = {
    "critical_token_dpo": critical_token_dpo,
    "treg": treg,
    "structured_grpo": structured_grpo,
    "router": router,
}


def train(run: dict[str, Any]) -> Trainer:
    """One run of the plan, trained and saved."""
    trainer = METHODS[run["method"]](run)
    trainer.train(resume_from_checkpoint=run.get("resume") or resume_point(trainer.args))
    trainer.save_model(trainer.args.output_dir)
    return trainer


def describe(trainer: Trainer) -> dict[str, Any]:
    """What accelerate and DeepSpeed ended up with, after training, and the log."""
    state = trainer.accelerator.state
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    report: dict[str, Any] = {
        "distributed_type": state.distributed_type.value,
        "num_processes": state.num_processes,
        "zero_stage": None,
        "partitioned": all(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in trainer.model.parameters()),
        "losses": [entry["loss"] for entry in steps],
        "log": [{key: value for key, value in entry.items() if key.startswith(LOGGED)} for entry in steps],
        "evaluations": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
    }
    if trainer.is_deepspeed_enabled:
        zero = trainer.deepspeed.config["zero_optimization"]
        report["zero_stage"] = zero["stage"]
        report["offload"] = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    return report


def carry_out(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train every run of the plan and say what is to be said of each."""
    return [describe(train(run)) for run in plan]


if __name__ == "__main__":
    plan_path, report_path = map(Path, sys.argv[1:])
    reports = carry_out(json.loads(plan_path.read_text()))
    if PartialState().is_main_process:
        report_path.write_text(json.dumps(reports))
    end_processes()
