r"""Token routing (R2R, arXiv 2505.21600) on a real model and problems that people wrote, by seed.

    python -m benchmarks.experiments.real_routing --data path/to/data --output_dir runs/benchmarks/real_routing

A pair of one family that needs no second download: SmolLM2-135M-Instruct (`--model`), warmed up on worked solutions of
SVAMP, is the LLM. A third of its layers, evenly spaced, is the SLM, which learns to write again from answers of the LLM
(*healed*). Without the warm-up the LLM rambles. Its own answers are the reference, to training and test problems alike,
since it solves too few for labels by the right answer: a token is divergent if the LLM, going on behind it, no longer
reaches what it answers by itself, and the accuracy of a policy is its *agreement* with the LLM alone. How many answers
are right by the data set is written beside it.

Everything else is the ledger world's experiment (benchmarks/experiments/routing_ledger.py): labels, routers, LLM rates,
policies at equal rate. Two differences save time: thresholds come from the scores on held-out answers, not from
decoding (the rates that are served follow, and policies are compared between them), and nothing is timed. A seed has
its own problems, LLM, SLM, labels and routers. Each is a cell of its own, which processes that were started alike
share, made of stages that a killed run keeps. Writes results.json after each seed; docs/results/routing.md shows it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from benchmarks.experiments import routing_ledger
from benchmarks.experiments.common import SMOLLM2, fast_products, kept
from benchmarks.experiments.dishonest import DATA
from benchmarks.experiments.real_reasoning import SYSTEM, RealStages
from benchmarks.experiments.routing_ledger import LLM, POLICIES, ROUTERS, SLM, RoutingSeed, sizes, summarise
from benchmarks.ledger_stages import MAX_TOKENS
from benchmarks.render import Tables, percent, save
from tokalign.evaluation.routing import load_run
from tokalign.rewards import answers_match
from tokalign.routing.router.calibration import score_dataset
from tokalign.routing.router.features import RouterDataset
from tokalign.routing.router.model import TokenRouter
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.statistics import over_seeds

WRITING = {"max_tokens": MAX_TOKENS, "token_budget": 16384}  # larger batches are no faster on a CPU and fill its memory
ROUTER_BATCH = 128  # tokens a step: there are some thousands of labels, in the paper 7.6 million


@dataclass
class RealRoutingArguments:
    """Sizes of the experiment."""

    output_dir: str = field(
        default="runs/benchmarks/real_routing", metadata={"help": "Folder of all results; a killed run goes on."}
    )
    model: str = field(default=SMOLLM2, metadata={"help": "Hub id or folder of an instruct model."})
    data: str | None = field(default=None, metadata={"help": f"Folder with svamp/; unset is the variable {DATA}."})
    seeds: int = field(default=3, metadata={"help": "Seeds 0, 1, …"})
    warm_problems: int = field(default=250, metadata={"help": "Problems of the LLM's warm-up."})
    warm_epochs: int = field(default=2, metadata={"help": "Epochs of the warm-up."})
    layer_share: float = field(default=1 / 3, metadata={"help": "Share of the LLM's layers that the SLM keeps."})
    heal_problems: int = field(
        default=400, metadata={"help": "Problems whose answers heal the SLM, the warm-up's too."}
    )
    heal_answers: int = field(default=2, metadata={"help": "Answers of the LLM to each of them."})
    heal_epochs: int = field(default=3, metadata={"help": "Epochs over them."})
    train_problems: int = field(default=190, metadata={"help": "Other problems, which are labelled."})
    test_problems: int = field(default=120, metadata={"help": "Test problems a seed."})
    rates: list[float] = field(default_factory=lambda: [0.06, 0.12, 0.24], metadata={"help": "LLM rates."})

    def __post_init__(self) -> None:
        self.data = self.data or os.environ.get(DATA)
        if self.data is None:
            raise ValueError(f"The public data sets are not known: give --data, or set {DATA} to their folder.")


class PairStages(RealStages):
    """Stages that fit a real vocabulary into a laptop's memory."""

    def routing_labels(self, slm: str, llm: str, problems: Path, seed: int) -> Path:
        """Labels by outcome of at most four differences an answer; the others have none."""
        options = {"model": llm, "slm": slm, "verdict": "outcome", "dataset": problems, **WRITING, "seed": seed}
        options |= {"max_branches_per_answer": 4, "prefill_token_budget": 4096}
        # the thresholds are read off the calibration split, the routers' figures off the test split
        options |= {"calibration_share": 0.2, "test_share": 0.2}
        return self.job("label", self.folder / "labels", **options)

    def routed(self, name: str, slm: str, llm: str, problems: Path, seed: int, **policy: Any) -> Path:
        """Answers of the pair under a policy."""
        output = self.folder / "routed" / name.replace(" ", "_")
        return self.job("generate", output, slm=slm, llm=llm, dataset=problems, **WRITING, seed=seed, **policy)


