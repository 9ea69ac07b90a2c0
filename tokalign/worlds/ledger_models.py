"""Base models of the ledger world: two Llama architectures, about 1:20 in parameters, and a cache of trained ones.

Nothing is downloaded and no weights are in the repository: `trained_model` trains a preset once with recipes/sft.py and
keeps it outside the repository under a key made of everything that decides the result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import LlamaConfig, PreTrainedTokenizerBase

REPOSITORY = Path(__file__).resolve().parents[2]
# Heads of 32 dimensions: vLLM's CPU attention has no smaller ones.
PRESETS: dict[str, dict[str, Any]] = {
    "ledger-slm": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 2},
    "ledger-llm": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8},
}
# The weak one, trained for longer in a world with drafts to rewrite (data/ledger.py --draft_share): T-REG's eval model.
PRESETS["ledger-slm-revise"] = PRESETS["ledger-slm"]


def model_config(preset: str, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Architecture of a preset for this tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
        **PRESETS[preset],
    )


def write_untrained(preset: str, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write tokenizer and architecture of `preset` to `path`; weights come from `recipes/sft.py --from_scratch`."""
    tokenizer.save_pretrained(path)
    model_config(preset, tokenizer).save_pretrained(path)


def cache_folder() -> Path:
    """Where trained models are kept: `$TOKALIGN_CACHE`, else `$XDG_CACHE_HOME/tokalign`, else `~/.cache/tokalign`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tokalign"
    return Path(os.environ.get("TOKALIGN_CACHE", default))


def cache_key(preset: str, world: list[str]) -> str:
    """Key of a trained model: recipe YAML, builder arguments, library versions and the source code that decides it."""
    digest = hashlib.sha256(repr((world, torch.__version__, transformers.__version__, trl.__version__)).encode())
    for file in (
        f"recipes/ledger/{preset.replace('ledger', 'base').replace('-', '_')}.yaml",
        "recipes/sft.py",
        "data/ledger.py",
        "tokalign/worlds/ledger.py",
        "tokalign/worlds/ledger_models.py",
    ):
        digest.update((REPOSITORY / file).read_bytes())
    return f"{preset}-{digest.hexdigest()[:16]}"


def trained_model(preset: str, *, world: list[str] | None = None) -> Path:
    """Folder of the trained `preset`, trained now if the cache does not have it (minutes; the YAMLs say how many).

    Args:
        preset: "ledger-slm", "ledger-llm" or "ledger-slm-revise".
        world: extra command-line arguments of data/ledger.py; "ledger-slm-revise" is made for
            `["--draft_share", "0.6"]`.

    Raises:
        subprocess.CalledProcessError: the builder or the recipe failed; its output is on the screen.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}: use one of {', '.join(PRESETS)}.")
    world = world or []
    target = cache_folder() / cache_key(preset, world)
    if target.exists():
        return target
    cache_folder().mkdir(parents=True, exist_ok=True)
    work = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    recipe = REPOSITORY / "recipes" / "ledger" / f"{preset.replace('ledger', 'base').replace('-', '_')}.yaml"
    builder = [sys.executable, str(REPOSITORY / "data" / "ledger.py"), "--output_dir", str(work / "world")]
    subprocess.run([*builder, "--train", "1", "--validation", "1", "--test", "1", *world], check=True)
    subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "recipes" / "sft.py"), "--config", str(recipe)),
            *("--model_name_or_path", str(work / "world" / preset), "--dataset_name", str(work / "world" / "sft")),
            *("--output_dir", str(work / "model")),
        ],
        check=True,
    )
    try:
        os.rename(work / "model", target)  # whole or absent: a killed training leaves no half model in the cache
    except OSError:
        if not target.exists():  # otherwise another process finished first, with the same result
            raise
    shutil.rmtree(work, ignore_errors=True)
    return target
