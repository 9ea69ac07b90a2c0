"""The report of how well signals find the target token."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from tokalign.signals.agreement import CHANCE, plot_reports, print_report, report


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
