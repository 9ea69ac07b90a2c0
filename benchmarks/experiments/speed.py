r"""Every speed and memory ratio that this package sets itself a goal for, and the share of the ideal.

    python -m benchmarks.experiments.speed                            # CPU, a quarter of an hour on two idle cores
    python -m benchmarks.experiments.speed --size quick               # minutes: whether everything runs
    python -m benchmarks.experiments.speed --device cuda --dtype bfloat16 --size real   # one 80 GB GPU: 1.5B and 8B

Runs contrast.py, preference_step.py, structured_credit.py, credit_step.py and routed_decoding.py one after the other,
each in processes of its own (so that no peak of memory is another's), with the arguments in PARTS, and judges what they
measured. What is compared takes turns in one process; how often, and which of the times counts, is said with each
ratio. Measure on an idle machine. A killed run started again skips the parts that are finished. Writes results.json to
`output_dir`; docs/results/speed.md shows it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from trl import TrlParser

from benchmarks.render import FAILS, HOLDS, ROOT, Tables, duration, read_json, save, write_json

Result = dict[str, Any]


def ratio(name: str, what: str, goal: tuple[str, float] | None, value: float, detail: str, how: str) -> Result:
    """A row of the table.

    Args:
        goal: ("≥" or "≤", figure), or None for a figure that is shown and not judged.
        detail: on what it was measured. how: repeats, and which of them counts.
    """
    met = None if goal is None else value >= goal[1] if goal[0] == "≥" else value <= goal[1]
    return {"name": name, "what": what, "goal": goal, "value": value, "met": met, "detail": detail, "how": how}


def contrast_ratios(result: Result) -> list[Result]:
    how = f"fastest of {result['arguments']['repeats']} in turns; peaks of one run each"
    rows = []
    for c in result["comparisons"]:
        detail = f"{c['workload']} rows: {c['tokens']:,} tokens, {result['arguments']['vocab_size']:,} words"
        rows += [
            ratio("contrastive scoring, time", "released procedure / ours", ("≥", 3), c["speed-up"], detail, how),
            ratio("contrastive scoring, extra peak", "ours / released", ("≤", 0.2), c["memory ratio"], detail, how),
            ratio("contrastive scoring, overhead", "ours / bare passes", ("≤", 1.3), c["against bare"], detail, how),
        ]
    return rows


def step_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    method = {"critical_token_dpo": "critical-token DPO step", "treg": "T-REG step"}[arguments["method"]]
    how, alone = f"median of the ratios of {arguments['pairs']} pairs of steps", "three steps, a process each"
    rows = []
    for r in result["results"]:
        detail = f"{r['vocab_size']:,} words, {'LoRA' if arguments['peft'] else 'full'}"
        rows += [
            ratio(f"{method}, time", "ours / DPOTrainer", ("≤", 1.05), r["time_ratio"], detail, how),
            ratio(f"{method}, peak memory", "ours / DPOTrainer", ("≤", 1.05), r["memory_ratio"], detail, alone),
        ]
    return rows


# Speed over the LLM alone. The thin pair's steps cost nearly the same for any number of rows, as on a GPU.
GOALS: dict[tuple[str, int], tuple[str, float]] = {
    ("thin-2 + thin-24", 16): ("≥", 1.4),
    ("thin-2 + thin-24", 32): ("≥", 1.2),
    ("0.5b + 3b", 16): ("≥", 1.0),
}
TENFOLD = 10  # how many times the SLM's step the LLM's takes where the goal of 2.8 is meant


def routed_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    pair, how = " + ".join(arguments["pair"]), f"median of {arguments['repeats']} in turns"
    name, what, rows = "routed decoding, share of the ideal", "ideal time / ours", []
    for r in result["results"]:
        detail = f"{pair}, batch {r['batch']}, {100 * r['llm_rate']:.0f} % LLM, step times 1 : {r['step_ratio']:.1f}"
        goal = GOALS.get((pair, r["batch"]), ("≥", 2.8) if r["step_ratio"] >= TENFOLD else None)
        rows += [
            # of thin layers all is launching, which the ideal of stock models in lock step has otherwise
            ratio(name, what, None if "thin" in pair else ("≥", 0.85), r["share_of_ideal"], detail, how),
            ratio("routed decoding, speed", "routed / LLM only", goal, r["speedup_over_llm_only"], detail, how),
        ]
        if (lock := r["tokens_per_second"].get("lock step")) is not None:
            faster = r["tokens_per_second"]["routed"] / lock
            rows.append(ratio("routed decoding, delayed", "ours / lock step", None, faster, detail, how))
    return rows


def router_ratios(result: Result) -> list[Result]:
    what, how = "its time / a step of the SLM", "median of 9; the step: of 3"
    slm = result["arguments"]["pair"][0]
    return [
        ratio("router", what, ("≤", 0.05), r["share_of_slm_step"], f"{slm}, batch {r['batch']}", how)
        for r in result["results"]
    ]


def credit_ratios(result: Result) -> list[Result]:
    arguments, measured = result["arguments"], result["results"]
    what, how = "reward.credit / reward.score", f"median process time of {arguments['rounds']} rounds in turns"
    apart = ("equal to the reference", "no reference")  # the plain reward has least to do there
    slowest = max((row for row in measured if row["kind"] not in apart), key=lambda row: row["ratio"])
    name, size = "credit spans", f"{arguments['size']} bytes"
    rows = [ratio(name, what, ("≤", 2), slowest["ratio"], f"{size}; slowest kind: {slowest['kind']}", how)]
    rows += [
        ratio(name, what, None, row["ratio"], f"{size}; {row['kind']}", how) for row in measured if row["kind"] in apart
    ]
    offsets = result["offsets"]
    detail = f"{offsets['tokens']:.0f} tokens of byte-level BPE, {offsets['offsets']:.2f} µs a token"
    share = offsets["offsets"] / offsets["decode"]
    return [*rows, ratio("offsets of tokens", "ours / decoding", None, share, detail, how)]


def credit_step_ratios(result: Result) -> list[Result]:
    arguments = result["arguments"]
    what, how = "field credit / sequence credit", f"median of the ratios of {arguments['pairs']} pairs of steps"
    detail = f"{arguments['vocab_size']:,} words, {arguments['batch_size']} completions of {arguments['size']} bytes"
    return [ratio("structured GRPO step, time", what, ("≤", 1.05), result["time_ratio"], detail, how)]


def routed_rates(result: Result) -> list[Result]:
    """Tokens a second of all ways and of the ideal, by batch size."""
    pair = result["arguments"]["pair"]
    return [
        {
            "pair": pair,
            "batch": r["batch"],
            "tokens_per_second": r["tokens_per_second"] | {"ideal": r["tokens"] / r["ideal_seconds"]},
        }
        for r in result["results"]
    ]


class Part(NamedTuple):
    """One run of a benchmark: a script beside this file, what is judged of its results, and its arguments by size.

    A size that is None is not run.
    """

    script: str
    ratios: Callable[[Result], list[Result]]
    quick: str | None
    small: str | None
    real: str | None


LLAMA_8B = "--hidden_size 4096 --layers 32"
STEP = (
    "--hidden_size 64 --layers 2 --vocab_size 128000 --pairs 3",
    "--pairs 11",
    f"{LLAMA_8B} --peft true --vocab_size 32000 128256 --completion_length 512 --pairs 11",
)
PARTS: dict[str, Part] = {
    "contrast": Part(
        "contrast",
        contrast_ratios,
        "--hidden_size 64 --layers 2 --short_rows 8 --long_rows 1 --growth 2 --repeats 2",
        "--growth 4 8 16 32",
        f"{LLAMA_8B} --intermediate_size 14336 --heads 32 --growth 4 --token_budget 8192",
    ),
    "critical-token DPO step": Part("preference_step", step_ratios, *STEP),
    "T-REG step": Part("preference_step", step_ratios, *(f"--method treg {options}" for options in STEP)),
    "credit spans": Part("structured_credit", credit_ratios, "--completions 40 --rounds 1", "", None),
    "credit step": Part(
        "credit_step",
        credit_step_ratios,
        "--hidden_size 64 --layers 2 --vocab_size 500 --pairs 3",
        "",
        f"{LLAMA_8B} --vocab_size 128256 --batch_size 16",
    ),
    "router": Part(
        "routed_decoding",
        router_ratios,
        "--pair tiny 0.5b --router_only true",
        "--pair 1.5b 3b --router_only true",
        "--pair 1.5b 8b --batch_sizes 1 16 64 --router_only true",
    ),
    "routed decoding": Part(
        "routed_decoding",
        routed_ratios,
        "--pair tiny 0.5b --batch_sizes 1 --new_tokens 9 --repeats 1",
        "--pair 0.5b 3b --batch_sizes 1 --repeats 3",
        "--pair 1.5b 8b --batch_sizes 1 16 64 --new_tokens 100",
    ),
    "routed decoding, batch 16": Part(
        "routed_decoding", routed_ratios, None, "--pair 0.5b 3b --batch_sizes 16 --new_tokens 25 --repeats 2", None
    ),
    "routed decoding, thin layers": Part(
        "routed_decoding",
        routed_ratios,
        None,
        "--pair thin-2 thin-24 --ask_router false --vocab_size 8192 --dtype float32 --batch_sizes 4 16 32"
        " --prompt_length 20 --longest_prompt 60 --new_tokens 100 --repeats 3",
        None,
    ),
    "routed decoding, unequal rows": Part(
        "routed_decoding",
        routed_ratios,
        None,
        "--pair 0.5b 3b --batch_sizes 4 --prompt_length 64 --longest_prompt 1024 --shortest_output 10 --new_tokens 40"
        " --repeats 1",
        None,
    ),
    "routed decoding, larger LLM": Part(
        "routed_decoding", routed_ratios, None, "--pair 0.5b 7b --batch_sizes 1 --new_tokens 64 --repeats 2", None
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
    folder = Path(arguments.output_dir).resolve() / name.replace(",", "").replace(" ", "_")
    options = [*shlex.split(getattr(part, arguments.size)), "--device", arguments.device]
    options += [] if arguments.dtype is None else ["--dtype", arguments.dtype]
    command, note = shlex.join([f"{part.script}.py", *options]), folder / "finished.json"
    state = read_json(note) if note.exists() else {}
    if state.get("command") != command:
        note.unlink(missing_ok=True)
        Console().rule(f"[bold]{name}[/bold]: {command}", align="left")
        started = time.perf_counter()
        module = f"benchmarks.experiments.{part.script}"
        run = [sys.executable, "-m", module, *options, "--output_dir", str(folder)]
        subprocess.run(run, check=True, cwd=ROOT)
        state = {"command": command, "seconds": round(time.perf_counter() - started, 1)}
        write_json(note, state)
    return {**state, "results": read_json(folder / "results.json")}


def collect(runs: Mapping[str, Result]) -> Result:
    """Ratios and the routed pairs' rates out of the parts' results."""
    return {
        "parts": {name: {key: run[key] for key in ("command", "seconds")} for name, run in runs.items()},
        "ratios": [ratio for name, run in runs.items() for ratio in PARTS[name].ratios(run["results"])],
        "routed": [
            rates
            for name, run in runs.items()
            if PARTS[name].ratios is routed_ratios
            for rates in routed_rates(run["results"])
        ],
    }


def main(arguments: SpeedArguments) -> Result:
    if unknown := set(arguments.only) - set(PARTS):
        raise SystemExit(f"--only has no part {', '.join(sorted(unknown))}: use {', '.join(PARTS)}.")
    chosen = [n for n in arguments.only or PARTS if getattr(PARTS[n], arguments.size) is not None]
    runs = {name: run_part(name, arguments) for name in chosen}
    return save(arguments.output_dir, {"arguments": asdict(arguments), **collect(runs)}, tables)


# ------------------------------------------------------------------------------------------------ what the page shows


WAYS = ("SLM only", "ideal", "routed", "LLM only")


def tables(results: Result) -> Tables:
    """All ratios with their goals, routed decoding beside its ideal, and how long each part took."""
    on, routed = machine(results), []
    for entry in results["routed"]:
        rates = entry["tokens_per_second"]
        share = f"{100 * rates['routed'] / rates['ideal']:.0f} %"
        routed.append(
            [on, " + ".join(entry["pair"]), str(entry["batch"]), *(f"{rates[way]:,.2f}" for way in WAYS), share]
        )
    judged = [r for r in results["ratios"] if r["goal"] is not None]
    missed = [f"{r['name']} ({r['detail']})" for r in judged if not r["met"]]
    parts = [[on, f"`{part['command']}`", duration(part["seconds"])] for part in results["parts"].values()]
    return {
        "ratios": (("", "compares", "on", "value", "goal", "verdict", "counted"), ratio_rows(results["ratios"], on)),
        "routed": (("", "pair", "batch", *WAYS, "routed / ideal"), routed),
        "parts": (("", "in `benchmarks/experiments/`", "time"), parts),
        "goals": f"{len(judged) - len(missed)} of {len(judged)}",
        "missed": "; ".join(missed) or "none",
    }


def machine(results: Result) -> str:
    return "CPU" if results["arguments"]["device"] == "cpu" else "GPU"


def ratio_rows(ratios: list[Result], on: str) -> list[list[str]]:
    rows = []
    for r in ratios:
        # three digits of what is small, whole numbers of what is large
        value = f"{r['value']:,.0f}" if abs(r["value"]) >= 100 else f"{r['value']:.3g}"
        goal = ["–", "–"]
        if r["goal"] is not None:
            goal = [f"{r['goal'][0]} {r['goal'][1]:,g}", f"**{HOLDS if r['met'] else FAILS}**"]
        rows.append([r["name"], r["what"], on, f"{value} ({r['detail']})", *goal, r["how"]])
    return rows


def figures(results: Result) -> dict[str, Figure]:
    """How many times as good as its goal each ratio is, and the routed pairs' tokens a second."""
    on, suffix = machine(results), "" if machine(results) == "CPU" else "_gpu"
    pictures = {}
    judged = [r for r in results["ratios"] if r["goal"] is not None]
    if judged:
        figure = Figure(figsize=(9, 0.8 + 0.24 * len(judged)), layout="constrained")
        axis = figure.subplots()
        for place, r in enumerate(judged):
            sign, goal = r["goal"]
            value = max(r["value"], goal / 1000)  # a logarithm needs something
            axis.barh(place, value / goal if sign == "≥" else goal / value, color="C0" if r["met"] else "C3")
            axis.text(0.02, place, f"{on} · {r['name']} ({r['detail']})", va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        ticks = (0.1, 0.5, 1, 2, 5)
        axis.set(xscale="log", xlim=(0.019, None), xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
        axis.set(yticks=[], ylim=(len(judged) - 0.5, -0.5), xlabel="times as good as the goal (red: missed)")
        pictures[f"speed_ratios{suffix}.png"] = figure
    if results["routed"]:
        figure = Figure(figsize=(2 + 2 * len(results["routed"]), 3.6), layout="constrained")
        axis = figure.subplots()
        for k, way in enumerate(WAYS):
            rates = [entry["tokens_per_second"][way] for entry in results["routed"]]
            bars = axis.bar([x + 0.2 * k for x in range(len(rates))], rates, 0.19, label=way)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        labels = [f"{on}, {' + '.join(e['pair'])}\nbatch {e['batch']}" for e in results["routed"]]
        axis.set_xticks([x + 0.3 for x in range(len(labels))], labels, fontsize=8)
        axis.set(yscale="log", ylabel="tokens a second")
        axis.legend(fontsize=7)
        pictures[f"speed_routed{suffix}.png"] = figure
    return pictures


if __name__ == "__main__":
    main(*TrlParser((SpeedArguments,)).parse_args_and_config())
