"""Credit functions in GRPO: what is constant over tokens is TRL's training, bit for bit; what differs is the equation.

The completions are known beforehand: the k-th of a prompt is drawn from its text and k alone, whatever process asks.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from itertools import combinations, product
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tokalign.cli.main import main
from tokalign.losses import group_advantages
from tokalign.rewards import answer_reward
from tokalign.stage.errors import OptionError
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
    train_dataset = options.pop("train_dataset", Dataset.from_list(ROWS))
    return trainer(
        path,
        rewards,
        config(**options),
        train_dataset=train_dataset,
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


def cells(loss_type: str) -> list[tuple[Any, ...]]:
    """Importance level, scale, iterations, masked truncation, tool masks: a seventh of all, another one for each loss,
    so that together they hold every pair of values."""
    every = list(product(("token", "sequence"), SCALES, (1, 2), (False, True), (False, True)))
    return every[LOSSES.index(loss_type) % 7 :: 7]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_constant_credit_is_grpo_trainer_to_the_last_bit(both, loss_type) -> None:
    """Losses, weights after some steps and metrics, over what the advantage, the ratio and the masks depend on."""
    stock, ours, start = both
    for cell in cells(loss_type):
        level, scale, iterations, masked, with_tools = cell
        results = []
        for trainer in (stock, ours):
            trainer.loss_type, trainer.importance_sampling_level, trainer.scale_rewards = loss_type, level, scale
            trainer.num_iterations, trainer.mask_truncated_completions = iterations, masked
            trainer.rollout_func.with_tools = with_tools
            results.append(trained(trainer, start, steps=2 * iterations))
        (losses, weights, metrics), (our_losses, our_weights, our_metrics) = results
        assert losses == our_losses and any(losses), cell
        assert all(torch.equal(weights[name], our_weights[name]) for name in weights), cell
        assert any(not torch.equal(weights[name], start[name]) for name in weights), cell
        assert metrics == {key: value for key, value in our_metrics.items() if "credit/" not in key}, cell


def test_the_cells_hold_every_pair_of_values() -> None:
    held = [(loss, *cell) for loss in LOSSES for cell in cells(loss)]
    for a, b in combinations(zip(*held, strict=True), 2):
        assert set(zip(a, b, strict=True)) == set(product(set(a), set(b)))
    assert [len(set(values)) for values in zip(*held, strict=True)] == [8, 2, 3, 2, 2, 2]


def test_a_whole_training_is_the_stock_one(tiny_path, folder) -> None:
    """By `train`, from a stream, with optimizer, two iterations and evaluations; what a credit function logs lies in
    the log of its own batches."""

    def logging(completion_ids, log_metric, log_extra, trainer_state, answer, **_):
        log_metric("seen", float(len(completion_ids)))
        log_extra("expected", answer)
        return ones(completion_ids)

    histories = []
    for stock in (True, False):
        trainer = make(
            tiny_path,
            folder / str(stock),
            None if stock else logging,
            stock=stock,
            num_iterations=2,
            beta=0.1,
            eval_strategy="steps",
            eval_steps=2,
            log_completions=True,
            train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
        )
        trainer.train()
        histories.append(trainer.state.log_history)
    stock_history, history = histories
    assert [entry.get("seen", entry.get("eval_seen")) for entry in history[:-1]] == [8, None, 8, None, None, 8]
    own = ("credit/", "eval_credit/", "seen", "eval_seen")
    for expected, entry in zip(stock_history, history, strict=True):
        timed = {key for key in entry if key.endswith(("_time", "runtime", "per_second"))}
        assert {k: v for k, v in entry.items() if not k.startswith(own) and k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }
    (table,) = (folder / "False" / "completions").glob("*00002.parquet")
    assert set(Dataset.from_parquet(str(table))["expected"]) <= {row["answer"] for row in ROWS}


# --------------------------------------------------------------------------------------------- credit that differs


WEIGHT = Credit(lambda i, t: math.nan if t == 1 else (i % 5) / 4, __name__="weight")
BONUS = Credit(lambda i, t: math.nan if t % 4 == 3 else (i % 7) / 3 - 1, mode="advantage", coefficient=0.5)


@pytest.fixture(scope="module")
def differing(tiny_path, folder) -> Any:
    """A trainer with a weight and an advantage that differ from token to token, with tool results among the tokens."""
    trainer = make(tiny_path, folder, [WEIGHT, BONUS], per_device_train_batch_size=8, steps_per_generation=1)
    trainer.rollout_func.with_tools = True
    return trainer


def written_advantages(trainer: Any) -> list[tuple[list[int], list[int], list[float]]]:
    """Prompt ids, completion ids and A_it of the first two groups, by plain loops; 0 on what a tool wrote."""
    made = trainer.rollout_func([row["prompt"] for row in inputs()], trainer)
    rows = []
    for start in (0, GROUP):
        lengths = [len(ids) for ids in made["completion_ids"][start : start + GROUP]]
        for number in range(start, start + GROUP):
            ids, ours = made["completion_ids"][number], made["env_mask"][number]
            advantage = (len(ids) - statistics.mean(lengths)) / (statistics.stdev(lengths) + 1e-4)
            values = []
            for t, token in enumerate(ids):
                weight = 1.0 if t == 1 else (token % 5) / 4
                bonus = 0.0 if t % 4 == 3 else (token % 7) / 3 - 1
                values.append((advantage * weight + 0.5 * bonus) if ours[t] else 0.0)
            rows.append((made["prompt_ids"][number], ids, values))
    return rows


def test_credit_that_differs_is_the_equation(differing) -> None:
    advantages = generated(differing)["advantages"]
    rows = written_advantages(differing)
    assert advantages.shape == (8, max(len(ids) for _, ids, _ in rows))
    for row, (_, ids, values) in zip(advantages.tolist(), rows, strict=True):
        assert row[: len(ids)] == pytest.approx(values, abs=1e-5) and not any(row[len(ids) :])


def gradient(trainer: Any, *, steps: int = 1, pad: int | None = None) -> torch.Tensor:
    """The gradient of one generation batch, in so many micro-batches, padded to multiples of `pad`."""
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = steps
    trainer._step, trainer._buffered_inputs, trainer.pad_to_multiple_of = 0, None, pad
    trainer.model.train()
    trainer.model.zero_grad()
    for _ in range(steps):
        trainer.training_step(trainer.model, inputs(), None)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


def test_its_gradient_is_that_of_a_plain_loop_whatever_the_padding_and_the_micro_batches(differing) -> None:
    """The gradient of −Σ A_it log π(y_t) / N (DAPO's mean over tokens; the ratio is 1), a completion at a time."""
    model = differing.model
    rows = written_advantages(differing)
    made = differing.rollout_func([row["prompt"] for row in inputs()], differing)
    model.zero_grad()
    for prompt, ids, values in rows:
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(ids)), ids]
        (-(torch.tensor(values) * logps).sum() / sum(map(sum, made["env_mask"]))).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert expected.norm() > 0.1
    for steps, pad in ((1, None), (1, 16), (4, None), (4, 16)):
        torch.testing.assert_close(gradient(differing, steps=steps, pad=pad), expected, rtol=1e-4, atol=1e-6)


