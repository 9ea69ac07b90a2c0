r"""How good token signals are: which finds the token that breaks a wrong solution, and at what cost.

    python -m benchmarks.experiments.token_credit --output_dir runs/benchmarks/token_credit

On wrong solutions of the ledger world, whose first wrong token is known exactly, and against the critical token of the
rollout estimate (arXiv 2411.19943v3): contrastive score, T-REG's reward by contrastive prompting (arXiv 2412.02685) and
the plain log-prob of the model that gives it, DPO's implicit reward, entropy, log-prob, random. Every seed has its own
problems, rollouts, pairs and adapters. AUROC of "is the target" and hit@1, as means over seeds with 95 % intervals, and
tokens through a model for each scored token. Training a model or an adapter is not counted as a cost. Writes
results.json; docs/results/treg.md and critical_token_dpo.md show it.

A new signal joins by one line in SIGNALS, once it is in the table of signals and a command writes
its column `rejected_<signal>`.

Behind its first error a solution goes on from a wrong balance, and tokens differ in kind: so the first wrong token is
also looked for among the tokens up to it, and there among those of its kind (numbers, names, words, signs).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments.common import DETECTION, EVAL_MODEL, detection_figure, detection_row
from benchmarks.ledger_stages import LedgerStages, WorldArguments
from benchmarks.render import CLAIM, Tables, claim, number, save
from tokalign.signals.agreement import CHANCE, among, report
from tokalign.signals.registry import Signal, get
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.statistics import over_seeds, paired
from tokalign.worlds.ledger_rich import PEOPLE

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
TARGETS = {"first_error": "first wrong token", "critical_index": "rollout estimate"}
CLAIMS = (  # what the two papers build on, and the plain signals beside
    ("contrastive score", "random"),
    ("contrastive score", "log-prob"),
    ("contrastive score", "DPO implicit reward"),
    ("T-REG reward (eval model)", "random"),
    ("T-REG reward (eval model)", "DPO implicit reward"),
    ("T-REG reward (eval model)", "log-prob (eval model)"),
)


EARLY = "up to the first error"
KINDS = (EARLY, "numbers", "names", "words", "signs")


@dataclass
class TokenCreditArguments(WorldArguments):
    """Sizes of the benchmark."""

    base: str | None = field(default=None, metadata={"help": "Model under study; unset is the ledger's weak base."})
    eval_model: str | None = field(default=None, metadata=EVAL_MODEL)
    output_dir: str = "runs/benchmarks/token_credit"
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    problems: int = field(default=600, metadata={"help": "Training problems a seed."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    estimate_rows: int = field(default=40, metadata={"help": "Wrong solutions a seed with a rollout estimate."})
    continuations: int = field(default=32, metadata={"help": "Continuations a prefix of the rollout estimate."})


def run_seed(args: TokenCreditArguments, seed: int) -> dict[str, Any]:
    """All signals and both targets of one seed; agreement by target."""
    base = args.ledger_model("ledger-slm", seed, args.base)
    eval_model = args.ledger_model("ledger-slm-revise", seed, args.eval_model)
    stages = LedgerStages(Path(args.output_dir) / f"seed-{seed}", args.world)
    pairs = stages.pairs(base, problems=args.problems, rollouts=args.rollouts, seed=seed)
    data = {"model_name_or_path": base, "dataset_name": pairs, "seed": seed}
    dpo = stages.recipe("dpo", "critical-dpo", "dpo", **data)
    scored = [
        stages.contrast(base, pairs, seed),
        # of the base that wrote the solutions, of the DPO policy against it, of the eval model
        stages.likelihood("base_likelihood", base, pairs, "logprob", "entropy"),
        stages.likelihood("implicit", base, pairs, "implicit_reward", adapter=dpo),
        stages.likelihood("eval_likelihood", eval_model, pairs, "logprob"),
    ]
    rewarded, marked = stages.token_rewards(eval_model, pairs), stages.first_errors(base, pairs)
    sizes = {"rows": args.estimate_rows, "continuations": args.continuations}
    folders = [rewarded, *scored, marked, stages.rollout_estimate(base, pairs, seed=seed, **sizes)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return agreement(folders, seed, [kind_of(tokenizer.decode([i])) for i in range(len(tokenizer))])


def kind_of(token: str) -> str:
    """What a token is: one of `KINDS`."""
    word = token.strip()
    if word.isdigit():
        return "numbers"
    if word in PEOPLE:
        return "names"
    return "words" if word.isalpha() else "signs"


def by_kind(
    scores: dict[str, list[np.ndarray]], targets: Sequence[int], ids: Sequence[Sequence[int]], kinds: Sequence[str]
) -> dict[str, Any]:
    """`report` among the tokens up to the first error, and among those of a kind; kinds without a rival are left out.

    Args:
        kinds: of every token of the vocabulary.
    """
    reports = {}
    for kind in KINDS:
        candidates = [
            np.asarray([t <= target and kind in (EARLY, kinds[token]) for t, token in enumerate(row)])
            for row, target in zip(ids, targets, strict=True)
        ]
        cut, places = among(scores, targets, candidates)
        rivals = sum(len(row) - 1 for row, place in zip(cut["random"], places, strict=True) if place >= 0)
        if rivals > 0:
            reports[kind] = report(cut, places, samples=2)
    return reports


def agreement(folders: list[Path], seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    """`report` by target over the wrong solutions that all stages hold (the rollout estimate covers the first ones)."""
    by_stage: list[dict[tuple, dict[str, Any]]] = []
    for folder in folders:
        dataset = load_stage(folder)
        keep = [c for c in dataset.column_names if c.startswith("rejected_") or c in ("id", "prompt_ids", *TARGETS)]
        rows = dataset.select_columns(keep).rename_columns(RENAMED.get(folder.name, {}))
        by_stage.append({(row["id"], *row["rejected_ids"]): row for row in rows})
    results = {}
    for target in TARGETS:
        needed = by_stage if target == "critical_index" else by_stage[:-1]
        keys = [key for key in needed[0] if all(key in table for table in needed)]
        rows = [{name: value for table in needed for name, value in table[key].items()} for key in keys]
        draw = random.Random(seed)
        for row in rows:
            row["rejected_random"] = [draw.random() for _ in row["rejected_ids"]]
        scores = {
            name: [signal.suspicion(np.asarray(row[f"rejected_{signal.name}"])) for row in rows]
            for name, signal in SIGNALS.items()
        }
        targets = [row[target] for row in rows]
        results[target] = report(scores, targets, costs=costs(rows, folders), samples=2)
        if target == "first_error":
            results["kinds"] = by_kind(scores, targets, [row["rejected_ids"] for row in rows], kinds)
    return results


def costs(rows: list[dict[str, Any]], folders: list[Path]) -> dict[str, float]:
    """Tokens through a model for each scored token; revision prompts are longer than the prompt by what they quote."""
    scored = sum(len(row["rejected_ids"]) for row in rows)
    one_pass = sum(len(row["prompt_ids"]) for row in rows) / scored + 1
    tokens = {name: (signal.passes or 0) * one_pass for name, signal in SIGNALS.items()}
    manifest = read_manifest(folders[0])
    return tokens | {"T-REG reward (eval model)": manifest["model_tokens"] / manifest["scored_tokens"]}


def summarise(args: TokenCreditArguments, by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with intervals."""
    found = [seed["kinds"] for seed in by_seed]
    results: dict[str, Any] = {"arguments": asdict(args), "targets": {}, "kinds": {}}
    for kind in (kind for kind in KINDS if all(kind in reports for reports in found)):
        results["kinds"][kind] = {
            "solutions": [reports[kind]["solutions"] for reports in found],
            "signals": {
                name: {key: over_seeds([r[kind]["signals"][name][key] for r in found]) for key in DETECTION}
                for name in (*SIGNALS, CHANCE)
            },
        }
    for target in TARGETS:
        reports = [seed[target] for seed in by_seed]

        def values(signal: str, key: str, reports: list[dict[str, Any]] = reports) -> list[float]:
            return [r["signals"][signal][key] for r in reports]

        cost = "tokens_per_scored_token"
        results["targets"][target] = {
            "solutions": [r["solutions"] for r in reports],
            "unknown": [r["unknown"] for r in reports],
            "signals": {
                name: {key: over_seeds(values(name, key)) for key in DETECTION}
                | {cost: over_seeds(values(name, cost))["mean"]}
                for name in SIGNALS
            },
            "differences": [
                {"better": better, "worse": worse}
                | {key: paired(values(better, key), values(worse, key)) for key in DETECTION}
                for better, worse in CLAIMS
            ],
        }
    return results


