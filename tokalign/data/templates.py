"""Prompt templates as data: a JSON object by the name of one that ships with the package, or from a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokalign.data.contract import ContractError


def read_template(name_or_path: str | Path, built_in: Path, *, absent: str, parts: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a template; what has to be in it is the caller's to check.

    Args:
        name_or_path: the stem of a file in `built_in`, or a path.
        built_in: folder of the package's own.
        absent: how the sentence begins if there is none, e.g. "There is no judge template".
        parts: what a file must hold, for the remedy, e.g. "`better` and `worse`".

    Raises:
        ContractError: neither a name nor a readable file, or not a JSON object.
    """
    names = sorted(file.stem for file in built_in.glob("*.json"))
    file = built_in / f"{name_or_path}.json" if name_or_path in names else Path(name_or_path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        one = "one of " if len(names) > 1 else ""
        raise ContractError(
            f"{absent} {str(name_or_path)!r} ({error.strerror}); use {one}{', '.join(names)}, or the path of a JSON "
            "file."
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise ContractError(f"{file} is not JSON ({error}); write an object with {parts}.") from None
    if not isinstance(content, dict):
        raise ContractError(f"{file} is not a JSON object; write an object with {parts}.")
    return file.stem, content
