"""The processes of one launch: how many there are, where each loads its model, how they end."""

from __future__ import annotations

import gc
import os
import time

import torch
from accelerate import PartialState

from tokalign.stage.errors import JobError

_DRAIN_SECONDS = 0.5  # for gloo's threads to let go of the tensors of the last collective


def process_state() -> PartialState:
    """The processes of this launch. Call it before anything else that makes a `PartialState` (an engine, a model).

    Accelerate sees several CPU processes only if the first `PartialState` of a process is told that it is CPU.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise JobError(
            f"{launched} processes were launched but accelerate sees {state.num_processes}; call "
            "`tokalign.stage.processes.process_state()` before loading models."
        )
    return state


def model_device() -> torch.device:
    """Where this process loads its models.

    Several CPU processes have "cpu:0" by accelerate. Moving a model there would copy its weights, and kernels round by
    alignment: one process and two would differ in the last bits.
    """
    device = process_state().device
    return torch.device("cpu") if device.type == "cpu" else device


def end_processes() -> None:
    """Leave the processes of this launch; the last line of a script that trains under `accelerate launch`.

    A gloo thread (CPU processes) frees the tensors of the last collective only after it has told the main thread that
    it is done. If the interpreter is shutting down by then, the thread cannot take its lock and the process aborts
    after all its work is done ("terminate called without an active exception", pytorch issue 190489). So give it a
    moment.
    """
    state = PartialState()
    several, on_cpu = state.num_processes > 1, state.device.type == "cpu"
    state.destroy_process_group()
    if several and on_cpu:
        gc.collect()
        time.sleep(_DRAIN_SECONDS)
