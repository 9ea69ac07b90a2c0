"""T-REG: equal to its base loss at α = 0, equal to a plain loop otherwise, wherever the rewards come from."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.support import tiny_tokenizer
from tests.trainers.preferences import (
    LORA,
    WEIGHT,
    as_text,
    first_batch,
    gradients,
    make_trainer,
    preference_rows,
    settings,
    token_logps,
    with_signals,
)
from tokalign.data.revision import load_templates, revision_prompt_ids
from tokalign.stage.contract import SIDES
from tokalign.stage.errors import ContractError
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer, TRegConfig, TRegTrainer
from tokalign.trainers.treg import PROMPTS


@pytest.fixture(scope="module")
def rows(tiny_path) -> list[dict]:
    return with_signals(preference_rows(tiny_path))


def without_rewards(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("_token_reward")} for row in rows]


make = functools.partial(make_trainer, method=TRegTrainer)


def reference_of(trainer, path):
    """Context giving the reference model: the LoRA base, or the model as it was loaded."""
    if not hasattr(trainer.model, "disable_adapter"):
        base = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        return lambda: contextlib.nullcontext(base)

    @contextlib.contextmanager
    def disabled():
        with trainer.model.disable_adapter():
            yield trainer.model

    return disabled


def cut(length: int, max_length: int | None, mode: str) -> range:
    """The positions of a sequence that truncation keeps."""
    if max_length is None or length <= max_length:
        return range(length)
    return range(max_length) if mode == "keep_start" else range(length - max_length, length)


def plain_loop(trainer, reference, rows, *, asked=None) -> torch.Tensor:
    """The paper's equation, one sequence and one token at a time.

    `asked(row, side)` gives the rewards of a whole completion where the dataset has none.
    """
    args, losses = trainer.args, []
    for row in rows:
        reward, regularizer = {}, torch.zeros(())
        for side in SIDES:
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            kept = cut(len(ids), args.max_length, args.truncation_mode)
            seen = [ids[i] for i in kept]
            policy = token_logps(trainer.model, seen)
            with torch.no_grad(), reference() as model:
                frozen = token_logps(model, seen)
            rewards = asked(row, side) if asked else row.get(f"{side}_token_reward")
            total, own, count = torch.zeros(()), torch.zeros(()), 0
            for place, position in enumerate(kept):
                t = position - len(row["prompt_ids"])
                if t >= 0:
                    count += 1
                if t < 0 or place == 0:
                    continue
                logp, ratio = policy[place - 1], policy[place - 1] - frozen[place - 1]
                total = total + (logp if args.base_loss == "simpo" else ratio)
                r = torch.sigmoid(ratio.detach()) - 0.5 if args.reward_source == "implicit" else rewards[t]
                own = own - args.beta * r * logp
            scale = 1 / count if args.base_loss == "simpo" else 1.0
            reward[side] = args.beta * total * scale
            predicted = sum(1 for place, i in enumerate(kept) if i >= len(row["prompt_ids"]) and place)
            regularizer = regularizer + (own / predicted if args.reduction == "mean" else own)
        margin = reward["chosen"] - reward["rejected"] - (args.simpo_gamma if args.base_loss == "simpo" else 0.0)
        weight = torch.sigmoid(-margin.detach()) if args.sequence_weight == "gradient" else 1.0
        losses.append(-torch.nn.functional.logsigmoid(margin) + args.alpha * weight * regularizer)
    return torch.stack(losses).mean()


def check(trainer, path, rows, asked=None) -> None:
    """Loss and gradient of the first batch against the plain loop."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    got = gradients(trainer.model)
    trainer.model.zero_grad()
    expected = plain_loop(trainer, reference_of(trainer, path), rows[:4], asked=asked)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    wanted = gradients(trainer.model)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], atol=2e-5, rtol=1e-4), name
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


# ------------------------------------------------------------------------------------------------- α = 0 is the base


