"""Which signal finds the critical token of a wrong answer, and at what cost: AUROC, hit@1 and hit within 1.

    tokalign compare --datasets runs/scored runs/rollout_estimate --output_dir runs/agreement

reads stages that hold the same rejected completions (matched by `id` and `rejected_ids`), each with some of the columns
`rejected_<signal>`, and the target: `first_error` (the true first wrong token, where a world knows it) or
`critical_index` (the rollout estimate's); both are reported where both are there. −1 or null is unknown.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokalign.signals.agreement import agreement, joined_rows, plot_reports, print_report


@dataclass
class Arguments:
    """What is compared, and where the report goes."""

    datasets: list[str] = field(metadata={"help": "Stages with the same rejected completions."})
    output_dir: str = field(metadata={"help": "Folder of agreement.json and agreement.png."})
    split: str = field(default="train", metadata={"help": "Split of the datasets."})
    signals: list[str] | None = field(
        default=None, metadata={"help": "Signals to compare, by name; unset is all that the stages hold."}
    )
    samples: int = field(default=1000, metadata={"help": "Bootstrap resamples of solutions."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def main(arguments: Arguments) -> dict[str, Any]:
    rows = joined_rows(arguments.datasets, arguments.split)
    results = agreement(rows, arguments.signals, samples=arguments.samples, seed=arguments.seed)
    for target, result in results.items():
        print_report(result, f"Agreement with {target}")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_reports(results, folder / "agreement.png")
    return results
