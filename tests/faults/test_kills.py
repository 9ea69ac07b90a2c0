"""Jobs and a training killed at random instants end as if undisturbed; long: benchmarks/experiments/faults.py."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
from transformers import TrainingArguments

from tests.faults.damage import write_stage
from tokalign.trainers.checkpoints import last_whole_checkpoint, resume_point


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score_contrast", "write-answers", "critical_dpo"])
def test_a_killed_job_ends_like_one_never_killed(forks, inputs, tmp_path, name):
    """`critical_dpo` is a training: its weights are compared byte by byte."""
    job = next(job for job in forks.jobs_on(inputs) if job.name == name)
    want = tmp_path / "undisturbed"
    window = forks.undisturbed(job, want)
    outcome = forks.disturbed(job, want, tmp_path, kills=2, window=window, draw=random.Random(1))
    assert outcome["kills"] == 2 and outcome["runs"] >= 1
    assert {kind: outcome[kind] for kind in forks.KINDS} == dict.fromkeys(forks.KINDS, 0)


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_stops_with_one_sentence(forks, inputs, tmp_path):
    job = next(job for job in forks.jobs_on(inputs) if job.name == "pairs")
    want, out = tmp_path / "want", tmp_path / "out"
    forks.undisturbed(job, want)
    first = forks.start(job, out)
    while not job.work(out):
        assert first.exitcode is None, "the first run was over before the second began"
        time.sleep(0.002)
    second = forks.start(job, out, log=tmp_path / "second.log")
    second.join(60)
    forks.finish(first, job, out)
    said = (tmp_path / "second.log").read_text()
    if second.exitcode:  # it came while the first was at work
        assert f"JobError: Another run (process {first.pid} on " in said
        assert f"is writing {out}/" in said and "wait for it or choose another folder" in said
    else:
        pytest.fail("the second run ended well: the first had left the folder before it came")
    assert sum(forks.differences(job, want, out).values()) == 0


def test_differences_are_seen(forks, tmp_path):
    job = forks.Job("rows", "", (), files=("*.txt",))
    write_stage(tmp_path / "want")
    (tmp_path / "want" / "answers.txt").write_text("a")
    nothing = Counter(forks.differences(job, tmp_path / "want", tmp_path / "want"))
    assert nothing.total() == 0
    file = "part-00001-of-00003.parquet"

    def changed(change) -> dict[str, int]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "want", tmp_path / "out")
        rows = pq.read_table(tmp_path / "out" / file)
        rows = change(rows)
        if rows is not None:
            pq.write_table(rows, tmp_path / "out" / file)
        found = forks.differences(job, tmp_path / "want", tmp_path / "out")
        return {kind: count for kind, count in found.items() if count}

    assert changed(lambda rows: rows.slice(2)) == {"missing": 2}
    assert changed(lambda rows: rows.take([*range(len(rows)), 5])) == {"duplicates": 1}
    assert changed(lambda rows: rows.take([1, 0, *range(2, len(rows))])) == {"mismatches": 1}
    other = [not value for value in pq.read_table(tmp_path / "want" / file)["correct"].to_pylist()]
    flipped = changed(lambda rows: rows.set_column(4, "correct", [other]))
    assert flipped == {"missing": 64, "mismatches": 64}
    assert changed(lambda rows: (tmp_path / "out" / "answers.txt").write_text("b") and None) == {"files": 1}
    assert changed(lambda rows: (tmp_path / "out" / ".part.1.tmp").touch()) == {"leftovers": 1}

    def fewer(rows):
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"dropped": {"all": 1}}))

    assert changed(fewer) == {"manifests": 1}


def checkpoint(folder, step: int, state: str | None = None, processes: int = 0):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").touch()
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    for process in range(processes):
        (path / f"rng_state_{process}.pth").touch()
    return str(path)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    def said(value):
        return resume_point(
            TrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=value, use_cpu=True, report_to="none")
        )

    assert said("true") is None  # nothing there yet: one command line starts a training and goes on with it
    checkpoint(tmp_path, 9)
    assert said("true") is None
    whole = checkpoint(tmp_path, 8, '{"global_step": 8}')
    checkpoint(tmp_path, 10, '{"global_step": 10, "log_hist')
    checkpoint(tmp_path, 12)
    checkpoint(tmp_path, 14, '{"global_step": 2}')
    assert said("true") == whole and said("True") == whole
    assert said(None) is None and said("false") is None and said("runs/other") == "runs/other"
    both = checkpoint(tmp_path / "two", 4, '{"global_step": 4}', processes=2)
    checkpoint(tmp_path / "two", 6, '{"global_step": 6}', processes=1)
    assert last_whole_checkpoint(tmp_path / "two", 2) == both