def history(trainer) -> list[dict]:
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (False, {}),
        (True, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
        (True, {"loss_type": "ipo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (False, {"use_weighting": True, "ld_alpha": 0.4}),
    ],
)
def test_alpha_of_zero_is_dpo_to_the_last_bit(tiny_path, tmp_path, rows, lora, changes):
    ours = make(tiny_path, tmp_path / "a", rows, lora=lora, eval_rows=rows[:4], alpha=0.0, **changes)
    stock = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32"),
        args=DPOConfig(**settings(tmp_path / "b", **changes)),
        train_dataset=as_text(rows),
        eval_dataset=as_text(rows[:4]),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    for trainer in (ours, stock):
        trainer.train()
        trainer.evaluate()
    assert history(ours) == history(stock)
    assert len(history(ours)) >= 5 and "eval_logps/chosen" in history(ours)[-1]
    for (name, a), (_, b) in zip(ours.model.named_parameters(), stock.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_simpo_is_trls_simpo(tiny_path, tmp_path, rows):
    """α = 0 on SimPO: the loss of TRL's own implementation on the same log-probs, and no reference anywhere."""
    from trl.experimental.cpo import CPOTrainer

    options = dict(base_loss="simpo", beta=2.0, simpo_gamma=0.7, alpha=0.0)
    trainer = make(tiny_path, tmp_path, rows, moved=True, **options)
    assert trainer.ref_model is None and not trainer.precompute_ref_logps and not trainer.args.precompute_ref_log_probs
    batch = first_batch(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)

    def mean_logp(row: dict, side: str) -> torch.Tensor:
        return token_logps(trainer.model, row["prompt_ids"] + row[f"{side}_ids"])[-len(row[f"{side}_ids"]) :].mean()

    with torch.no_grad():
        means = {side: torch.stack([mean_logp(row, side) for row in rows[:4]]) for side in SIDES}

    class Settings:
        loss_type, simpo_gamma, beta, label_smoothing, alpha = "simpo", 0.7, 2.0, 0.0, 0.0
        accelerator = trainer.accelerator

    theirs, chosen, rejected = CPOTrainer.cpo_loss(Settings(), means["chosen"], means["rejected"])
    assert loss.item() == pytest.approx(theirs.mean().item(), abs=1e-5)
    metrics = trainer._metrics["train"]
    assert metrics["rewards/chosen"] == [pytest.approx(chosen.mean().item(), abs=1e-4)]
    assert metrics["rewards/margins"] == [pytest.approx((chosen - rejected).mean().item(), abs=1e-4)]
    assert metrics["rewards/accuracies"] == [(chosen > rejected).float().mean().item()]
    trainer.train()
    trainer.evaluate(Dataset.from_list(rows[:4]))  # after training too: there is no reference to be stale


# -------------------------------------------------------------------------------------------- any rewards: the equation


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (False, {}),
        (True, {}),
        (True, {"sequence_weight": "static"}),
        (False, {"regularizer_reduction": "mean", "alpha": 1.0}),
        (True, {"precompute_ref_log_probs": True}),
        (False, {"precompute_ref_log_probs": True, "max_length": 21}),
        (True, {"max_length": 9, "truncation_mode": "keep_end"}),
        (False, {"reward_source": "implicit"}),
        (True, {"reward_source": "implicit", "precompute_ref_log_probs": True}),
        (True, {"signal": "contrast", "reward_offset": 0.5}),
        (True, {"signal": "contrast"}),
        (False, {"signal": "entropy", "max_length": 21}),
        (True, {"signal": "logprob", "base_loss": "simpo", "beta": 2.0}),
        (True, {"signal": "implicit_reward"}),
        (False, {"base_loss": "simpo", "beta": 2.0}),
        (True, {"base_loss": "simpo", "beta": 2.0, "regularizer_reduction": "sum", "max_length": 21}),
        (True, {"base_loss": "simpo", "beta": 2.0, "sequence_weight": "static"}),
        (True, {"base_loss": "simpo", "beta": 2.0, "reward_source": "implicit"}),
        (False, {"base_loss": "simpo", "beta": 2.0, "reward_source": "implicit"}),
        (True, {"base_loss": "simpo", "beta": 2.0, "reward_source": "implicit", "precompute_ref_log_probs": True}),
    ],
)
def test_loss_and_gradient_are_the_equation(tiny_path, tmp_path, rows, lora, changes):
    signal = changes.get("signal", "token_reward")
    trainer = make(tiny_path, tmp_path, rows, lora=lora, moved=True, **changes)
    # A reward is itself; any other signal is 0.5 − its weight (0.5 − (1 − s) = s − 0.5, which the offset says too)
    check(trainer, tiny_path, rows, lambda row, side: [0.5 - WEIGHT[signal](v) for v in row[f"{side}_{signal}"]])


