"""Trained base models of the ledger world, from a cache.

Nothing is downloaded and no weights are in the repository: `trained_model` trains a preset once and keeps it outside
the repository under a key made of everything that decides the result.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import accelerate
import torch
import transformers
import trl
import yaml

from tokalign.cli.main import find
from tokalign.stage.resources import recipe
from tokalign.worlds.ledger_models import BASES, PRESETS, RICH_RECIPES

# CPU threads of the trainings here and of the quickstart: sums are split among them, so their number changes the last
# digits of every gradient, and after some hundred steps the answers.
THREADS = 2
WORLD = ("ledger", "ledger_problems", "ledger_rich", "ledger_models")
SOURCES = ("tokalign.cli.train", "tokalign.cli.train_sft", *(f"tokalign.worlds.{name}" for name in WORLD))


def cache_folder() -> Path:
    """Where trained models are kept: `$TOKALIGN_CACHE`, else `$XDG_CACHE_HOME/tokalign`, else `~/.cache/tokalign`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tokalign"
    return Path(os.environ.get("TOKALIGN_CACHE", default))


def cache_key(preset: str, world: list[str], seed: int = 0) -> str:
    """Key of a trained model, made of what its weights depend on.

    That is the seed, the recipe's settings, the builder's arguments, the code of both (their comments not), the
    libraries that compute or order the batches, the number of threads, and the kind of CPU, by which PyTorch picks its
    kernels.
    """
    libraries = tuple(library.__version__ for library in (torch, transformers, trl, accelerate))
    cpu = (THREADS, platform.machine(), torch.backends.cpu.get_cpu_capability())
    recipe_settings = yaml.safe_load(_recipe(preset, world).read_text(encoding="utf-8"))
    digest = hashlib.sha256(repr((world, seed, libraries, cpu, sorted(recipe_settings.items()))).encode())
    builder = find(["data", "ledger"])[0].module
    for module in (builder, *SOURCES):
        digest.update(ast.dump(ast.parse(_source(module).read_text(encoding="utf-8"))).encode())
    return f"{preset}-{digest.hexdigest()[:16]}"


def _recipe(preset: str, world: list[str]) -> Path:
    own = preset.replace("ledger", "base").replace("-", "_")
    return recipe(f"ledger/{RICH_RECIPES.get(preset, own) if 'rich' in world else own}")


def _source(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def base_model(preset: str, *, world: str = "plain", seed: int = 0) -> Path:
    """`trained_model` on the data that the preset has in a world: "plain" or "rich"."""
    return trained_model(preset, world=list(BASES[world][preset]), seed=seed)


def trained_model(preset: str, *, world: list[str] | None = None, seed: int = 0) -> Path:
    """Folder of the trained `preset`, trained now if the cache does not have it (minutes; the YAMLs say how many).

    Args:
        preset: "ledger-slm", "ledger-llm" or "ledger-slm-revise".
        world: extra options of `tokalign data ledger`; "ledger-slm-revise" is made for `["--draft_share", "0.6"]`.
        seed: of its data and its training; 0 is the seeds that builder and recipe have.

    Raises:
        subprocess.CalledProcessError: the builder or the training failed; its output is on the screen.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}: use one of {', '.join(PRESETS)}.")
    world = world or []
    target = cache_folder() / cache_key(preset, world, seed)
    if target.exists():
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    work = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    seeded = ("--seed", seed) if seed else ()
    sizes = ("--train", 1, "--validation", 1, "--test", 1)
    _run("data", "ledger", "--output_dir", work / "world", *sizes, *world, *seeded)
    data = ("--model_name_or_path", work / "world" / preset, "--dataset_name", work / "world" / "sft")
    _run("sft", "--config", _recipe(preset, world), *data, "--output_dir", work / "model", *seeded)
    try:
        os.rename(work / "model", target)  # whole or absent: a killed training leaves no half model in the cache
    except OSError:
        if not target.exists():  # otherwise another process finished first, with the same result
            raise
    shutil.rmtree(work, ignore_errors=True)
    return target


def _run(*words: object) -> None:
    """`tokalign …` in a process of its own, so that the weights owe nothing to what the caller has done before."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    # Threads that wait actively take the core from the one that they wait for, where other work runs beside them: ten
    # times as long, with the same figures
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    subprocess.run([sys.executable, "-m", "tokalign", *map(str, words)], check=True, env=environment)
