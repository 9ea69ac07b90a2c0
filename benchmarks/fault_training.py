"""Kill a training at random instants and while it writes a checkpoint, resume it, and compare the final weights."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fault_inputs import Inputs, jobs_on
from faults import Job, finish, kill, start
from transformers.trainer_utils import get_last_checkpoint

from tokalign.trainers.checkpoints import is_whole

STEPS, SAVE_STEPS = 24, 2
WEIGHTS = "model.safetensors"


def training_job(model: str, dataset: str) -> Job:
    """Critical-token DPO of all weights, with a checkpoint every two steps; one command starts it and goes on."""
    options = {
        "model_name_or_path": model,
        "dataset_name": dataset,
        "output_dir": "{out}",
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_total_limit": 2,
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "resume_from_checkpoint": "true",
    }
    flags = (part for key, value in options.items() for part in (f"--{key}", str(value)))
    return Job("critical_dpo", "recipes/critical_dpo.py", tuple(flags))


def training(inputs: Inputs, folder: Path, *, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill and resume until `kills` have struck; every second one waits for a checkpoint that is half written."""
    scoring = next(job for job in jobs_on(inputs) if job.name == "score_contrast")
    finish(start(scoring, folder / "scored"), scoring, folder / "scored")
    job = training_job(inputs.slm, str(folder / "scored"))
    whole, out = folder / "whole", folder / "killed"
    started = time.perf_counter()
    finish(start(job, whole), job, whole)
    seconds = time.perf_counter() - started
    found = Counter(kills=0, while_saving=0, stock_resume_fails=0, runs=0, different_weights=0)
    while found["kills"] < kills:
        process = start(job, out)
        if found["kills"] % 2 == 0:
            _wait_for_half_a_checkpoint(process, out, skip=draw.randrange(4))
        else:
            process.join(draw.uniform(0, seconds))
        if process.exitcode is None:
            kill(process, signal.SIGSTOP)
            found["while_saving"] += bool(half_checkpoints(out))
            kill(process, signal.SIGKILL)
            process.join()
            found["kills"] += 1
            last = get_last_checkpoint(str(out)) if out.exists() else None  # what transformers would resume from
            found["stock_resume_fails"] += last is not None and not is_whole(Path(last), 1)
        if process.exitcode == -signal.SIGKILL and found["kills"] < kills:
            continue
        last_run = start(job, out) if process.exitcode == -signal.SIGKILL else process
        finish(last_run, job, out)
        found["runs"] += 1
        found["different_weights"] += (out / WEIGHTS).read_bytes() != (whole / WEIGHTS).read_bytes()
        shutil.rmtree(out)
    return {"steps": STEPS, "save_steps": SAVE_STEPS, "undisturbed_seconds": round(seconds, 1), **found}


def half_checkpoints(out: Path) -> list[Path]:
    """Checkpoints without the file that is written last."""
    return [folder for folder in out.glob("checkpoint-*") if not (folder / "trainer_state.json").exists()]


def _wait_for_half_a_checkpoint(process: BaseProcess, out: Path, *, skip: int) -> None:
    """Until a checkpoint is half written that this process has begun, the first `skip` of them let pass."""
    seen = {folder for folder in half_checkpoints(out)}  # a former run's
    begun: set[Path] = set()
    while process.exitcode is None:
        begun |= {folder for folder in half_checkpoints(out) if folder not in seen}
        if len(begun) > skip and half_checkpoints(out):
            return
        time.sleep(0.001)
