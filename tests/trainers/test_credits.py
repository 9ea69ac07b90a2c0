"""The built-in credit functions: each in a real training of a step or two, and against plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.signals.support import save_adapter
from tests.trainers.structured import KINDS, TableRollouts, odd_length, problems, save_ledger_model, settings
from tokalign.signals import Signal, register, registry
from tokalign.trainers import TokenCreditGRPOConfig, TokenCreditGRPOTrainer
from tokalign.trainers.credits import CREDITS, credit_function
from tokalign.trainers.credits.contrast import ContrastCredit
from tokalign.trainers.credits.entropy import EntropyCredit, GradedEntropyCredit
from tokalign.trainers.credits.implicit_reward import ImplicitRewardCredit
from tokalign.trainers.credits.rollout_estimate import RolloutEstimateCredit, lines, step_advantages
from tokalign.trainers.credits.teacher import TeacherCredit
from tokalign.trainers.credits.turns import TurnsCredit

GROUP = len(KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A policy, another model with its tokenizer, and two adapters of the policy's base."""
    root = tmp_path_factory.mktemp("models")
    policy = save_ledger_model(root / "policy")
    return {
        "policy": policy,
        "other": save_ledger_model(root / "other", seed=1),
        "positive": save_adapter(root / "positive", policy, seed=2),
        "negative": save_adapter(root / "negative", policy, seed=3),
    }


class Watched:
    """A credit function of batches that keeps what it was given and what it said."""

    def __init__(self, credit: Any):
        self.credit, self.batches, self.said = credit, [], []
        self.__name__, self.mode = credit.__name__, credit.mode
        for name in ("attach", "prepare"):
            if hasattr(credit, name):
                setattr(self, name, getattr(credit, name))

    def tokens(self, trainer: Any, batch: Any) -> torch.Tensor:
        self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        self.said.append(self.credit.tokens(trainer, batch))
        return self.said[-1]


class Turns(TableRollouts):
    """Rollouts of which the tokens 5 to 7 are a tool's, with two numbers."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        made = super().__call__(prompts, trainer)
        made["env_mask"] = [[int(not 5 <= t < 8) for t in range(len(ids))] for ids in made["completion_ids"]]
        made["turn_rewards"] = [[float(row % 3), None if row == 1 else row / 2] for row in range(len(prompts))]
        return made


def make(policy: str, out: Path, credit_funcs: Any, *, rollouts: Any = TableRollouts, **options: Any):
    rows = problems(8)
    peft_config = options.pop("peft_config", None)
    return TokenCreditGRPOTrainer(
        policy,
        options.pop("reward_funcs", odd_length),
        TokenCreditGRPOConfig(**settings(out, max_steps=1, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(policy),
        rollout_func=rollouts(rows) if rollouts else None,
        credit_funcs=credit_funcs,
        peft_config=peft_config,
    )


def trained(policy: str, out: Path, credit: Any, **options: Any) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A trainer after one step, and the batch and the numbers that its credit function had."""
    watched = Watched(credit)
    trainer = make(policy, out, watched, **options)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert 0 < logged[f"credit/{credit.__name__}/coverage"] <= 1
    return trainer, watched.batches[0], watched.said[0]


def logits_of(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """(t, V) logits of each completion's tokens, a row at a time and without padding."""
    found = []
    model.eval()
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0]
        found.append(logits[len(prompt) - 1 : -1].float())
    return found


def logps_of(model: Any, batch: dict[str, Any]) -> list[list[float]]:
    return [
        [float(logits[t].log_softmax(0)[batch["completion_ids"][row, t]]) for t in range(len(logits))]
        for row, logits in enumerate(logits_of(model, batch))
    ]


def load(path: str, adapter: str | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def entropies_of(model: Any, batch: dict[str, Any]) -> list[list[float]]:
    return [
        [float(-(row.softmax(0) * row.log_softmax(0)).sum()) for row in logits] for logits in logits_of(model, batch)
    ]


def assert_rows(said: torch.Tensor, expected: list[list[float]], **tolerance: float) -> None:
    for row, values in enumerate(expected):
        torch.testing.assert_close(said[row, : len(values)], torch.tensor(values), **tolerance)


CLOSE = {"atol": 2e-5, "rtol": 1e-4}


# ------------------------------------------------------------------------------------------------------------ entropy


def test_entropy_is_a_plain_loops_quantile(models, tmp_path) -> None:
    _, batch, said = trained(models["policy"], tmp_path, EntropyCredit(0.3))
    rows = entropies_of(load(models["policy"]), batch)
    threshold = torch.tensor([h for row in rows for h in row]).quantile(0.7)
    for row, values in enumerate(rows):
        for t, entropy in enumerate(values):
            if abs(entropy - threshold) > 1e-5:
                assert said[row, t] == float(entropy > threshold)
    assert 0.25 < said.sum() / batch["completion_mask"].sum() < 0.35


def test_entropy_trains_as_trls_own_quantile_to_the_last_bit(models, tmp_path) -> None:
    """In a batch of one micro-batch, where TRL finds its quantile over the same tokens."""
    ours, *_ = trained(models["policy"], tmp_path / "a", EntropyCredit(0.2), beta=0.04)
    theirs = make(models["policy"], tmp_path / "b", None, top_entropy_quantile=0.2, beta=0.04)
    theirs.train()
    start = load(models["policy"]).state_dict()
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, theirs.model.state_dict()[name])
    assert any(not torch.equal(weight, start[name]) for name, weight in ours.model.state_dict().items())


