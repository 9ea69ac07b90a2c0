"""The logged entropy is a plain loop over the policy's logits, whichever trainer, and it selects checkpoints."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.launch.support import launch
from tests.trainers.preferences import LORA, as_text, make_trainer, preference_rows, settings
from tokalign.stage.batching import batches_by_length
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import write_manifest
from tokalign.stage.processes import end_processes
from tokalign.stage.shards import shard_name
from tokalign.trainers import (
    CriticalTokenDPOConfig,
    CriticalTokenDPOTrainer,
    CriticalTokenEntropyCallback,
    TRegConfig,
    TRegTrainer,
)
from tokalign.trainers.critical_token_entropy import form_starts, word_forms

NAME = "critical_token_entropy"
KEYS = (NAME, "critical_token_count", "completion_entropy")
WORDS = ["It", "is"]  # in every completion of `preference_rows`; the tiny tokenizer spells them letter by letter


@pytest.fixture(scope="module")
def rows(tiny_path):
    return preference_rows(tiny_path)


@pytest.fixture(scope="module")
def forms(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    return [tokenizer(word)["input_ids"] for word in WORDS]


@torch.no_grad()
def plain_loop(model, sequences, is_critical, temperature: float = 1.0) -> dict[str, float]:
    """What is to be logged: one unpadded sequence and one token at a time, from the full logits."""
    critical, everywhere = [], []
    model.eval()
    for number, (prompt, completion) in enumerate(sequences):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0] / temperature
        for t in range(len(completion)):
            logs = logits[len(prompt) + t - 1].log_softmax(-1)  # the distribution that gives token t
            entropy = -(logs.exp() * logs).sum().item()
            everywhere.append(entropy)
            if is_critical(number, completion, t):
                critical.append(entropy)
    return dict(
        zip(KEYS, (sum(critical) / len(critical), len(critical), sum(everywhere) / len(everywhere)), strict=True)
    )


def begins(forms):
    """Whether one of the forms begins at token t."""
    return lambda number, completion, t: any(completion[t : t + len(form)] == form for form in forms)


def both_sides(rows) -> list[tuple[list[int], list[int]]]:
    return [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]


def logged(trainer, prefix: str = "") -> list[dict[str, float]]:
    return [
        {key: entry[prefix + key] for key in KEYS}
        for entry in trainer.state.log_history
        if f"{prefix}critical_token_count" in entry
    ]


def move(trainer) -> None:
    """A fixed random step away from the reference."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def watched(path, output_dir, rows, *, probe=None, words=WORDS, callback=None, **options):
    """A critical-token DPO trainer with the callback."""
    trainer = make_trainer(path, output_dir, rows, **options)
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, words, probe=probe, **callback or {}))
    return trainer


def probe_of(rows, **columns) -> Dataset:
    return Dataset.from_list(
        [{"prompt_ids": r["prompt_ids"], "completion_ids": r["rejected_ids"], **columns} for r in rows]
    )


# ----------------------------------------------------------------------------------------------------------- words


