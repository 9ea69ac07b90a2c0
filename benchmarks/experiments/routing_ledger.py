r"""Token routing (R2R, arXiv 2505.21600) in the ledger world, by seed: from labels to served accuracy, and the clock.

    python -m benchmarks.experiments.routing_ledger
    python -m benchmarks.experiments.routing_ledger --clock true      # again, alone

SLM 0.16 M parameters, LLM 3.05 M (1:19), one pair for all seeds. A seed has its own labelled problems, routers (the
paper's, a linear one, one on the entropy alone), validation problems on which every threshold is set so that it
*serves* an LLM rate, and test problems, which are read once; random and query-level routing are the other baselines.
Accuracies are compared at exactly equal LLM rates, between the rates that were served.

The clock (`--clock false` leaves it out) times SLM only, LLM only, routed and lossless decoding on one engine in turns,
and transformers' assisted generation with the same pair. It is timed anew whenever it is asked for; everything else is
kept, and a killed run goes on where it stopped. Writes results.json; docs/results/routing.md shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from trl import TrlParser

from benchmarks.ledger_stages import MAX_TOKENS, LedgerStages, WorldArguments
from benchmarks.render import CLAIM, SHARE, Tables, claim, number, percent, read_json, save, write_json
from tokalign.evaluation.routing import query_level, run_summary
from tokalign.generation.protocol import SamplingParams
from tokalign.prompts import render_prompt
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, EntropyPolicy, NeverLLM, RouterPolicy, RoutingPolicy
from tokalign.routing.decode.served_rate import served_threshold
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.loading import load_stage
from tokalign.statistics import over_seeds, paired

NEURAL = "neural router"
ROUTERS: dict[str, dict[str, Any]] = {
    NEURAL: {},
    "linear router": {"architecture": "linear", "learning_rate": 1e-2},
    "entropy": {"architecture": "linear", "inputs": "entropy", "learning_rate": 1e-1},
}
POLICIES = (*ROUTERS, "random", "query-level")
SLM, LLM, ROUTED, LOSSLESS = "SLM only", "LLM only", "routed", "lossless (drafts verified)"
ASSISTED, PLAIN = "assisted generation (transformers)", "LLM only (transformers generate)"
MEASURES = ("accuracy", "llm_rate", "activated_parameters", "full_cost")
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
FIRST_SEED = 2  # the base models were trained on the problems of seed 1


@dataclass
class RoutingLedgerArguments(WorldArguments):
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/routing_ledger"
    slm: str | None = field(default=None, metadata={"help": "Instead of the ledger's weak base."})
    llm: str | None = field(default=None, metadata={"help": "Instead of the ledger's strong base."})
    seeds: int = field(default=5, metadata={"help": "How many."})
    train_problems: int = field(default=2000, metadata={"help": "Problems a seed that are labelled."})
    validation_problems: int = field(default=200, metadata={"help": "Problems a seed on which rates are set."})
    test_problems: int = field(default=600, metadata={"help": "Held-out problems a seed."})
    rates: list[float] = field(default_factory=lambda: [0.04, 0.08, 0.12, 0.2], metadata={"help": "LLM rates served."})
    clock: bool = field(default=True, metadata={"help": "Time the ways of decoding, on an otherwise idle machine."})
    clock_rate: float = field(default=0.12, metadata={"help": "LLM rate of the timed runs; one of `rates`."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16], metadata={"help": "Of the timed runs."})
    clock_problems: int = field(default=64, metadata={"help": "Problems of the timed runs (batch 1: a quarter)."})
    repeats: int = field(default=7, metadata={"help": "Turns of the timed runs, after one that does not count."})


class RoutingSeed:
    """Labels, routers, thresholds and test runs of one seed; whatever is there is kept."""

    def __init__(self, args: RoutingLedgerArguments, seed: int):
        self.args, self.seed = args, seed
        self.slm = args.ledger_model("ledger-slm", seed, args.slm)
        self.llm = args.ledger_model("ledger-llm", seed, args.llm)
        self.stages = LedgerStages(Path(args.output_dir) / f"seed-{seed}", args.world)
        self.out = self.stages.folder
        sizes = {split: getattr(args, f"{split}_problems") for split in ("train", "validation", "test")}
        self.world = self.stages.problems(self.out / "world", seed=seed, **sizes)

    def label_and_train(self) -> None:
        """Labels by outcome, and the routers."""
        folder = self.stages.routing_labels(self.slm, self.llm, self.world / "train", self.seed)
        data = {"dataset_name": folder / "labels", "slm": self.slm, "seed": self.seed}
        for name, options in ROUTERS.items():
            self.stages.recipe(f"routers/{name}", "router", "router", **data, **options)

    def router(self, name: str) -> Path:
        return self.out / "routers" / name.replace(" ", "_")

    def thresholds(self, name: str) -> dict[float, float]:
        """LLM rate -> the threshold of a policy that serves it on the validation problems."""
        settings = {key: getattr(self.args, key) for key in ("rates", "train_problems", "validation_problems")}
        settings |= {"slm": self.slm, "llm": self.llm}
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
        thresholds = {}
        for rate in sorted(self.args.rates):
            served = served_threshold(generator, prompts, GREEDY, rate)
            policy.threshold = thresholds[f"{rate:g}"] = served.threshold  # where the search for the next rate begins
        return thresholds

    def points(self) -> dict[str, dict[str, dict[str, float]]]:
        """Both models alone, and every policy at every rate: `MEASURES` on the test problems."""
        alone = {SLM: self._routed(SLM, policy="never"), LLM: self._routed(LLM, policy="always")}
        points = {name: {"": measures(run_summary(folder))} for name, folder in alone.items()}
        for name in ROUTERS:
            points[name] = {}
            options = {"policy": "entropy"} if name == "entropy" else {"router": self.router(name)}
            for rate, threshold in self.thresholds(name).items():
                folder = self._routed(f"{name} {rate:g}", threshold=threshold, **options)
                points[name][f"{rate:g}"] = measures(run_summary(folder))
        points["random"] = {
            f"{rate:g}": measures(run_summary(self._routed(f"random {rate:g}", policy="random", rate=rate)))
            for rate in self.args.rates
        }
        by_query = query_level(alone[SLM], alone[LLM], self.args.rates)
        points["query-level"] = {f"{r:g}": measures(p) for r, p in zip(self.args.rates, by_query, strict=True)}
        return points

    def _routed(self, name: str, **policy: Any) -> Path:
        return self.stages.routed(name, self.slm, self.llm, self.world / "test", self.seed, **policy)

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
    at_rate = {}
    for name in POLICIES:
        served = sorted((p["llm_rate"], p["accuracy"]) for key in (SLM, name, LLM) for p in points[key].values())
        rates, accuracies = zip(*served, strict=True)
        at_rate[name] = float(np.interp(rate, rates, accuracies))
    return at_rate


def summarise(seeds: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    """Everything over seeds.

    Args:
        seeds: of each the `points`, `labels` and `routers`.
        rates: LLM rates.
    """
    points = [seed["points"] for seed in seeds]
    by_router = {name: [seed["routers"][name] for seed in seeds] for name in ROUTERS}
    equal = {f"{rate:g}": [at_equal_rate(p, rate) for p in points] for rate in rates}

    def by_rate(figure: Callable[[Mapping[str, Any], str], float]) -> dict[str, Any]:
        return {rate: over_seeds([figure(p, rate) for p in points]) for rate in equal}

    def entries(dicts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        return {key: over_seeds([d[key] for d in dicts]) for key in dicts[0]}

    def recovered(p: Mapping[str, Any], rate: str) -> float:
        slm, routed, llm = (p[name][key]["accuracy"] for name, key in ((SLM, ""), (NEURAL, rate), (LLM, "")))
        return (routed - slm) / (llm - slm)

    return {
        "labels": entries([seed["labels"] for seed in seeds]),
        "routers": {name: entries(by_seed) for name, by_seed in by_router.items()},
        "router_differences": [
            {"better": NEURAL, "worse": other}
            | {key: paired([a[key] for a in by_router[NEURAL]], [b[key] for b in theirs]) for key in theirs[0]}
            for other, theirs in by_router.items()
            if other != NEURAL
        ],
        "frontier": {
            name: {rate: entries([p[name][rate] for p in points]) for rate in points[0][name]} for name in points[0]
        },
        "at_equal_rate": {name: {r: over_seeds([s[name] for s in by]) for r, by in equal.items()} for name in POLICIES},
        "differences": [
            {"better": NEURAL, "worse": other, "rate": rate}
            | {"accuracy": paired([s[NEURAL] for s in by_seed], [s[other] for s in by_seed])}
            for other in POLICIES[1:]
            for rate, by_seed in equal.items()
        ],
        "minus_llm": by_rate(lambda p, rate: p[NEURAL][rate]["accuracy"] - p[LLM][""]["accuracy"]),
        "recovered": by_rate(recovered),  # share of the gap between the two models
        "saving": {  # of the neural router: cost of the LLM alone / cost
            cost: by_rate(lambda p, rate, cost=cost: p[LLM][""][cost] / p[NEURAL][rate][cost])
            for cost in ("activated_parameters", "full_cost")
        },
    }


def clock(run: RoutingSeed, args: RoutingLedgerArguments) -> list[dict[str, Any]]:
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
        LOSSLESS: RouterPolicy(router, run.thresholds(NEURAL)[rate]),
    }
    results = []
    for batch in args.batch_sizes:
        count = args.clock_problems if batch > 1 else max(1, args.clock_problems // 4)
        ways: dict[str, Callable[[], int]] = {}
        for name, policy in policies.items():
            options = {"max_rows": batch, "verify": name == LOSSLESS}
            generator = RoutedGenerator.from_pretrained(run.slm, run.llm, policy=policy, **options)
            prompts = prompts_of(run.world / "test", generator)[:count]
            ways[name] = lambda g=generator, p=prompts: sum(len(c.token_ids) for (c,) in g.generate(p, GREEDY))
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


def prompts_of(folder: Path, generator: RoutedGenerator) -> list[list[int]]:
    """Token ids of the problems' prompts."""
    return [render_prompt(prompt, generator.tokenizer) for prompt in load_stage(folder, split="train")["prompt"]]


