r"""Token routing (R2R, arXiv 2505.21600) in the ledger world, by seed: from labels to served accuracy, and the clock.

    python benchmarks/routing_ledger.py --output_dir runs/benchmarks/routing_ledger
    python benchmarks/routing_ledger.py --output_dir runs/benchmarks/routing_ledger --clock true      # again, alone

SLM 0.16 M parameters, LLM 3.05 M (1:19), one pair for all seeds. A seed has its own labelled problems, routers (the
paper's, a linear one, one on the entropy alone), validation problems on which every threshold is set so that it
*serves* an LLM rate, and test problems, which are read once; random and query-level routing are the other baselines.
Accuracies are compared at exactly equal LLM rates, between the rates that were served.

The clock (`--clock false` leaves it out) times SLM only, LLM only and routed on the same engine in turns, and
transformers' assisted generation with the same pair. It is timed anew whenever it is asked for; everything else is
kept, and a killed run goes on where it stopped. Writes results.json; pages/routing.py makes the page.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ledger_stages import LEDGER, MAX_TOKENS, over_seeds, paired, stages_in, write_json
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from tokalign.cli.ledger_models import trained_model
from tokalign.evaluation.routing import query_level, run_summary
from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import render_prompt
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, EntropyPolicy, NeverLLM, RouterPolicy, RoutingPolicy
from tokalign.routing.decode.served_rate import served_threshold
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.loading import load_stage

NEURAL = "neural router"
ROUTERS = {
    NEURAL: (),
    "linear router": ("--architecture", "linear", "--learning_rate", 1e-2),
    "entropy": ("--architecture", "linear", "--inputs", "entropy", "--learning_rate", 1e-1),
}
POLICIES = (*ROUTERS, "random", "query-level")
SLM, LLM, ROUTED = "SLM only", "LLM only", "routed"
ASSISTED, PLAIN = "assisted generation (transformers)", "LLM only (transformers generate)"
MEASURES = ("accuracy", "llm_rate", "activated_parameters", "full_cost")
FIRST_SEED = 2  # the base models were trained on the problems of seed 1


@dataclass
class RoutingLedgerArguments:
    """Sizes of the experiment."""

    output_dir: str = field(
        default="runs/benchmarks/routing_ledger", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    slm: str | None = field(default=None, metadata={"help": "Instead of the ledger's weak base."})
    llm: str | None = field(default=None, metadata={"help": "Instead of the ledger's strong base."})
    seeds: int = field(default=5, metadata={"help": "How many."})
    train_problems: int = field(default=2000, metadata={"help": "Problems a seed that are labelled."})
    validation_problems: int = field(default=200, metadata={"help": "Problems a seed on which rates are set."})
    test_problems: int = field(default=600, metadata={"help": "Held-out problems a seed."})
    rates: list[float] = field(
        default_factory=lambda: [0.04, 0.08, 0.12, 0.2], metadata={"help": "LLM rates of the frontier."}
    )
    clock: bool = field(default=True, metadata={"help": "Time the ways of decoding, on an otherwise idle machine."})
    clock_rate: float = field(default=0.12, metadata={"help": "LLM rate of the timed runs; one of `rates`."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "Of the timed runs."})
    clock_problems: int = field(default=64, metadata={"help": "Problems of the timed runs (batch 1: a quarter)."})
    repeats: int = field(default=7, metadata={"help": "Turns of the timed runs, after one that does not count."})


class SeedRun:
    """Labels, routers, thresholds and test runs of one seed; whatever is there is kept."""

    def __init__(self, args: RoutingLedgerArguments, seed: int):
        self.args, self.seed = args, seed
        self.slm, self.llm = str(args.slm), str(args.llm)
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.world = self.out / "world"
        self.stages = stages_in(self.out)
        self.stages.run(
            *("problems", "data/ledger.py", "--output_dir", self.world, "--seed", seed, "--sft", 1),
            *("--train", args.train_problems, "--validation", args.validation_problems, "--test", args.test_problems),
        )

    def label_and_train(self) -> None:
        """Labels by outcome, and the routers."""
        self.stages.run(
            *("labels", "scripts/label_routing.py", "--model", self.llm, "--slm", self.slm, "--verdict", "outcome"),
            *("--dataset", self.world / "train", "--output_dir", self.out / "labels", "--max_tokens", MAX_TOKENS),
            *("--shard_size", 512, "--seed", self.seed),
        )
        for name, options in ROUTERS.items():
            self.stages.train(
                *(name, "recipes/router.py", self.router(name), "--config", f"{LEDGER}/router.yaml"),
                *("--dataset_name", self.out / "labels" / "labels", "--slm", self.slm, "--seed", self.seed, *options),
            )

    def router(self, name: str) -> Path:
        return self.out / "routers" / name.replace(" ", "_")

    def thresholds(self, name: str) -> dict[float, float]:
        """LLM rate -> the threshold of a policy that serves it on the validation problems."""
        settings = {key: value for key, value in asdict(self.args).items() if key in ("slm", "llm", "rates")}
        settings |= {key: getattr(self.args, key) for key in ("train_problems", "validation_problems")}
        file = self.out / "thresholds" / f"{self.router(name).name}.json"
        if not file.exists() or read_json(file)["settings"] != settings:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"settings": settings, "thresholds": self._serve(name)})
        return {float(rate): threshold for rate, threshold in read_json(file)["thresholds"].items()}

    def _serve(self, name: str) -> dict[str, float]:
        if name == "entropy":  # the threshold in nats: the router on entropy alone is a monotone function of it
            policy: RoutingPolicy = EntropyPolicy(1.0)
        else:
            policy = RouterPolicy(TokenRouter.from_pretrained(self.router(name)), 0.5)
        generator = RoutedGenerator.from_pretrained(self.slm, self.llm, policy=policy)
        prompts = prompts_of(self.world / "validation", generator)
        found = {}
        for rate in sorted(self.args.rates):
            served = served_threshold(generator, prompts, greedy(), rate)
            policy.threshold = found[f"{rate:g}"] = served.threshold  # where the search for the next rate begins
        return found

    def points(self) -> dict[str, dict[str, dict[str, float]]]:
        """Both models alone, and every policy at every rate: `MEASURES` on the test problems."""
        alone = {SLM: self._routed(SLM, "--policy", "never"), LLM: self._routed(LLM, "--policy", "always")}
        points = {name: {"": measures(run_summary(folder))} for name, folder in alone.items()}
        for name in ROUTERS:
            points[name] = {}
            options = ("--policy", "entropy") if name == "entropy" else ("--router", self.router(name))
            for rate, threshold in self.thresholds(name).items():
                folder = self._routed(f"{name} {rate:g}", *options, "--threshold", threshold)
                points[name][f"{rate:g}"] = measures(run_summary(folder))
        points["random"] = {
            f"{rate:g}": measures(run_summary(self._routed(f"random {rate:g}", "--policy", "random", "--rate", rate)))
            for rate in self.args.rates
        }
        by_query = query_level(alone[SLM], alone[LLM], self.args.rates)
        points["query-level"] = {f"{r:g}": measures(p) for r, p in zip(self.args.rates, by_query, strict=True)}
        return points

    def _routed(self, name: str, *options: Any) -> Path:
        folder = self.out / "routed" / name.replace(" ", "_")
        self.stages.run(
            *(name, "scripts/generate_routed.py", "--slm", self.slm, "--llm", self.llm, *options),
            *("--dataset", self.world / "test", "--output_dir", folder, "--max_tokens", MAX_TOKENS),
            *("--shard_size", 256, "--seed", self.seed),
        )
        return folder

    def label_shares(self) -> dict[str, float]:
        """Share of each class among all labelled tokens, and their number."""
        splits = read_json(self.out / "labels" / "report.json")["splits"].values()
        tokens = sum(split["tokens"] for split in splits)
        classes = next(iter(splits))["counts"]
        shares = {name: sum(split["counts"][name] for split in splits) / tokens for name in classes}
        return shares | {"neutral - divergent": shares["neutral"] - shares["divergent"], "tokens": tokens}

    def router_figures(self, name: str) -> dict[str, float]:
        """On held-out responses: how well the scores find divergent tokens."""
        report = read_json(self.router(name) / "report.json")
        recalls = {f"recall at {rate}": report["recall_at_rate"][rate]["recall"] for rate in ("0.05", "0.12")}
        return {key: report[key] for key in ("auroc", "auprc")} | recalls


def measures(summary: Mapping[str, Any]) -> dict[str, float]:
    return {key: summary[key] for key in MEASURES}


def at_equal_rate(points: Mapping[str, Mapping[str, Mapping[str, float]]], rate: float) -> dict[str, float]:
    """Accuracy of each policy at exactly this LLM rate: linear between the nearest served rates on either side.

    A threshold serves its rate on validation problems; on test problems it is some tenths of a point off, which is as
    much as policies differ by. Both models alone are points of every policy, at the rates 0 and 1.
    """
    found = {}
    for name in POLICIES:
        served = sorted((p["llm_rate"], p["accuracy"]) for key in (SLM, name, LLM) for p in points[key].values())
        rates, accuracies = zip(*served, strict=True)
        found[name] = float(np.interp(rate, rates, accuracies))
    return found


def summarise(seeds: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """Everything over seeds.

    Args:
        seeds: of each the `points`, `labels` and `routers`.
        rates: LLM rates.
    """
    points = [seed["points"] for seed in seeds]
    found = {name: [seed["routers"][name] for seed in seeds] for name in ROUTERS}
    equal = {f"{rate:g}": [at_equal_rate(p, rate) for p in points] for rate in rates}

    def by_rate(figure: Callable[[Mapping[str, Any], str], float]) -> dict[str, Any]:
        return {rate: over_seeds([figure(p, rate) for p in points]) for rate in equal}

    def entries(dicts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {key: over_seeds([d[key] for d in dicts]) for key in dicts[0]}

    return {
        "labels": entries([seed["labels"] for seed in seeds]),
        "routers": {name: entries(by_seed) for name, by_seed in found.items()},
        "router_differences": [
            {"better": NEURAL, "worse": other}
            | {key: paired([a[key] for a in found[NEURAL]], [b[key] for b in found[other]]) for key in found[other][0]}
            for other in found
            if other != NEURAL
        ],
        "frontier": {
            name: {rate: entries([p[name][rate] for p in points]) for rate in points[0][name]} for name in points[0]
        },
        "at_equal_rate": {name: {r: over_seeds([s[name] for s in by]) for r, by in equal.items()} for name in POLICIES},
        "differences": [
            {
                "better": NEURAL,
                "worse": other,
                "rate": rate,
                "accuracy": paired([s[NEURAL] for s in by_seed], [s[other] for s in by_seed]),
            }
            for other in POLICIES[1:]
            for rate, by_seed in equal.items()
        ],
        "minus_llm": by_rate(lambda p, rate: p[NEURAL][rate]["accuracy"] - p[LLM][""]["accuracy"]),
        # Share of the gap between the two models
        "recovered": by_rate(lambda p, rate: recovered(p[NEURAL][rate], p[SLM][""], p[LLM][""])),
        # Of the neural router: cost of the LLM alone / cost
        "saving": {
            "activated_parameters": by_rate(lambda p, rate: saving(p, rate, "activated_parameters")),
            "full_cost": by_rate(lambda p, rate: saving(p, rate, "full_cost")),
        },
    }


def recovered(*points: Mapping[str, float]) -> float:
    """Of a routed pair, its SLM and its LLM: how much of the way from the SLM's accuracy to the LLM's it goes."""
    routed, slm, llm = (point["accuracy"] for point in points)
    return (routed - slm) / (llm - slm)


def saving(points: Mapping[str, Any], rate: str, cost: str) -> float:
    return points[LLM][""][cost] / points[NEURAL][rate][cost]


def clock(run: SeedRun, args: RoutingLedgerArguments) -> list[dict[str, Any]]:
    """Tokens a second of each way in turns, at each batch size; the same prompts and greedy decoding for all.

    Returns:
        For each batch size `tokens_per_second` and `ratio` (to LLM only in the same turn) by way; intervals over turns.
    """
    rate = min(args.rates, key=lambda r: abs(r - args.clock_rate))
    router = TokenRouter.from_pretrained(run.router(NEURAL))
    policies: dict[str, RoutingPolicy] = {
        SLM: NeverLLM(),
        LLM: AlwaysLLM(),
        ROUTED: RouterPolicy(router, run.thresholds(NEURAL)[rate]),
    }
    results = []
    for batch in args.batch_sizes:
        count = args.clock_problems if batch > 1 else max(1, args.clock_problems // 4)
        ways: dict[str, Callable[[], int]] = {}
        for name, policy in policies.items():
            generator = RoutedGenerator.from_pretrained(run.slm, run.llm, policy=policy, max_rows=batch)
            prompts = prompts_of(run.world / "test", generator)[:count]
            ways[name] = lambda g=generator, p=prompts: sum(len(c.token_ids) for (c,) in g.generate(p, greedy()))
        if batch == 1:  # assisted generation takes one sequence at a time
            pair = RoutedGenerator.from_pretrained(run.slm, run.llm, policy=AlwaysLLM())
            ways[ASSISTED] = lambda p=prompts, g=pair: assisted(g, p)
            ways[PLAIN] = lambda p=prompts, g=pair: assisted(g, p, assistant=False)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens = way()
                if turn:  # the first warms up
                    speeds[name].append(tokens / (time.perf_counter() - start))
        ratios = {name: [a / b for a, b in zip(values, speeds[LLM], strict=True)] for name, values in speeds.items()}
        results.append(
            {
                "batch": batch,
                "problems": count,
                "llm_rate": rate,
                "tokens_per_second": {name: over_seeds(values) for name, values in speeds.items()},
                "ratio": {name: over_seeds(values) for name, values in ratios.items()},
            }
        )
    return results


def assisted(pair: RoutedGenerator, prompts: list[list[int]], *, assistant: bool = True) -> int:
    """Tokens written by the LLM with the SLM as transformers' assistant (speculative decoding), or by itself."""
    written = 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=pair.llm.device)
        options = {"assistant_model": pair.slm} if assistant else {}
        output = pair.llm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=pair.tokenizer.pad_token_id,
            **options,
        )
        written += output.shape[1] - len(prompt)
    return written


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


