"""The pages of docs/results/ are what the committed data says, and the words on them follow from the figures."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from ledger_comparison import ComparisonArguments, difference, summary
from ledger_stages import ROOT, over_seeds, paired
from pages.common import claims_table, grid_section, load_runs, markdown_table, number, percent, verdict
from pages.index import index
from scipy import stats
from suite import EXPERIMENTS, PAGES, without_paths

RESULTS = ROOT / "docs" / "results"
WRITTEN = [name for name in PAGES if (RESULTS / f"{name}.md").exists()]


def test_over_seeds_is_students_t() -> None:
    values = [0.50, 0.56, 0.53, 0.61, 0.55]
    found = over_seeds(values)
    test = stats.ttest_1samp(values, 0)
    assert found["mean"] == pytest.approx(sum(values) / 5) and found["values"] == values
    assert found["ci95"] == pytest.approx(list(test.confidence_interval()))
    assert found["p"] == pytest.approx(test.pvalue)


def test_one_seed_has_no_interval_and_equal_seeds_no_spread() -> None:
    assert over_seeds([0.4]) == {"mean": 0.4, "ci95": [None, None], "seeds": 1, "values": [0.4], "p": None}
    assert over_seeds([0.0, 0.0])["p"] == 1.0 and over_seeds([0.0, 0.0])["ci95"] == [0.0, 0.0]
    assert over_seeds([0.5, 0.5])["p"] == 0.0


def test_paired_is_the_paired_test() -> None:
    a, b = [0.50, 0.56, 0.53, 0.61], [0.48, 0.51, 0.52, 0.57]
    test = stats.ttest_rel(a, b)
    assert paired(a, b)["p"] == pytest.approx(test.pvalue)
    assert paired(a, b)["ci95"] == pytest.approx(list(test.confidence_interval()))
    with pytest.raises(ValueError, match="shorter"):
        paired(a, b[:3])


@pytest.mark.parametrize(
    ("ci95", "word"),
    [
        ([0.01, 0.02], "holds"),
        ([-0.02, -0.01], "does not hold"),
        ([-0.01, 0.02], "cannot be told here"),
        ([0.0, 0.02], "cannot be told here"),
        ([None, None], "cannot be told here"),
    ],
)
def test_the_verdict_follows_the_interval(ci95, word) -> None:
    entry = {"mean": 0.01, "ci95": ci95, "seeds": 5, "values": [], "p": 0.2}
    assert verdict(entry) == word
    (_, _, row) = claims_table([{"claim": "a > b", "paper": "+1.0", "entry": entry, "unit": "points"}])
    assert f"**{word}**" in row and "+1.0" in row and "0.200" in row


def test_the_grid_shows_what_was_chosen_and_what_stands_at_its_edge() -> None:
    grid = {"a": {"0.1": {"greedy": 0.5}, "1": {"greedy": 0.25}}, "b": {"0.1": {"greedy": 0.0}, "1": {"greedy": 0.1}}}
    validation = {"grid": grid, "learning_rate": {"a": 0.1, "b": 1.0}, "at_edge": ["b"]}
    lines = grid_section(validation, "Greedy,", lambda cell: cell["greedy"])
    assert lines[4:8] == [
        "| learning rate | 0.1 | 1 |",
        "| --- | --- | --- |",
        "| a | **50.0** | 25.0 |",
        "| b | 0.0 | **10.0** |",
    ]
    assert lines[-2].endswith("best: b.")
    assert not any(
        "edge" in line for line in grid_section(validation | {"at_edge": []}, "Greedy,", lambda c: c["greedy"])
    )


def test_two_seeds_tell_nothing() -> None:
    assert verdict(over_seeds([0.1, 0.1])) == "cannot be told here"
    assert verdict(over_seeds([0.1, 0.1, 0.1])) == "holds"


def test_figures_are_printed_with_their_intervals() -> None:
    entry = {"mean": 0.5761, "ci95": [0.5524, 0.6]}
    assert percent(entry) == "57.6 (55.2 – 60.0)" and number(entry, 3, "+") == "+0.576 (+0.552 – +0.600)"
    assert percent({"mean": 0.5, "ci95": [None, None]}) == "50.0"
    assert markdown_table(["a"], [["x|y"]])[-1] == "| x\\|y |"


def test_differences_are_paired_by_seed() -> None:
    runs = {"a": [{"greedy": 0.5, "sampled": 0.4}, {"greedy": 0.6, "sampled": 0.5}]}
    runs["b"] = [{"greedy": 0.4, "sampled": 0.4}, {"greedy": 0.5, "sampled": 0.5}]
    found = difference(runs, "a", "b")
    assert found["greedy"]["values"] == pytest.approx([0.1, 0.1]) and found["sampled"]["mean"] == 0
    assert summary(runs)["b"]["greedy"]["mean"] == pytest.approx(0.45)
    assert ComparisonArguments().seeds >= 5


def test_no_path_of_a_machine_is_kept() -> None:
    found = without_paths({"base": "/home/me/.cache/ledger-slm-12", "list": ["/a/b", "1/2"], "n": 3})
    assert found == {"base": "ledger-slm-12", "list": ["b", "1/2"], "n": 3}
    for file in RESULTS.glob("**/*.json"):
        assert not re.search(r'"/[a-z]+/', file.read_text()), file


def test_every_experiment_is_a_script_that_is_there() -> None:
    for experiment in EXPERIMENTS:
        assert (ROOT / "benchmarks" / experiment.script).exists()
    names = {experiment.name for experiment in EXPERIMENTS}
    assert len(names) == len(EXPERIMENTS)
    for page in PAGES:
        assert set(importlib.import_module(f"pages.{page}").NEEDS) <= names


@pytest.mark.parametrize("name", WRITTEN)
def test_the_committed_page_is_what_the_committed_data_says(name) -> None:
    module = importlib.import_module(f"pages.{name}")
    runs = load_runs(RESULTS / "data", module.NEEDS)
    text = (RESULTS / f"{name}.md").read_text()
    assert module.page(runs) == text
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures
    for link in [*pictures, *re.findall(r"\]\((\.\./[^)#]+)", text)]:
        assert (RESULTS / link).exists(), link
    for run in runs.values():
        assert f"`{run['command']}`" in text
        assert set(run) == {"name", "command", "date", "seconds", "machine", "versions", "results"}


def test_the_index_counts_the_verdicts_of_the_pages() -> None:
    texts = {name: (RESULTS / f"{name}.md").read_text() for name in WRITTEN}
    assert (RESULTS / "README.md").read_text() == index(texts)
    assert sum(map(int, re.findall(r"\| (\d+) \| (\d+) \| (\d+) \|", index(texts))[0])) > 0


def test_data_is_small() -> None:
    for file in (RESULTS / "data").glob("*.json"):
        json.loads(file.read_text())
        assert file.stat().st_size < 400_000, file
