"""`--accelerate_config NAME`: the verb again, on the processes that an accelerate configuration describes.

As in `trl dpo --accelerate_config zero2`: NAME is a file of `accelerate_configs/` that the package ships, or a path.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from subprocess import CalledProcessError

from tokalign.stage.errors import JobError, OptionError
from tokalign.stage.resources import resource, resource_names

# Options of `accelerate launch` that may stand among the verb's. Only those that no verb has, since accelerate's own
# `--gradient_accumulation_steps` and others would swallow the trainer's.
PLACE = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "rdzv_backend",
)


def launch(verb: list[str], words: list[str]) -> None:
    """`accelerate launch --config_file … -m tokalign VERB …`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from tokalign.internals.accelerate import launch_command, launch_command_parser

    config, place, rest = split(words)
    command = ["--config_file", str(config), *place, "--module", "tokalign", *verb, *rest]
    try:
        launch_command(launch_command_parser().parse_args(command))
    except (CalledProcessError, ChildFailedError) as error:
        raise JobError(f"`tokalign {' '.join(verb)}` failed on one of its processes, which says why above.") from error


def split(words: list[str]) -> tuple[Path, list[str], list[str]]:
    """The accelerate configuration, the options of `accelerate launch`, and the verb's own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--accelerate_config", required=True)
    for name in PLACE:
        own.add_argument(f"--{name}")
    given, rest = own.parse_known_args(words)
    place = [part for name in PLACE if (value := getattr(given, name)) for part in (f"--{name}", value)]
    return config_file(given.accelerate_config), place, rest


def config_file(name_or_path: str) -> Path:
    """The file of an accelerate configuration that ships with the package, or a user's own."""
    names = [Path(file).stem for file in resource_names("accelerate_configs", ".yaml")]
    if name_or_path in names:
        return resource(f"accelerate_configs/{name_or_path}.yaml")
    if not Path(name_or_path).is_file():
        raise OptionError(
            f"--accelerate_config {name_or_path}: neither a file nor one of {', '.join(names)}; check the name."
        )
    return Path(name_or_path)
