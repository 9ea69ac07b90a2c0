"""The recipes and launch configurations that ship with the package: without a name, a list; with one, a copy of it.

    tokalign recipes
    tokalign recipes llama-3-8b/critical_dpo --output_dir .

The copy is yours to change: `tokalign critical-dpo --config critical_dpo.yaml`. Unchanged ones need no copy:
`tokalign critical-dpo --config recipes/llama-3-8b/critical_dpo.yaml` finds the shipped file.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from tokalign.stage.errors import OptionError
from tokalign.stage.resources import resource, resource_names

FOLDERS = ("recipes", "accelerate_configs")


@dataclass
class RecipesArguments:
    """What to copy, and where to."""

    name: str | None = field(
        default=None, metadata={"help": "Recipe or launch configuration; `--name` may be left out before it."}
    )
    output_dir: str = field(default=".", metadata={"help": "Folder to copy to."})


def main(args: RecipesArguments) -> Path | None:
    """Print the list, or copy one and return where it is."""
    shipped = shipped_files()
    if args.name is None:
        for name, path in shipped.items():
            print(f"{name:<49} {needs(path)}")
        print("\n`tokalign recipes NAME --output_dir .` copies one; its first lines say what it needs and expects.")
        return None
    if args.name not in shipped:
        raise OptionError(f"There is no recipe {args.name}; `tokalign recipes` lists them.")
    source = shipped[args.name]
    target = Path(args.output_dir) / source.name
    if target.exists() and target.read_bytes() != source.read_bytes():
        raise OptionError(f"{target} exists and differs; delete it or name another --output_dir.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"{target}\n{header(source)}")
    return target


def shipped_files() -> dict[str, Path]:
    """By name (`ledger/sft`, `accelerate_configs/zero3`, `accelerate_configs/slurm/train.sbatch`), the shipped file."""
    files = {}
    for folder in FOLDERS:
        prefix = "" if folder == "recipes" else f"{folder}/"
        for path in [name for ending in (".yaml", ".sbatch") for name in resource_names(folder, ending)]:
            files[prefix + path.removesuffix(".yaml")] = resource(f"{folder}/{path}")
    return files


def header(path: Path) -> str:
    """The comment that a file opens with: what it is, its command, hardware, time and expected metric."""
    lines = path.read_text(encoding="utf-8").removeprefix("#!/bin/bash\n").splitlines()
    return "\n".join(takewhile(lambda line: line.startswith("#"), lines))


def needs(path: Path) -> str:
    """Hardware and time by a file's header, or else its first sentence."""
    text = " ".join(line.lstrip("# ") for line in header(path).splitlines())
    said = [re.search(rf"{word}: (.+?)(?: \(|\. |\.$|;)", text) for word in ("Hardware", "Time")]
    return "; ".join(match[1] for match in said if match) or re.split(r"[.:;] |\.$", text)[0]
