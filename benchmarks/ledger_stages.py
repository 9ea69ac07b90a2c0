"""What the experiments on the ledger world run: every command of this package that they call, and only here.

Each stage is a command line that a user would type (tokalign/cli/stages.py prints and keeps them). A stage that is
finished is not run again, so a killed experiment goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokalign.cli.evaluate_structured import EvaluateStructuredArguments, OptionalEngineArguments
from tokalign.cli.evaluate_structured import main as evaluate_structured_main
from tokalign.cli.ledger_models import base_model
from tokalign.cli.quickstart import logp_curve
from tokalign.cli.stages import Stages

__all__ = ["MAX_TOKENS", "TDPO", "LedgerStages", "WorldArguments", "logp_curve"]

MAX_TOKENS = 96
SIDES = ("positive", "negative")
TDPO = "benchmarks/peers/tdpo.py"


@dataclass
class WorldArguments:
    """Which ledger world an experiment is made in, and whether its seeds share their models."""

    world: str = field(
        default="plain", metadata={"help": "'plain', or 'rich': many ways to say a thing, and sure errors."}
    )
    base_per_seed: bool = field(
        default=False, metadata={"help": "A base of its own for each seed; else all start from that of seed 0."}
    )

    def ledger_model(self, preset: str, seed: int, given: str | None = None) -> str:
        """Folder of a trained preset for a seed of the experiment, from the cache (trained first); `given` instead."""
        return given or str(base_model(preset, world=self.world, seed=seed if self.base_per_seed else 0))


def early_model(folder: Path) -> Path:
    """A weak base that was stopped early in its training, as `folder`/model: short runs wait for no large model."""
    stages = LedgerStages(folder)
    world = stages.problems(folder / "world", sft=8000)
    start = {"model_name_or_path": world / "ledger-slm", "dataset_name": world / "sft"}
    return stages.recipe("model", "sft", "base_slm", **start, max_steps=250)


def flags(**options: Any) -> list[Any]:
    """Options as on a command line; None leaves one out, a list has several words."""
    words: list[Any] = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [value])]
    return words


class LedgerStages(Stages):
    """The stages of one folder; each method runs one and returns the folder that it has written."""

    recipes = "ledger"  # folder of recipes/ that holds the settings

    def __init__(self, folder: Path, world: str = "plain"):
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.folder, self.world = folder, world

    def job(self, verb: str, output: Path, **options: Any) -> Path:
        """Run a verb into `output`, by which the stage is known."""
        self.run(str(output.relative_to(self.folder)), verb, *flags(output_dir=output, **options))
        return output

    def recipe(self, name: str, recipe: str, config: str, **options: Any) -> Path:
        """Train by a verb (or the path of a script) with a YAML of the recipes."""
        output = self.folder / name.replace(", ", "_").replace(" ", "_")
        self.train(name, recipe, output, *flags(config=f"recipes/{self.recipes}/{config}.yaml", **options))
        return output

    def problems(self, output: Path, *, seed: int = 0, **options: Any) -> Path:
        """Problems by split; a split without a size gets one."""
        sizes = dict.fromkeys(("train", "validation", "test", "sft"), 1)
        world = {} if self.world == "plain" else {"world": self.world}
        return self.job("data ledger", output, **(sizes | {"seed": seed} | world | options))

    def pairs(self, base: str, *, problems: int, rollouts: int, seed: int) -> Path:
        """Problems of the train split, rollouts of the base, and pairs of right and wrong ones."""
        world, out = self.problems(self.folder / "world", seed=seed, train=problems), self.folder
        options = {"model": base, "dataset": world / "train", "num_rollouts": rollouts, "max_tokens": MAX_TOKENS}
        sampled = self.job("sample", out / "rollouts", **options, seed=seed)
        self.job("pairs", out / "preferences", dataset=sampled, seed=seed)
        return out / "preferences" / "pairs"

    def contrast(self, base: str, dataset: Path, seed: int) -> Path:
        """Contrastive scores by two adapters, trained on the right and on the wrong rollouts of `pairs`."""
        adapters = {}
        for side in SIDES:
            data = {"model_name_or_path": base, "dataset_name": self.folder / "preferences" / side}
            adapters[side] = self.recipe(side, "sft", f"{side}_sft", **data, seed=seed)
        output = self.folder / "scored"
        return self.job("score contrast", output, model=base, dataset=dataset, **adapters)

    def likelihood(self, name: str, model: str, dataset: Path, *signals: str, adapter: Path | None = None) -> Path:
        """Log-prob, entropy or the implicit reward of an adapter against its base; `name` is of the folder."""
        options = {"model": model, "adapter": adapter, "signals": signals, "dataset": dataset}
        return self.job("score likelihood", self.folder / name, **options)

    def token_rewards(self, model: str, dataset: Path) -> Path:
        """Self-generated token rewards by contrastive prompting."""
        options = {"model": model, "dataset": dataset, "templates": "ledger"}
        return self.job("score token-reward", self.folder / "rewarded", **options)

    def rollout_estimate(self, base: str, dataset: Path, *, rows: int, continuations: int, seed: int) -> Path:
        """Share of right continuations behind every prefix of the first wrong answers, and their critical token."""
        sizes = {"max_rows": rows, "n": continuations, "max_tokens": MAX_TOKENS, "seed": seed}
        output = self.folder / "estimate"
        return self.job("score rollout", output, model=base, dataset=dataset, **sizes)

    def first_errors(self, base: str, dataset: Path) -> Path:
        """The true first wrong token of every wrong answer."""
        options = {"dataset": dataset, "tokenizer": base, "problems": self.folder / "world" / "train"}
        return self.job("score first-error", self.folder / "marked", **options)

    def evaluation(self, name: str, model: str, problems: Path, **options: Any) -> Path:
        """Greedy and sampled accuracy on problems: metrics.json."""
        options |= {"model": model, "problems": problems, "split": "train", "max_tokens": MAX_TOKENS}
        return self.job("evaluate answers", self.folder / "evaluation" / name, **options)

    def structured_evaluation(
        self, name: str, model: Path, adapter: Path | None, problems: Path, **settings: Any
    ) -> dict[str, Any]:
        """Figures of structured answers to problems; the job keeps its rows itself."""
        output = str(self.folder / "evaluation" / name)
        return evaluate_structured_main(
            EvaluateStructuredArguments(output_dir=output, problems=str(problems), **settings),
            OptionalEngineArguments(model=str(model), adapter=adapter and str(adapter)),
        )

    def routing_labels(self, slm: str, llm: str, problems: Path, seed: int) -> Path:
        """Labels by outcome: does the LLM, going on behind the SLM's token, still reach the right answer?"""
        options = {"model": llm, "slm": slm, "verdict": "outcome", "dataset": problems, "max_tokens": MAX_TOKENS}
        return self.job("label", self.folder / "labels", **options, shard_size=512, seed=seed)

    def routed(self, name: str, slm: str, llm: str, problems: Path, seed: int, **policy: Any) -> Path:
        """Answers of a pair under a policy."""
        output = self.folder / "routed" / name.replace(" ", "_")
        options = {"slm": slm, "llm": llm, "dataset": problems, "max_tokens": MAX_TOKENS, "shard_size": 256}
        return self.job("generate", output, **options, seed=seed, **policy)


if __name__ == "__main__":
    early_model(Path(sys.argv[1]))
