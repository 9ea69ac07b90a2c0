"""What the trainers of token preferences rely on in TRL: when one fails, TRL has changed; the message says where."""

from __future__ import annotations

import inspect

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tests.contracts.names import is_private, shared_names
from tokalign.internals.trl import DPO_OVERRIDDEN, DPO_USED, DataCollatorForPreference
from tokalign.trainers import CriticalTokenDPOTrainer, TRegTrainer

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def make_dpo(path, output_dir, **options) -> DPOTrainer:
    row = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        args=DPOConfig(str(output_dir), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=AutoTokenizer.from_pretrained(path),
        **options,
    )


@pytest.mark.parametrize("name", DPO_OVERRIDDEN)
def test_overridden_methods_keep_their_arguments(name):
    theirs = list(inspect.signature(getattr(DPOTrainer, name)).parameters)
    for trainer in (CriticalTokenDPOTrainer, TRegTrainer):
        ours = list(inspect.signature(getattr(trainer, name)).parameters)
        assert ours == theirs, f"TRL's DPOTrainer.{name} takes {theirs} in this version: adapt our override."


@pytest.mark.parametrize("trainer", [CriticalTokenDPOTrainer, TRegTrainer])
def test_private_names_that_are_shared_with_trl_are_listed(trainer):
    listed = {name for name in (*DPO_OVERRIDDEN, *DPO_USED) if is_private(name)}
    assert shared_names(trainer) == listed, "correct the lists in tokalign/internals/trl.py"


def test_constructor_takes_trls_arguments():
    theirs = inspect.signature(DPOTrainer.__init__).parameters
    ours = inspect.signature(CriticalTokenDPOTrainer.__init__).parameters
    assert list(ours) == list(theirs), "DPOTrainer.__init__ takes other arguments: pass them through in ours."
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_precompute_reads_what_trl_computes_in_init():
    source = inspect.getsource(DPOTrainer.__init__)
    for name in ("_precompute_model_hash", "_precompute_engine", "_is_vision_dataset", "loss_weights", "loss_types"):
        assert f"self.{name} =" in source, f"DPOTrainer.__init__ no longer sets self.{name}, which we read."


@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_calls_the_model_that_it_is_given_and_reads_the_reference_from_the_batch(tiny_path, tmp_path, lora):
    trainer = make_dpo(tiny_path, tmp_path, peft_config=LORA if lora else None)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    calls, forwards = [], []
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.register_forward_hook(lambda module, arguments, output: forwards.append(module))

    def stand_in(**arguments):
        calls.append(arguments)
        output = trainer.model(**arguments)
        output.log_probs = output.log_probs * 0.5
        return output

    reference = DPOTrainer.compute_ref_log_probs(trainer, stand_in, batch)
    assert len(calls) == len(forwards) == 1, "compute_ref_log_probs runs another model than the one that it is given."
    trainer.precompute_ref_logps = True
    trainer.model.train()
    given = batch | {"ref_chosen_logps": reference[0] + 1.0, "ref_rejected_logps": reference[1]}
    loss = DPOTrainer.compute_loss(trainer, stand_in, given)
    assert len(calls) == len(forwards) == 2, "DPOTrainer's loss runs another model than the one that it is given."
    assert all(call["fused_lm_head"] and call["labels"].shape == batch["input_ids"].shape for call in calls)
    # Policy and reference are one and both halved, so all that is left of the margin is the given 1
    expected = torch.nn.functional.softplus(torch.tensor(trainer.beta))
    assert torch.allclose(loss, expected), "DPOTrainer's loss sums other log-probs or reads other keys of the batch."


@pytest.mark.parametrize("lora", [False, True])
def test_fused_forward(tiny_path, lora):
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    if lora:
        model = get_peft_model(model, LORA)
    ids = torch.randint(6, 60, (4, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert isinstance(output, FusedCausalLMOutput), "The fused LM head returns another type."
    assert output.log_probs.shape == (4, 6), "log_probs is no longer (2B, L − 1)."
    assert output.log_sum_sq_probs.shape == (4, 6), "WPO's statistic no longer lies beside log_probs."
    outside = labels[:, 1:] == -100
    assert (output.log_probs[outside] == 0).all(), "log_probs is no longer 0 outside the completions."
    assert (output.log_probs[~outside] < 0).all()
    output.log_probs = output.log_probs * 0.5
    assert output["log_probs"] is output.log_probs, "Setting a field of the output no longer changes its entry."
    assert getattr(model(input_ids=ids), "log_probs", None) is None, "An ordinary forward now has log_probs too."


def test_collator_layout():
    collator = DataCollatorForPreference(pad_token_id=0, max_length=4, truncation_mode="keep_end")
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
        {"prompt_ids": [7], "chosen_ids": [8, 9], "rejected_ids": [10]},
    ]
    batch = collator(rows)
    assert sorted(batch) == ["attention_mask", "completion_mask", "input_ids"], "The collator returns other keys."
    wanted = [[1, 2, 3, 0], [7, 8, 9, 0], [2, 4, 5, 6], [7, 10, 0, 0]]
    assert batch["input_ids"].tolist() == wanted, "The collator's layout (chosen first, padded right) has changed."
    fields = ["pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"]
    assert list(vars(collator)) == fields, "The collator has other fields: DataCollatorForTokenSignals copies them."


def test_metric_names_and_signature_columns(tiny_path, tmp_path):
    trainer = make_dpo(tiny_path, tmp_path)
    assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(trainer.train_dataset.column_names)
    trainer._set_signature_columns_if_needed()
    wanted = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
    assert trainer._signature_columns == wanted, "TRL keeps other columns."
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]]))
    metrics = trainer._metrics["train"]
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert len(metrics[name]) == 1, f"TRL no longer logs {name} once a step, which we overwrite or document."
