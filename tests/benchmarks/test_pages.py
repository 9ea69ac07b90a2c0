"""The pages of docs/results/ are what the committed data says, and the verdicts on them follow from the figures."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks import render
from benchmarks.experiments.common import (
    DETECTION,
    ComparisonArguments,
    detection_row,
    difference,
    grid_table,
    over_seeds,
    paired,
    summary,
)
from benchmarks.render import PAGES, ROOT, SHARE, claim, error_bars, fill, interval, markdown, number, percent, verdict
from benchmarks.suite import EXPERIMENTS, without_paths

RESULTS = ROOT / "docs" / "results"


def test_over_seeds_is_students_t() -> None:
    values = [0.50, 0.56, 0.53, 0.61, 0.55]
    figure = over_seeds(values)
    test = stats.ttest_1samp(values, 0)
    assert figure["mean"] == pytest.approx(sum(values) / 5) and figure["values"] == values
    assert figure["ci95"] == pytest.approx(list(test.confidence_interval()))
    assert figure["p"] == pytest.approx(test.pvalue)


def test_one_seed_has_no_interval_and_equal_seeds_no_spread() -> None:
    assert over_seeds([0.4]) == {"mean": 0.4, "ci95": [None, None], "seeds": 1, "values": [0.4], "p": None}
    assert over_seeds([0.0, 0.0])["p"] == 1.0 and over_seeds([0.0, 0.0])["ci95"] == [0.0, 0.0]
    assert over_seeds([0.5, 0.5])["p"] == 0.0


def test_what_rounding_leaves_of_equal_seeds_is_no_difference() -> None:
    """0.1 + 0.2 is not 0.3 to a computer: three such seeds gave an interval above 0, and scipy a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal = paired([0.1 + 0.2] * 3, [0.3] * 3)
        assert equal["values"] == [0.0] * 3 and equal["p"] == 1.0 and verdict(equal) == "cannot be told here"
        apart = paired([0.3, 0.4, 0.5], [0.2, 0.3, 0.4])
    assert apart["ci95"] == [pytest.approx(0.1)] * 2 and apart["p"] == 0.0 and verdict(apart) == "holds"


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
    assert claim("a > b", "+1.0", entry)[-2:] == ["0.200", f"**{word}**"]


def test_a_claim_about_another_level_has_no_p_value() -> None:
    entry = {"mean": 1.3, "ci95": [1.1, 1.5], "p": 0.001}
    row = claim("faster", "2.8", entry, "×", digits=2, sign="", level=1)
    assert row == ["faster", "2.8", "1.30 (1.10 – 1.50) ×", "–", "**holds**"]
    assert verdict(entry, 1.2) == "cannot be told here" and verdict(entry, 1.6) == "does not hold"


def test_two_seeds_tell_nothing() -> None:
    assert verdict(over_seeds([0.1, 0.1])) == "cannot be told here"
    assert verdict(over_seeds([0.1, 0.1, 0.1])) == "holds"


def test_the_grid_shows_what_was_chosen_and_what_stands_at_its_edge() -> None:
    grid = {"a": {"0.1": {"greedy": 0.5}, "1": {"greedy": 0.25}}, "b": {"0.1": {"greedy": 0.0}, "1": {"greedy": 0.1}}}
    validation = {"grid": grid, "learning_rate": {"a": 0.1, "b": 1.0}, "at_edge": ["b"]}
    headings, rows = grid_table(validation, ("greedy",))
    assert headings == ("learning rate", "0.1", "1")
    assert rows == [["a", "**50.0**", "25.0"], ["b", "0.0", "**10.0** (edge)"]]


def test_figures_are_printed_with_their_intervals() -> None:
    entry = {"mean": 0.5761, "ci95": [0.5524, 0.6]}
    assert percent(entry) == "57.6 (55.2 – 60.0)" and number(entry, 3, "+") == "+0.576 (+0.552 – +0.600)"
    assert percent({"mean": 0.5, "ci95": [None, None]}) == "50.0"
    assert markdown((["a"], [["x|y"]])) == "| a |\n| --- |\n| x\\|y |"


@settings(deadline=None, max_examples=100)
@given(right=st.lists(st.integers(0, 60), min_size=2, max_size=6), true=st.floats(0, 1))
def test_intervals_of_shares_hold_the_same_shares_and_nothing_else(right: list[int], true: float) -> None:
    entry = over_seeds([count / 60 for count in right])
    low, high = interval(entry, SHARE)
    assert 0 <= low <= high <= 1
    assert (low <= true <= high) == (entry["ci95"][0] <= true <= entry["ci95"][1])  # so it is covered as often


def test_no_share_on_a_page_lies_outside_its_range() -> None:
    entry = over_seeds([0.0, 0.02, 0.24])
    assert entry["ci95"][0] < 0 and percent(entry).startswith("8.7 (0.0 – ") and "(-" in number(entry)
    assert percent({"mean": 0.998, "ci95": [0.992, 1.003]}) == "99.8 (99.2 – 100.0)"
    detection = {key: {"mean": 0.04, "ci95": [-0.002, 0.082]} for key in DETECTION}
    assert detection_row("random", detection)[1] == "0.040 (0.000 – 0.082)"


