r"""How good token signals are: which finds the token that breaks a wrong solution, and at what cost.

    python benchmarks/token_credit.py --output_dir runs/benchmarks/token_credit

On wrong solutions of the ledger world, whose first wrong token is known exactly, and against the critical token of the
rollout estimate (arXiv 2411.19943v3): contrastive score, T-REG's reward by contrastive prompting (arXiv 2412.02685) and
the plain log-prob of the model that gives it, DPO's implicit reward, entropy, log-prob, random. Every seed has its own
problems, rollouts, pairs and adapters. AUROC of "is the target" and hit@1, as means over seeds with 95 % intervals, and
tokens through a model for each scored token. Training a model or an adapter is not counted as a cost. Writes
results.json; pages/treg.py and pages/critical_token_dpo.py show it.

A new signal joins by one line in SIGNALS, once it is in the table of signals and a command writes its column.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ledger_stages import (
    LEDGER,
    MAX_TOKENS,
    build_pairs,
    models,
    over_seeds,
    paired,
    score_token_rewards,
    stages_in,
    write_json,
)
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from tokalign.signals.agreement import report
from tokalign.signals.registry import Signal, get
from tokalign.stage.loading import load_stage

SIGNALS = {
    "contrastive score": get("contrast"),
    "T-REG reward (eval model)": get("token_reward"),
    "log-prob (eval model)": replace(get("logprob"), name="eval_logprob"),
    "DPO implicit reward": get("implicit_reward"),
    "entropy": get("entropy"),
    "log-prob": get("logprob"),
    "random": Signal("random", "random", 0.0, 1.0, "share", "low", passes=0),
}
RENAMED = {"eval_likelihood": {"rejected_logprob": "rejected_eval_logprob"}}  # two models' columns of one name
TARGETS = {"first_error": "true first error", "critical_index": "rollout estimate"}
CLAIMS = (  # what the two papers build on, and the plain signals beside
    ("contrastive score", "random"),
    ("contrastive score", "log-prob"),
    ("contrastive score", "DPO implicit reward"),
    ("T-REG reward (eval model)", "random"),
    ("T-REG reward (eval model)", "DPO implicit reward"),
    ("T-REG reward (eval model)", "log-prob (eval model)"),
)
MEASURES = {"auroc": "AUROC", "hit1": "hit@1"}


@dataclass
class TokenCreditArguments:
    """Sizes of the benchmark."""

    base: str | None = field(default=None, metadata={"help": "Model under study; unset is the ledger's weak base."})
    eval_model: str | None = field(
        default=None,
        metadata={"help": "Model that gives token rewards; unset is the ledger's, which can rewrite drafts."},
    )
    output_dir: str = field(default="runs/benchmarks/token_credit", metadata={"help": "Folder of all results."})
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    problems: int = field(default=600, metadata={"help": "Training problems a seed."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    estimate_rows: int = field(default=40, metadata={"help": "Wrong solutions a seed with a rollout estimate."})
    continuations: int = field(default=32, metadata={"help": "Continuations a prefix of the rollout estimate."})


def run_seed(args: TokenCreditArguments, seed: int) -> dict[str, Any]:
    """All signals and both targets of one seed; agreement by target."""
    out = Path(args.output_dir) / f"seed-{seed}"
    stages = stages_in(out)
    pairs = build_pairs(stages, out, args.base, problems=args.problems, rollouts=args.rollouts, seed=seed)
    base = ("--model_name_or_path", args.base, "--seed", seed)
    for side in ("positive", "negative"):
        stages.train(
            *(f"{side} adapter", "recipes/sft.py", out / side, "--config", f"{LEDGER}/{side}_sft.yaml"),
            *(*base, "--dataset_name", out / "preferences" / side),
        )
    stages.run(
        *("contrastive scores", "scripts/score.py", "contrast", "--model", args.base, "--dataset", pairs),
        *("--positive", out / "positive", "--negative", out / "negative", "--output_dir", out / "contrast"),
    )
    stages.train(
        *("DPO", "recipes/critical_dpo.py", out / "dpo", "--config", f"{LEDGER}/dpo.yaml"),
        *(*base, "--dataset_name", pairs),
    )
    likelihood = {  # of the base that wrote the solutions, of the DPO policy against it, of the eval model
        "base_likelihood": ("--model", args.base, "--signals", "logprob", "entropy"),
        "implicit": ("--model", args.base, "--adapter", out / "dpo", "--signals", "implicit_reward"),
        "eval_likelihood": ("--model", args.eval_model, "--signals", "logprob"),
    }
    for name, options in likelihood.items():
        stages.run(
            *(name.replace("_", " "), "scripts/score.py", "likelihood", *options),
            *("--dataset", pairs, "--output_dir", out / name),
        )
    rewarded = score_token_rewards(stages, out, args.eval_model, pairs)
    stages.run(
        *("true first errors", "scripts/score.py", "first-error", "--dataset", pairs, "--tokenizer", args.base),
        *("--problems", out / "world" / "train", "--output_dir", out / "marked"),
    )
    stages.run(
        *("rollout estimate", "scripts/score.py", "rollout", "--model", args.base, "--dataset", pairs),
        *("--max_rows", args.estimate_rows, "--n", args.continuations, "--max_tokens", MAX_TOKENS),
        *("--output_dir", out / "estimate", "--seed", seed),
    )
    scored = [out / name for name in ("contrast", *likelihood)]
    return agreement([rewarded, *scored, out / "marked", out / "estimate"], seed)


def agreement(folders: list[Path], seed: int) -> dict[str, Any]:
    """`report` by target over the wrong solutions that all stages hold (the rollout estimate covers the first ones)."""
    tables: list[dict[tuple, dict[str, Any]]] = []
    for folder in folders:
        dataset = load_stage(folder)
        keep = [c for c in dataset.column_names if c.startswith("rejected_") or c in ("id", "prompt_ids", *TARGETS)]
        rows = dataset.select_columns(keep).rename_columns(RENAMED.get(folder.name, {}))
        tables.append({(row["id"], *row["rejected_ids"]): row for row in rows})
    results = {}
    for target in TARGETS:
        needed = tables if target == "critical_index" else tables[:-1]
        keys = [key for key in needed[0] if all(key in table for table in needed)]
        rows = [{name: value for table in needed for name, value in table[key].items()} for key in keys]
        draw = random.Random(seed)
        for row in rows:
            row["rejected_random"] = [draw.random() for _ in row["rejected_ids"]]
        scores = {
            name: [signal.suspicion(np.asarray(row[f"rejected_{signal.name}"])) for row in rows]
            for name, signal in SIGNALS.items()
        }
        results[target] = report(scores, [row[target] for row in rows], costs=costs(rows, folders), samples=2)
    return results


def costs(rows: list[dict[str, Any]], folders: list[Path]) -> dict[str, float]:
    """Tokens through a model for each scored token; revision prompts are longer than the prompt by what they quote."""
    scored = sum(len(row["rejected_ids"]) for row in rows)
    one_pass = sum(len(row["prompt_ids"]) for row in rows) / scored + 1
    found = {name: (signal.passes or 0) * one_pass for name, signal in SIGNALS.items()}
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    found["T-REG reward (eval model)"] = manifest["model_tokens"] / manifest["scored_tokens"]
    return found


def summarise(args: TokenCreditArguments, by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with intervals."""
    results: dict[str, Any] = {"arguments": asdict(args), "targets": {}}
    for target in TARGETS:
        reports = [seed[target] for seed in by_seed]
        results["targets"][target] = {
            "solutions": [r["solutions"] for r in reports],
            "unknown": [r["unknown"] for r in reports],
            "signals": {
                name: {key: over_seeds([r["signals"][name][key] for r in reports]) for key in MEASURES}
                | {
                    "tokens_per_scored_token": over_seeds(
                        [r["signals"][name]["tokens_per_scored_token"] for r in reports]
                    )["mean"]
                }
                for name in SIGNALS
            },
            "differences": [
                {"better": better, "worse": worse}
                | {
                    key: paired(
                        [r["signals"][better][key] for r in reports], [r["signals"][worse][key] for r in reports]
                    )
                    for key in MEASURES
                }
                for better, worse in CLAIMS
            ],
        }
    return results


def show(results: dict[str, Any]) -> None:
    """The tables on screen."""

    def cell(entry: dict[str, Any]) -> str:
        low, high = entry["ci95"]
        return f"{entry['mean']:.3f}" + ("" if low is None else f" ({low:.3f} – {high:.3f})")

    for target, label in TARGETS.items():
        part = results["targets"][target]
        title = f"Against the {label}: {sum(part['solutions'])} wrong solutions, {results['arguments']['seeds']} seeds"
        table = Table("signal", *MEASURES.values(), "tokens / scored token", title=title)
        for name, entry in part["signals"].items():
            table.add_row(name, *(cell(entry[k]) for k in MEASURES), f"{entry['tokens_per_scored_token']:.1f}")
        Console().print(table)


def main(args: TokenCreditArguments) -> dict[str, Any]:
    args.base, args.eval_model = models(args.base, args.eval_model)
    results = summarise(args, [run_seed(args, seed) for seed in range(args.seeds)])
    write_json(Path(args.output_dir) / "results.json", results)
    show(results)
    return results


if __name__ == "__main__":
    main(*TrlParser((TokenCreditArguments,)).parse_args_and_config())
