"""What the pages of docs/results/ share: header, tables, figures with intervals, and the verdict on a claim.

A page is a function of JSON files (docs/results/data/<experiment>.json, written by benchmarks/suite.py), so nobody
edits it by hand, and a test renders the committed files again and compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Run = dict[str, Any]  # name, command, date, seconds, machine, versions, results

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told here"


def load_runs(folder: Path, names: Iterable[str]) -> dict[str, Run]:
    """The runs of these experiments that are there."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def header(title: str, intro: str, runs: Mapping[str, Run]) -> list[str]:
    """Title, what the page is, and for every run its command, seeds, machine, date and duration."""
    rows = []
    for run in runs.values():
        arguments = run["results"].get("arguments", {})
        seeds = arguments.get("seeds", arguments.get("seed", "–"))
        machine = run["machine"]
        rows.append(
            [
                f"`{run['command']}`",
                f"{seeds}",
                ", ".join(str(machine[key]) for key in ("cpu", "cores", "threads", "gpu") if machine.get(key)),
                run["date"],
                duration(run["seconds"]),
            ]
        )
    versions = next(iter(runs.values()))["versions"]
    return [
        f"# {title}",
        "",
        intro,
        "",
        *markdown_table(("command", "seeds", "machine", "date", "time"), rows),
        "",
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. Made by `python benchmarks/suite.py"
        " --render` from [data/](data); edits here are lost.",
        "",
    ]


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; pipes in cells are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def percent(entry: Mapping[str, Any], sign: str = "", digits: int = 1) -> str:
    """A share over seeds in per cent, with its interval where there is one."""
    return _interval(entry, 100, digits, sign)


def number(entry: Mapping[str, Any], digits: int = 2, sign: str = "") -> str:
    """A figure over seeds, with its interval where there is one."""
    return _interval(entry, 1, digits, sign)


def _interval(entry: Mapping[str, Any], scale: float, digits: int, sign: str) -> str:
    mean = f"{scale * entry['mean']:{sign}.{digits}f}"
    low, high = entry["ci95"]
    return mean if low is None else f"{mean} ({scale * low:{sign}.{digits}f} – {scale * high:{sign}.{digits}f})"


def verdict(entry: Mapping[str, Any]) -> str:
    """On a claim that a difference is above 0: by whether its 95 % interval lies above, below or across 0.

    Two seeds that agree by chance have an interval of no width, so fewer than three tell nothing. Entries over something
    else (repeats of a clock, documents) have no `seeds`.
    """
    low, high = entry["ci95"]
    if low is None or entry.get("seeds", 3) < 3:
        return OPEN
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def claims_table(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """Claim, the paper's figure, ours with interval and p-value, verdict.

    Args:
        claims: each {"claim", "paper", "entry" (a difference that the paper says is above 0), "unit"}; "verdict" where
            it does not follow from the entry; "scale" (100 for points).
    """
    rows = []
    for claim in claims:
        entry, unit = claim["entry"], claim["unit"]
        scale = 100 if unit == "points" else 1
        ours = f"{_interval(entry, scale, claim.get('digits', 1), claim.get('sign', '+'))} {unit}".strip()
        p = entry.get("p")
        chance = "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
        rows.append([claim["claim"], claim["paper"], ours, chance, f"**{claim.get('verdict') or verdict(entry)}**"])
    return markdown_table(("claim", "in the paper", "here (95 % interval)", "p", "verdict"), rows)


def grid_section(validation: Mapping[str, Any], what: str, worth: Callable[[Mapping[str, float]], float]) -> list[str]:
    """Every cell of the grid that the learning rates were chosen by, the chosen ones bold, and which are at its edge.

    Args:
        what: the figure of a cell, for the text. worth: that figure, a share, of a cell's measures.
    """
    cells = validation["grid"]
    rates = list(next(iter(cells.values())))
    rows = []
    for method, by_rate in cells.items():
        best = f"{validation['learning_rate'][method]:g}"
        shown = {rate: f"{100 * worth(cell):.1f}" for rate, cell in by_rate.items()}
        rows.append([method, *(f"**{shown[rate]}**" if rate == best else shown[rate] for rate in rates)])
    lines = [
        "## The grid",
        "",
        f"{what} on validation problems, one seed; the chosen rate in bold.",
        "",
        *markdown_table(("learning rate", *rates), rows),
        "",
    ]
    if validation["at_edge"]:
        lines += [f"At the edge of the grid, so perhaps not at their best: {'; '.join(validation['at_edge'])}.", ""]
    return lines


def error_bars(axis: Any, entries: Mapping[str, Mapping[str, Any]], *, scale: float = 100) -> None:
    """A point with its interval for every name, from top to bottom."""
    names = list(entries)
    means = [scale * entries[n]["mean"] for n in names]
    low = [scale * (entries[n]["mean"] - _bound(entries[n], 0)) for n in names]
    high = [scale * (_bound(entries[n], 1) - entries[n]["mean"]) for n in names]
    axis.errorbar(means, names, xerr=[low, high], fmt="o", capsize=4)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _bound(entry: Mapping[str, Any], side: int) -> float:
    bound = entry["ci95"][side]
    return entry["mean"] if bound is None else bound
