"""Critical-token DPO: equal to `DPOTrainer` with scores of 0, equal to a plain loop with any scores."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from tests.trainers.preferences import (
    LORA,
    WEIGHT,
    as_text,
    first_batch,
    gradients,
    make_trainer,
    plain_loop,
    preference_rows,
    settings,
    truncate,
    with_signals,
)
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer


@pytest.fixture(scope="module")
def rows(tiny_path):
    return with_signals(preference_rows(tiny_path))


def _history(trainer) -> list[dict]:
    """What was logged, without seconds and without the weights that only ours logs."""
    without = ("runtime", "per_second", "token_weight/")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in without)}
        for entry in trainer.state.log_history
    ]


def _reference(trainer, path):
    """Context giving the reference model of `plain_loop`: the LoRA base, or the model as it was loaded."""
    if hasattr(trainer.model, "disable_adapter"):

        @contextlib.contextmanager
        def disabled():
            with trainer.model.disable_adapter():
                yield trainer.model

        return disabled
    base = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    return lambda: contextlib.nullcontext(base)


# ---------------------------------------------------------------------------------------- weights of 1 are DPOTrainer


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (False, {}),
        (False, {"weight_side": "none"}),
        (True, {"weight_side": "both", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
        (True, {"use_weighting": True, "ld_alpha": 0.4}),
        (False, {"loss_type": "ipo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (True, {"loss_type": "sigmoid_norm", "gradient_checkpointing": True, "max_length": 24}),
    ],
)
def test_scores_of_zero_are_dpo_to_the_last_bit(tiny_path, tmp_path, lora, changes):
    rows = preference_rows(tiny_path, zero_scores=True)
    ours = make_trainer(tiny_path, tmp_path / "a", rows, lora=lora, eval_rows=rows[:4], **changes)
    stock_changes = {k: v for k, v in changes.items() if k != "weight_side"}
    stock = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32"),
        args=DPOConfig(**settings(tmp_path / "b", **stock_changes)),
        train_dataset=as_text(rows),
        eval_dataset=as_text(rows[:4]),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    for ids in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours.train_dataset[ids][:] == stock.train_dataset[ids][:]
    for trainer in (ours, stock):
        trainer.train()
        trainer.evaluate()
    assert _history(ours) == _history(stock)
    assert len(_history(ours)) >= 5 and "eval_logps/chosen" in _history(ours)[-1]
    logged = [value for entry in ours.state.log_history for key, value in entry.items() if "token_weight/" in key]
    assert all(value == 1.0 for value in logged) and bool(logged) == (changes.get("weight_side") != "none")
    for (name, a), (_, b) in zip(ours.model.named_parameters(), stock.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weight_side_none_tokenises_text_as_trl_does(tiny_path, tmp_path, rows):
    trainer = make_trainer(tiny_path, tmp_path, as_text(rows), weight_side="none")
    assert trainer.train_dataset["chosen_ids"][:] == [row["chosen_ids"] for row in rows]
    assert "token_signal" not in first_batch(trainer)
    trainer.evaluate(trainer.train_dataset)  # prepared once more


def test_ids_are_never_made_again_from_text(tiny_path, tmp_path, rows):
    marked = [row | {"prompt_ids": [7, *row["prompt_ids"]]} for row in rows]  # not what the text reads as
    for side, columns in (("none", ["prompt_ids", "chosen_ids", "rejected_ids"]), ("none", None), ("rejected", None)):
        dataset = Dataset.from_list(marked)
        trainer = make_trainer(
            tiny_path, tmp_path, dataset.select_columns(columns) if columns else dataset, weight_side=side
        )
        assert trainer.train_dataset["prompt_ids"][:] == [row["prompt_ids"] for row in marked]


# ------------------------------------------------------------------------------------- any weights are the plain loop


@pytest.mark.parametrize(
    ("lora", "sides", "changes"),
    [
        (False, ("rejected",), {}),
        (True, ("rejected",), {}),
        (False, ("chosen",), {}),
        (True, ("chosen", "rejected"), {}),
        (False, ("rejected",), {"precompute_ref_log_probs": True}),
        (True, ("rejected",), {"precompute_ref_log_probs": True}),
        (True, ("rejected",), {"max_length": 21}),
        (False, ("rejected",), {"max_length": 9, "truncation_mode": "keep_end"}),
        (True, ("rejected",), {"max_length": 9, "truncation_mode": "keep_end", "precompute_ref_log_probs": True}),
        (False, ("chosen", "rejected"), {"max_length": 21, "precompute_ref_log_probs": True}),
        (False, ("rejected",), {"sft": 0.7}),
        (True, ("chosen", "rejected"), {"sft": 0.7}),
        (True, ("rejected",), {"signal": "entropy"}),
        (False, ("rejected",), {"signal": "logprob"}),
        (True, ("chosen", "rejected"), {"signal": "entropy", "max_length": 21, "precompute_ref_log_probs": True}),
        (True, ("chosen", "rejected"), {"signal": "logprob", "max_length": 9, "truncation_mode": "keep_end"}),
        (True, ("rejected",), {"signal": "token_reward"}),
        (True, ("rejected",), {"signal": "implicit_reward", "sft": 0.7}),
        (False, ("rejected",), {"signal": "rollout_accuracy"}),
    ],
)
def test_loss_and_gradient_are_the_equations(tiny_path, tmp_path, rows, lora, sides, changes):
    changes = dict(changes)
    sft = changes.pop("sft", 0.0)
    if sft:
        changes |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft]}
    side = "both" if len(sides) == 2 else sides[0]
    trainer = make_trainer(tiny_path, tmp_path, rows, lora=lora, moved=True, weight_side=side, **changes)
    assert (trainer.ref_model is None) == (lora or "precompute_ref_log_probs" in changes)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    got = gradients(trainer.model)
    trainer.model.zero_grad()

    expected = plain_loop(
        trainer,
        _reference(trainer, tiny_path),
        rows[:4],
        sides=sides,
        max_length=changes.get("max_length"),
        mode=changes.get("truncation_mode", "keep_start"),
        sft=sft,
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    wanted = gradients(trainer.model)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], atol=1e-5, rtol=1e-4), name
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("weight_side", ["rejected", "both", "none"])
def test_position_aggregation_is_the_released_form(tiny_path, tmp_path, rows, precompute, weight_side):
    trainer = make_trainer(
        tiny_path,
        tmp_path,
        rows,
        lora=True,
        moved=True,
        aggregation="position",
        weight_side=weight_side,
        loss_type=["sigmoid", "sft"],
        loss_weights=[2.0, 0.5],
        precompute_ref_log_probs=precompute,
    )
    batch = first_batch(trainer)
    got = trainer.compute_loss(trainer.model, batch)

    # The released form at each of the T = L − 1 positions of the padded batch, and their mean
    length = batch["input_ids"].size(1) - 1
    logits = {}
    for name, context in (("policy", contextlib.nullcontext()), ("reference", trainer.model.disable_adapter())):
        with torch.no_grad(), context:
            out = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits[name] = out[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    total, nll, tokens = 0.0, 0.0, 0
    for pair in range(4):
        scores = {side: truncate(rows[pair], side, None, "keep_start")[2] for side in ("chosen", "rejected")}
        for t in range(1, length + 1):
            margin = 0.0
            for side, row, sign in (("chosen", pair, 1), ("rejected", pair + 4, -1)):
                if batch["completion_mask"][row, t]:
                    weighted = weight_side in (side, "both")
                    weight = 1 - scores[side][t] if weighted else 1.0
                    ratio = logits["policy"][row, t - 1] - logits["reference"][row, t - 1]
                    margin += sign * trainer.beta * weight * ratio.item()
                    if side == "chosen":
                        nll, tokens = nll - logits["policy"][row, t - 1].item(), tokens + 1
            total -= torch.nn.functional.logsigmoid(torch.tensor(margin)).item()
    assert got.item() == pytest.approx(2.0 * total / (4 * length) + 0.5 * nll / tokens, abs=1e-5)
    got.backward()
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients(trainer.model).values())


@pytest.mark.parametrize("signal", WEIGHT)
def test_no_rejected_token_is_pushed_up_and_weights_are_logged(tiny_path, tmp_path, rows, signal, monkeypatch):
    """Weights lie in [0, 1] whatever the signal's unit, so ∂ℓ/∂log π of a rejected token is never negative."""
    trainer = make_trainer(tiny_path, tmp_path, rows, moved=True, lora=True, signal=signal)
    trainer.model.train()
    batch = first_batch(trainer)
    seen = []
    trainer.model.register_forward_hook(
        lambda module, arguments, output: seen.append(output.log_probs) if output.log_probs.requires_grad else None
    )
    loss = trainer.compute_loss(trainer.model, batch)
    (gradient,) = torch.autograd.grad(loss, seen)
    mask = batch["completion_mask"][:, 1:].bool()
    chosen, rejected = (half[half_mask] for half, half_mask in zip(gradient.chunk(2), mask.chunk(2), strict=True))
    assert (chosen < 0).all() and (rejected >= 0).all() and rejected.max() > 1e-4

    weights = [WEIGHT[signal](value) for row in rows[:4] for value in row[f"rejected_{signal}"]]
    assert 0.0 <= min(weights) < max(weights) <= 1.0
    logged = trainer._metrics["train"]
    assert logged["token_weight/mean"] == [pytest.approx(sum(weights) / len(weights), abs=1e-6)]
    assert logged["token_weight/min"] == [pytest.approx(min(weights), abs=1e-6)]
    assert logged["token_weight/max"] == [pytest.approx(max(weights), abs=1e-6)]