def test_metrics_say_how_much_and_of_how_many_tokens(differing) -> None:
    differing._metrics["train"].clear()
    generated(differing)
    made = differing.rollout_func([row["prompt"] for row in inputs()], differing)
    said, tokens = [], 0
    for ids, ours in zip(made["completion_ids"], made["env_mask"], strict=True):
        tokens += sum(ours)
        said += [(token % 7) / 3 - 1 for t, token in enumerate(ids) if ours[t] and t % 4 != 3]
    metrics = {key: value for key, (value,) in differing._metrics["train"].items() if "credit/credit" in key}
    assert metrics == pytest.approx(
        {
            "credit/credit/mean": statistics.mean(said),
            "credit/credit/abs_mean": statistics.mean(map(abs, said)),
            "credit/credit/coverage": len(said) / tokens,
        },
        rel=1e-5,
    )


def test_mode_and_coefficient_of_the_configuration_hold_over_the_functions_own(tiny_path, folder) -> None:
    bonus = Credit(lambda i, t: float(t), mode="advantage", coefficient=0.5)
    made = {}
    for name, options in {
        "own": {},
        "coefficient": {"credit_coefficient": 2.0},
        "mode": {"credit_mode": "weight"},
    }.items():
        made[name] = generated(make(tiny_path, folder, bonus, **options))
    stock = generated(make(tiny_path, folder, stock=True))["advantages"][:, None]
    written = made["own"]["completion_mask"]
    place = torch.arange(written.size(1)).float().expand_as(written)
    for name, expected in {"own": stock + 0.5 * place, "coefficient": stock + 2 * place, "mode": stock * place}.items():
        torch.testing.assert_close(made[name]["advantages"], expected * written, rtol=0, atol=1e-6)