class RealRoutingSeed(RoutingSeed):
    """One seed: problems, LLM, SLM, then what the ledger's seed does with them."""

    def __init__(self, args: Any, seed: int):
        self.args, self.seed = args, seed
        self.out = Path(args.output_dir) / f"seed-{seed}"
        self.stages = PairStages(self.out)
        self.world = self.out / "world"
        self.llm, self.slm = str(self.out / "llm"), str(self.out / "slm")

    def run(self) -> dict[str, Any]:
        """Everything that results.json needs of a seed."""
        self.problems()
        self.models()
        for part in ("train", "test"):
            self.with_own_answers(part)
        self.label_and_train()
        points = self.points()
        return {
            "points": points,
            "labels": self.label_shares(),
            "routers": {name: self.router_figures(name) for name in ROUTERS},
            "right": {name: {key: self.right(name, key) for key in points[name]} for name in self.decoded(points)},
            "parameters": sizes(self),
        }

    def problems(self) -> None:
        """The stages `warm`, `heal`, `train` and `test` of problems, with the data set's answers."""
        args, options = self.args, {"prompt_style": "messages", "split_seed": self.seed}
        svamp = self.stages.job("data svamp", self.out / "svamp", source=f"{args.data}/svamp", **options)

        def rows(split: str) -> Dataset:
            columns = load_stage(svamp, split=split).select_columns(["id", "prompt", "answer", "completion"])
            return columns.map(lambda row: {"prompt": [SYSTEM, *row["prompt"]]}).shuffle(seed=self.seed)

        train, heal = rows("train"), args.heal_problems
        parts = {
            "warm": train.select(range(args.warm_problems)),
            "heal": train.select(range(heal)),
            "train": train.select(range(heal, min(heal + args.train_problems, len(train)))),
            "test": rows("test").select(range(args.test_problems)),
        }
        for name, part in parts.items():
            parameters = {"seed": self.seed, "rows": len(part)}
            run_job(lambda batch: batch, part, self.out / "problems" / name, name="problems", parameters=parameters)

    def models(self) -> None:
        """The LLM after its warm-up, and the SLM: some of its layers, trained on its answers."""
        args, problems = self.args, self.out / "problems"
        start = {"model_name_or_path": args.model, "dataset_name": problems / "warm"}
        self.stages.recipe("llm", "sft", "warm_up", **start, num_train_epochs=args.warm_epochs, seed=self.seed)
        options = {"model": self.llm, "dataset": problems / "heal", "num_rollouts": args.heal_answers}
        sampled = self.stages.job("sample", self.out / "sampled", **options, **WRITING, seed=self.seed)
        text = self.out / "text"
        run_job(sft_rows, load_stage(sampled), text, name="the LLM's answers", parameters={"seed": self.seed})
        write_some_layers(self.llm, self.out / "cut", args.layer_share)
        start = {"model_name_or_path": self.out / "cut", "dataset_name": text}
        self.stages.recipe("slm", "sft", "heal", **start, num_train_epochs=args.heal_epochs, seed=self.seed)

    def with_own_answers(self, part: str) -> None:
        """`world/{part}`: problems whose `answer` is the LLM's own, those left out where it gives none."""
        problems = self.out / "problems" / part
        options = {"model": self.llm, "dataset": problems, "num_rollouts": 1, "temperature": 0, **WRITING}
        folder = self.stages.job("sample", self.out / "own" / part, **options)
        own = dict(zip((rows := load_stage(folder))["id"], rows["extracted"], strict=True))

        def answered(batch: list[dict[str, Any]]) -> list[Any]:
            return [{**p, "answer": own[p["id"]]} if own[p["id"]] else Dropped("no answer of the LLM") for p in batch]

        parameters = {"seed": self.seed, "rows": len(own)}
        run_job(answered, load_stage(problems), self.world / part, name="own answers", parameters=parameters)

    def label_and_train(self) -> None:
        """Labels by outcome, and the routers."""
        folder = self.stages.routing_labels(self.slm, self.llm, self.world / "train", self.seed)
        data = {"dataset_name": folder / "labels", "slm": self.slm, "seed": self.seed}
        data["per_device_train_batch_size"] = ROUTER_BATCH
        for name, options in ROUTERS.items():
            self.stages.recipe(f"routers/{name}", "router", "router", **data, **options)

    def thresholds(self, name: str) -> dict[float, float]:
        """LLM rate -> the threshold that so many tokens of held-out answers reach; of the entropy in nats."""
        held_out = RouterDataset(self.out / "labels" / "labels" / "calibration", invalid=True)
        if name == "entropy":
            scores = held_out.__getitems__(range(len(held_out)))["entropy"].numpy()
        else:
            router = TokenRouter.from_pretrained(self.router(name))
            router.attach_embedding_of(self.slm, np.unique(held_out.predicted_ids()))
            scores = score_dataset(router, held_out)
        return {rate: float(np.quantile(scores, 1 - rate)) for rate in sorted(self.args.rates)}

    def decoded(self, points: Mapping[str, Any]) -> list[str]:
        """The policies that wrote answers: query-level routing only chooses between two."""
        return [name for name in points if name != "query-level"]

    def right(self, name: str, rate: str) -> float:
        """Share of the answers that are right by the data set."""
        file = {SLM: SLM, LLM: LLM}.get(name, f"{name} {rate}").replace(" ", "_")
        gold = dict(zip((rows := load_stage(self.out / "problems" / "test"))["id"], rows["answer"], strict=True))
        run, _ = load_run(self.out / "routed" / file)
        return float(np.mean([answers_match(row["extracted"], gold[row["id"]]) for row in run]))


