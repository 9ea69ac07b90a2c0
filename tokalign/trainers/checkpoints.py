"""Where an interrupted training goes on.

The Trainer of transformers writes a checkpoint file by file under its final name, weights first and
`trainer_state.json` last, and resumes from the folder with the highest step. A run that is killed while it saves leaves
half a folder there, and every later resume fails at it. So the recipes choose the last checkpoint that is whole.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainingArguments
from transformers.utils import logging

from tokalign.internals.transformers import TRAINER_STATE_NAME

logger = logging.get_logger(__name__)


def resume_point(args: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` means, for `trainer.train(resume_from_checkpoint=…)`.

    A path is itself; unset or `false` is None. `true` is the last whole checkpoint in `output_dir`, or None (the
    beginning) where there is none yet, so that one command line starts a run and goes on with it.
    """
    given = str(args.resume_from_checkpoint or "false")
    if given.lower() == "false":
        return None
    if given.lower() != "true":
        return given
    return last_whole_checkpoint(args.output_dir or "", 1 if args.save_on_each_node else args.world_size)


def last_whole_checkpoint(output_dir: str | Path, processes: int = 1) -> str | None:
    """The whole checkpoint of the highest step, None where there is none."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if f.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        if is_whole(folder, processes):
            return str(folder)
        logger.warning(f"{folder} is not whole (its run was stopped while it saved); the one before it is used.")
    return None


def is_whole(folder: Path, processes: int) -> bool:
    """Whether the file that is written last can be read, and with several processes the random state of each is there.

    No process waits for the others' random states (with `save_on_each_node` a folder holds one node's alone).
    """
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    states = [folder / f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else []
    return state["global_step"] == int(folder.name.rpartition("-")[2]) and all(file.exists() for file in states)