def test_graded_entropy_is_a_plain_loops_bonus(models, tmp_path) -> None:
    _, batch, said = trained(models["policy"], tmp_path, GradedEntropyCredit(0.4, 2.0))
    rows = entropies_of(load(models["policy"]), batch)
    for row, values in enumerate(rows):
        advantage = abs(float(batch["advantages"][row]))
        assert_rows(said[row : row + 1], [[min(0.4 * h, advantage / 2) for h in values]], **CLOSE)
    total = batch["advantages"][:, None] + said
    assert ((total * batch["advantages"][:, None]) >= 0).all(), "the bonus turned an advantage around"


# -------------------------------------------------------------------------------------------------------- frozen models


def test_contrast_weighs_wrong_completions_alone(models, tmp_path) -> None:
    paths = {"credit_model": models["positive"], "credit_negative": models["negative"]}
    _, batch, said = trained(models["policy"], tmp_path, ContrastCredit(beta=0.5), **paths)
    positive = logits_of(load(models["policy"], models["positive"]), batch)
    negative = logits_of(load(models["policy"], models["negative"]), batch)
    assert (batch["advantages"] < 0).any() and (batch["advantages"] > 0).any()
    for row, (good, bad) in enumerate(zip(positive, negative, strict=True)):
        ids = batch["completion_ids"][row]
        scores = [float((1.5 * good[t] - 0.5 * bad[t]).softmax(0)[ids[t]]) for t in range(len(good))]
        wrong = batch["advantages"][row] < 0
        assert_rows(said[row : row + 1], [[1 - s if wrong else 1.0 for s in scores]], **CLOSE)


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_implicit_reward_is_primes_advantage(models, tmp_path, kind, form) -> None:
    paths = {"credit_model": models["positive"]}
    if kind == "model":
        paths = {"credit_model": models["other"], "credit_negative": models["policy"]}
    credit = ImplicitRewardCredit(beta=0.3, gamma=0.9, form=form)
    _, batch, said = trained(models["policy"], tmp_path, credit, rollouts=Turns, **paths)
    dpo = load(models["policy"], models["positive"]) if kind == "adapter" else load(models["other"])
    own, reference = logps_of(dpo, batch), logps_of(load(models["policy"]), batch)
    mine = [
        [t for t in range(len(row)) if batch["tool_mask"][number, t]]  # results of tools have no reward
        for number, row in enumerate(own)
    ]
    rewards = [{t: 0.3 * (own[i][t] - reference[i][t]) for t in ts} for i, ts in enumerate(mine)]
    for i, reward in enumerate(rewards):
        group = range(i - i % GROUP, i - i % GROUP + GROUP)
        means = {j: sum(rewards[j].values()) / len(rewards[j]) for j in group}
        if form == "paper":
            baseline = sum(mean for j, mean in means.items() if j != i) / (GROUP - 1)
            left = {t: reward[t] - baseline for t in mine[i]}
        else:
            left = {t: reward[t] * GROUP / (GROUP - 1) - sum(means.values()) / (GROUP - 1) for t in mine[i]}
        for t in mine[i]:
            expected = sum(0.9 ** (s - t) * left[s] for s in mine[i] if s >= t)
            assert abs(float(said[i, t]) - expected) < 1e-4


def test_teacher_is_the_log_ratio_to_the_policy(models, tmp_path) -> None:
    _, batch, said = trained(models["policy"], tmp_path, TeacherCredit(), credit_model=models["other"])
    teacher, own = logps_of(load(models["other"]), batch), logps_of(load(models["policy"]), batch)
    expected = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(teacher, own, strict=True)]
    assert_rows(said, expected, **CLOSE)
    assert (said[batch["completion_mask"] == 0] == 0).all()


