r"""Critical-token DPO and its rivals (arXiv 2411.19943v3, Table 3) in the ledger world, by seed.

    python benchmarks/critical_dpo_ledger.py --output_dir runs/benchmarks/critical_dpo_ledger

Base, SFT, SFT→DPO, SFT→TDPO, DPO, TDPO, RPO and critical-token DPO from one base model. Grid, seeds and test problems
as in ledger_comparison.py. Beside accuracy: how the log-probs of chosen and rejected answers move during training,
pass@k from wrong answers' prefixes with and without the critical token of the rollout estimate, and what the contrast
costs against that estimate. Writes results.json; pages/critical_token_dpo.py makes the page.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ledger_comparison import (
    MEASURES,
    Comparison,
    ComparisonArguments,
    Method,
    SeedRun,
    difference,
    show_comparison,
    summary,
)
from ledger_stages import LEDGER, MAX_TOKENS, over_seeds, write_json
from trl import TrlParser

from tokalign.cli.ledger_models import trained_model
from tokalign.stage.loading import load_stage
from tokalign.view.results import logp_curve

TDPO = "benchmarks/peers/tdpo.py"
OURS = "critical-token DPO"
METHODS = {
    "SFT": Method("sft", "recipes/sft.py", dataset="positive"),
    "SFT→DPO": Method("dpo", start="SFT"),
    "SFT→TDPO": Method("dpo", TDPO, start="SFT"),
    "DPO": Method("dpo"),
    "TDPO": Method("dpo", TDPO),
    "RPO": Method("rpo"),
    OURS: Method("critical_dpo", dataset="scored"),
}
EQUAL = f"{OURS} at DPO's rate"  # not tuned: how log-probs move depends on the rate, and the tuned ones differ
CLAIMS = (  # better, worse
    (OURS, "RPO"),
    (OURS, "DPO"),
    (OURS, "SFT→DPO"),
    (OURS, "SFT→TDPO"),
    (OURS, "SFT"),
    (OURS, "base"),
    ("RPO", "DPO"),
    ("SFT", "base"),
    ("SFT→DPO", "SFT"),
    ("SFT→TDPO", "SFT→DPO"),
    (OURS, "TDPO"),
    (EQUAL, "DPO"),
)
CURVES = ("DPO", "TDPO", "RPO", OURS)  # methods that start from the base on the same pairs in the same order


@dataclass
class CriticalDPOLedgerArguments(ComparisonArguments):
    """Sizes of the experiment."""

    output_dir: str = field(
        default="runs/benchmarks/critical_dpo_ledger",
        metadata={"help": "Folder of all results; a killed run goes on."},
    )
    rollouts: int = field(default=16, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        metadata={"help": "The grid, the same for every method."},
    )
    estimate_rows: int = field(default=20, metadata={"help": "Wrong answers a seed with a rollout estimate."})
    continuations: int = field(default=64, metadata={"help": "Continuations a prefix of the rollout estimate."})


def positive(run: SeedRun) -> Path:
    return run.out / "preferences" / "positive"


def scored(run: SeedRun) -> Path:
    """Contrastive scores by this seed's own adapters."""
    for side in ("positive", "negative"):
        run.stages.train(
            *(f"{side} adapter", "recipes/sft.py", run.out / side, "--config", f"{LEDGER}/{side}_sft.yaml"),
            *("--model_name_or_path", run.base, "--dataset_name", run.out / "preferences" / side, "--seed", run.seed),
        )
    run.stages.run(
        *("contrastive scores", "scripts/score.py", "contrast", "--model", run.base, "--dataset", run.dataset("pairs")),
        *("--positive", run.out / "positive", "--negative", run.out / "negative", "--output_dir", run.out / "scored"),
    )
    return run.out / "scored"


