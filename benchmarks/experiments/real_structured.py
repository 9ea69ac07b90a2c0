r"""Structured output of a pretrained model on text that people wrote: SNIPS or BFCL, by training and by decoding.

    python -m benchmarks.experiments.real_structured --task snips --output_dir runs/benchmarks/real_structured-snips

A sentence to a voice assistant → JSON of its intent and slots (SNIPS), or a request with its functions → JSON of the
call (BFCL). SFT reads a few labelled rows; from there DPO (best against worst of a group of samples by the reward) and
GRPO by sequence credit and by field credit (`tokalign.trainers.credits.field`). Beside them stand what decides: the
model untrained, SFT on fewer rows, and SFT that takes about as long as SFT and GRPO together, on the same rows and on
more. Each is decoded greedily, freely and under the row's schema.

Equal means. Both credits take the same steps on the same prompts with the same completions a step, so their time is the
same but for the credit's own. DPO's pairs come from as many samples of the same prompts. DPO and the two credits have
one grid of learning rates, SFT one of its own, and one rule chooses (`best_of`) on validation rows, with seed 0's
training. Nothing is chosen on test rows. A seed draws the labelled rows, the prompts, the samples and the order of
training; the test rows are the same for all.

Rows of BFCL are divided by the function that they call, so no test row calls a function that training has seen called.
Rows with long prompts are left out, since they would take most of the time.

Every cell (a method of a seed) keeps a JSON of its own. A killed run goes on, and two processes started alike share the
cells. results.json is written after every cell from the seeds that have all methods; docs/results/structured_grpo.md
shows it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments.common import GRID, SMOLLM2, best_and_worst, fast_products, grid_table, held, kept
from benchmarks.experiments.dishonest import CATEGORIES, DATA
from benchmarks.ledger_stages import LedgerStages, flags
from benchmarks.render import FAILS, HOLDS, OPEN, Table, Tables, error_bars, number, percent, save, verdict
from tokalign.cli.evaluate_structured import EvaluateStructuredArguments, OptionalEngineArguments
from tokalign.cli.evaluate_structured import main as evaluate_structured_main
from tokalign.generation import EngineArguments
from tokalign.prompts import render_prompt
from tokalign.rewards import StructuredReward
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.statistics import over_seeds, paired, percentile_interval

RECIPES = "recipes/smollm2-135m-instruct"
GROUP = 8  # completions a prompt: of GRPO's groups, and of what DPO's pairs are chosen from
ROOM = 6  # tokens that an answer may be longer than the longest reference
BATCH = 8  # completions of one forward and backward pass
BUDGET = 8192  # tokens of one batch of generation: larger ones are no faster on a CPU, and two processes share memory
ZERO, FEW, SFT = "untrained", "SFT, fewer rows", "SFT"
LONGER, MORE, DPO = "SFT, same rows, longer", "SFT, more rows", "SFT + DPO"
SEQUENCE, FIELD = "SFT + GRPO, sequence credit", "SFT + GRPO, field credit"
TUNED = (DPO, SEQUENCE, FIELD)
METHODS = (SFT, FEW, *TUNED, LONGER, MORE)  # of every seed, in the order of the work
SHOWN = (ZERO, FEW, SFT, LONGER, MORE, *TUNED)
POSITIVE = (0.0, math.inf)
DECODING = ("free", "constrained")
MEASURES = ("slot_f1", "exact_match", "validity")
COMPARED = MEASURES[:2]
CLAIMS = (
    (FIELD, SEQUENCE),
    (FIELD, SFT),
    (FIELD, LONGER),
    (FIELD, MORE),
    (FIELD, DPO),
    (SEQUENCE, SFT),
    (SEQUENCE, LONGER),
    (DPO, SFT),
)


@dataclass(frozen=True)
class Task:
    """A data set, how it is asked for, and how answers are judged.

    Args:
        verb: its builder, with `options`; its `source` is the folder of this name.
        system: the system message, in place of the chat template's own of 22 tokens.
        judged: options of the reward.
        names: how the page calls the measures.
        untrained: options of the builder for the prompts of the untrained model, which has no rows to learn from what
            the keys are; None has the same prompts.
    """

    verb: str
    options: Mapping[str, Any]
    system: str
    judged: Mapping[str, Any]
    names: Mapping[str, str]
    untrained: Mapping[str, Any] | None = None


SHORT = {"instruction": ""}
TASKS = {
    "snips": Task(
        "snips",
        SHORT | {"show_schema": "false"},
        "Answer as JSON: the intent and the slots.",
        {},
        {"slot_f1": "slot F1", "exact_match": "exact match", "validity": "valid"},
        {"show_keys": "true"},
    ),
    "bfcl": Task(
        "bfcl",
        SHORT | {"categories": CATEGORIES, "call_format": "json"},
        'Answer with the call as JSON: {"name": …, "arguments": {…}}. Several calls are a list.',
        {"references": "allowed"},
        {"slot_f1": "arguments", "exact_match": "AST accuracy", "validity": "valid"},
    ),
}


@dataclass
class RealStructuredArguments:
    """Sizes of the experiment."""

    task: Literal["snips", "bfcl"] = field(default="snips", metadata={"help": "The data set."})
    output_dir: str = "runs/benchmarks/real_structured-snips"
    model: str = field(default=SMOLLM2, metadata={"help": "Hub id or folder of the model."})
    data: str | None = field(
        default=None, metadata={"help": f"Folder with snips/ and bfcl/; unset is the variable {DATA}."}
    )
    seeds: int = field(default=3, metadata={"help": "Seeds 0, 1, …"})
    few_rows: int = field(default=50, metadata={"help": "Labelled rows of the smaller SFT."})
    sft_rows: int = field(default=200, metadata={"help": "Labelled rows of SFT, from which all others start."})
    epochs: int = field(default=3, metadata={"help": "Epochs of SFT."})
    longer_epochs: int = field(default=12, metadata={"help": "Epochs that take about as long as SFT and then GRPO."})
    more_rows: int = field(default=2000, metadata={"help": "Most rows of the SFT that has one epoch of more."})
    steps: int = field(default=16, metadata={"help": "Steps of GRPO."})
    completions: int = field(default=64, metadata={"help": f"Completions a step of GRPO, in groups of {GROUP}."})
    sft_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4], metadata={"help": "SFT's grid."})
    learning_rates: list[float] = field(default_factory=lambda: [5e-5, 1.5e-4, 5e-4], metadata=GRID)
    beta: float = field(default=0.02, metadata={"help": "Weight of GRPO's KL term."})
    validation_rows: int = field(default=120, metadata={"help": "Rows that the learning rates are chosen on."})
    test_rows: int = field(default=240, metadata={"help": "Test rows."})
    max_prompt_tokens: int = field(default=320, metadata={"help": "Rows with longer prompts are left out."})
    max_tokens: int = field(default=64, metadata={"help": "Most tokens of an answer."})

    def __post_init__(self) -> None:
        if self.completions % GROUP:
            raise ValueError(f"completions is {self.completions}; use a multiple of {GROUP}.")
        if self.data is None and DATA not in os.environ:
            raise ValueError(f"There is no data; give --data, or set the variable {DATA}.")

    @property
    def source(self) -> Path:
        """Folder of the data set."""
        return Path(self.data or os.environ[DATA]) / self.task

    @property
    def prompts(self) -> int:
        """Prompts that GRPO sees, and DPO's pairs are sampled from."""
        return self.steps * self.completions // GROUP


