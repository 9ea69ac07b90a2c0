r"""Structured GRPO in the ledger world: the tables, ablation, curriculum and transfer of arXiv 2512.00319, by seed.

    python benchmarks/structured_ledger.py --output_dir runs/benchmarks/structured_ledger

A base that has read sloppy JSON in two renderings (half of its documents have a fault of structure) → SFT on a few
clean documents → from there DPO (best against worst of eight samples by the reward), GRPO with our reward, with the
paper's literal one, and with each component of ours left out; and the SFT model under constrained decoding. All of them
see the rendering `json` only; the rendering `rows`, the same content under another schema, shows what carries over.

A seed has its own training problems, SFT documents, pairs, rollouts and test problems, which all its methods share.
SFT, DPO and both GRPOs get the same grid of learning rates, each its best by structure × content F1 (a measure that is
no method's own reward) on validation problems (seed 1000, with training problems of its own); the ablations take GRPO's
rate. Test problems are read once. A killed run goes on with the model that it was at. Writes results.json;
pages/structured_grpo.py makes the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ledger_stages import LEDGER, over_seeds, paired, stages_in, write_json
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import TrlParser

from tokalign.cli.evaluate_structured import EvaluateStructuredArguments, OptionalEngineArguments
from tokalign.cli.evaluate_structured import main as evaluate
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import render_prompt
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.reward import WEIGHTS
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.seeds import problem_seed
from tokalign.view.curriculum import curriculum, first_step

WORLD = "--min_events 2 --max_events 3 --max_start 20 --max_change 10 --max_number 40".split()
GRID_SEED = 1000
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
GRPO: dict[str, tuple[str, ...]] = {
    "GRPO": (),
    LITERAL: ("--reward_preset", "rl-struct"),
    **{
        f"GRPO − {left_out}": (
            "--component_weights",
            json.dumps({name: weight for name, weight in WEIGHTS.items() if name not in (left_out, "length")}),
        )
        for left_out in ABLATED
    },
}
TUNED = ("SFT", "DPO", "GRPO", LITERAL)
MAIN = ("base", "SFT", CONSTRAINED, "DPO", "GRPO", LITERAL)
ABLATIONS = tuple(f"GRPO − {left_out}" for left_out in ABLATED)
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

    output_dir: str = field(default="runs/benchmarks/structured_ledger", metadata={"help": "Folder of all results."})
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    ablation_seeds: int = field(default=3, metadata={"help": "How many of them train with a component left out."})
    base_documents: int = field(default=35200, metadata={"help": "Documents that the base is trained on, once."})
    sloppy_share: float = field(default=0.5, metadata={"help": "Share of them with a fault of structure."})
    problems: int = field(default=1000, metadata={"help": "Training problems a seed, for GRPO and DPO."})
    sft_documents: int = field(default=100, metadata={"help": "Clean documents of the SFT a seed."})
    pairs_from: int = field(default=400, metadata={"help": "Problems of which DPO's pairs are sampled."})
    steps: int = field(default=30, metadata={"help": "Steps of GRPO."})
    completions: int = field(default=96, metadata={"help": "Completions a step of GRPO, in groups of eight."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "The grid, the same for every method."},
    )
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=400, metadata={"help": "Test problems a seed."})


class SeedRun:
    """Problems, trained models and evaluations of one seed; whatever is there is kept.

    Args:
        rates: method -> learning rate, of the methods that others start from.
        split: of the held-out problems.
    """

    def __init__(
        self, args: StructuredLedgerArguments, base: Path, rates: Mapping[str, float], *, seed: int, split: str
    ):
        self.args, self.base, self.rates, self.seed, self.split = args, base, rates, seed, split
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.stages = stages_in(self.out)
        self.worlds = {rendering: self.out / rendering for rendering in ("json", "rows")}
        held_out = {"validation": args.validation_problems, "test": args.test_problems}[split]
        for rendering, folder in self.worlds.items():  # one seed: the same problems, asked for in two ways
            sizes = {"train": args.problems, "validation": 1, "test": 1, "sft": 1} | {split: held_out}
            build_world(self.stages, f"problems, {rendering}", folder, seed, rendering, sizes)
        sizes = {"train": args.sft_documents, "validation": 1, "test": 1, "sft": 1}
        build_world(self.stages, "documents", self.out / "documents", seed + DOCUMENT_SEEDS, "json", sizes)

    def train(self, method: str, rate: float) -> tuple[Path, Path | None]:
        """Model and adapter of a method at a learning rate, trained now if they are not there."""
        name = f"{method} {rate:g}"
        output = self.out / "models" / name.replace(" ", "_").replace(",", "")
        shared: tuple[Any, ...] = ("--learning_rate", rate, "--seed", self.seed)
        if method == "SFT":
            self.stages.train(
                *(name, "recipes/sft.py", output, "--config", f"{LEDGER}/sft.yaml", "--use_peft", "false"),
                *("--model_name_or_path", self.base, "--dataset_name", self.out / "documents", *shared),
                *("--num_train_epochs", 1),
            )
            return output, None
        sft, _ = self.train("SFT", self.rates["SFT"])
        if method == "DPO":
            self.stages.train(
                *(name, "recipes/critical_dpo.py", output, "--config", f"{LEDGER}/dpo.yaml"),
                *("--model_name_or_path", sft, "--dataset_name", self.pairs(sft), *shared),
            )
        else:
            self.stages.train(
                *(name, "recipes/structured_grpo.py", output, "--config", f"{LEDGER}/structured_grpo.yaml"),
                *("--model_name_or_path", sft, "--dataset_name", self.worlds["json"], *shared, *GRPO[method]),
                # an engine of vLLM takes longer to start than all rollouts of so small a model take here
                *("--rollouts", "transformers", "--max_steps", self.args.steps),
                *("--per_device_train_batch_size", self.args.completions),
            )
        return sft, output

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
            seeds = [problem_seed(self.seed, row["id"], "evaluation") for row in batch]
            each = [SamplingParams(n=8, max_tokens=MAX_TOKENS, seed=seed) for seed in seeds]
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
        metrics = evaluate(
            EvaluateStructuredArguments(
                output_dir=str(self.out / "evaluation" / name),
                problems=str(self.worlds[rendering]),
                split=self.split,
                constrained=constrained,
                temperature=temperature,
                seed=self.seed,
                max_tokens=2 * MAX_TOKENS if constrained else MAX_TOKENS,
            ),
            OptionalEngineArguments(model=str(model), adapter=adapter and str(adapter)),
        )
        figures = {key: metrics["figures"][key] for key in FIGURES}
        # no document at all: nothing is invented
        found = {key: 0.0 if figure is None else figure["value"] for key, figure in figures.items()}
        return found | {"tokens_per_second": metrics["latency"]["tokens_per_second"]}

    def history(self, method: str, rate: float) -> list[dict[str, Any]]:
        """Components of the reward over the steps of a GRPO run, as its trainer logged them."""
        adapter = self.train(method, rate)[1]
        assert adapter is not None
        entries = json.loads((adapter / "log_history.json").read_text())
        return [entry for entry in entries if any(key.startswith("structured/") for key in entry)]


def build_world(stages: Any, name: str, folder: Path, seed: int, rendering: str, sizes: Mapping[str, int], *more: Any):
    """Problems of the benchmark's difficulty that ask for `rendering`; split -> number in `sizes`."""
    counts = (part for split, count in sizes.items() for part in (f"--{split}", count))
    ask = ("--problem_rendering", rendering, "--seed", seed)
    stages.run(name, "data/ledger.py", "--output_dir", folder, *ask, *WORLD, *counts, *more)


