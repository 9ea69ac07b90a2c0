"""tokalign touches private names of its dependencies in tokalign/internals/ alone, or lists them there."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from torch.nn.parallel import DistributedDataParallel

from tests.contracts.names import is_private, members, used
from tokalign.internals import datasets, transformers, trl

PACKAGE = Path(__file__).parents[2] / "tokalign"
FILES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}

# Modules that a dependency documents; its top level is always one.
DOCUMENTED = {
    "accelerate.logging",
    "accelerate.utils",
    "transformers.utils",
    "trl.rewards",
    "vllm.config",
    "vllm.lora.request",
    "vllm.sampling_params",
}
DEPENDENCIES = {"accelerate", "datasets", "deepspeed", "peft", "transformers", "trl", "vllm"}
LISTED = {
    *datasets.DATASET_USED,
    *transformers.MODEL_DEFINED,
    *transformers.TRAINER_OVERRIDDEN,
    *trl.CREDIT_USED,
    *trl.DPO_OVERRIDDEN,
    *trl.DPO_USED,
    *trl.GRPO_OVERRIDDEN,
    *trl.GRPO_USED,
    *trl.OTHERS_USED,
    *trl.SCRIPTS_USED,
}


def outside() -> dict[Path, ast.Module]:
    """Files that may not touch them; vLLM's model classes are subclassed in a file of their own."""
    kept = PACKAGE / "routing" / "decode" / "vllm" / "models.py"
    return {file: tree for file, tree in FILES.items() if file != kept and "internals" not in file.parts}


def test_undocumented_modules_are_imported_by_internals_alone() -> None:
    wrong = []
    for file, tree in outside().items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.partition(".")[0] in DEPENDENCIES and "." in name and name not in DOCUMENTED:
                    wrong.append(f"{file.relative_to(PACKAGE)}:{node.lineno} imports {name}")
    assert not wrong


def test_private_names_are_ours_or_listed() -> None:
    ours: set[str] = set()
    for tree in FILES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                ours |= members(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_private(node.attr):
                ours |= {node.attr} if ast.unparse(node.value) == "self" else set()
    foreign = {name: str(file.relative_to(PACKAGE)) for file, tree in outside().items() for name in used(tree) - ours}
    assert not {name: file for name, file in foreign.items() if name not in LISTED}


def test_torch_reads_what_scripts_note_on_a_model() -> None:
    source = inspect.getsource(DistributedDataParallel.__init__)
    assert all(f'module, "{name}"' in source or f"module.{name}" in source for name in trl.SCRIPTS_USED)
