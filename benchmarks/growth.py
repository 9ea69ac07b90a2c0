r"""How time and memory grow: with tokens, rows and vocabulary for the two scorers, with processes for an offline job.

    python benchmarks/growth.py                                          # CPU, about four minutes on two idle cores
    python benchmarks/growth.py --device cuda --dtype bfloat16 --hidden_size 2048 --layers 16 --processes 1

One thing grows, all else stays. Contrastive scores and token rewards run on random Llamas in this process, the sizes of
a curve in turns; the fastest of the repeats counts. The job is `tokalign score likelihood` on made-up pairs, one thread
a process; its rate counts work alone (reading a shard to writing it), by the process that worked longest. Each curve is
fitted with y = c · x^e by least squares on logarithms: e = 1 is linear, 0 flat. Peaks are extra memory, as in
contrast.py. Writes results.json to `output_dir`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import contrast
import numpy as np
import token_rewards
import torch
from datasets import Dataset
from ledger_stages import ROOT, write_json
from preference_step import made_up_tokenizer
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import AutoModelForCausalLM
from trl import TrlParser

from tokalign.signals import ContrastiveScorer
from tokalign.stage.jobs import run_job
from tokalign.stage.shards import counts_of

PAGE = 4096  # bytes; resident memory cannot be told finer


@dataclass
class GrowthArguments:
    """Model shape, the sizes of each curve, and device."""

    vocab_size: int = field(default=128256, metadata={"help": "Vocabulary where it does not grow (Llama 3's)."})
    hidden_size: int = field(default=256, metadata={"help": "Width; the MLP has four times as much."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    heads: int = field(default=8, metadata={"help": "Attention heads."})
    lengths: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024], metadata={"help": "Longest row."})
    rows: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64], metadata={"help": "Rows."})
    vocab_sizes: list[int] = field(
        default_factory=lambda: [8192, 16384, 32768, 65536, 131072], metadata={"help": "Vocabularies."}
    )
    processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Processes of the offline job."})
    fixed_rows: int = field(default=4, metadata={"help": "Rows where they do not grow."})
    fixed_length: int = field(default=128, metadata={"help": "Longest row where it does not grow."})
    job_rows: int = field(default=128, metadata={"help": "Pairs of the offline job."})
    token_budget: int = field(default=1024, metadata={"help": "Tokens of one forward pass."})
    repeats: int = field(default=3, metadata={"help": "Timed runs of each size; the fastest counts."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    dtype: str = field(default="float32", metadata={"help": "Weights' type."})
    output_dir: str = field(default="runs/benchmarks/growth", metadata={"help": "Folder of results.json."})


class Work(NamedTuple):
    """Something to time, and the tokens that go through the model for it."""

    run: Callable[[], object]
    tokens: int


MakeWork = Callable[[int, int], Work]  # of a number of rows and a longest row


def power_law(xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    """The exponent e of y = c · x^e by least squares on logarithms, with its 95 % interval from three points on.

    Raises:
        ValueError: fewer than two different sizes, which have no slope.
    """
    if len(set(xs)) < 2:
        raise ValueError(f"A growth curve of the sizes {list(xs)} has no exponent: measure at two different ones.")
    fit = stats.linregress(np.log(xs), np.log(ys))
    interval: list[float | None] = [None, None]
    if len(xs) > 2:
        spread = float(stats.t.ppf(0.975, len(xs) - 2) * fit.stderr)
        interval = [float(fit.slope) - spread, float(fit.slope) + spread]
    return {"exponent": float(fit.slope), "ci95": interval}


# ----------------------------------------------------------------------------------------------------- the two scorers


def model_shape(arguments: GrowthArguments) -> dict[str, Any]:
    """The model's fields, which the benchmarks of both scorers name alike."""
    return {
        "hidden_size": arguments.hidden_size,
        "intermediate_size": 4 * arguments.hidden_size,
        "layers": arguments.layers,
        "heads": arguments.heads,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }


def contrast_work(vocab_size: int, arguments: GrowthArguments) -> MakeWork:
    shape = contrast.ContrastBenchmarkArguments(vocab_size=vocab_size, **model_shape(arguments))
    with tempfile.TemporaryDirectory() as folder:
        base, *adapters = contrast.make_models(Path(folder), shape)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=arguments.dtype).to(arguments.device)
        scorer = ContrastiveScorer(model, None, *adapters, token_budget=arguments.token_budget)

    def make(count: int, longest: int) -> Work:
        rows = contrast.make_rows(count, longest, shape)
        return Work(lambda: scorer.score(*rows), 2 * sum(map(len, (*rows[0], *rows[1]))))  # two adapters

    return make


def token_reward_work(vocab_size: int, arguments: GrowthArguments) -> MakeWork:
    shape = token_rewards.TokenRewardsBenchmarkArguments(token_budget=arguments.token_budget, **model_shape(arguments))
    scorer = token_rewards.make_scorer(vocab_size, shape)

    def make(count: int, longest: int) -> Work:
        # a row is question, quoted completion, template and completion
        shape.rows, shape.template_length = count, longest // 4
        shape.question_length = shape.completion_length = longest // 4
        better, worse, completions = token_rewards.make_rows(vocab_size, shape)
        tokens = sum(map(len, (*better, *worse))) + 2 * sum(map(len, completions))
        return Work(lambda: scorer.score(better, worse, completions), tokens)

    return make


SCORERS: dict[str, Callable[[int, GrowthArguments], MakeWork]] = {
    "contrastive score": contrast_work,
    "token rewards": token_reward_work,
}


