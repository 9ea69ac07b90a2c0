r"""Everything that docs/results/ says: runs the experiments, keeps their JSON, and fills in the pages.

    python benchmarks/suite.py                      # hours (`make benchmarks`); pages and data go to docs/results/
    python benchmarks/suite.py --quick true         # minutes (`make benchmarks-quick`), to runs/benchmarks/quick/
    python benchmarks/suite.py --only real          # a real model on real text, hours (`make real`)
    python benchmarks/suite.py --only real --model runs/models/mine --output_dir runs/mine --results_dir runs/mine/pages
    python benchmarks/suite.py --only treg_ledger   # some of them
    python benchmarks/suite.py --render true        # the pages alone, from the data that is there

Each experiment is a file of experiments/, run with the arguments below, one after the other. A killed suite started
again skips what is finished and goes on within the experiment that it was at. On a machine with a GPU `speed-gpu` runs
as well: the same measurements in bf16 at the shapes of 1.5B and 8B models. `dishonest` runs where the variable
TOKALIGN_SHARED_DATA names the folder with the public data sets that it reads. The real experiments need it too, and run
only where `--only` names them or their group, `real`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trl import TrlParser

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # as a script, this file has its own folder there
    sys.path.insert(0, str(ROOT))

from benchmarks.experiments.dishonest import DATA  # noqa: E402
from benchmarks.render import read_json, render, write_json  # noqa: E402
from tokalign.cli.ledger_models import trained_model  # noqa: E402
from tokalign.data.builders.model import MODELS, SOURCE  # noqa: E402

REAL = "real"  # the group's name for `--only`
VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class Experiment:
    """A module of experiments/ with its arguments; what follows a hyphen in its name is its data set or machine.

    Args:
        full: beside the module's defaults. quick: of the short run; `{base}` stands for the ledger's weak base model,
            `{early}` for one that was stopped early in its training (short runs wait for no large model), `{model}` for
            the suite's `--model`.
        threads: CPU threads that PyTorch gets; one where the models are so small that more would only wait.
        processes: how many of the same command run side by side; they share its cells (experiments/common.py: `kept`).
        gpu: it needs one. data: it needs the public data sets.
        real: of a real model on real text. Its results are kept as they come, unfinished ones too.
    """

    name: str
    quick: str
    full: str = ""
    threads: int = 1
    processes: int = 1
    gpu: bool = False
    data: bool = False
    real: bool = False

    def possible(self) -> bool:
        """Whether this machine has what it needs."""
        return (not self.gpu or torch.cuda.is_available()) and (not self.data or bool(os.environ.get(DATA)))

    def wanted(self, only: Collection[str]) -> bool:
        """Whether it is among the experiments, or of the group, that were named; where none was, all but the real."""
        if only:
            return self.name in only or (self.real and REAL in only)
        return not self.real and self.possible()

    def command(self, *, quick: bool) -> list[str]:
        """What is run, without the folder that it writes."""
        module = f"benchmarks.experiments.{self.name.partition('-')[0]}"
        return ["python", "-m", module, *shlex.split(self.quick if quick else self.full)]


FEW = "--seeds 2 --problems 200 --validation_problems 100 --test_problems 100 --samples 1 --learning_rates 3e-4"
FEW_REAL = (
    "--model {model} --seeds 1 --few_rows 8 --sft_rows 32 --epochs 1 --longer_epochs 2 --more_rows 48 --steps 1"
    " --completions 16 --sft_rates 3e-4 --learning_rates 1.5e-4 --validation_rows 8 --test_rows 8"
)
EXPERIMENTS = (
    Experiment("critical_dpo_ledger", f"{FEW} --base {{base}} --rollouts 8 --estimate_rows 4 --continuations 16"),
    Experiment("treg_ledger", f"{FEW} --base {{base}} --eval_model {{base}} --rollouts 4"),
    Experiment(
        "token_credit", "--base {base} --eval_model {base} --seeds 2 --problems 100 --estimate_rows 4 --continuations 8"
    ),
    Experiment(
        "structured_ledger",
        "--seeds 2 --ablation_seeds 1 --base_documents 6400 --problems 200 --steps 6"
        " --completions 32 --learning_rates 1e-3 --validation_problems 40 --test_problems 60",
    ),
    Experiment(
        "routing_ledger",
        "--slm {early} --llm {base} --seeds 2 --train_problems 300 --validation_problems 40 --test_problems 60"
        " --rates 0.08 0.2 --clock_rate 0.2 --clock_problems 16 --repeats 2",
    ),
    Experiment(
        "routing_policies",
        "--slm {early} --llm {base} --seeds 1 --train_problems 200 --validation_problems 30 --test_problems 40"
        " --rates 0.08 0.2",
    ),
    Experiment(
        "compositions",
        f"{FEW} --base {{base}} --eval_model {{base}} --llm {{early}} --rollouts 4 --pairs 32 --continuations 4",
    ),
    Experiment("faults", "--kills 2 --training_kills 2 --only pairs score_contrast write-answers critical_dpo"),
    Experiment("dishonest", "--rows 20", data=True),
    Experiment(
        "real_signals",
        "--model {model} --solutions 6 --train_pairs 16 --rollout_solutions 2 --resamples 100",
        "--model {model}",
        processes=2,
        data=True,
        real=True,
    ),
    Experiment(
        "real_reasoning",
        "--model {model} --seeds 1 --warm_svamp 100 --warm_gsm8k 20 --problems_svamp 32 --problems_gsm8k 8 --rollouts 8"
        " --learning_rates 3e-4 --test 8 4 --samples 1 --estimate_rows 2 --continuations 4",
        "--model {model}",
        processes=2,
        data=True,
        real=True,
    ),
    Experiment(
        "real_structured-snips",
        f"--task snips {FEW_REAL}",
        "--task snips --model {model}",
        processes=2,
        data=True,
        real=True,
    ),
    Experiment(
        "real_structured-bfcl",
        f"--task bfcl {FEW_REAL} --max_prompt_tokens 200",
        "--task bfcl --model {model} --sft_rows 100 --few_rows 40 --longer_epochs 12 --more_rows 330 --steps 12"
        " --completions 32 --validation_rows 60 --test_rows 120 --max_tokens 88 --max_prompt_tokens 280",
        processes=2,
        data=True,
        real=True,
    ),
    Experiment(
        "real_routing",
        "--model {model} --seeds 1 --warm_problems 100 --warm_epochs 1 --heal_problems 140 --heal_answers 1"
        " --heal_epochs 1 --train_problems 40 --test_problems 16 --rates 0.12 0.24",
        "--model {model}",
        processes=2,
        data=True,
        real=True,
    ),
    Experiment("speed", "--size quick", threads=os.cpu_count() or 1),
    Experiment(
        "speed-gpu",
        "--device cuda --dtype bfloat16 --size quick",
        "--device cuda --dtype bfloat16 --size real",
        gpu=True,
    ),
)


@dataclass
class SuiteArguments:
    """What to run and where to."""

    quick: bool = field(default=False, metadata={"help": "Small sizes: whether everything runs, not what comes out."})
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of experiments, or 'real' for all of a real model; unset is all but those."},
    )
    model: str = field(
        default=MODELS["smollm2"].hub_id, metadata={"help": "Hub id or folder of the real experiments' model."}
    )
    render: bool = field(default=False, metadata={"help": "Only write the pages from the data that is there."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the runs; unset is runs/benchmarks/full or runs/benchmarks/quick."}
    )
    results_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of pages and data; unset is docs/results, for short runs `output_dir`/results."},
    )


def main(args: SuiteArguments) -> None:
    os.chdir(ROOT)
    pages = Path("docs/results")
    out = Path(args.output_dir or f"runs/benchmarks/{'quick' if args.quick else 'full'}")
    results = Path(args.results_dir or (out / "results" if args.quick else pages))
    names = [REAL, *(e.name for e in EXPERIMENTS)]
    if unknown := set(args.only) - set(names):
        raise SystemExit(f"No experiment {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    if REAL in args.only and not args.render and not os.environ.get(DATA):
        raise SystemExit(f"Set {DATA} to the folder with the public data sets; docs/real_models.md says what is in it.")
    if not args.render:
        for experiment in EXPERIMENTS:
            if experiment.wanted(args.only):
                run(experiment, out, results / "data", quick=args.quick, model=args.model)
    render(results, pages)


def run(experiment: Experiment, out: Path, data: Path, *, quick: bool, model: str) -> None:
    """Run an experiment, unless it is finished, and keep its JSON."""
    console, folder = Console(), out / experiment.name
    command, note = experiment.command(quick=quick), folder / "suite.json"  # its command, seconds so far; finished?
    state = read_json(note) if note.exists() else {}
    results = folder / "results.json"
    about = model_of(model) if "{model}" in command else None
    if (state.get("command"), state.get("model")) != (shlex.join(command), about):
        state = {"command": shlex.join(command), "model": about, "seconds": 0.0, "finished": False}
        results.unlink(missing_ok=True)  # of another command; no page may take it for this one's
    console.rule(f"[bold]{experiment.name}[/bold]", align="left")
    kept = data / f"{experiment.name}.json"
    if not state["finished"]:
        there = models(out, command) | {"{model}": model}
        arguments = [there.get(part, part) for part in command[1:]] + ["--output_dir", str(folder)]
        started = time.perf_counter()
        try:
            together([[sys.executable, *arguments]] * experiment.processes, experiment.threads)
            state["finished"] = True
        finally:
            state |= {"seconds": state["seconds"] + time.perf_counter() - started, "date": time.strftime("%Y-%m-%d")}
            write_json(note, state)
            if experiment.real and results.exists():
                write_json(kept, record(experiment, state, results, quick=quick))
    write_json(kept, record(experiment, state, results, quick=quick))
    console.print(f"[dim]✓ {kept}, {state['seconds']:.0f} s[/dim]", highlight=False)


def together(commands: Sequence[Sequence[str]], threads: int) -> None:
    """Run commands side by side until all have ended; none is left behind when this process is stopped.

    One that fails does not stop the others, whose work is kept.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()  # nothing, where it has ended
            process.wait()
    for code, command in zip(codes, commands, strict=True):
        if code:
            raise subprocess.CalledProcessError(code, command)


