r"""Nothing lost: every offline job killed again and again, a training killed, shards damaged.

    python benchmarks/reliability.py --output_dir runs/benchmarks/reliability

Every job of scripts/ (and data/ledger.py) runs once undisturbed. Then it is killed with SIGKILL at instants drawn from
the time in which that run was at work, and started again with the same command, `--kills` times; every folder is
finished in the end and compared with the undisturbed one: rows in order, counts and manifest, feature and answer files
by their bytes. Models are small and untrained: what is measured is the machinery.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faults
from fault_inputs import Inputs, jobs_on, make_inputs
from fault_shards import damage
from fault_training import training
from rich.console import Console
from rich.table import Table
from trl import TrlParser

console = Console()


@dataclass
class ReliabilityArguments:
    """What to break and how often."""

    output_dir: str = field(metadata={"help": "Folder of the runs and results.json."})
    kills: int = field(default=20, metadata={"help": "Kills of each job."})
    training_kills: int = field(default=8, metadata={"help": "Kills of the training, half of them while it saves."})
    flips: int = field(default=400, metadata={"help": "Single bits to flip in a shard."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of jobs; all if none is given."})
    seed: int = field(default=0, metadata={"help": "Seed of the instants and of what is damaged."})


def main(args: ReliabilityArguments) -> dict[str, Any]:
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    faults.prepare(out / "cache")
    inputs = make_inputs(out / "inputs")
    results: dict[str, Any] = {"arguments": asdict(args), "jobs": {}}
    for job in jobs_on(inputs):
        if not args.only or job.name in args.only:
            results["jobs"][job.name] = part(out, f"job-{job.name}", args, lambda job=job: kill_job(job, out, args))
            show_job(job.name, results["jobs"][job.name])
    results["shards"] = part(out, "shards", args, lambda: damage(out / "damage", args.flips, args.seed))
    if args.training_kills:
        results["training"] = part(out, "training", args, lambda: kill_training(inputs, out, args))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)
    return results


def part(out: Path, name: str, args: ReliabilityArguments, measure: Any) -> dict[str, Any]:
    """A part of the results, kept in its own file so that a benchmark that was stopped goes on."""
    file = out / f"{name}.json"
    key = [args.kills, args.training_kills, args.flips, args.seed]
    if file.exists() and (kept := json.loads(file.read_text()))["key"] == key:
        return kept["found"]
    found = measure()
    file.write_text(json.dumps({"key": key, "found": found}), encoding="utf-8")
    return found


def kill_job(job: faults.Job, out: Path, args: ReliabilityArguments) -> dict[str, Any]:
    """Kill one job; what differs, and how large it is."""
    folder = out / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    want = folder / "undisturbed"
    window = faults.undisturbed(job, want)
    draw = random.Random(f"{args.seed} {job.name}")
    outcome = faults.disturbed(job, want, folder, kills=args.kills, window=window, draw=draw)
    rows, shards = faults.shards_in(want)
    shutil.rmtree(folder)
    found = {"rows": rows, "shards": shards, "undisturbed_seconds": round(window[1], 2), **outcome.as_dict()}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def kill_training(inputs: Inputs, out: Path, args: ReliabilityArguments) -> dict[str, Any]:
    folder = out / "runs" / "training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = training(inputs, folder, kills=args.training_kills, draw=random.Random(args.seed))
    shutil.rmtree(folder)
    return found


WRONG = ("mismatches", "duplicates", "missing", "manifests", "files", "leftovers")


def show_job(name: str, found: dict[str, Any]) -> None:
    wrong = sum(found[key] for key in WRONG)
    console.print(
        f"{name}: {found['struck']} of {found['kills']} kills struck work, {found['runs']} folders compared, "
        f"{wrong} differences, {found['seconds']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def show(results: dict[str, Any]) -> None:
    table = Table("job", "rows", "shards", "kills", "struck work", "folders", "differences", title="Killed and resumed")
    for name, found in results["jobs"].items():
        figures = [*(found[key] for key in ("rows", "shards", "kills", "struck", "runs")), sum(found[k] for k in WRONG)]
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    console.print(table)
    shards, training = results["shards"], results.get("training")
    console.print(f"Flipped bits: {shards['found']} found, {shards['harmless']} harmless, {shards['wrong']} accepted.")
    if training:
        console.print(f"Training: {training['different_weights']} of {training['runs']} runs end with other weights.")


if __name__ == "__main__":
    main(*TrlParser((ReliabilityArguments,)).parse_args_and_config())