def main(args: RoutingLedgerArguments) -> dict[str, Any]:
    runs = [RoutingSeed(args, FIRST_SEED + number) for number in range(args.seeds)]
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
    return save(args.output_dir, results, tables)


def sizes(run: RoutingSeed) -> dict[str, int]:
    """Parameters of SLM, LLM and router."""
    folder = run.out / "routed" / f"{NEURAL} {run.args.rates[0]:g}".replace(" ", "_")
    return run_summary(folder)["parameters"]


# ------------------------------------------------------------------------------------------------ what the page shows


LABELS = {"identical": 0.89, "neutral": 0.06, "divergent": 0.05}  # the paper's shares
PAPER_RATE = 0.12  # 11 to 15 % of the tokens in the paper; the nearest rate here stands for it
PAPER_LLM, PAPER_R2R = (0.50, 32), (0.46, 5.6)  # average accuracy and activated parameters in B, read off a figure
PAPER_SPEED = "2.8"
BASELINES = ("entropy", "random", "query-level")  # that the paper has too


def tables(results: dict[str, Any]) -> Tables:
    """Labels, routers, accuracy at equal rate, the cost against the LLM alone, and the clock, each with its claims."""
    frontier, parameters, arguments = results["frontier"], results["parameters"], results["arguments"]
    sizes = ("train_problems", "validation_problems", "test_problems")
    return {
        **label_tables(results["labels"]),
        **router_tables(results),
        **rate_tables(results),
        **cost_tables(results),
        **clock_tables(results["clock"]),
        **{name: f"{arguments[name]:,}" for name in sizes if name in arguments},
        "slm": f"{parameters['slm'] / 1e6:.2f}",
        "llm": f"{parameters['llm'] / 1e6:.2f}",
        "size_ratio": f"{parameters['llm'] / parameters['slm']:.0f}",
        "llm_megabytes": f"{4 * parameters['llm'] / 1e6:.0f}",
        "slm_accuracy": percent(frontier[SLM][""]["accuracy"]),
        "llm_accuracy": percent(frontier[LLM][""]["accuracy"]),
    }


