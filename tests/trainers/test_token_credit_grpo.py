"""Credit functions in GRPO: what is constant over tokens is TRL's training, bit for bit; what differs is the equation.

The completions are known beforehand: the k-th of a prompt is drawn from its text and k alone, whatever process asks.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from itertools import product
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tokalign.losses import group_advantages
from tokalign.trainers import TokenCreditGRPOConfig, TokenCreditGRPOTrainer

GROUP = 4
ROWS = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(8)]
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
SCALES = ("group", "batch", "none")


class Rollouts:
    """A TRL rollout function: completions of 3 to 12 characters, one in four without an end token, one in three of
    whose tokens are a tool's where `with_tools` says so."""

    with_tools = False

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        made: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
        for number, prompt in enumerate(prompts):
            draw = random.Random(f"{prompt}{number % GROUP}")
            text = "".join(draw.choices("0123456789 +=", k=draw.randint(3, 12)))
            ids = tokenizer(text)["input_ids"] + ([] if draw.random() < 0.25 else [tokenizer.eos_token_id])
            made["prompt_ids"].append(tokenizer(prompt)["input_ids"])
            made["completion_ids"].append(ids)
            made["env_mask"].append([int(draw.random() > 1 / 3) for _ in ids])
        if not self.with_tools:
            del made["env_mask"]
        return made


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def digits(completions: list[str], **_: Any) -> list[float | None]:
    """Share of digits; None, which is no judgement, for a third of the completions."""
    return [None if len(text) % 3 == 0 else sum(c.isdigit() for c in text) / len(text) for text in completions]


def first_half(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[1.0 if 2 * i < len(ids) else 0.25 for i in range(len(ids))] for ids in completion_ids]


def ones(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[1.0] * len(ids) for ids in completion_ids]


def sequence(completion_ids: list[list[int]], **_: Any) -> list[None]:
    return [None] * len(completion_ids)


class Credit:
    """A credit function of any kind; `made` gives a token's number by its id and place."""

    def __init__(self, made: Any = lambda i, t: 0.0, **attributes: Any):
        self.made = made
        vars(self).update({"__name__": "credit"} | attributes)

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [[self.made(token, t) for t, token in enumerate(ids)] for ids in completion_ids]


def make(
    path: str, folder: Any, credit_funcs: Any = None, *, stock: bool = False, rewards: Any = length, **changes: Any
) -> Any:
    """A trainer whose generation batch is 2 groups, in 2 steps."""
    trainer, config = (GRPOTrainer, GRPOConfig) if stock else (TokenCreditGRPOTrainer, TokenCreditGRPOConfig)
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "steps_per_generation": 2,
        "num_generations": GROUP,
        "max_completion_length": 16,
        "save_strategy": "no",
        "beta": 0.0,
    } | changes
    return trainer(
        path,
        rewards,
        config(**options),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        rollout_func=Rollouts(),
        **({} if stock else {"credit_funcs": credit_funcs}),
    )


def inputs(groups: int = 2) -> list[dict[str, Any]]:
    return [dict(row) for row in ROWS[:groups] for _ in range(GROUP)]


def generated(trainer: Any, groups: int = 2) -> dict[str, torch.Tensor]:
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs(groups))


def trained(trainer: Any, start: dict[str, torch.Tensor], *, steps: int = 4) -> tuple[list[float], Any, Any]:
    """Losses, weights and metrics of steps of plain gradient descent on one generation batch."""
    trainer.model.load_state_dict(start)
    trainer.model.train()
    trainer._step, trainer._buffered_inputs, trainer.current_gradient_accumulation_steps = 0, None, 1
    trainer._metrics["train"].clear()
    torch.manual_seed(0)  # TRL shuffles the rows of a generation batch
    losses = []
    for _ in range(steps):
        losses.append(trainer.training_step(trainer.model, inputs(), None).item())
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    metrics = {key: value for key, value in trainer._metrics["train"].items() if key != "step_time"}
    return losses, trainer.model.state_dict(), metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def both(tiny_path, folder) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """TRL's trainer, ours with constant credit of every kind, and the weights that both start from."""
    silent = Credit(lambda i, t: math.nan, __name__="silent")
    constant = [ones, silent, sequence, Credit(mode="advantage", __name__="zero")]
    stock = make(tiny_path, folder, stock=True, beta=0.1)
    return (
        stock,
        make(tiny_path, folder, constant, beta=0.1),
        {k: v.clone() for k, v in stock.model.state_dict().items()},
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_constant_credit_is_grpo_trainer_to_the_last_bit(both, loss_type) -> None:
    """Losses, weights after four steps and metrics, over what the advantage, the ratio and the masks depend on."""
    stock, ours, start = both
    every = list(product(("token", "sequence"), SCALES, (1, 2), (False, True), (False, True)))
    for level, scale, iterations, masked, with_tools in every[LOSSES.index(loss_type) % 5 :: 5]:
        results = []
        for trainer in (stock, ours):
            trainer.loss_type, trainer.importance_sampling_level, trainer.scale_rewards = loss_type, level, scale
            trainer.num_iterations, trainer.mask_truncated_completions = iterations, masked
            trainer.rollout_func.with_tools = with_tools
            results.append(trained(trainer, start))
        (losses, weights, metrics), (our_losses, our_weights, our_metrics) = results
        cell = f"{level}, {scale}, {iterations}, {masked}, {with_tools}"
        assert losses == our_losses and any(losses), cell
        assert all(torch.equal(weights[name], our_weights[name]) for name in weights), cell
        assert any(not torch.equal(weights[name], start[name]) for name in weights), cell
        assert metrics == {key: value for key, value in our_metrics.items() if "credit/" not in key}, cell


def test_the_cells_hold_every_pair_of_values() -> None:
    every = list(product(("token", "sequence"), SCALES, (1, 2), (False, True), (False, True)))
    cells = [(loss, *cell) for i, loss in enumerate(LOSSES) for cell in every[i % 5 :: 5]]
    axes = (LOSSES, ("token", "sequence"), SCALES, (1, 2), (False, True), (False, True))
    for a, b in product(range(6), range(6)):
        if a < b:
            assert {(cell[a], cell[b]) for cell in cells} == set(product(axes[a], axes[b])), (a, b)
