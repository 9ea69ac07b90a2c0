"""docs/results/speed.md: the ratios that the package sets itself goals for, growth curves, and the share of the ideal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pages.common import FAILS, HOLDS, Run, duration, header, markdown_table

NEEDS = ("speed", "speed_gpu")
COLUMNS = {"speed": "CPU", "speed_gpu": "GPU"}
MEASURES = {"seconds": "seconds", "extra_peak_bytes": "extra peak, MiB", "rows_per_second": "rows a second"}
UNITS = {"seconds": 1.0, "extra_peak_bytes": 1 / 2**20, "rows_per_second": 1.0}
INTRO = """What the methods cost beside doing without them, beside the papers' released procedures, and beside what the
hardware could do at best. The goals are the package's own, set before the measurements; the papers name few. Random weights
throughout: what a model has learned does not change how long it takes. Compared procedures take turns in one process, peaks
of memory are those of processes of their own where a step is measured and of one run above what was held before it elsewhere."""
RATIOS = """## Ratios

Value, and in brackets what it was measured on. A row without a goal is a figure that was wanted, not judged: routed decoding has
its goal of 2.8 only where the large model's step takes ten times the small one's. Bare forward passes run the vocabulary head at every
position, ours where a completion is: so contrastive scoring's overhead can be below 1, and token rewards' share of the limit above."""
GROWTH = """## Growth

The exponent e of y = c · x^e, by least squares on logarithms (95 % interval from three sizes on): 1 is linear, 0 is flat. Only what is
named grows. A small model on few tokens spends a part of its time on what does not grow, so its exponents may be below 1;
attention is quadratic in the row, which lifts those of long rows."""
IDEAL = """## Routed decoding and its ideal

Tokens a second. *Ideal* is what the forwards that routed decoding cannot do without take by themselves, timed alone: no router,
no drawing, no bookkeeping."""


def page(runs: dict[str, Run]) -> str:
    lines = [*header("Speed", INTRO, runs), *_ratios(runs), *_growth(runs), *_ideal(runs), "## Parts", ""]
    for name, run in runs.items():
        parts = run["results"]["parts"].values()
        rows = [[f"`{part['command']}`", duration(part["seconds"])] for part in parts]
        lines += [*markdown_table((f"{COLUMNS[name]}: in `benchmarks/`", "time"), rows), ""]
    return "\n".join(lines)


def _ratios(runs: dict[str, Run]) -> list[str]:
    """One row a ratio; a machine's n-th figure of a ratio stands beside another machine's n-th."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for name, run in runs.items():
        for ratio in run["results"]["ratios"]:
            groups.setdefault((ratio["name"], ratio["what"]), {}).setdefault(name, []).append(ratio)
    rows = []
    for (title, what), found in groups.items():
        for entries in zip_longest(*(found.get(name, []) for name in runs)):
            there = [entry for entry in entries if entry is not None]
            cells = [cell for entry in entries for cell in ratio_cells(entry)]
            rows.append([title, what, *cells, there[0]["how"]])
    headings = [heading for name in runs for heading in (COLUMNS[name], "goal", "verdict")]
    return [*RATIOS.splitlines(), "", *markdown_table(("", "compares", *headings, "counted"), rows), "", *_met(runs)]


def ratio_cells(ratio: dict[str, Any] | None) -> list[str]:
    """Value with what it was measured on, goal, verdict."""
    if ratio is None:
        return ["–", "", ""]
    value = f"{figure_of(ratio['value'])} ({ratio['detail']})"
    if ratio["goal"] is None:
        return [value, "–", "–"]
    return [value, f"{ratio['goal'][0]} {ratio['goal'][1]:,g}", f"**{HOLDS if ratio['met'] else FAILS}**"]