def in_paper(other: str) -> str:
    return "yes" if other in BASELINES else "–"


def label_tables(labels: Mapping[str, Any]) -> Tables:
    rows = [
        [name, f"{100 * LABELS[name]:.0f}" if name in LABELS else "–", percent(labels[name], digits=2)]
        for name in (*LABELS, "invalid")
    ]
    text = "more tokens differ without harm than with it (neutral − divergent)"
    paper = f"{100 * (LABELS['neutral'] - LABELS['divergent']):+.0f}"
    return {
        "labels": (("the SLM's token is", "paper", "here"), rows),
        "label_claims": (CLAIM, [claim(text, paper, labels["neutral - divergent"])]),
        "tokens": f"{labels['tokens']['mean']:,.0f}",
    }


def router_tables(results: Mapping[str, Any]) -> Tables:
    keys = {"auroc": "AUROC", "auprc": "AUPRC", "recall at 0.05": "recall at 5 %", "recall at 0.12": "recall at 12 %"}
    rows = [
        [name, *(number(entry[key], 3, within=SHARE) for key in keys)] for name, entry in results["routers"].items()
    ]
    claims = []
    for d in results["router_differences"]:
        for key in ("auroc", "auprc"):
            text = f"{d['better']} finds divergent tokens better than {d['worse']}, {keys[key]}"
            claims.append(claim(text, in_paper(d["worse"]), d[key], keys[key], digits=3))
    return {"routers": (("", *keys.values()), rows), "router_claims": (CLAIM, claims)}


