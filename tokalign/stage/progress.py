"""Which shards of a job are still to come, from any process, and the progress bar over all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tokalign.stage.shards import shard_name

_LOOK_SECONDS = 2.0  # how often the progress bar looks for the shards of other processes


class JobProgress:
    """Which shards are still to come, from any process, and the main process's progress bar over all of them."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], state: PartialState, console: Console, name: str) -> None:
        manifest = plan["manifest"]
        size, total = manifest["shard_size"], manifest["input"]["rows"]
        self._folder = folder
        self._missing = {shard_name(i, manifest["shards"]): min(size, total - i * size) for i in plan["todo"]}
        self._total = sum(self._missing.values())
        self._looked = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if state.is_main_process and self._missing:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            rate = TextColumn("{task.fields[rate]} rows/s")
            self._bar = Progress(*columns, rate, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(name, total=self._total, rate="–")

    def __enter__(self) -> JobProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, rows: int) -> None:
        """This process has done `rows` rows of the shard that it works on."""
        if self._bar is not None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self.unfinished()
        self._show(rows)

    def finished(self, file: str) -> None:
        """This process has written the shard `file`."""
        self._missing.pop(file, None)
        self._show(0)

    def unfinished(self) -> bool:
        """Whether some process still has a shard to write; lists the folder once."""
        present = set(os.listdir(self._folder))
        self._missing = {file: rows for file, rows in self._missing.items() if file not in present}
        self._looked = time.monotonic()
        self._show(0)
        return bool(self._missing)

    def _show(self, in_progress: int) -> None:
        if self._bar is None:
            return
        speed = self._bar.tasks[0].speed
        rate = "–" if speed is None else f"{speed:,.1f}"
        completed = self._total - sum(self._missing.values()) + in_progress
        self._bar.update(self._task, completed=completed, rate=rate)
