r"""Structured GRPO in the ledger world: the tables, ablation, curriculum and transfer of arXiv 2512.00319, by seed.

    python -m benchmarks.experiments.structured_ledger --output_dir runs/benchmarks/structured_ledger

A base that has read sloppy JSON in two renderings (half of its documents have a fault of structure) → SFT on a few
clean documents → from there DPO (best against worst of eight samples by the reward), GRPO with our reward, with the
paper's literal one, and with each component of ours left out; and the SFT model under constrained decoding. All of them
see the rendering `json` only; the rendering `rows`, the same content under another schema, shows what carries over.

A seed has its own training problems, SFT documents, pairs, rollouts and test problems, which all its methods share.
SFT, DPO and both GRPOs get the same grid of learning rates, each its best by structure × content F1 (a measure that is
no method's own reward) on validation problems (seed 1000, with training problems of its own); the ablations take GRPO's
rate. Test problems are read once. A killed run goes on with the model that it was at. Writes results.json;
docs/results/structured_grpo.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import AutoTokenizer
from trl import TrlParser

from benchmarks.experiments.common import GRID, GRID_SEED, difference, grid_table, summary
from benchmarks.ledger_stages import LedgerStages
from benchmarks.render import CLAIM, Table, Tables, claim, error_bars, gaps, percent, read_json, save, slashed
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import render_prompt
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.reward import WEIGHTS
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.seeds import problem_seed
from tokalign.statistics import over_seeds
from tokalign.view.curriculum import COLOURS, COMPONENTS, DASHED, curriculum, first_step

WORLD = {"min_events": 2, "max_events": 3, "max_start": 20, "max_change": 10, "max_number": 40}
BASE_SEED = 2000  # of the base's documents
DOCUMENT_SEEDS = 500  # added to a seed, for its SFT documents
MAX_TOKENS = 110
LITERAL = "GRPO, literal reward"
CONSTRAINED = "SFT, constrained decoding"
ABLATED = {  # component left out -> the figure that it stands for
    "validity": "validity",
    "structure": "structure",
    "format": "validity",
    "schema": "compliance",
    "correctness": "content_f1",
}


def without(component: str) -> dict[str, str]:
    """Options of a GRPO whose reward has all components but one."""
    weights = {name: weight for name, weight in WEIGHTS.items() if name not in (component, "length")}
    return {"component_weights": json.dumps(weights)}


GRPO: dict[str, dict[str, str]] = {
    "GRPO": {},
    LITERAL: {"reward_preset": "rl-struct"},
    **{f"GRPO − {component}": without(component) for component in ABLATED},
}
TUNED = ("SFT", "DPO", "GRPO", LITERAL)
MAIN = ("base", "SFT", CONSTRAINED, "DPO", "GRPO", LITERAL)
ABLATIONS = tuple(f"GRPO − {component}" for component in ABLATED)
FIGURES = ("validity", "structure", "compliance", "content_f1", "exact_match", "invented_keys", "total")
COMPARED = ("validity", "structure", "compliance", "content_f1", "exact_match")
DIFFERENCES = (  # better, worse: on the rendering that was trained
    ("DPO", "SFT"),
    ("GRPO", "SFT"),
    ("GRPO", "DPO"),
    (CONSTRAINED, "GRPO"),
    ("GRPO", CONSTRAINED),
    ("GRPO", LITERAL),
    *(("GRPO", ablation) for ablation in ABLATIONS),
)
TRANSFER = (("SFT", "base"), ("DPO", "SFT"), ("GRPO", "SFT"), ("GRPO", "base"), ("GRPO", LITERAL))
CURRICULUM = (("validity", "structure"), ("structure", "correctness"))  # the first rises before the second


@dataclass
class StructuredLedgerArguments:
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/structured_ledger"
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    ablation_seeds: int = field(default=3, metadata={"help": "How many of them train with a component left out."})
    base_documents: int = field(default=35200, metadata={"help": "Documents that the base is trained on, once."})
    sloppy_share: float = field(default=0.5, metadata={"help": "Share of them with a fault of structure."})
    problems: int = field(default=1000, metadata={"help": "Training problems a seed, for GRPO and DPO."})
    sft_documents: int = field(default=100, metadata={"help": "Clean documents of the SFT a seed."})
    pairs_from: int = field(default=400, metadata={"help": "Problems of which DPO's pairs are sampled."})
    steps: int = field(default=30, metadata={"help": "Steps of GRPO."})
    completions: int = field(default=96, metadata={"help": "Completions a step of GRPO, in groups of eight."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], metadata=GRID)
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=400, metadata={"help": "Test problems a seed."})


class StructuredSeed:
    """Problems, trained models and evaluations of one seed; whatever is there is kept.

    Args:
        rates: method -> learning rate, of the methods that others start from.
        split: of the held-out problems.
    """

    def __init__(
        self, args: StructuredLedgerArguments, base: Path, rates: Mapping[str, float], *, seed: int, split: str
    ):
        self.args, self.base, self.rates, self.seed, self.split = args, base, rates, seed, split
        self.stages = LedgerStages(Path(args.output_dir) / f"seed-{seed}")
        self.out = self.stages.folder
        self.worlds = {rendering: self.out / rendering for rendering in ("json", "rows")}
        held_out = {"validation": args.validation_problems, "test": args.test_problems}[split]
        for rendering, folder in self.worlds.items():  # one seed: the same problems, asked for in two ways
            sizes = {"train": args.problems, split: held_out}
            self.stages.problems(folder, seed=seed, problem_rendering=rendering, **sizes, **WORLD)
        documents = {"problem_rendering": "json", "train": args.sft_documents, **WORLD}
        self.documents = self.stages.problems(self.out / "documents", seed=seed + DOCUMENT_SEEDS, **documents)

    def train(self, method: str, rate: float) -> tuple[Path, Path | None]:
        """Model and adapter of a method at a learning rate, trained now if they are not there."""
        folder = f"models/{method} {rate:g}".replace(",", "")
        shared = {"learning_rate": rate, "seed": self.seed}
        if method == "SFT":
            start = {"model_name_or_path": self.base, "dataset_name": self.documents}
            options = {"use_peft": "false", "num_train_epochs": 1}
            return self.stages.recipe(folder, "sft", "sft", **start, **shared, **options), None
        sft, _ = self.train("SFT", self.rates["SFT"])
        if method == "DPO":
            start = {"model_name_or_path": sft, "dataset_name": self.pairs(sft)}
            return sft, self.stages.recipe(folder, "critical-dpo", "dpo", **start, **shared)
        start = {"model_name_or_path": sft, "dataset_name": self.worlds["json"]}
        # an engine of vLLM takes longer to start than all rollouts of so small a model take here
        options = {"rollouts": "transformers", "max_steps": self.args.steps, "beta": 0.0, **GRPO[method]}
        options["per_device_train_batch_size"] = self.args.completions
        return sft, self.stages.recipe(folder, "structured-grpo", "structured_grpo", **start, **shared, **options)

    def pairs(self, model: Path) -> Path:
        """Best and worst of eight samples of each problem by our reward; problems where all are worth the same drop."""
        reward = StructuredReward()
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = load_stage(self.worlds["json"], split="train").select(range(self.args.pairs_from))
        engines: list[Any] = []

        def work(batch: list[dict[str, Any]]) -> list[Any]:
            if not engines:
                engines.append(load_engine(EngineArguments(model=str(model))))
            prompts = [render_prompt(row["prompt"], tokenizer) for row in batch]
            each = [
                SamplingParams(n=8, max_tokens=MAX_TOKENS, seed=problem_seed(self.seed, r["id"], "evaluation"))
                for r in batch
            ]
            made: list[Any] = []
            for row, ids, completions in zip(batch, prompts, engines[0].generate(prompts, each), strict=True):
                texts = [str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in completions]
                scored = [reward.score(text, row["answer"], row["schema"])["total"] for text in texts]
                best, worst = scored.index(max(scored)), scored.index(min(scored))
                if scored[best] == scored[worst]:
                    made.append(Dropped("all samples are worth the same"))
                    continue
                sides = {"chosen": best, "rejected": worst}
                made.append(
                    {"id": row["id"], "prompt": row["prompt"], "prompt_ids": ids}
                    | {side: [{"role": "assistant", "content": texts[i]}] for side, i in sides.items()}
                    | {f"{side}_ids": completions[i].token_ids for side, i in sides.items()}
                )
            return made

        output, parameters = self.out / "pairs", {"seed": self.seed, "model": weights_hash(model)}
        run_job(work, rows, output, name="pairs by reward", parameters=parameters, tokenizer=tokenizer)
        return output

    def figures(
        self, method: str, rate: float | None, rendering: str = "json", temperature: float = 1.0
    ) -> dict[str, float]:
        """Figures of a method on the held-out problems; `rate` None is the base."""
        constrained = method == CONSTRAINED
        model, adapter = (self.base, None) if rate is None else self.train("SFT" if constrained else method, rate)
        name = f"{method} {rate or 0:g} {rendering} T={temperature:g}".replace(" ", "_").replace(",", "")
        max_tokens = 2 * MAX_TOKENS if constrained else MAX_TOKENS
        settings = {"constrained": constrained, "temperature": temperature, "seed": self.seed, "split": self.split}
        metrics = self.stages.structured_evaluation(
            name, model, adapter, self.worlds[rendering], max_tokens=max_tokens, **settings
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


def train_base(args: StructuredLedgerArguments) -> Path:
    """The model that has read sloppy documents of both renderings."""
    stages = LedgerStages(Path(args.output_dir))
    documents = {"sft": args.base_documents, "renderings": ("json", "rows"), "sloppy_share": args.sloppy_share}
    world = stages.problems(stages.folder / "world", seed=BASE_SEED, problem_rendering="json", **documents, **WORLD)
    start = {"model_name_or_path": world / "ledger-slm", "dataset_name": world / "sft"}
    return stages.recipe("base", "sft", "base_slm", **start, max_steps=args.base_documents // 32, seed=0)


def choose_rates(args: StructuredLedgerArguments, base: Path) -> dict[str, Any]:
    """The grid on validation problems, and the rate of every tuned method: best by structure × content F1."""
    rates: dict[str, float] = {}
    run = StructuredSeed(args, base, rates, seed=GRID_SEED, split="validation")
    grid = {}
    for method in TUNED:
        cells = {rate: run.figures(method, rate) for rate in args.learning_rates}
        rates[method] = max(cells, key=lambda rate: cells[rate]["structure"] * cells[rate]["content_f1"])
        grid[method] = {f"{rate:g}": {key: cell[key] for key in COMPARED} for rate, cell in cells.items()}
    edges = (args.learning_rates[0], args.learning_rates[-1])
    return {"grid": grid, "learning_rate": rates, "at_edge": [m for m, rate in rates.items() if rate in edges]}


def rate_of(method: str, rates: Mapping[str, float]) -> float | None:
    """A method's own rate; the ablations have GRPO's, constrained decoding is of the SFT model."""
    if method == "base":
        return None
    return rates[method] if method in rates else rates["SFT" if method == CONSTRAINED else "GRPO"]


def main(args: StructuredLedgerArguments) -> dict[str, Any]:
    base = train_base(args)
    validation = choose_rates(args, base)
    rates = validation["learning_rate"]
    cells: dict[str, dict[str, list[dict[str, float]]]] = {"sampled": {}, "greedy": {}, "rows": {}}
    histories: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in range(args.seeds):
        run = StructuredSeed(args, base, rates, seed=seed, split="test")
        for method in (*MAIN, *ABLATIONS) if seed < args.ablation_seeds else MAIN:
            rate = rate_of(method, rates)
            cells["sampled"].setdefault(method, []).append(run.figures(method, rate))
            if method in MAIN:
                cells["greedy"].setdefault(method, []).append(run.figures(method, rate, temperature=0.0))
            if method in MAIN and method != CONSTRAINED:
                cells["rows"].setdefault(method, []).append(run.figures(method, rate, rendering="rows"))
            if method in GRPO:
                histories.setdefault(method, []).append(run.history(method, rate or 0.0))
    results = {"arguments": asdict(args), "validation": validation, **figures_of(cells), **rises(histories)}
    return save(args.output_dir, results, tables)


def figures_of(cells: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Every figure over the seeds, paired differences, and how much slower constrained decoding is."""
    kept = {"sampled": (*FIGURES, "tokens_per_second"), "greedy": COMPARED, "rows": COMPARED}
    sampled = cells["sampled"]
    speeds = zip(sampled["SFT"], sampled[CONSTRAINED], strict=True)
    return {
        **{key: summary(by_method, kept[key]) for key, by_method in cells.items()},
        "differences": [difference(sampled, *pair, COMPARED) for pair in DIFFERENCES if set(pair) <= set(sampled)],
        "transfer": [difference(cells["rows"], *pair, COMPARED) for pair in TRANSFER],
        "slowdown": over_seeds([free["tokens_per_second"] / bound["tokens_per_second"] for free, bound in speeds]),
    }


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
    for first, then in CURRICULUM:
        both = zip(half["GRPO"][then], half["GRPO"][first], strict=True)
        gaps = [later - sooner for later, sooner in both if later is not None and sooner is not None]
        if gaps:
            order.append({"first": first, "then": then, "steps": over_seeds(gaps)})
    return {"curves": {m: curves[m] for m in ("GRPO", LITERAL)}, "half_way_step": half, "curriculum": order}


