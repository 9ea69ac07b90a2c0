r"""Compositions that no paper tried: every token signal as the weight of critical-token DPO, by seed, in one table.

    python -m benchmarks.experiments.compositions --output_dir runs/benchmarks/compositions

Signals share one contract (a column `rejected_<signal>`), so each can take the place of the contrastive score in
critical-token DPO (arXiv 2411.19943v3), where a rejected token counts by 1 − s_t, and the contrastive score can take
the place of the rewards in T-REG (arXiv 2412.02685). All rows of the table train on the same pairs: the first `pairs`
of a seed, all with a rollout estimate. Grid, seeds and test problems as in common.py. Beside: every signal, and a
router (arXiv 2505.21600) trained on the first errors of other problems' wrong answers, as a detector of the true first
error. Writes results.json; docs/results/compositions.md shows it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments import common
from benchmarks.experiments.common import Comparison, ComparisonArguments, ComparisonSeed, Method
from benchmarks.render import CLAIM, FAILS, HOLDS, OPEN, Tables, claim, percent, save, verdict
from tokalign.routing.labels.divergence import DivergenceScorer, add_slm_choices
from tokalign.routing.labels.labelling import SPLITS, split_indices
from tokalign.routing.router.calibration import score_dataset
from tokalign.routing.router.features import DIVERGENT, RouterDataset
from tokalign.routing.router.model import TokenRouter
from tokalign.signals.agreement import report
from tokalign.signals.registry import Signal, register
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.seeds import derived_seed

# Scores that this experiment makes of other signals, all in [0, 1]; a trainer takes what is in the table.
for composed_signal in ("s_reward", "s_entropy", "s_logprob", "s_llm", "s_random"):
    register(Signal(composed_signal, "composed score", 0.0, 1.0, "score", "low", to_weight=lambda scores: 1.0 - scores))

REFERENCE, DPO = "contrastive score", "none (plain DPO)"
AGREED = 0.9  # s_t where the LLM would have written the same token: it keeps a tenth of its weight
WEIGHTS = {  # row of the table -> signal that holds its s_t
    REFERENCE: "contrast",
    "rollout estimate": "rollout_accuracy",
    "self-generated reward": "s_reward",
    "entropy": "s_entropy",
    "log-prob": "s_logprob",
    "LLM disagrees": "s_llm",
    "random": "s_random",
}
OWN, CONTRAST = "T-REG, its own reward", "T-REG, contrastive score as reward"
EPOCHS = {"num_train_epochs": 3}  # the paper's; the pairs are few
METHODS = {
    DPO: Method("dpo", options=EPOCHS, dataset="composed"),
    **{
        name: Method("critical_dpo", options={"signal": signal, **EPOCHS}, dataset="composed")
        for name, signal in WEIGHTS.items()
    },
    OWN: Method("treg", "treg", EPOCHS, "composed"),
    CONTRAST: Method("treg", "treg", {"signal": "contrast", "reward_offset": 0.5, **EPOCHS}, "composed"),
}
ROUTERS = {"router, linear": {"architecture": "linear", "learning_rate": 1e-2}, "router, mlp": {"architecture": "mlp"}}
DETECTOR_CLAIMS = tuple((router, other) for router in ROUTERS for other in (REFERENCE, "log-prob", "entropy", "random"))


@dataclass
class CompositionsArguments(ComparisonArguments):
    """Sizes of the experiment."""

    eval_model: str | None = field(default=None, metadata=common.EVAL_MODEL)
    llm: str | None = field(default=None, metadata={"help": "The larger model; unset is the ledger's."})
    output_dir: str = "runs/benchmarks/compositions"
    problems: int = field(default=500, metadata={"help": "Problems a seed; those without a pair in use train routers."})
    pairs: int = field(default=160, metadata={"help": "Pairs a seed that every method trains on."})
    continuations: int = field(default=8, metadata={"help": "Continuations a prefix of the rollout estimate."})
    learning_rates: list[float] = field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3], metadata=common.GRID)


def composed_columns(row: Mapping[str, Any], llm_ids: Sequence[int], seed: int) -> dict[str, list[float]]:
    """The columns `rejected_s_<name>` of a pair: other signals as scores s_t in [0, 1], low = suspicious.

    - `s_reward`: r̂_t + 0.5 of `rejected_token_reward`.
    - `s_entropy`: 1 − H_t / max_t H_t of `rejected_entropy`, so the most open choice of an answer weighs 1.
    - `s_logprob`: π(y_t), the probability of the token.
    - `s_llm`: 0 where the greedy choice `llm_ids[t]` of the larger model is not y_t, else `AGREED`.
    - `s_random`: uniform, from `seed` and the pair's content.
    """
    ids, entropy = row["rejected_ids"], row["rejected_entropy"]
    most = max(entropy) or 1.0
    draw = random.Random(derived_seed(seed, row["id"], tuple(ids)))
    return {
        "rejected_s_reward": [reward + 0.5 for reward in row["rejected_token_reward"]],
        "rejected_s_entropy": [1.0 - value / most for value in entropy],
        "rejected_s_logprob": [math.exp(min(value, 0.0)) for value in row["rejected_logprob"]],
        "rejected_s_llm": [0.0 if choice != token else AGREED for choice, token in zip(llm_ids, ids, strict=True)],
        "rejected_s_random": [draw.random() for _ in ids],
    }


def detector_rows(rows: Dataset) -> Dataset:
    """Wrong answers as routing labels: the true first error is "divergent", all else "identical"."""
    labelled = [
        {
            "id": row["id"],
            "sample": i,
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["rejected_ids"],
            "label": [DIVERGENT if t == row["first_error"] else 0 for t in range(len(row["rejected_ids"]))],
        }
        for i, row in enumerate(rows)
    ]
    return Dataset.from_list(labelled)


def composed(run: ComparisonSeed, args: CompositionsArguments) -> Path:
    """The first pairs of a seed with every signal: each stage adds its columns to the one before."""
    out, stages = run.out, run.stages
    marked = stages.first_errors(run.base, run.dataset("pairs"))
    sizes = {"rows": args.pairs, "continuations": args.continuations}
    estimate = stages.rollout_estimate(run.base, marked, seed=run.seed, **sizes)
    scored = stages.contrast(run.base, estimate, run.seed)
    likelihood = stages.likelihood("likelihood", run.base, scored, "logprob", "entropy")
    rewarded = stages.token_rewards(args.ledger_model("ledger-slm-revise", run.seed, args.eval_model), likelihood)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    large = args.ledger_model("ledger-llm", run.seed, args.llm)
    llm = cache(lambda: DivergenceScorer(large, tokenizer, shared_vocab=len(tokenizer), features=False))

    def compose(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        read = llm().prefill([row["prompt_ids"] for row in batch], [row["rejected_ids"] for row in batch])
        choices = [one.predicted.tolist() for one in read]
        return [row | composed_columns(row, ids, run.seed) for row, ids in zip(batch, choices, strict=True)]

    run_job(
        compose,
        load_stage(rewarded, stage="preferences", tokenizer=tokenizer),
        out / "composed",
        name="compose signals",
        parameters={"llm": weights_hash(large), "agreed": AGREED, "seed": run.seed},
        tokenizer=tokenizer,
    )
    return out / "composed"


def train_routers(run: ComparisonSeed, rows: Dataset) -> dict[str, list[list[float]]]:
    """Scores of the routers on the wrong answers `rows`, after training on those of other problems."""
    folder, tokenizer = run.out / "detector", AutoTokenizer.from_pretrained(run.base)
    used = set(load_stage(run.dataset("composed"))["id"])
    others = load_stage(run.out / "marked").filter(lambda row: row["id"] not in used and row["first_error"] >= 0)
    parts = {
        split: others.select(indices) for split, indices in split_indices(others["id"], 0.2, 0.0).items() if indices
    } | {"test": rows}
    scorer = cache(lambda: DivergenceScorer(run.base, tokenizer, shared_vocab=len(tokenizer)))
    for split in SPLITS:
        run_job(
            lambda batch, split=split: add_slm_choices(scorer(), batch, folder / split / "features"),
            detector_rows(parts[split]),
            folder / split,
            name="detector labels",
            parameters={"slm": weights_hash(run.base), "seed": run.seed},
            tokenizer=tokenizer,
            extra_manifest={
                "features": "features",
                "shared_vocab": len(tokenizer),
                "models": {"slm": {"path": run.base, "weights_hash": weights_hash(run.base)}},
            },
        )
    dataset, by_router = RouterDataset(folder, split="test"), {}
    settings = {"dataset_name": folder, "slm": run.base, "seed": run.seed, "per_device_train_batch_size": 256}
    for name, options in ROUTERS.items():
        output = run.stages.recipe(f"routers/{name}", "router", "router", **settings, **options)
        router = TokenRouter.from_pretrained(output)
        router.attach_embedding_of(run.base)
        scores = score_dataset(router, dataset)
        by_router[name] = [scores[dataset.responses == i].tolist() for i in range(len(rows))]
    return by_router


def detection(run: ComparisonSeed) -> dict[str, Any]:
    """`agreement.report` of every signal and router against the true first error, on the pairs in training."""
    rows = load_stage(run.dataset("composed"))
    rows = rows.select(np.flatnonzero(np.asarray(rows["first_error"]) >= 0))
    signals = {name: rows[f"rejected_{signal}"] for name, signal in WEIGHTS.items()}
    for name, scores in train_routers(run, rows).items():
        signals[name] = [[-score for score in answer] for answer in scores]
    return report(signals, rows["first_error"], samples=2)


def mean_weights(run: ComparisonSeed) -> dict[str, float]:
    """Mean of 1 − s_t over the rejected tokens, by row of the table."""
    rows = load_stage(run.dataset("composed"))
    return {
        name: 1.0 - float(np.mean(np.concatenate(rows[f"rejected_{signal}"]))) for name, signal in WEIGHTS.items()
    } | {DPO: 1.0}


def summarise_detection(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds, and the paired differences of the routers to the signals."""
    names = [*WEIGHTS, *ROUTERS]
    values = {name: {key: [r["signals"][name][key] for r in reports] for key in common.DETECTION} for name in names}
    return {
        "solutions": [r["solutions"] for r in reports],
        "signals": {name: {key: common.over_seeds(values[name][key]) for key in common.DETECTION} for name in names},
        "differences": [
            {"better": better, "worse": worse}
            | {key: common.paired(values[better][key], values[worse][key]) for key in common.DETECTION}
            for better, worse in DETECTOR_CLAIMS
        ],
    }


