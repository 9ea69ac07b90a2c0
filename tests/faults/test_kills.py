"""Jobs and a training killed at random instants end as if undisturbed; long: benchmarks/experiments/faults.py."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import save_file

from tests.faults.damage import write_stage
from tokalign.stage.errors import ContractError
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


STATE = '{"global_step": %d}'


def checkpoint(folder, step: int, state: str | None = None, rng: tuple[str, ...] = ("rng_state.pth",)) -> Path:
    """A checkpoint as the Trainer leaves it, two shards of weights and all; without `state` its save was cut short."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    shards = {f"model-{i}-of-2.safetensors": {f"w{i}": torch.ones(64)} for i in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("optimizer.pt", "scheduler.pt", *rng):
        torch.save({"state": torch.ones(64)}, path / name)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def said(folder, value="true", **changes) -> str | None:
    arguments = {"output_dir": str(folder), "resume_from_checkpoint": value, "should_log": True, "world_size": 1}
    return resume_point(SimpleNamespace(**arguments | {"save_on_each_node": False} | changes))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    assert said(tmp_path) is None  # nothing there yet: one command line starts a training and goes on with it
    checkpoint(tmp_path, 7, '{"global_step": 7, "log_hist')
    checkpoint(tmp_path, 9)
    assert said(tmp_path) is None  # no save was ever finished
    whole = str(checkpoint(tmp_path, 8, STATE % 8))
    checkpoint(tmp_path, 10, '{"global_step": 10, "log_hist')
    checkpoint(tmp_path, 12)
    checkpoint(tmp_path, 14, STATE % 2)
    assert said(tmp_path) == said(tmp_path, "True") == last_whole_checkpoint(tmp_path) == whole
    assert said(tmp_path, None) is said(tmp_path, "false") is None
    assert said(tmp_path, "runs/other") == "runs/other"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path / "model-2-of-2.safetensors"), "model-2-of-2.safetensors is cut short or damaged"),
        (lambda path: (path / "model-2-of-2.safetensors").unlink(), "model-2-of-2.safetensors is missing"),
        (lambda path: cut(path / "optimizer.pt"), "optimizer.pt is cut short or damaged"),
        (lambda path: cut(path / "rng_state.pth"), "rng_state.pth is cut short or damaged"),
        (lambda path: cut(path / "model.safetensors.index.json"), "model.safetensors.index.json cannot be read"),
        (lambda path: (path / "latest").write_text("global_step6\n"), "global_step6 is missing"),
        (
            lambda path: (path / "trainer_state.json").write_text(STATE % 5),
            "trainer_state.json is of step 5",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_never_written_over(tmp_path, caplog, damage, message):
    """The one before it is taken; where there is none, the run does not begin anew over what can perhaps be mended."""
    whole, damaged = (str(checkpoint(tmp_path, step, STATE % step)) for step in (4, 6))
    assert said(tmp_path) == damaged  # not damaged yet
    damage(Path(damaged))
    assert said(tmp_path) == whole and f"checkpoint-6 is not whole ({message}); the one before" in caplog.text
    with pytest.raises(ContractError, match=f"checkpoint-6 is damaged: {message}; give one that is whole"):
        said(tmp_path, damaged)
    shutil.rmtree(whole)
    checkpoint(tmp_path, 8)  # a save that was never finished says nothing either way
    with pytest.raises(ContractError, match=f"No checkpoint in .* is whole .*checkpoint-6: {message}.*move the checkp"):
        said(tmp_path)


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "missing"), [(1, 1, 0), (2, 2, 0), (1, 2, 2), (2, 4, 2), (2, 1, 1), (4, 2, 0)]
)
def test_another_number_of_processes_goes_on(tmp_path, caplog, saved_by, resumed_by, missing):
    rng = tuple(f"rng_state_{i}.pth" for i in range(saved_by)) if saved_by > 1 else ("rng_state.pth",)
    whole = str(checkpoint(tmp_path, 6, STATE % 6, rng=rng))
    assert said(tmp_path, world_size=resumed_by) == whole
    line = f"no random state for {missing} of {resumed_by} processes"
    assert [line in record.getMessage() for record in caplog.records] == ([True] if missing else [])


def test_deepspeed_goes_on_with_as_many_processes_alone(tmp_path, monkeypatch):
    """It has cut the optimizer's state for the processes that saved; its own error comes from some of them only."""
    whole = checkpoint(tmp_path, 6, STATE % 6, rng=("rng_state_0.pth", "rng_state_1.pth"))
    (whole / "global_step6").mkdir()
    (whole / "latest").write_text("global_step6")
    for rank in range(2):
        torch.save({}, whole / "global_step6" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert said(tmp_path, world_size=4) == str(whole)  # without DeepSpeed its files are not read
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("tokalign.trainers.checkpoints.PartialState", lambda: state)
    assert said(tmp_path, world_size=2) == str(whole)
    with pytest.raises(
        ContractError, match=r"checkpoint-6 was saved by 2 processes, and DeepSpeed has cut .* launch 2"
    ):
        said(tmp_path, world_size=4)
