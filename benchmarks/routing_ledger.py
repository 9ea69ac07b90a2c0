r"""Token routing in the ledger world, from labels to served accuracy: the paper's figure in miniature.

    python benchmarks/routing_ledger.py                       # both base models from the cache, or trained first

SLM 0.16 M parameters, LLM 3.05 M (1:19). Labels by outcome on fresh problems; a neural router, a linear one and one on
the entropy alone; random and query-level routing. Each policy's threshold is set so that it *serves* an LLM rate on
validation problems; then all are compared on held-out problems: accuracy with 95 % intervals, the paper's cost and the
full one. Then the clock: SLM only, LLM only and routed on the same engine in turns, and transformers' assisted
generation with the same pair, at batch 1 and 16. A killed run goes on where it stopped. Writes results.json and
routing.png to `output_dir`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from ledger_stages import LEDGER, MAX_TOKENS, stages_in, write_json
from rich.console import Console
from rich.table import Table
from trl import TrlParser

from tokalign.data.contract import load_stage, read_manifest
from tokalign.data.ledger_models import trained_model
from tokalign.data.prompts import render_prompt
from tokalign.evaluation.routing import plot_routing, print_routing, query_level, run_summary
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.generator import RoutedGenerator
from tokalign.routing.model import TokenRouter
from tokalign.routing.policies import AlwaysLLM, EntropyPolicy, NeverLLM, RouterPolicy, RoutingPolicy
from tokalign.routing.served_rate import served_threshold

ROUTERS = {
    "neural router": (),
    "linear router": ("--architecture", "linear", "--learning_rate", 1e-2),
    "entropy": ("--architecture", "linear", "--inputs", "entropy", "--learning_rate", 1e-1),
}


@dataclass
class Arguments:
    """Sizes of the experiment."""

    slm: str | None = field(default=None, metadata={"help": "Instead of the cached ledger-slm."})
    llm: str | None = field(default=None, metadata={"help": "Instead of the cached ledger-llm."})
    train_problems: int = field(default=3000, metadata={"help": "Problems that are labelled."})
    validation_problems: int = field(default=300, metadata={"help": "Problems on which rates are set."})
    test_problems: int = field(default=1000, metadata={"help": "Held-out problems."})
    rates: list[float] = field(default_factory=lambda: [0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.25])
    clock_rate: float = field(default=0.08, metadata={"help": "LLM rate of the timed runs; one of `rates`."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    clock_problems: int = field(default=64, metadata={"help": "Problems of the timed runs (batch 1: an eighth)."})
    repeats: int = field(default=5, metadata={"help": "Turns of the timed runs; medians are reported."})
    seed: int = 0
    output_dir: str = "runs/benchmarks/routing_ledger"


def label_and_train(stages: Any, out: Path, slm: str, llm: str, arguments: Arguments) -> dict[str, Path]:
    """Problems, labels and the three routers."""
    world = out / "world"
    sizes = ("--train", arguments.train_problems, "--validation", arguments.validation_problems)
    sizes += ("--test", arguments.test_problems, "--sft", 1)
    stages.run("problems", "data/ledger.py", "--output_dir", world, *sizes, "--seed", arguments.seed)
    stages.run(
        *("labels", "scripts/label_routing.py", "--model", llm, "--slm", slm, "--dataset", world / "train"),
        *("--output_dir", out / "labels", "--max_tokens", MAX_TOKENS, "--verdict", "outcome", "--shard_size", 512),
        *("--seed", arguments.seed),
    )
    routers = {}
    for name, options in ROUTERS.items():
        routers[name] = out / "routers" / name.replace(" ", "_")
        stages.train(
            *(name, "recipes/router.py", routers[name], "--config", f"{LEDGER}/router.yaml"),
            *("--dataset_name", out / "labels" / "labels", "--slm", slm, "--seed", arguments.seed, *options),
        )
    return routers


def served_thresholds(
    routers: dict[str, Path], slm: str, llm: str, world: Path, arguments: Arguments
) -> dict[str, dict[float, float]]:
    """For every policy the threshold that serves each rate on validation problems."""
    thresholds: dict[str, dict[float, float]] = {}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for name, folder in routers.items():
        if name == "entropy":  # the threshold in nats: the router on entropy alone is a monotone function of it
            policy: RoutingPolicy = EntropyPolicy(1.0)
        else:
            policy = RouterPolicy(TokenRouter.from_pretrained(folder), 0.5)
        generator = RoutedGenerator.from_pretrained(slm, llm, policy=policy)
        problems = load_stage(world / "validation", split="train")["prompt"]
        prompts = [render_prompt(prompt, generator.tokenizer) for prompt in problems]
        thresholds[name] = {}
        for rate in sorted(arguments.rates):
            found = served_threshold(generator, prompts, params, rate)
            policy.threshold = found.threshold  # where the search for the next rate begins
            thresholds[name][rate] = found.threshold
    return thresholds


def evaluate(
    stages: Any,
    out: Path,
    slm: str,
    llm: str,
    routers: dict[str, Path],
    thresholds: dict[str, dict[float, float]],
    arguments: Arguments,
) -> dict[str, list[dict[str, Any]]]:
    """Every policy at every rate on the test problems."""

    def routed(name: str, *options: Any) -> Path:
        folder = out / "routed" / name.replace(" ", "_")
        stages.run(
            *(name, "scripts/generate_routed.py", "--slm", slm, "--llm", llm, "--dataset", out / "world" / "test"),
            *("--output_dir", folder, "--max_tokens", MAX_TOKENS, "--shard_size", 256, "--seed", arguments.seed),
            *options,
        )
        return folder

    alone = {"SLM only": routed("SLM only", "--policy", "never"), "LLM only": routed("LLM only", "--policy", "always")}
    points = {name: [run_summary(folder, alone["LLM only"])] for name, folder in alone.items()}
    for name, by_rate in thresholds.items():
        points[name] = []
        for rate, threshold in by_rate.items():
            options = ("--policy", "entropy") if name == "entropy" else ("--router", routers[name])
            folder = routed(f"{name} {rate:g}", *options, "--threshold", threshold)
            points[name].append(run_summary(folder, alone["LLM only"]))
    points["random"] = [
        run_summary(routed(f"random {rate:g}", "--policy", "random", "--rate", rate), alone["LLM only"])
        for rate in arguments.rates
    ]
    points["query-level"] = query_level(alone["SLM only"], alone["LLM only"], arguments.rates)
    return points


def clock(
    slm: str, llm: str, router: Path, threshold: float, world: Path, arguments: Arguments
) -> list[dict[str, Any]]:
    """Tokens a second of each way in turns, at each batch size; the same prompts and greedy decoding for all."""
    policies: dict[str, RoutingPolicy] = {
        "SLM only": NeverLLM(),
        "LLM only": AlwaysLLM(),
        "routed": RouterPolicy(TokenRouter.from_pretrained(router), threshold),
    }
    problems = load_stage(world / "test", split="train")["prompt"]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    results = []
    for batch in arguments.batch_sizes:
        count = arguments.clock_problems if batch > 1 else max(1, arguments.clock_problems // 8)
        ways: dict[str, Callable[[], int]] = {}
        for name, policy in policies.items():
            generator = RoutedGenerator.from_pretrained(slm, llm, policy=policy, max_rows=batch)
            prompts = [render_prompt(prompt, generator.tokenizer) for prompt in problems[:count]]
            ways[name] = lambda g=generator, p=prompts: sum(len(c.token_ids) for (c,) in g.generate(p, params))
        if batch == 1:  # assisted generation takes one sequence at a time
            pair = RoutedGenerator.from_pretrained(slm, llm, policy=AlwaysLLM())
            ways["assisted generation (transformers)"] = lambda p=prompts, g=pair: assisted(g, p)
            ways["LLM only (transformers generate)"] = lambda p=prompts, g=pair: assisted(g, p, assistant=False)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens: dict[str, int] = {}
        for turn in range(arguments.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens[name] = way()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        speeds = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
        results.append({"batch": batch, "problems": count, "tokens_per_second": speeds, "tokens": tokens})
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


def print_clock(results: list[dict[str, Any]]) -> None:
    table = Table("batch", "way", "tokens/s", "/ LLM only", title="wall-clock, same process, in turns")
    for result in results:
        for name, speed in result["tokens_per_second"].items():
            ratio = speed / result["tokens_per_second"]["LLM only"]
            table.add_row(str(result["batch"]), name, f"{speed:,.0f}", f"{ratio:.2f}")
    Console().print(table)


def main(arguments: Arguments) -> dict[str, Any]:
    started = time.perf_counter()
    out = Path(arguments.output_dir)
    stages = stages_in(out)
    slm, llm = arguments.slm or str(trained_model("ledger-slm")), arguments.llm or str(trained_model("ledger-llm"))
    routers = label_and_train(stages, out, slm, llm, arguments)
    thresholds = served_thresholds(routers, slm, llm, out / "world", arguments)
    points = evaluate(stages, out, slm, llm, routers, thresholds, arguments)
    rate = min(arguments.rates, key=lambda r: abs(r - arguments.clock_rate))
    threshold = thresholds["neural router"][rate]
    clocked = clock(slm, llm, routers["neural router"], threshold, out / "world", arguments)
    tests = {name: read_json(folder / "report.json") for name, folder in routers.items()}
    result = {
        "arguments": asdict(arguments),
        "labels": read_json(out / "labels" / "report.json"),
        "routers": tests,
        "thresholds": {name: {f"{r:g}": t for r, t in by.items()} for name, by in thresholds.items()},
        "points": points,
        "clock": clocked,
        "parameters": read_manifest(out / "routed" / "SLM_only")["routing"]["parameters"],
        "seconds": round(time.perf_counter() - started, 1),
        "stages": stages.done,
    }
    write_json(out / "results.json", result)
    plot_routing(points, out / "routing.png")
    print_routing(points)
    print_clock(clocked)
    return result


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(*TrlParser((Arguments,)).parse_args_and_config())