def test_one_ratio_for_a_completion_is_refused_where_it_would_average_the_credit_away(both) -> None:
    _, ours, _ = both
    ours.importance_sampling_level, ours.scale_rewards = "sequence", "group"
    constant, ours.credit_funcs = ours.credit_funcs, [first_half, *ours.credit_funcs[1:]]
    for loss_type in LOSSES:
        ours.loss_type = loss_type
        if loss_type in ("cispo", "vespo"):
            assert generated(ours)["advantages"].dim() == 2
        else:
            with pytest.raises(ValueError, match="set importance_sampling_level to 'token'"):
                generated(ours)
    ours.credit_funcs = constant


# -------------------------------------------------------------------------------------------------- sequence's part


def noise(completions: list[str], **_: Any) -> list[float | None]:
    draws = [random.Random(text) for text in completions]
    return [None if draw.random() < 0.3 else draw.gauss(0, 1) for draw in draws]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_group_advantages_are_trls_to_the_last_bit(tiny_path, folder, aggregation) -> None:
    """Of all reward functions, over 8 groups of which some completions are judged by some functions, or by none."""
    seen: dict[str, Any] = {}

    def watching(completions, completion_ids, **_):
        seen.update(completions=completions, completion_ids=completion_ids)
        return ones(completion_ids)

    for functions, weights in (([length], [1.0]), ([digits, noise], [0.7, -1.3])):
        trainer = make(
            tiny_path,
            folder,
            watching,
            rewards=functions,
            reward_weights=weights,
            multi_objective_aggregation=aggregation,
        )
        for trainer.scale_rewards in SCALES:
            expected = generated(trainer, groups=8)["advantages"]
            columns = [[math.nan if r is None else r for r in function(**seen)] for function in functions]
            given = {"group_size": GROUP, "scale_rewards": trainer.scale_rewards, "aggregation": aggregation}
            ours = group_advantages(torch.tensor(columns).T, torch.tensor(weights), **given)
            assert torch.equal(ours, expected) and expected.any()
    assert (expected == 0).any()  # nobody judged it


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_a_credit_replaces_is_no_part_of_the_sequences_advantage(tiny_path, folder, aggregation) -> None:
    """On completions of which it says nothing the reward stays what it was."""

    class Replacing(Credit):
        def __call__(self, completion_ids, **_):
            return [None if len(ids) % 2 else [float(t) for t in range(len(ids))] for ids in completion_ids]

    options = {"reward_weights": [1.0, 0.5], "multi_objective_aggregation": aggregation}
    credit = Replacing(mode="advantage", replaces=(length,))
    batch = generated(make(tiny_path, folder, credit, rewards=[length, noise], **options))
    both = generated(make(tiny_path, folder, stock=True, rewards=[length, noise], **options))["advantages"]
    options["reward_weights"] = [0.5]
    rest = generated(make(tiny_path, folder, stock=True, rewards=[noise], **options))["advantages"]
    # who reads the advantages of the batch sees those, whichever function stands first
    seen: list[torch.Tensor] = []

    class Reading:
        __name__, mode = "reading", "weight"

        def tokens(self, trainer, batch):
            seen.append(batch["advantages"])
            return torch.ones(batch["completion_ids"].shape)

    options["reward_weights"] = [1.0, 0.5]
    generated(make(tiny_path, folder, [Reading(), credit], rewards=[length, noise], **options))
    silent = batch["completion_mask"].sum(1) % 2 == 1
    torch.testing.assert_close(seen[0], torch.where(silent, both, rest), rtol=0, atol=1e-5)
    assert 0 < silent.sum() < 8 and not torch.equal(both, rest)
    expected = torch.where(silent, both, rest)[:, None] + torch.arange(batch["advantages"].size(1)) * ~silent[:, None]
    torch.testing.assert_close(batch["advantages"], expected * batch["completion_mask"], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- functions


def test_functions_see_the_same_arguments_and_async_ones_share_the_rewards_loop(tiny_path, folder) -> None:
    calls: dict[str, dict[str, Any]] = {}
    loops = []

    async def reward(completion_ids, **columns):
        loops.append(asyncio.get_running_loop())
        calls["reward"] = {"completion_ids": completion_ids, **columns}
        return length(completion_ids)

    async def slow(completion_ids, **columns):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        calls["slow"] = {"completion_ids": completion_ids, **columns}
        return first_half(completion_ids)

    def quick(completion_ids, **columns):
        calls["quick"] = {"completion_ids": completion_ids, **columns}
        return ones(completion_ids)

    for rewards in ([reward, digits], [digits]):  # with one loop of TRL's, and with one of ours
        trainer = make(tiny_path, folder, [slow, quick], rewards=rewards, reward_weights=[1.0, 0.5][-len(rewards) :])
        batch = generated(trainer)
        assert batch["advantages"].dim() == 2
        assert calls["slow"] == calls["quick"]
        own = made_rewards = calls["quick"].pop("rewards")
        shares = digits(calls["quick"]["completions"])
        assert own == pytest.approx(
            [
                None if share is None and len(rewards) == 1 else 0.5 * (share or 0) + len(ids) * (len(rewards) - 1)
                for share, ids in zip(shares, calls["quick"]["completion_ids"], strict=True)
            ]
        )
        assert None in made_rewards or len(rewards) == 2
    assert calls["reward"].keys() == calls["quick"].keys() >= {"prompts", "answer", "trainer_state", "log_metric"}
    assert loops[0] is loops[1] is not loops[2]


def test_environments_are_handed_on(tiny_path, folder) -> None:
    seen = []

    def watching(environments, completion_ids, **_):
        seen.extend(environments)
        return ones(completion_ids)

    trainer = make(tiny_path, folder, watching)
    trainer.environments = ["one", "two"]
    trainer._calculate_rewards(inputs()[:2], ["a", "b"], ["c", "d"], [[7], [8]])
    assert seen == ["one", "two"]


def one_short(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[1.0] * (len(ids) - (i == 2)) for i, ids in enumerate(completion_ids)]


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (one_short, "completion 2"),
        (lambda completion_ids, **_: [[1.0]], "1 rows for 8"),
        (lambda **_: None, "returned None for 8 completions"),
        (lambda completion_ids, **_: [1.0 for _ in completion_ids], "returned 1.0 for the"),
        (Credit(lambda i, t: "a"), "returned what is no number"),
        (Credit(lambda i, t: math.inf), "infinite number for completion 0"),
        (Credit(tokens=lambda trainer, batch: batch["completion_mask"][:, :-1].float()), "shape"),
    ],
)
def test_what_a_function_returns_is_checked(both, credit, message) -> None:
    _, ours, _ = both
    before, ours.credit_funcs = ours.credit_funcs, [credit, *ours.credit_funcs[1:]]
    with pytest.raises(ValueError, match=message):
        generated(ours)
    ours.credit_funcs = before


