"""Signals on real text: what is trained on and what is tested, the probe's folds, and the tables of what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiments import real_signals
from benchmarks.experiments.real_signals import (
    READINGS,
    RealSignalsArguments,
    cross_fit,
    derived,
    in_test,
    published,
    token_classes,
    training_rows,
    words,
)
from tests.support import save_tiny, tiny_tokenizer
from tokalign.signals import registry
from tokalign.stage.loading import load_stage
from tokalign.statistics import auroc


def solution(lines: str, right: bool) -> dict:
    return {"is_correct": right, "solution": lines}


def gsm8k(number: int) -> dict:
    """A question with two right and two wrong published solutions."""
    asked = f"Ann has {number} hens and buys 2 a day for 2 days. How many?"
    right, wrong = (
        f"She buys 2*2=<<2*2=4>>4 hens.\nSo she has {number}{sign}4=<<{number}{sign}4={n}>>{n}.\nA: {n}"
        for sign, n in (("+", number + 4), ("-", number - 4))
    )
    made = {f"model {i}": solution(right if i < 2 else wrong, i < 2) for i in range(4)}
    return {"question": asked, "ground_truth": right, **made}


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_derived_step_is_the_first_with_a_value_of_no_right_solution() -> None:
    right = [["2*2=<<2*2=4>>4", "3+4=<<3+4=7>>7", "A: 7"]]
    assert derived(["2*2=<<2*2=4>>4", "3*4=<<3*4=12>>12", "12+1=<<12+1=13>>13"], right) == 1
    assert derived(["4+3=<<4+3=7.0>>7", "A: 8"], right) == 1  # nothing but the answer is wrong
    assert derived(["x=<<x=y>>", "A: 8"], right) == 1  # a mark without a number says nothing


def test_training_leaves_out_the_questions_of_every_test_set(tmp_path: Path) -> None:
    file = write(tmp_path / "solutions.jsonl", [gsm8k(number) for number in range(60)])
    rows = list(published(file))
    asked = {row["problem"] for row in rows}
    free = {question for question in asked if not in_test(question)}
    held_out = {words(next(iter(free)))}
    pairs = training_rows(rows, held_out, 1000, 0)
    assert {pair["prompt"] for pair in pairs} == {question for question in free if words(question) not in held_out}
    assert 10 < len(free) < 50 and len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        number = int(re.findall(r"\d+", pair["prompt"])[0])
        assert pair["chosen"].endswith(f"A: {number + 4}") and pair["rejected"].endswith(f"A: {number - 4}")
        assert "<<" not in pair["chosen"]
    assert training_rows(rows, held_out, 5, 0) == pairs[:5]


def test_every_registered_signal_is_read() -> None:
    read = {"logprob", "entropy"} | (READINGS.keys() - {"likelihood"})
    assert read == {name for name in registry.names() if registry.get(name).module}


def test_the_probe_is_fitted_on_other_questions() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(120), 4)
    wrong = np.tile([False, False, True, False], 120)
    features = rng.normal(size=(480, 12))
    features[:, 3] -= 1.5 * wrong
    scores = cross_fit(features, wrong, np.ones(480, dtype=bool), groups)
    assert auroc(scores, wrong) > 0.75
    # a feature that names the question's own label tells nothing of other questions
    own = rng.random(120) < 0.5
    names = np.zeros((480, 120))
    names[np.arange(480), groups] = 1.0
    labels = np.repeat(own, 4)
    assert abs(auroc(cross_fit(names, labels, np.ones(480, dtype=bool), groups), labels) - 0.5) < 0.15


def test_a_probe_of_right_steps_alone_says_nothing():
    features, groups = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 10
    scores = cross_fit(features, np.zeros(40, dtype=bool), np.ones(40, dtype=bool), groups)
    assert np.isnan(scores).all()


def test_a_token_is_of_the_first_class_whose_characters_it_holds() -> None:
    tokenizer = tiny_tokenizer()
    text = "a 2 + b = 2."
    row = {"completion": [{"role": "assistant", "content": text}]}
    row["completion_ids"] = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    of = token_classes(row, tokenizer)
    kinds = ["".join(text[i] for i in range(len(text)) if of[name][i]) for name in ("numbers", "words", "operators")]
    assert kinds == ["22", "ab", "+="] and not any(of[name][-1] for name in of)


@pytest.mark.parametrize(
    "readings", [["token_reward", "rollout_accuracy"], pytest.param(list(READINGS), marks=pytest.mark.slow)]
)
def test_all_of_it_runs_on_a_tiny_model_and_is_kept(tmp_path: Path, readings: list[str], monkeypatch) -> None:
    """From files to tables; a second start reads what the first has left."""
    model = save_tiny(tmp_path / "model")
    steps = ["2 + 2 = 4.", "4 + 3 = 7.", "So it is 7."]
    bench = [
        {"problem": f"{i} + 4?", "steps": steps[: 2 + i % 2], "label": i % 3 - 1, "final_answer_correct": True}
        for i in range(12)
    ]
    data = tmp_path / "data"
    write(data / real_signals.PUBLISHED, [gsm8k(number) for number in range(24)])
    extra = write(tmp_path / "processbench" / "gsm8k.jsonl", bench)
    arguments = RealSignalsArguments(
        model=model,
        data=str(data),
        output_dir=str(tmp_path / "out"),
        sets=["gsm8k"],
        extra=[str(extra)],
        readings=readings,
        solutions=16,
        train_pairs=4,
        rollout_solutions=3,
        continuations=2,
        resamples=20,
    )
    results = real_signals.main(arguments)
    assert set(results["views"]) == {"gsm8k", "gsm8k_whole", "processbench_gsm8k"}
    signals = results["views"]["processbench_gsm8k"]
    assert {
        "logprob",
        "entropy",
        "linear probe",
        "position",
        *(set(readings) - {"likelihood", "rollout_accuracy"}),
    } <= set(signals)
    assert signals["position"]["mean"]["matched"]["auroc"] == 0.5
    assert signals["logprob"]["above_logprob"]["min"] == {"difference": 0, "ci95": [0, 0]}
    assert results["views"]["gsm8k_whole"]["logprob"]["min"]["hit1"] is None
    assert len(load_stage(tmp_path / "out" / "rollouts")) == 3
    tables = real_signals.tables(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert len(tables["matched"][1]) == len(tables["against_logprob"][1]) + 2  # all but the log-prob's own two rows
    assert tables["mrben"][1] == []  # not run: the page says so
    assert real_signals.figures(results)

    monkeypatch.setitem(READINGS, "likelihood", lambda *_: pytest.fail("what is there is not read again"))
    assert real_signals.main(arguments)["views"] == results["views"]
