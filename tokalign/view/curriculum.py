"""The emergent curriculum of structured GRPO (RL-Struct, arXiv 2512.00319): each component's mean over the steps.

The paper sees validity rise before structure and structure before content. Read from the trainer's own log, so a run's
`trainer_state.json` is enough to draw it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COMPONENTS = ("validity", "format", "structure", "schema", "correctness", "length")
COLOURS = {name: f"C{i}" for i, name in enumerate(COMPONENTS)}  # the same in every panel
DASHED = ("format", "schema")  # often equal to the one before: both lines stay visible


def curriculum(
    log_history: Sequence[Mapping[str, Any]], name: str = "structured"
) -> dict[str, list[tuple[int, float]]]:
    """(step, mean) of each component that a training log holds, in the order of COMPONENTS.

    Args:
        log_history: of a trainer's state.
        name: the reward's name, prefix of its metrics.
    """
    means = {
        component: [(int(e["step"]), float(e[key])) for e in log_history if e.get(key) is not None]
        for component in COMPONENTS
        for key in (f"{name}/{component}",)
    }
    return {component: points for component, points in means.items() if points}


def first_step(points: Sequence[tuple[int, float]], share: float = 0.5) -> int | None:
    """First step at which a component has made `share` of its way from its first value to its highest; None if it
    never rises."""
    low, high = points[0][1], max(value for _, value in points)
    if high - low < 1e-6:
        return None
    return next(step for step, value in points if value >= low + share * (high - low))


def plot_curriculum(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, name: str = "structured", *, window: int = 1
) -> None:
    """Draw one panel a run, one line a component.

    Args:
        runs: log histories by title.
        path: picture to write.
        window: points of the running mean.
    """
    figure = Figure(figsize=(5 * len(runs), 3.6), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)
    for axis, (title, history) in zip(axes[0], runs.items(), strict=True):
        for component, points in curriculum(history, name).items():
            steps, values = [s for s, _ in points], [v for _, v in points]
            smooth = [
                sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1))
                for i in range(len(values))
            ]
            axis.plot(
                steps,
                smooth,
                label=component,
                linewidth=1.8,
                color=COLOURS[component],
                linestyle="--" if component in DASHED else "-",
            )
        axis.set(title=title, xlabel="optimiser step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean of the component")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    names = [name for name in COMPONENTS if name in lines]
    figure.legend([lines[name] for name in names], names, fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=130)
