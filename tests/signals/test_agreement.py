"""The report of how well signals find the target token."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from tokalign.signals.agreement import (
    CHANCE,
    agreement,
    among,
    plot_reports,
    print_report,
    report,
    tokens_per_scored_token,
)
from tokalign.signals.registry import get


def wrong_solutions(count=60, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, size=count)
    targets = [int(rng.integers(n)) for n in lengths]
    good = [np.where(np.arange(n) == t, 0.1, 0.8) for n, t in zip(lengths, targets, strict=True)]
    noise = [rng.random(n) for n in lengths]
    return {"good": [row.tolist() for row in good], "noise": [row.tolist() for row in noise]}, targets


def test_report_ranks_a_good_signal_over_noise_and_noise_at_chance(tmp_path):
    signals, targets = wrong_solutions()
    result = report(signals, [*targets[:-2], None, -1], costs={"good": 2.0}, samples=200)
    assert (result["solutions"], result["unknown"]) == (58, 2)
    good, noise, chance = (result["signals"][name] for name in ("good", "noise", CHANCE))
    assert good["auroc"] == good["hit1"] == good["hit_within_1"] == 1 and good["tokens_per_scored_token"] == 2
    assert noise["auroc_ci95"][0] < 0.5 < noise["auroc_ci95"][1]
    assert chance["auroc"] == 0.5
    lengths = [len(row) for row in signals["good"][:-2]]
    assert chance["hit1"] == pytest.approx(np.mean([1 / n for n in lengths]))
    assert noise["tokens_per_scored_token"] is None
    for entry in result["signals"].values():
        for key in ("auroc", "hit1", "hit_within_1"):
            assert entry[f"{key}_ci95"][0] <= entry[key] <= entry[f"{key}_ci95"][1]
    console = Console(record=True, width=140)
    print_report(result, "first error", console)
    text = console.export_text()
    assert "good" in text and "1.000" in text and "unknown" in text
    plot_reports({"first error": result, "rollout": result}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_among_leaves_the_target_and_its_rivals_of_one_kind():
    signals = {"low": [[0.5, 0.1, 0.9, 0.0], [0.2, 0.3], [0.1, 0.2]]}
    keep = [np.array([1, 0, 1, 1], dtype=bool), np.array([0, 1], dtype=bool), np.array([1, 1], dtype=bool)]
    cut, places = among(signals, [2, 0, None], keep)
    assert [row.tolist() for row in cut["low"]] == [[0.5, 0.9, 0.0], [0.3], [0.1, 0.2]]
    assert places == [
        1,
        -1,
        -1,
    ]  # the third of its four tokens is the second that is left; one is left out, one unknown
    result = report(cut, places, samples=2)
    assert (result["solutions"], result["tokens"]) == (1, 3)
    assert result["signals"]["low"]["auroc"] == 0.0  # both rivals are more suspicious


def test_report_refusals_name_row_and_signal():
    signals, targets = wrong_solutions(4)
    with pytest.raises(ValueError, match="None of the 4 solutions"):
        report(signals, [None, -1, None, -1])
    broken = {"good": signals["good"], "noise": [row[:] for row in signals["noise"]]}
    broken["noise"][2][1] = float("nan")
    with pytest.raises(ValueError, match="Row 2: signal noise holds NaN"):
        report(broken, targets)
    broken["noise"][2] = broken["noise"][2][:-1]
    with pytest.raises(ValueError, match=r"Row 2: signal noise has \d+ scores for \d+ tokens"):
        report(broken, targets)
    with pytest.raises(ValueError, match="Row 1: the target is token 99"):
        report(signals, [targets[0], 99, *targets[2:]])


def planted(seed: int = 0) -> list[dict]:
    """Wrong answers whose error every signal knows, each at its own suspicious end."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(8):
        length, error = 6, number % 6
        at_error = np.arange(length) == error
        noise = rng.random(length) / 10
        values = {
            "contrast": np.where(at_error, 0.05, 0.8) + noise,
            "entropy": np.where(at_error, 2.0, 0.1) + noise,
            "logprob": np.where(at_error, -4.0, -0.2) - noise,
            "token_reward": np.where(at_error, -0.4, 0.2) + noise,
        }
        ids = {"prompt_ids": [5] * 12, "chosen_ids": [6] * 3, "rejected_ids": [7] * length}
        signals = {f"rejected_{name}": column.tolist() for name, column in values.items()}
        rows.append({"id": str(number), **ids, **signals, "first_error": error, "token_reward_tokens": 90})
    return rows


def test_every_signal_is_read_from_its_suspicious_end():
    """The entropy's is the high one: read from the other, it had an AUROC near 0."""
    result = agreement(planted(), samples=20)["first_error"]
    for name in ("contrast", "entropy", "logprob", "token_reward"):
        assert result["signals"][name]["auroc"] == 1 and result["signals"][name]["hit1"] == 1


def test_cost_is_the_jobs_count_or_passes_over_prompt_and_completion():
    rows = planted()
    costs = {
        name: entry["tokens_per_scored_token"] for name, entry in agreement(rows)["first_error"]["signals"].items()
    }
    assert costs == {"contrast": 6, "entropy": 3, "logprob": 3, "token_reward": 10, CHANCE: 0}
    for row in rows:
        del row["token_reward_tokens"]
    assert tokens_per_scored_token(get("token_reward"), rows) == 6
    assert tokens_per_scored_token(get("rollout_accuracy"), rows) is None  # only its job can tell


def test_a_signal_without_a_row_is_refused_in_one_sentence():
    rows = [{**row, "rejected_nameless": row["rejected_contrast"]} for row in planted()]
    with pytest.raises(ValueError, match=r"no token signal 'nameless'.*register") as error:
        agreement(rows)
    assert str(error.value).count("\n") == 0
    assert set(agreement(rows, ["contrast"])["first_error"]["signals"]) == {"contrast", CHANCE}