def _byte_level(text: str) -> PreTrainedTokenizerFast:
    """A GPT-2-like tokenizer, which writes a space into the token of the word behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _metaspace() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer, which puts a space before the text."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁x": 1, "▁Wait": 2, "▁": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_words_with_and_without_a_space_before_them():
    tokenizer = _byte_level("Wait, no. Wait\nWait Wait but Alternatively")
    vocabulary = tokenizer.get_vocab()
    assert word_forms(tokenizer, ["Wait"]) == [[vocabulary["Wait"]], [vocabulary["ĠWait"]]]
    assert word_forms(tokenizer, [" Wait", "Wait"]) == word_forms(tokenizer, ["Wait"])
    several = word_forms(tokenizer, ["Waiting"])  # spelled by several tokens
    assert [tokenizer.decode(form) for form in several] == ["Waiting", " Waiting"]
    assert all(len(form) > 1 for form in several)
    text = tokenizer("Waiting. Wait\nWait. Waits")["input_ids"]
    starts = form_starts(torch.tensor([text]), word_forms(tokenizer, ["Wait"]))[0]
    # token by token: the words, and the pieces of longer words that are spelled with the same token
    assert [tokenizer.decode(text[t]) for t in starts.nonzero()] == ["Wait", " Wait", "Wait", " Wait"]
    starts = form_starts(torch.tensor([text]), several)[0]
    assert starts.nonzero().flatten().tolist() == [0]


def test_space_alone_does_not_begin_a_word(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)  # a token a character
    assert word_forms(tokenizer, ["Wait"]) == [tokenizer("Wait")["input_ids"]]
    assert word_forms(_metaspace(), ["Wait"]) == [[2]]


def test_form_starts_is_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (20, 9), generator=generator)
    ids[:, 0] = -100
    forms = [[1], [2, 3], [0, 0, 1], [3] * 12]
    expected = [[any(row[t : t + len(form)] == form for form in forms) for t in range(9)] for row in ids.tolist()]
    assert form_starts(ids, forms).tolist() == expected
    assert 0 < sum(map(sum, expected)) < 180
    assert not form_starts(ids[:, :0], forms).numel()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Wait", "é"], "The vocabulary cannot spell the word 'é' .* take it out of `words`"),
        (["Wait", "  "], "The vocabulary cannot spell the word '  '"),
        ([], "`words` is empty"),
        ("Wait", r"must be a list of words, got the string 'Wait'; write \['Wait'\]"),
    ],
)
def test_bad_words(tiny_path, tmp_path, rows, words, message):
    trainer = make_trainer(tiny_path, tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        CriticalTokenEntropyCallback(trainer, words)


# ------------------------------------------------------------------------------------------------ training batches


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "critical_token_dpo", "treg"])
def test_preference_trainers(tiny_path, tmp_path, rows, forms, kind, lora):
    """All 8 rows an epoch in 4 micro-batches of 2 steps; the weights stay, so the log is one loop over the rows."""
    options = settings(
        tmp_path,
        learning_rate=0.0,
        max_steps=2,
        logging_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    make, args, dataset = {
        "dpo": lambda: (DPOTrainer, DPOConfig(**options), as_text(rows)),
        "critical_token_dpo": lambda: (
            CriticalTokenDPOTrainer,
            CriticalTokenDPOConfig(**options),
            Dataset.from_list(rows),
        ),
        # rewards on the fly: the reference also reads the completions behind two other prompts
        "treg": lambda: (TRegTrainer, TRegConfig(**options, templates="ledger"), Dataset.from_list(rows)),
    }[kind]()
    trainer = make(
        AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32"),
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, WORDS))
    move(trainer)  # so that counting the reference would show
    trainer.train()
    expected = plain_loop(trainer.model, both_sides(rows), begins(forms))
    assert expected["critical_token_count"] == 32
    assert logged(trainer) == [pytest.approx(expected, abs=1e-5)]
    assert abs(expected[NAME] - expected["completion_entropy"]) > 1e-3


@pytest.mark.parametrize("lora", [False, True])
def test_grpo_counts_neither_the_reference_nor_the_old_policy(tiny_path, tmp_path, lora):
    """Steps of half a generation batch, so TRL runs the old policy too; entropies at the sampling temperature."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    sampled: list[tuple[list[int], list[int]]] = []

    def reward(prompts, completions, completion_ids, **columns):
        sampled.extend((tokenizer(p)["input_ids"], list(c)) for p, c in zip(prompts, completion_ids, strict=True))
        return [float(len(completion)) for completion in completion_ids]

    passes = []
    trainer = GRPOTrainer(
        tiny_path,
        reward_funcs=reward,
        args=GRPOConfig(
            **settings(tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2),
            num_generations=2,
            steps_per_generation=2,
            max_completion_length=12,
            temperature=0.7,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} + {i} = " for i in range(8)]}),
        eval_dataset=Dataset.from_dict({"prompt": ["10 - 3 = ", "4 * 2 = "]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    letters = list("aeiou012345")
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, letters))
    trainer.model.register_forward_hook(
        lambda m, a, output: passes.append(getattr(output, "entropy", None) is not None)
    )
    move(trainer)
    trainer.train()
    assert sum(passes) == (6 if lora else 4)  # two losses, two chunks of the old policy, with LoRA two of the reference
    assert len(sampled) == 8
    critical = begins([tokenizer(letter)["input_ids"] for letter in letters])
    expected = plain_loop(trainer.model, sampled, critical, temperature=0.7)
    assert expected["critical_token_count"] > 4
    assert logged(trainer) == [pytest.approx(expected, abs=1e-5)]
    metrics = trainer.evaluate()  # samples again; no pass of an evaluation has gradients to tell them apart by
    expected = plain_loop(trainer.model, sampled[8:], critical, temperature=0.7)
    assert len(sampled) == 12
    assert {key: metrics[f"eval_{key}"] for key in KEYS} == pytest.approx(expected, abs=1e-5)


def test_what_a_tool_wrote_counts_nowhere(tiny_path, tmp_path):
    """Every other token of a completion is the environment's, some words among them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    sequences = []

    def rollout(prompts, trainer):
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        completions = [tokenizer("ab" * (number + 2))["input_ids"] for number in range(len(prompts))]
        sequences.extend(zip(prompt_ids, completions, strict=True))
        masks = [[1, 0] * (len(ids) // 2) for ids in completions]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}

    trainer = GRPOTrainer(
        tiny_path,
        reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
        args=GRPOConfig(
            **settings(tmp_path, learning_rate=0.0, max_steps=1, logging_steps=1),
            num_generations=2,
            max_completion_length=16,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"{i} + {i} = " for i in range(8)]}),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, ["a", "b", "ab"]))
    trainer.train()
    a = plain_loop(trainer.model, sequences, lambda number, completion, t: t % 2 == 0)
    assert a["critical_token_count"] == sum(len(ids) for _, ids in sequences) / 2
    assert logged(trainer) == [pytest.approx({**a, "completion_entropy": a[NAME]}, abs=1e-5)]


def test_sft(tiny_path, tmp_path, rows, forms):
    options = {
        k: v for k, v in settings(tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2).items() if k != "beta"
    }
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_path, dtype="float32"),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(
            [{k: r[k] for k in ("prompt",)} | {"completion": as_text([r])[0]["chosen"]} for r in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(tiny_path),
    )
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, WORDS))
    trainer.train()
    chosen = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    assert logged(trainer) == [pytest.approx(plain_loop(trainer.model, chosen, begins(forms)), abs=1e-5)]


def test_a_log_without_critical_tokens_has_no_mean(tiny_path, tmp_path, rows):
    trainer = watched(
        tiny_path, tmp_path, rows, words=["Wait"], max_steps=1, eval_rows=rows[:4], save_strategy="steps", save_steps=1
    )
    trainer.train()
    metrics = trainer.evaluate()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert NAME not in entry and entry["critical_token_count"] == 0 and entry["completion_entropy"] > 0
    assert math.isnan(metrics[f"eval_{NAME}"])  # the Trainer wants a number to compare; NaN is never the best
    assert f"eval_{NAME}" not in trainer.state.log_history[-1]
    (saved,) = json.loads((tmp_path / f"{NAME}.json").read_text())["checkpoints"]
    assert saved["critical_token_count"] == 0 and NAME not in saved


@pytest.mark.parametrize("source", ["training batches", "probe"])
def test_watching_changes_no_weight(tiny_path, tmp_path, rows, source):
    plain = make_trainer(tiny_path, tmp_path / "a", rows, lora=True)
    seen = watched(tiny_path, tmp_path / "b", rows, lora=True, probe=probe_of(rows) if source == "probe" else None)
    for trainer in (plain, seen):
        layers = [module for module in trainer.model.modules() if hasattr(module, "attention_dropout")]
        assert layers
        for layer in layers:
            layer.attention_dropout = 0.1  # a pass too many in training mode would draw random numbers
        torch.manual_seed(0)
        trainer.train()
    for a, b in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(logged(seen)) == 3


def test_a_model_called_around_its_hooks_is_an_error(tiny_path, tmp_path, rows, monkeypatch):
    trainer = watched(tiny_path, tmp_path, rows)
    monkeypatch.setattr(CriticalTokenEntropyCallback, "_see", lambda *a, **k: None)
    trainer = watched(tiny_path, tmp_path, rows)
    with pytest.raises(RuntimeError, match=r"No forward of the policy gave per-token entropies.*pass a `probe`"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------ evaluation


class Reporter(TrainerCallback):
    """Stands where Weights & Biases or TensorBoard stand: before the callbacks of the user."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_and_the_trainers_own_selection(tiny_path, tmp_path, rows, forms, lora):
    trainer = make_trainer(
        tiny_path,
        tmp_path,
        rows,
        lora=lora,
        eval_rows=rows[:6],  # batches of 4 and 2
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model=NAME,
        learning_rate=3e-2,
    )
    reporter = Reporter()
    trainer.callback_handler.callbacks.insert(1, reporter)
    trainer.add_callback(CriticalTokenEntropyCallback(trainer, WORDS))
    move(trainer)
    trainer.train()
    values = [entry[NAME] for entry in logged(trainer, "eval_")]
    assert len(set(values)) == 3
    for prefix in ("", "eval_"):
        assert [entry[prefix + NAME] for entry in reporter.seen if prefix + NAME in entry] == [
            entry[NAME] for entry in logged(trainer, prefix)
        ]
    best = values.index(max(values)) + 1
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (max(values), best)
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record["best"] == f"checkpoint-{best}"
    assert [entry[f"eval_{NAME}"] for entry in record["checkpoints"]] == values
    # The best model is loaded: evaluation, which calls itself by another name here, gives the best value again
    metrics = trainer.evaluate(metric_key_prefix="held_out")
    expected = plain_loop(trainer.model, both_sides(rows[:6]), begins(forms))
    assert {key: metrics[f"held_out_{key}"] for key in KEYS} == pytest.approx(expected, abs=1e-5)
    assert metrics[f"held_out_{NAME}"] == pytest.approx(max(values), abs=1e-5)


def test_evaluation_before_training_and_after_a_prediction(tiny_path, tmp_path, rows, forms):
    trainer = watched(tiny_path, tmp_path, rows, eval_rows=rows[:4])
    trainer.predict(trainer.train_dataset)  # is not part of the evaluation that follows
    expected = plain_loop(trainer.model, both_sides(rows[:4]), begins(forms))
    metrics = trainer.evaluate()
    assert {key: metrics[f"eval_{key}"] for key in KEYS} == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("greater", [True, False])
def test_selection_without_evaluation(tiny_path, tmp_path, rows, greater):
    trainer = watched(
        tiny_path,
        tmp_path,
        rows,
        max_steps=6,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        metric_for_best_model=NAME,
        greater_is_better=greater,
    )
    trainer.train()
    logs = logged(trainer)
    # a checkpoint's value is over the batches since the one before it
    windows = [logs[i : i + 2] for i in (0, 2, 4)]
    counts = [sum(entry["critical_token_count"] for entry in window) for window in windows]
    values = [
        sum(entry[NAME] * entry["critical_token_count"] for entry in window) / count
        for window, count in zip(windows, counts, strict=True)
    ]
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert [entry[NAME] for entry in record["checkpoints"]] == pytest.approx(values, rel=1e-6)
    assert [entry["critical_token_count"] for entry in record["checkpoints"]] == counts
    best = 2 * (values.index((max if greater else min)(values)) + 1)
    assert record["best"] == f"checkpoint-{best}"
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == pytest.approx((max if greater else min)(values))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert not list(tmp_path.glob(".*"))


def test_without_asking_nothing_is_selected(tiny_path, tmp_path, rows):
    trainer = watched(tiny_path, tmp_path, rows, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.best_metric is None
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record["best"] is None
    assert [entry["step"] for entry in record["checkpoints"]] == [1, 2, 3]


@pytest.mark.parametrize(("source", "restore"), [("training batches", False), ("probe", True)])
def test_a_resumed_run_is_the_undisturbed_one(tiny_path, tmp_path, rows, source, restore):
    """Logs at 3 and 6 and saves at 2, 4 and 6, so windows of both kinds are open when the run ends at 2 or 4."""
    probe = probe_of(rows[:3]) if source == "probe" else None
    options = dict(
        lora=True,
        probe=probe,
        max_steps=6,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
        learning_rate=3e-2,
        metric_for_best_model=NAME,
        per_device_train_batch_size=2,
        restore_callback_states_from_checkpoint=restore,
    )
    whole = watched(tiny_path, tmp_path / "whole", rows, **options)
    whole.train()
    record = (tmp_path / "whole" / f"{NAME}.json").read_text()
    for step in (2, 4):
        again = watched(tiny_path, tmp_path / "again", rows, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert logged(again) == logged(whole)
        assert (tmp_path / "again" / f"{NAME}.json").read_text() == record
        assert again.state.best_metric == whole.state.best_metric
        assert again.state.best_global_step == whole.state.best_global_step
        shutil.rmtree(tmp_path / "again")
    assert len(logged(whole)) == 2


def test_training_twice_starts_afresh(tiny_path, tmp_path, rows):
    trainer = watched(tiny_path, tmp_path, rows, learning_rate=0.0, max_steps=3, logging_steps=2)
    trainer.train()
    first = logged(trainer)  # the third step's tokens are in no log
    trainer.train()
    assert [entry["critical_token_count"] for entry in logged(trainer)] == [e["critical_token_count"] for e in first]


def test_resuming_with_other_words_is_refused(tiny_path, tmp_path, rows):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    watched(tiny_path, tmp_path, rows, **options).train()
    trainer = watched(tiny_path, tmp_path, rows, words=["It"], **options)
    with pytest.raises(
        ValueError, match=r"measured on other tokens \(words It, is, not words It\).*same|resume with its"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ----------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize(("budget", "lora"), [(1, False), (60, True)])
def test_probe_by_words_at_logs_evaluations_and_saves(tiny_path, tmp_path, rows, forms, budget, lora):
    trainer = watched(
        tiny_path,
        tmp_path,
        rows[:4],
        probe=probe_of(rows),
        callback={"token_budget": budget},
        lora=lora,
        eval_rows=rows[:2],
        save_strategy="steps",
        save_steps=3,
        learning_rate=3e-2,
    )
    sequences = [(row["prompt_ids"], row["rejected_ids"]) for row in rows]
    before = plain_loop(trainer.model, sequences, begins(forms))
    metrics = trainer.evaluate()
    assert {key: metrics[f"eval_{key}"] for key in KEYS} == pytest.approx(before, abs=1e-5)
    trainer.train()
    after = plain_loop(trainer.model, sequences, begins(forms))
    assert logged(trainer)[-1] == pytest.approx(after, abs=1e-5)
    assert abs(after[NAME] - before[NAME]) > 1e-3
    (saved,) = json.loads((tmp_path / f"{NAME}.json").read_text())["checkpoints"]
    assert {key: saved[key] for key in KEYS} == logged(trainer)[-1]
    move(trainer)  # outside training nothing is kept from before
    assert abs(trainer.evaluate()[f"eval_{NAME}"] - after[NAME]) > 1e-3


def test_probe_by_signal_column_in_grpo_style_rollouts_and_pairs(tiny_path, tmp_path, rows):
    trainer = make_trainer(tiny_path, tmp_path, rows, max_steps=1, learning_rate=0.0)
    callback = CriticalTokenEntropyCallback(
        trainer, probe=Dataset.from_list(rows), side="rejected", signal="contrast", threshold=0.3
    )
    trainer.add_callback(callback)
    trainer.train()
    sequences = [(row["prompt_ids"], row["rejected_ids"]) for row in rows]
    expected = plain_loop(trainer.model, sequences, lambda row, _, t: rows[row]["rejected_contrast"][t] <= 0.3)
    assert logged(trainer) == [pytest.approx(expected, abs=1e-5)]
    assert 5 < expected["critical_token_count"] < sum(len(row["rejected_ids"]) for row in rows)


def test_the_probe_selects_the_checkpoint(tiny_path, tmp_path, rows):
    trainer = watched(
        tiny_path,
        tmp_path,
        rows,
        probe=probe_of(rows),
        max_steps=4,
        learning_rate=3e-2,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model=NAME,
    )
    trainer.train()
    values = [entry[NAME] for entry in logged(trainer)]
    assert trainer.state.best_global_step == values.index(max(values)) + 1
    assert trainer.state.best_metric == max(values)


def test_batches_hold_every_row_once_within_the_budget():
    draw = random.Random(0)
    lengths = [draw.randint(1, 50) for _ in range(40)]
    batches = list(batches_by_length(lengths, 100))
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 100 for batch in batches)
    assert list(batches_by_length([300, 2], 100)) == [[0], [1]]


def _change(rows, row, column, value):
    changed = [dict(r) for r in rows]
    changed[row][column] = value
    return Dataset.from_list(changed)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (1, "rejected_ids", [], "Row 1 of the probe: `rejected_ids` is empty; drop the row"),
        (2, "prompt_ids", [5, -1], "Row 2 of the probe: `prompt_ids` holds -1, not an id of this tokenizer's"),
        (2, "rejected_ids", [5, 999], "Row 2 of the probe: `rejected_ids` holds 999, not an id"),
        (0, "prompt_ids", [7] * 600, "Row 0 of the probe: `rejected_ids` with its prompt has .* holds 512 positions"),
        (3, "rejected_contrast", [0.1], "Row 3 of the probe: `rejected_contrast` has 1 scores for .* score these rows"),
        (3, "rejected_contrast", None, "Row 3 of the probe: `rejected_contrast` has 0 scores for"),
        (0, "rejected_contrast", math.nan, "Row 0 of the probe: `rejected_contrast` holds nan, not a finite number"),
    ],
)
def test_bad_probe_rows(tiny_path, tmp_path, rows, row, column, value, message):
    if isinstance(value, float):
        value = [value] * len(rows[row]["rejected_ids"])
    trainer = make_trainer(tiny_path, tmp_path, rows)
    with pytest.raises(ContractError, match=message):
        CriticalTokenEntropyCallback(
            trainer, probe=_change(rows, row, column, value), side="rejected", signal="contrast", threshold=0.5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "contrast", "threshold": 0.5}, "`signal` marks critical tokens in a probe .* pass `probe`"),
        (
            {"signal": "contrast", "threshold": 0.5, "words": ["It"], "probe": True, "side": "rejected"},
            "in the place of words; pass `probe` and leave `words`",
        ),
        ({"signal": "contrast", "probe": True}, "`signal` and `threshold` go together"),
        ({"threshold": 0.5, "probe": True}, "`signal` and `threshold` go together"),
        ({"probe": True}, r"The probe has no column `completion_ids` \(it has id, .*\); choose another `side`"),
        (
            {"signal": "entropy", "threshold": 0.5, "probe": True, "side": "rejected"},
            "The probe has no column `rejected_entropy`",
        ),
        (
            {"probe": True, "side": "rejected", "words": ["Wait"]},
            r"holds no critical token \(words Wait\); choose other",
        ),
        (
            {"signal": "contrast", "threshold": -1.0, "probe": True, "side": "rejected"},
            r"holds no critical token \(`rejected_contrast` <= -1.0\)",
        ),
    ],
)
def test_bad_arguments(tiny_path, tmp_path, rows, options, message):
    if "probe" in options:
        options = options | {"probe": Dataset.from_list(rows)}
    trainer = make_trainer(tiny_path, tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        CriticalTokenEntropyCallback(trainer, **options)


def test_a_probe_of_another_tokenizer_is_refused(tiny_path, tmp_path, rows):
    folder = tmp_path / "stage"
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(folder / shard_name(0, 1))
    write_manifest(folder, {"status": "complete", "rows": 8, "shards": 1, "tokenizer_hash": "another"})
    trainer = make_trainer(tiny_path, tmp_path, rows)
    with pytest.raises(ContractError, match="ids of the probe were made with another tokenizer"):
        CriticalTokenEntropyCallback(trainer, WORDS, probe=load_stage(folder), side="rejected")
    for row in rows:  # without a manifest the text tells
        row["rejected_ids"] = [6 + (i + 20) % 80 for i in row["rejected_ids"]]
    with pytest.raises(ContractError, match="`rejected` is not what this tokenizer reads in `rejected_ids`"):
        CriticalTokenEntropyCallback(
            trainer, probe=Dataset.from_list(rows), side="rejected", signal="contrast", threshold=0.5
        )


# ------------------------------------------------------------------------------------------------------- processes


def _run(model: str, output_dir: str, source: str, batch: int) -> list[dict[str, float]]:
    """3 steps of 8 rows; a probe of 5 batches, so that the second process lacks one."""
    changes = dict(
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model=NAME,
        learning_rate=1e-2,
    )
    args = CriticalTokenDPOConfig(**settings(output_dir, **changes))  # first: it tells accelerate and DeepSpeed
    rows = preference_rows(model)
    trainer = CriticalTokenDPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    probe = probe_of(rows[:5]) if source == "probe" else None
    callback = CriticalTokenEntropyCallback(trainer, WORDS, probe=probe, token_budget=1)
    assert probe is None or len(callback._batches) == 5
    trainer.add_callback(callback)
    trainer.train()
    return logged(trainer) + logged(trainer, "eval_") + [{"best": trainer.state.best_metric}]


def main(model: str, output_dir: str, report: str) -> None:
    results = {source: _run(model, f"{output_dir}/{source}", source, 4) for source in ("training batches", "probe")}
    rank = torch.distributed.get_rank()
    Path(f"{report}.{rank}").write_text(json.dumps({"processes": torch.distributed.get_world_size()} | results))
    end_processes()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "zero3.yaml"])
def test_two_processes_give_the_numbers_of_one(tiny_path, tmp_path, config):
    launch(config, Path(__file__), tiny_path, str(tmp_path / "two"), str(tmp_path / "report"))
    reports = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1] and reports[0]["processes"] == 2
    for source in ("training batches", "probe"):
        alone = _run(tiny_path, str(tmp_path / "one" / source), source, 8)
        assert len(alone) == 6  # 3 logs, evaluations at step 2 and the end, the best
        assert reports[0][source] == [pytest.approx(entry, abs=1e-5) for entry in alone]
        record = json.loads((tmp_path / "two" / source / f"{NAME}.json").read_text())
        assert [entry["step"] for entry in record["checkpoints"]] == [2, 3]


if __name__ == "__main__":
    main(*sys.argv[1:])
