"""A disk that is full: one sentence, no half shard, and the same command goes on when there is room."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import textwrap

import numpy as np
import pytest

from tokalign.routing.labels.features import write_features
from tokalign.stage.errors import JobError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage

LARGEST = 40_000  # bytes; a shard of the job has some 70,000, random text that does not compress
SCRIPT = textwrap.dedent(
    """
    import random, sys
    from datasets import Dataset
    from tokalign.stage.jobs import run_job

    def work(rows):
        for row in rows:
            draw = random.Random(row["id"])
            yield {"id": row["id"], "text": "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(40_000))}

    run_job(work, Dataset.from_list([{"id": f"r{k}"} for k in range(8)]), sys.argv[1], name="long", parameters={},
            shard_size=1)
    """
)


@pytest.fixture
def long_rows(forks, tmp_path):
    (tmp_path / "long.py").write_text(SCRIPT)
    return forks.Job("long", str(tmp_path / "long.py"), ("{out}",))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 400 KB and the way to enlarge it; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=40m", folder], check=True)
    subprocess.run(["umount", "-l", folder], check=True)


def refused(forks, job, out, **limits) -> str:
    """The last line that a job wrote which could not go on."""
    log = out.parent.parent / "refused.log"
    process = forks.start(job, out, log=log, **limits)
    process.join(60)
    assert process.exitcode == 1, log.read_text()
    return log.read_text().strip().splitlines()[-1]


SENTENCE = r"JobError: {} takes no more data \({}\); make room and start the same command again, which keeps the finish"


def test_files_that_may_not_grow(forks, long_rows, tmp_path):
    forks.undisturbed(long_rows, tmp_path / "want")
    out = tmp_path / "runs" / "out"
    last = refused(forks, long_rows, out, largest_file=LARGEST)
    assert re.search(SENTENCE.format(re.escape(str(out)), os.strerror(errno.EFBIG)), last)
    assert not list(out.glob("*.parquet")) and not list(out.glob(".*.tmp"))
    out.with_name("out.log").touch()
    forks.finish(forks.start(long_rows, out), long_rows, out)
    assert sum(forks.differences(long_rows, tmp_path / "want", out).values()) == 0


def test_a_full_file_system(forks, long_rows, small_disk, tmp_path):
    disk, enlarge = small_disk
    forks.undisturbed(long_rows, tmp_path / "want")
    out = disk / "runs" / "out"
    last = refused(forks, long_rows, out)
    assert re.search(SENTENCE.format(re.escape(str(out)), os.strerror(errno.ENOSPC)), last)
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert finished and not list(out.glob(".*.tmp"))
    arrays = {"hidden": (4000, 100), "top_logits": (4000, 5), "predicted": (4000,), "entropy": (4000,)}
    with pytest.raises(OSError, match=rf"{disk} does not take the file features-.*; make room and start again"):
        write_features(disk, ["a"], {name: np.zeros(shape) for name, shape in arrays.items()})
    with pytest.raises(OSError, match=r"No space left on device: .*\.metrics\.json\."):
        write_text_atomically(disk / "metrics.json", "x" * 500_000)
    assert not list(disk.glob(".*"))
    enlarge()
    forks.finish(forks.start(long_rows, out, log=tmp_path / "again.log"), long_rows, tmp_path / "again")
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert sum(forks.differences(long_rows, tmp_path / "want", out).values()) == 0


def test_what_a_killed_process_left_of_its_features_is_removed(tmp_path):
    shapes = {"hidden": (4, 3), "top_logits": (4, 2), "predicted": (4,), "entropy": (4,)}
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    name, other = (write_features(tmp_path, ids, arrays) for ids in (["a"], ["b"]))
    for file in (name, other):
        (tmp_path / f".{file}.7.tmp").write_text("half")
    assert write_features(tmp_path, ["a"], arrays) == name
    assert [file.name for file in tmp_path.glob(".*")] == [f".{other}.7.tmp"]  # perhaps another process's work


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path, monkeypatch):
    from datasets import Dataset

    rows = Dataset.from_list([{"id": "a"}])
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        run_job(lambda batch: batch, rows, tmp_path / "file", name="x", parameters={})
    with pytest.raises(JobError, match="takes no more data"):
        monkeypatch.setattr(os, "fsync", _no_room)
        run_job(lambda batch: batch, rows, tmp_path / "full", name="x", parameters={})
    monkeypatch.undo()
    run_job(lambda batch: batch, rows, tmp_path / "full", name="x", parameters={})
    assert load_stage(tmp_path / "full").to_list() == [{"id": "a"}]


def _no_room(descriptor):
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
