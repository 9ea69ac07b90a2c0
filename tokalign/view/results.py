"""What a page shows of the folders that stages wrote: rows of a heatmap, a training's curves, pass@k, agreement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokalign.stage.loading import load_stage


def heatmap_rows(marked: Path, estimate: Path, limit: int = 24) -> list[dict[str, Any]]:
    """The first marked pairs that the rollout estimate covered, with the columns of both stages."""
    estimated = {(row["id"], *row["rejected_ids"]): row for row in load_stage(estimate)}
    rows: list[dict[str, Any]] = []
    for row in load_stage(marked):
        same = estimated.get((row["id"], *row["rejected_ids"]))
        if same and len(rows) < limit:
            rows.append({**row, **{column: same[column] for column in ("rejected_rollout_accuracy", "critical_index")}})
    return rows


def logp_curve(training: Path) -> dict[str, list[float | None]]:
    """`logps/chosen` and `logps/rejected` over steps, from the log of a training's last checkpoint."""
    states = sorted(training.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name.split("-")[1]))
    history = [entry for entry in json.loads(states[-1].read_text())["log_history"] if "logps/chosen" in entry]
    return {
        "step": [entry["step"] for entry in history],
        "chosen": [entry["logps/chosen"] for entry in history],
        "rejected": [entry["logps/rejected"] for entry in history],
    }


def pass_at_k_bands(curves: Mapping[str, Any]) -> dict[str, Any]:
    """The rollout estimate's curves in the report's form: condition -> k -> (mean, low, high)."""
    return {
        condition: {row["k"]: (row["mean"], *row["ci95"]) for row in curves[condition]}
        for condition in ("with", "without")
    }


def agreement_rows(agreement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a target and signal; figures as (value, low, high)."""
    return [
        {
            "target": target.replace("_", " "),
            "signal": signal.replace("_", " "),
            "AUROC": (figures["auroc"], *figures["auroc_ci95"]),
            "hit@1": (figures["hit1"], *figures["hit1_ci95"]),
            "tokens through the model a scored token": figures.get("tokens_per_scored_token") or "–",
        }
        for target, result in agreement.items()
        for signal, figures in result["signals"].items()
    ]
