r"""Every speed and memory ratio that this package sets itself a goal for, growth curves, and the share of the ideal.

    python benchmarks/speed.py                                              # CPU, half an hour on two idle cores, 20 GB
    python benchmarks/speed.py --size quick                                 # minutes: whether everything runs
    python benchmarks/speed.py --device cuda --dtype bfloat16 --size real   # one 80 GB GPU: shapes of 1.5B and 8B

Runs the speed benchmarks beside this file one after the other, each in processes of its own (so that no peak of memory
is another's), with the arguments in PARTS, and collects their ratios (speed_ratios.py). What is compared takes turns in
one process; how often, and which of the times counts, is said with each ratio. Measure on an idle machine. A killed run
started again skips the parts that are finished. Writes results.json to `output_dir`; pages/speed.py shows it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ledger_stages import write_json
from rich.console import Console
from rich.table import Table
from speed_ratios import RATIOS, Result, routed_rates
from trl import TrlParser


class Part(NamedTuple):
    """One run of a benchmark.

    Attributes:
        script: beside this file.
        file: its results, in the run's folder.
        sizes: its arguments by size; a size that is not there is not run.
        takes: which of --device and --dtype it knows.
    """

    script: str
    file: str
    sizes: dict[str, str]
    takes: tuple[str, ...] = ("device", "dtype")


LLAMA_8B = "--hidden_size 4096 --layers 32"
STEP = "--hidden_size 64 --layers 2 --vocab_size 128000 --pairs 3"
STEP_8B = f"{LLAMA_8B} --peft true --vocab_size 32000 128256 --completion_length 512 --pairs 11"
PARTS: dict[str, Part] = {
    "contrast": Part(
        *("contrast.py", "contrast.json"),
        {
            "quick": "--hidden_size 64 --layers 2 --short_rows 8 --long_rows 1 --growth 2 --repeats 2",
            "small": "--growth 4",  # growth.py has the curves
            "real": f"{LLAMA_8B} --intermediate_size 14336 --heads 32 --growth 4 --token_budget 8192",
        },
    ),
    "critical-token DPO step": Part(
        *("preference_step.py", "critical_token_dpo/results.json"),
        {"quick": STEP, "small": "--pairs 11", "real": STEP_8B},
    ),
    "T-REG step": Part(
        *("preference_step.py", "treg/results.json"),
        {name: f"--method treg {rest}" for name, rest in (("quick", STEP), ("small", "--pairs 11"), ("real", STEP_8B))},
    ),
    "rollouts": Part(
        *("rollouts.py", "rollouts.json"),
        {
            "quick": "--vllm false --num_prompts 16 --n 4 --max_tokens 64 --repeats 1",
            "small": "--repeats 3",
            "real": "--hidden_size 2048 --layers 16 --heads 32 --vocab_size 128256 --num_prompts 128 --max_tokens 256",
        },
        ("dtype",),  # where it runs is accelerate's choice
    ),
    "token rewards": Part(
        *("token_rewards.py", "token_rewards.json"),
        {
            "quick": "--hidden_size 64 --layers 2 --rows 4 --vocab_sizes 128256 --repeats 2",
            "small": "--repeats 5",
            "real": f"{LLAMA_8B} --intermediate_size 14336 --heads 32 --rows 128 --token_budget 16384",
        },
    ),
    "structured reward": Part(
        *("structured_reward.py", "structured_reward.json"),
        {"quick": "--completions 200 --rounds 1 --schemas 50", "small": "--rounds 5", "real": "--rounds 5"},
        (),
    ),
    "router": Part(
        *("routed_decoding.py", "router.json"),
        {
            "quick": "--pair tiny 0.5b --router_only true",
            "small": "--pair 1.5b 3b --router_only true",
            "real": "--pair 1.5b 8b --batch_sizes 1 16 64 --router_only true",
        },
    ),
    "routed decoding": Part(
        *("routed_decoding.py", "results.json"),
        {
            "quick": "--pair tiny 0.5b --batch_sizes 1 --new_tokens 9 --repeats 1",
            "small": "--pair 0.5b 3b --batch_sizes 1 --repeats 3",
            "real": "--pair 1.5b 8b --batch_sizes 1 16 64 --new_tokens 100",
        },
    ),
    "routed decoding, batch 16": Part(
        *("routed_decoding.py", "results.json"),
        {"small": "--pair 0.5b 3b --batch_sizes 16 --new_tokens 25 --repeats 2"},
    ),
    "routed decoding, larger LLM": Part(
        *("routed_decoding.py", "results.json"),
        {"small": "--pair 0.5b 7b --batch_sizes 1 --new_tokens 64 --repeats 2"},
    ),
    "growth": Part(
        *("growth.py", "results.json"),
        {
            "quick": "--hidden_size 64 --layers 2 --lengths 64 256 --rows 4 8 --vocab_sizes 8192 131072 --job_rows 16"
            " --repeats 1",
            "small": "--repeats 3",
            "real": "--hidden_size 2048 --layers 16 --heads 32 --fixed_rows 16 --lengths 256 512 1024 2048"
            " --rows 16 32 64 128 --token_budget 8192 --processes 1",
        },
    ),
}


@dataclass
class SpeedArguments:
    """Where and how large."""

    size: Literal["quick", "small", "real"] = field(
        default="small", metadata={"help": "Shapes and repeats: see PARTS; `real` needs a GPU."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models."})
    dtype: str | None = field(
        default=None, metadata={"help": "Weights' type; unset is each benchmark's own (float32, routing bfloat16)."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Some parts of PARTS; all if none is given."})
    output_dir: str = field(default="runs/benchmarks/speed", metadata={"help": "Folder of all results."})


def run_part(name: str, arguments: SpeedArguments) -> Result:
    """Run a part, unless a former run has finished it with the same command, and return its results."""
    part = PARTS[name]
    folder = Path(arguments.output_dir) / name.replace(",", "").replace(" ", "_")
    given = {key: value for key in part.takes if (value := getattr(arguments, key)) is not None}
    options = [*shlex.split(part.sizes[arguments.size]), *(w for k, v in given.items() for w in (f"--{k}", v))]
    command, note = shlex.join([part.script, *options]), folder / "finished.json"
    state = json.loads(note.read_text()) if note.exists() else {}
    if state.get("command") != command:
        note.unlink(missing_ok=True)
        Console().rule(f"[bold]{name}[/bold]: {command}", align="left")
        started = time.perf_counter()
        script = str(Path(__file__).parent / part.script)
        subprocess.run([sys.executable, script, *options, "--output_dir", str(folder)], check=True)
        state = {"command": command, "seconds": round(time.perf_counter() - started, 1)}
        write_json(note, state)
    return {**state, "results": json.loads((folder / part.file).read_text(encoding="utf-8"))}


def collect(runs: dict[str, Result]) -> Result:
    """Ratios, curves and the routed pair's rates out of the parts' results."""
    growth = runs["growth"]["results"]["curves"] if "growth" in runs else []
    measured = {name: run["results"] for name, run in runs.items() if name != "growth"}
    return {
        "parts": {name: {key: run[key] for key in ("command", "seconds")} for name, run in runs.items()},
        "ratios": [ratio for name, result in measured.items() for ratio in RATIOS[PARTS[name].file](result)],
        "curves": growth,
        "routed": [
            rates for name, result in measured.items() if name.startswith("routed") for rates in routed_rates(result)
        ],
    }


def show(results: Result) -> None:
    """The ratios on screen."""
    table = Table("", "compares", "on", "value", "goal", "met", title="Speed and memory")
    for r in results["ratios"]:
        goal = "" if r["goal"] is None else f"{r['goal'][0]} {r['goal'][1]:,g}"
        met = {None: "", True: "yes", False: "[red]no[/red]"}[r["met"]]
        table.add_row(r["name"], r["what"], r["detail"], f"{r['value']:,.4g}", goal, met)
    Console().print(table)


def main(arguments: SpeedArguments) -> Result:
    if unknown := set(arguments.only) - set(PARTS):
        raise SystemExit(f"--only has no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}.")
    chosen = [n for n, part in PARTS.items() if arguments.size in part.sizes and n in (arguments.only or PARTS)]
    runs = {name: run_part(name, arguments) for name in chosen}
    results = {"arguments": asdict(arguments), **collect(runs)}
    write_json(Path(arguments.output_dir) / "results.json", results)
    show(results)
    return results


if __name__ == "__main__":
    main(*TrlParser((SpeedArguments,)).parse_args_and_config())
