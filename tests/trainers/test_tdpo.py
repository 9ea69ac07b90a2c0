"""TDPO, the benchmarks' peer: the loss from its equation, plain DPO at α = 0, and a training step with LoRA."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from benchmarks.peers import tdpo
from benchmarks.peers.tdpo import TDPOConfig, TDPOTrainer, tdpo_loss
from tests.trainers.preferences import first_batch, gradients, make_trainer, preference_rows, settings
from tokalign.trainers import CriticalTokenDPOTrainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows(tiny_path):
    return preference_rows(tiny_path)


def make(path, folder, rows, **changes):
    return make_trainer(path, folder, rows, method=TDPOTrainer, **changes)


def sequence(policy, reference, row, side) -> tuple[float, float]:
    """Σ ρ_t and Σ KL(π_ref ‖ π) of one side, vocabulary entry by vocabulary entry."""
    ids, start = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
    with torch.no_grad():
        ours, theirs = (
            m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).double() for m in (policy, reference)
        )
    ratio = divergence = 0.0
    for t in range(start, len(ids)):
        ratio += (ours[t - 1, ids[t]] - theirs[t - 1, ids[t]]).item()
        for a, b in zip(theirs[t - 1].tolist(), ours[t - 1].tolist(), strict=True):
            divergence += math.exp(a) * (a - b)
    return ratio, divergence


@pytest.mark.parametrize(("variant", "alpha"), [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 1.5)])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_equals_a_plain_loop(tiny_path, tmp_path, rows, variant, alpha, lora, monkeypatch):
    monkeypatch.setattr(tdpo, "CHUNK", 7)  # several chunks, the last one short
    trainer = make(tiny_path, tmp_path, rows, lora=lora, moved=True, tdpo_variant=variant, tdpo_alpha=alpha)
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    reference = AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32").eval()
    total, divergences = 0.0, []
    for row in rows[:4]:
        (chosen, chosen_kl), (rejected, rejected_kl) = (
            sequence(trainer.model, reference, row, side) for side in ("chosen", "rejected")
        )
        margin = chosen - rejected - (alpha if variant == "tdpo2" else 1.0) * (rejected_kl - chosen_kl)
        total += math.log1p(math.exp(-trainer.beta * margin)) / 4
        divergences.append((chosen_kl, rejected_kl))
    assert loss.item() == pytest.approx(total, abs=1e-4)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    for i, side in enumerate(("chosen", "rejected")):
        mean = sum(pair[i] for pair in divergences) / 4
        assert mean > 0.01 and logged[f"tdpo/kl/{side}"][-1] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_alpha_0_is_dpo_to_the_last_bit(tiny_path, tmp_path, rows, lora):
    results = []
    for method, changes in (
        (TDPOTrainer, {"tdpo_alpha": 0.0}),
        (CriticalTokenDPOTrainer, {"weight_side": "none"}),
        (TDPOTrainer, {}),
    ):
        trainer = make_trainer(tiny_path, tmp_path, rows, method=method, lora=lora, moved=True, **changes)
        trainer.model.eval()
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        loss.backward()
        results.append((loss.item(), gradients(trainer.model)))
    (ours, our_gradients), (dpo, dpo_gradients), (other, other_gradients) = results
    assert ours == dpo != other
    assert our_gradients.keys() == dpo_gradients.keys() == other_gradients.keys()
    for name, gradient in dpo_gradients.items():
        assert torch.equal(our_gradients[name], gradient), name
    assert any(not torch.equal(other_gradients[name], gradient) for name, gradient in dpo_gradients.items())


def test_the_chosen_divergence_has_a_gradient_in_tdpo1_only():
    def gradient(variant):
        chosen_kl, rejected_kl = (torch.tensor([value], requires_grad=True) for value in (0.3, 0.8))
        tdpo_loss(
            torch.zeros(1), torch.ones(1), chosen_kl, rejected_kl, beta=0.5, alpha=0.7, variant=variant
        ).backward()
        return chosen_kl.grad, rejected_kl.grad.item()

    # dℓ/dD(y_l) = β c σ(−margin), with c = 1 in TDPO1 and α in TDPO2
    chosen, rejected = gradient("tdpo1")
    slope = 0.5 / (1 + math.exp(0.5 * (-1 - 0.5)))
    assert chosen.item() == pytest.approx(-slope) and rejected == pytest.approx(slope)
    chosen, rejected = gradient("tdpo2")
    assert chosen is None and rejected == pytest.approx(0.5 * 0.7 / (1 + math.exp(0.5 * (-1 - 0.35))))


def test_the_ledgers_dpo_yaml_trains_it_with_lora(tiny_path, tmp_path, rows):
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    overrides = {
        "model_name_or_path": tiny_path,
        "dataset_name": str(tmp_path / "pairs.parquet"),
        "output_dir": str(tmp_path),
        "max_steps": "2",
        "per_device_train_batch_size": "2",
        "logging_steps": "1",
        "warmup_steps": "0",
    }
    options = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    parser = TrlParser((tdpo.TDPOScriptArguments, TDPOConfig, ModelConfig))
    trainer = tdpo.main(*parser.parse_args_and_config(["--config", str(ROOT / "recipes/ledger/dpo.yaml"), *options]))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["tdpo/kl/chosen"] > 0 for entry in logged] == [False, True]  # they part with the first step
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tdpo_variant": "tdpo3"}, "`tdpo_variant` must be"),
        ({"loss_type": ["sigmoid", "sft"]}, "takes the place of the 'sigmoid' loss"),
        ({"ld_alpha": 0.5}, "defined without `ld_alpha`"),
    ],
)
def test_settings_that_tdpo_does_not_have(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TDPOConfig(**settings(tmp_path, **options))
    with pytest.raises(ValueError, match="variant must be"):
        tdpo_loss(*torch.zeros(4, 1), beta=1.0, variant="tdpo3")