def main(args: TokenCreditArguments) -> dict[str, Any]:
    results = summarise(args, [run_seed(args, seed) for seed in range(args.seeds)])
    return save(args.output_dir, results, tables)


def tables(results: dict[str, Any]) -> Tables:
    """For each target all signals, and the claims of either paper."""
    shown: Tables = {}
    for target in TARGETS:
        part = results["targets"][target]
        rows = [
            [*detection_row(name, entry), f"{entry['tokens_per_scored_token']:.1f}"]
            for name, entry in part["signals"].items()
        ]
        shown[target] = ("signal", *DETECTION.values(), "tokens a scored token"), rows
        shown[f"{target}.solutions"] = f"{sum(part['solutions']):,}"
        gaps = {(d["better"], d["worse"]): d["auroc"] for d in part["differences"]}
        for method, word in (("contrastive score", "contrast"), ("T-REG reward (eval model)", "treg")):
            claims = [
                claim(f"{a} finds it better than {b}", paper(a, b), entry, "AUROC", digits=3)
                for (a, b), entry in gaps.items()
                if a == method
            ]
            shown[f"{target}.{word}_claims"] = CLAIM, claims
        shown[f"{target}.above_logprob"] = number(gaps["contrastive score", "log-prob"], 3, "+")
    for kind, part in results.get("kinds", {}).items():  # results from before kinds were told apart have none
        rows = [detection_row(name, entry) for name, entry in part["signals"].items()]
        shown[f"kinds.{kind}"] = ("signal", *DETECTION.values()), rows
        shown[f"kinds.{kind}.solutions"] = f"{sum(part['solutions']):,}"
    return shown


def paper(better: str, worse: str) -> str:
    """Whether a paper says so: T-REG's, that its rewards are better credit than DPO's implicit ones."""
    return "yes" if better.startswith("T-REG") and "implicit" in worse else "–"


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    by_target = {title: results["targets"][target]["signals"] for target, title in TARGETS.items()}
    return {"treg_credit.png": detection_figure(by_target, height=6)}


if __name__ == "__main__":
    main(*TrlParser((TokenCreditArguments,)).parse_args_and_config())
