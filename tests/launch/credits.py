"""Train a step with the credits, and write what completions were credited with in all processes (test_credits.py).

accelerate launch … tests/launch/credits.py MODEL POSITIVE NEGATIVE OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer

from tests.trainers.structured import TableRollouts, odd_length, problems, settings
from tokalign.stage.processes import end_processes
from tokalign.trainers import TokenCreditGRPOConfig, TokenCreditGRPOTrainer
from tokalign.trainers.credits import credit_function
from tokalign.trainers.credits.rollout_estimate import RolloutEstimateCredit

NAMES = ("entropy", "graded_entropy", "contrast", "implicit_reward", "teacher", "turns")


def halves(pieces: list[str]) -> list[int]:
    """Borders of which the two processes have different numbers, so their calls of generation must be made equal."""
    return [len(pieces) // 2] if len(pieces) % 2 else [len(pieces) // 3, len(pieces) // 2]


class Turns(TableRollouts):
    """Rollouts of which the tokens 5 to 7 are a tool's, with two numbers that tell the completions of a group apart."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        made = super().__call__(prompts, trainer)
        made["env_mask"] = [[int(not 5 <= t < 8) for t in range(len(ids))] for ids in made["completion_ids"]]
        made["turn_rewards"] = [[float(row % 4 % 3), row % 4 / 2] for row in range(len(prompts))]
        return made


def main(model: str, positive: str, negative: str, output: str) -> None:
    rows = problems(8)
    said: dict[str, list[Any]] = {name: [] for name in NAMES}

    def watched(name: str) -> Any:
        credit = credit_function(name)
        tokens = credit.tokens

        def keep(trainer: Any, batch: Any) -> torch.Tensor:
            found = tokens(trainer, batch)
            written = batch["completion_mask"].bool()
            ids = [row[kept].tolist() for row, kept in zip(batch["completion_ids"], written, strict=True)]
            said[name].append([(i, v[: len(i)].tolist()) for i, v in zip(ids, found, strict=True)])
            return found

        credit.tokens = keep
        return credit

    # Groups of 8, of which two processes have a half each
    size = int(settings("")["per_device_train_batch_size"]) // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"num_generations": 8, "per_device_train_batch_size": size, "max_steps": 1}
    trainer = TokenCreditGRPOTrainer(
        model,
        odd_length,
        TokenCreditGRPOConfig(
            **settings(output, **options),
            credit_model=positive,
            credit_negative=negative,  # type: ignore[arg-type]
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        rollout_func=Turns(rows),
        credit_funcs=[*(watched(name) for name in NAMES), RolloutEstimateCredit(1, halves)],
    )
    trainer.train()
    everything = {name: [gather_object(batch) for batch in batches] for name, batches in said.items()}
    log = [{k: v for k, v in row.items() if k.startswith("credit/")} for row in trainer.state.log_history]
    if trainer.accelerator.is_main_process:
        torch.save({"said": everything, "log": log}, Path(output) / "said.pt")
    end_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
