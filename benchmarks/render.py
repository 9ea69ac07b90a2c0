r"""Fills the marked tables and numbers of docs/results/*.md from docs/results/data/*.json, and draws the pictures.

    python benchmarks/render.py

The pages are written by hand; what stands between two marks is written here:

    <!-- table: treg_ledger.ablation -->                                    a table
    <!-- end -->
    leaves room for <!-- number: treg_ledger.room -->3.2<!-- end --> points  a number, inside a sentence

A name is <run>.<what>. docs/results/data/<run>.json is what benchmarks/suite.py kept of the run, and in
benchmarks/experiments/<run>.py two functions say what to show of it: `tables(results)` returns {what: (headings, rows)}
or {what: text}, `figures(results)` returns {file name: matplotlib figure}. What follows a hyphen in a run's name is the
machine (speed-gpu is speed.py on a GPU). Two names joined by " + " are one table of both rows. <run>.run is how and
where it was run, and `verdicts` counts the verdicts on every page.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as ScreenTable

from tokalign.stage.files import write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "critical_token_dpo", "treg", "detection", "structured_grpo", "dishonest", "routing", "compositions", "speed",
    "reliability",
)  # fmt: skip
MARK = re.compile(r"<!-- (table|number): (.+?) -->.*?<!-- end -->", re.DOTALL)
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told here"
NOT_RUN = "*not run*"
ANY, SHARE, GAIN = (-math.inf, math.inf), (0.0, 1.0), (-1.0, 1.0)  # what a figure can be

Run = dict[str, Any]  # name, command, date, seconds, machine, versions, results
Entry = Mapping[str, Any]  # a figure over seeds: mean, ci95, p (experiments/common.py: `over_seeds`)
Table = tuple[Sequence[str], list[list[str]]]  # headings, rows
Tables = dict[str, Table | str]


# ---------------------------------------------------------------------------------------------------- cells and claims


def percent(entry: Entry, sign: str = "", digits: int = 1) -> str:
    """A share over seeds, or with `sign` "+" a gain in one, in per cent, with its interval where there is one."""
    return number(entry, digits, sign, scale=100, within=GAIN if sign else SHARE)


def number(
    entry: Entry, digits: int = 2, sign: str = "", *, scale: float = 1, within: tuple[float, float] = ANY
) -> str:
    """A figure over seeds times `scale`, with its interval where there is one; `sign` "+" shows that of gains."""
    mean = f"{scale * entry['mean']:{sign}.{digits}f}"
    low, high = interval(entry, within)
    return mean if low is None else f"{mean} ({scale * low:{sign}.{digits}f} – {scale * high:{sign}.{digits}f})"


def interval(entry: Entry, within: tuple[float, float]) -> tuple[float | None, float | None]:
    """An entry's interval, as much of it as lies `within` what the figure can be.

    Student's t does not know that a share lies in [0, 1]. What is cut off holds no share, so the interval that is left
    covers the true one exactly as often.
    """
    low, high = entry["ci95"]
    return (None, None) if low is None else (max(low, within[0]), min(high, within[1]))


def slashed(values: Iterable[float], sign: str = "") -> str:
    """Figures of a paper side by side."""
    return " / ".join(f"{value:{sign}.1f}" for value in values)


def gaps(better: Iterable[float], worse: Iterable[float]) -> str:
    """By how much a paper has one row above another, in each of its figures."""
    return slashed((a - b for a, b in zip(better, worse, strict=True)), "+")


def verdict(entry: Entry, level: float = 0.0) -> str:
    """On a claim that a figure is above `level`: by whether its 95 % interval lies above, below or across it.

    Two seeds that agree by chance have an interval of no width, so fewer than three tell nothing. Entries over
    something else (repeats of a clock, documents) have no `seeds`.
    """
    low, high = entry["ci95"]
    if low is None or entry.get("seeds", 3) < 3:
        return OPEN
    return HOLDS if low > level else FAILS if high < level else OPEN


CLAIM = ("claim", "in the paper", "here (95 % interval)", "p", "verdict")


def claim(
    text: str, paper: str, entry: Entry, unit: str = "points", *, digits: int = 1, sign: str = "+", level: float = 0.0
) -> list[str]:
    """A row of a table of claims (its headings are CLAIM).

    Args:
        text: what is claimed. paper: the paper's own figure.
        entry: the measured figure that the claim says is above `level`.
        unit: after the figure; "points" and "%" (of a share) are hundredths.
    """
    scale, within = 100 if unit in ("points", "%") else 1, SHARE if unit == "%" else ANY
    measured = f"{number(entry, digits, sign, scale=scale, within=within)} {unit}".strip()
    p = entry.get("p")
    # p is of a mean of 0, so it says nothing of a claim about another level
    chance = "–" if p is None or level else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return [text, paper, measured, chance, f"**{verdict(entry, level)}**"]


def in_words(better: str, worse: str, entry: Entry) -> str:
    """The verdict on a difference as part of a sentence."""
    word = {HOLDS: "is above", FAILS: "is below", OPEN: "cannot be told from"}[verdict(entry)]
    return f"{better} {word} {worse}"


def error_bars(axis: Any, entries: Mapping[str, Entry], *, scale: float = 100, colour: str = "C0") -> None:
    """A point with its interval for every name, from top to bottom, of figures that are shares."""
    names = list(entries)
    bounds = [[e["mean"] if end is None else end for end in interval(e, SHARE)] for e in entries.values()]
    means = [entry["mean"] for entry in entries.values()]
    lengths = [[scale * abs(mean - pair[i]) for mean, pair in zip(means, bounds, strict=True)] for i in (0, 1)]
    axis.errorbar([scale * mean for mean in means], names, xerr=lengths, fmt="o", color=colour, capsize=4)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ------------------------------------------------------------------------------------------------------------ results


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def save(folder: str | Path, results: dict[str, Any], tables: Callable[[dict[str, Any]], Tables]) -> dict[str, Any]:
    """Write an experiment's results.json and print its tables; returns the results."""
    file = Path(folder) / "results.json"
    write_json(file, results)
    console = Console()
    for name, content in tables(read_json(file)).items():  # as a page will read them
        if not isinstance(content, str) and content[1]:
            table = ScreenTable(*content[0], title=name)
            for row in content[1]:
                table.add_row(*(cell.replace("**", "") for cell in row))
            console.print(table)
    console.print(f"[dim]{file}[/dim]", highlight=False)
    return results