def main(args: CompositionsArguments) -> dict[str, Any]:
    comparison = Comparison(args, METHODS, {"composed": lambda run: composed(run, args)})
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *METHODS)}
    reports, weights, pairs = [], [], []
    for run in comparison.seeds():
        for method, measured in by_method.items():
            measured.append(run.figures(method, comparison.rates.get(method)))
        reports.append(detection(run))
        weights.append(mean_weights(run))
        pairs.append(len(load_stage(run.dataset("composed"))))
    references = [(name, other) for name in METHODS for other in (DPO, REFERENCE) if name != other]
    results = comparison.results(by_method, (*references, (CONTRAST, OWN))) | {
        "pairs": pairs,
        "agreed": AGREED,
        "mean_weight": {name: common.over_seeds([w[name] for w in weights]) for name in weights[0]},
        "detection": summarise_detection(reports),
    }
    return save(args.output_dir, results, tables)


# ------------------------------------------------------------------------------------------------ what the page shows


SOURCES = {  # where the weight 1 − s_t of a rejected token comes from
    DPO: "1 for every token",
    REFERENCE: "s: two adapters' contrast ([arXiv 2411.19943](https://arxiv.org/abs/2411.19943), the paper's own)",
    "rollout estimate": "s: share of right continuations of the prefix",
    "self-generated reward": "s: T-REG's reward by contrastive prompting + 0.5",
    "entropy": "s: 1 − entropy / the answer's highest",
    "log-prob": "s: the policy's probability of the token",
    "LLM disagrees": "s: 0 where the larger model would have written another token, {agreed:g} elsewhere"
    " (routing labels by prefill)",
    "random": "s: uniform in [0, 1]",
    OWN: "no weights; rewards by contrastive prompting ([arXiv 2412.02685](https://arxiv.org/abs/2412.02685))",
    CONTRAST: "no weights; reward: s of the contrast − 0.5",
}
# (better, worse) -> paired difference in greedy and sampled accuracy
Gaps = Mapping[tuple[str, str], Mapping[str, Any]]


