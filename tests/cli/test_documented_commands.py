"""Every command in the documentation is one that its verb's own parser reads."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, block_commands, command, indented_commands, named_in
from tokalign.cli.main import VERBS, Verb, find, parser_of

PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEAVES = [leaf for verb in VERBS.values() for leaf in (verb.parts or (verb,))]


def shown(words: list[str]) -> str:
    return " ".join(words)[:70]


@pytest.mark.parametrize("words", [words for page in PAGES for words in block_commands(page)], ids=shown)
def test_command_of_a_page(words: list[str]) -> None:
    if "--help" not in words:
        command(words).read()


@pytest.mark.parametrize("verb", LEAVES, ids=lambda verb: verb.module)
def test_commands_of_a_help_text(verb: Verb) -> None:
    spec = find_spec(verb.module)
    assert spec is not None and spec.origin is not None
    commands = indented_commands(ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or "")
    assert [words for words in commands if "tokalign" in words], f"{verb.module} shows no command"
    for words in commands:
        command(words).read()


@pytest.mark.parametrize("words", [words for page in PAGES for words in named_in(page)], ids=shown)
def test_command_named_in_running_text(words: list[str]) -> None:
    if words[1].startswith("-") or words[1].isupper():
        return
    verb, _, options = find(words[1:])
    if not verb.parts and (named := [word for word in options if word.startswith("--") and word != "--help"]):
        known = parser_of(command(words).main)._option_string_actions
        assert set(named) <= {*known, "--config", "--accelerate_config", "--num_processes"}