# -------------------------------------------------------------------------------------------------------------- pages


def module_of(run: str) -> Any:
    """The experiment behind a run."""
    if str(ROOT) not in sys.path:  # called as a script
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.experiments.{run.partition('-')[0]}")


def shown(data: Path, run: str) -> Tables | None:
    """All that a page can show of a run; None if it was not run."""
    file = data / f"{run}.json"
    if not file.exists():
        return None
    kept = read_json(file)
    return module_of(run).tables(kept["results"]) | {"run": run_table(kept)}


def run_table(run: Run) -> Table:
    """How a run was started, where, when and for how long, and with which versions; of a real model, with which."""
    arguments, machine = run["results"].get("arguments", {}), run["machine"]
    row = [
        f"`python benchmarks/suite.py {'--quick true ' if run.get('quick') else ''}--only {run['name']}`",
        str(arguments.get("seeds", arguments.get("seed", "–"))),
        ", ".join(str(machine[key]) for key in ("cpu", "cores", "threads", "gpu") if machine.get(key)),
        run["date"],
        duration(run["seconds"]) + ("" if run.get("finished", True) else " so far, not finished"),
        ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    ]
    if model := run.get("model"):
        of = ", ".join(model[key] for key in ("requirement", "quantisation") if key in model)
        row.append(f"{model['model']}, out of {of}" if of else model["model"])
    headings = ("command", "seeds", "machine", "date", "time", "versions", "model")
    return headings[: len(row)], [row]


def markdown(table: Table) -> str:
    """A table as Markdown; pipes in cells are escaped."""
    headings, rows = table
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def fill(text: str, contents: Callable[[str], Tables | None]) -> str:
    """A page with everything between its marks made anew.

    Args:
        contents: run -> what it can show, None if it was not run.

    Raises:
        KeyError: a mark names what the run's `tables` does not have.
    """

    def made(match: re.Match[str]) -> str:
        kind, names = match.groups()
        parts = []
        for name in names.split(" + "):
            run, _, what = name.partition(".")
            there = contents(run)
            if there is not None:
                if what not in there:
                    raise KeyError(f"A page asks for {name}, but the run has {', '.join(there)}.")
                parts.append(there[what])
        mark = f"<!-- {kind}: {names} -->"
        if not parts:
            return f"{mark}{NOT_RUN}<!-- end -->"
        if kind == "number":
            return f"{mark}{parts[0]}<!-- end -->"
        table = parts[0][0], [row for part in parts for row in part[1]]
        return f"{mark}\n{markdown(table)}\n<!-- end -->" if table[1] else f"{mark}{NOT_RUN}<!-- end -->"

    return MARK.sub(made, text)


def verdict_counts(pages: Mapping[str, str]) -> Table:
    """The verdicts on every page: name -> text."""
    rows = [
        [f"[{text.splitlines()[0].removeprefix('# ')}]({name}.md)"]
        + [str(text.count(f"**{word}**")) for word in (HOLDS, FAILS, OPEN)]
        for name, text in pages.items()
    ]
    return ("page", HOLDS, FAILS, OPEN), rows


def render(results: Path, prose: Path | None = None) -> None:
    """Fill the pages in `results` from `results`/data and draw their pictures.

    Args:
        prose: folder of the pages to fill, where they are not those in `results` (a short run leaves docs/ alone).
    """
    data, kept = results / "data", {}

    def contents(run: str) -> Tables | None:
        if run not in kept:
            kept[run] = shown(data, run)
        return kept[run]

    texts = {name: fill(((prose or results) / f"{name}.md").read_text(encoding="utf-8"), contents) for name in PAGES}
    index = ((prose or results) / "README.md").read_text(encoding="utf-8")
    texts["README"] = fill(index, lambda _: {"": verdict_counts(texts)})
    for name, text in texts.items():
        (results / f"{name}.md").write_text(text, encoding="utf-8")
    for run, there in kept.items():
        pictures: dict[str, Figure] = (
            module_of(run).figures(read_json(data / f"{run}.json")["results"]) if there else {}
        )
        for file, figure in pictures.items():
            (results / "figures").mkdir(exist_ok=True)
            figure.savefig(results / "figures" / file, dpi=110)


if __name__ == "__main__":
    render(ROOT / "docs" / "results")
