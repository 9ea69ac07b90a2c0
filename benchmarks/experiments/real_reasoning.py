r"""Critical-token DPO and T-REG with the controls that decide, on word problems that people wrote, by seed.

    python -m benchmarks.experiments.real_reasoning --data path/to/data --output_dir runs/benchmarks/real_reasoning

SVAMP and the short problems of GSM8K, by SmolLM2-135M-Instruct (`--model`). It solves few as it is, so each seed first
trains it on worked solutions (the warm-up). The warm model answers problems that the warm-up has not seen, and from its
right and wrong answers every method trains an adapter: SFT on its own right answers, DPO, RPO, critical-token DPO
(arXiv 2411.19943v3), T-REG (arXiv 2412.02685). Two controls say whether it matters where critical-token DPO puts its
weights: the mean of the pairs' weights on every rejected token, and each answer's weights in another order.

A seed draws its own test stories of SVAMP and test problems of GSM8K, warm-up problems, rollouts, adapters and training
order; all its methods share them. Learning rates: one grid for all methods, by a seed of its own on validation problems
that are test problems of no seed (highest mean of greedy and sampled accuracy); the controls have the rate of
critical-token DPO, from which they shall differ in their weights alone. Beside accuracy: pass@k from wrong
answers' prefixes with and without the critical token. Everything is a cell with a JSON of its own; processes that were
started alike share the cells. Writes results.json after each complete seed; docs/results/critical_token_dpo.md and
docs/results/treg.md show it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments import common
from benchmarks.experiments.common import GRID_SEED, MEASURES, SMOLLM2, Method, fast_products, held, kept
from benchmarks.experiments.critical_dpo_ledger import TABLE_3
from benchmarks.experiments.dishonest import DATA
from benchmarks.experiments.treg_ledger import PAPER
from benchmarks.ledger_stages import SIDES, LedgerStages
from benchmarks.render import CLAIM, Tables, claim, duration, gaps, percent, read_json, save
from tokalign import statistics
from tokalign.signals.registry import Signal, register
from tokalign.signals.rollout import pass_at_k_curves
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.seeds import derived_seed
from tokalign.statistics import over_seeds, paired_bootstrap

# The controls' scores, in [0, 1] as the contrastive score that they are made of; a trainer takes what is in the table.
for control in ("s_constant", "s_shuffled"):
    register(
        Signal(control, "control of the contrastive score", 0, 1, "score", "low", to_weight=lambda scores: 1 - scores)
    )

SETS = {"svamp": "SVAMP", "gsm8k": "GSM8K, at most 2 steps"}
ALL = "both"
SYSTEM = {"role": "system", "content": "Solve the problem."}  # the chat template's own has 22 tokens
MAX_TOKENS = 128
WRITING = {"max_tokens": MAX_TOKENS, "token_budget": 16384}  # larger batches are no faster on a CPU and fill its memory
PREPARATION = ("warm", "rollouts", "contrast", "rewards", "reference")  # cells before a seed's methods
BEFORE, WARM, SFT, OURS = "before the warm-up", "warm model", "SFT on own right answers", "critical-token DPO"
CONSTANT, SHUFFLED = "constant weight", "shuffled weights"
TREG, STRONG = "T-REG, α 0.25", "T-REG, α 2"
SCORES = ("plain", "contrast", "rewards")  # what methods read of the pairs' stage: nothing, or what these cells made
METHODS = {
    SFT: Method("sft", "sft", dataset="positive"),
    "DPO": Method("dpo", "dpo", dataset="plain"),
    "RPO": Method("rpo", "dpo", dataset="plain"),
    OURS: Method("critical_dpo", dataset="contrast"),
    CONSTANT: Method("critical_dpo", options={"signal": "s_constant"}, dataset="contrast"),
    SHUFFLED: Method("critical_dpo", options={"signal": "s_shuffled"}, dataset="contrast"),
    TREG: Method("treg", "treg", dataset="rewards"),
    STRONG: Method("treg", "treg", {"alpha": 2}, "rewards"),
}
CONTROLS = (CONSTANT, SHUFFLED)
TUNED = tuple(method for method in METHODS if method not in CONTROLS)
ROWS = (WARM, *METHODS)
CLAIMS = {  # page -> better, worse
    "critical": (
        (OURS, CONSTANT),
        (OURS, SHUFFLED),
        (OURS, "DPO"),
        (OURS, "RPO"),
        (OURS, SFT),
        (OURS, WARM),
        (CONSTANT, "DPO"),
        ("RPO", "DPO"),
        (SFT, WARM),
        ("DPO", WARM),
    ),
    "treg": ((TREG, "DPO"), (STRONG, "DPO"), (STRONG, TREG), (TREG, SFT), (STRONG, SFT), (TREG, WARM), (STRONG, WARM)),
}
SHOWN = {"critical": tuple(row for row in ROWS if row not in (TREG, STRONG)), "treg": (WARM, SFT, "DPO", TREG, STRONG)}


@dataclass
class RealReasoningArguments:
    """Sizes of the experiment."""

    output_dir: str = field(
        default="runs/benchmarks/real_reasoning", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    model: str = field(default=SMOLLM2, metadata={"help": "Hub id or folder of an instruct model."})
    data: str | None = field(
        default=None, metadata={"help": f"Folder with gsm8k/ and svamp/; unset is the variable {DATA}."}
    )
    seeds: int = field(default=3, metadata={"help": "Seeds 0, 1, …"})
    warm_svamp: int = field(default=250, metadata={"help": "SVAMP problems of the warm-up."})
    warm_gsm8k: int = field(default=100, metadata={"help": "GSM8K problems of the warm-up."})
    problems_svamp: int = field(default=220, metadata={"help": "Other SVAMP problems, of the rollouts."})
    problems_gsm8k: int = field(default=40, metadata={"help": "Other GSM8K problems, of the rollouts."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3], metadata=common.GRID)
    validation: list[int] = field(default_factory=lambda: [150, 20], metadata={"help": "Problems of the grid, by set."})
    test: list[int] = field(default_factory=lambda: [299, 60], metadata={"help": "Test problems a seed, by set."})
    samples: int = field(default=1, metadata={"help": "Samples a problem for the sampled accuracy."})
    estimate_rows: int = field(default=34, metadata={"help": "Wrong answers of SVAMP a seed with a rollout estimate."})
    continuations: int = field(default=16, metadata={"help": "Continuations a prefix of the rollout estimate."})

    def __post_init__(self) -> None:
        self.data = self.data or os.environ.get(DATA)
        if self.data is None:
            raise ValueError(f"The public data sets are not known: give --data, or set {DATA} to their folder.")


class RealStages(LedgerStages):
    """Stages by the recipes of the real model, each cell in a folder of its own, since a cell is one process's."""

    recipes = "smollm2-135m-instruct"

    def seconds(self, *names: str) -> float:
        """Of finished stages; of all if none is named."""
        return sum(self.done[name]["seconds"] for name in names or self.done)


