r"""Structured GRPO in the ledger world: sequence and field credit beside what one would do without them, by seed.

    python -m benchmarks.experiments.structured_ledger --output_dir runs/benchmarks/structured_ledger

A base that has read sloppy JSON in two renderings (half of its documents have a fault of structure) → SFT on a few
clean documents → from there DPO (best against worst of eight samples by the reward) and GRPO with our reward, by
sequence credit (one advantage a completion) and by field credit (`tokalign.trainers.credits.field`), and with the
literal reward of arXiv 2512.00319. Then GRPO by the better credit with each component of the reward left out, and GRPO
with the settings of the page before. And the SFT model under constrained decoding. All of them see the rendering `json`
only; the rendering `rows`, the same content under another schema, shows what carries over.

Equal means. DPO's pairs come from as many samples as GRPO makes, of the same problems. All tuned methods have one grid
of learning rates, and one rule chooses from it (`best_of`) on validation problems (seed 1000, with training problems of
its own); the ablations take the rate of their credit. A seed has its own training problems, SFT documents, pairs,
rollouts and test problems, which all its methods share. Nothing is chosen by test problems.

A killed run goes on where it was. Started twice, with one command line, two processes share the work (`shared`). Writes
results.json; docs/results/structured_grpo.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from trl import TrlParser

from benchmarks.experiments.common import GRID, GRID_SEED, best_and_worst, difference, grid_table, held, shared, summary
from benchmarks.ledger_stages import LedgerStages, flags
from benchmarks.render import (
    CLAIM,
    HOLDS,
    SHARE,
    Table,
    Tables,
    claim,
    error_bars,
    gaps,
    in_words,
    interval,
    number,
    percent,
    read_json,
    save,
    slashed,
)
from tokalign.generation import EngineArguments
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.reward import WEIGHTS
from tokalign.stage.loading import load_stage
from tokalign.statistics import over_seeds
from tokalign.view.curriculum import COLOURS, COMPONENTS, DASHED, curriculum, first_step

WORLD = {"min_events": 2, "max_events": 3, "max_start": 20, "max_change": 10, "max_number": 40}
BASE_SEED = 2000  # of the base's documents
DOCUMENT_SEEDS = 500  # added to a seed, for its SFT documents
MAX_TOKENS = 110
GROUP = 8  # completions a problem: of GRPO's groups, and of what DPO's pairs are chosen from
BETA = 0.01  # weight of the KL term of every GRPO, the anchor; with 0.04 structure came later on validation problems
CHECKPOINTS = 6  # of a GRPO run: the points of the learning curve
SEQUENCE, FIELD, LITERAL = "GRPO, sequence credit", "GRPO, field credit", "GRPO, literal reward"
CONSTRAINED = "SFT, constrained decoding"
EARLIER = "GRPO, settings of the page before"
EARLIER_RATE = 3e-3
EARLIER_WEIGHTS = {"structure": 1.0, "format": 0.5, "validity": 1.0, "schema": 1.0, "correctness": 1.0}
ABLATED = {  # component left out -> the figure that it stands for
    "validity": "validity",
    "structure": "structure",
    "format": "validity",
    "schema": "compliance",
    "correctness": "content_f1",
}
CREDITS = (SEQUENCE, FIELD)
TUNED = ("SFT", "DPO", *CREDITS, LITERAL)
MAIN = ("base", "SFT", CONSTRAINED, "DPO", *CREDITS, LITERAL)
LEFT_OUT = tuple(f"GRPO − {component}" for component in ABLATED)
ABLATIONS = (*LEFT_OUT, EARLIER)
FIGURES = ("validity", "structure", "compliance", "content_f1", "exact_match", "invented_keys", "total")
COMPARED = ("validity", "structure", "compliance", "content_f1", "exact_match", "greedy_exact_match")
EXACT = {"exact_match": "sampled", "greedy_exact_match": "greedy"}
DIFFERENCES = (  # better, worse: on the rendering that was trained
    ("DPO", "SFT"),
    *((credit, worse) for credit in CREDITS for worse in ("SFT", "DPO", CONSTRAINED, LITERAL)),
    (FIELD, SEQUENCE),
    *((CONSTRAINED, credit) for credit in CREDITS),
    *((credit, ablation) for credit in CREDITS for ablation in ABLATIONS),
)
TRANSFER = (
    ("SFT", "base"),
    ("DPO", "SFT"),
    *((credit, worse) for credit in CREDITS for worse in ("SFT", "base", LITERAL)),
    (FIELD, SEQUENCE),
)
CURRICULUM = (("validity", "structure"), ("structure", "correctness"))  # the first rises before the second
BOUND, MARGIN = 0.95, 0.05


def best_of(cells: Mapping[Any, Mapping[str, float]]) -> Any:
    """The key of the best cell: most right answers (sampled) among those whose structure (sampled) is good enough.

    Good enough is at least BOUND. Where no cell reaches it, it is at most MARGIN below the best structure there is: SFT
    and DPO do not come to BOUND at any rate, and their rates of most structure are not those of most right answers.
    """
    best = max(cell["structure"] for cell in cells.values())
    enough = BOUND if best >= BOUND else best - MARGIN
    good = {key: cell["exact_match"] for key, cell in cells.items() if cell["structure"] >= enough}
    return max(good, key=lambda key: good[key])


def options_of(method: str, credit: str) -> dict[str, Any]:
    """Options of a GRPO.

    Args:
        credit: SEQUENCE or FIELD, that of the ablations.
    """
    # fields are paid for what is right in them whatever the reward's weights are, so nothing of that is left out there
    by_field = FIELD in ((credit,) if method in LEFT_OUT and method != "GRPO − correctness" else (method,))
    options: dict[str, Any] = {"beta": BETA, "credit": "field" if by_field else "sequence"}
    if method == LITERAL:
        options["reward_preset"] = "rl-struct"
    if method == EARLIER:
        options |= {"beta": 0, "component_weights": json.dumps(EARLIER_WEIGHTS)}
    if method in LEFT_OUT:
        left_out = (method.removeprefix("GRPO − "), "length")
        weights = {component: weight for component, weight in WEIGHTS.items() if component not in left_out}
        options["component_weights"] = json.dumps(weights)
    return options


@dataclass
class StructuredLedgerArguments:
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/structured_ledger"
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    ablation_seeds: int = field(default=3, metadata={"help": "How many of them train the ablations."})
    base_documents: int = field(default=35200, metadata={"help": "Documents that the base is trained on, once."})
    sloppy_share: float = field(default=0.5, metadata={"help": "Share of them with a fault of structure."})
    problems: int = field(default=1100, metadata={"help": "Training problems a seed, for GRPO and DPO."})
    sft_documents: int = field(default=100, metadata={"help": "Clean documents of the SFT a seed."})
    steps: int = field(default=90, metadata={"help": f"Steps of GRPO, a multiple of {CHECKPOINTS}."})
    completions: int = field(default=96, metadata={"help": f"Completions a step of GRPO, in groups of {GROUP}."})
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata=GRID)
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=400, metadata={"help": "Test problems a seed."})

    def __post_init__(self) -> None:
        if self.steps % CHECKPOINTS or self.completions % GROUP:
            raise ValueError(f"steps must be a multiple of {CHECKPOINTS} and completions of {GROUP}.")
        if self.pairs_from > self.problems:
            raise ValueError(f"DPO's pairs are sampled from {self.pairs_from} problems: set problems to that or more.")

    @property
    def pairs_from(self) -> int:
        """Problems of which DPO's pairs are sampled, so that it sees as many samples as GRPO."""
        return self.steps * self.completions // GROUP


