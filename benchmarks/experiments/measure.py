"""Clocks, peaks of memory and random models of the speed benchmarks."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of a call, with what it has left on a GPU finished."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(steps: dict[str, Callable[[], object]], pairs: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call of two functions that take turns (and turns at going first), after two pairs to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for pair in range(pairs + 2):
        for name in [*steps] if pair % 2 else [*steps][::-1]:
            taken = timed(steps[name], device)
            if pair >= 2:
                seconds[name].append(taken)
    return seconds


def resident(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (now) or VmHWM (most since the last reset, or ever).

    Not getrusage: a child's ru_maxrss starts at its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; measure on Linux or on a GPU.")


def peak_bytes(device: str) -> int:
    """Peak memory of this process so far: allocated on the device, or resident on a CPU."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def extra_peak(function: Callable[[], object], device: str) -> int:
    """Bytes that `function` needs at its peak above what is held before it."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or they hide what the run needs
        Path("/proc/self/clear_refs").write_text("5")
        held = resident("VmRSS")
    else:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return peak_bytes(device) - held


def random_llama(folder: str | Path, arguments: Any, **shape: int) -> str:
    """Save a Llama with random weights, of the hidden_size, layers, dtype and device in `arguments`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **shape,
    )
    with torch.device(arguments.device):  # a real shape would take minutes on the host
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    model.save_pretrained(folder)
    return str(folder)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for every id; 0 is padding, 1 the end of a sequence."""
    words = {"<pad>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