def test_stored_rewards_are_read_as_they_are(tiny_path, tmp_path, rows):
    trainer = make(tiny_path, tmp_path, rows)
    batch = first_batch(trainer)
    stored = torch.tensor([value for side in SIDES for row in rows[:4] for value in row[f"{side}_token_reward"]])
    read = trainer._token_signal(batch, elsewhere=0.0)
    assert torch.equal(read[batch["completion_mask"][:, 1:].bool()], stored)


def asked_rewards(path, rows, templates="general"):
    """Rewards from the equation: the base model's logits behind either revision prompt, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    tokenizer, templates = AutoTokenizer.from_pretrained(path), load_templates(templates)

    def asked(row, side):
        ids = row[f"{side}_ids"]
        logps = []
        for prompt in revision_prompt_ids(row["prompt"], row[side], templates, tokenizer):
            with torch.no_grad():
                logps.append(token_logps(model, [*prompt, *ids])[-len(ids) :])
        return [1 / (1 + (w - b).exp().item()) - 0.5 for b, w in zip(*logps, strict=True)]

    return asked


@pytest.fixture(scope="module")
def long_path(tmp_path_factory) -> str:
    """A tiny model with room for revision prompts, which a character-level tokenizer makes long."""
    from tests.support import tiny_model, tiny_tokenizer

    path = tmp_path_factory.mktemp("long")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    model = tiny_model(len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (True, {}),
        (False, {}),
        (True, {"precompute_ref_log_probs": True}),
        (False, {"precompute_ref_log_probs": True, "max_length": 21}),
        (True, {"max_length": 9, "truncation_mode": "keep_end"}),
        (True, {"base_loss": "simpo", "beta": 2.0}),
        (False, {"base_loss": "simpo", "beta": 2.0, "precompute_ref_log_probs": True}),
        (False, {"base_loss": "simpo", "beta": 2.0}),
    ],
)
def test_rewards_on_the_fly_are_the_references(long_path, tmp_path, rows, lora, changes):
    """Where the dataset has no reward columns, the reference is asked: for each batch, or once if it is precomputed."""
    plain = without_rewards(rows)
    trainer = make(long_path, tmp_path, plain, lora=lora, moved=True, templates="math", **changes)
    cached = "chosen_token_reward" in trainer.train_dataset.column_names
    assert cached == bool(changes.get("precompute_ref_log_probs"))
    check(trainer, long_path, plain, asked_rewards(long_path, plain, "math"))


def test_text_alone_is_enough(long_path, tmp_path, rows):
    """TRL's own preference text, without ids or rewards: tokenised by TRL, rewarded by the reference."""
    trainer = make(long_path, tmp_path, as_text(rows), lora=True, moved=True)
    with_ids = make(long_path, tmp_path, without_rewards(rows), lora=True, moved=True)
    losses = [t.compute_loss(t.model, first_batch(t)).item() for t in (trainer, with_ids)]
    assert losses[0] == losses[1]


