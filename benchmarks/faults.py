"""Kill jobs at random instants, start them again, and count what differs from a run that nobody disturbed.

Importing PyTorch takes longer than a small job does, so jobs are forked from a server process that has imported it
before (multiprocessing's forkserver; it has one thread and has run nothing). In the fork a script runs as from the
shell: its own session, its own arguments, as `__main__`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tokalign.stage.manifest import MANIFEST, read_manifest
from tokalign.stage.shards import shard_name

ROOT = Path(__file__).resolve().parents[1]
# What scripts and recipes import, so that a fork finds it there.
PRELOAD = (
    *("torch", "transformers", "datasets", "peft", "trl", "openai", "matplotlib.figure", "scipy.stats"),
    *("transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer", "safetensors.numpy"),
    *("tokalign.stage.jobs", "tokalign.evaluation", "tokalign.generation.transformers_engine", "tokalign.trainers"),
    "tokalign.rewards",
    "tokalign.routing.decode.generator",
    "tokalign.generation.scorer",
    "tokalign.routing.labels.report",
)
FORKS = multiprocessing.get_context("forkserver")
LATE = 0.1  # seconds
CLOCKS = ("seconds", "tokens_per_second", "date")  # manifest entries that no two runs share


@dataclass(frozen=True)
class Job:
    """A script and its arguments; `{out}` in them is the folder of the run.

    Args:
        files: what to compare byte by byte beside the rows, as globs under that folder.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    files: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What the kills of one job came to; `mismatches` to `leftovers` should be 0."""

    kills: int = 0
    struck: int = 0  # of these, while the job held an output folder: checking, working or writing there
    runs: int = 0  # folders that were finished in the end and compared
    counts: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, int]:
        names = ("mismatches", "duplicates", "missing", "manifests", "files", "leftovers")
        return {"kills": self.kills, "struck": self.struck, "runs": self.runs, **{n: self.counts[n] for n in names}}


def prepare(cache: Path) -> None:
    """Start the server of all jobs, with their settings: one thread, no accelerator, no hub, a cache of their own."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    os.environ |= {"COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    FORKS.set_forkserver_preload(list(PRELOAD))
    ensure_running()
    first = FORKS.Process(target=str)  # waits for the imports, which would count as the first job's time
    first.start()
    first.join()
    os.environ.clear()
    os.environ |= before


def log_of(out: Path) -> Path:
    """Where the output of the runs on a folder is kept, beside it."""
    return out.with_name(f"{out.name}.log")


def start(job: Job, out: Path, *, largest_file: int | None = None, log: Path | None = None) -> BaseProcess:
    """Start a job; its output is added to `log` (default: `log_of`).

    Args:
        largest_file: bytes at which a write fails as on a full disk.
    """
    arguments = [part.format(out=out) for part in job.arguments]
    script = str(ROOT / job.script)
    process = FORKS.Process(target=_run, args=(script, arguments, str(log or log_of(out)), largest_file))
    process.start()
    return process


def _run(script: str, arguments: list[str], log: str, largest_file: int | None) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def finish(process: BaseProcess, job: Job, out: Path, *, timeout: float = 300) -> None:
    """Wait for a job that must succeed."""
    process.join(timeout)
    if process.exitcode != 0:
        kill(process, signal.SIGKILL)
        text = log_of(out).read_text(errors="replace")
        raise RuntimeError(f"{job.name} ended with {process.exitcode} in {out}:\n{text[-4000:]}")


