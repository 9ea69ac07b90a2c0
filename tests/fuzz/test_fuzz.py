"""Every target on inputs by search, the same in every run, and on the seeds that once failed.

`python tests/fuzz/run_atheris.py` searches longer, by coverage, and by the same strategies with other random numbers.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.strategies import STRATEGIES
from tests.fuzz.targets import SEEDS, TARGETS, seeds_of

# What a second of this machine buys: opening a stage takes some tens of milliseconds, reading a header less than one
EXAMPLES = {
    **{"manifest": 60, "shard": 80, "labels": 40, "features": 400, "template": 200, "router_config": 60},
    **{"answers": 300, "structured": 200, "request": 200, "answer": 100},
}


def test_every_target_has_a_strategy_and_every_folder_a_target():
    assert TARGETS.keys() == STRATEGIES.keys() == EXAMPLES.keys()
    assert {folder.name for folder in SEEDS.iterdir()} <= TARGETS.keys()


@pytest.mark.parametrize("target", TARGETS)
def test_any_input(target):
    # nothing on disk and no clock: a run on another machine sees the same inputs, and a failure names its own
    @settings(
        max_examples=EXAMPLES[target],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(STRATEGIES[target])
    def search(data: bytes) -> None:
        TARGETS[target](data)

    search()


@pytest.mark.parametrize(
    ("target", "seed"),
    [pytest.param(name, seed, id=f"{name}-{seed.name}") for name in TARGETS for seed in seeds_of(name)],
)
def test_a_seed_that_once_failed(target: str, seed: Path):
    TARGETS[target](seed.read_bytes())


@pytest.mark.parametrize(
    ("target", "data"),
    [
        ("answers", b"The answer is 5.\x006"),
        ("structured", b'json\ntrue\n\n{"a": 1}\n{}'),
        ("request", b"GET /health\n\n"),
        ("template", b"{}"),
    ],
)
def test_a_target_reports_what_its_property_forbids(target, data, monkeypatch):
    """A property that nothing can break would say nothing; here the code under test is broken on purpose."""
    broken = {
        "answers": ("tests.fuzz.texts.answers_match", lambda a, b: a < b),
        "structured": ("tests.fuzz.texts.math.isfinite", lambda value: False),
        "request": ("tests.fuzz.servers.application", lambda: _failing),
        "template": ("tests.fuzz.files.load_templates", lambda file: {}[0]),
    }
    TARGETS[target](data)
    monkeypatch.setattr(*broken[target])
    with pytest.raises((AssertionError, KeyError)):
        TARGETS[target](data)


async def _failing(scope, receive, send):
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("target", ["shard", "labels", "features", "router_config", "template", "structured", "answer"])
def test_the_strategies_also_reach_what_is_right(target, monkeypatch):
    """Inputs that are all refused at the first check would try nothing behind it."""
    accepted = {
        "shard": "tests.fuzz.files.check_preferences",
        "labels": "tokalign.routing.router.features.RouterDataset.__getitems__",
        "features": "tests.fuzz.files.open_features",
        "router_config": "tests.fuzz.files.write_model_card",
        "template": "tests.fuzz.files.load_judge_template",
        "structured": "tests.fuzz.texts.check_order",
        "answer": "tests.fuzz.servers.check_piece",
    }[target]
    original, returned = pkgutil.resolve_name(accepted), []

    def counting(*args, **kwargs):
        result = original(*args, **kwargs)
        returned.append(1)
        return result

    monkeypatch.setattr(accepted, counting)

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STRATEGIES[target])
    def search(data: bytes) -> None:
        TARGETS[target](data)

    search()
    assert len(returned) >= 2