class ReasoningSeed:
    """Problems, warm model, pairs, trained models and evaluations of one seed; whatever is there is kept."""

    def __init__(self, args: RealReasoningArguments, seed: int):
        self.args, self.seed = args, seed
        self.split = "validation" if seed == GRID_SEED else "test"
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.parts, self.warm_model = self.out / "problems", self.out / "warm" / "model"
        made = self.out / "rollouts" / "preferences"
        self.datasets = {name: made / name for name in ("pairs", "positive", "negative")}
        self.datasets |= dict.fromkeys(SCORES, self.out / "scored")
        with held(self.out / "locks" / "problems"):
            self.problems()

    def problems(self) -> None:
        """What is trained on, sampled and evaluated, by seed: the stages `warm`, `train` and `held_out`."""
        args, stages = self.args, RealStages(self.parts)
        options = {"prompt_style": "messages", "validation_share": 0.15}
        built = {
            name: stages.job(f"data {name}", stages.folder / name, source=f"{args.data}/{name}", **options, **own)
            for name, own in (("svamp", {"split_seed": self.seed}), ("gsm8k", {"max_steps": 2}))
        }

        def rows(name: str, split: str, *counts: int) -> list[Dataset]:
            """The first `counts[0]` of a split, the `counts[1]` after them and so on, as far as there are any."""
            kept = load_stage(built[name], split=split).select_columns(["id", "prompt", "answer", "completion"])
            kept = kept.map(lambda row: {"prompt": [SYSTEM, *row["prompt"]]}).shuffle(seed=self.seed)
            ends = np.minimum(np.cumsum([0, *counts]), len(kept))
            return [kept.select(range(start, end)) for start, end in pairwise(ends)]

        counts = {"svamp": (args.warm_svamp, args.problems_svamp), "gsm8k": (args.warm_gsm8k, args.problems_gsm8k)}
        own = {name: rows(name, "train", *counts[name]) for name in SETS}
        sizes = dict(zip(SETS, args.validation if self.split == "validation" else args.test, strict=True))
        parts = {"warm": [own[name][0] for name in SETS], "train": [own[name][1] for name in SETS]}
        parts["held_out"] = [rows(name, self.split, sizes[name])[0] for name in SETS]
        for name, made in parts.items():
            mixed = concatenate_datasets(made).shuffle(seed=self.seed)
            parameters = {"seed": self.seed, "sizes": [len(part) for part in made]}
            run_job(lambda batch: batch, mixed, self.parts / name, name=f"{name} problems", parameters=parameters)

    def copied(self, rows: Dataset, folder: Path, work: Any = lambda batch: batch, **parameters: Any) -> Path:
        """A stage of the warm model's tokens made of another."""
        tokenizer = AutoTokenizer.from_pretrained(self.warm_model)
        parameters |= {"seed": self.seed, "rows": len(rows)}
        run_job(work, rows, folder, name="pairs in use", parameters=parameters, tokenizer=tokenizer)
        return folder

    # ----------------------------------------------------------------------------------------------- before the methods

    def warm(self) -> dict[str, Any]:
        """The model after its warm-up on worked solutions."""
        stages, start = RealStages(self.out / "warm"), {"model_name_or_path": self.args.model}
        stages.recipe("model", "sft", "warm_up", **start, dataset_name=self.parts / "warm", seed=self.seed)
        return {"seconds": stages.seconds(), "problems": len(load_stage(self.parts / "warm"))}

    def rollouts(self) -> dict[str, Any]:
        """Answers of the warm model, and the pairs of right and wrong ones."""
        stages = RealStages(self.out / "rollouts")
        options = {"model": self.warm_model, "dataset": self.parts / "train", "num_rollouts": self.args.rollouts}
        options |= WRITING
        sampled = stages.job("sample", stages.folder / "sampled", **options, seed=self.seed)
        pairing = {"dataset": sampled, "max_pairs_per_problem": 1, "seed": self.seed}
        stages.job("pairs", stages.folder / "preferences", **pairing)
        counts = {name: len(load_stage(self.datasets[name])) for name in ("pairs", "positive", "negative")}
        right = float(np.mean(load_stage(sampled)["correct"]))
        return {"seconds": stages.seconds(), "right": right, **counts}

    def contrast(self) -> dict[str, Any]:
        """Contrastive scores by two adapters."""
        stages = RealStages(self.out / "contrast")
        start = {"model_name_or_path": self.warm_model, "seed": self.seed}
        adapters = {s: stages.recipe(s, "sft", f"{s}_sft", **start, dataset_name=self.datasets[s]) for s in SIDES}
        options = {"model": self.warm_model, "dataset": self.datasets["pairs"], **adapters}
        scores = load_stage(stages.job("score contrast", stages.folder / "scored", **options))["rejected_contrast"]
        within = float(np.mean([np.std(answer) for answer in scores]))
        return {"seconds": stages.seconds(), "mean": float(np.mean(np.concatenate(scores))), "sd_in_answer": within}

    def rewards(self) -> dict[str, Any]:
        """Token rewards by contrastive prompting of the model before its warm-up, which follows instructions."""
        stages = RealStages(self.out / "rewards")
        options = {"model": self.args.model, "dataset": self.datasets["pairs"], "templates": "math"}
        rows = load_stage(stages.job("score token-reward", stages.folder / "scored", **options, token_budget=4096))
        means = {side: float(np.mean(np.concatenate(rows[f"{side}_token_reward"]))) for side in ("chosen", "rejected")}
        return {"seconds": stages.seconds(), **means}

    def reference(self) -> dict[str, Any]:
        """One stage of all scores, and the reference's log-probs of it: the first training leaves them in a cache.

        So that the time of a method's training is its own, that first training is one step of none of them.
        """
        scored, rewarded = (load_stage(self.out / name / "scored") for name in ("contrast", "rewards"))
        mean = float(np.mean(np.concatenate(scored["rejected_contrast"])))
        columns = ("chosen_token_reward", "rejected_token_reward")
        rewards = {(row["id"], row["pair"]): {name: row[name] for name in columns} for row in rewarded}

        def score(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [row | rewards[row["id"], row["pair"]] | controls(row, mean, self.seed) for row in batch]

        output = self.copied(scored, self.out / "scored", score, mean=mean)
        stages = RealStages(self.out / "reference")
        start = {"model_name_or_path": self.warm_model, "dataset_name": output, "max_steps": 1}
        stages.recipe("one step", "dpo", "dpo", **start, seed=self.seed)
        return {"seconds": stages.seconds()}

    def estimate(self) -> dict[str, Any]:
        """pass@k of the first wrong answers to SVAMP with and without the critical token of the rollout estimate."""
        stages, args = RealStages(self.out / "estimate"), self.args
        svamp = load_stage(self.datasets["pairs"]).filter(lambda row: set_of(row["id"]) == "svamp")
        wrong = self.copied(svamp, stages.folder / "wrong")
        options: dict[str, Any] = {"n": args.continuations, "seed": self.seed}
        options |= {"max_rows": args.estimate_rows, **WRITING}
        options |= {"model": self.warm_model, "dataset": wrong}
        rows = load_stage(stages.job("score rollout", stages.folder / "estimate", **options))
        return {"rows": [[row[key] for key in ("critical_index", "with_correct", "without_correct")] for row in rows]}

    # ----------------------------------------------------------------------------------------------- the methods

    def before(self) -> dict[str, Any]:
        """Greedy answers of the model before its warm-up, which are long: to one seed's test problems."""
        stages = RealStages(self.out / "before")
        options = {"model": self.args.model, "problems": self.parts / "held_out", "split": "train"}
        answers = load_stage(stages.job("evaluate answers", stages.folder / "answers", **options, **WRITING))
        return {"problems": {row["id"]: bool(row["greedy_correct"]) for row in answers}}

    def method(self, name: str, rate: float | None) -> dict[str, Any]:
        """Train a method at a learning rate and answer the held-out problems (`rate` None: the warm model does)."""
        folder = f"{name} {rate:g}" if rate else name
        stages = RealStages(self.out / "methods" / folder.replace(", ", "_").replace(" ", "_"))
        options: dict[str, Any] = {"model": self.warm_model}
        found: dict[str, Any] = {}
        if rate:
            chosen = METHODS[name]
            data = self.datasets[chosen.dataset]
            start = {"model_name_or_path": self.warm_model, "dataset_name": data, "learning_rate": rate}
            options["adapter"] = stages.recipe(
                "adapter", chosen.recipe, chosen.config, **start, seed=self.seed, **chosen.options
            )
            found = {"seconds": stages.seconds("adapter"), "tokens": trained_tokens(load_stage(data))}
        held_out = {"problems": self.parts / "held_out", "split": "train", **WRITING}
        sampling = {"samples": self.args.samples, "seed": self.seed}
        answers = load_stage(
            stages.job("evaluate answers", stages.folder / "answers", **options, **held_out, **sampling)
        )
        found["problems"] = {
            row["id"]: [float(row["greedy_correct"]), float(np.mean(row["sampled_correct"]))] for row in answers
        }
        return found


def set_of(problem: str) -> str:
    """The data set of a problem by its id."""
    return problem.partition("-")[0]


def trained_tokens(rows: Dataset) -> int:
    """Tokens of an epoch: of an SFT stage, or of both sides of pairs, each behind its prompt."""
    if "input_ids" in rows.column_names:
        return sum(map(len, rows["input_ids"]))
    return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def controls(row: Mapping[str, Any], mean: float, seed: int) -> dict[str, list[float]]:
    """The columns `rejected_s_constant`, `mean` at every token, and `rejected_s_shuffled`, the answer's own scores in
    an order drawn from the seed and the pair's content."""
    scores = list(row["rejected_contrast"])
    shuffled = random.Random(derived_seed(seed, row["id"], tuple(row["rejected_ids"]))).sample(scores, len(scores))
    return {"rejected_s_constant": [mean] * len(scores), "rejected_s_shuffled": shuffled}


# -------------------------------------------------------------------------------------------------------------- cells


class Experiment:
    """The cells, in the order in which they are made, and the results of what is there."""

    def __init__(self, args: RealReasoningArguments):
        self.args = args
        self.folder = Path(args.output_dir) / "cells"
        sizes = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "data", "seeds")}
        self.settings = sizes | {"model": Path(args.model).name}

    def make(self, cells: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        return kept(cells, self.folder, settings=self.settings, after=lambda _: self.save())

    def prepare(self, seeds: Sequence[int]) -> list[ReasoningSeed]:
        """Warm models, pairs and scores of some seeds at a time, so that two processes have one each to do."""
        made = [ReasoningSeed(self.args, seed) for seed in seeds]
        for steps in (("warm",), ("rollouts",), ("contrast", "rewards"), ("reference",)):
            self.make({f"seed-{run.seed} {step}": getattr(run, step) for run in made for step in steps})
        return made

    def run(self) -> dict[str, Any]:
        """Everything: the grid with the first seed's preparation, then seed by seed."""
        rates, seeds = self.args.learning_rates, list(range(self.args.seeds))
        runs: dict[int, ReasoningSeed] = {}
        later = [seeds[i : i + 2] for i in range(1, len(seeds), 2)]
        for group in ([GRID_SEED, 0] if len(rates) > 1 else [0], *later):
            runs |= {run.seed: run for run in self.prepare(group)}
            if GRID_SEED in group:
                self.make({grid_cell(m, r): partial(runs[GRID_SEED].method, m, r) for m in TUNED for r in rates})
            chosen = self.rates()[1]
            for seed in (s for s in group if s != GRID_SEED):
                methods = {f"seed-{seed} {m}": partial(runs[seed].method, m, chosen.get(m)) for m in ROWS}
                self.make(methods | {f"seed-{seed} estimate": runs[seed].estimate})
            self.make({BEFORE: runs[0].before})
        results = self.save()
        assert results is not None
        return results

    def cell(self, name: str) -> Any:
        """A cell that is there, else None."""
        file = self.folder / f"{name}.json"
        content = read_json(file) if file.exists() else None
        return content["cell"] if content and content["settings"] == self.settings else None

    def rates(self) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, float]]:
        """The grid, and each method's rate: the highest mean of greedy and sampled accuracy on validation problems."""
        rates = self.args.learning_rates
        if len(rates) == 1:
            return {}, dict.fromkeys(METHODS, rates[0])
        grid, chosen = {}, {}
        for method in TUNED:
            cells = {rate: accuracies(self.cell(grid_cell(method, rate)))[ALL] for rate in rates}
            grid[method] = {f"{rate:g}": cell for rate, cell in cells.items()}
            chosen[method] = max(cells, key=lambda rate: sum(cells[rate].values()))
        return grid, chosen | dict.fromkeys(CONTROLS, chosen[OURS])

    def complete(self) -> Iterator[dict[str, Any]]:
        """The cells of each seed that has all, from the first on."""
        for seed in range(self.args.seeds):
            names = (*PREPARATION, "estimate", *ROWS)
            cells = {name: self.cell(f"seed-{seed} {name}") for name in names}
            if None in cells.values():
                return
            yield cells

    def save(self) -> dict[str, Any] | None:
        """Write results.json of the complete seeds, if there is one."""
        seeds = list(self.complete())
        if not seeds:
            return None
        return save(self.args.output_dir, results(self.args, seeds, *self.rates(), self.cell(BEFORE)), tables)


