"""Judges of rollouts: a reward model, the verifier's verdict, or a function as TRL's trainers call it.

A judge gets the rows of a rollouts stage and gives each a number, or `Dropped` where it cannot say.
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
from pathlib import Path
from types import ModuleType
from typing import Any

from tokalign.rewards.reward_model import RewardModel
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

NOT_VERIFIED = "not verified: `correct` is null"
NOT_JUDGED = "the reward function gave None"
Row = dict[str, Any]
Judge = Callable[[list[Row]], list[float | Dropped]]


def label(row: Row) -> str:
    """What a rollout is called in errors."""
    return f"{row['id']!r} (sample {row['sample']})"


def by_model(model: RewardModel) -> Judge:
    """The reward model's output; rollouts that it cannot hold are dropped."""

    def judge(rows: list[Row]) -> list[float | Dropped]:
        encoded = [
            model.encode(row["prompt"], row["completion"], name=label(row), tools=row.get("tools")) for row in rows
        ]
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


def load_function(where: str, option: str = "--reward_function") -> tuple[Callable[..., Any], str]:
    """The user's function and the hash of the file that holds it; `option` is what it was given by."""
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ContractError(f"{option} is {where!r}: write module.path:function or path/to/file.py:function.")
    module: ModuleType
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location("user_reward_function", place)
        if spec is None or spec.loader is None or not Path(place).is_file():
            raise ContractError(f"{option}: there is no file {place}; check the path.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())  # a script's own folder comes first otherwise; TRL does the same
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ContractError(f"{option}: {place} cannot be imported ({error}); check the path.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ContractError(f"{option}: {place} has no function {name!r}; check the name.")
    return function, hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