def smooth(points: Sequence[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """(step, running mean over the last `window` values)."""
    parts = [points[max(0, i - window + 1) : i + 1] for i in range(len(points))]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


# ------------------------------------------------------------------------------------------------ what the page shows


SHOWN = {"validity": "valid", "structure": "structure", "content_f1": "content F1", "exact_match": "exact match"}
NAMES = SHOWN | {"compliance": "schema"}
OWN = ("validity", "structure", "content_f1")  # figures of the paper's table
PAPER: dict[str, tuple[float, float, float]] = {  # the recipes task, per cent
    "SFT": (72.1, 65.4, 80.0),
    CONSTRAINED: (100.0, 99.8, 79.5),
    "DPO": (88.4, 82.5, 82.0),
    "GRPO": (92.1, 89.7, 84.5),
    "GRPO − validity": (68.3, 85.2, 83.0),
    "GRPO − structure": (90.5, 45.6, 85.0),
    "GRPO − format": (88.2, 87.1, 84.2),
}
PAPER_SLOWDOWN = 90.6 / 15.2  # tokens a second, free over constrained
PAPER_TRANSFER = {"base": (15.2, 25.5), "SFT": (58.2, 70.1), "GRPO": (85.4, 91.2)}  # structure, GSM8K-JSON and tools
ORDER = (("DPO", "SFT"), ("GRPO", "SFT"), ("GRPO", "DPO"))


def tables(results: dict[str, Any]) -> Tables:
    """Methods, ablation, curriculum and transfer, each with its claims."""
    arguments = results["arguments"]
    claims = [compared(results, *pair, figure) for figure in ("structure", "content_f1") for pair in ORDER]
    claims += [
        compared(results, CONSTRAINED, "GRPO", "structure"),
        compared(results, "GRPO", CONSTRAINED, "content_f1"),
    ]
    text = "constrained decoding is slower: tokens a second, free over constrained"
    claims.append(claim(text, f"{PAPER_SLOWDOWN:.1f} ×", results["slowdown"], "×", sign="", level=1))
    literal = [compared(results, "GRPO", LITERAL, figure) for figure in ("structure", "content_f1")]
    greedy = [[method, *per_cent(entry)] for method, entry in results["greedy"].items()]
    sizes = ("seeds", "ablation_seeds", "test_problems", "sft_documents", "pairs_from", "steps", "completions")
    return {
        "methods": methods(results),
        "claims": (CLAIM, claims),
        "literal_claims": (CLAIM, literal),
        "greedy": (("", *SHOWN.values()), greedy),
        **ablation(results),
        **rise_tables(results),
        **transfer(results),
        "grid": grid_table(results["validation"], lambda cell: cell["structure"] * cell["content_f1"]),
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
    for method, entry in results["sampled"].items():
        if method not in ABLATIONS:
            paper = slashed(PAPER[method]) if method in PAPER else "–"
            rate = f"{rates[method]:g}" if method in rates else ""
            rows.append([method, paper, rate, *per_cent(entry), f"{entry['tokens_per_second']['mean']:,.0f}"])
    return ("", "paper", "learning rate", *SHOWN.values(), "tokens/s"), rows


def ablation(results: dict[str, Any]) -> Tables:
    """GRPO with one component left out; each is claimed to lower the figure that the component stands for."""
    shown, sampled = ("validity", "structure", "compliance", "content_f1"), results["sampled"]
    there = {m: figure for m, figure in zip(ABLATIONS, ABLATED.values(), strict=True) if m in sampled}
    rows = [
        [method, slashed(PAPER[method]) if method in PAPER else "–", *per_cent(sampled[method], shown)]
        for method in ("GRPO", *there)
    ]
    losses = {m: gap(results["differences"], "GRPO", m)[figure]["mean"] for m, figure in there.items()}
    dearest = max(losses, key=lambda method: losses[method], default=None)
    return {
        "ablation": (("", "paper", *(NAMES[figure] for figure in shown)), rows if there else []),
        "ablation_claims": (CLAIM, [compared(results, "GRPO", method, figure) for method, figure in there.items()]),
        "dearest": "" if dearest is None else f"{100 * losses[dearest]:.1f} points ({dearest})",
    }


def rise_tables(results: dict[str, Any]) -> Tables:
    half = results["half_way_step"]["GRPO"]
    rows = [
        [component, *("–" if step is None else str(step) for step in half[component])]
        for component in COMPONENTS
        if component in half
    ]
    order = [claim(f"{e['first']} before {e['then']}", "yes", e["steps"], "steps") for e in results["curriculum"]]
    seeds = (f"seed {seed}" for seed in range(results["arguments"]["seeds"]))
    return {"curriculum": (("GRPO", *seeds), rows), "curriculum_claims": (CLAIM, order)}


def transfer(results: dict[str, Any]) -> Tables:
    rows = [
        [method, slashed(PAPER_TRANSFER[method]) if method in PAPER_TRANSFER else "–", *per_cent(entry)]
        for method, entry in results["rows"].items()
    ]
    claims = []
    for figure in ("structure", "content_f1"):
        for better, worse in (("SFT", "base"), ("GRPO", "SFT"), ("GRPO", "base")):
            paper = gaps(PAPER_TRANSFER[better], PAPER_TRANSFER[worse]) if figure == "structure" else "–"
            entry = gap(results["transfer"], better, worse)[figure]
            claims.append(claim(f"{NAMES[figure]}: {better} > {worse}", paper, entry))
    literal = gap(results["transfer"], "GRPO", LITERAL)["structure"]
    claims.append(claim(f"structure: GRPO > {LITERAL}", "–", literal))
    return {"transfer": (("", "paper", *SHOWN.values()), rows), "transfer_claims": (CLAIM, claims)}


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    seeds, curves = results["arguments"]["seeds"], results["curves"]
    by_method = Figure(figsize=(14, 4.5), layout="constrained")
    for axis, (key, name) in zip(by_method.subplots(1, len(SHOWN), sharey=True), SHOWN.items(), strict=True):
        error_bars(axis, {m: entry[key] for m, entry in results["sampled"].items()})
        axis.set(title=f"{name}, {seeds} seeds", xlabel="per cent")

    by_step = Figure(figsize=(10, 4), layout="constrained")
    for axis, (method, components) in zip(by_step.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for component in (name for name in COMPONENTS if name in components):
            steps, means = zip(*components[component], strict=True)
            style = "--" if component in DASHED else "-"
            axis.plot(steps, means, style, color=COLOURS[component], label=component)
        axis.set(title=f"{method}, mean of {seeds} seeds", xlabel="step", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    by_step.axes[0].set_ylabel("mean of the component")
    by_step.axes[0].legend()

    by_schema = Figure(figsize=(10, 3.5), layout="constrained")
    panels = (("sampled", "json, trained on"), ("rows", "rows, not trained on"))
    for axis, (key, name) in zip(by_schema.subplots(1, 2, sharey=True), panels, strict=True):
        error_bars(axis, {m: results[key][m]["structure"] for m in results["rows"]})
        axis.set(title=f"structure, rendering {name}", xlabel="per cent")
    return {
        "structured_grpo_methods.png": by_method,
        "structured_grpo_curriculum.png": by_step,
        "structured_grpo_transfer.png": by_schema,
    }


if __name__ == "__main__":
    main(*TrlParser((StructuredLedgerArguments,)).parse_args_and_config())