def kill(process: BaseProcess, number: int) -> None:
    """Signal a job and what it has started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it has no session of its own yet, or is gone
        if process.is_alive():
            os.kill(process.pid, number)


def undisturbed(job: Job, out: Path) -> tuple[float, float]:
    """Run a job to its end; the seconds after which it had opened its output folder, and after which it was over."""
    started = time.perf_counter()
    process = start(job, out)
    while process.exitcode is None and not any(out.rglob(".lock")):
        time.sleep(0.01)
    begun = time.perf_counter() - started
    finish(process, job, out)
    return begun, time.perf_counter() - started


def disturbed(
    job: Job, want: Path, folder: Path, *, kills: int, window: tuple[float, float], draw: random.Random
) -> Outcome:
    """Kill a job `kills` times; every folder is finished in the end and compared with `want`.

    Args:
        window: begin and end of the work of an undisturbed run in seconds; instants are drawn uniformly from it. Where
            the job does not hold its folder then (it loads a model, say), the kill comes up to 0.1 s after it next
            does. Runs that turn out faster (files are in the machine's cache by then) shorten the window.
    """
    outcome = Outcome()
    while outcome.kills < kills:
        out = folder / f"{job.name}-{outcome.runs}"
        fresh = True
        while True:
            started = time.perf_counter()
            process = start(job, out)
            process.join(draw.uniform(*window))
            late = draw.uniform(0, LATE) if not at_work(out) else 0
            while process.exitcode is None and late and not at_work(out):
                time.sleep(0.002)
            process.join(late)
            if outcome.kills == kills or process.exitcode is not None:
                finish(process, job, out)
                if fresh:
                    shorter = min(1.0, (time.perf_counter() - started) / window[1])
                    window = (shorter * window[0], shorter * window[1])
                break
            kill(process, signal.SIGSTOP)  # so that what is looked at is what the kill meets
            outcome.struck += at_work(out)
            outcome.kills += 1
            kill(process, signal.SIGKILL)
            process.join()
            fresh = False
        outcome.runs += 1
        outcome.counts.update(differences(job, want, out))
        shutil.rmtree(out)
    return outcome


def at_work(out: Path) -> bool:
    """Whether some process holds the lock of a stage in this folder; asks Linux, since trying it would take it."""
    held = {line.split()[5].rpartition(":")[2] for line in Path("/proc/locks").read_text().splitlines()}
    return any(str(lock.stat().st_ino) in held for lock in out.rglob(".lock"))


def stages(out: Path) -> list[Path]:
    """Folders of a run that a job has written, relative to it."""
    return sorted(file.parent.relative_to(out) for file in out.rglob(MANIFEST))


def rows_of(stage: Path) -> list[str]:
    """Rows of a stage in order, each as JSON (exact: floats are written with all their digits)."""
    count = read_manifest(stage)["shards"]
    tables = [pq.read_table(stage / shard_name(index, count)) for index in range(count)]
    return [json.dumps(row, sort_keys=True) for table in tables for row in table.to_pylist()]


def differences(job: Job, want: Path, out: Path) -> dict[str, int]:
    """How a run differs from the undisturbed one, by kind; all 0 where it does not."""
    found: Counter[str] = Counter()
    found["manifests"] += stages(want) != stages(out)
    for stage in stages(want):
        theirs, ours = rows_of(want / stage), rows_of(out / stage)
        there, here = Counter(theirs), Counter(ours)
        found["missing"] += sum((there - here).values())
        found["duplicates"] += sum((here - there)[row] for row in here if row in there)
        found["mismatches"] += sum(count for row, count in here.items() if row not in there)
        found["mismatches"] += sorted(theirs) == sorted(ours) and theirs != ours  # another order
        found["manifests"] += _settled(want / stage, want) != _settled(out / stage, out)
    for pattern in job.files:
        names = {file.relative_to(want) for file in want.glob(pattern)}
        assert names, f"{job.name} writes no {pattern}"
        found["files"] += names != {file.relative_to(out) for file in out.glob(pattern)}
        both = (name for name in names if (out / name).exists())
        found["files"] += sum((want / name).read_bytes() != (out / name).read_bytes() for name in both)
    found["leftovers"] += sum(1 for file in out.rglob(".*.tmp"))
    return dict(found)


def _settled(stage: Path, out: Path) -> str:
    """The manifest without what is not the same in two runs: time, and the folder of the run itself."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without(item) for key, item in value.items() if key not in CLOCKS}
        return value

    return json.dumps(without(read_manifest(stage)), sort_keys=True).replace(str(out), "{out}")


def shards_in(out: Path) -> tuple[int, int]:
    """Rows and shards of all stages of a run."""
    manifests: Iterable[dict[str, Any]] = [read_manifest(out / stage) for stage in stages(out)]
    return sum(m["rows"] for m in manifests), sum(m["shards"] for m in manifests)
