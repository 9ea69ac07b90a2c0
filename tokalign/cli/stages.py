"""Several verbs, one after the other, each once: what a former run finished is kept, what was interrupted goes on.

stages = Stages(folder)
stages.run("pairs", "pairs", "--dataset", folder / "rollouts", "--output_dir", folder / "preferences")
stages.train("DPO", "dpo", folder / "dpo", "--config", "recipes/ledger/dpo.yaml")
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokalign.cli.main import main, with_shipped_config
from tokalign.stage.files import write_text_atomically
from tokalign.stage.resources import resource
from tokalign.trainers.checkpoints import last_whole_checkpoint

console = Console()


def call(verb: str, words: list[str]) -> None:
    """Run `tokalign VERB words…` in this process, where imports are paid once.

    A file of the repository, such as "benchmarks/peers/tdpo.py", is run as `python FILE words…` would.
    """
    if not verb.endswith(".py"):
        main([*verb.split(), *words])
        return
    argv, sys.argv = sys.argv, [str(resource(verb)), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv


def command_line(verb: str, arguments: Sequence[Any]) -> str:
    """What one would type in a shell."""
    start = ["python", verb] if verb.endswith(".py") else ["tokalign", *verb.split()]
    return shlex.join([*start, *map(str, arguments)])


def config_hash(arguments: Sequence[Any]) -> str | None:
    """Hash of the YAML behind `--config`, whose settings the command line does not show."""
    words = with_shipped_config([str(argument) for argument in arguments])
    if "--config" not in words:
        return None
    return hashlib.sha256(Path(words[words.index("--config") + 1]).read_bytes()).hexdigest()[:12]


class Stages:
    """Runs stages once: finished ones, with the same command line, are kept in `state.json` with their seconds."""

    def __init__(self, folder: Path):
        self.file = folder / "state.json"
        self.done: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.commands: list[str] = []

    def is_done(self, name: str, verb: str, arguments: Sequence[Any]) -> bool:
        """Whether a former run finished this stage with this command line and these settings."""
        done = self.done.get(name, {})
        return done.get("command") == command_line(verb, arguments) and done.get("config") == config_hash(arguments)

    def run(self, name: str, verb: str, *arguments: Any, resume: tuple[str, ...] = ()) -> None:
        """Run `tokalign VERB arguments…` unless it is done; `resume` is left out of the command line that is kept."""
        command = command_line(verb, arguments)
        self.commands.append(command)
        if self.is_done(name, verb, arguments):
            console.print(f"[dim]✓ {name} (done before)[/dim]")
            return
        console.rule(f"[bold]{name}[/bold]", align="left")
        console.print(f"[dim]{command}[/dim]", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        call(verb, [*map(str, arguments), *resume])
        self.finish(name, command, time.perf_counter() - started, config_hash(arguments))

    def finish(self, name: str, command: str, seconds: float, config: str | None = None) -> None:
        """Note that a stage is done."""
        self.done[name] = {"command": command, "seconds": round(seconds, 1), "config": config}
        write_text_atomically(self.file, json.dumps(self.done, indent=2) + "\n")

    def train(self, name: str, verb: str, output: Path, *arguments: Any) -> None:
        """Run a training; an interrupted one goes on from its last checkpoint, unless its settings have changed."""
        arguments = (*arguments, "--output_dir", output)
        settings = json.dumps([verb, *map(str, arguments), config_hash(arguments)])
        note = output / "started_with.json"
        resume: tuple[str, ...] = ()
        if not self.is_done(name, verb, arguments):
            if note.exists() and note.read_text() == settings:
                checkpoint = last_whole_checkpoint(output)
                resume = ("--resume_from_checkpoint", checkpoint) if checkpoint else ()
            else:
                shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True, exist_ok=True)
            note.write_text(settings)
        self.run(name, verb, *arguments, resume=resume)
