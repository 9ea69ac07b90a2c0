"""The report of a comparison of methods: one self-contained HTML page from plain data.

Table, accuracies with intervals, paired comparisons, training curves, pass@k, agreement with the truth, a token
heatmap, and what made it all. The page shows; it does not conclude: sentences that depend on the results are the
caller's. Figures are SVG inside the page, drawn narrow enough to be read on a phone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokalign.stage.contract import SIDES

# Okabe and Ito's colours, which people with any colour vision tell apart; black comes first for the base model.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: Any = {
    "svg.hashsalt": "tokalign",  # the same data give the same bytes
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # a `$` in a method's name is a dollar
    "figure.constrained_layout.use": True,
}
WIDTH = 4.4  # inches: at 9 pt the letters are still 8 pt tall on a phone 360 points wide

Curve = Mapping[str, Sequence[float | None]]
Band = tuple[float, float, float]  # mean, low, high


def build_report(
    *,
    title: str,
    table: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]] = (),
    curves: Mapping[str, Curve] | None = None,
    pass_at_k: Mapping[str, Mapping[int, Band]] | None = None,
    agreement: Sequence[Mapping[str, Any]] = (),
    heatmap: str | None = None,
    commands: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
    summary: str = "",
    captions: Mapping[str, str] | None = None,
) -> str:
    """One HTML page.

    Args:
        table: a row a method: `method`, `greedy_accuracy`, `ci95`, `n`, and where known `sampled_accuracy`,
            `sampled_ci95`, `chosen_change`, `rejected_change` (mean log-prob change from the common start, nats).
        comparisons: results of `evaluation.metrics.paired_bootstrap` with a `name`, e.g. "critical-token DPO − DPO".
        curves: by method: `step` and, as long, `chosen` and `rejected` (mean log-prob, nats; None where not logged).
        pass_at_k: by condition ("with", "without" the critical token): k -> (mean, low, high).
        agreement: rows of a table in the caller's own columns; the first row's keys are the heading.
        heatmap: `token_heatmap(..., fragment=True)`. The one argument that is markup, and is put in as it is.
        commands: shell lines that reproduce the page.
        environment: versions, hardware, seeds …
        summary: a paragraph of the caller's under the title.
        captions: text under a section, by section: "table", "comparisons", "curves", "pass_at_k", "agreement",
            "heatmap"; each has a neutral default that says what is shown.

    Raises:
        ValueError: one sentence naming method and column, for a curve whose lists differ in length, an accuracy
            outside [0, 1], or an interval that does not hold its value.
    """
    for row in table:
        _check_row(row)
    environment_jinja = Environment(
        loader=PackageLoader("tokalign.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = {"accuracy": _accuracy_figure(table) if table else None, "curves": None, "pass_at_k": None}
    if curves:
        figures["curves"] = _curves_figure(curves)
    if pass_at_k:
        figures["pass_at_k"] = _pass_at_k_figure(pass_at_k)
    return environment_jinja.get_template("report.html").render(
        title=title,
        summary=summary,
        table=_method_table(table),
        comparisons=[_comparison_row(row) for row in comparisons],
        figures=figures,
        agreement=[{key: _cell(value) for key, value in row.items()} for row in agreement],
        agreement_columns=list(agreement[0]) if agreement else [],
        heatmap=Markup(heatmap) if heatmap else None,
        commands=commands,
        environment={key: str(value) for key, value in (environment or {}).items()},
        captions={**_CAPTIONS, **(captions or {})},
    )


_CAPTIONS = {
    "table": "Accuracy on held-out problems. Brackets are 95 % intervals; n is the number of problems.",
    "comparisons": "Differences on the same problems, resampled problem by problem. An interval that holds 0 means "
    "that these problems do not tell the two apart.",
    "curves": "Mean log-probability of chosen and rejected completions while training, in nats. Above: chosen. "
    "Below: rejected.",
    "pass_at_k": "Share of prefixes from which at least one of k continuations is right, when the critical token is "
    "kept and when it is masked. Bands are 95 % intervals.",
    "agreement": "How well each estimate finds the token at which a wrong solution goes wrong.",
    "heatmap": "Completions coloured by token score. Point at a token, or use the arrow keys, for its numbers.",
}


def _check_row(row: Mapping[str, Any]) -> None:
    for value, interval in (("greedy_accuracy", "ci95"), ("sampled_accuracy", "sampled_ci95")):
        share, ends = row.get(value), row.get(interval)
        if share is None:
            continue
        if not 0 <= share <= 1:
            raise ValueError(f"Method {row['method']!r}: `{value}` is {share}, not a share between 0 and 1.")
        if ends is not None and not ends[0] - 1e-9 <= share <= ends[1] + 1e-9:
            raise ValueError(
                f"Method {row['method']!r}: `{interval}` {list(ends)} does not hold `{value}` {share}; "
                "take both from the same run."
            )


def _method_table(table: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for row in table:
        rows.append(
            {
                "Method": str(row["method"]),
                "Greedy": _share(row.get("greedy_accuracy"), row.get("ci95")),
                "Sampled": _share(row.get("sampled_accuracy"), row.get("sampled_ci95")),
                "n": f"{row['n']:,}" if row.get("n") is not None else "–",
                "Chosen Δ (nats)": _signed(row.get("chosen_change")),
                "Rejected Δ (nats)": _signed(row.get("rejected_change")),
            }
        )
    empty = [key for key in (rows[0] if rows else {}) if all(row[key] == "–" for row in rows)]
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _comparison_row(row: Mapping[str, Any]) -> dict[str, str]:
    value, low, high = (_signed(100 * part, 1) for part in (row["difference"], *row["ci95"]))
    return {
        "Comparison": str(row["name"]),
        "Difference (points)": f"{value} [{low}, {high}]",
        "p": _p(row["p"]),
        "p (McNemar)": _p(row.get("mcnemar_p")),
        "Only first / only second": f"{row['wins']:,} / {row['losses']:,}" if "wins" in row else "–",
        "n": f"{row['n']:,}",
    }


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:.1f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _signed(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _cell(value: Any) -> str:
    """A value of a free table: numbers to three digits, a (value, low, high) or [low, high] with its parts."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    if isinstance(value, Sequence):
        parts = [_cell(part) for part in value]
        return f"{parts[0]} [{', '.join(parts[1:])}]" if len(parts) == 3 else f"[{', '.join(parts)}]"
    return str(value)