def sft_rows(rollouts: list[dict[str, Any]]) -> list[Any]:
    """Finished answers as rows that `SFTTrainer` takes as they are, the loss on the answer alone."""
    return [
        {
            "id": row["id"],
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
        }
        if row["finish_reason"] == "stop"
        else Dropped("cut off")
        for row in rollouts
    ]


def evenly_spaced(layers: int, share: float) -> list[int]:
    """Which of `layers` to keep: `share` of them, at least two, the first and the last among them."""
    return np.linspace(0, layers - 1, max(2, round(share * layers))).round().astype(int).tolist()


def write_some_layers(model: str, output: Path, share: float) -> None:
    """Write to `output` the model with a share of its layers, everything else as it is, and its tokenizer."""
    large = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = evenly_spaced(large.config.num_hidden_layers, share)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [large.config.layer_types[layer] for layer in layers]
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    number = re.compile(r"(?<=\.layers\.)\d+(?=\.)")

    weights = large.state_dict()
    small.load_state_dict(
        {name: weights[number.sub(lambda found: str(layers[int(found[0])]), name)] for name in small.state_dict()}
    )
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    small.save_pretrained(output)


# -------------------------------------------------------------------------------------------------------------- results


def results_of(args: RealRoutingArguments, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the experiment writes, over the seeds that are there."""
    right = [seed["right"] for seed in seeds]
    return {
        "arguments": asdict(args) | {"seeds": len(seeds), "model": Path(args.model).name},
        "parameters": seeds[0]["parameters"],
        "clock": [],
        "right": {
            name: {rate: over_seeds([r[name][rate] for r in right]) for rate in right[0][name]} for name in right[0]
        },
        **summarise(seeds, args.rates),
    }


def main(args: RealRoutingArguments) -> dict[str, Any]:
    """Seed by seed; results.json has those that are complete from the first on."""
    settings = {key: value for key, value in asdict(args).items() if key not in ("output_dir", "data", "seeds")}
    settings["model"] = Path(args.model).name
    names = [f"seed-{seed}" for seed in range(args.seeds)]

    def write(found: Mapping[str, Any]) -> dict[str, Any] | None:
        complete = [found[name] for name in itertools.takewhile(found.__contains__, names)]
        return save(args.output_dir, results_of(args, complete), tables) if complete else None

    cells = {name: RealRoutingSeed(args, seed).run for seed, name in enumerate(names)}
    found = kept(cells, Path(args.output_dir) / "cells", settings=settings, after=write)
    results = write(found)
    assert results is not None
    return results


# ------------------------------------------------------------------------------------------------- what the page shows

PICTURE = "real_routing_frontier.png"


def tables(results: dict[str, Any]) -> Tables:
    """The ledger's tables, where accuracy is agreement, and how many answers are right by the data set."""
    rates = [f"{rate:g}" for rate in results["arguments"]["rates"]]
    right, decoded = results["right"], [policy for policy in POLICIES if policy in results["right"]]
    rows = [[f"{100 * float(rate):g} %", *(percent(right[policy][rate]) for policy in decoded)] for rate in rates]
    return routing_ledger.tables(results) | {
        "right": (("LLM tokens", *decoded), rows),
        "seeds": str(results["arguments"]["seeds"]),
        "slm_right": percent(right[SLM][""]),
        "llm_right": percent(right[LLM][""]),
        **{name: str(results["arguments"][name]) for name in ("warm_problems", "heal_problems", "heal_answers")},
        "picture": f"![Agreement against both costs](figures/{PICTURE})",
    }


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Agreement against both costs."""
    frontier = routing_ledger.figures(results)["routing_frontier.png"]
    frontier.axes[0].set_ylabel("agreement with the LLM, per cent")
    return {PICTURE: frontier}


if __name__ == "__main__":
    with fast_products():
        main(*TrlParser((RealRoutingArguments,)).parse_args_and_config())