def test_the_teachers_policy_gradient_is_the_reverse_divergences() -> None:
    """Σ_y π(y) c(y) ∇log π(y) = −∇KL(π ‖ π_T): what the credit moves is what the page says."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(11, requires_grad=True), torch.randn(11).log_softmax(0)
    own = logits.log_softmax(0)
    (own.exp().detach() * (teacher - own).detach() * own).sum().backward(retain_graph=True)
    gradient, logits.grad = logits.grad, None
    (own.exp() * (own - teacher)).sum().backward()
    torch.testing.assert_close(gradient, -logits.grad)


def test_frozen_models_are_neither_trained_nor_saved(models, tmp_path) -> None:
    credit = ContrastCredit(models["positive"], models["negative"])
    trainer = make(models["policy"], tmp_path, credit, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in credit.scorer.base.state_dict().items()}
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not any(weight.requires_grad for weight in credit.scorer.base.parameters())
    frozen = {id(weight) for weight in credit.scorer.base.parameters()}
    assert not frozen & {id(weight) for weight in trainer.model.parameters()}
    assert not credit.scorer.base.training
    for name, weight in credit.scorer.base.state_dict().items():
        assert torch.equal(weight, before[name])
    saved = [file.name for file in (tmp_path / "saved").rglob("*.safetensors")]
    assert saved == ["adapter_model.safetensors"]


# ------------------------------------------------------------------------------------------------- continuations, turns


def after_commas(pieces: list[str]) -> list[int]:
    return [i + 1 for i, piece in enumerate(pieces[:-1]) if "," in piece][:2]


class Continued(RolloutEstimateCredit):
    """Keeps what it was asked, what it said, and the continuations that it had the trainer make."""

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        generate = trainer._generate_single_turn

        def recorded(prompt_ids: Any, *others: Any) -> Any:
            made = generate(prompt_ids, *others)
            self.made += zip(map(tuple, prompt_ids), made[0], strict=True)
            return made

        self.made: list[tuple[tuple[int, ...], list[int]]] = []
        trainer._generate_single_turn = recorded

    def __call__(self, *args: Any, **arguments: Any) -> list[list[float]]:
        self.made.clear()  # those of the completions themselves
        self.arguments, self.said = arguments, super().__call__(*args, **arguments)
        return self.said


def counted_length(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("asked", len(completion_ids))
    log_extra("length", [len(ids) for ids in completion_ids])
    return odd_length(completion_ids)


@pytest.mark.parametrize("kind", ["table", "own"])
def test_rollout_estimate_is_a_plain_loop_over_its_continuations(models, tmp_path, kind) -> None:
    credit = Continued(2, after_commas if kind == "table" else (lambda pieces: [4] if pieces[4:] else []))
    rollouts = TableRollouts if kind == "table" else None
    trainer = make(models["policy"], tmp_path, credit, rollouts=rollouts, reward_funcs=counted_length)
    trainer.train()

    prompt_ids = trainer._tokenize_prompts(credit.arguments["prompts"])[0]
    rewards: dict[tuple[int, ...], list[float]] = {}
    for before, new in credit.made:
        (length,) = {len(ids) for ids in prompt_ids if before[: len(ids)] == tuple(ids)}
        whole = [*before[length:], *new][: trainer.max_completion_length]
        rewards.setdefault(before, []).append(odd_length([whole])[0])
    assert all(len(values) == 2 for values in rewards.values()), "equal beginnings are continued once"
    found = {}
    for row, ids in enumerate(credit.arguments["completion_ids"]):
        borders = [0, *credit.borders([trainer.processing_class.decode([i]) for i in ids])]
        value = [sum(rewards[(*prompt_ids[row], *ids[:border])]) / 2 for border in borders]
        value.append(odd_length([ids])[0])
        steps = [max(k for k, border in enumerate(borders) if border <= t) for t in range(len(ids))]
        found[tuple(ids)] = [value[step + 1] - value[step] for step in steps]
        assert credit.said[row] == pytest.approx(found[tuple(ids)])

    # The steps' advantages take the place of the sequence's, in the order that TRL has shuffled the batch into
    batch = trainer._buffered_inputs[0]
    for advantages, ids, mask in zip(
        batch["advantages"], batch["completion_ids"], batch["completion_mask"].bool(), strict=True
    ):
        torch.testing.assert_close(advantages[mask], torch.tensor(found[tuple(ids[mask].tolist())]), **CLOSE)

    # What reward functions log of continuations is not the log of the completions
    logged = trainer.state.log_history[0]
    assert logged["credit/rollout_estimate/continuations"] == len(credit.made) and logged["asked"] == 8
    assert len(trainer._logs["extra"]["length"]) == 8


def test_steps_are_lines_and_sum_to_the_whole() -> None:
    assert lines(["a", "b\n", "\n", "c", "\n", "d", "\n"]) == [3, 5]
    assert lines(["\n\n", "a"]) == [1] and lines([]) == [] and lines(["a"]) == []
    credit = step_advantages(5, [0, 2, 3], [0.2, 0.7, 0.1], 1.0)
    assert credit == pytest.approx([0.5, 0.5, -0.6, 0.9, 0.9])
    assert math.isnan(step_advantages(2, [0, 1], [0.0, math.nan], 1.0)[1])


@pytest.mark.parametrize(("gamma", "centre"), [(None, True), (0.5, False)])
def test_turns_are_a_plain_loops_numbers_on_their_own_tokens(models, tmp_path, gamma, centre) -> None:
    credit = TurnsCredit(gamma=gamma, centre=centre)
    _, batch, said = trained(models["policy"], tmp_path, credit, rollouts=Turns)
    given = credit.numbers
    rows = [[math.nan if n is None else n for n in numbers] for numbers in given]
    if gamma is not None:
        rows = [[first + gamma * second, second] for first, second in rows]
    for row, mask in enumerate(batch["completion_mask"]):
        for t in range(int(mask.sum())):
            if 5 <= t < 8:
                assert math.isnan(said[row, t])
                continue
            turn = int(t >= 8)
            group = [rows[j][turn] for j in range(row - row % GROUP, row - row % GROUP + GROUP)]
            known = [n for n in group if not math.isnan(n)]
            expected = rows[row][turn] - (sum(known) / len(known) if centre else 0)
            assert (math.isnan(expected) and math.isnan(said[row, t])) or abs(said[row, t] - expected) < 1e-5


def test_turns_by_a_function_and_their_errors(models, tmp_path) -> None:
    def by_length(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[float(len(ids) % 5)] for ids in completion_ids]

    trained(models["policy"], tmp_path / "a", TurnsCredit(by_length))
    with pytest.raises(ValueError, match="2 turns but 1 numbers"):
        trained(models["policy"], tmp_path / "b", TurnsCredit(by_length), rollouts=Turns)
    with pytest.raises(ValueError, match="column 'turn_rewards'"):
        trained(models["policy"], tmp_path / "c", TurnsCredit())


# ---------------------------------------------------------------------------------------------------------------- names


def test_every_name_trains(models, tmp_path) -> None:
    """All built-in credits that need no schema at once, by their names."""
    names = [name for name in CREDITS if name not in ("field", "rollout_estimate")]
    paths = {"credit_model": models["positive"], "credit_negative": models["negative"]}
    trainer = make(models["policy"], tmp_path, None, rollouts=Turns, credit=names, **paths)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert all(f"credit/{name}/coverage" in logged for name in names)


def own_signal(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    return [[float(t % 2) for t in range(len(ids))] for ids in completion_ids]


def test_a_signal_works_by_its_name_where_it_has_an_online_form(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_SIGNALS", dict(registry._SIGNALS))  # other tests keep their table
    row = {"title": "every other", "low": 0.0, "high": 1.0, "unit": "share", "suspicious": "high"}
    register(Signal(name="every_other", online=f"{__name__}:own_signal", **row))  # type: ignore[arg-type]
    register(Signal(name="offline_only", **row))  # type: ignore[arg-type]
    trainer = make(models["policy"], tmp_path, None, credit="every_other")
    trainer.train()
    assert trainer.state.log_history[0]["credit/own_signal/mean"] == pytest.approx(0.5, abs=0.05)
    assert isinstance(credit_function("entropy"), EntropyCredit)
    with pytest.raises(ValueError, match="'offline_only' has no online form: give its row `online`"):
        credit_function("offline_only")
    with pytest.raises(ValueError, match="no credit function 'entropi'"):
        credit_function("entropi")


def test_models_that_do_not_fit_are_refused(models, tmp_path) -> None:
    with pytest.raises(ValueError, match="give its path or hub id as `credit_model`"):
        make(models["policy"], tmp_path, TeacherCredit())
    with pytest.raises(ValueError, match="is a model"):
        make(models["policy"], tmp_path, ContrastCredit(models["other"], models["negative"]))
    with pytest.raises(ValueError, match="credit_negative"):
        make(models["policy"], tmp_path, ImplicitRewardCredit(models["other"]))
    for path in (tmp_path / "nowhere", tmp_path):  # no folder, and one without a model
        with pytest.raises(ValueError, match=r"`credit_model` is .*; check the path, or the hub id"):
            make(models["policy"], tmp_path, TeacherCredit(), credit_model=str(path))
    with pytest.raises(ValueError, match=r"`credit_negative` is .*, but no credit function reads it"):
        make(models["policy"], tmp_path, TeacherCredit(models["other"]), credit_negative=models["other"])
    stranger = save_ledger_model(tmp_path / "stranger")
    tokenizer = AutoTokenizer.from_pretrained(stranger)
    tokenizer.add_tokens(["<another>"])
    backend = tokenizer.backend_tokenizer
    backend.normalizer = __import__("tokenizers").normalizers.Lowercase()
    tokenizer.save_pretrained(stranger)
    with pytest.raises(ValueError, match="reads token ids otherwise than the policy"):
        make(models["policy"], tmp_path, TeacherCredit(stranger))
