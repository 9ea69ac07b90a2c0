"""Accuracy against cost of a routed pair: a table, a figure and JSON from stages of scripts/generate_routed.py.

    python scripts/evaluate_routing.py --slm_run runs/slm --llm_run runs/llm \
        --runs router=runs/routed_10 router=runs/routed_20 entropy=runs/entropy_10 --output_dir runs/routing

All stages hold the same problems. Runs of one name make one line of the figure; query-level routing (whole problems to
the LLM) is worked out from the two models' own runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from tokalign.evaluation.routing import plot_routing, print_routing, query_level, run_summary
from tokalign.stage.files import write_text_atomically


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


def main(arguments: EvaluateRoutingArguments) -> dict[str, Any]:
    points: dict[str, list[dict[str, Any]]] = {
        "SLM only": [run_summary(arguments.slm_run, arguments.llm_run)],
        "LLM only": [run_summary(arguments.llm_run)],
    }
    for run in arguments.runs:
        name, folder = run.split("=", 1)
        points.setdefault(name, []).append(run_summary(folder, arguments.llm_run))
    points["query-level"] = query_level(arguments.slm_run, arguments.llm_run, arguments.query_rates)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output / "routing.json", json.dumps(points, indent=2) + "\n")
    plot_routing(points, output / "routing.png")
    print_routing(points)
    return points


if __name__ == "__main__":
    main(*TrlParser((EvaluateRoutingArguments,)).parse_args_and_config())
