"""Writing a file so that a killed process or a power cut leaves the old text or the new one, never half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader, or a machine after a power cut, sees the old text or the new one, never half."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with removed_if_it_fails(temporary):
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    fsync_folder(file.parent)


def write_json_atomically(file: Path, content: Any) -> None:
    """`write_text_atomically` of JSON for people and programs. NaN and infinity are refused: JSON has neither."""
    write_text_atomically(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def removed_if_it_fails(temporary: Path) -> Iterator[None]:
    """Delete a half-written file when its writing fails (a full disk needs its room), and let the error name it."""
    try:
        yield
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(temporary)
        raise


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut (the file's own fsync does not cover its name)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