@pytest.mark.parametrize(
    ("credit", "options", "message"),
    [
        ([ones, ones], {}, "are named 'ones'"),
        (Credit(mode="sum"), {}, "'sum'"),
        (Credit(replaces=(digits,)), {}, "'digits'"),
        (None, {"credit": "no_such_credit"}, "no_such_credit"),
        ("entropy", {}, "'entropy', which cannot be called"),
        (ones, {"credit_page_steps": -1}, "credit_page_steps is -1"),
        (ones, {"credit_coefficient": math.nan}, "credit_coefficient is nan"),
        (ones, {"credit_coefficient": 2.0}, "whose credit is added to the advantage"),
        (None, {"credit_model": "teacher"}, "no credit function reads it"),
        (
            None,
            {"credit": "entropy", "credit_model": "teacher"},
            "`credit_model` is 'teacher', but no .* compares models",
        ),
        (ones, {"credit_negative": "other"}, "`credit_negative` is 'other', but no"),
    ],
)
def test_credit_that_cannot_be_is_refused_at_the_start(tiny_path, folder, credit, options, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(tiny_path, folder, credit, **options)


def test_an_object_is_attached_once_and_asked_for_padded_batches(tiny_path, folder) -> None:
    class Padded:
        mode = "advantage"

        def attach(self, trainer):
            self.attached = [*getattr(self, "attached", []), trainer]

        def tokens(self, trainer, batch):
            return torch.arange(batch["completion_ids"].size(1)).float().expand_as(batch["completion_ids"])

    padded = Padded()
    trainer = make(tiny_path, folder, padded)
    batch = generated(trainer)
    assert padded.attached == [trainer] and trainer.credit_func_names == ["Padded"]
    place = torch.arange(batch["completion_mask"].size(1)) * batch["completion_mask"]
    stock = generated(make(tiny_path, folder, stock=True))["advantages"][:, None] * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], stock + place)