# ----------------------------------------------------------------------------------------------------------------- data


def share_of(text: str) -> float:
    """A number in [0, 1) that a text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def divided(task: str, rows: Mapping[str, Sequence[dict[str, Any]]], args: RealStructuredArguments) -> dict[str, Any]:
    """Rows of training, validation and test.

    Args:
        rows: split of the source -> its rows, shuffled.

    SNIPS has a test split, and validation is taken from the end of training. BFCL has none: a third of the functions
    that rows call is the test's, an eighth the validation's.
    """
    if task == "snips":
        train, test = list(rows["train"]), list(rows["test"])
        train, validation = train[: -args.validation_rows], train[-args.validation_rows :]
    else:
        train, validation, test = [], [], []
        for row in (row for split in sorted(rows) for row in rows[split]):
            called = json.loads(row["answer"])
            share = share_of((called[0] if isinstance(called, list) else called)["name"])
            (test if share < 1 / 3 else validation if share < 1 / 3 + 1 / 8 else train).append(row)
    return {"train": train, "validation": validation[: args.validation_rows], "test": test[: args.test_rows]}


def prepare(args: RealStructuredArguments) -> Path:
    """The stage of all rows: train, validation, test, and the test's prompts of the untrained model."""
    task, out = TASKS[args.task], Path(args.output_dir)
    with held(out / "locks" / "data"):
        stages = LedgerStages(out)
        tokenizer = AutoTokenizer.from_pretrained(args.model)

        def fits(row: dict[str, Any]) -> bool:
            answer = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
            prompt = render_prompt(row["prompt"], tokenizer)
            return len(prompt) <= args.max_prompt_tokens and len(answer) + ROOM <= args.max_tokens

        def read(name: str, options: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
            folder, system = out / name, {"role": "system", "content": task.system}
            words = flags(source=args.source, output_dir=folder, **task.options, **options)
            stages.run(f"data {name}", f"data {task.verb}", *words)
            found = {split: load_stage(folder, split=split).shuffle(seed=0) for split in ("train", "test")}
            return {
                split: [row | {"prompt": [system, *row["prompt"]]} for row in each] for split, each in found.items()
            }

        rows = {split: list(filter(fits, each)) for split, each in read("source", {}).items()}
        splits = divided(args.task, rows, args)
        if task.untrained is not None:
            asked = {row["id"]: row for row in read("keys", task.untrained)["test"]}
            splits["untrained"] = [asked[row["id"]] for row in splits["test"]]
        for split, each in splits.items():
            write_rows(each, out / "rows" / split)
    return out / "rows"


def write_rows(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """A stage of rows as they are."""
    run_job(lambda batch: batch, Dataset.from_list(list(rows)), folder, name="rows of real text", parameters={})


# --------------------------------------------------------------------------------------------------------------- a seed


class RealSeed:
    """Rows, trained models and evaluations of one seed.

    Args:
        rows: of `prepare`.
        rates: method -> learning rate, of the methods that others start from.
    """

    def __init__(self, args: RealStructuredArguments, rows: Path, rates: Mapping[str, float], *, seed: int):
        self.args, self.rows, self.rates, self.seed = args, rows, rates, seed
        self.task, self.out = TASKS[args.task], Path(args.output_dir) / f"seed-{seed}"
        train = load_stage(rows, split="train").shuffle(seed=seed).to_list()
        self.labelled = {FEW: train[: args.few_rows], SFT: train[: args.sft_rows], MORE: train[: args.more_rows]}
        self.labelled[LONGER] = self.labelled[SFT]
        unseen = train[args.sft_rows :] or train
        self.prompts = unseen[: args.prompts]
        with held(self.out / "locks" / "rows"):
            for name, own in (("few", FEW), ("sft", SFT), ("more", MORE)):
                write_rows(self.labelled[own], self.out / "rows" / name)
            write_rows(self.prompts, self.out / "rows" / "prompts")

    def train(self, method: str, rate: float) -> Trained:
        """A method's model at a learning rate, trained now if it was not before."""
        args, options = self.args, {"learning_rate": rate, "seed": self.seed}
        if method in self.labelled:
            name = {FEW: "few", MORE: "more"}.get(method, "sft")
            epochs = {LONGER: args.longer_epochs, MORE: 1}.get(method, args.epochs)
            options |= {"model_name_or_path": args.model, "dataset_name": self.out / "rows" / name}
            with held(self.out / "locks" / f"{method} {rate:g}"):  # all others start from SFT
                folder, seconds = self._recipe(method, "sft", "sft_snips", num_train_epochs=epochs, **options)
            return Trained(folder, None, seconds)
        sft = self.train(SFT, self.rates[SFT]).model
        options["model_name_or_path"] = sft
        if method == DPO:
            with held(self.out / "locks" / "pairs"):
                options["dataset_name"] = self.pairs(sft)
            return Trained(sft, *self._recipe(method, "dpo", "dpo_structured", **options))
        batch = min(args.completions, BATCH)
        options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": args.completions // batch}
        options |= {"credit": "field" if method == FIELD else "sequence", "beta": args.beta, "max_steps": args.steps}
        options |= {"max_completion_length": args.max_tokens, "dataset_name": self.out / "rows" / "prompts"}
        return Trained(sft, *self._recipe(method, "structured-grpo", "structured_grpo", **options, **self.task.judged))

    def pairs(self, sft: Path) -> Path:
        """Best and worst sample of each of GRPO's prompts."""
        return best_and_worst(
            EngineArguments(model=str(sft), token_budget=BUDGET),
            load_stage(self.out / "rows" / "prompts"),
            self.out / "pairs",
            reward=StructuredReward(**self.task.judged),
            group=GROUP,
            max_tokens=self.args.max_tokens,
            seed=self.seed,
        )

    def folder(self, method: str, rate: float) -> Path:
        """Of a trained model with a state of its own, so that two processes can train."""
        return self.out / "models" / f"{method} {rate:g}".replace(",", "").replace(" ", "_")

    def _recipe(self, method: str, verb: str, config: str, **options: Any) -> tuple[Path, float]:
        """Train by a YAML; the folder, and the seconds that it took."""
        folder = self.folder(method, options["learning_rate"])
        stages = LedgerStages(folder)
        stages.train(method, verb, folder, *flags(config=f"{RECIPES}/{config}.yaml", **options))
        return folder, stages.done[method]["seconds"]

    def figures(self, name: str, trained: Trained, split: str, decoding: str) -> dict[str, Any]:
        """Outcome of every row of a split, decoded greedily, and what it cost."""
        output = self.out / "evaluation" / f"{name} {split} {decoding}".replace(",", "").replace(" ", "_")
        metrics = evaluate_structured_main(
            EvaluateStructuredArguments(
                output_dir=str(output),
                problems=str(self.rows),
                split=split,
                constrained=decoding == "constrained",
                max_tokens=self.args.max_tokens,
                **self.task.judged,
            ),
            OptionalEngineArguments(
                model=str(trained.model),
                adapter=None if trained.adapter is None else str(trained.adapter),
                token_budget=BUDGET,
            ),
        )
        rows = load_stage(output).to_list()
        latency = metrics["latency"]
        return {
            "rows": {measure: [outcome(self.args.task, measure, row) for row in rows] for measure in MEASURES},
            "tokens": latency["tokens"] / len(rows),
            "seconds": latency["generation_seconds"],
        }

    def cell(self, method: str, rate: float) -> dict[str, Any]:
        """All that the page shows of a method."""
        trained = self.train(method, rate)
        found: dict[str, Any] = {each: self.figures(f"{method} {rate:g}", trained, "test", each) for each in DECODING}
        if method in self.labelled and method != SFT:
            shutil.rmtree(trained.model)  # half a GB that nothing starts from
        judged = len(self.prompts) if method in TUNED else 0
        read = len(self.labelled.get(method, self.labelled[SFT]))
        return found | {"train_seconds": trained.seconds, "read": read, "judged": judged}

    def untrained(self) -> dict[str, Any]:
        """The same of the model as it is."""
        split = "test" if self.task.untrained is None else "untrained"
        start = Trained(self.args.model, None, 0.0)
        cost = {"train_seconds": 0.0, "read": 0, "judged": 0}
        return {each: self.figures(ZERO, start, split, each) for each in DECODING} | cost

    def validation(self, method: str, rate: float) -> dict[str, float]:
        """The measures on the validation rows, decoded freely."""
        trained = self.train(method, rate)
        rows = self.figures(f"{method} {rate:g}", trained, "validation", "free")["rows"]
        return {measure: ratio(np.array([rows[measure]])) for measure in MEASURES}


class Trained(NamedTuple):
    """A trained model, the adapter on it if there is one, and the seconds that this training took."""

    model: Path | str
    adapter: Path | None
    seconds: float


# ------------------------------------------------------------------------------------------------------------ measures


def outcome(task: str, measure: str, row: Mapping[str, Any]) -> tuple[float, float]:
    """What an answer has of a measure, and what there was to have: a share of rows, slots or arguments is Σ / Σ.

    The F1 over slots is 2 · right / (given + asked for), over all rows together as is usual for SNIPS; an answer that
    is no document gives none. Of tool calls it is the mean agreement of the rows.
    """
    if measure != "slot_f1":
        return float(row[measure]), 1.0
    if task == "bfcl":
        return row["content_f1"], 1.0
    asked = slots(json.loads(row["answer"]))
    given = slots(StructuredReward().read(row["completion"]).value) if row["validity"] else set()
    return 2.0 * len(given & asked), float(len(given) + len(asked))


def slots(document: Any) -> set[tuple[str, str]]:
    """Names and texts of a document, without its intent."""
    pairs = document.items() if isinstance(document, dict) else ()
    return {(name, json.dumps(value)) for name, value in pairs if name != "intent"}


def ratio(outcomes: np.ndarray) -> float:
    """Σ of what answers have over Σ of what there was; (seeds, rows, 2)."""
    have, there = outcomes.sum(axis=(0, 1))
    return float(have / there) if there else 0.0


def over_rows(better: np.ndarray, worse: np.ndarray, samples: int = 10_000) -> dict[str, Any]:
    """Difference of two ratios with the 95 % interval of a bootstrap over rows, all seeds of a row together.

    Args:
        better, worse: (seeds, rows, 2), the same rows of the same seeds.
    """
    sums = np.concatenate([better.sum(axis=0), worse.sum(axis=0)], axis=1)  # (rows, 4)
    n = len(sums)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=samples) @ sums
    differences = drawn[:, 0] / np.maximum(drawn[:, 1], 1) - drawn[:, 2] / np.maximum(drawn[:, 3], 1)
    return {"mean": ratio(better) - ratio(worse), "ci95": list(percentile_interval(differences)), "rows": n}


def best_of(cells: Mapping[float, Mapping[str, float]]) -> float:
    """The learning rate with the highest sum of slot F1 and exact match; of equal ones the lower."""
    return max(sorted(cells), key=lambda rate: sum(cells[rate][measure] for measure in COMPARED))


# ------------------------------------------------------------------------------------------------------------ the work


def choose_rates(args: RealStructuredArguments, rows: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The grid on validation rows by seed 0's training, and the rate of every method."""
    rates: dict[str, float] = {}
    run, grid = RealSeed(args, rows, rates, seed=0), {}
    for methods, tried in (((SFT,), args.sft_rates), (TUNED, args.learning_rates)):  # the others start from SFT
        work = {f"{method} {rate:g}": partial(run.validation, method, rate) for method in methods for rate in tried}
        cells = kept(work, Path(args.output_dir) / "grid", settings={**settings, **rates})
        for method in methods:
            grid[method] = {rate: cells[f"{method} {rate:g}"] for rate in tried}
            rates[method] = best_of(grid[method])
    return {
        "grid": {method: {f"{rate:g}": cell for rate, cell in cells.items()} for method, cells in grid.items()},
        "learning_rate": rates,
        "at_edge": [method for method, rate in rates.items() if len(grid[method]) > 1 and rate in _edges(grid[method])],
    }


def _edges(cells: Mapping[float, Any]) -> tuple[float, float]:
    return min(cells), max(cells)


def main(args: RealStructuredArguments) -> dict[str, Any]:
    rows = prepare(args)
    sizes = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "data", "seeds")}
    validation = choose_rates(args, rows, sizes)
    rates = validation["learning_rate"]
    work = {ZERO: RealSeed(args, rows, rates, seed=0).untrained}
    for seed in range(args.seeds):
        run = RealSeed(args, rows, rates, seed=seed)
        work |= {f"{seed} {method}": partial(run.cell, method, rates.get(method, rates[SFT])) for method in METHODS}
    results: dict[str, Any] = {}

    def after(cells: Mapping[str, Any]) -> None:
        made = results_of(args, validation, cells)
        if made is not None:
            results.update(made)
            save(args.output_dir, made, tables)

    cells = kept(work, Path(args.output_dir) / "cells", settings=sizes | {"rates": rates}, after=after)
    after(cells)
    return results


