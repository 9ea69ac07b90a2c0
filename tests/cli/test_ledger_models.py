"""The cache of the ledger's base models: its key holds what the weights depend on, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tokalign.cli import ledger_models
from tokalign.cli.ledger_models import THREADS, cache_key


@pytest.mark.parametrize("line, same", [("# a comment", True), ("learning_rate: 1.0", False), ("seed: 1", False)])
def test_a_recipe_counts_by_its_settings(tmp_path, monkeypatch, line, same):
    before = cache_key("ledger-slm", [])
    text = ledger_models._recipe("ledger-slm", []).read_text()
    changed = tmp_path / "base_slm.yaml"
    changed.write_text("\n".join(row for row in text.splitlines() if row.split(":")[0] != line.split(":")[0]))
    changed.write_text(f"{changed.read_text()}\n{line}\n")
    monkeypatch.setattr(ledger_models, "_recipe", lambda preset, world: changed)
    assert (cache_key("ledger-slm", []) == before) == same


def test_another_cpu_thread_count_library_or_world_is_another_model(monkeypatch):
    keys = [cache_key("ledger-slm", []), cache_key("ledger-llm", []), cache_key("ledger-slm", ["--seed", "1"])]
    keys.append(cache_key("ledger-slm", [], seed=1))
    for target, name, value in (
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (ledger_models, "THREADS", THREADS + 1),
        (ledger_models.accelerate, "__version__", "0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.append(cache_key("ledger-slm", []))
    assert len(set(keys)) == len(keys)
    assert cache_key("ledger-slm", []) == keys[0]


def test_trainings_have_their_own_number_of_threads(monkeypatch):
    """Whatever the caller's environment says: a cached model has to be the same wherever its key is."""
    seen = []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(ledger_models.subprocess, "run", lambda words, **options: seen.append(options["env"]))
    ledger_models._run("sft", "--help")
    assert seen[0]["OMP_NUM_THREADS"] == str(THREADS) != "7"


def test_a_seed_has_data_and_training_of_its_own(tmp_path, monkeypatch):
    """Seed 0 is what builder and recipe have by themselves."""
    commands = []

    def run(*words):
        commands.append([str(word) for word in words])
        if words[0] == "sft":
            (tmp_path / words[words.index("--output_dir") + 1]).mkdir(parents=True)

    monkeypatch.setattr(ledger_models, "_run", run)
    monkeypatch.setenv("TOKALIGN_CACHE", str(tmp_path))
    folders = {ledger_models.base_model("ledger-slm", world="rich", seed=seed) for seed in (0, 3)}
    assert len(folders) == 2
    for command in commands[:2]:
        assert "--seed" not in command
    for command in commands[2:]:
        assert command[-2:] == ["--seed", "3"]
    assert [command[2].rsplit("/", 1)[-1] for command in commands[1::2]] == ["base_slm_rich.yaml"] * 2
    assert ledger_models._recipe("ledger-llm", ["--world", "rich"]) == ledger_models._recipe("ledger-llm", [])
    assert commands[0][-6:] == ["--world", "rich", "--flaw_rate", "0.9", "--habits", "1"]
    assert ledger_models.base_model("ledger-slm", world="rich", seed=3) in folders and len(commands) == 4