def prompts_of(folder: Path, generator: RoutedGenerator) -> list[list[int]]:
    """Token ids of the problems' prompts."""
    return [render_prompt(prompt, generator.tokenizer) for prompt in load_stage(folder, split="train")["prompt"]]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(args: RoutingLedgerArguments) -> dict[str, Any]:
    args.slm, args.llm = args.slm or str(trained_model("ledger-slm")), args.llm or str(trained_model("ledger-llm"))
    runs = [SeedRun(args, FIRST_SEED + number) for number in range(args.seeds)]
    seeds = []
    for run in runs:
        run.label_and_train()
        figures = {name: run.router_figures(name) for name in ROUTERS}
        seeds.append({"points": run.points(), "labels": run.label_shares(), "routers": figures})
    results = {"arguments": asdict(args), "parameters": sizes(runs[0])} | summarise(seeds, args.rates)
    timed = Path(args.output_dir) / "clock.json"
    if args.clock:
        write_json(timed, clock(runs[0], args))
    results["clock"] = read_json(timed) if timed.exists() else []
    write_json(Path(args.output_dir) / "results.json", results)
    show(results)
    return results


def sizes(run: SeedRun) -> dict[str, int]:
    """Parameters of SLM, LLM and router."""
    folder = run.out / "routed" / f"{NEURAL} {run.args.rates[0]:g}".replace(" ", "_")
    return run_summary(folder)["parameters"]


def show(results: Mapping[str, Any]) -> None:
    """The frontier and the clock, on the screen."""
    table = Table("", "LLM rate", "accuracy", "− neural, equal rate", "full cost", title="routed pairs, over seeds")
    gaps = {(d["worse"], d["rate"]): d["accuracy"]["mean"] for d in results["differences"]}
    for name, by_rate in results["frontier"].items():
        for rate, entry in by_rate.items():
            gap = gaps.get((name, rate))
            table.add_row(
                *(name, f"{100 * entry['llm_rate']['mean']:.1f} %", f"{100 * entry['accuracy']['mean']:.1f} %"),
                *("" if gap is None else f"{-100 * gap:+.1f}", f"{entry['full_cost']['mean']:,.0f}"),
            )
    Console().print(table)
    table = Table("batch", "way", "tokens/s", "/ LLM only", title="wall-clock, same process, in turns")
    for timed in results["clock"]:
        for name, speed in timed["tokens_per_second"].items():
            ratio = timed["ratio"][name]["mean"]
            table.add_row(str(timed["batch"]), name, f"{speed['mean']:,.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(*TrlParser((RoutingLedgerArguments,)).parse_args_and_config())