def record(experiment: Experiment, state: dict[str, Any], results: Path, *, quick: bool) -> dict[str, Any]:
    """What the pages read of a run."""
    return {
        "name": experiment.name,
        "command": state["command"],
        **({"model": state["model"]} if state.get("model") else {}),
        **({} if state["finished"] else {"finished": False}),
        "quick": quick,
        "date": state["date"],
        "seconds": round(state["seconds"]),
        "machine": machine(experiment),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "results": without_paths(read_json(results)),
    }


def model_of(model: str) -> dict[str, Any]:
    """What a hub id or folder is, for the pages: where `tokalign data model` wrote the folder, all that it knows."""
    file = Path(model) / SOURCE
    return read_json(file) if file.exists() else {"model": Path(model).name if Path(model).is_dir() else model}


def models(out: Path, command: list[str]) -> dict[str, str]:
    """What stands for the models of short runs, trained first where they are not there."""
    there = {}
    if "{base}" in command:
        there["{base}"] = str(trained_model("ledger-slm"))
    if "{early}" in command:
        # in a process of its own: the ledger's stages hide the GPU from theirs
        subprocess.run([sys.executable, "-m", "benchmarks.ledger_stages", str(out / "early")], check=True, cwd=ROOT)
        there["{early}"] = str(out / "early" / "model")
    return there


def machine(experiment: Experiment) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    threads = f"{experiment.threads} thread{'s' if experiment.threads > 1 else ''}"
    about: dict[str, Any] = {
        "cpu": names[0] if names else platform.machine(),
        "cores": f"{os.cpu_count()} cores",
        "threads": threads if experiment.processes == 1 else f"{experiment.processes} processes of {threads}",
    }
    if experiment.gpu:
        about["gpu"] = torch.cuda.get_device_name()
    return about


def without_paths(value: Any) -> Any:
    """The value with the folder's name in place of every absolute path: results speak of no machine's folders."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    main(*TrlParser((SuiteArguments,)).parse_args_and_config())
