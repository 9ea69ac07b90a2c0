"""Command lines of the documentation, read by the parser that reads them when a user types them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from tokalign.cli.launch import config_file, split
from tokalign.cli.main import find, parser_of, with_shipped_config

ROOT = Path(__file__).resolve().parents[2]
# A file of the top level that is only another name of a verb: `main(["data", "gsm8k", *sys.argv[1:]])`.
OTHER_NAME = re.compile(r'^    main\(\[(?:"[\w-]+", )+\*sys\.argv\[1:\]\]\)$', re.MULTILINE)


class Command(NamedTuple):
    """What a command line runs, and with which options."""

    main: Any
    verb: str
    options: list[str]

    def read(self, *more: str) -> tuple[Any, ...]:
        """The arguments of `main`; raises or exits at an option that it has not."""
        parser = parser_of(self.main)
        options = [*self.options, *more]
        if any(issubclass(kind, TrainingArguments) for kind in parser.dataclass_types):
            options += ["--use_cpu", "true"]  # a recipe's bf16 is refused where there is no GPU
        return parser.parse_args_and_config(with_shipped_config(options))


def is_ours(words: list[str]) -> bool:
    """Whether a command line runs a verb or a file of the repository, and not its tests."""
    return "pytest" not in words and any(word == "tokalign" or word.endswith(".py") for word in words)


def command(words: list[str]) -> Command:
    """Split a command line into its launcher (checked here), what it runs, and the options of that."""
    at = next(i for i, word in enumerate(words) if is_ours([word]))
    launcher, what, options = words[:at], words[at], words[at + 1 :]
    if "--config_file" in launcher:
        config_file(launcher[launcher.index("--config_file") + 1])
    if what.endswith(".py"):
        if (call := OTHER_NAME.search((ROOT / what).read_text(encoding="utf-8"))) is None:
            return Command(load_file(ROOT / what).main, what, options)
        options = [*re.findall(r'"([\w-]+)"', call[0]), *options]
    verb, name, options = find(options)
    if "--accelerate_config" in options:
        options = split(options)[-1]
    return Command(import_module(verb.module).main, name.removeprefix("tokalign "), options)


def block_commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks that run something of ours, split as a shell does."""
    text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    return _commands(text.replace("\\\n", " "))


def indented_commands(text: str) -> list[list[str]]:
    """The indented command lines of a docstring, or of the comment that a file opens with."""
    text = text.replace("\\\n", " ")
    start = r"^\s+((?:[A-Z_]+=\S+ )*(?:tokalign|python|accelerate) .*)$"
    return _commands("\n".join(re.findall(start, text, re.MULTILINE)))


def comment(file: Path) -> str:
    """The comment that a file opens with, without its number signs."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in lines if line.startswith("#"))


def named_in(page: Path) -> list[list[str]]:
    """The commands in a page's running text, such as `tokalign recipes`; what must be given may be left out there."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(span) for span in re.findall(r"`(tokalign [a-z][^`|…]*)`", text)]


def _commands(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if is_ours(words := shlex.split(line, comments=True))]


def load_file(path: Path) -> Any:
    """A script that is no verb, as a module."""
    name = f"documented_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