def figure_of(value: float) -> str:
    """Three digits of what is small, whole numbers of what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _met(runs: dict[str, Run]) -> list[str]:
    lines = []
    for name, run in runs.items():
        judged = [ratio for ratio in run["results"]["ratios"] if ratio["goal"] is not None]
        missed = [f"{ratio['name']} ({ratio['detail']})" for ratio in judged if not ratio["met"]]
        text = f"{COLUMNS[name]}: {len(judged) - len(missed)} of {len(judged)} goals are met."
        lines += [text + (f" Missed: {'; '.join(missed)}." if missed else ""), ""]
    return [*lines, "![Ratios](figures/speed_ratios.png)", ""]


def _growth(runs: dict[str, Run]) -> list[str]:
    rows = []
    for name, curve in _curves(runs, ("tokens", "rows", "vocabulary", "processes")):
        first, last = curve["points"][0], curve["points"][-1]
        for key, fit in curve["exponents"].items():
            low, high = fit["ci95"]
            interval = "" if low is None else f" ({low:.2f} – {high:.2f})"
            values = [f"{point[key] * UNITS[key]:,.4g}" for point in (first, last)]
            cells = [f"{first['x']:,} – {last['x']:,}", MEASURES[key], " → ".join(values)]
            rows.append([COLUMNS[name], curve["what"], curve["over"], *cells, f"{fit['exponent']:.2f}{interval}"])
    if not rows:
        return []
    headings = ("", "of", "over", "sizes", "measure", "first → last", "exponent")
    return [
        *GROWTH.splitlines(),
        "",
        *markdown_table(headings, rows),
        "",
        *_processes(runs),
        "![Growth](figures/speed_growth.png)",
        "",
    ]


def _processes(runs: dict[str, Run]) -> list[str]:
    lines = []
    for name, curve in _curves(runs, ("processes",)):
        first, last = curve["points"][0], curve["points"][-1]
        if first is not last:
            ideal = first["rows_per_second"] / first["x"] * last["x"]
            share = 100 * last["rows_per_second"] / ideal
            lines += [
                f"{COLUMNS[name]}: {last['x']} processes of an offline job do {last['rows_per_second']:.1f} rows a second, {share:.0f} %"
                f" of {last['x']} times what {first['x']} does.",
                "",
            ]
    return lines


def _curves(runs: dict[str, Run], over: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, curve) for name, run in runs.items() for curve in run["results"]["curves"] if curve["over"] in over]


def _ideal(runs: dict[str, Run]) -> list[str]:
    rows = []
    for name, run in runs.items():
        for entry in run["results"]["routed"]:
            rates = entry["tokens_per_second"]
            ways = [f"{rates[way]:,.2f}" for way in ("SLM only", "ideal", "routed", "LLM only")]
            share = f"{100 * rates['routed'] / rates['ideal']:.0f} %"
            rows.append([COLUMNS[name], " + ".join(entry["pair"]), str(entry["batch"]), *ways, share])
    if not rows:
        return []
    headings = ("", "pair", "batch", "SLM only", "ideal", "routed", "LLM only", "routed / ideal")
    return [*IDEAL.splitlines(), "", *markdown_table(headings, rows), "", "![Routed](figures/speed_routed.png)", ""]


def figures(runs: dict[str, Run], folder: Path) -> None:
    judged = [(name, r) for name, run in runs.items() for r in run["results"]["ratios"] if r["goal"] is not None]
    if judged:
        figure = Figure(figsize=(9, 0.8 + 0.24 * len(judged)), layout="constrained")
        axis = figure.subplots()
        for place, (name, ratio) in enumerate(judged):
            sign, goal = ratio["goal"]
            value = max(ratio["value"], goal / 1000)  # a logarithm needs something
            axis.barh(place, value / goal if sign == "≥" else goal / value, color="C0" if ratio["met"] else "C3")
            label = f"{COLUMNS[name]} · {ratio['name']} ({ratio['detail']})"
            axis.text(0.02, place, label, va="center", fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(
            xscale="log",
            xlim=(0.019, None),
            xticks=[0.1, 0.5, 1, 2, 5],
            xticklabels=["0.1", "0.5", "1", "2", "5"],
            yticks=[],
            ylim=(len(judged) - 0.5, -0.5),
        )
        axis.set(xlabel="times as good as the goal (red: missed)")
        figure.savefig(folder / "speed_ratios.png", dpi=110)
    if _curves(runs, ("tokens", "rows", "vocabulary", "processes")):
        _draw_growth(runs, folder / "speed_growth.png")
    routed = [(name, entry) for name, run in runs.items() for entry in run["results"]["routed"]]
    if routed:
        figure = Figure(figsize=(2 + 2 * len(routed), 3.6), layout="constrained")
        axis = figure.subplots()
        for k, way in enumerate(("SLM only", "ideal", "routed", "LLM only")):
            rates = [entry["tokens_per_second"][way] for _, entry in routed]
            bars = axis.bar([x + 0.2 * k for x in range(len(routed))], rates, 0.19, label=way)
            axis.bar_label(bars, fmt="%.1f", fontsize=7)
        labels = [f"{COLUMNS[name]}, {' + '.join(e['pair'])}\nbatch {e['batch']}" for name, e in routed]
        axis.set_xticks([x + 0.3 for x in range(len(routed))], labels, fontsize=8)
        axis.set(yscale="log", ylabel="tokens a second")
        axis.legend(fontsize=7)
        figure.savefig(folder / "speed_routed.png", dpi=110)


def _draw_growth(runs: dict[str, Run], path: Path) -> None:
    """Time above, memory below, over what grows; beside them the processes."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    for column, over in enumerate(("tokens", "rows", "vocabulary")):
        for axis, key in zip(axes[:, column], ("seconds", "extra_peak_bytes"), strict=True):
            for name, curve in _curves(runs, (over,)):
                xs = [point["tokens" if over == "tokens" else "x"] for point in curve["points"]]
                ys = [point[key] * UNITS[key] for point in curve["points"]]
                label = f"{COLUMNS[name]}, {curve['what']}: {curve['exponents'][key]['exponent']:.2f}"
                axis.plot(xs, ys, "o-", label=label)
            axis.set(xscale="log", yscale="log", xlabel=over)
            sizes = sorted({point["x"] for _, curve in _curves(runs, (over,)) for point in curve["points"]})
            axis.xaxis.set_minor_locator(NullLocator())  # else their labels run into each other
            if over == "tokens":  # the curves have no sizes in common
                axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.xaxis.set_major_formatter("{x:,.0f}")
            else:
                axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
            axis.set(ylabel="seconds" if key == "seconds" else "extra peak memory, MiB")
            if axis.lines:
                axis.legend(fontsize=7, title="exponent", title_fontsize=7)
    axis = axes[0, 3]
    for name, curve in _curves(runs, ("processes",)):
        xs = [point["x"] for point in curve["points"]]
        rates = [point["rows_per_second"] for point in curve["points"]]
        axis.plot(xs, rates, "o-", label=f"{COLUMNS[name]}, {curve['what']}")
        axis.plot(xs, [rates[0] / xs[0] * x for x in xs], ":", color="grey", label="proportional")
        axis.set(xlabel="processes", ylabel="rows a second", ylim=(0, None), xticks=xs)
        axis.legend(fontsize=7)
    axes[1, 3].set_axis_off()
    figure.savefig(path, dpi=110)
