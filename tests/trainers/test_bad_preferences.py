"""Bad data and bad settings: one sentence that names row or option and remedy, before any training."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.support import save_tiny
from tests.trainers.preferences import as_text, make_trainer, preference_rows, settings
from tokalign.internals.trl import head_needs_triton
from tokalign.signals.registry import Signal, register
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import added_tokens, tokenizer_hash
from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.trainers import CriticalTokenDPOConfig, CriticalTokenDPOTrainer, TRegTrainer


@pytest.fixture
def rows(tiny_path):
    return preference_rows(tiny_path, 4)


def _with_manifest(rows, **manifest) -> Dataset:
    dataset = Dataset.from_list(rows)
    dataset.info.description = json.dumps(manifest)
    return dataset


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rejected_contrast", [0.5, 0.5], r"p2.*`rejected_contrast` has 2 scores for \d+ ids in `rejected_ids`"),
        ("rejected_contrast", float("nan"), r"p2.*`rejected_contrast` holds nan, not a finite number"),
        ("rejected_contrast", 1.5, r"p2.*`rejected_contrast` holds 1.5, but this signal lies in \[0, 1\]"),
        ("chosen_ids", [], r"p2.*`chosen_ids` is empty"),
        ("rejected_ids", 9999, r"p2.*`rejected_ids` holds id 9999, but the tokenizer has"),
    ],
)
def test_bad_row(tiny_path, tmp_path, rows, column, value, message, streamed):
    rows[2][column] = value if isinstance(value, list) else [value] * len(rows[2][column])
    dataset = Dataset.from_list(rows)
    with pytest.raises(ContractError, match=message) as error:
        trainer = make_trainer(tiny_path, tmp_path, dataset.to_iterable_dataset() if streamed else dataset)
        trainer.train()
    assert str(error.value).count("\n") == 0


def test_missing_scores(tiny_path, tmp_path, rows):
    with pytest.raises(ContractError, match="no column `rejected_contrast`"):
        make_trainer(tiny_path, tmp_path, Dataset.from_list(rows).remove_columns("rejected_contrast"))
    with pytest.raises(ContractError, match="no column `chosen_entropy`"):
        make_trainer(tiny_path, tmp_path, rows, weight_side="chosen", signal="entropy")
    with pytest.raises(ContractError, match=r"text only .*`tokalign score contrast`, or set `weight_side='none'`"):
        make_trainer(tiny_path, tmp_path, as_text(rows))
    with pytest.raises(ContractError, match="no rows"):
        make_trainer(tiny_path, tmp_path, Dataset.from_list(rows).select([]))


@pytest.mark.parametrize(
    ("signal", "value", "limits"), [("entropy", -0.1, r"\[0, inf\]"), ("logprob", 0.2, r"\[-inf, 0\]")]
)
def test_values_outside_the_signals_range(tiny_path, tmp_path, rows, signal, value, limits):
    for row in rows:
        row[f"rejected_{signal}"] = [value] * len(row["rejected_ids"])
    with pytest.raises(ContractError, match=rf"p0.*`rejected_{signal}` holds {value}, .* in {limits}"):
        make_trainer(tiny_path, tmp_path, rows, signal=signal)


@pytest.mark.parametrize("method", [CriticalTokenDPOTrainer, TRegTrainer])
def test_a_signal_of_ones_own(tiny_path, tmp_path, rows, method):
    """Refused before a model is loaded until it is registered, with a rule that keeps its promise."""
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_grade"], row[f"{side}_stars"] = ([float(t % 6) for t in row[f"{side}_ids"]] for _ in range(2))
    with pytest.raises(
        ValueError, match=r"no token signal 'mine_unknown' .* register yours with `tokalign.signals.register"
    ):
        method("no/such-model", args=method._config_class(**settings(tmp_path, signal="mine_unknown")))
    limits = dict(title="grade", low=0.0, high=5.0, unit="points", suspicious="low")
    register(Signal("grade", **limits))
    with pytest.raises(ValueError, match=r"No rule turns the signal 'grade' into a .*`tokalign.signals.register`"):
        method("no/such-model", args=method._config_class(**settings(tmp_path, signal="grade")))
    register(Signal("stars", to_weight=_five, **limits))
    make_trainer(tiny_path, tmp_path, rows, method=method, signal="stars", max_steps=1).train()
    register(Signal("half_stars", to_weight=_two, **limits))
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_half_stars"] = row[f"{side}_stars"]
    with pytest.raises(ContractError, match=r"'half_stars' gives a \w+ from .*needs it in .*correct the `to_weight`"):
        make_trainer(tiny_path, tmp_path, rows, method=method, signal="half_stars", max_steps=1).train()


def _five(values):
    return 1 - values / 5


def _two(values):
    return 1 - values / 2


def test_ids_of_another_tokenizer(tiny_path, tmp_path, rows):
    with pytest.raises(ContractError, match="train dataset were made with another tokenizer"):
        make_trainer(tiny_path, tmp_path, _with_manifest(rows, tokenizer_hash="0" * 64))
    for row in rows:
        row["rejected_ids"] = [i + 1 for i in row["rejected_ids"]]
    with pytest.raises(ContractError, match="use the tokenizer that made these ids"):
        make_trainer(tiny_path, tmp_path, rows)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("with_id", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (CriticalTokenDPOTrainer, {"weight_side": "none"}),
        (CriticalTokenDPOTrainer, {}),
        (TRegTrainer, {"alpha": 0.0}),
        (TRegTrainer, {}),  # the reference gives the rewards
    ],
)
def test_ids_of_another_tokenizer_on_every_path(tiny_path, tmp_path, rows, method, options, with_id, streamed):
    """Inside the vocabulary, without a manifest, with a signal or without: only the text tells."""
    data = Dataset.from_list(rows)
    make_trainer(tiny_path, tmp_path, data, method=method, **options)
    for row in rows:
        row["chosen_ids"] = [6 + (i + 20) % 80 for i in row["chosen_ids"]]
    data = Dataset.from_list(rows)
    data = data if with_id else data.remove_columns("id")
    with pytest.raises(ContractError, match=r"Row 0.*: `chosen` is not what this tokenizer reads in `chosen_ids`"):
        trainer = make_trainer(
            tiny_path, tmp_path, data.to_iterable_dataset() if streamed else data, method=method, **options
        )
        trainer.train()


def test_streamed_rows_are_called_by_their_number(tiny_path, tmp_path, rows):
    many = [row | {"id": f"r{i}"} for i, row in enumerate(rows * 20)]
    many[70] = many[70] | {"chosen_ids": []}
    data = Dataset.from_list(many).remove_columns("id").to_iterable_dataset()
    with pytest.raises(ContractError, match=r"^Row 70: `chosen_ids` is empty"):
        list(make_trainer(tiny_path, tmp_path, data, weight_side="none").train_dataset)


def test_text_that_trl_has_prepared_is_read_with_its_end_token(tiny_path, tmp_path, rows):
    """Rows of a `DPOTrainer`: their texts end with the end token that TRL has written behind them."""
    text = [{"prompt": f"{i}?", "chosen": row["chosen"], "rejected": row["rejected"]} for i, row in enumerate(rows)]
    plain = make_trainer(tiny_path, tmp_path, text, weight_side="none")
    assert plain.train_dataset[0]["chosen"].endswith("<|end|>")
    again = make_trainer(tiny_path, tmp_path, plain.train_dataset, weight_side="none")
    assert again.train_dataset[0]["chosen_ids"] == plain.train_dataset[0]["chosen_ids"]


@pytest.mark.parametrize("method", [CriticalTokenDPOTrainer, TRegTrainer])
def test_ids_of_another_tokenizer_are_trained_on_where_it_is_allowed_and_the_model_says_so(
    tiny_path, tmp_path, rows, method
):
    options = {"weight_side": "none"} if method is CriticalTokenDPOTrainer else {"alpha": 0.0}
    for row in rows:
        row["rejected_ids"] = [6 + (i + 20) % 80 for i in row["rejected_ids"]]
    data = _with_manifest(rows, tokenizer_hash="0" * 64)
    trainer = make_trainer(tiny_path, tmp_path, data, method=method, allow_other_tokenizer=True, max_steps=1, **options)
    trainer.train()
    trainer.save_model()
    assert read_manifest(tmp_path)["allow_other_tokenizer"] is True
    own = make_trainer(tiny_path, tmp_path / "own", preference_rows(tiny_path, 4), method=method, **options)
    own.save_model()
    assert not (tmp_path / "own" / MANIFEST).exists()


def test_a_padding_token_that_was_added_later(tmp_path):
    """Llama 3 has none: people add one, and every stage that was made before is still theirs."""
    base = save_tiny(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    made_with = {"tokenizer_hash": tokenizer_hash(tokenizer), "added_tokens": added_tokens(tokenizer)}
    data = _with_manifest(preference_rows(base, 4), **made_with)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "padded")
    assert len(make_trainer(str(tmp_path / "padded"), tmp_path / "out", data).train_dataset) == 4


def test_beta_of_the_estimate_is_recorded_from_the_data(tiny_path, tmp_path, rows):
    own = tokenizer_hash(AutoTokenizer.from_pretrained(tiny_path))
    dataset = _with_manifest(rows, tokenizer_hash=own, parameters={"beta": 0.5})
    assert make_trainer(tiny_path, tmp_path, dataset).args.estimate_beta == 0.5
    assert make_trainer(tiny_path, tmp_path, dataset, weight_side="none").args.estimate_beta is None
    with pytest.raises(ContractError, match=r"made with beta 0.5, but `estimate_beta` is 1.0"):
        make_trainer(tiny_path, tmp_path, dataset, estimate_beta=1.0)


@pytest.mark.parametrize("method", [CriticalTokenDPOTrainer, TRegTrainer])
@pytest.mark.parametrize("streamed", [False, True])
def test_no_rows_is_said_at_the_start(tiny_path, tmp_path, rows, method, streamed):
    def none() -> Any:
        stored = Dataset.from_list(rows)
        return stored.to_iterable_dataset().filter(lambda row: False) if streamed else stored.select([])

    with pytest.raises(ContractError, match="`train_dataset` has no rows"):
        make_trainer(tiny_path, tmp_path, none(), method=method)
    options = {"weight_side": "none"} if method is CriticalTokenDPOTrainer else {"alpha": 0.0}
    arguments = {"args": method._config_class(**settings(tmp_path, eval_strategy="steps", **options))}
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32")
    with pytest.raises(ContractError, match="The eval dataset has no rows"):
        method(model, train_dataset=Dataset.from_list(rows), eval_dataset=none(), **arguments)


def test_prompts_that_fill_max_length_are_dropped_and_counted(tiny_path, tmp_path, rows, caplog):
    lengths = sorted(len(row["prompt_ids"]) for row in rows)
    assert lengths[0] < lengths[-1]
    kept = sum(length < lengths[-1] for length in lengths)
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tiny_path, tmp_path, rows, max_length=lengths[-1])
    assert len(trainer.train_dataset) == kept
    assert f"Dropped {4 - kept} of 4 rows of the train dataset" in caplog.text
    streamed = make_trainer(tiny_path, tmp_path, Dataset.from_list(rows).to_iterable_dataset(), max_length=lengths[-1])
    assert len(list(streamed.train_dataset)) == kept
    with pytest.raises(ContractError, match="raise `max_length`"):
        make_trainer(tiny_path, tmp_path, rows, max_length=lengths[0])


def test_reference_of_a_stream_cannot_be_precomputed(tiny_path, tmp_path, rows):
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        make_trainer(tiny_path, tmp_path, Dataset.from_list(rows).to_iterable_dataset(), precompute_ref_log_probs=True)


def test_collator_without_weights(tiny_path, tmp_path, rows):
    trainer = CriticalTokenDPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32"),
        args=CriticalTokenDPOConfig(**settings(tmp_path)),
        data_collator=DataCollatorForPreference(pad_token_id=0),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
    )
    with pytest.raises(ContractError, match="batch has no `token_signal`"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_side": "left"}, "`weight_side` must be one of"),
        ({"aggregation": "token"}, "`aggregation` must be"),
        ({"aggregation": "position", "loss_type": "ipo"}, "replaces the 'sigmoid' loss"),
        ({"aggregation": "position", "ld_alpha": 0.5}, "no sequence log-ratio"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "sft"], "weight_side": "both"}, "scales the NLL"),
        ({"chosen_weight": "score"}, "`chosen_weight` must be"),
        ({"chosen_weight": "complement"}, "does not weight"),
        ({"end_token_weight": 2.0}, r"must lie in \[0, 1\]"),
        ({"end_token_weight": 1.0, "weight_side": "none"}, "a side must be weighted"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CriticalTokenDPOConfig(**settings(tmp_path, **options))


def test_arguments_of_another_trainer(tiny_path, tmp_path, rows):
    with pytest.raises(TypeError, match="must be a CriticalTokenDPOConfig, got DPOConfig"):
        CriticalTokenDPOTrainer(tiny_path, args=DPOConfig(**settings(tmp_path)), train_dataset=Dataset.from_list(rows))


def test_a_head_that_needs_a_gpu_is_refused_without_one(tiny_path, tmp_path, rows, monkeypatch):
    """TRL 1.15 has its fused head as a Triton kernel alone, which fails on a CPU with "0 active drivers"."""
    for version, needs in (("1.15.0", True), ("1.15.3", True), ("1.16.0", False), ("1.17.0", False)):
        monkeypatch.setattr("trl.__version__", version)
        assert head_needs_triton() is needs
    monkeypatch.setattr("trl.__version__", "1.15.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=r"^TRL 1\.15\.0 .* needs a GPU; install trl>=1\.16 or set .* TRITON_INTERPRET=1"
    ):
        make_trainer(tiny_path, tmp_path, rows)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    make_trainer(tiny_path, tmp_path, rows)
