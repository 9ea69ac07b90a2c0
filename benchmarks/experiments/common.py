"""What experiments share: cells that processes divide, figures over seeds, methods side by side, tables and pictures.

Every method of a comparison on the ledger world gets the same grid of learning rates; its best on validation problems
(with pairs of their own, seed 1000; greedy accuracy, ties by sampled accuracy) is trained anew with every seed. A seed
has its own problems, rollouts, pairs, training order and test problems, which all its methods share, and which are read
once. So differences between methods are paired over seeds.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ledger_stages import LedgerStages, WorldArguments
from benchmarks.render import SHARE, Table, Tables, error_bars, number, percent, read_json, slashed, write_json
from tokalign.data.builders.model import MODELS
from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import render_prompt
from tokalign.rewards import StructuredReward
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.seeds import problem_seed
from tokalign.statistics import over_seeds, paired

SMOLLM2 = MODELS["smollm2"].hub_id  # the model of the real experiments where --model names no other
GRID_SEED = 1000
MEASURES = ("greedy", "sampled")
EVAL_MODEL = {"help": "Model that gives token rewards; unset is the ledger's, which can rewrite drafts."}
GRID = {"help": "The grid of learning rates, the same for every method."}
WIDE = 65536  # weights of a layer from which on a second copy in another order pays


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of fp32 matrices by the faster of PyTorch's two kernels for a CPU, for as long as the context lasts.

    The usual one uses half of what AVX-512 can. Where the other stays in fp32 (no AMX) log-probs differ by 4e-7. It
    wants its weights in an order of its own. For a long pass that is made on the way; where a model writes, with few
    rows a step, that would cost more than the product, so layers without a gradient keep their weights in it.
    """
    kernels = torch.backends.mkldnn.matmul
    forward = torch.nn.Linear.forward
    before, kernels.fp32_precision = kernels.fp32_precision, "bf16"
    ordered: WeakKeyDictionary[torch.nn.Module, tuple[tuple[int, int], torch.Tensor]] = WeakKeyDictionary()

    def product(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        here = weight.device.type == "cpu" and weight.layout == torch.strided
        fits = here and weight.dtype == input.dtype == torch.float32 and weight.numel() >= WIDE
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not fits:
            return forward(self, input)
        state = weight.data_ptr(), weight._version
        if self not in ordered or ordered[self][0] != state:
            ordered[self] = state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(input, ordered[self][1], self.bias, "none", [], "")

    torch.nn.Linear.forward = product  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Linear.forward = forward  # type: ignore[method-assign]
        kernels.fp32_precision = before


ByMethod = Mapping[str, Sequence[Mapping[str, float]]]  # method -> seed -> measure -> value


def summary(by_method: ByMethod, keys: Iterable[str] = MEASURES) -> dict[str, Any]:
    """method -> measure -> over seeds."""
    return {m: {key: over_seeds([s[key] for s in seeds]) for key in keys} for m, seeds in by_method.items()}


def difference(by_method: ByMethod, better: str, worse: str, keys: Iterable[str] = MEASURES) -> dict[str, Any]:
    """Paired difference in every measure over the seeds that both methods have (the first ones)."""
    pairs = list(zip(by_method[better], by_method[worse], strict=False))
    return {"better": better, "worse": worse} | {
        key: paired([a[key] for a, _ in pairs], [b[key] for _, b in pairs]) for key in keys
    }


# ------------------------------------------------------------------------------------------------- shared by processes


@contextmanager
def held(lock: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, of which the kernel lets go when the process dies; without `wait`, False if another has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def shared(cells: Mapping[str, Callable[[], Any]], locks: Path) -> dict[str, Any]:
    """What all cells give, each of which keeps its own results on disk.

    Two processes at the same cells share them: each first takes those that the other is not at, and then reads, or
    waits for, the rest.
    """
    done: dict[str, Any] = {}
    for wait in (False, True):
        for name, work in cells.items():
            if name not in done:
                with held(locks / name, wait=wait) as mine:
                    if mine:
                        done[name] = work()
    return {name: done[name] for name in cells}


def kept(
    cells: Mapping[str, Callable[[], Any]],
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    after: Callable[[dict[str, Any]], Any] = lambda found: None,
) -> dict[str, Any]:
    """What all cells give, each kept as a JSON file of `folder`, so that what is there is never made again.

    Processes that were started alike share the cells, in their order. A kill loses no more than the cells in work.

    Args:
        cells: name -> what makes its JSON; a name is a file name.
        settings: what a cell depends on beside its name; a file that was made with others is made anew.
        after: called with all cells that are there, whoever made them, after each that this process has made.
    """
    depends_on = json.loads(json.dumps(settings or {}))  # as the file will give it back: tuples as lists

    def there(name: str) -> dict[str, Any] | None:
        file = folder / f"{name}.json"
        content: dict[str, Any] | None = read_json(file) if file.exists() else None
        return content if content and content["settings"] == depends_on else None

    def cell(name: str, work: Callable[[], Any]) -> Any:
        if there(name) is None:
            write_json(folder / f"{name}.json", {"settings": depends_on, "cell": work()})
            after({other: found["cell"] for other in cells if (found := there(other))})
        return read_json(folder / f"{name}.json")["cell"]

    return shared({name: partial(cell, name, work) for name, work in cells.items()}, folder / "locks")


# --------------------------------------------------------------------------------------------------- pairs by a reward


def best_and_worst(
    engine: EngineArguments,
    rows: Dataset,
    output: Path,
    *,
    reward: StructuredReward,
    group: int,
    max_tokens: int,
    seed: int,
) -> Path:
    """Preferences: best and worst of `group` samples of each structured problem, where not all are worth the same."""
    tokenizer = AutoTokenizer.from_pretrained(engine.model)
    engines: list[Any] = []

    def work(batch: list[dict[str, Any]]) -> list[Any]:
        if not engines:
            engines.append(load_engine(engine))
        prompts = [render_prompt(row["prompt"], tokenizer) for row in batch]
        each = [
            SamplingParams(n=group, max_tokens=max_tokens, seed=problem_seed(seed, row["id"], "evaluation"))
            for row in batch
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

    parameters = {"seed": seed, "model": weights_hash(Path(engine.model))}
    run_job(work, rows, output, name="pairs by reward", parameters=parameters, tokenizer=tokenizer)
    return output


# ------------------------------------------------------------------------------------------------- methods side by side


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe with its settings, what it trains on, and from where.

    Args:
        config: YAML in recipes/ledger/, without its ending.
        recipe: verb that trains, or the path of a script.
        options: further options of the recipe.
        dataset: name of the dataset, made by the experiment.
        start: method whose trained model it starts from; the base if None.
    """

    config: str
    recipe: str = "critical-dpo"
    options: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = "pairs"
    start: str | None = None


@dataclass
class ComparisonArguments(WorldArguments):
    """Sizes of the experiment."""

    base: str | None = field(default=None, metadata={"help": "The start; unset is the ledger's weak base."})
    output_dir: str = field(
        default="runs/benchmarks/comparison", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    seeds: int = field(default=5, metadata={"help": "Seeds 0, 1, …"})
    problems: int = field(default=1000, metadata={"help": "Training problems a seed."})
    rollouts: int = field(default=8, metadata={"help": "Rollouts a problem."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3], metadata=GRID)
    validation_problems: int = field(default=500, metadata={"help": "Problems of the grid."})
    test_problems: int = field(default=600, metadata={"help": "Test problems a seed."})
    samples: int = field(default=2, metadata={"help": "Samples a problem for the sampled accuracy."})


class ComparisonSeed:
    """Pairs, datasets, trained models and evaluations of one seed; whatever is there is kept.

    Args:
        comparison: its sizes, methods, makers of datasets, and the rates of methods that others start from.
        split: of the held-out problems. problems: how many.
    """

    def __init__(self, comparison: Comparison, *, seed: int, split: str, problems: int):
        args, self.comparison = comparison.args, comparison
        self.seed, self.split = seed, split
        self.base = args.ledger_model("ledger-slm", seed, args.base)
        self.stages = LedgerStages(Path(args.output_dir) / f"seed-{seed}", args.world)
        self.out = self.stages.folder
        pairs = self.stages.pairs(self.base, problems=args.problems, rollouts=args.rollouts, seed=seed)
        self.datasets = {"pairs": pairs}
        self.stages.problems(self.out / "held_out", seed=seed, **{split: problems})

    def dataset(self, name: str) -> Path:
        """Folder of a dataset, made now if it is not there."""
        if name not in self.datasets:
            self.datasets[name] = self.comparison.make[name](self)
        return self.datasets[name]

    def start(self, method: str) -> str:
        """Model that a method starts from: the base, or another method's with its adapter merged."""
        name = self.comparison.methods[method].start
        if name is None:
            return self.base
        rate = self.comparison.rates[name]
        merged = self.out / "merged" / f"{name} {rate:g}".replace(" ", "_")
        if not (merged / "config.json").exists():
            adapter = self.train(name, rate)
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base), adapter)
            AutoTokenizer.from_pretrained(self.base).save_pretrained(merged)
            model.merge_and_unload().save_pretrained(merged)
        return str(merged)

    def name(self, method: str, rate: float) -> str:
        """Of the folders of a method at a learning rate; another start is another folder."""
        start = self.comparison.methods[method].start
        after = "" if start is None else f" after {self.comparison.rates[start]:g}"
        return f"{method} {rate:g}{after}".replace(" ", "_")

    def train(self, method: str, rate: float) -> Path:
        """Adapter of a method at a learning rate."""
        chosen = self.comparison.methods[method]
        data = {"model_name_or_path": self.start(method), "dataset_name": self.dataset(chosen.dataset)}
        options = {"learning_rate": rate, "seed": self.seed, **chosen.options}
        return self.stages.recipe(f"models/{self.name(method, rate)}", chosen.recipe, chosen.config, **data, **options)

    def figures(self, method: str, rate: float | None, **options: Any) -> dict[str, Any]:
        """Greedy and sampled accuracy on the held-out problems (`rate` None: of the base), and all that
        `tokalign evaluate answers` writes with `options`."""
        name, model = "base", self.base
        options |= {"samples": self.comparison.args.samples, "seed": self.seed}
        if rate is not None:
            name, model, options["adapter"] = self.name(method, rate), self.start(method), self.train(method, rate)
        folder = self.stages.evaluation(name, model, self.out / "held_out" / self.split, **options)
        metrics = read_json(folder / "metrics.json")
        return metrics | {key: metrics[f"{key}_accuracy"] for key in MEASURES}


class Comparison:
    """The grid on validation problems, then every seed on test problems.

    Args:
        args: sizes.
        methods: name -> method; one that others start from stands before them.
        make: name of a dataset -> function of a seed that makes it and returns its folder; "pairs" is there.
    """

    def __init__(
        self,
        args: ComparisonArguments,
        methods: Mapping[str, Method],
        make: Mapping[str, Callable[[ComparisonSeed], Path]],
    ):
        self.args, self.methods, self.make = args, methods, make
        self.rates: dict[str, float] = {}
        self.grid: dict[str, dict[str, dict[str, float]]] = {}

    def choose_rates(self) -> None:
        """The rate of every method: best greedy accuracy on validation problems; sampled accuracy settles a tie."""
        run = ComparisonSeed(self, seed=GRID_SEED, split="validation", problems=self.args.validation_problems)
        for method in self.methods:
            measured = {rate: run.figures(method, rate) for rate in self.args.learning_rates}
            cells = {rate: {key: figures[key] for key in MEASURES} for rate, figures in measured.items()}
            self.rates[method] = max(cells, key=lambda r: (cells[r]["greedy"], cells[r]["sampled"]))
            self.grid[method] = {f"{rate:g}": cell for rate, cell in cells.items()}

    def seeds(self) -> Iterator[ComparisonSeed]:
        """Choose the rates, then every seed with its test problems."""
        self.choose_rates()
        for seed in range(self.args.seeds):
            yield ComparisonSeed(self, seed=seed, split="test", problems=self.args.test_problems)

    def results(self, by_method: ByMethod, claims: Sequence[tuple[str, str]], keys: Sequence[str] = MEASURES) -> Any:
        """What every comparison writes: what rates were chosen by, the methods, and the differences claimed."""
        edges = (self.args.learning_rates[0], self.args.learning_rates[-1])
        at_edge = [method for method, rate in self.rates.items() if rate in edges]
        return {
            "arguments": asdict(self.args),
            "validation": {"grid": self.grid, "learning_rate": self.rates, "at_edge": at_edge},
            "methods": summary(by_method, keys),
            "differences": [difference(by_method, *pair, keys) for pair in claims if set(pair) <= set(by_method)],
        }


# ---------------------------------------------------------------------------------------------------- what pages show


def comparison_tables(results: Mapping[str, Any], paper: Mapping[str, Sequence[float]], papers: str) -> Tables:
    """Accuracy of every method beside the paper's figures, the grid, and the sizes that sentences name.

    Args:
        paper: method -> its figures. papers: heading of their column.
    """
    rates = results["validation"]["learning_rate"]
    rows = []
    for method, entry in results["methods"].items():
        theirs = slashed(paper[method]) if method in paper else "–"
        rate = f"{rates[method]:g}" if method in rates else ""
        rows.append([method, theirs, rate, *(percent(entry[key]) for key in MEASURES)])
    sizes = {key: str(results["arguments"][key]) for key in ("seeds", "test_problems")}
    return {
        "methods": (("", papers, "learning rate", *MEASURES), rows),
        "grid": grid_table(results["validation"], ("greedy",)),
        **sizes,
    }


def grid_table(validation: Mapping[str, Any], measures: Sequence[str]) -> Table:
    """Every cell of the grid that the learning rates were chosen by, the chosen ones bold.

    A chosen rate at the edge of the grid says so: the method may be better beyond it.

    Args:
        measures: those of a cell that are shown, shares.
    """
    rates = list(next(iter(validation["grid"].values())))
    rows = []
    for method, cells in validation["grid"].items():
        row = {rate: slashed(100 * cell[key] for key in measures) for rate, cell in cells.items()}
        best = f"{validation['learning_rate'][method]:g}"
        row[best] = f"**{row[best]}**" + (" (edge)" if method in validation["at_edge"] else "")
        rows.append([method, *row.values()])
    return ("learning rate", *rates), rows


def accuracy_figure(results: Mapping[str, Any], reference: str, height: float = 4) -> Figure:
    """Greedy and sampled accuracy of every method, with a line at that of `reference`."""
    figure = Figure(figsize=(10, height), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
        error_bars(axis, {m: entry[key] for m, entry in results["methods"].items()})
        axis.axvline(100 * results["methods"][reference][key]["mean"], color="grey", linestyle=":")
        axis.set(title=f"{key} accuracy, {results['arguments']['seeds']} seeds", xlabel="per cent")
    return figure


DETECTION = {"auroc": "AUROC", "hit1": "hit@1"}


def detection_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    """How well a signal finds the token looked for."""
    return [name, *(number(entry[key], 3, within=SHARE) for key in DETECTION)]


def detection_figure(by_target: Mapping[str, Mapping[str, Any]], height: float) -> Figure:
    """AUROC and hit@1 of every signal, a row for every target (its title -> signals)."""
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(len(by_target), len(DETECTION), squeeze=False, sharey=len(by_target) == 1)
    for row, (title, signals) in zip(axes, by_target.items(), strict=True):
        for axis, (key, measure) in zip(row, DETECTION.items(), strict=True):
            error_bars(axis, {name: entry[key] for name, entry in signals.items()}, scale=1)
            axis.set(title=f"{measure} · {title}", xlim=(-0.02, 1.02))
    return figure
