"""The curriculum is read from a training log as it is, and drawn."""

from __future__ import annotations

import subprocess
import sys

from tokalign.view.curriculum import curriculum, first_step, plot_curriculum

LOG = [
    {"step": 1, "structured/validity": 0.2, "structured/correctness": 0.1, "loss": 0.0},
    {"step": 1, "eval_structured/validity": 0.9},
    {"step": 2, "structured/validity": 0.7, "structured/correctness": None, "loss": 0.0},
    {"step": 3, "structured/validity": 1.0, "structured/correctness": 0.1, "loss": 0.0},
]


def test_components_are_read_in_order_and_gaps_left_out() -> None:
    found = curriculum(LOG)
    assert list(found) == ["validity", "correctness"]
    assert found["validity"] == [(1, 0.2), (2, 0.7), (3, 1.0)]
    assert found["correctness"] == [(1, 0.1), (3, 0.1)]
    assert curriculum(LOG, "other") == {}


def test_first_step_is_where_half_of_the_way_is_made() -> None:
    assert first_step([(1, 0.2), (2, 0.5), (3, 0.7), (4, 1.0)]) == 3
    assert first_step([(1, 0.2), (2, 0.5)], share=0.9) == 2
    assert first_step([(1, 0.3), (2, 0.3), (3, 0.1)]) is None


def test_a_picture_is_written(tmp_path) -> None:
    plot_curriculum({"one": LOG, "two": LOG}, tmp_path / "curriculum.png", window=2)
    assert (tmp_path / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_importing_the_views_leaves_matplotlib_as_it_was() -> None:
    code = (
        "import importlib, pkgutil, sys, matplotlib; matplotlib.rcParams['backend'] = 'svg'; import tokalign.view;"
        "names = [m.name for m in pkgutil.iter_modules(tokalign.view.__path__)];"
        "[importlib.import_module(f'tokalign.view.{name}') for name in names];"
        "assert 'curriculum' in names and matplotlib.rcParams['backend'] == 'svg', matplotlib.rcParams['backend'];"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
