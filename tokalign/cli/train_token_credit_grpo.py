r"""GRPO whose advantages differ from token to token: credit functions say which tokens a reward is due to.

    tokalign token-credit-grpo --model_name_or_path runs/sft --dataset_name runs/gsm8k --credit entropy \
        --output_dir runs/token_credit
    tokalign token-credit-grpo --model_name_or_path runs/sft --dataset_name runs/gsm8k \
        --reward_funcs answer_reward rewards.py:brevity --reward_weights 1.0 0.1 --credit credits.py:first_sentence \
        --output_dir runs/token_credit

`dataset_name` is a folder of problems (`tokalign data gsm8k|math|problems`) or a dataset on the hub with a column
`prompt`; `answer_reward` compares a completion's final answer with the column `answer`. Which credit functions there
are, and how to write one: docs/token_credit.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trl.rewards
from trl import ModelConfig

from tokalign.cli.train import DataArguments, train
from tokalign.rewards import answer_reward
from tokalign.rewards.judges import load_function
from tokalign.stage.errors import OptionError
from tokalign.trainers.token_credit_grpo import TokenCreditGRPOConfig, TokenCreditGRPOTrainer

OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


@dataclass
class RewardsArguments(DataArguments):
    """Data, and what completions are rewarded by."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["answer_reward"],
        metadata={
            "help": "Reward functions: answer_reward, one of TRL's (accuracy_reward, reasoning_accuracy_reward, "
            "think_format_reward), or your own as module.path:function or path/to/file.py:function."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model before them: folder or hub id of a sequence classifier."}
    )


def main(
    script_args: RewardsArguments, training_args: TokenCreditGRPOConfig, model_args: ModelConfig
) -> TokenCreditGRPOTrainer:
    """Train, save, return the trainer."""
    rewards: list[Any] = [reward_function(name) for name in script_args.reward_funcs]
    if script_args.reward_model_name_or_path:
        rewards = [script_args.reward_model_name_or_path, *rewards]
    needs = "a folder of problems (`tokalign data`) or a dataset on the hub"
    return train(TokenCreditGRPOTrainer, script_args, training_args, model_args, needs=needs, reward_funcs=rewards)


def reward_function(name: str) -> Any:
    """A reward function by its name, or by its place."""
    if ":" in name:
        return load_function(name, "--reward_funcs")[0]
    if name == answer_reward.__name__:
        return answer_reward
    if name not in OF_TRL:
        raise OptionError(
            f"--reward_funcs has {name!r}: use answer_reward, {', '.join(OF_TRL)}, or path/to/file.py:function."
        )
    return getattr(trl.rewards, name)
