"""Private names in the code of classes and files, for the contract tests."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable

OF_TUPLES = {"_replace", "_asdict", "_make", "_fields"}  # which Python documents of named tuples


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_TUPLES


def used(tree: ast.AST) -> set[str]:
    """Private names that a piece of code reads or sets on anything, imports, or passes as an argument's name."""
    names: set[str | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.keyword):
            names.add(node.arg)
        elif isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and "tokalign" not in (node.module or "")
        ):
            names |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in names if name and is_private(name)}


def members(node: ast.ClassDef) -> set[str]:
    """Names that the body of a class defines."""
    names: set[str] = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(item.name)
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def tree_of(cls: type) -> ast.ClassDef:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node


def defined(classes: Iterable[type]) -> set[str]:
    """Names that classes define, or set on `self`."""
    names: set[str] = set()
    for cls in classes:
        node = tree_of(cls)
        names |= members(node)
        for part in ast.walk(node):
            if (
                isinstance(part, ast.Attribute)
                and isinstance(part.ctx, ast.Store)
                and ast.unparse(part.value) == "self"
            ):
                names.add(part.attr)
    return names


def shared_names(ours: type) -> set[str]:
    """Private names that our classes of an inheritance say and a dependency's classes of it define.

    So too a name of ours that a dependency takes into use later, for something else.
    """
    line = [cls for cls in ours.__mro__ if cls is not object]
    mine = [cls for cls in line if cls.__module__.startswith("tokalign.")]
    theirs = [cls for cls in line if cls.__module__.partition(".")[0] in ("trl", "transformers")]
    ours_say = {name for node in map(tree_of, mine) for name in used(node) | members(node) if is_private(name)}
    return ours_say & defined(theirs)
