"""Give every rollout a reward: the step between sampling and best/worst pairs (T-REG, arXiv 2412.02685).

Reads a `rollouts` stage and writes it again with `reward`, a float, by one of three judges: a reward model (any
sequence classifier), the verdict of the verifier that the rollouts already hold, or a function of your own with the
signature of TRL's reward functions. Rows keep their order, so a problem's rollouts stay together; finished shards are
kept.

accelerate launch scripts/score_rewards.py \
    --reward_model RLHFlow/ArmoRM-Llama3-8B-v0.1 --trust_remote_code true --dtype bfloat16 \
    --dataset runs/rollouts --output_dir runs/rewarded
python scripts/score_rewards.py --verifier true --dataset runs/rollouts --output_dir runs/rewarded
python scripts/score_rewards.py --reward_function rewards.py:brevity --dataset runs/rollouts --output_dir runs/rewarded
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.compute as pc
from trl import TrlParser

from tokalign.rewards.reward_model import RewardModel
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state

NOT_VERIFIED = "not verified: `correct` is null"
NOT_JUDGED = "the reward function gave None"
Row = dict[str, Any]
Judge = Callable[[list[Row]], list[float | Dropped]]


@dataclass
class ScoreRewardsArguments:
    """Arguments of rewarding; exactly one of `reward_model`, `verifier` and `reward_function`."""

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


def label(row: Row) -> str:
    """What a rollout is called in errors."""
    return f"{row['id']!r} (sample {row['sample']})"


def by_model(model: RewardModel) -> Judge:
    """The reward model's output; rollouts that it cannot hold are dropped."""

    def judge(rows: list[Row]) -> list[float | Dropped]:
        encoded = [model.encode(row["prompt"], row["completion"], name=label(row)) for row in rows]
        problems = [model.problem(ids) for ids in encoded]
        fit = [i for i, problem in enumerate(problems) if problem is None]
        scores = iter(model.score([encoded[i] for i in fit], names=[label(rows[i]) for i in fit]))
        return [next(scores) if problem is None else Dropped(problem) for problem in problems]

    return judge


def by_verifier(rows: list[Row]) -> list[float | Dropped]:
    """1 for a right answer, 0 for a wrong one."""
    return [Dropped(NOT_VERIFIED) if row["correct"] is None else float(row["correct"]) for row in rows]


def by_function(function: Callable[..., Any], name: str) -> Judge:
    """A function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, as TRL's trainers call it.

    It gets all rollouts of a shard at once. Completions are messages where prompts are, as in TRL.
    """

    def judge(rows: list[Row]) -> list[float | Dropped]:
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        prompts, completions = columns.pop("prompt"), columns.pop("completion")
        if not isinstance(prompts[0], str):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        output = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(output):
            output = asyncio.run(_wait_for(output))
        rewards = list(output) if isinstance(output, Iterable) else [output]
        if len(rewards) != len(rows):
            raise ContractError(
                f"{name} gave {len(rewards)} rewards for {len(rows)} rollouts, from row {label(rows[0])} to "
                f"{label(rows[-1])}: it must give one each, None for one that it cannot judge."
            )
        return [
            Dropped(NOT_JUDGED) if reward is None else _finite(reward, row, name)
            for reward, row in zip(rewards, rows, strict=True)
        ]

    return judge


async def _wait_for(output: Any) -> Any:
    return await output


def _finite(reward: Any, row: Row, name: str) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ContractError(
            f"Row {label(row)}: {name} gave {reward!r}, not a finite number; mend it, or return None to drop the row."
        )
    return value


def load_function(where: str) -> tuple[Callable[..., Any], str]:
    """The user's reward function and the hash of the file that holds it."""
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ContractError(f"--reward_function is {where!r}: write module.path:function or path/to/file.py:function.")
    module: ModuleType
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("user_reward_function", place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ContractError(f"--reward_function: there is no file {place}; check the path.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())  # a script's own folder comes first otherwise; TRL does the same
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ContractError(f"--reward_function: {place} cannot be imported ({error}); check the path.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ContractError(f"--reward_function: {place} has no function {name!r}; check the name.")
    return function, hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()


def judge_of(arguments: ScoreRewardsArguments) -> tuple[Judge, dict[str, Any]]:
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
        "reward_model": weights_hash(arguments.reward_model) if process_state().is_main_process else None,
        "reward_index": arguments.reward_index,
        "chat_template": hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest(),
        "dtype": str(model.model.dtype),
    }


def main(arguments: ScoreRewardsArguments) -> dict[str, Any]:
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


if __name__ == "__main__":
    parser = TrlParser((ScoreRewardsArguments,))
    main(*parser.parse_args_and_config())
