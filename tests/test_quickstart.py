"""The main job and the pipeline on own text, run as a user runs them, at a small size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokalign.cli.ledger_models import trained_model
from tokalign.stage.loading import load_stage

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TOKALIGN_SHARED_DATA", ROOT.parent / "shared" / "data"))
METHODS = ("base", "sft", "dpo", "critical_token_dpo")
SMALL = (
    "--train_problems",
    "96",
    "--test_problems",
    "64",
    "--rollouts",
    "8",
    "--samples",
    "2",
    "--estimate_rows",
    "2",
    "--continuations",
    "16",
)


@pytest.fixture(scope="module")
def base() -> Path:
    return trained_model("ledger-slm")


@pytest.mark.slow
def test_quickstart_survives_an_interrupt_and_does_nothing_twice(base, tmp_path):
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "tokalign", "quickstart", "--output_dir", str(out), *SMALL]
    state, log = out / "state.json", tmp_path / "log"
    with open(log, "w") as stream:
        first = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            cwd=tmp_path,
            # a shell that starts the tests in the background has them ignore the interrupt, and so their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while "pairs" not in (state.read_text() if state.exists() else ""):
            assert first.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        first.send_signal(signal.SIGINT)
        first.wait(60)
    assert "report" not in [path.stem for path in out.iterdir()]
    finished = json.loads(state.read_text())

    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    after = json.loads(state.read_text())
    assert {name: after[name] for name in finished} == finished  # their seconds too: nothing ran again

    metrics = json.loads((out / "metrics.json").read_text())
    assert tuple(metrics["methods"]) == METHODS and metrics["seconds"] > 0
    for figures in metrics["methods"].values():
        low, high = figures["ci95"]
        assert figures["n"] == 64 and 0 <= low <= figures["greedy_accuracy"] <= high <= 1
    for method in METHODS[1:]:
        assert (out / method / "adapter_model.safetensors").exists()
    page = (out / "report.html").read_text()
    assert "critical-token DPO" in page and "tokalign score rollout" in page
    marked = load_stage(out / "marked", signals=["contrast"])
    assert all(len(row["rejected_contrast"]) == len(row["rejected_ids"]) for row in marked)
    assert all(0 <= row["first_error"] < len(row["rejected_ids"]) for row in marked)

    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and json.loads(state.read_text()) == after


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="the GSM8K files are not beside the repository")
def test_real_text_goes_from_rows_to_a_training_step(tmp_path):
    out = tmp_path / "own_data"
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "own_data.py"),
            "--source",
            str(SHARED / "gsm8k"),
            "--stand_in",
            "true",
            "--output_dir",
            str(out),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    scored = load_stage(out / "scored", stage="preferences", signals=["contrast"])
    assert len(scored) > 0 and all(len(row["rejected_contrast"]) == len(row["rejected_ids"]) for row in scored)
    assert (out / "critical_token_dpo" / "adapter_model.safetensors").exists()
    assert (out / "heatmap.html").stat().st_size > 10_000
