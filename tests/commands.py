"""Commands as pages and recipes write them: which verb they run, and whether it takes their options."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from trl import TrlParser

from tokalign.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]


def main_of(command: list[str]) -> tuple[Callable[..., Any], list[str]]:
    """The `main` behind `tokalign VERB …`, or behind a file of the clone, and the options that stand after it."""
    at = next(i for i, word in enumerate(command) if word == "tokalign" or word.endswith(".py"))
    words = command[at + 1 :]
    if command[at] != "tokalign":
        shim = re.search(r"main\(\[(.+), \*sys\.argv", (ROOT / command[at]).read_text())
        if shim is None:  # a file that does its work itself
            return _load(ROOT / command[at]).main, words
        words = [*ast.literal_eval(f"[{shim[1]}]"), *words]
    verb, words = VERBS[words[0]], words[1:]
    if verb.parts:
        verb, words = {part.name: part for part in verb.parts}[words[0]], words[1:]
    return import_module(verb.module).main, words


def _load(file: Path) -> Any:
    name = f"file_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def parse(main: Callable[..., Any], options: list[str]) -> tuple[Any, ...]:
    """The arguments of `main`, read as the command line reads them: raises or exits on one that it lacks."""
    classes = [parameter.annotation for parameter in signature(main, eval_str=True).parameters.values()]
    return TrlParser(classes).parse_args_and_config(options)


def documented_commands(*pages: Path) -> list[list[str]]:
    """Every command in the pages' shell blocks, split as a shell does."""
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
