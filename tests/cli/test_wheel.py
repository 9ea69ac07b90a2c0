"""What `pip install` gives: a wheel in an environment of its own, without the clone, from pairs to a trained model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.cli.commands import ROOT
from tests.support import save_tiny

BUILT_FROM = ("tokalign", "recipes", "accelerate_configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
CPU = ("--use_cpu", "true", "--bf16", "false", "--dtype", "float32")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment with the wheel, and this one's packages behind it.

    Only the folder of packages is named there, so that links out of it (an editable install of the clone) do not count.
    """
    source, venv = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(source / "dist"), str(source)]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    (wheel,) = (source / "dist").glob("tokalign-*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    variables = {"base": str(venv), "platbase": str(venv)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))
    (packages / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    """Run a command of the environment in an empty folder; returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{installed}{os.pathsep}{environment['PATH']}", "CUDA_VISIBLE_DEVICES": ""}

    def run(*words: object) -> str:
        command = [str(installed / str(words[0])), *map(str, words[1:])]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        return ended.stdout

    return run


@pytest.mark.slow
def test_the_wheel_goes_from_own_pairs_to_a_trained_model(run, installed, tmp_path):
    where = json.loads(
        run(
            "python",
            "-c",
            "import importlib.util, json, tokalign; from tokalign.stage.resources import PACKAGE;"
            "names = ('recipes', 'tests', 'benchmarks');"
            "print(json.dumps([tokalign.__file__, str(PACKAGE), [bool(importlib.util.find_spec(n)) for n in names]]))",
        )
    )
    assert all(path.startswith(str(installed.parent)) for path in where[:2]) and not any(where[2])  # not the clone

    shipped = {"llama-3-8b/critical_dpo", "ledger/quickstart", "accelerate_configs/zero3"}
    assert shipped <= {line.split(" ")[0] for line in run("tokalign", "recipes").splitlines()}
    assert "usage: tokalign serve" in run("tokalign", "serve", "--help")
    assert len(run("tokalign", "--help").splitlines()) < 60

    model = save_tiny(tmp_path / "model")
    pairs = [{"prompt": f"{n} + 2 = ", "chosen": str(n + 2), "rejected": f"{n} or {n + 3}"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    score = ("--model", model, "--dataset", "pairs.jsonl", "--dtype", "float32", "--output_dir", "scored")
    run("tokalign", "score", "likelihood", *score)
    config = ("--config", "recipes/ledger/critical_dpo.yaml", "--accelerate_config", "cpu", "--num_processes", "1")
    data = ("--model_name_or_path", model, "--dataset_name", "scored", "--signal", "logprob", "--output_dir", "trained")
    run("tokalign", "critical-dpo", *config, *data, "--max_steps", "2", "--logging_steps", "1", *CPU)
    state = json.loads((tmp_path / "trained" / "checkpoint-2" / "trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == 2
    run("tokalign", "view", "--dataset", "scored", "--tokenizer", model, "--output", "page.html")
    assert "5 + 2" in (tmp_path / "page.html").read_text()