def rollout_estimate(run: SeedRun, args: CriticalDPOLedgerArguments) -> dict[str, Any]:
    """pass@k with and without the critical token, and tokens and forward passes of both estimates an answer."""
    folder = run.out / "rollout_estimate"
    run.stages.run(
        *("rollout estimate", "scripts/score.py", "rollout", "--model", run.base, "--dataset", run.dataset("pairs")),
        *("--max_rows", args.estimate_rows, "--n", args.continuations, "--max_tokens", MAX_TOKENS),
        *("--output_dir", folder, "--seed", run.seed),
    )
    rows = load_stage(folder)
    tokens = sum(len(ids) for ids in rows["rejected_ids"])
    through = sum(len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in rows)
    curves = json.loads((folder / "pass_at_k.json").read_text())
    return {
        "rows": len(rows),
        "with_critical_token": sum(index >= 0 for index in rows["critical_index"]),
        "pass_at_k": {kind: {str(point["k"]): point["mean"] for point in curves[kind]} for kind in ("with", "without")},
        # A token that is generated is a forward pass of the model over one position of one row
        "rollout_tokens": sum(rows["rollout_tokens"]) / tokens,
        "rollout_passes_an_answer": sum(rows["rollout_tokens"]) / len(rows),
        "contrast_tokens": 2 * through / tokens,  # two forward passes over prompt and completion
    }


def curves(run: SeedRun, rates: dict[str, float]) -> dict[str, Any]:
    """Change of the chosen and rejected log-prob by training step: each method's log minus the reference's log-prob of
    the same batches (DPO's own log has it: logps − rewards / β), since all see the pairs in the same order."""
    folder = run.train("DPO", rates["DPO"])
    history = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    entries = [entry for entry in history if "logps/chosen" in entry]
    beta = 0.1  # recipes/ledger/dpo.yaml
    start = {
        side: [e[f"logps/{side}"] - e[f"rewards/{side}"] / beta for e in entries] for side in ("chosen", "rejected")
    }
    found: dict[str, Any] = {"step": [e["step"] for e in entries]}
    for method in CURVES:
        curve = logp_curve(run.train(method, rates[method]))
        found[method] = {
            side: [a - b for a, b in zip(curve[side], start[side], strict=True)] for side in ("chosen", "rejected")
        }
    return found


def main(args: CriticalDPOLedgerArguments) -> dict[str, Any]:
    args.base = args.base or str(trained_model("ledger-slm"))
    comparison = Comparison(args, METHODS, {"positive": positive, "scored": scored})
    comparison.choose_rates()
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *METHODS, EQUAL)}
    rates = comparison.rates | {EQUAL: comparison.rates["DPO"]}
    estimates, dynamics = [], []
    for number in range(args.seeds):
        run = comparison.seed(number)
        logps = ("--preferences", run.dataset("pairs"))
        for method in by_method:
            figures = run.figures(OURS if method == EQUAL else method, rates.get(method), *logps)
            sides = {side: figures["logps"][side]["mean"] for side in ("chosen", "rejected")}
            start = by_method["base"][number] if method != "base" else {f"{s}_logp": sides[s] for s in sides}
            by_method[method].append(
                {key: figures[key] for key in MEASURES}
                | {f"{side}_logp": value for side, value in sides.items()}
                | {f"{side}_change": value - start[f"{side}_logp"] for side, value in sides.items()}
            )
        dynamics.append(curves(run, comparison.rates))
        estimates.append(rollout_estimate(run, args))
    keys = (*MEASURES, "chosen_change", "rejected_change")
    results = {
        "arguments": asdict(args),
        "validation": comparison.validation(),
        "methods": summary(by_method, keys),
        "differences": [difference(by_method, *claim, keys=keys) for claim in CLAIMS],
        "dynamics": mean_curves(dynamics),
        "pass_at_k": {
            kind: {k: over_seeds([e["pass_at_k"][kind][k] for e in estimates]) for k in estimates[0]["pass_at_k"][kind]}
            for kind in ("with", "without")
        },
        "freed": {  # at the largest k: what taking the critical token away adds
            k: over_seeds([e["pass_at_k"]["without"][k] - e["pass_at_k"]["with"][k] for e in estimates])
            for k in ("1", str(args.continuations))
        },
        "estimates": {
            key: over_seeds([e[key] for e in estimates])
            for key in (
                *("rows", "with_critical_token", "rollout_tokens", "rollout_passes_an_answer", "contrast_tokens"),
            )
        },
    }
    write_json(Path(args.output_dir) / "results.json", results)
    show_comparison(results)
    return results


def mean_curves(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds, at the steps that all have (a seed has as many pairs as its rollouts gave)."""
    steps = min((curve["step"] for curve in by_seed), key=len)
    return {"step": steps} | {
        method: {
            side: [over_seeds([curve[method][side][i] for curve in by_seed])["mean"] for i in range(len(steps))]
            for side in ("chosen", "rejected")
        }
        for method in CURVES
    }


if __name__ == "__main__":
    main(*TrlParser((CriticalDPOLedgerArguments,)).parse_args_and_config())
