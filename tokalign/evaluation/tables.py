"""Evaluations as tables on the screen: every figure with its 95 % interval and its count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tokalign.evaluation.structured import FIGURES

_NAMES = {
    "validity": "valid documents",
    "structure": "structural accuracy",
    "compliance": "schema compliance",
    "content_f1": "content F1",
    "exact_match": "exact match",
    "invented_keys": "invented keys a document",
    "hallucinated": "documents with any",
    "total": "reward",
    "truncated": "truncated",
}


def accuracy_table(metrics: Mapping[str, Any]) -> Table:
    """The figures of `tokalign.evaluation.run`, of one run."""
    table = Table("figure", "value", "95 % interval", "n", title=metrics["adapter"] or metrics["model"])
    _add_share(table, "greedy accuracy", metrics["greedy_accuracy"], metrics["ci95"], metrics["n"])
    if metrics["sampled_accuracy"] is not None:
        _add_share(table, "sampled accuracy", metrics["sampled_accuracy"], metrics["sampled_ci95"], metrics["n"])
        for row in metrics["pass_at_k"]:
            _add_share(table, f"pass@{row['k']}", row["mean"], row["ci95"], row["n"])
    table.add_row("greedy truncated", f"{metrics['truncated']:.1%}", "", str(metrics["n"]))
    for name, row in (metrics["logps"] or {}).items():
        table.add_row(f"log-prob {name} (nats)", f"{row['mean']:.2f}", _span(row["ci95"], "{:.2f}"), str(row["n"]))
    return table


def difference_table(comparison: Mapping[str, Any], other: str) -> Table:
    """`compare_runs`: paired differences of a run to another."""
    table = Table("difference", "value", "95 % interval", "p", "n", title=f"this run − {other}")
    for name in ("greedy", "sampled"):
        if (row := comparison[name]) is not None:
            exact = "" if row["mcnemar_p"] is None else f" (McNemar {row['mcnemar_p']:.2g})"
            cells = (f"{row['difference']:+.1%}", _span(row["ci95"], "{:+.1%}"), f"{row['p']:.2g}{exact}")
            table.add_row(f"{name} accuracy", *cells, str(row["n"]))
    for name, row in (comparison["logps"] or {}).items():
        cells = (f"{row['difference']:+.2f}", _span(row["ci95"], "{:+.2f}"), f"{row['p']:.2g}")
        table.add_row(f"log-prob {name} (nats)", *cells, str(row["n"]))
    if settings := [key for key in comparison["settings"] if key not in ("model", "adapter")]:
        table.caption = f"The runs differ in {', '.join(settings)} too."
    return table


def structured_table(metrics: Mapping[str, Any]) -> Table:
    """The figures of `tokalign.evaluation.structured`, of one run."""
    how = "constrained" if metrics["constrained"] else "free"
    table = Table("figure", "value", "95 % interval", "n", title=f"{metrics['adapter'] or metrics['model']}, {how}")
    for name in FIGURES:
        if (figure := metrics["figures"][name]) is not None:
            form = _form_of(name)
            table.add_row(_NAMES[name], form.format(figure["value"]), _span(figure["ci95"], form), str(figure["n"]))
    latency = metrics["latency"]
    if latency["tokens_per_second"] is not None:
        table.caption = (
            f"{latency['tokens']:,} tokens in {latency['generation_seconds']:.1f} s "
            f"({latency['tokens_per_second']:,.0f} a second); before that {latency['load_seconds']:.1f} s to load and "
            f"{latency['first_call_seconds']:.1f} s for the first call"
        )
    return table


def side_by_side(comparison: Mapping[str, Any]) -> Table:
    """`tokalign.evaluation.structured.compare`: finished runs, each against the first."""
    columns = [run["name"] for run in comparison["runs"]]
    title = "values; below them the paired difference to the first run and its interval"
    table = Table("figure", *columns, title=title)
    for name in FIGURES:
        table.add_row(_NAMES[name], *(_cell(name, run) for run in comparison["runs"]))
    rates = [run["latency"]["tokens_per_second"] for run in comparison["runs"]]
    table.add_row("tokens a second", *("" if rate is None else f"{rate:,.0f}" for rate in rates))
    first_calls = [run["latency"]["first_call_seconds"] for run in comparison["runs"]]
    table.add_row("first call (s)", *(f"{seconds:.2f}" for seconds in first_calls))
    return table


def _cell(name: str, run: Mapping[str, Any]) -> str:
    figure = run["figures"][name]
    if figure is None:
        return ""
    form = _form_of(name)
    text = form.format(figure["value"])
    change = (run["differences"] or {}).get(name)
    if change is None:
        return text
    signed = form.replace(":", ":+")
    return f"{text}\n{signed.format(change['difference'])} ({_span(change['ci95'], signed)})"


def _form_of(name: str) -> str:
    return "{:.2f}" if name in ("invented_keys", "total") else "{:.1%}"


def _add_share(table: Table, name: str, value: float, ci95: list[float], n: int) -> None:
    table.add_row(name, f"{value:.1%}", _span(ci95, "{:.1%}"), str(n))


def _span(ci95: list[float], form: str) -> str:
    return " – ".join(form.format(end) for end in ci95)
