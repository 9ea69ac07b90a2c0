"""The table of signals: its rows, a user's own ones, and the page that shows them."""

from __future__ import annotations

import math
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from tests.signals.test_agreement import planted
from tokalign.cli import main as command
from tokalign.signals import Signal, registry
from tokalign.signals.agreement import agreement
from tokalign.signals.registry import get, known, names, register

ROOT = Path(__file__).resolve().parents[2]
MARGIN = Signal(
    name="own_margin",
    title="top-two margin",
    low=0.0,
    high=1.0,
    unit="probability",
    suspicious="low",
    to_weight=lambda margin: 1.0 - margin,
    passes=1,
    command="python my_margin.py",
)


@pytest.fixture
def table(monkeypatch):
    """The table as it is, to be changed by one test; entry points are looked for again."""
    monkeypatch.setattr(registry, "_SIGNALS", dict(registry._SIGNALS))
    registry._load_entry_points.cache_clear()
    yield registry._SIGNALS
    registry._load_entry_points.cache_clear()


@pytest.mark.parametrize("name", names())
def test_weights_rewards_and_suspicion_agree_about_the_end(name):
    signal = get(name)
    low, high = max(signal.low, -20.0), min(signal.high, 20.0)
    values = np.linspace(low, high, 50)
    weights, rewards = signal.to_weight(values), signal.to_reward(values)
    assert weights.min() >= 0 and weights.max() <= 1
    assert rewards.min() >= -0.5 and rewards.max() <= 0.5
    suspicious = np.argmin(signal.suspicion(values))
    assert values[suspicious] == (low if signal.suspicious == "low" else high)
    assert np.argmax(weights) == np.argmin(rewards) == suspicious


def test_own_signal_by_a_call(table):
    with pytest.raises(ValueError, match=r"no token signal 'own_margin' .*register yours"):
        get("own_margin")
    assert known("own_margin") is None
    assert register(MARGIN) is get("own_margin") is known("own_margin") is register(MARGIN)
    rows = [{**row, "rejected_own_margin": row["rejected_contrast"]} for row in planted()]
    assert agreement(rows, samples=5)["first_error"]["signals"]["own_margin"]["tokens_per_scored_token"] == 3
    with pytest.raises(ValueError, match="is a signal 'own_margin' already"):
        register(Signal("own_margin", "another", 0.0, 2.0, "nats", "high"))


@pytest.mark.parametrize(
    "change", [{"name": "my margin"}, {"low": 1.0}, {"high": math.nan}, {"suspicious": "both"}, {"sides": ("left",)}]
)
def test_a_row_that_says_nonsense_is_refused(change):
    with pytest.raises(ValueError, match=r"[Ss]ignal"):
        Signal(**{**vars(MARGIN), **change})


def test_own_signal_by_an_entry_point(table, monkeypatch):
    """A package that is installed beside this one names its row in its pyproject.toml; nobody imports it."""
    point = EntryPoint("margin", "tests.signals.test_registry:MARGIN", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else [])
    assert get("own_margin").title == "top-two margin" and "own_margin" in names()


def test_an_entry_point_that_is_no_signal_is_named(table, monkeypatch):
    point = EntryPoint("odd", "math:pi", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(TypeError, match=r"'odd' of tokalign.signals is not a Signal: math:pi"):
        names()


def test_a_signal_with_a_file_is_a_command(table):
    table["margin"] = Signal(**{**vars(MARGIN), "command": "tokalign score margin", "module": "my_package.margin"})
    verbs = {verb.name: verb for verb in command._scorers()}
    assert verbs["margin"].module == "my_package.margin" and verbs["margin"].text == "top-two margin"
    assert {"contrast", "rollout", "token-reward", "likelihood"} <= set(verbs)


def shown(end: float) -> str:
    return {math.inf: "∞", -math.inf: "−∞"}.get(end, f"{end:g}".replace("-", "−"))


def test_the_page_shows_the_table():
    """docs/signals.md: name, range, suspicious end, command and cost of every row."""
    page = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| `")]
    rows = {cells[0].strip("` "): cells for cells in lines}
    own = [get(name) for name in names() if get(name).module.startswith("tokalign.")]  # other tests register theirs
    assert len(own) == len(rows)
    for signal in own:
        _, between, end, unit, made_by, what, cost = (cell.strip() for cell in rows[signal.name])
        assert between == f"[{shown(signal.low)}, {shown(signal.high)}]"
        assert end == signal.suspicious and unit == signal.unit
        assert made_by == f"`{signal.command}`"
        assert signal.paper in what
        passes = re.search(r"(\d+) forward pass", cost)
        assert (float(passes[1]) if passes else None) == signal.passes
        assert (f"`{signal.counted}`" in cost) == bool(signal.counted)
