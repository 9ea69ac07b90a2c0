"""A folder under runs/ that a documented command reads is one that a command before it writes, or the quickstart."""

from __future__ import annotations

import ast
import json
import shlex
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import ROOT, block_commands, command, comment, indented_commands
from tests.cli.test_documented_commands import LEAVES, PAGES
from tests.test_recipes import RECIPES
from tokalign.cli import quickstart, stages
from tokalign.cli.ledger_models import THREADS
from tokalign.cli.main import parser_of

PARTS = {"pairs": ("pairs", "positive", "negative")}  # a verb that writes several stages, and no stage beside them
QUICKSTART = Path("runs/quickstart")
# These show single commands; the other pages go through theirs in order
WALKS = [page for page in PAGES if page not in (ROOT / "recipes" / "README.md", ROOT / "docs" / "scale.md")]


def written(verb: str, folder: str) -> set[Path]:
    return {Path(folder, part) for part in PARTS.get(verb, ("",))}


def read_and_written(words: list[str]) -> tuple[set[Path], set[Path]]:
    """Folders under runs/ that a command line names, its YAML's included: those it reads, those it writes."""
    reads: set[Path] = set()
    writes: set[Path] = set()
    called = command(words)
    for group in called.read():
        for option in fields(group):
            value = getattr(group, option.name)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and (at := text.find("runs/")) in (0, text.find("=") + 1):
                    out = option.name.startswith("output")
                    (writes if out else reads).update(written(called.verb if out else "", text[at:]))
    return reads, writes


def is_made(folder: Path, made: set[Path]) -> bool:
    return any(folder.is_relative_to(one) for one in made)


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.name)
def test_a_page_reads_what_it_has_written(page: Path) -> None:
    """A run that a page has written nothing into yet is the reader's own, and it does not write what it read there."""
    made: set[Path] = set()
    own: set[Path] = set()
    trained = {Path(yaml.safe_load(file.read_text())["output_dir"]) for file in RECIPES}  # by recipes that it points to
    for words in block_commands(page):
        if "--help" not in words:
            reads, writes = read_and_written(words)
            missing = {folder for folder in reads if not is_made(folder, made | trained)}
            assert not {folder.parts[:2] for folder in missing} & {folder.parts[:2] for folder in made}, missing
            own, made = own | missing, made | writes
    assert not [folder for folder in own if is_made(folder, made)]


def test_the_laptops_recipes_read_what_one_of_them_writes() -> None:
    """One set for all methods: what a YAML starts from another one writes, or a command in a header."""
    files = [file for file in RECIPES if file.parent.name == "smollm2-135m-instruct"]
    both = [read_and_written(words) for file in files for words in indented_commands(comment(file))]
    reads, made = (set().union(*folders) for folders in zip(*both, strict=True))
    by_benchmarks = {folder for folder in reads if not is_made(folder, made)}  # as their headers say
    assert by_benchmarks == {
        Path("runs/smollm2-snips/pairs"),
        Path("runs/smollm2-svamp/cut"),  # by a line of Python
        *(Path("runs/smollm2-gsm8k", f"{name}.jsonl") for name in ("pairs", "positive", "negative")),
    }
    assert {folder.parts[1] for folder in made} == {"smollm2-svamp", "smollm2-snips", "smollm2-gsm8k", "svamp", "snips"}


def test_what_the_quickstart_is_said_to_leave_is_there(tmp_path, monkeypatch) -> None:
    threads: list[int] = []
    (tmp_path / "model").mkdir()
    out = tmp_path / QUICKSTART
    monkeypatch.setattr(stages, "call", lambda verb, words: None)
    monkeypatch.setattr(quickstart, "finish", lambda *arguments: None)
    monkeypatch.setattr(quickstart, "trained_model", lambda preset: tmp_path / "model")
    monkeypatch.setattr(quickstart.torch, "set_num_threads", threads.append)
    quickstart.main(quickstart.QuickstartArguments(output_dir=str(out)))
    assert threads == [THREADS]  # whatever the machine and its environment say

    made = {QUICKSTART / "base"} if (out / "base").is_dir() else set()
    for stage in json.loads((out / "state.json").read_text()).values():
        words = shlex.split(stage["command"])
        if "--output_dir" in words:
            folder = Path(words[words.index("--output_dir") + 1])
            made |= written(words[1], str(folder.relative_to(tmp_path)))

    texts = [comment(file) for file in (ROOT / "recipes" / "ledger").glob("*.yaml") if file.stem != "quickstart"]
    modules = [find_spec(verb.module).origin for verb in LEAVES] + [str(ROOT / "benchmarks" / "peers" / "tdpo.py")]
    texts += [ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8"))) or "" for file in modules]
    named = {folder for text in texts for words in indented_commands(text) for folder in read_and_written(words)[0]}
    left = {folder for folder in named if folder.is_relative_to(QUICKSTART)}
    assert QUICKSTART / "base" in left and QUICKSTART / "preferences" / "negative" in left
    assert not {folder for folder in left if not is_made(folder, made)}

    benchmarks = {folder.parts[2] for folder in named if folder.is_relative_to("runs/benchmarks")}
    assert benchmarks == {"routing_ledger", "structured_ledger", "treg_ledger"}
    for name in benchmarks:  # and they write there if nobody says otherwise
        (arguments,) = parser_of(import_module(f"benchmarks.experiments.{name}").main).dataclass_types
        assert arguments.output_dir == f"runs/benchmarks/{name}"
