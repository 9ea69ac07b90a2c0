"""Help is read from the source: it must say what the imported classes say, and fit a screen."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from inspect import get_annotations, signature

import pytest

from tests.cli.commands import ROOT, load_file
from tokalign.cli.help import overview, verb_help
from tokalign.cli.main import GROUPS, VERBS, Verb, main_of, parser_of

BENCHMARKS = sorted(
    p
    for p in (ROOT / "benchmarks").glob("**/*.py")
    if "_dataclasses()" in p.read_text() or "_and_config()" in p.read_text()
)
LEAVES = [leaf for verb in VERBS.values() for leaf in (verb.parts or (verb,))]


def own_fields(module: str) -> list[str]:
    """The options of a verb that our own dataclasses define; those of TRL's are behind --help_all."""
    classes = [
        parameter.annotation for parameter in signature(import_module(module).main, eval_str=True).parameters.values()
    ]
    names = []
    for kind in classes:
        ours = [base for base in kind.__mro__ if base.__module__.split(".")[0] == "tokalign"]
        defined = {name for base in ours for name in get_annotations(base)}
        names += [option.name for option in dataclasses.fields(kind) if option.init and option.name in defined]
    return names


@pytest.mark.parametrize("verb", LEAVES, ids=lambda verb: verb.module)
def test_help_lists_exactly_the_options(verb: Verb) -> None:
    text = verb_help("tokalign it", verb.module)
    shown = re.findall(r"^  --(\w+) \(", text, re.MULTILINE)
    assert sorted(shown) == sorted(own_fields(verb.module))
    assert max(map(len, text.splitlines())) <= 120
    without = [name for name in shown if re.search(rf"^  --{name} \(.*\)\n(?!      \S)", f"{text}\n", re.MULTILINE)]
    assert not without, f"{verb.module}: no help text for {', '.join(without)}"


def test_the_overview_fits_a_screen() -> None:
    lines = overview(GROUPS).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("verb", LEAVES, ids=lambda verb: verb.module)
def test_the_full_help_of_a_verb_is_printed(verb: Verb) -> None:
    text = parser_of(main_of(verb.module)).format_help()  # argparse fails here at a % in any help text
    assert all(f"--{name}" in text for name in own_fields(verb.module))


def test_the_help_of_a_benchmark_is_printed() -> None:
    assert len(BENCHMARKS) > 10
    for file in BENCHMARKS:
        if file.parent.name == "peers":
            module = load_file(file)
        else:
            module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        assert "usage:" in parser_of(module.main).format_help(), file
