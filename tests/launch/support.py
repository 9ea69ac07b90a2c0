"""Start a script through `accelerate launch` as a user does: on the CPU, on a free port, with the output captured.

Also small finished stages on disk for such scripts to train on.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tokalign.stage.hashes import tokenizer_hash
from tokalign.stage.manifest import write_manifest
from tokalign.stage.shards import shard_name

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
PROBE = Path(__file__).parent / "probe.py"


def launch_environment() -> dict[str, str]:
    """Environment of a launched process: the virtual environment's own tools and DeepSpeed builds, no GPU, no hub."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    return environment | {
        # DeepSpeed builds its extensions once a virtual environment (the first launch takes a minute or two longer)
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", "")]),  # ninja
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A port that nothing on this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch_command(config: str, script: Path, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """`accelerate launch` for a file of accelerate_configs/; fp32, since the CPU runs compare losses to 1e-5."""
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / config),
        "--mixed_precision",
        "no",
        *options,
        str(script),
        *arguments,
    ]


def wait(processes: Sequence[subprocess.Popen], *, timeout: float = 600) -> None:
    """Wait for launched processes; a failed one raises AssertionError with the end of its output.

    The first failure ends the wait: its peers would otherwise sit in a rendezvous for minutes.
    """
    outputs: list[str] = [""] * len(processes)

    def read(index: int) -> None:  # a full pipe would stop the process
        outputs[index] = processes[index].communicate()[0]

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(processes))]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    unfinished = [process for process in processes if process.poll() is None]
    failed = [process for process in processes if process.poll()]
    for process in unfinished:
        process.kill()
    for reader in readers:
        reader.join()
    for process, output in zip(processes, outputs, strict=True):
        assert process not in failed, f"{' '.join(process.args)}\n{output[-6000:]}"
    if unfinished:
        extensions = launch_environment()["TORCH_EXTENSIONS_DIR"]
        pytest.fail(f"No end after {timeout} s; after an interrupted compilation delete {extensions}/*/lock.")


def launch(config: str, script: Path, *arguments: str, num_processes: int = 2) -> None:
    """Run `script` under `config` with `num_processes` on this machine."""
    options = ("--num_processes", str(num_processes), "--main_process_port", str(free_port()))
    wait([start(launch_command(config, script, arguments, options))])


def launch_plan(config: str, folder: str | Path, runs: Sequence[dict], *, num_processes: int = 2) -> list[dict]:
    """Carry out `runs` (tests/launch/probe.py) in one launch; its plan and report are kept in `folder`."""
    plan, report = Path(folder) / "plan.json", Path(folder) / "report.json"
    plan.write_text(json.dumps(runs))
    launch(config, PROBE, str(plan), str(report), num_processes=num_processes)
    return json.loads(report.read_text())


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=launch_environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def write_preferences(folder: str | Path, tokenizer_path: str, *, rows: int) -> str:
    """A finished preference stage of sums with a right and a wrong answer, with contrastive scores and token rewards.

    Returns its path.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    draw = random.Random(0)
    records = []
    for row in range(rows):
        left, right = draw.randint(2, 30), draw.randint(2, 30)
        texts = {"prompt": f"{left} + {right} = ", "chosen": f"{left + right}", "rejected": f"{left + right + 1} or so"}
        ids = {side: tokenizer(text, add_special_tokens=False)["input_ids"] for side, text in texts.items()}
        for side in ("chosen", "rejected"):
            ids[side].append(tokenizer.eos_token_id)
        scores = {f"{side}_contrast": [draw.random() for _ in ids[side]] for side in ("chosen", "rejected")}
        rewards = {f"{side}_token_reward": [draw.random() - 0.5 for _ in ids[side]] for side in ("chosen", "rejected")}
        every = {f"{side}_ids": i for side, i in ids.items()} | scores | rewards
        records.append({"id": str(row), **texts, **every})
    return _write_stage(folder, records, tokenizer, {"signals": ["contrast", "token_reward"], "beta": 1.0})


def write_sft(folder: str | Path, tokenizer_path: str, *, rows: int) -> str:
    """A finished SFT stage of the same kind. Returns its path."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    records = []
    for row in range(rows):
        prompt, completion = f"{row} + {row} = ", f"{2 * row}"
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        completion_ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        records.append(
            {
                "id": str(row),
                "prompt": prompt,
                "completion": completion,
                "prompt_ids": prompt_ids,
                "completion_ids": completion_ids,
                "input_ids": prompt_ids + completion_ids,
                "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
            }
        )
    return _write_stage(folder, records, tokenizer, {})


def _write_stage(folder: str | Path, records: list[dict], tokenizer: PreTrainedTokenizerBase, extra: dict) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(Path(folder) / shard_name(0, 1))
    manifest = {"status": "complete", "rows": len(records), "shards": 1, "tokenizer_hash": tokenizer_hash(tokenizer)}
    write_manifest(folder, manifest | extra)
    return str(folder)
