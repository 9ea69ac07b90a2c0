r"""Compositions that no paper tried: every token signal as the weight of critical-token DPO, by seed, in one table.

    python benchmarks/compositions.py --output_dir runs/benchmarks/compositions

Signals share one contract (a column `rejected_<signal>`), so each can take the place of the contrastive score in
critical-token DPO (arXiv 2411.19943v3), where a rejected token counts by 1 − s_t, and the contrastive score can take
the place of the rewards in T-REG (arXiv 2412.02685). All rows of the table train on the same pairs: the first `pairs`
of a seed, all with a rollout estimate. Grid, seeds and test problems as in ledger_comparison.py. Beside: every signal,
and a router (arXiv 2505.21600) trained on the first errors of other problems' wrong answers, as a detector of the true
first error. Writes results.json; pages/compositions.py makes the page.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from ledger_comparison import Comparison, ComparisonArguments, Method, SeedRun, difference, show_comparison, summary
from ledger_stages import LEDGER, MAX_TOKENS, models, over_seeds, paired, score_token_rewards, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.routing.labels.divergence import DivergenceScorer, add_slm_choices
from tokalign.routing.labels.labelling import SPLITS, split_indices
from tokalign.routing.router.calibration import score_dataset
from tokalign.routing.router.features import DIVERGENT, RouterDataset
from tokalign.routing.router.model import TokenRouter
from tokalign.signals.agreement import report
from tokalign.signals.rollout import derived_seed
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.worlds.ledger_models import trained_model

TREG = "recipes/treg.py"
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
EPOCHS = ("--num_train_epochs", 3)  # the paper's; the pairs are few
METHODS = {
    DPO: Method("dpo", options=EPOCHS, dataset="composed"),
    **{
        name: Method("critical_dpo", options=("--signal", signal, *EPOCHS), dataset="composed")
        for name, signal in WEIGHTS.items()
    },
    OWN: Method("treg", TREG, EPOCHS, "composed"),
    CONTRAST: Method("treg", TREG, ("--signal", "contrast", "--reward_offset", 0.5, *EPOCHS), "composed"),
}
ROUTERS = {
    "router, linear": ("--architecture", "linear", "--learning_rate", 1e-2),
    "router, mlp": ("--architecture", "mlp"),
}
DETECTION = ("auroc", "hit1")
DETECTOR_CLAIMS = tuple((router, other) for router in ROUTERS for other in (REFERENCE, "log-prob", "entropy", "random"))


@dataclass
class CompositionsArguments(ComparisonArguments):
    """Sizes of the experiment."""

    eval_model: str | None = field(
        default=None,
        metadata={"help": "Model that gives token rewards; unset is the ledger's, which can rewrite drafts."},
    )
    llm: str | None = field(default=None, metadata={"help": "The larger model; unset is the ledger's."})
    output_dir: str = field(
        default="runs/benchmarks/compositions", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    problems: int = field(default=500, metadata={"help": "Problems a seed; those without a pair in use train routers."})
    pairs: int = field(default=160, metadata={"help": "Pairs a seed that every method trains on."})
    continuations: int = field(default=8, metadata={"help": "Continuations a prefix of the rollout estimate."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3, 3e-3],
        metadata={"help": "The grid, the same for every method."},
    )


# --------------------------------------------------------------------------------------------------------- columns


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
    found = [
        {
            "id": row["id"],
            "sample": i,
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["rejected_ids"],
            "label": [DIVERGENT if t == row["first_error"] else 0 for t in range(len(row["rejected_ids"]))],
        }
        for i, row in enumerate(rows)
    ]
    return Dataset.from_list(found)


# ---------------------------------------------------------------------------------------------------------- stages


def composed(run: SeedRun, args: CompositionsArguments) -> Path:
    """The first pairs of a seed with every signal: each stage adds its columns to the one before."""
    out, stages, seed = run.out, run.stages, ("--seed", run.seed)
    stages.run(
        *("true first errors", "scripts/mark_first_errors.py", "--dataset", run.dataset("pairs")),
        *("--tokenizer", run.base, "--problems", out / "world" / "train", "--output_dir", out / "marked"),
    )
    stages.run(
        *("rollout estimate", "scripts/rollout_estimate.py", "--model", run.base, "--dataset", out / "marked"),
        *("--max_rows", args.pairs, "--n", args.continuations, "--max_tokens", MAX_TOKENS),
        *("--output_dir", out / "estimate", *seed),
    )
    for side in ("positive", "negative"):
        stages.train(
            *(f"{side} adapter", "recipes/sft.py", out / side, "--config", f"{LEDGER}/{side}_sft.yaml"),
            *("--model_name_or_path", run.base, "--dataset_name", out / "preferences" / side, *seed),
        )
    stages.run(
        *("contrastive scores", "scripts/score_contrast.py", "--model", run.base, "--dataset", out / "estimate"),
        *("--positive", out / "positive", "--negative", out / "negative", "--output_dir", out / "scored"),
    )
    stages.run(
        *("likelihood", "scripts/score_likelihood.py", "--model", run.base, "--signals", "logprob", "entropy"),
        *("--dataset", out / "scored", "--output_dir", out / "likelihood"),
    )
    rewarded = score_token_rewards(stages, out, str(args.eval_model), out / "likelihood")
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    llm = cache(lambda: DivergenceScorer(str(args.llm), tokenizer, shared_vocab=len(tokenizer), features=False))

    def compose(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        read = llm().prefill([row["prompt_ids"] for row in batch], [row["rejected_ids"] for row in batch])
        choices = [one.predicted.tolist() for one in read]
        return [row | composed_columns(row, ids, run.seed) for row, ids in zip(batch, choices, strict=True)]

    run_job(
        compose,
        load_stage(rewarded, stage="preferences", tokenizer=tokenizer),
        out / "composed",
        name="compose signals",
        parameters={"llm": weights_hash(str(args.llm)), "agreed": AGREED, "seed": run.seed},
        tokenizer=tokenizer,
    )
    return out / "composed"


def train_routers(run: SeedRun, rows: Dataset) -> dict[str, list[list[float]]]:
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
    dataset, found = RouterDataset(folder, split="test"), {}
    for name, options in ROUTERS.items():
        output = run.out / "routers" / name.replace(", ", "_")
        run.stages.train(
            *(name, "recipes/router.py", output, "--config", f"{LEDGER}/router.yaml", "--dataset_name", folder),
            *("--slm", run.base, "--seed", run.seed, "--per_device_train_batch_size", 256, *options),
        )
        router = TokenRouter.from_pretrained(output)
        router.attach_embedding_of(run.base)
        scores = score_dataset(router, dataset)
        found[name] = [scores[dataset.responses == i].tolist() for i in range(len(rows))]
    return found


def detection(run: SeedRun) -> dict[str, Any]:
    """`agreement.report` of every signal and router against the true first error, on the pairs in training."""
    rows = load_stage(run.dataset("composed"))
    rows = rows.select(np.flatnonzero(np.asarray(rows["first_error"]) >= 0))
    signals = {name: rows[f"rejected_{signal}"] for name, signal in WEIGHTS.items()}
    for name, scores in train_routers(run, rows).items():
        signals[name] = [[-score for score in answer] for answer in scores]
    return report(signals, rows["first_error"], samples=2)


def mean_weights(run: SeedRun) -> dict[str, float]:
    """Mean of 1 − s_t over the rejected tokens, by row of the table."""
    rows = load_stage(run.dataset("composed"))
    return {
        name: 1.0 - float(np.mean(np.concatenate(rows[f"rejected_{signal}"]))) for name, signal in WEIGHTS.items()
    } | {DPO: 1.0}


# --------------------------------------------------------------------------------------------------------- results


def summarise_detection(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds, and the paired differences of the routers to the signals."""
    names = [*WEIGHTS, *ROUTERS]
    values = {name: {key: [r["signals"][name][key] for r in reports] for key in DETECTION} for name in names}
    return {
        "solutions": [r["solutions"] for r in reports],
        "signals": {name: {key: over_seeds(values[name][key]) for key in DETECTION} for name in names},
        "differences": [
            {"better": better, "worse": worse}
            | {key: paired(values[better][key], values[worse][key]) for key in DETECTION}
            for better, worse in DETECTOR_CLAIMS
        ],
    }