def test_logged_extremes_are_those_of_all_batches_since_the_last_log(tiny_path, tmp_path, rows):
    trainer = make_trainer(tiny_path, tmp_path, rows, max_steps=2, logging_steps=2, weight_side="both")
    trainer.train()
    scores = [value for row in rows for side in ("chosen", "rejected") for value in row[f"{side}_contrast"]]
    logged = trainer.state.log_history[0]
    assert logged["token_weight/min"] == pytest.approx(1 - max(scores), abs=1e-6)
    assert logged["token_weight/max"] == pytest.approx(1 - min(scores), abs=1e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_weights_that_tell_no_tokens_apart_are_named_once(tiny_path, tmp_path, rows, caplog, constant):
    if constant:
        rows = [
            row | {"rejected_contrast": [0.4 + 0.001 * (t % 2) for t in range(len(row["rejected_ids"]))]}
            for row in rows
        ]
    with caplog.at_level("WARNING"):
        make_trainer(tiny_path, tmp_path, rows, max_steps=20, lora=True).train()
    warned = [record.message for record in caplog.records if "tells no tokens apart" in record.message]
    assert len(warned) == (1 if constant else 0)
    assert not constant or "lie between 0.599 and 0.600: the signal 'contrast'" in warned[0]


def test_accumulation_equals_a_larger_batch_and_padding_changes_nothing(tiny_path, tmp_path, rows):
    def trained(name, **changes):
        trainer = make_trainer(tiny_path, tmp_path / name, rows, lora=True, learning_rate=1e-2, optim="sgd", **changes)
        trainer.train()
        return [p for p in trainer.model.parameters() if p.requires_grad]

    large = trained("large", per_device_train_batch_size=4)
    small = trained("small", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    padded = trained("padded", per_device_train_batch_size=4, pad_to_multiple_of=64)
    for a, b, c in zip(large, small, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, c, atol=1e-6)


def test_scores_change_the_training(tiny_path, tmp_path, rows):
    """Guards the guards: a hook that never ran would pass every equality with DPOTrainer."""
    plain = make_trainer(tiny_path, tmp_path, rows, moved=True, weight_side="none")
    weighted = make_trainer(tiny_path, tmp_path, rows, moved=True)
    plain_loss = plain.compute_loss(plain.model, first_batch(plain))
    assert abs(plain_loss - weighted.compute_loss(weighted.model, first_batch(weighted))) > 1e-2


def test_logged_logps_are_unweighted_and_rewards_weighted(tiny_path, tmp_path, rows):
    plain = make_trainer(tiny_path, tmp_path, rows, moved=True, weight_side="none", ld_alpha=0.6)
    weighted = make_trainer(tiny_path, tmp_path, rows, moved=True, weight_side="both", ld_alpha=0.6)
    for trainer in (plain, weighted):
        trainer.model.train()
        trainer.compute_loss(trainer.model, first_batch(trainer))
    logged = [trainer._metrics["train"] for trainer in (plain, weighted)]
    for key in ("logps/chosen", "logps/rejected", "entropy", "logits/chosen", "mean_token_accuracy"):
        assert logged[0][key] == pytest.approx(logged[1][key]) and len(logged[1][key]) == 1
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged[0][key] != pytest.approx(logged[1][key], rel=1e-3)


def test_wpo_weights_pairs_by_the_unweighted_logps(tiny_path, tmp_path, rows):
    losses = {}
    for wpo in (False, True):
        trainer = make_trainer(tiny_path, tmp_path, rows[:1], moved=True, use_weighting=wpo)
        losses[wpo] = trainer.compute_loss(trainer.model, first_batch(trainer, 1)).item()
    pair_weight = 1.0
    for side in ("chosen", "rejected"):  # Eq. 2 of arXiv 2406.11827 from the full distribution
        ids = rows[0]["prompt_ids"] + rows[0][f"{side}_ids"]
        with torch.no_grad():
            logs = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        start = len(rows[0]["prompt_ids"])
        aligned = [logs[t - 1, ids[t]] - (2 * logs[t - 1]).logsumexp(-1) for t in range(start, len(ids))]
        pair_weight *= torch.stack(aligned).mean().exp().item()
    assert losses[True] == pytest.approx(losses[False] * pair_weight, rel=1e-4)


@pytest.mark.parametrize("loss_type", ["hinge", "robust", "apo_zero", "discopop", "nca_pair", "sppo_hard", "aot"])
def test_other_losses_read_the_weighted_log_ratios(tiny_path, tmp_path, rows, loss_type):
    trainer = make_trainer(tiny_path, tmp_path, rows, moved=True, lora=True, loss_type=loss_type)
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    weights, trainer.data_collator.sides = trainer.args.weight_side, ()
    trainer.args.weight_side = "none"
    assert weights == "rejected" and torch.isfinite(loss)
    assert abs(loss - trainer.compute_loss(trainer.model, first_batch(trainer))) > 1e-4


# ------------------------------------------------------------------------------------------------ the rest of the stack


def test_one_reference_cache_serves_every_weighting(tiny_path, tmp_path, rows):
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "rows")
    dataset = Dataset.load_from_disk(tmp_path / "rows")
    caches = []
    for side, length in (("rejected", 21), ("both", 21), ("none", 21), ("rejected", 22)):
        trainer = make_trainer(
            tiny_path, tmp_path / side, dataset, weight_side=side, max_length=length, precompute_ref_log_probs=True
        )
        files = {f["filename"] for f in trainer.train_dataset.cache_files if "cache-" in f["filename"]}
        caches.append(max(files, key=lambda name: name not in str(dataset.cache_files)))
        row = trainer.train_dataset[1]
        cut = max(0, len(row["prompt_ids"]) + len(row["chosen_ids"]) - length)
        values = row["ref_chosen_token_logps"]
        assert len(values) == len(row["chosen_ids"]) and all(v < 0 for v in values[: len(values) - cut])
        assert values[len(values) - cut :] == [0.0] * cut
    stored = [Path(name).read_bytes() for name in caches]
    assert stored[0] == stored[1] == stored[2] != stored[3]
    assert caches[0] == caches[1] == caches[2] != caches[3]


def test_reference_cache_tells_models_apart_under_zero3(tiny_path, tmp_path, rows):
    """ZeRO-3 leaves empty parameters, which TRL hashes alike for all models with as many tensors."""
    hashes = set()
    for scale in (1.0, 1.0, 2.0):
        trainer = make_trainer(tiny_path, tmp_path, rows, lora=True)
        trainer._precompute_model_hash = "hash of empty tensors"
        for parameter in trainer.model.parameters():
            parameter.ds_tensor = scale * parameter.detach().flatten()[::2]
        hashes.add(trainer._reference_hash())
    assert len(hashes) == 2


def test_evaluation_on_another_dataset_with_a_precomputed_reference(tiny_path, tmp_path, rows):
    trainer = make_trainer(
        tiny_path, tmp_path, rows, lora=True, eval_rows=rows[:4], precompute_ref_log_probs=True, max_steps=1
    )
    trainer.train()
    held = trainer.evaluate()
    passed = trainer.evaluate(Dataset.from_list(rows[:4]))
    named = trainer.evaluate({"a": Dataset.from_list(rows[:4])})
    assert held["eval_loss"] == passed["eval_loss"] == named["eval_a_loss"]


def test_resume_equals_the_uninterrupted_run(tiny_path, tmp_path, rows):
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, lora=True, per_device_train_batch_size=2)
    whole = make_trainer(tiny_path, tmp_path / "whole", rows, **options)
    whole.train()
    again = make_trainer(tiny_path, tmp_path / "again", rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "Critical-token DPO" in card and "2411.19943" in card and "lin2024critical" in card
    saved = torch.load(tmp_path / "whole" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (saved.weight_side, saved.aggregation, saved.signal) == ("rejected", "sequence", "contrast")


def test_streamed_rows_train_as_stored_ones(tiny_path, tmp_path, rows):
    stored = make_trainer(tiny_path, tmp_path / "a", rows, train_sampling_strategy="sequential", max_steps=2)
    streamed = make_trainer(tiny_path, tmp_path / "b", Dataset.from_list(rows).to_iterable_dataset(), max_steps=2)
    assert isinstance(streamed.train_dataset, IterableDataset)
    for trainer in (stored, streamed):
        trainer.train()
    for a, b in zip(stored.model.parameters(), streamed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_collator_truncates_scores_with_their_ids(tiny_path, tmp_path, rows):
    for mode in ("keep_start", "keep_end"):
        trainer = make_trainer(tiny_path, tmp_path, rows, weight_side="both", max_length=20, truncation_mode=mode)
        batch = first_batch(trainer)
        for i, (side, row) in enumerate([(s, r) for s in ("chosen", "rejected") for r in rows[:4]]):
            ids, flags, scores = truncate(row, side, 20, mode)
            wanted = [score if flag else 0.0 for flag, score in zip(flags, scores, strict=True)]
            padding = batch["input_ids"].size(1) - len(ids)
            assert batch["input_ids"][i].tolist() == ids + [0] * padding
            assert batch["token_signal"][i].tolist() == pytest.approx(wanted + [0.0] * padding, abs=1e-7)


def test_a_model_called_around_its_hooks_is_weighted_too(tiny_path, tmp_path, rows, monkeypatch):
    """As a compiled model may be: the weights act on what TRL is handed, not inside the model."""
    trainer = make_trainer(tiny_path, tmp_path, rows, moved=True)
    batch = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    monkeypatch.setattr(type(trainer.model), "__call__", lambda self, *a, **k: self.forward(*a, **k))
    assert trainer.compute_loss(trainer.model, batch) == loss


def test_logits_for_compute_metrics_are_the_models_own(tiny_path, tmp_path, rows):
    trainer = make_trainer(tiny_path, tmp_path, rows, moved=True)
    batch = first_batch(trainer)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss == trainer.compute_loss(trainer.model, batch)
    expected = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(outputs.logits, expected)


def test_a_plain_model_path_is_enough(tiny_path, tmp_path, rows):
    trainer = CriticalTokenDPOTrainer(
        tiny_path, args=CriticalTokenDPOConfig(**settings(tmp_path, max_steps=1)), train_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_fsdp_has_placed_nothing_before_training(tiny_path, tmp_path, rows, monkeypatch):
    """So the base that an adapter stands on goes to the device for the reference's passes, and back to be sharded."""
    trainer = make_trainer(tiny_path, tmp_path, rows, lora=True)
    trainer.is_fsdp_enabled, moves = True, []
    home = next(trainer.model.parameters()).device
    monkeypatch.setattr(trainer.model, "to", moves.append)
    trainer._precompute_ref_logps(trainer.train_dataset, "train", 2)
    assert moves == [trainer.accelerator.device, home]
    trainer.create_optimizer()  # in training accelerate has sharded it, and it stays where it is
    trainer._precompute_ref_logps(trainer.train_dataset.select(range(2)), "other", 2)
    assert len(moves) == 2
