"""The report holds the caller's numbers, the same bytes for the same data, and no markup of the caller's."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.support import tiny_tokenizer
from tests.view.test_heatmap import Page
from tokalign.view import build_report, token_heatmap

TABLE = [
    {"method": "base", "greedy_accuracy": 0.5, "ci95": [0.47, 0.53], "n": 1000},
    {
        "method": "critical-token DPO",
        "greedy_accuracy": 0.614,
        "ci95": (0.58, 0.64),
        "n": 1000,
        "sampled_accuracy": 0.42,
        "sampled_ci95": [0.4, 0.44],
        "chosen_change": -0.2,
        "rejected_change": -11.25,
    },
]
COMPARISON = {
    "name": "critical-token DPO − DPO",
    "difference": 0.051,
    "ci95": [0.02, 0.08],
    "p": 0.0002,
    "mcnemar_p": 0.012,
    "wins": 90,
    "losses": 39,
    "ties": 871,
    "n": 1000,
}
CURVES = {
    "DPO": {"step": [0, 10, 20], "chosen": [-20.0, -21.0, -24.0], "rejected": [-22.0, -30.0, -41.0]},
    "critical-token DPO": {"step": [0, 10, 20], "chosen": [-20.0, None, -20.1], "rejected": [-22.0, -27.0, -35.0]},
}
PASS_AT_K = {
    "with": {1: (0.0, 0.0, 0.01), 64: (0.05, 0.02, 0.1)},
    "without": {"1": (0.3, 0.2, 0.4), "64": (0.9, 0.8, 1)},
}
AGREEMENT = [{"estimate": "contrast", "AUROC": (0.931, 0.91, 0.95), "hit@1": 0.62, "forward passes": 2}]


def _report(**changes):
    tokenizer = tiny_tokenizer()
    rows = [{"id": "p0", "rejected_ids": [10, 11], "rejected_contrast": [0.1, 0.9]}]
    arguments = {
        "title": "Quickstart",
        "table": TABLE,
        "comparisons": [COMPARISON],
        "curves": CURVES,
        "pass_at_k": PASS_AT_K,
        "agreement": AGREEMENT,
        "heatmap": token_heatmap(rows, tokenizer, fragment=True),
        "commands": ["make quickstart", "python scripts/view.py --dataset x"],
        "environment": {"torch": "2.13.0", "cores": 2},
    }
    return build_report(**{**arguments, **changes})


def _figures(html):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)]


def test_every_number_is_on_the_page():
    html = _report()
    for text in ("50.0 % [47.0, 53.0]", "61.4 % [58.0, 64.0]", "42.0 % [40.0, 44.0]", "1,000", "−0.20", "−11.25"):
        assert text in html
    for text in (
        "+5.1 [+2.0, +8.0]",
        "&lt; 0.001",
        "0.012",
        "90 / 39",
        "0.931 [0.91, 0.95]",
        "make quickstart",
        "2.13.0",
    ):
        assert text in html
    assert html.lstrip().startswith("<!doctype html>")
    assert len(Page(html).tokens) == 2  # the heatmap


def test_figures_are_whole_and_the_page_needs_no_network():
    html = _report()
    figures = _figures(html)
    assert len(figures) == 3
    for figure in figures:
        assert ElementTree.fromstring(figure).tag.endswith("svg")
    links = [attrs[name] for _, attrs in Page(html).tags for name in ("src", "href") if name in attrs]
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert all(attrs.get("alt") for tag, attrs in Page(html).tags if tag == "img")


def test_same_data_same_bytes_and_other_data_other_figure():
    assert _report() == _report()
    moved = {**CURVES, "DPO": {**CURVES["DPO"], "chosen": [-20.0, -21.0, -23.0]}}
    assert _figures(_report(curves=moved))[1] != _figures(_report())[1]


def test_parts_without_data_are_left_out():
    html = build_report(title="Only a table", table=TABLE[:1])
    assert "<h2>Accuracy</h2>" in html and html.count("<h2>") == 1
    assert "Sampled" not in html and "Chosen" not in html


def test_callers_text_never_becomes_markup():
    hostile = '</script><script>alert(1)</script>" $\\frac$ {{ 7 * 7 }}'
    html = _report(
        title=hostile,
        summary=hostile,
        table=[{**TABLE[1], "method": hostile}],
        comparisons=[{**COMPARISON, "name": hostile}],
        curves={hostile: CURVES["DPO"]},
        agreement=[{hostile: hostile}],
        commands=[hostile],
        environment={hostile: hostile},
        captions={"table": hostile},
    )
    assert sum(tag == "script" for tag, _ in Page(html).tags) == 1  # the heatmap's own
    assert "alert(1)</script>" not in html and "49" not in re.sub(r"base64,[^\"]+", "", html).split("<style>")[0]


def test_captions_are_the_callers_where_given():
    html = _report(captions={"curves": "DPO loses 4 nats on chosen answers."})
    assert "DPO loses 4 nats on chosen answers." in html and "resampled problem by problem" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"curves": {"DPO": {"step": [0, 1], "chosen": [-1.0], "rejected": [-1.0, -2.0]}}},
            "Curve of 'DPO': `chosen` has 1 values for 2 steps",
        ),
        ({"table": [{**TABLE[0], "greedy_accuracy": 50.0}]}, "Method 'base': `greedy_accuracy` is 50.0, not a share"),
        ({"table": [{**TABLE[0], "ci95": [0.6, 0.7]}]}, r"Method 'base': `ci95` \[0.6, 0.7\] does not hold"),
    ],
)
def test_bad_data_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        _report(**changes)