def measure(works: dict[int, Work], arguments: GrowthArguments) -> list[dict[str, Any]]:
    """Seconds (fastest of runs in turns) and extra peak memory of each size."""
    times: dict[int, list[float]] = {x: [] for x in works}
    for turn in range(arguments.repeats + 1):
        for x, work in works.items():
            taken = contrast.seconds(work.run, arguments.device)
            if turn:  # the first is to warm up
                times[x].append(taken)
    return [
        {
            "x": x,
            "tokens": work.tokens,
            "seconds": min(times[x]),
            "extra_peak_bytes": max(PAGE, contrast.extra_peak(work.run, arguments.device)),
        }
        for x, work in works.items()
    ]


def curve(what: str, over: str, points: list[dict[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """A curve with the exponents of its measures; "tokens" is fitted over those that really went through."""
    xs = [point["tokens" if over == "tokens" else "x"] for point in points]
    exponents = {name: power_law(xs, [p[name] for p in points]) for name in measures} if len(points) > 1 else {}
    return {"what": what, "over": over, "points": points, "exponents": exponents}


def scorer_curves(name: str, arguments: GrowthArguments) -> list[dict[str, Any]]:
    measures = ("seconds", "extra_peak_bytes")
    make = SCORERS[name](arguments.vocab_size, arguments)
    fixed_rows, fixed_length = arguments.fixed_rows, arguments.fixed_length
    by_length = measure({length: make(fixed_rows, length) for length in arguments.lengths}, arguments)
    by_rows = measure({count: make(count, fixed_length) for count in arguments.rows}, arguments)
    del make
    works = {size: SCORERS[name](size, arguments)(fixed_rows, fixed_length) for size in arguments.vocab_sizes}
    by_vocabulary = measure(works, arguments)
    return [
        curve(name, "tokens", by_length, measures),
        curve(name, "rows", by_rows, measures),
        curve(name, "vocabulary", by_vocabulary, measures),
    ]


# ------------------------------------------------------------------------------------------------------ the offline job


def make_stage(folder: Path, arguments: GrowthArguments) -> None:
    """A random model and a preferences stage of equally long pairs, so that all shards are the same work."""
    vocab_size = arguments.vocab_size
    shape = token_rewards.TokenRewardsBenchmarkArguments(**model_shape(arguments))
    tokenizer = made_up_tokenizer(vocab_size)
    token_rewards.make_scorer(vocab_size, shape).base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = []
    for number in range(arguments.job_rows):
        row: dict[str, Any] = {"id": f"p{number}"}
        for name in ("prompt", "chosen", "rejected"):
            row[f"{name}_ids"] = [rng.randrange(2, vocab_size) for _ in range(arguments.fixed_length // 2)]
            row[name] = tokenizer.decode(row[f"{name}_ids"])
        rows.append(row)
    parameters = {"rows": arguments.job_rows, "length": arguments.fixed_length, "vocab_size": vocab_size}
    stage = dict(name="growth_pairs", parameters=parameters, tokenizer=tokenizer)
    run_job(lambda batch: batch, Dataset.from_list(rows), folder / "pairs", **stage)  # type: ignore[arg-type]


def job_rate(folder: Path, processes: int, arguments: GrowthArguments) -> dict[str, Any]:
    """Rows a second of the job on so many processes, and the seconds of the whole command."""
    output = folder / f"scored_{processes}"
    shutil.rmtree(output, ignore_errors=True)  # of a run before: only an undisturbed one is timed
    command = [sys.executable]
    if processes > 1:
        config = "cpu.yaml" if arguments.device == "cpu" else "ddp.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
        command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    command += ["scripts/score.py", "likelihood", "--model", str(folder / "model"), "--dataset", str(folder / "pairs")]
    command += ["--output_dir", str(output), "--token_budget", str(arguments.token_budget)]
    command += ["--shard_size", str(max(1, arguments.job_rows // 16))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    work: Counter[int] = Counter()
    rows = 0
    for counts in map(counts_of, sorted(output.glob("*.parquet"))):
        work[counts["process"]] += counts["seconds"]
        rows += counts["rows"]
    if len(work) != processes or rows != arguments.job_rows:
        raise RuntimeError(f"{len(work)} of {processes} processes wrote {rows} of {arguments.job_rows} rows.")
    return {"x": processes, "rows_per_second": rows / max(work.values()), "command_seconds": seconds}


def process_curve(arguments: GrowthArguments) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        make_stage(Path(folder), arguments)
        runs: dict[int, list[dict[str, Any]]] = {processes: [] for processes in arguments.processes}
        for _ in range(arguments.repeats):
            for processes, found in runs.items():
                found.append(job_rate(Path(folder), processes, arguments))
    points = [max(found, key=lambda run: run["rows_per_second"]) for found in runs.values()]
    return curve("likelihood job", "processes", points, ("rows_per_second",))


def show(curves: list[dict[str, Any]], arguments: GrowthArguments) -> None:
    """The curves on screen."""
    table = Table("", "over", "from", "to", "measure", "first", "last", "exponent", title=f"Growth, {arguments.device}")
    for found in curves:
        points = found["points"]
        for name, fit in found["exponents"].items():
            ends = (f"{points[0][name]:,.3g}", f"{points[-1][name]:,.3g}", f"{fit['exponent']:.2f}")
            table.add_row(found["what"], found["over"], f"{points[0]['x']:,}", f"{points[-1]['x']:,}", name, *ends)
    Console().print(table)


def main(arguments: GrowthArguments) -> dict[str, Any]:
    curves = [found for name in SCORERS for found in scorer_curves(name, arguments)]
    if arguments.processes:
        curves.append(process_curve(arguments))
    results = {"arguments": asdict(arguments), "torch_threads": torch.get_num_threads(), "curves": curves}
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    show(curves, arguments)
    return results


if __name__ == "__main__":
    main(*TrlParser((GrowthArguments,)).parse_args_and_config())
