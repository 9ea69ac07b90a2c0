"""benchmarks/experiments/handoff.py: every part at its smallest."""

from __future__ import annotations

from benchmarks.experiments.handoff import Arguments, main


def test_every_part_measures_both_ways(tmp_path):
    small = {"lengths": [50], "repeats": 2, "batch_sizes": [2], "slm_seconds": 0.001, "llm_seconds": 0.002}
    small |= {"new_tokens": 20, "rate": 0.3, "prefix": 40, "forks": 3, "branch_tokens": 2, "hidden_size": 32}
    results = main(Arguments(**small, layers=1, output_dir=str(tmp_path)))
    assert (tmp_path / "results.json").exists()
    (one,), (pair,) = results["handoff"], results["overlap"]
    assert one["ids"] == 50 and all(value > 0 for way in ("ours", "openai") for value in one[way].values())
    assert all(0 < share <= 1 for share in pair["shares"])
    assert [each["engine"] for each in results["branches"]] == ["HTTP", "transformers"]