def grid_cell(method: str, rate: float) -> str:
    return f"grid {method} {rate:g}"


def accuracies(cell: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Set (and `ALL`) -> measure -> accuracy."""
    found = {}
    for name in (*SETS, ALL):
        values = [value for problem, value in cell["problems"].items() if name in (ALL, set_of(problem))]
        found[name] = {key: float(np.mean([value[i] for value in values])) for i, key in enumerate(MEASURES)}
    return found


def results(
    args: RealReasoningArguments,
    seeds: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Mapping[str, Mapping[str, float]]],
    rates: Mapping[str, float],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the experiment writes: figures over the complete seeds, and paired differences of two kinds.

    A difference over seeds has Student's interval. One over problems is the bootstrap of the mean difference over all
    test problems of all seeds: what the draw of test problems alone leaves open, with the models as they are.
    """
    figures = [{row: accuracies(seed[row]) for row in ROWS} for seed in seeds]
    by_set = {name: {row: [f[row][name] for f in figures] for row in ROWS} for name in (*SETS, ALL)}
    outcomes = {
        row: {f"{i} {p}": value for i, seed in enumerate(seeds) for p, value in seed[row]["problems"].items()}
        for row in ROWS
    }
    differences = []
    for better, worse in dict.fromkeys(pair for pairs in CLAIMS.values() for pair in pairs):
        entry: dict[str, Any] = common.difference(by_set[ALL], better, worse)
        for i, key in enumerate(MEASURES):
            a, b = ({p: v[i] for p, v in outcomes[row].items()} for row in (better, worse))
            entry[f"{key}_problems"] = paired_bootstrap(a, b)
        differences.append(entry)
    first = (before or {"problems": {}})["problems"]
    right = {name: [value for problem, value in first.items() if set_of(problem) == name] for name in SETS}
    edges = (args.learning_rates[0], args.learning_rates[-1])
    found = [row for seed in seeds for row in seed["estimate"]["rows"]]
    critical = [row for row in found if row[0] >= 0]
    return {
        "arguments": asdict(args) | {"seeds": len(seeds), "model": Path(args.model).name},
        BEFORE: {name: statistics.accuracy(values) for name, values in right.items() if values},
        "validation": {
            "grid": grid,
            "learning_rate": dict(rates),
            "at_edge": [method for method, rate in rates.items() if method in grid and rate in edges],
        },
        "sets": {name: common.summary(rows) for name, rows in by_set.items()},
        "differences": differences,
        "costs": {
            row: {key: over_seeds([seed[row][key] for seed in seeds]) for key in ("seconds", "tokens")}
            for row in METHODS
        },
        "preparation": {
            step: {key: over_seeds([seed[step][key] for seed in seeds]) for key in seeds[0][step]}
            for step in PREPARATION
        },
        "estimate": {"answers": len(found), "critical": len(critical), **pass_at_k(critical, args.continuations)},
        "test_problems": {name: sum(set_of(p) == name for p in seeds[0][WARM]["problems"]) for name in SETS},
    }


def pass_at_k(critical: Sequence[Sequence[int]], n: int) -> dict[str, Any]:
    """Curves over wrong answers (critical index, right with it and without, of `n`), and what is freed at 1 and n."""
    if not critical:
        return {"curves": None, "freed": None}
    _, with_token, without = zip(*critical, strict=True)
    shares = {k: [[statistics.pass_at_k(n, c, k) for c in side] for side in (without, with_token)] for k in (1, n)}
    return {
        "curves": pass_at_k_curves(with_token, without, n),
        "freed": {str(k): paired_bootstrap(*sides) for k, sides in shares.items()},
    }


def main(args: RealReasoningArguments) -> dict[str, Any]:
    return Experiment(args).run()


# ------------------------------------------------------------------------------------------------ what the pages show


PICTURES = {"accuracy": "real_reasoning_accuracy.png", "pass_at_k": "real_reasoning_pass_at_k.png"}
NAMED = {SFT: "SFT", WARM: "base", TREG: "T-REG"}  # rows as the papers call them


def as_entry(bootstrap: Mapping[str, Any]) -> dict[str, Any]:
    """A difference over problems as a figure of a table."""
    return {"mean": bootstrap["difference"], "ci95": bootstrap["ci95"], "p": bootstrap["p"]}


def tables(results: dict[str, Any]) -> Tables:
    """The methods by page, the claims with both intervals, the grid, pass@k, and numbers of sentences."""
    rates, sets, estimate = results["validation"]["learning_rate"], results["sets"], results["estimate"]
    cells = {
        row: [f"{rates[row]:g}" if row in rates else "–"]
        + [percent(sets[name][row][key]) for name in SETS for key in MEASURES]
        + ([f"{results['costs'][row]['tokens']['mean']:,.0f}", spent(results, row)] if row in rates else ["–", "–"])
        for row in ROWS
    }
    headings = ("", "learning rate", *(f"{title}, {key}" for title in SETS.values() for key in MEASURES))
    shown: Tables = {}
    for page, rows in SHOWN.items():
        shown[f"{page}.methods"] = (*headings, "tokens", "time"), [[row, *cells[row]] for row in rows]
        shown[f"{page}.claims"] = claims(results, CLAIMS[page])
        method = OURS if page == "critical" else STRONG
        shown[f"{page}.to_beat"] = to_beat(
            next(d for d in results["differences"] if (d["better"], d["worse"]) == (method, SFT))
        )
    shown |= {
        "seeds": str(results["arguments"]["seeds"]),
        "before": " and ".join(
            f"{100 * found['accuracy']:.1f} % of {SETS[name]}" for name, found in results[BEFORE].items()
        )
        or "–",
        **{f"{name}.problems": str(count) for name, count in results["test_problems"].items()},
        "grid": common.grid_table(results["validation"], MEASURES) if results["validation"]["grid"] else ((""), []),
        "answers": str(estimate["answers"]),
        "critical": str(estimate["critical"]),
        "continuations": str(results["arguments"]["continuations"]),
        "warm_problems": f"{results['preparation']['warm']['problems']['mean']:.0f}",
        "pairs": f"{results['preparation']['rollouts']['pairs']['mean']:.0f}",
        "mean_weight": f"{1 - results['preparation']['contrast']['mean']['mean']:.2f}",
        "pass_at_k": pass_rows(estimate),
        "pass_at_k_claims": (CLAIM, freed(estimate)),
        **{f"{name}_picture": f"![{name}](figures/{file})" for name, file in PICTURES.items()},
    }
    return shown


def spent(results: Mapping[str, Any], row: str) -> str:
    """Time of a method's training and of the scores that only it reads."""
    scores = METHODS[row].dataset if METHODS[row].dataset in PREPARATION else None
    seconds = results["costs"][row]["seconds"]["mean"]
    return duration(seconds) + (f" + {duration(results['preparation'][scores]['seconds']['mean'])}" if scores else "")


def claims(results: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Differences over all test problems, over seeds and over problems; the verdict is on the first."""
    entries, rows = {(d["better"], d["worse"]): d for d in results["differences"]}, []
    for better, worse in pairs:
        for key in MEASURES:
            entry = entries[better, worse]
            *row, verdict = claim(f"{better} > {worse}, {key}", papers(better, worse), entry[key])
            rows.append([*row, percent(as_entry(entry[f"{key}_problems"]), "+"), verdict])
    return (*CLAIM[:-1], "over problems", CLAIM[-1]), rows


def papers(better: str, worse: str) -> str:
    """The gap in the papers: GSM8K / MATH500 of critical-token DPO's, AlpacaEval / Arena-Hard of T-REG's."""
    names = NAMED.get(better, better), NAMED.get(worse, worse)
    for table in (TABLE_3, PAPER):
        if set(names) <= set(table):
            return gaps(table[names[0]], table[names[1]])
    return "–"


def to_beat(entry: Mapping[str, Any]) -> str:
    """What a method lacks to be above SFT, in words."""
    gains = [100 * entry[key]["mean"] for key in MEASURES]
    above = " and ".join(f"{gain:+.1f} points {key}" for gain, key in zip(gains, MEASURES, strict=True))
    lacks = max(0.0, *(-gain for gain in gains))
    return above + (f", so it would have to gain {lacks:.1f}" if lacks else "")


def pass_rows(estimate: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    curves, rows = estimate["curves"], []
    for kind in ("with", "without") if curves else ():
        for point in (curves[kind][0], curves[kind][-1]):
            rows.append([f"pass@{point['k']}", f"{kind} the critical token", percent(point)])
    return ("", "prefix", "here"), sorted(rows, key=lambda row: int(row[0].removeprefix("pass@")))


def freed(estimate: Mapping[str, Any]) -> list[list[str]]:
    paper = dict(zip(estimate["freed"] or (), ("≈ +30", "> +90"), strict=False))
    return [
        claim(f"without the critical token pass@{k} is higher", paper[k], as_entry(entry))
        for k, entry in (estimate["freed"] or {}).items()
    ]


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    accuracy = common.accuracy_figure(results | {"methods": results["sets"][ALL]}, WARM, 5)
    curves = Figure(figsize=(6, 4), layout="constrained")
    axis = curves.subplots()
    for kind in ("with", "without") if results["estimate"]["curves"] else ():
        points = results["estimate"]["curves"][kind]
        steps = [point["k"] for point in points]
        low, high = zip(*([100 * end for end in point["ci95"]] for point in points), strict=True)
        (line,) = axis.plot(steps, [100 * point["mean"] for point in points], "o-", label=f"{kind} the critical token")
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", xticks=steps, xticklabels=steps)
        axis.legend()
    axis.set(xlabel="k", ylabel="pass@k, per cent", ylim=(-2, 102))
    axis.set_title(f"{results['estimate']['critical']} wrong answers to SVAMP")
    axis.grid(alpha=0.3)
    return dict(zip(PICTURES.values(), (accuracy, curves), strict=True))


if __name__ == "__main__":
    with fast_products():
        main(*TrlParser((RealReasoningArguments,)).parse_args_and_config())
