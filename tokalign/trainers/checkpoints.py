"""Where an interrupted training goes on.

The Trainer of transformers writes a checkpoint file by file under its final name, weights first and
`trainer_state.json` last, and resumes from the folder with the highest step. A run that is killed while it saves leaves
half a folder there, and every later resume fails at it. So the recipes choose the last checkpoint that is whole.

Whole means what the checkpoint itself says: its state is there and of its step, every file that it names is there, and
every file is as long as it says. How many processes saved it is no part of that: others can go on from it, as with the
plain Trainer. Only each process's random state is of its own (`rng_state_<process>.pth`; `rng_state.pth` of one alone).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from accelerate import DistributedType, PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.utils import logging

from tokalign.internals.transformers import TRAINER_STATE_NAME
from tokalign.stage.errors import ContractError

logger = logging.get_logger(__name__)

# What the Trainer and DeepSpeed write by `torch.save`: zip archives, whose table of contents stands at their end.
_ARCHIVES = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "*model*.bin", "global_step*/*.pt")


def resume_point(args: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` means, for `trainer.train(resume_from_checkpoint=…)`.

    A path is itself; unset or `false` is None. `true` is the last whole checkpoint in `output_dir`, or None (the
    beginning) where there is none yet, so that one command line starts a run and goes on with it.

    Raises:
        ContractError: the checkpoint at the given path is damaged, all that `output_dir` has finished are, or
            DeepSpeed cut the optimizer for another number of processes.
    """
    given = str(args.resume_from_checkpoint or "false")
    if given.lower() == "false":
        return None
    checkpoint: str | None = given
    if given.lower() == "true":
        checkpoint = last_whole_checkpoint(args.output_dir or "")
    elif Path(given).is_dir() and (problem := problem_of(Path(given))):
        raise ContractError(f"Checkpoint {given} is damaged: {problem}; give one that is whole.")
    if checkpoint is not None and Path(checkpoint).is_dir():
        _check_processes(Path(checkpoint), args)
    return checkpoint


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The whole checkpoint of the highest step; None where no save was ever finished.

    Raises:
        ContractError: saves were finished, but all of them are damaged now. A run that began anew would write over
            what can perhaps be mended, so nobody but the user decides that it may.
    """
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    damaged = ""
    for folder in sorted(folders, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        problem = problem_of(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is not whole ({problem}); the one before it is used.")
        if _state_of(folder) is not None:  # written last: the save had come to its end
            damaged = damaged or f"{folder}: {problem}"
    if damaged:
        raise ContractError(
            f"No checkpoint in {output_dir} is whole ({damaged}); mend it, or move the checkpoints away to begin anew."
        )
    return None


def problem_of(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, in a few words; None where it is whole."""
    state, step = _state_of(folder), folder.name.rpartition("-")[2]
    if state is None:
        return f"its run was stopped while it saved, before {TRAINER_STATE_NAME} was written"
    if step.isdigit() and state["global_step"] != int(step):
        return f"{TRAINER_STATE_NAME} is of step {state['global_step']}"
    named: set[Path] = set()
    for file in sorted(folder.rglob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return f"{file.name} cannot be read"
        if file.name.endswith(".index.json"):
            named |= {file.parent / shard for shard in said.get("weight_map", {}).values()}
    latest = folder / "latest"  # DeepSpeed's: the folder of the weights and of every process's part of the optimizer
    if latest.exists():
        named.add(folder / latest.read_text(encoding="utf-8").strip())
    for file in sorted(named):
        if not file.exists():
            return f"{file.name} is missing"
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):  # compares the lengths in the header with the file's
                pass
        except SafetensorError:
            return f"{file.name} is cut short or damaged"
    for file in sorted(file for pattern in _ARCHIVES for file in folder.glob(pattern) if file.is_file()):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short or damaged"
    return None


def _state_of(folder: Path) -> dict | None:
    try:
        return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _check_processes(folder: Path, args: TrainingArguments) -> None:
    """What another number of processes than the one that saved means: a refusal under DeepSpeed, else one line."""
    if args.save_on_each_node:  # the other machines' files are on their own disks
        return
    processes = args.world_size
    parts = len(list(folder.glob("global_step*/*zero_pp_rank_*optim_states.pt")))
    deepspeed = PartialState().distributed_type == DistributedType.DEEPSPEED
    if deepspeed and parts not in (0, processes):
        raise ContractError(
            f"{folder} was saved by {parts} processes, and DeepSpeed has cut the optimizer's state for as many; launch "
            f"{parts} to go on, or start a new training from its weights."
        )
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    missing = sum(not (folder / name).exists() for name in names)
    if missing and args.should_log:
        logger.warning(
            f"{folder} has no random state for {missing} of {processes} processes (another number of them saved it, or "
            "some were stopped before); theirs is made anew from `seed`, and all else goes on."
        )