# --------------------------------------------------------------------------------------------------------- figures


def _accuracy_figure(table: Sequence[Mapping[str, Any]]) -> str:
    """Dots with intervals, one line a method: greedy filled, sampled open."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(table)))
        axes = figure.add_subplot()
        labelled: set[str] = set()
        for i, row in enumerate(table):
            for key, interval, shift, face in (
                ("greedy_accuracy", "ci95", -0.13, COLOURS[1]),
                ("sampled_accuracy", "sampled_ci95", 0.13, "white"),
            ):
                if row.get(key) is None:
                    continue
                value = 100 * row[key]
                low, high = (100 * end for end in (row.get(interval) or (row[key], row[key])))
                axes.errorbar(
                    value,
                    i + shift,
                    xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    fmt="o",
                    color=COLOURS[1],
                    markerfacecolor=face,
                    capsize=2,
                    label=None if key in labelled else key.removesuffix("_accuracy"),
                )
                labelled.add(key)
        axes.set_yticks(range(len(table)), [str(row["method"]) for row in table])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy (%)")
        _legend_above(figure)
        return _svg(figure)


def _curves_figure(curves: Mapping[str, Curve]) -> str:
    """Chosen above, rejected below, one line a method, on one step axis."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 4.8))
        panels = figure.subplots(2, 1, sharex=True)
        for i, (method, curve) in enumerate(curves.items()):
            for axes, side in zip(panels, SIDES, strict=True):
                if len(curve[side]) != len(curve["step"]):
                    raise ValueError(
                        f"Curve of {method!r}: `{side}` has {len(curve[side])} values for {len(curve['step'])} steps; "
                        "give one value, or None, for every step."
                    )
                known = [(s, v) for s, v in zip(curve["step"], curve[side], strict=True) if v is not None]
                axes.plot(
                    [s for s, _ in known],
                    [v for _, v in known],
                    color=_colour(i),
                    marker=MARKERS[i % len(MARKERS)],
                    markersize=3.5,
                    markevery=max(1, len(known) // 8),
                    linewidth=1.4,
                    label=method if side == "chosen" else None,
                )
        panels[0].set_ylabel("log π(chosen), nats")
        panels[1].set_ylabel("log π(rejected), nats")
        panels[1].set_xlabel("optimizer step")
        _legend_above(figure)
        return _svg(figure)


def _pass_at_k_figure(conditions: Mapping[str, Mapping[int, Band]]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.0))
        axes: Axes = figure.add_subplot()
        ticks: set[int] = set()
        for i, (condition, values) in enumerate(conditions.items()):
            ks = sorted(values, key=int)  # keys may be text: they are in JSON
            numbers = [int(k) for k in ks]
            ticks.update(numbers)
            bands = [[100 * part for part in values[k]] for k in ks]
            style: dict[str, Any] = {"color": _colour(i + 1), "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            axes.plot(numbers, [b[0] for b in bands], label=f"{condition} the critical token", **style)
            axes.fill_between(
                numbers, [b[1] for b in bands], [b[2] for b in bands], color=_colour(i + 1), alpha=0.18, linewidth=0
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        axes.minorticks_off()
        axes.set_ylim(-3, 103)
        axes.set_xlabel("k, continuations a prefix")
        axes.set_ylabel("pass@k (%)")
        _legend_above(figure)
        return _svg(figure)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _legend_above(figure: Figure) -> None:
    handles = sum(len(axes.get_legend_handles_labels()[0]) for axes in figure.axes)
    figure.legend(loc="outside upper left", ncols=min(2, max(1, handles)), handlelength=1.8, columnspacing=1.2)


def _svg(figure: Figure) -> str:
    """Data URI of the figure as SVG: as an image it cannot clash with the page's ids or run anything."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