def test_error_bars_end_where_the_intervals_do() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    error_bars(axis, {"a": {"mean": 0.5, "ci95": [0.4, 0.7]}, "b": {"mean": 0.2, "ci95": [None, None]}})
    (bars,) = axis.containers
    ends = [[x for x, _ in segment] for segment in bars[2][0].get_segments()]
    assert ends[0] == pytest.approx([40, 70]) and ends[1] == pytest.approx([20, 20])


def test_differences_are_paired_by_seed() -> None:
    runs = {"a": [{"greedy": 0.5, "sampled": 0.4}, {"greedy": 0.6, "sampled": 0.5}]}
    runs["b"] = [{"greedy": 0.4, "sampled": 0.4}, {"greedy": 0.5, "sampled": 0.5}]
    gap = difference(runs, "a", "b")
    assert gap["greedy"]["values"] == pytest.approx([0.1, 0.1]) and gap["sampled"]["mean"] == 0
    assert summary(runs)["b"]["greedy"]["mean"] == pytest.approx(0.45)
    assert ComparisonArguments().seeds >= 5


def test_marks_are_filled_and_filled_again() -> None:
    runs = {
        "one": {"rows": (["a", "b"], [["1", "2"]]), "n": "12"},
        "two": {"rows": (["a", "b"], [["3", "4"]]), "empty": (["a"], [])},
        "gone": None,
    }
    text = (
        "We saw <!-- number: one.n --><!-- end --> of <!-- number: gone.n -->7<!-- end -->.\n\n"
        "<!-- table: one.rows + gone.rows + two.rows -->\n<!-- end -->\n<!-- table: two.empty -->\nold\n<!-- end -->\n"
    )
    once = fill(text, runs.__getitem__)
    assert once == fill(once, runs.__getitem__)
    assert re.sub("<!--.*?-->", "", once) == (
        "We saw 12 of *not run*.\n\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\n*not run*\n"
    )
    with pytest.raises(KeyError, match=r"asks for one.m, but the run has rows, n"):
        fill("<!-- number: one.m -->x<!-- end -->", runs.__getitem__)


def test_no_path_of_a_machine_is_kept() -> None:
    kept = without_paths({"base": "/home/me/.cache/ledger-slm-12", "list": ["/a/b", "1/2"], "n": 3})
    assert kept == {"base": "ledger-slm-12", "list": ["b", "1/2"], "n": 3}
    for file in RESULTS.glob("**/*.json"):
        assert not re.search(r'"/[a-z]+/', file.read_text()), file


def test_every_experiment_is_a_module_that_is_there_and_has_a_place_on_a_page() -> None:
    texts = "".join((RESULTS / f"{name}.md").read_text() for name in PAGES)
    for experiment in EXPERIMENTS:
        module = importlib.import_module(experiment.command(quick=True)[2])
        assert callable(module.main) and callable(module.tables) and callable(module.figures)
        assert module is render.module_of(experiment.name)
        assert f"{experiment.name}.run" in texts
    assert len({experiment.name for experiment in EXPERIMENTS}) == len(EXPERIMENTS)


@pytest.mark.parametrize("name", [*PAGES, "README"])
def test_a_page_is_fit_to_be_filled(name) -> None:
    text = (RESULTS / f"{name}.md").read_text()
    assert not re.search(r"^<!-- number", text, re.MULTILINE), "a line that begins so is HTML, and not Markdown"
    assert len(re.findall("<!-- (?:table|number): ", text)) == text.count("<!-- end -->")
    for link in re.findall(r"\]\(((?:\.\./|figures/|data/)[^)#]+)", text):
        assert (RESULTS / link).exists(), link


def test_the_committed_pages_and_pictures_are_what_the_committed_data_says(tmp_path) -> None:
    """Every page again, from its data, into another folder."""
    shutil.copytree(RESULTS / "data", tmp_path / "data")
    render.render(tmp_path, RESULTS)
    for name in (*PAGES, "README"):
        assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    linked = {
        link for page in PAGES for link in re.findall(r"figures/(\w+\.png)", (RESULTS / f"{page}.md").read_text())
    }
    frozen = {"speed_growth.png", "reliability_flips.png"}  # of scripts that have gone
    assert drawn | frozen == linked and not drawn & frozen


def test_the_index_counts_the_verdicts_of_the_pages() -> None:
    texts = {name: (RESULTS / f"{name}.md").read_text() for name in PAGES}
    _, rows = render.verdict_counts(texts)
    for text, row in zip(texts.values(), rows, strict=True):
        runs = {name.partition(".")[0] for _, names in render.MARK.findall(text) for name in names.split(" + ")}
        assert sum(map(int, row[1:])) > 0 or not all((RESULTS / "data" / f"{run}.json").exists() for run in runs)
    assert rows[0] == ["[Critical-token DPO](critical_token_dpo.md)", "9", "4", "8"]


def test_data_is_small_and_says_how_it_was_made() -> None:
    for file in (RESULTS / "data").glob("*.json"):
        kept = json.loads(file.read_text())
        assert {"name", "command", "date", "machine", "versions", "results"} <= set(kept)
        assert kept["name"] == file.stem and file.stat().st_size < 400_000, file
