r"""Give every rollout a reward: the step between sampling and best/worst pairs (T-REG, arXiv 2412.02685).

Reads a `rollouts` stage and writes it again with `reward`, a float, by one of three judges: a reward model (any
sequence classifier), the verdict of the verifier that the rollouts already hold, or a function of your own with the
signature of TRL's reward functions. Rows keep their order, so a problem's rollouts stay together; finished shards are
kept.

    tokalign reward --reward_model RLHFlow/ArmoRM-Llama3-8B-v0.1 --trust_remote_code true --dtype bfloat16 \
        --dataset runs/rollouts --output_dir runs/rewarded --accelerate_config ddp
    tokalign reward --verifier true --dataset runs/rollouts --output_dir runs/rewarded
    tokalign reward --reward_function rewards.py:brevity --dataset runs/rollouts --output_dir runs/rewarded

With a launcher: `accelerate launch -m tokalign reward …`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from tokalign.rewards.judges import Judge, Row, by_function, by_model, by_verifier, load_function
from tokalign.rewards.reward_model import RewardModel
from tokalign.stage.errors import ContractError, refuse_unread
from tokalign.stage.hashes import model_identity
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state


@dataclass
class RewardArguments:
    """The rollouts, and their judge: one of reward_model, verifier and reward_function."""

    dataset: str = field(metadata={"help": "Rollouts stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the rewarded stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    reward_model: str | None = field(
        default=None, metadata={"help": "Judge: hub id or path of a sequence-classification model."}
    )
    verifier: bool = field(default=False, metadata={"help": "Judge: `correct` of the rollouts, 1 or 0."})
    reward_function: str | None = field(
        default=None,
        metadata={"help": "Judge: module.path:function or path/to/file.py:function, with TRL's signature. It is run."},
    )
    reward_index: int | None = field(
        default=None, metadata={"help": "reward_model: which output is the reward, where it has several."}
    )
    reward_chat_template: str | None = field(
        default=None, metadata={"help": "reward_model: Jinja file used in place of its tokenizer's chat template."}
    )
    token_budget: int = field(
        default=8192, metadata={"help": "reward_model: tokens of one forward pass, padding included."}
    )
    dtype: str = field(
        default="auto", metadata={"help": "reward_model: weights' type; `auto` is the checkpoint's own."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "reward_model: `auto` spreads it over all visible GPUs (one process)."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "reward_model: run code that comes with the checkpoint. Only for sources you trust."},
    )
    shard_size: int = field(default=256, metadata={"help": "Rollouts a shard: what a kill can lose."})

    def __post_init__(self) -> None:
        if (self.reward_model is not None) + self.verifier + (self.reward_function is not None) != 1:
            raise ContractError("Choose one judge: --reward_model, --verifier true or --reward_function.")
        if self.reward_model is None:
            refuse_unread(self, ("reward_index", "reward_chat_template", "trust_remote_code"), "--reward_model")


def judge_of(arguments: RewardArguments) -> tuple[Judge, dict[str, Any]]:
    """The judge that the arguments choose, and what determines its rewards, for the manifest."""
    if arguments.verifier:
        return by_verifier, {"judge": "verifier"}
    if arguments.reward_function is not None:
        function, source = load_function(arguments.reward_function)
        settings = {"judge": "reward_function", "reward_function": arguments.reward_function, "source": source}
        return by_function(function, arguments.reward_function), settings
    assert arguments.reward_model is not None
    template = arguments.reward_chat_template
    if template is not None and not Path(template).is_file():
        raise ContractError(f"--reward_chat_template: there is no file {template}; check the path.")
    text = None if template is None else Path(template).read_text(encoding="utf-8")
    model = RewardModel(
        arguments.reward_model,
        reward_index=arguments.reward_index,
        chat_template=text,
        token_budget=arguments.token_budget,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        trust_remote_code=arguments.trust_remote_code,
    )
    return by_model(model), {
        "judge": "reward_model",
        "reward_model": model_identity(arguments.reward_model),
        "reward_index": arguments.reward_index,
        "chat_template": hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest(),
        "dtype": str(model.model.dtype),
    }


def main(arguments: RewardArguments) -> dict[str, Any]:
    """Write the rollouts with their rewards; returns the stage's manifest."""
    state = process_state()
    rollouts = load_stage(arguments.dataset, split=arguments.split, stage="rollouts")
    judge, settings = judge_of(arguments)

    def score(rows: list[Row]) -> list[Row | Dropped]:
        rewards = judge(rows)
        return [
            reward if isinstance(reward, Dropped) else {**row, "reward": reward}
            for row, reward in zip(rows, rewards, strict=True)
        ]

    manifest = run_job(
        score,
        rollouts,
        arguments.output_dir,
        name="score_rewards",
        parameters={**settings, "split": arguments.split},
        shard_size=arguments.shard_size,
        extra_manifest={"reward_model_path": arguments.reward_model},
    )
    if not manifest["rows"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in manifest["dropped"].items())
        raise ContractError(f"No rollout of {arguments.dataset} has a reward ({reasons}); choose another judge.")
    if state.is_main_process:
        rewards = load_stage(arguments.output_dir).data.column("reward")
        extremes = pc.min_max(rewards).as_py()
        mean = pc.mean(rewards).as_py()
        print(f"rewards from {extremes['min']:.4g} to {extremes['max']:.4g}, mean {mean:.4g}; {arguments.output_dir}")
    return manifest