def rate_tables(results: Mapping[str, Any]) -> Tables:
    """Accuracy at exactly equal LLM rates, and the rates that were served."""
    equal, shown = results["at_equal_rate"], {rate: f"{100 * float(rate):g} %" for rate in results["recovered"]}
    rows = [[shown[rate], *(percent(by_rate[rate]) for by_rate in equal.values())] for rate in shown]
    served = [[name, *(percent(entry["llm_rate"]) for entry in results["frontier"][name].values())] for name in equal]
    claims = [
        claim(f"{d['better']} > {d['worse']} at {shown[d['rate']]}", in_paper(d["worse"]), d["accuracy"])
        for d in results["differences"]
    ]
    return {
        "equal_rate": (("LLM tokens", *equal), rows),
        "claims": (CLAIM, claims),
        "served": (("", *shown.values()), served),
    }


def cost_tables(results: Mapping[str, Any]) -> Tables:
    saved, below = results["saving"], results["minus_llm"]
    rows = []
    for rate, share in results["recovered"].items():
        accuracy = percent(results["frontier"][NEURAL][rate]["accuracy"])
        costs = (number(saved[key][rate]) for key in ("activated_parameters", "full_cost"))
        way = number(share, 1, scale=100)  # no share: a routed pair may answer better than the LLM
        rows.append([f"{100 * float(rate):g} %", accuracy, percent(below[rate], "+"), way, *costs])
    rate = min(below, key=lambda rate: abs(float(rate) - PAPER_RATE))
    at, level = f"at {100 * float(rate):g} % LLM tokens", PAPER_R2R[0] - PAPER_LLM[0]
    less = f"{PAPER_LLM[1] / PAPER_R2R[1]:.1f}"
    ratio: dict[str, Any] = {"unit": "×", "digits": 2, "sign": "", "level": 1}
    activated, full = (saved[key][rate] for key in ("activated_parameters", "full_cost"))
    text = f"routed − LLM alone, {at}: no further below than in the paper"
    claims = [
        claim(text, f"{100 * level:+.0f}", below[rate], level=level),
        claim(f"activated parameters fall, {at}: LLM alone / routed", less, activated, **ratio),
        claim(f"so does the full cost, {at}: LLM alone / routed", "not counted", full, **ratio),
    ]
    activated_heading, full_heading = "activated: LLM / routed", "full: LLM / routed"
    headings = ("LLM tokens", "accuracy, %", "− LLM alone, points", "of the way, %", activated_heading, full_heading)
    return {"against_llm": (headings, rows), "against_llm_claims": (CLAIM, claims)}


