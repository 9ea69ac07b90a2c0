"""Files that ship with the package: recipes and accelerate configurations.

In a clone they stand at the top level, where people look for them; a wheel carries the same folders inside the package.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def resource(path: str) -> Path:
    """The file or folder `path`, e.g. "recipes/ledger/sft.yaml".

    Raises:
        FileNotFoundError: the package does not ship it.
    """
    for root in (PACKAGE, PACKAGE.parent):
        if (root / path).exists():
            return root / path
    raise FileNotFoundError(f"tokalign ships no {path}; `tokalign recipes` lists what there is.")


def resource_names(folder: str, ending: str) -> list[str]:
    """Paths below a folder of the package, relative to it, of the files with this ending."""
    root = resource(folder)
    return sorted(str(file.relative_to(root)) for file in root.rglob(f"*{ending}"))


def recipe(name: str) -> Path:
    """The shipped YAML of a name such as "recipes/ledger/sft.yaml" or "ledger/sft".

    Raises:
        FileNotFoundError: the package does not ship it.
    """
    path = f"recipes/{name.removeprefix('recipes/').removesuffix('.yaml')}.yaml"
    try:
        return resource(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {name}; `tokalign recipes` lists those that are shipped.") from None