def test_functions_are_found_by_name_and_by_place(tiny_path, folder) -> None:
    (folder / "own.py").write_text("def mine(completion_ids, **_):\n    return [None] * len(completion_ids)\n")
    trainer = make(tiny_path, folder, first_half, credit=["entropy", f"{folder}/own.py:mine"])
    assert trainer.credit_func_names == ["first_half", "entropy", "mine"]
    assert generated(trainer)["advantages"].dim() == 2


def test_the_verb_trains_with_functions_of_names_and_of_files(tiny_path, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "own.py").write_text(
        "def size(completion_ids, **_):\n    return [float(len(set(ids))) for ids in completion_ids]\n"
        "class Ramp:\n    mode = 'advantage'\n    def __call__(self, completion_ids, **_):\n"
        "        return [[float(t) for t in range(len(ids))] for ids in completion_ids]\n"
    )
    options = {
        "model_name_or_path": tiny_path,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "max_steps": 1,
        "logging_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
    }
    words = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    words += ["--reward_funcs", "answer_reward", f"{tmp_path}/own.py:size", "--reward_weights", "1.0", "0.5"]
    trainer = main(["token-credit-grpo", *words, "--credit", "entropy", f"{tmp_path}/own.py:Ramp"])
    entry = trainer.state.log_history[0]
    assert entry["rewards/answer_reward/mean"] == 0.0 < entry["rewards/size/mean"]
    assert entry["credit/entropy/coverage"] == 1.0 and entry["credit/Ramp/mean"] > 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(OptionError, match="no_such"):
        main(["token-credit-grpo", *words, "--reward_funcs", "no_such"])


def test_the_verifier_is_a_reward_function() -> None:
    said = [r"so \boxed{18}", [{"role": "assistant", "content": "The answer is 17."}], "#### 3"]
    assert answer_reward(completions=said, answer=["18", "18", None], prompts=[]) == [1.0, 0.0, None]