def clock_tables(clock: Sequence[Mapping[str, Any]]) -> Tables:
    """Empty where nothing was timed."""
    rows, claims = [], []
    for timed in clock:
        ratios = timed["ratio"]
        for name, speed in timed["tokens_per_second"].items():
            rows.append([str(timed["batch"]), name, number(speed, 0), number(ratios[name])])
        text = f"routed is faster than the LLM alone, batch {timed['batch']}"
        claims.append(claim(text, PAPER_SPEED, ratios[ROUTED], "×", digits=2, sign="", level=1))
    return {
        "clock": (("batch", "", "tokens/s", "/ LLM only"), rows),
        "clock_claims": (CLAIM, claims),
        "clock_rate": f"{100 * clock[0]['llm_rate']:g}" if clock else "–",
        "turns": str(clock[0]["ratio"][ROUTED]["seeds"]) if clock else "–",
    }


def spread(entry: Mapping[str, Any], scale: float = 1, most: float | None = None) -> tuple[float, list[list[float]]]:
    """Mean and lengths of the error bar, which ends at `most` and at 0."""
    mean = entry["mean"]
    low, high = (mean if bound is None else bound for bound in entry["ci95"])
    low, high = max(0.0, low), high if most is None else min(most, high)
    return scale * mean, [[scale * (mean - low)], [scale * (high - mean)]]


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    costs = {"activated_parameters": "the paper's cost", "full_cost": "full cost"}
    frontier = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (key, name) in zip(frontier.subplots(1, 2, sharey=True), costs.items(), strict=True):
        for k, (policy, by_rate) in enumerate(results["frontier"].items()):
            for entry in by_rate.values():
                mean, bar = spread(entry["accuracy"], 100, most=1)
                axis.errorbar(entry[key]["mean"] / 1e6, mean, bar, color=f"C{k}", capsize=3)
            means = [(entry[key]["mean"] / 1e6, 100 * entry["accuracy"]["mean"]) for entry in by_rate.values()]
            axis.plot(*zip(*means, strict=True), marker="o", color=f"C{k}", label=policy)
        axis.axhline(100 * results["frontier"][LLM][""]["accuracy"]["mean"], color="grey", linestyle=":")
        axis.set(xlabel=f"{name}, M parameters a token", ylim=(0, 102))
        axis.grid(alpha=0.3)
    frontier.axes[0].set(ylabel="accuracy, per cent")
    frontier.axes[1].legend(fontsize=8)

    both = Figure(figsize=(11, 4.2), layout="constrained")
    axes = both.subplots(1, 1 + len(results["clock"]), squeeze=False)[0]
    axes[0].barh([i - 0.2 for i in range(len(LABELS))], [100 * share for share in LABELS.values()], 0.4, label="paper")
    here = [spread(results["labels"][name], 100)[0] for name in LABELS]
    axes[0].barh([i + 0.2 for i in range(len(LABELS))], here, 0.4, label="here")
    axes[0].set(yticks=range(len(LABELS)), yticklabels=list(LABELS), xlabel="per cent of the tokens", title="labels")
    axes[0].invert_yaxis()
    axes[0].legend()
    for axis, timed in zip(axes[1:], results["clock"], strict=True):
        for name, entry in timed["tokens_per_second"].items():
            mean, bar = spread(entry)
            axis.barh(name.replace(" (", "\n("), mean, xerr=bar, capsize=3, color="C0")
        axis.set(xlabel="tokens/s", title=f"batch {timed['batch']}")
        axis.invert_yaxis()
    return {"routing_frontier.png": frontier, "routing_labels_clock.png": both}


if __name__ == "__main__":
    main(*TrlParser((RoutingLedgerArguments,)).parse_args_and_config())
