r"""Accuracy against cost of a routed pair: a table, a figure and JSON from stages of `tokalign generate`.

    tokalign evaluate routing --slm_run runs/slm --llm_run runs/llm \
        --runs router=runs/routed_10 router=runs/routed_20 entropy=runs/entropy_10 --output_dir runs/routing

All stages hold the same problems. Runs of one name make one line of the figure; query-level routing (whole problems to
the LLM) is worked out from the two models' own runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokalign.evaluation.routing import print_routing, routing_points, write_routing


@dataclass
class EvaluateRoutingArguments:
    """Which stages to compare."""

    slm_run: str = field(metadata={"help": "Stage of the SLM alone (--policy never)."})
    llm_run: str = field(metadata={"help": "Stage of the LLM alone (--policy always)."})
    output_dir: str = field(metadata={"help": "Folder of routing.json and routing.png."})
    runs: list[str] = field(default_factory=list, metadata={"help": "name=folder for each routed stage."})
    query_rates: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.25], metadata={"help": "LLM rates of query-level routing."}
    )

    def __post_init__(self) -> None:
        for run in self.runs:
            if "=" not in run:
                raise ValueError(f"--runs has {run!r}: write name=folder, e.g. router=runs/routed.")


def main(arguments: EvaluateRoutingArguments) -> dict[str, list[dict[str, Any]]]:
    runs = [run.split("=", 1) for run in arguments.runs]
    points = routing_points(arguments.slm_run, arguments.llm_run, runs, arguments.query_rates)
    write_routing(points, arguments.output_dir)
    print_routing(points)
    return points