class StructuredSeed:
    """Problems, trained models and evaluations of one seed; whatever is there is kept.

    Args:
        base: the model that SFT starts from.
        rates: method -> learning rate, of the methods that others start from.
        split: of the held-out problems.
        credit: that of the ablations.
    """

    def __init__(
        self,
        args: StructuredLedgerArguments,
        base: Path,
        rates: Mapping[str, float],
        *,
        seed: int,
        split: str,
        credit: str = SEQUENCE,
    ):
        self.args, self.base, self.rates, self.seed, self.split = args, base, rates, seed, split
        self.credit = credit
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.locks = self.out / "locks"
        self.worlds = {rendering: self.out / rendering for rendering in ("json", "rows")}
        self.documents = self.out / "documents"
        held_out = {"validation": args.validation_problems, "test": args.test_problems}[split]
        with held(self.locks / "problems"):
            self.stages = LedgerStages(self.out)
            for rendering, folder in self.worlds.items():  # one seed: the same problems, asked for in two ways
                sizes = {"train": args.problems, split: held_out}
                self.stages.problems(folder, seed=seed, problem_rendering=rendering, **sizes, **WORLD)
            documents = {"problem_rendering": "json", "train": args.sft_documents, **WORLD}
            self.stages.problems(self.documents, seed=seed + DOCUMENT_SEEDS, **documents)

    def train(self, method: str, rate: float) -> tuple[Path, Path | None]:
        """Model and adapter of a method at a learning rate, trained now if they are not there."""
        shared_options = {"learning_rate": rate, "seed": self.seed}
        if method == "SFT":
            start = {"model_name_or_path": self.base, "dataset_name": self.documents}
            options: dict[str, Any] = {"use_peft": "false", "num_train_epochs": 1}
            with held(self.locks / f"SFT {rate:g} model"):  # all others start from it
                return self._recipe(method, "sft", "sft", **start, **shared_options, **options), None
        sft, _ = self.train("SFT", self.rates["SFT"])
        if method == "DPO":
            with held(self.locks / "pairs"):
                start = {"model_name_or_path": sft, "dataset_name": self.pairs(sft)}
            return sft, self._recipe(method, "critical-dpo", "dpo", **start, **shared_options)
        start = {"model_name_or_path": sft, "dataset_name": self.worlds["json"]}
        # an engine of vLLM takes longer to start than all rollouts of so small a model take here
        options = {"rollouts": "transformers", "max_steps": self.args.steps, **options_of(method, self.credit)}
        options |= {"per_device_train_batch_size": self.args.completions, "num_generations": GROUP}
        options |= {"save_strategy": "steps", "save_steps": self.args.steps // CHECKPOINTS}
        return sft, self._recipe(method, "structured-grpo", "structured_grpo", **start, **shared_options, **options)

    def _recipe(self, method: str, verb: str, config: str, **options: Any) -> Path:
        """Train into a folder with a state of its own, so that two processes can train side by side."""
        name = f"{method} {options['learning_rate']:g}"
        stages = LedgerStages(self.out / "models" / name.replace(",", "").replace(" ", "_"))
        stages.train(name, verb, stages.folder, *flags(config=f"recipes/ledger/{config}.yaml", **options))
        return stages.folder

    def pairs(self, model: Path) -> Path:
        """Best and worst of a group of samples of each problem by our reward."""
        return best_and_worst(
            EngineArguments(model=str(model)),
            load_stage(self.worlds["json"], split="train").select(range(self.args.pairs_from)),
            self.out / "pairs",
            reward=StructuredReward(),
            group=GROUP,
            max_tokens=MAX_TOKENS,
            seed=self.seed,
        )

    def figures(
        self,
        method: str,
        rate: float | None,
        rendering: str = "json",
        temperature: float = 1.0,
        checkpoint: int | None = None,
    ) -> dict[str, float]:
        """Figures of a method on the held-out problems.

        Args:
            rate: None is the base.
            checkpoint: step of a GRPO's checkpoint; None is its end.
        """
        constrained = method == CONSTRAINED
        model, adapter = (self.base, None) if rate is None else self.train("SFT" if constrained else method, rate)
        name = f"{method} {rate or 0:g} {rendering} T={temperature:g}"
        if checkpoint is not None:
            assert adapter is not None
            adapter, name = adapter / f"checkpoint-{checkpoint}", f"{name} step {checkpoint}"
        max_tokens = 2 * MAX_TOKENS if constrained else MAX_TOKENS
        settings = {"constrained": constrained, "temperature": temperature, "seed": self.seed, "split": self.split}
        metrics = self.stages.structured_evaluation(
            name.replace(" ", "_").replace(",", ""),
            model,
            adapter,
            self.worlds[rendering],
            max_tokens=max_tokens,
            **settings,
        )
        figures = {key: metrics["figures"][key] for key in FIGURES}
        # no document at all: nothing is invented
        values = {key: 0.0 if figure is None else figure["value"] for key, figure in figures.items()}
        return values | {"tokens_per_second": metrics["latency"]["tokens_per_second"]}

    def history(self, method: str, rate: float) -> list[dict[str, Any]]:
        """Components of the reward over the steps of a GRPO run, as its trainer logged them."""
        adapter = self.train(method, rate)[1]
        assert adapter is not None
        entries = read_json(adapter / "log_history.json")
        return [entry for entry in entries if any(key.startswith("structured/") for key in entry)]

    def exact_matches(self, method: str, rate: float | None, checkpoint: int) -> dict[str, float]:
        """Right answers of a checkpoint at both temperatures."""
        at = {"exact_match": 1.0, "greedy_exact_match": 0.0}
        return {
            key: self.figures(method, rate, temperature=temperature, checkpoint=checkpoint)["exact_match"]
            for key, temperature in at.items()
        }

    def cell(self, method: str, rate: float | None) -> dict[str, Any]:
        """All that the page shows of a method in this seed."""
        greedy = self.figures(method, rate, temperature=0.0)
        sampled = self.figures(method, rate) | {"greedy_exact_match": greedy["exact_match"]}
        found: dict[str, Any] = {"sampled": sampled, "greedy": greedy}
        if method in MAIN and method != CONSTRAINED:
            found["rows"] = self.figures(method, rate, rendering="rows")
        if method in (*CREDITS, LITERAL):
            found["history"] = self.history(method, rate or 0.0)
        if method in CREDITS:
            between = range(self.args.steps // CHECKPOINTS, self.args.steps, self.args.steps // CHECKPOINTS)
            points = {step: self.exact_matches(method, rate, step) for step in between}
            points[self.args.steps] = {key: sampled[key] for key in EXACT}
            found["curve"] = {key: [[step, point[key]] for step, point in points.items()] for key in EXACT}
        return found


def train_base(args: StructuredLedgerArguments) -> Path:
    """The model that has read sloppy documents of both renderings."""
    with held(Path(args.output_dir) / "locks" / "base"):
        stages = LedgerStages(Path(args.output_dir))
        documents = {"sft": args.base_documents, "renderings": ("json", "rows"), "sloppy_share": args.sloppy_share}
        world = stages.problems(stages.folder / "world", seed=BASE_SEED, problem_rendering="json", **documents, **WORLD)
        start = {"model_name_or_path": world / "ledger-slm", "dataset_name": world / "sft"}
        return stages.recipe("base", "sft", "base_slm", **start, max_steps=args.base_documents // 32, seed=0)


def choose_rates(args: StructuredLedgerArguments, base: Path) -> dict[str, Any]:
    """The grid on validation problems, the rate of every tuned method, and the better credit, by `best_of`."""
    rates: dict[str, float] = {}
    run = StructuredSeed(args, base, rates, seed=GRID_SEED, split="validation")
    grid: dict[str, dict[float, dict[str, float]]] = {}
    for methods in (("SFT",), TUNED[1:]):  # the others start from SFT at its rate
        work = {
            f"{method} {rate:g}": partial(run.figures, method, rate)
            for method in methods
            for rate in args.learning_rates
        }
        cells = shared(work, run.locks)
        for method in methods:
            grid[method] = {rate: cells[f"{method} {rate:g}"] for rate in args.learning_rates}
            rates[method] = best_of(grid[method])
    edges = (args.learning_rates[0], args.learning_rates[-1])
    kept = ("structure", "content_f1", "exact_match")
    return {
        "grid": {
            m: {f"{rate:g}": {key: cell[key] for key in kept} for rate, cell in cells.items()}
            for m, cells in grid.items()
        },
        "learning_rate": rates,
        "at_edge": [m for m, rate in rates.items() if rate in edges],
        "credit": best_of({credit: grid[credit][rates[credit]] for credit in CREDITS}),
    }


def rate_of(method: str, validation: Mapping[str, Any]) -> float | None:
    """A method's own rate; the ablations have that of their credit, constrained decoding is of the SFT model."""
    rates: Mapping[str, float] = validation["learning_rate"]
    if method in ("base", EARLIER):
        return {"base": None, EARLIER: EARLIER_RATE}[method]
    return rates[method] if method in rates else rates["SFT" if method == CONSTRAINED else validation["credit"]]


def main(args: StructuredLedgerArguments) -> dict[str, Any]:
    base = train_base(args)
    validation = choose_rates(args, base)
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in range(args.seeds):
        shared_by_all = {"split": "test", "credit": validation["credit"]}
        run = StructuredSeed(args, base, validation["learning_rate"], seed=seed, **shared_by_all)
        for method in (*MAIN, *ABLATIONS) if seed < args.ablation_seeds else MAIN:
            work[f"{seed} {method}"] = partial(run.cell, method, rate_of(method, validation))
    cells: dict[str, dict[str, list[Any]]] = {}  # what -> method -> by seed
    for name, cell in shared(work, Path(args.output_dir) / "locks").items():
        for what, found in cell.items():
            cells.setdefault(what, {}).setdefault(name.partition(" ")[2], []).append(found)
    sizes = {"arguments": asdict(args) | {"pairs_from": args.pairs_from}, "validation": validation}
    results = {**sizes, **figures_of(cells), **rises(cells["history"])}
    results |= learning(cells["curve"], cells["sampled"]["SFT"])
    return save(args.output_dir, results, tables)


def figures_of(cells: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Every figure over the seeds, paired differences, and how much slower constrained decoding is."""
    kept = {
        "sampled": (*FIGURES, "greedy_exact_match", "tokens_per_second"),
        "greedy": COMPARED[:-1],
        "rows": COMPARED[:-1],
    }
    sampled = cells["sampled"]
    speeds = zip(sampled["SFT"], sampled[CONSTRAINED], strict=True)
    return {
        **{key: summary(cells[key], figures) for key, figures in kept.items()},
        "differences": [difference(sampled, *pair, COMPARED) for pair in DIFFERENCES if set(pair) <= set(sampled)],
        "transfer": [difference(cells["rows"], *pair, COMPARED[:-1]) for pair in TRANSFER],
        "slowdown": over_seeds([free["tokens_per_second"] / bound["tokens_per_second"] for free, bound in speeds]),
    }


def steps_to_reach(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """Step at which a learning curve of (step, value) first comes to a level, on straight lines between its points;
    None where it never does."""
    before, low = curve[0]
    for step, value in curve:
        if value >= level:
            return step if value == low or step == before else before + (step - before) * (level - low) / (value - low)
        before, low = step, value
    return None


def learning(
    curves: Mapping[str, Sequence[Mapping[str, Sequence[Sequence[float]]]]], starts: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Right answers over the steps by either credit, and when sequence credit's last value is reached.

    Args:
        curves: credit -> seed -> measure -> (step, value) at each checkpoint.
        starts: by seed, what the model has before the first step.

    `reach` has, of each seed, the first step at which a credit's curve comes to what sequence credit has at its end: of
    sequence credit too, whose curve may be there before by chance. `saved` is the share of all steps that field credit
    saves; a seed in which it never comes there saves nothing.
    """
    steps = curves[SEQUENCE][0]["exact_match"][-1][0]
    found: dict[str, Any] = {"learning": {}, "reach": {}, "saved": {}}
    for key in EXACT:
        targets = [curve[key][-1][1] for curve in curves[SEQUENCE]]
        for credit in CREDITS:
            by_seed = [[[0, start[key]], *run[key]] for start, run in zip(starts, curves[credit], strict=True)]
            found["learning"].setdefault(credit, {})[key] = [
                [points[0][0], over_seeds([value for _, value in points])] for points in zip(*by_seed, strict=True)
            ]
            reached = [steps_to_reach(curve, to) for curve, to in zip(by_seed, targets, strict=True)]
            found["reach"].setdefault(credit, {})[key] = reached
        found["saved"][key] = over_seeds([0.0 if step is None else 1 - step / steps for step in reached])
    return found


def rises(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """The curriculum: mean curves, the step at which half of a component's way is done, and which comes first.

    Half of the way is read from a running mean of five steps, since single ones are noisy. A seed in which one of the
    two components never rises does not count.
    """
    curves: dict[str, Any] = {}
    half: dict[str, dict[str, list[int | None]]] = {}
    for method, runs in histories.items():
        by_seed = [curriculum(run) for run in runs]
        curves[method] = {
            component: [
                [points[0][0], round(sum(value for _, value in points) / len(points), 4)]
                for points in zip(*(run[component] for run in by_seed), strict=True)
            ]
            for component in by_seed[0]
        }
        half[method] = {name: [first_step(smooth(run[name])) for run in by_seed] for name in by_seed[0]}
    order = []
    for credit in CREDITS:
        for first, then in CURRICULUM:
            both = zip(half[credit][then], half[credit][first], strict=True)
            gaps = [later - sooner for later, sooner in both if later is not None and sooner is not None]
            if gaps:
                order.append({"credit": credit, "first": first, "then": then, "steps": over_seeds(gaps)})
    return {"curves": curves, "half_way_step": half, "curriculum": order}


def smooth(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """(step, running mean over the last `window` values)."""
    parts = [points[max(0, i - window + 1) : i + 1] for i in range(len(points))]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


# ------------------------------------------------------------------------------------------------ what the page shows


SHOWN = {"validity": "valid", "structure": "structure", "content_f1": "content F1", "exact_match": "exact match"}
NAMES = SHOWN | {
    "compliance": "schema",
    "greedy_exact_match": "exact match, greedy",
    "exact_match": "exact match, sampled",
}
OWN = ("validity", "structure", "content_f1")  # figures of the paper's table
PAPER: dict[str, tuple[float, float, float]] = {  # the recipes task, per cent; its GRPO gives credit by sequence
    "SFT": (72.1, 65.4, 80.0),
    CONSTRAINED: (100.0, 99.8, 79.5),
    "DPO": (88.4, 82.5, 82.0),
    SEQUENCE: (92.1, 89.7, 84.5),
    "GRPO − validity": (68.3, 85.2, 83.0),
    "GRPO − structure": (90.5, 45.6, 85.0),
    "GRPO − format": (88.2, 87.1, 84.2),
}
PAPER_SLOWDOWN = 90.6 / 15.2  # tokens a second, free over constrained
PAPER_TRANSFER = {"base": (15.2, 25.5), "SFT": (58.2, 70.1), SEQUENCE: (85.4, 91.2)}  # structure, GSM8K-JSON and tools
GOALS = {"structure": 0.95, "exact_match": 0.22, "greedy_exact_match": 0.60}  # set before the experiment
HALF = 0.5  # of the steps
METHOD_COLOUR = "black"  # where a row's name says which method it is
CREDIT_COLOURS = {SEQUENCE: "C9", FIELD: "C6"}  # those of no component


def tables(results: dict[str, Any]) -> Tables:
    """Methods, goals, learning curve, ablation, curriculum and transfer, each with its claims."""
    arguments, validation = results["arguments"], results["validation"]
    paper = [("DPO", "SFT"), (SEQUENCE, "SFT"), (SEQUENCE, "DPO")]
    claims = [compared(results, *pair, figure) for figure in ("structure", "content_f1") for pair in paper]
    claims += [
        compared(results, CONSTRAINED, SEQUENCE, "structure"),
        compared(results, SEQUENCE, CONSTRAINED, "content_f1"),
    ]
    text = "constrained decoding is slower: tokens a second, free over constrained"
    claims.append(claim(text, f"{PAPER_SLOWDOWN:.1f} ×", results["slowdown"], "×", sign="", level=1))
    measures = ("structure", "content_f1", *EXACT)
    against = [(FIELD, SEQUENCE), (FIELD, "SFT"), (FIELD, "DPO")]
    credit_claims = [compared(results, *pair, figure) for pair in against for figure in measures]
    credit_claims += [compared(results, SEQUENCE, worse, figure) for worse in ("SFT", "DPO") for figure in EXACT]
    sizes = (
        "seeds",
        "ablation_seeds",
        "test_problems",
        "validation_problems",
        "sft_documents",
        "pairs_from",
        "steps",
        "completions",
    )
    return {
        "methods": methods(results),
        "greedy": (("", *SHOWN.values()), [[m, *per_cent(results["greedy"][m])] for m in MAIN]),
        "goals": goals(results),
        "claims": (CLAIM, claims),
        "credit_claims": (CLAIM, credit_claims),
        "literal_claims": (CLAIM, [compared(results, SEQUENCE, LITERAL, figure) for figure in measures]),
        **words(results),
        **reach_tables(results),
        **ablation(results),
        **rise_tables(results),
        **transfer(results),
        "grid": grid_table(validation, ("structure", "exact_match")),
        "credit": validation["credit"],
        "group": str(GROUP),
        "beta": str(BETA),
        "bound": f"{100 * BOUND:g}",
        "margin": f"{100 * MARGIN:g}",
        "checkpoints": str(CHECKPOINTS),
        **{name: str(arguments[name]) for name in sizes},
    }


def per_cent(entry: Mapping[str, Any], figures: Sequence[str] = tuple(SHOWN)) -> list[str]:
    return [percent(entry[figure]) for figure in figures]


def compared(results: dict[str, Any], better: str, worse: str, figure: str) -> list[str]:
    """Claim that `better` is above `worse` in a figure, with the paper's difference where it has both rows."""
    paper = "–"
    if better in PAPER and worse in PAPER and figure in OWN:
        paper = f"{PAPER[better][OWN.index(figure)] - PAPER[worse][OWN.index(figure)]:+.1f}"
    return claim(f"{NAMES[figure]}: {better} > {worse}", paper, gap(results["differences"], better, worse)[figure])


def gap(entries: Sequence[Mapping[str, Any]], better: str, worse: str) -> Mapping[str, Any]:
    return next(entry for entry in entries if (entry["better"], entry["worse"]) == (better, worse))


def methods(results: dict[str, Any]) -> Table:
    rates, rows = results["validation"]["learning_rate"], []
    for method in MAIN:
        entry = results["sampled"][method]
        paper = slashed(PAPER[method]) if method in PAPER else "–"
        rate = f"{rates[method]:g}" if method in rates else ""
        rows.append([method, paper, rate, *per_cent(entry), f"{entry['tokens_per_second']['mean']:,.0f}"])
    return ("", "paper", "learning rate", *SHOWN.values(), "tokens/s"), rows


def goals(results: dict[str, Any]) -> Table:
    """What was asked of the two credits, beside what SFT has."""
    sampled, rows = results["sampled"], []
    for credit in CREDITS:
        for figure, level in GOALS.items():
            text = f"{credit}: {NAMES[figure]} ≥ {100 * level:g} %"
            rows.append(
                claim(text, percent(sampled["SFT"][figure]), sampled[credit][figure], "%", sign="", level=level)
            )
        above = gap(results["differences"], credit, CONSTRAINED)["content_f1"]
        text = f"{credit}: content F1 above {CONSTRAINED}"
        rows.append(claim(text, percent(sampled["SFT"]["content_f1"]), above))
    for figure, name in EXACT.items():
        text = f"{FIELD}: steps saved on the way to sequence credit's last exact match, {name}, ≥ {100 * HALF:g} %"
        rows.append(claim(text, "–", results["saved"][figure], "%", sign="", level=HALF))
    return ("goal", "SFT", *CLAIM[2:]), rows


def words(results: dict[str, Any]) -> Tables:
    """Sentences of the page that turn with the verdicts."""
    found: Tables = {}
    pairs = {"sequence_sft": (SEQUENCE, "SFT"), "field_sft": (FIELD, "SFT"), "field_sequence": (FIELD, SEQUENCE)}
    for name, pair in pairs.items():
        for figure, temperature in EXACT.items():
            found[f"{name}_{temperature}"] = in_words(*pair, gap(results["differences"], *pair)[figure])
    verdicts = [row[-1].strip("*") for row in goals(results)[1]]
    found["goals_met"], found["goals_asked"] = str(verdicts.count(HOLDS)), str(len(verdicts))
    return found


def reach_tables(results: dict[str, Any]) -> Tables:
    """Steps to sequence credit's last exact match by either credit, seed by seed."""
    seeds, steps = results["arguments"]["seeds"], results["arguments"]["steps"]
    rows = []
    for figure, name in EXACT.items():
        for credit in CREDITS:
            reached = results["reach"][credit][figure]
            mean = number(over_seeds([steps if step is None else step for step in reached]), 0, within=(0, steps))
            rows.append([name, credit, *("never" if step is None else f"{step:.0f}" for step in reached), mean])
    return {"reach": (("exact match", "", *(f"seed {seed}" for seed in range(seeds)), "mean"), rows)}


def ablation(results: dict[str, Any]) -> Tables:
    """GRPO by the better credit with one component left out, claimed to lower the figure that the component stands for;
    and with the settings of the page before, claimed to lower the right answers."""
    shown, sampled = ("validity", "structure", "compliance", "content_f1", *EXACT), results["sampled"]
    credit = results["validation"]["credit"]
    there = {m: figure for m, figure in zip(LEFT_OUT, ABLATED.values(), strict=True) if m in sampled}
    named = [credit, *(m for m in ABLATIONS if m in sampled)]
    rows = [[m, slashed(PAPER[m]) if m in PAPER else "–", *per_cent(sampled[m], shown)] for m in named]
    losses = {m: gap(results["differences"], credit, m)[figure]["mean"] for m, figure in there.items()}
    dearest = max(losses, key=lambda method: losses[method], default=None)
    claims = [compared_to_paper(results, credit, method, figure) for method, figure in there.items()]
    if EARLIER in sampled:
        claims += [compared(results, credit, EARLIER, figure) for figure in EXACT]
    return {
        "ablation": (("", "paper", *(NAMES[figure] for figure in shown)), rows if claims else []),
        "ablation_claims": (CLAIM, claims),
        "dearest": "" if dearest is None else f"{100 * losses[dearest]:.1f} points ({dearest})",
    }


def compared_to_paper(results: dict[str, Any], credit: str, method: str, figure: str) -> list[str]:
    """`compared`, where the paper's own difference is to its GRPO, whichever credit is the better one here."""
    row = compared(results, credit, method, figure)
    if method in PAPER and figure in OWN:
        row[1] = f"{PAPER[SEQUENCE][OWN.index(figure)] - PAPER[method][OWN.index(figure)]:+.1f}"
    return row


def rise_tables(results: dict[str, Any]) -> Tables:
    rows = [
        [credit, component, *("–" if step is None else str(step) for step in half[component])]
        for credit, half in ((credit, results["half_way_step"][credit]) for credit in CREDITS)
        for component in COMPONENTS
        if component in half
    ]
    order = [
        claim(
            f"{e['credit']}: {e['first']} before {e['then']}",
            "yes" if e["credit"] == SEQUENCE else "–",
            e["steps"],
            "steps",
        )
        for e in results["curriculum"]
    ]
    seeds = (f"seed {seed}" for seed in range(results["arguments"]["seeds"]))
    return {"curriculum": (("", "component", *seeds), rows), "curriculum_claims": (CLAIM, order)}


def transfer(results: dict[str, Any]) -> Tables:
    rows = [
        [method, slashed(PAPER_TRANSFER[method]) if method in PAPER_TRANSFER else "–", *per_cent(entry)]
        for method, entry in results["rows"].items()
    ]
    claims = []
    for figure in ("structure", "content_f1"):
        for better, worse in (("SFT", "base"), *((credit, worse) for credit in CREDITS for worse in ("SFT", "base"))):
            in_paper = figure == "structure" and better in PAPER_TRANSFER
            paper = gaps(PAPER_TRANSFER[better], PAPER_TRANSFER[worse]) if in_paper else "–"
            entry = gap(results["transfer"], better, worse)[figure]
            claims.append(claim(f"{NAMES[figure]}: {better} > {worse}", paper, entry))
    for figure, better, worse in (
        ("structure", SEQUENCE, LITERAL),
        ("exact_match", FIELD, "SFT"),
        ("exact_match", FIELD, SEQUENCE),
    ):
        entry = gap(results["transfer"], better, worse)[figure]
        claims.append(claim(f"{NAMES[figure]}: {better} > {worse}", "–", entry))
    return {"transfer": (("", "paper", *SHOWN.values()), rows), "transfer_claims": (CLAIM, claims)}


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Pictures in which a colour is either a component of the reward or a credit; methods are named by their rows."""
    seeds, curves = results["arguments"]["seeds"], results["curves"]
    by_method = Figure(figsize=(14, 4), layout="constrained")
    shown = ("structure", "content_f1", *EXACT)
    for axis, key in zip(by_method.subplots(1, len(shown), sharey=True), shown, strict=True):
        error_bars(axis, {m: results["sampled"][m][key] for m in MAIN}, colour=METHOD_COLOUR)
        axis.set(title=NAMES[key], xlabel=f"per cent, {seeds} seeds")

    by_checkpoint = Figure(figsize=(10, 4), layout="constrained")
    for axis, (key, name) in zip(by_checkpoint.subplots(1, len(EXACT)), EXACT.items(), strict=True):
        for credit, points in results["learning"].items():
            steps, entries = zip(*points[key], strict=True)
            means = [entry["mean"] for entry in entries]
            ends = [(e["mean"], e["mean"]) if e["ci95"][0] is None else interval(e, SHARE) for e in entries]
            colour = CREDIT_COLOURS[credit]
            axis.plot(steps, [100 * mean for mean in means], "o-", color=colour, label=credit)
            axis.fill_between(
                steps, *([100 * end for end in side] for side in zip(*ends, strict=True)), color=colour, alpha=0.15
            )
        last = results["learning"][SEQUENCE][key][-1]
        axis.axhline(100 * last[1]["mean"], color="grey", linestyle=":", label="sequence credit at its end")
        axis.axvline(HALF * last[0], color="grey", linestyle="--", label="half of the steps")
        axis.set(title=f"exact match, {name}, mean of {seeds} seeds", xlabel="step", ylabel="per cent")
        axis.grid(alpha=0.3)
    by_checkpoint.axes[0].legend(fontsize=8)

    by_step = Figure(figsize=(13, 4), layout="constrained")
    for axis, (method, components) in zip(by_step.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for component in (name for name in COMPONENTS if name in components):
            at, values = zip(*components[component], strict=True)
            style = "--" if component in DASHED else "-"
            axis.plot(at, values, style, color=COLOURS[component], label=component)
        axis.set(title=f"{method}, mean of {seeds} seeds", xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    by_step.axes[0].set_ylabel("mean of the component")
    by_step.axes[0].legend()

    by_schema = Figure(figsize=(10, 3.5), layout="constrained")
    panels = (("sampled", "json, trained on"), ("rows", "rows, not trained on"))
    for axis, (key, name) in zip(by_schema.subplots(1, 2, sharey=True), panels, strict=True):
        error_bars(axis, {m: results[key][m]["structure"] for m in results["rows"]}, colour=METHOD_COLOUR)
        axis.set(title=f"structure, rendering {name}", xlabel="per cent")
    return {
        "structured_grpo_methods.png": by_method,
        "structured_grpo_learning.png": by_checkpoint,
        "structured_grpo_curriculum.png": by_step,
        "structured_grpo_transfer.png": by_schema,
    }


if __name__ == "__main__":
    main(*TrlParser((StructuredLedgerArguments,)).parse_args_and_config())
