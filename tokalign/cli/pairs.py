r"""Build preference pairs and SFT sets from rollouts, by one of the two rules of `tokalign.data.pairing`.

`--rule frequency` reads verified rollouts and writes three stages: `<output_dir>/pairs` (preferences),
`<output_dir>/positive` and `<output_dir>/negative` (SFT rows that `SFTTrainer` takes without tokenising again).
`--rule best_worst` reads rewarded rollouts (`tokalign reward`) and writes `pairs`, each problem's best rollout against
its worst, and `positive`, the best ones.

    tokalign pairs --dataset runs/rollouts --output_dir runs/pairing
    tokalign pairs --rule best_worst --dataset runs/rewarded --output_dir runs/pairing

It computes little: one process is enough, though `accelerate launch -m tokalign pairs …` works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tokalign.data.pairing import BestWorstOptions, PairingOptions, write_pairs
from tokalign.rewards import extract_answer
from tokalign.stage.errors import refuse_unread
from tokalign.stage.loading import load_stage


@dataclass
class PairsArguments:
    """The rollouts, the rule, and where the pairs go."""

    dataset: str = field(metadata={"help": "Rollouts stage: folder or hub id; a problem's rows are contiguous."})
    output_dir: str = field(metadata={"help": "Folder of the stages."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    rule: Literal["frequency", "best_worst"] = field(
        default="frequency",
        metadata={"help": "`frequency`: frequent wrong answers against right ones; `best_worst`: by `reward`."},
    )
    coverage: float = field(
        default=0.5,
        metadata={"help": "frequency: share of a problem's incorrect samples that its chosen wrong answers cover."},
    )
    max_pairs_per_problem: int | None = field(default=None, metadata={"help": "frequency: most pairs of one problem."})
    include_unparsable: bool = field(
        default=False, metadata={"help": "frequency: count a wrong rollout without an answer as one more wrong answer."}
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "best_worst: the two rewards must be further apart than this."}
    )
    end_token: bool | None = field(
        default=None,
        metadata={
            "help": "Put the model's end token behind rollouts that a stop string ended; unset is for base models "
            "(prompts as they are, or no chat template)."
        },
    )
    end_token_id: int | None = field(
        default=None, metadata={"help": "The model's end token, where the rollouts' manifest does not say it."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random trajectories."})
    shard_size: int = field(default=512, metadata={"help": "Problems a shard."})

    def __post_init__(self) -> None:
        read = {
            "frequency": ("coverage", "max_pairs_per_problem", "include_unparsable"),
            "best_worst": ("min_margin",),
        }
        for rule, names in read.items():
            if rule != self.rule:
                refuse_unread(self, names, f"--rule {rule}")


def main(arguments: PairsArguments) -> dict[str, dict[str, Any]]:
    """Write the stages of the rule; returns their manifests."""
    options: PairingOptions | BestWorstOptions
    if arguments.rule == "best_worst":
        options = BestWorstOptions(min_margin=arguments.min_margin, seed=arguments.seed)
    else:
        options = PairingOptions(
            coverage=arguments.coverage,
            max_pairs_per_problem=arguments.max_pairs_per_problem,
            include_unparsable=arguments.include_unparsable,
            seed=arguments.seed,
        )
    return write_pairs(
        load_stage(arguments.dataset, split=arguments.split, stage="rollouts"),
        arguments.output_dir,
        options,
        extract=extract_answer,
        name=arguments.dataset,
        shard_size=arguments.shard_size,
        end_token=arguments.end_token,
        end_token_id=arguments.end_token_id,
    )