def test_rewarded_rows_to_evaluate_on_beside_text_to_train_on(long_path, tmp_path, rows):
    """Refused at the start, where one asks the reference and the other does not; read where all are asked before."""
    text = as_text(rows)
    with pytest.raises(ContractError, match=r"eval dataset holds token rewards and the train dataset none.*or remove"):
        make(long_path, tmp_path / "a", text, eval_rows=rows[:4])
    trainer = make(long_path, tmp_path / "b", text, eval_rows=rows[:4], precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    stored = trainer.eval_dataset[0]["chosen_token_reward"]
    assert stored == rows[0]["chosen_token_reward"]


def test_end_tokens_that_trl_adds_to_texts_are_not_quoted(long_path, tmp_path):
    """The end token would close the user's turn before the sentence in which the revision prompts differ."""
    trainer = make(long_path, tmp_path, [{"prompt": "3 + 4?", "chosen": "The answer is 7", "rejected": "8"}] * 2)
    (row, _), end = trainer.train_dataset, trainer.processing_class.eos_token_id
    assert row["chosen"].endswith("<|end|>") and row["chosen_ids"][-1] == end
    for column in PROMPTS.values():
        assert row[column].count(end) == 1  # behind the user's turn


def test_a_system_message_that_the_template_refuses_is_named(long_path, tmp_path):
    tokenizer = tiny_tokenizer(kind="no system role")
    rows = as_text(preference_rows(long_path, 2)).to_list()
    rows[1]["prompt"] = [{"role": "system", "content": "be brief"}, *rows[1]["prompt"]]
    for config, trainer in ((TRegConfig, TRegTrainer), (CriticalTokenDPOConfig, CriticalTokenDPOTrainer)):
        options = {"weight_side": "none"} if trainer is CriticalTokenDPOTrainer else {}
        with pytest.raises(ContractError, match="Row 1: the chat template has no place for a system message"):
            trainer(
                model=long_path,
                args=config(**settings(tmp_path, **options)),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )


def test_streamed_rows_train_as_stored_ones(long_path, tmp_path, rows):
    plain = Dataset.from_list(without_rewards(rows))
    options = dict(lora=True, max_steps=2)
    stored = make(long_path, tmp_path / "a", plain, train_sampling_strategy="sequential", **options)
    streamed = make(long_path, tmp_path / "b", plain.to_iterable_dataset(), **options)
    assert isinstance(streamed.train_dataset, IterableDataset)
    for trainer in (stored, streamed):
        trainer.train()
    for a, b in zip(stored.model.parameters(), streamed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rewards_change_the_training_and_are_logged(tiny_path, tmp_path, rows):
    trainer = make(tiny_path, tmp_path, rows, alpha=0.5, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    mean = {s: [r for row in rows for r in row[f"{s}_token_reward"]] for s in SIDES}
    assert logged["treg/sequence_weight"] == pytest.approx(0.5)  # policy and reference are still one
    assert abs(logged["treg/regularizer"]) > 1e-3
    for side in SIDES:
        assert min(mean[side]) <= logged[f"treg/token_reward/{side}"] <= max(mean[side])
    plain = make(tiny_path, tmp_path, rows, alpha=0.0, max_steps=1)
    plain.train()
    assert abs(plain.state.log_history[0]["loss"] - logged["loss"]) > 1e-3
    assert "treg/regularizer" not in plain.state.log_history[0]


def test_accumulation_equals_a_larger_batch_and_padding_changes_nothing(tiny_path, tmp_path, rows):
    def trained(name, **changes):
        trainer = make(tiny_path, tmp_path / name, rows, lora=True, learning_rate=1e-2, optim="sgd", **changes)
        trainer.train()
        return [p for p in trainer.model.parameters() if p.requires_grad]

    large = trained("large", per_device_train_batch_size=4)
    small = trained("small", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    padded = trained("padded", per_device_train_batch_size=4, pad_to_multiple_of=64)
    for a, b, c in zip(large, small, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, c, atol=1e-6)


@pytest.mark.parametrize("base_loss", ["dpo", "simpo"])
def test_resume_equals_the_uninterrupted_run(tiny_path, tmp_path, rows, base_loss):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lora=True, base_loss=base_loss)
    whole = make(tiny_path, tmp_path / "whole", rows, **options)
    whole.train()
    again = make(tiny_path, tmp_path / "again", rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "2412.02685" in card and "zhou2025treg" in card


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "apo_zero", ["sigmoid", "sft"]])
def test_other_base_losses(tiny_path, tmp_path, rows, loss_type):
    """The regulariser is added to whatever TRL computes."""
    losses = {}
    for alpha in (0.0, 0.5):
        trainer = make(tiny_path, tmp_path, rows, lora=True, moved=True, loss_type=loss_type, alpha=alpha)
        trainer.model.train()
        losses[alpha] = trainer.compute_loss(trainer.model, first_batch(trainer)).item()
    regularizer = trainer._metrics["train"]["treg/regularizer"][-1]
    assert losses[0.5] == pytest.approx(losses[0.0] + 0.5 * regularizer, abs=1e-5) and abs(regularizer) > 1e-3


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("streamed", [False, True])
def test_rewards_outside_their_range(tiny_path, tmp_path, rows, streamed):
    bad = [dict(row) for row in rows[:4]]
    bad[2]["rejected_token_reward"] = [0.7 for _ in bad[2]["rejected_ids"]]
    dataset = Dataset.from_list(bad)
    message = r"p2.*`rejected_token_reward` holds 0\.7.*\[-0\.5, 0\.5\]"
    with pytest.raises(ContractError, match=message):
        make(tiny_path, tmp_path, dataset.to_iterable_dataset() if streamed else dataset).train()


def test_another_column_is_shifted_into_the_range_or_refused(tiny_path, tmp_path, rows):
    with pytest.raises(ContractError, match=r"`chosen_contrast` holds .*\[-0\.5, 0\.5\]"):
        make(tiny_path, tmp_path, rows, signal="contrast", reward_offset=0.0)
    make(tiny_path, tmp_path, rows, signal="contrast", reward_offset=0.5)
    with pytest.raises(ContractError, match="no column `chosen_entropy`"):
        make(tiny_path, tmp_path, Dataset.from_list(rows).remove_columns("chosen_entropy"), signal="entropy")
    with pytest.raises(ContractError, match="no column `rejected_token_reward`"):
        make(tiny_path, tmp_path, Dataset.from_list(rows).remove_columns("rejected_token_reward"))
    with pytest.raises(ContractError, match=r"text only .*`tokalign score contrast`, or set `alpha=0`"):
        make(tiny_path, tmp_path, as_text(rows), signal="contrast", reward_offset=0.5)


def test_rewards_of_another_tokenizer(tiny_path, tmp_path, rows):
    dataset = Dataset.from_list(rows)
    dataset.info.description = '{"tokenizer_hash": "' + "0" * 64 + '"}'
    with pytest.raises(ContractError, match="made with another tokenizer"):
        make(tiny_path, tmp_path, dataset)


def test_rows_for_which_the_model_lacks_positions_are_dropped(tiny_path, long_path, tmp_path, rows, caplog):
    with pytest.raises(ContractError, match=r"No row .* exceed the model's 512 positions; shorten"):
        make(tiny_path, tmp_path, [row | {"prompt": "x" * 600} for row in without_rewards(rows)])
    mixed = without_rewards(rows)
    mixed[1] = mixed[1] | {"prompt": [{"role": "user", "content": "x" * 2048}]}
    with caplog.at_level("WARNING"):
        trainer = make(long_path, tmp_path, mixed)
    assert len(trainer.train_dataset) == 7
    assert "Dropped 1 of 8 rows of the train dataset: a revision prompt" in caplog.text


def test_ids_without_text_cannot_be_revised(long_path, tmp_path, rows):
    ids = Dataset.from_list(rows).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    with pytest.raises(ContractError, match=r"no column `chosen`, whose text the revision prompts quote"):
        make(long_path, tmp_path, ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_loss": "orpo"}, "`base_loss` must be one of"),
        ({"sequence_weight": "dynamic"}, "`sequence_weight` must be one of"),
        ({"reward_source": "oracle"}, "`reward_source` must be one of"),
        ({"alpha": -0.1}, "`alpha` must not be negative"),
        ({"base_loss": "simpo", "loss_type": "ipo"}, "takes the place of the 'sigmoid' loss"),
        ({"base_loss": "simpo", "ld_alpha": 0.5}, "no log-ratio to a reference"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TRegConfig(**settings(tmp_path, **options))
