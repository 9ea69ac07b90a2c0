"""Which signal finds the critical token of a wrong answer, and at what cost: AUROC, hit@1 and hit within 1.

Reads stages that hold the same rejected completions (matched by `id` and `rejected_ids`), each with some of the columns
`rejected_<signal>`, and the target: `first_error` (the true first wrong token, where a world knows it) or
`critical_index` (the rollout estimate's); both are reported where both are there. −1 or null is unknown.

python scripts/compare_signals.py --datasets runs/scored runs/rollout_estimate --output_dir runs/agreement
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from tokalign.signals.agreement import plot_reports, print_report, report
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage

TARGETS = ("first_error", "critical_index")
# Forward passes over prompt and completion. The sampler's own log-probs cost one.
PASSES = {"contrast": 2, "token_reward": 2, "logprobs": 1, "entropy": 1}


@dataclass
class CompareSignalsArguments:
    """Arguments of the agreement report."""

    datasets: list[str] = field(metadata={"help": "Stages with the same rejected completions."})
    output_dir: str = field(metadata={"help": "Folder of agreement.json and agreement.png."})
    split: str = field(default="train", metadata={"help": "Split of the datasets."})
    signals: list[str] | None = field(
        default=None, metadata={"help": "Names <signal> of columns `rejected_<signal>`, low = critical; default: all."}
    )
    samples: int = field(default=1000, metadata={"help": "Bootstrap resamples of solutions."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def joined(paths: list[str], split: str) -> list[dict[str, Any]]:
    """Rows that all stages hold, with all their columns; one row a distinct rejected completion of a problem."""
    merged: dict[tuple[Any, ...], dict[str, Any]] | None = None
    for path in paths:
        dataset = load_stage(path, split=split)
        for column in ("id", "prompt_ids", "rejected_ids"):
            if column not in dataset.column_names:
                raise ContractError(f"{path} has no column `{column}`; pass stages made from preference pairs.")
        extra = ("id", "prompt_ids", "rollout_tokens", *TARGETS)
        keep = [column for column in dataset.column_names if column.startswith("rejected_") or column in extra]
        rows = {(row["id"], *row["rejected_ids"]): row for row in dataset.select_columns(keep)}
        merged = rows if merged is None else {key: {**merged[key], **rows[key]} for key in merged if key in rows}
    if not merged:
        raise ContractError(f"{' and '.join(paths)} share no rejected completion; pass stages of the same pairs.")
    return list(merged.values())


def main(arguments: CompareSignalsArguments) -> dict[str, Any]:
    rows = joined(arguments.datasets, arguments.split)
    scored = {
        column.removeprefix("rejected_"): [row[column] for row in rows]
        for column, value in rows[0].items()
        if column.startswith("rejected_") and column != "rejected_ids" and isinstance(value, list)
    }
    names = arguments.signals or list(scored)
    for name in names:
        if name not in scored:
            raise ContractError(f"No stage has a column `rejected_{name}`; run the script in scripts/ that scores it.")
    targets = {name: [row[name] for row in rows] for name in TARGETS if name in rows[0]}
    if not targets:
        raise ContractError("No stage has a target column, `first_error` or `critical_index`; run rollout_estimate.py.")

    lengths = [len(row["rejected_ids"]) for row in rows]
    one_pass = sum(len(row["prompt_ids"]) for row in rows) / sum(lengths) + 1
    costs = {name: passes * one_pass for name, passes in PASSES.items() if name in names}
    if "rollout_tokens" in rows[0]:
        costs["rollout_accuracy"] = sum(row["rollout_tokens"] for row in rows) / sum(lengths)
    results = {}
    for target, values in targets.items():
        signals = {name: scored[name] for name in names}
        if target == "critical_index":  # the target is made from it
            signals.pop("rollout_accuracy", None)
        elif "critical_index" in targets:  # the paper's reading of the rollouts: one token, or none
            signals["rollout critical token"] = [
                [0.0 if t == index else 1.0 for t in range(length)]
                for index, length in zip(targets["critical_index"], lengths, strict=True)
            ]
            if "rollout_accuracy" in costs:
                costs["rollout critical token"] = costs["rollout_accuracy"]
        results[target] = report(signals, values, costs=costs, samples=arguments.samples, seed=arguments.seed)
        print_report(results[target], f"Agreement with {target}")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agreement.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot_reports(results, folder / "agreement.png")
    return results


if __name__ == "__main__":
    parser = TrlParser((CompareSignalsArguments,))
    main(*parser.parse_args_and_config())