def show_detection(results: Mapping[str, Any]) -> None:
    table = Table("signal", *DETECTION, title=f"true first error, {sum(results['solutions'])} wrong answers")
    for name, entry in results["signals"].items():
        table.add_row(name, *(f"{entry[key]['mean']:.3f}" for key in DETECTION))
    Console().print(table)


def main(args: CompositionsArguments) -> dict[str, Any]:
    args.base, args.eval_model = models(args.base, args.eval_model)
    args.llm = args.llm or str(trained_model("ledger-llm"))
    comparison = Comparison(args, METHODS, {"composed": lambda run: composed(run, args)})
    comparison.choose_rates()
    by_method: dict[str, list[dict[str, Any]]] = {m: [] for m in ("base", *METHODS)}
    reports, weights, pairs = [], [], []
    for number in range(args.seeds):
        run = comparison.seed(number)
        for method in by_method:
            by_method[method].append(run.figures(method, comparison.rates.get(method)))
        reports.append(detection(run))
        weights.append(mean_weights(run))
        pairs.append(len(load_stage(run.dataset("composed"))))
    references = [(name, other) for name in METHODS for other in (DPO, REFERENCE) if name != other]
    results: dict[str, Any] = {
        "arguments": asdict(args),
        "validation": comparison.validation(),
        "pairs": pairs,
        "agreed": AGREED,
        "methods": summary(by_method),
        "differences": [difference(by_method, *names) for names in (*references, (CONTRAST, OWN))],
        "mean_weight": {name: over_seeds([w[name] for w in weights]) for name in weights[0]},
        "detection": summarise_detection(reports),
    }
    write_json(Path(args.output_dir) / "results.json", results)
    show_comparison(results)
    show_detection(results["detection"])
    return results


if __name__ == "__main__":
    main(*TrlParser((CompositionsArguments,)).parse_args_and_config())