def train_base(args: StructuredLedgerArguments) -> Path:
    """The model that has read sloppy documents of both renderings."""
    out = Path(args.output_dir)
    stages = stages_in(out)
    sizes = {"train": 1, "validation": 1, "test": 1, "sft": args.base_documents}
    more = ("--renderings", "json", "rows", "--sloppy_share", args.sloppy_share)
    build_world(stages, "documents of the base", out / "world", BASE_SEED, "json", sizes, *more)
    stages.train(
        *("base", "recipes/sft.py", out / "base", "--config", f"{LEDGER}/base_slm.yaml"),
        *("--model_name_or_path", out / "world" / "ledger-slm", "--dataset_name", out / "world" / "sft"),
        *("--max_steps", args.base_documents // 32, "--seed", 0),
    )
    return out / "base"


def choose_rates(args: StructuredLedgerArguments, base: Path) -> dict[str, Any]:
    """The grid on validation problems, and the rate of every tuned method: best by structure × content F1."""
    rates: dict[str, float] = {}
    run = SeedRun(args, base, rates, seed=GRID_SEED, split="validation")
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
        run = SeedRun(args, base, rates, seed=seed, split="test")
        for method in (*MAIN, *ABLATIONS) if seed < args.ablation_seeds else MAIN:
            rate = rate_of(method, rates)
            cells["sampled"].setdefault(method, []).append(run.figures(method, rate))
            if method in MAIN:
                cells["greedy"].setdefault(method, []).append(run.figures(method, rate, temperature=0.0))
            if method in MAIN and method != CONSTRAINED:
                cells["rows"].setdefault(method, []).append(run.figures(method, rate, rendering="rows"))
            if method in GRPO:
                histories.setdefault(method, []).append(run.history(method, rate or 0.0))
    results = {"arguments": asdict(args), "validation": validation, **tables(cells), **rises(histories)}
    write_json(Path(args.output_dir) / "results.json", results)
    show(results)
    return results


def tables(cells: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Every figure over the seeds, paired differences, and how much slower constrained decoding is."""
    kept = {"sampled": (*FIGURES, "tokens_per_second"), "greedy": COMPARED, "rows": COMPARED}
    sampled = cells["sampled"]
    speeds = zip(sampled["SFT"], sampled[CONSTRAINED], strict=True)
    return {
        **{
            key: {m: {f: over_seeds([run[f] for run in runs]) for f in kept[key]} for m, runs in by_method.items()}
            for key, by_method in cells.items()
        },
        "differences": [difference(sampled, *pair) for pair in DIFFERENCES if set(pair) <= set(sampled)],
        "transfer": [difference(cells["rows"], *pair) for pair in TRANSFER],
        "slowdown": over_seeds([free["tokens_per_second"] / bound["tokens_per_second"] for free, bound in speeds]),
    }


def difference(by_method: Mapping[str, Sequence[Mapping[str, float]]], better: str, worse: str) -> dict[str, Any]:
    """Paired difference in every compared figure, over the seeds that both methods have."""
    pairs = list(zip(by_method[better], by_method[worse], strict=False))
    return {
        "better": better,
        "worse": worse,
        **{figure: paired([a[figure] for a, _ in pairs], [b[figure] for _, b in pairs]) for figure in COMPARED},
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


def show(results: Mapping[str, Any]) -> None:
    """The methods at temperature 1 on both renderings, on the screen."""
    shown = ("validity", "structure", "content_f1", "exact_match")
    for key in ("sampled", "rows"):
        table = Table("method", *shown, title=f"{key}: per cent, mean over seeds")
        for method, entry in results[key].items():
            table.add_row(method, *(f"{100 * entry[figure]['mean']:.1f}" for figure in shown))
        Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((StructuredLedgerArguments,)).parse_args_and_config())
