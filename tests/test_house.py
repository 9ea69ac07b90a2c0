"""The rooms of the package: which may import which, and no circles. A function's imports count, and a type checker's.

`ROOMS` is the house as a table. Whoever needs an import that it lacks moves the function down, to where both may have
it; an entry is added only with its reason.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import tokalign

ROOT = Path(tokalign.__file__).parent
GROUND = {"internals", "lazy", "losses", "prompts", "stage", "statistics"}  # everybody may import these
ROOMS: dict[str, set[str]] = {
    "internals": set(),
    "lazy": set(),
    "losses": set(),
    "statistics": set(),
    "stage": {"internals"},
    "prompts": {"stage"},
    "data": {"stage", "prompts"},
    # A builder reads the final answer out of a worked solution by the rule that later verifies answers.
    "data.builders": {"data", "stage", "prompts", "rewards"},
    "generation": {"stage", "prompts"},
    "rewards": {"stage"},
    "signals": {"generation", "data"},
    # Structured GRPO's greedy test decodes by the grammar of a schema. Generation lies below signals: nothing runs up.
    # Every few steps a trainer writes a page of what each token was credited with; view knows nothing of trainers.
    "trainers": {"losses", "signals", "rewards", "data", "generation", "view"},
    "routing.labels": {"generation", "data", "rewards"},
    "routing.router": {"routing.labels"},
    "routing.decode": {"routing.router", "generation"},
    # A request becomes the `SamplingParams` that the decoder takes.
    "routing.serve": {"routing.decode", "generation"},
    "routing": set(),  # its public names, at first use
    "evaluation": {"generation", "rewards", "routing.decode"},
    "view": {"stage", "signals.registry", "statistics"},
    "worlds": {"stage", "data"},
}


def modules() -> dict[str, Path]:
    names = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "routing" or parts[:2] == ["data", "builders"] else 1])


def imports(file: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports; of an `__init__` those that it imports at once, not at first use."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if file.name == "__init__.py" else ast.walk(tree)
    used = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides its room; write it in full."
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            used |= {name if name in known else str(node.module) for name in names}
    return used & (known - {"tokalign"})  # the package itself holds the version, and all else at first use


FILES = modules()
GRAPH = {name: imports(file, set(FILES)) for name, file in FILES.items()}


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module != "tokalign"
        and (room := room_of(module)) not in ("cli", "__main__")
        and (target := room_of(other)) != room
        if target not in (GROUND if room not in GROUND else set()) | ROOMS[room]
        and other.removeprefix("tokalign.") not in ROOMS[room]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_file_imports_itself_through_others() -> None:
    TopologicalSorter(GRAPH).prepare()
