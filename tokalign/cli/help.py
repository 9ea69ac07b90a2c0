"""Help that opens at once: options are read from the source, not from imported classes.

TRL's configurations take seconds to import. A verb's own options are dataclass fields with literal defaults and help
texts, so the source says all of them; where a class comes from another package its name is given, and `--help_all`
prints everything.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

WIDTH = 110


class Option(NamedTuple):
    """One dataclass field as an option."""

    name: str
    type: str
    default: str | None  # None: it must be given
    text: str


def overview(groups: Mapping[str, Sequence[Any]], usage: str = "tokalign VERB [options]") -> str:
    """The verbs by group, a line each."""
    lines = [f"usage: {usage}", ""]
    for group, verbs in groups.items():
        lines.append(f"{group}:")
        lines += [f"  {verb.name:<17}{verb.text}" for verb in verbs]
    return "\n".join([*lines, "", f"`{usage.removesuffix(' [options]')} --help` explains one."])


def verb_help(command: str, module: str) -> str:
    """What a verb does and its options, by the dataclass that they belong to."""
    source = _Source(module)
    parts = [f"usage: {command} [options]   (or all of them in a flat YAML: --config FILE)", "", source.doc.strip(), ""]
    foreign: list[str] = []
    if source.main is None:  # a trainer's own file: what all trainings share comes before it
        parts += _section(_Source("tokalign.cli.train"), "DataArguments", foreign)
        foreign.append("trl.ModelConfig")
    for name in source.main_arguments():
        parts += _section(source, name, foreign)
    launch = "--accelerate_config NAME (zero2, zero3, ddp, …) runs it on many processes, as --num_processes says."
    parts += textwrap.wrap(launch, WIDTH)
    if foreign:
        parts += textwrap.wrap(f"All options of {', '.join(foreign)} too: --help_all lists them.", WIDTH)
    return "\n".join(parts)


def _section(source: _Source, name: str, foreign: list[str]) -> list[str]:
    title, options = source.options(name, foreign)
    if not options:
        return []
    lines = [f"{title}:"]
    for option in options:
        default = "required" if option.default is None else f"default {option.default}"
        head = f"  --{option.name} ({option.type}; {default})"
        lines += [head, *textwrap.wrap(option.text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return [*lines, ""]


class _Source:
    """A module's text: its docstring, what its `main` takes, the fields of its dataclasses."""

    def __init__(self, module: str):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"There is no module {module}.")
        self.tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        self.doc = ast.get_docstring(self.tree) or ""
        functions = [node for node in self.tree.body if isinstance(node, ast.FunctionDef)]
        self.main = next((function for function in functions if function.name == "main"), None)
        self.constants = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def main_arguments(self) -> list[str]:
        """Names of the classes that `main` takes; of a trainer's own file, which has none, its configuration."""
        if self.main is None:
            return [n.name for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
        return [ast.unparse(argument.annotation) for argument in self.main.args.args if argument.annotation]

    def options(self, name: str, foreign: list[str]) -> tuple[str, list[Option]]:
        """Title and options of a dataclass, its bases' first; classes of other packages are named in `foreign`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                title = (ast.get_docstring(node) or name).strip().splitlines()[0].rstrip(".")
                title = re.sub(r"Configuration class for the \[`(\w+)`\]", r"Options of \1", title)  # TRL's form
                own = list(_fields(node, self.constants))
                known = {option.name for option in own}
                options: list[Option] = []
                for base in node.bases:  # what two bases define is the first one's, as in Python
                    options += [o for o in self.options(ast.unparse(base), foreign)[1] if o.name not in known]
                    known |= {option.name for option in options}
                return title, options + own
            if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
                if node.module.split(".")[0] == "tokalign":
                    return _Source(node.module).options(name, foreign)
                foreign.append(f"{node.module}.{name}")
                return name, []
        return name, []


def _fields(node: ast.ClassDef, constants: Mapping[str, ast.expr]) -> Iterator[Option]:
    for statement in node.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        default, text, kind = None, "", ast.unparse(statement.annotation).replace("'", "")
        value = statement.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
            keywords = {keyword.arg: keyword.value for keyword in value.keywords}
            if "default" in keywords:
                default = _said(keywords["default"], constants)
            elif "default_factory" in keywords:
                factory = keywords["default_factory"]
                default = _said(factory.body, constants) if isinstance(factory, ast.Lambda) else "empty"
            if isinstance(metadata := keywords.get("metadata"), ast.Dict):
                said = {ast.literal_eval(k): v for k, v in zip(metadata.keys, metadata.values, strict=True) if k}
                text = ast.literal_eval(said["help"]) if "help" in said else ""
                kind = _said(said["choices"], constants, "|") if "choices" in said else kind
        elif value is not None:
            default = _said(value, constants)
        yield Option(statement.target.id, kind, default, text)


def _said(value: ast.expr, constants: Mapping[str, ast.expr], between: str = " ") -> str:
    """A default as a reader types it: lists as words, None as unset, a constant of the module by its value."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "list" and len(value.args) == 1:
        value = value.args[0]  # list(STAGES)
    if isinstance(value, ast.Name):
        value = constants.get(value.id, value)
    try:
        literal = ast.literal_eval(value)
    except ValueError:  # an expression, such as 1 << 18
        return ast.unparse(value)
    if literal is None:
        return "unset"
    return between.join(map(str, literal)) if isinstance(literal, list | tuple | dict) and literal else str(literal)