def tables(results: dict[str, Any]) -> Tables:
    """One table of all signals, with the verdict on each being better than plain DPO and than the contrastive score."""
    gaps = {(d["better"], d["worse"]): d for d in results["differences"]}
    shown = common.comparison_tables(results, {}, "")
    rows = []
    for name, _, rate, *accuracies in shown["methods"][1]:
        weight = f"{results['mean_weight'][name]['mean']:.2f}" if name in results["mean_weight"] else ""
        source = SOURCES.get(name, "").format(agreed=results["agreed"])
        rows.append([name, source, weight, rate, *accuracies, *(gap(gaps, name, other) for other in (DPO, REFERENCE))])
    columns = ("what it trains on", "mean weight", "learning rate", *common.MEASURES)
    claims = [claim(f"{CONTRAST} > {OWN}, {key}", "not tried", gaps[CONTRAST, OWN][key]) for key in common.MEASURES]
    part, measures = results["detection"], tuple(common.DETECTION.values())
    finds = [
        claim(f"{d['better']} finds it better than {d['worse']}", "not tried", d["auroc"], "AUROC", digits=3)
        for d in part["differences"]
    ]
    return shown | {
        "methods": (("", *columns, "against plain DPO", "against the contrastive score"), rows),
        "counts": (("against", "better", "worse", OPEN), [count(gaps, other) for other in (DPO, REFERENCE)]),
        "claims": (CLAIM, claims),
        "detection": (("signal", *measures), [common.detection_row(*item) for item in part["signals"].items()]),
        "detection_claims": (CLAIM, finds),
        "pairs": numbers(results["pairs"]),
        "solutions": f"{sum(part['solutions']):,}",
    }


def gap(gaps: Gaps, name: str, other: str) -> str:
    """How far a row is above another in greedy accuracy, and the verdict on that."""
    entry = gaps.get((name, other))
    return "" if entry is None else f"{percent(entry['greedy'], '+')} **{verdict(entry['greedy'])}**"


def count(gaps: Gaps, other: str) -> list[str]:
    """How many rows, and which, are better and worse in greedy accuracy than another; how many are neither."""
    verdicts = {better: verdict(entry["greedy"]) for (better, worse), entry in gaps.items() if worse == other}
    cells = [other]
    for word in (HOLDS, FAILS, OPEN):
        names = [name for name, said in verdicts.items() if said == word]
        listed = f": {'; '.join(names)}" if names and word != OPEN else ""
        cells.append(f"{len(names)} of {len(verdicts)}{listed}")
    return cells


def numbers(values: Sequence[int]) -> str:
    """One number, or the range of several."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    signals = {"true first wrong token": results["detection"]["signals"]}
    return {
        "compositions_accuracy.png": common.accuracy_figure(results, DPO, height=5),
        "compositions_detection.png": common.detection_figure(signals, height=4),
    }


if __name__ == "__main__":
    main(*TrlParser((CompositionsArguments,)).parse_args_and_config())