def results_of(
    args: RealStructuredArguments, validation: Mapping[str, Any], cells: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What is kept of all seeds that have every method; None while there is none."""
    done = [seed for seed in range(args.seeds) if all(f"{seed} {method}" in cells for method in METHODS)]
    if not done or ZERO not in cells:
        return None
    by_seed = {method: [cells[f"{seed} {method}"] for seed in done] for method in METHODS}
    by_seed[ZERO] = [cells[ZERO]]
    arrays = {
        (method, each, measure): np.array([cell[each]["rows"][measure] for cell in own])
        for method, own in by_seed.items()
        for each in DECODING
        for measure in MEASURES
    }

    def figure(method: str, each: str, measure: str) -> list[float]:
        return [ratio(one[None]) for one in arrays[method, each, measure]]

    def measured(method: str, each: str) -> dict[str, Any]:
        own = [cell[each] for cell in by_seed[method]]
        cost = {"tokens": [c["tokens"] for c in own], "seconds": [c["seconds"] for c in own]}
        found = {measure: figure(method, each, measure) for measure in MEASURES} | cost
        return {name: over_seeds(values) for name, values in found.items()}

    def compared(better: str, worse: str, each: str, measure: str) -> dict[str, Any]:
        pair = (better, each, measure), (worse, each, measure)
        return {"seeds": paired(*(figure(*one) for one in pair)), "rows": over_rows(*(arrays[one] for one in pair))}

    return {
        "arguments": asdict(args) | {"seeds": len(done)},
        "test_rows": len(cells[ZERO]["free"]["rows"]["validity"]),
        "validation": validation,
        "methods": {
            method: {each: measured(method, each) for each in DECODING}
            | {
                "train_seconds": over_seeds([cell["train_seconds"] for cell in by_seed[method]]),
                "read": by_seed[method][0]["read"],
                "judged": by_seed[method][0]["judged"],
            }
            for method in SHOWN
        },
        "differences": [
            {"better": better, "worse": worse, "decoding": each}
            | {measure: compared(better, worse, each, measure) for measure in COMPARED}
            for each in DECODING
            for better, worse in CLAIMS
        ],
    }


# ------------------------------------------------------------------------------------------------ what the page shows


def tables(results: dict[str, Any]) -> Tables:
    """Methods by both decodings, differences with their verdicts, the grid, and what sentences name."""
    arguments, names = results["arguments"], TASKS[results["arguments"]["task"]].names
    sizes = ("seeds", "few_rows", "sft_rows", "epochs", "longer_epochs", "steps", "completions", "beta")
    found: Tables = {each: methods(results, each) for each in DECODING}
    for each in DECODING:
        found[f"{each}_claims"] = (
            ("claim", "", "over the seeds (95 % interval)", "over the rows (95 % interval)", "verdict"),
            [
                compared_row(entry, names[measure], entry[measure])
                for entry in results["differences"]
                if entry["decoding"] == each
                for measure in COMPARED
            ],
        )
    return {
        **found,
        "goals": goals(results, names),
        "grid": grid_table(results["validation"], COMPARED),
        "test_rows": str(results["test_rows"]),
        "validation_rows": str(arguments["validation_rows"]),
        "prompts": str(results["methods"][FIELD]["judged"]),
        "more_rows": str(results["methods"][MORE]["read"]),
        "group": str(GROUP),
        **{name: str(arguments[name]) for name in sizes},
    }


def methods(results: dict[str, Any], decoding: str) -> Table:
    """A row a method: its rows, its training's time, and its answers."""
    names = TASKS[results["arguments"]["task"]].names
    rows = []
    for method, entry in results["methods"].items():
        own = entry[decoding]
        shares = [percent(own[measure]) for measure in MEASURES]
        speed = over_seeds([1 / second for second in own["seconds"]["values"]])["mean"] * results["test_rows"]
        cost = [str(entry["read"]), str(entry["judged"]), number(entry["train_seconds"], 0, within=POSITIVE)]
        rows.append([method, *cost, *shares, f"{own['tokens']['mean']:.0f}", f"{speed:.1f}"])
    headings = ("", "rows read", "rows judged", "seconds of training", *names.values(), "tokens an answer", "answers/s")
    return headings, rows


def both(entry: Mapping[str, Any]) -> str:
    """The verdict of two intervals, over seeds and over rows: what one of them cannot tell is not told."""
    words = {verdict(entry["seeds"]), verdict(entry["rows"])}
    return words.pop() if len(words) == 1 else OPEN


def compared_row(pair: Mapping[str, Any], name: str, entry: Mapping[str, Any]) -> list[str]:
    seeds, rows = (f"{percent(entry[over], '+')} points" for over in ("seeds", "rows"))
    return [f"{pair['better']} > {pair['worse']}", name, seeds, rows, f"**{both(entry)}**"]


def goals(results: dict[str, Any], names: Mapping[str, str]) -> str:
    """What became of the goal, in a sentence: field credit above sequence credit, and above SFT at equal time."""
    words = {HOLDS: "above", FAILS: "below", OPEN: "not to be told from"}
    free = {(e["better"], e["worse"]): e for e in results["differences"] if e["decoding"] == DECODING[0]}
    parts = [
        f"{words[both(free[FIELD, worse][measure])]} {worse} in {names[measure]}"
        for worse in (SEQUENCE, LONGER)
        for measure in COMPARED
    ]
    return f"{FIELD} is {', '.join(parts[:-1])} and {parts[-1]}"


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Every method in both measures, decoded freely and under the schema."""
    task = results["arguments"]["task"]
    drawn = Figure(figsize=(12, 4), layout="constrained")
    for axis, measure in zip(drawn.subplots(1, len(COMPARED), sharey=True), COMPARED, strict=True):
        for each, colour in zip(DECODING, ("C0", "C1"), strict=True):
            error_bars(axis, {m: entry[each][measure] for m, entry in results["methods"].items()}, colour=colour)
        axis.set(title=TASKS[task].names[measure], xlabel=f"per cent, {results['arguments']['seeds']} seeds")
    drawn.axes[0].legend(DECODING, frameon=False)
    return {f"real_structured_{task}.png": drawn}


if __name__ == "__main__":
    with fast_products():
        main(*TrlParser((RealStructuredArguments,)).parse_args_and_config())
