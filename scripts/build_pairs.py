"""Build preference pairs and SFT sets from rollouts. See `tokalign/data/pairing.py` for the two rules.

`--rule frequency` reads verified rollouts and writes three stages: `<output_dir>/pairs` (preferences),
`<output_dir>/positive` and `<output_dir>/negative` (SFT rows that `SFTTrainer` takes without tokenising again).
`--rule best_worst` reads rewarded rollouts (scripts/score_rewards.py) and writes `pairs`, each problem's best rollout
against its worst, and `positive`, the best ones.

python scripts/build_pairs.py --dataset runs/rollouts --output_dir runs/pairing
python scripts/build_pairs.py --rule best_worst --dataset runs/rewarded --output_dir runs/pairing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trl import TrlParser

from tokalign.data.pairing import (
    BestWorstOptions,
    PairingOptions,
    Row,
    Selection,
    best_rows,
    best_worst_pair,
    check_something_left,
    group_consecutive,
    negative_rows,
    positive_rows,
    preference_pairs,
)
from tokalign.rewards import extract_answer
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import content_hash
from tokalign.stage.jobs import Dropped, Kept, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state

READ = ("id", "prompt", "answer", "prompt_ids", "completion_ids", "completion", "finish_reason")
COLUMNS = {"frequency": (*READ, "correct", "extracted"), "best_worst": (*READ, "reward")}


@dataclass
class BuildPairsArguments:
    """Arguments of pairing."""

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
    seed: int = field(default=0, metadata={"help": "Seed of the random trajectories."})
    shard_size: int = field(default=512, metadata={"help": "Problems a shard."})


def stages_of(arguments: BuildPairsArguments) -> tuple[dict[str, Callable[[list[Row]], Selection]], dict[str, Any]]:
    """For each stage of the rule what it takes from one problem's rollouts; and the rule's parameters."""
    if arguments.rule == "best_worst":
        by_reward = BestWorstOptions(min_margin=arguments.min_margin, seed=arguments.seed)
        stages = {
            "pairs": partial(best_worst_pair, options=by_reward),
            "positive": partial(best_rows, options=by_reward),
        }
        return stages, {"rule": "best_worst", **vars(by_reward)}
    options = PairingOptions(
        coverage=arguments.coverage,
        max_pairs_per_problem=arguments.max_pairs_per_problem,
        include_unparsable=arguments.include_unparsable,
        seed=arguments.seed,
    )

    def answer_of(rollout: Row) -> str | None:
        return rollout["extracted"] if "extracted" in rollout else extract_answer(rollout["completion"])

    return {
        "pairs": partial(preference_pairs, options=options, answer_of=answer_of),
        "positive": partial(positive_rows, options=options),
        "negative": partial(negative_rows, options=options, answer_of=answer_of),
    }, vars(options)


def main(arguments: BuildPairsArguments) -> dict[str, dict[str, Any]]:
    state = process_state()
    rollouts = load_stage(arguments.dataset, split=arguments.split, stage="rollouts")
    if arguments.rule == "best_worst" and "reward" not in rollouts.column_names:
        raise ContractError(
            f"{arguments.dataset} has no column `reward`, which the rule best_worst needs; make it with "
            "scripts/score_rewards.py."
        )
    rollouts = rollouts.select_columns([name for name in COLUMNS[arguments.rule] if name in rollouts.column_names])
    problems = group_consecutive(rollouts, "id")
    problems.info.description = rollouts.info.description  # the stage's manifest: its tokenizer is theirs
    stages, options = stages_of(arguments)
    parameters = {**options, "rollouts": content_hash(rollouts) if state.is_main_process else None}
    manifests = {}
    for stage, select in stages.items():

        def build(groups: list[Row], select: Callable[[list[Row]], Selection] = select) -> Any:
            for group in groups:
                rows = rollouts.select(range(group["first"], group["first"] + group["count"])).to_list()
                selection = select(rows)
                if selection.reason is not None:
                    yield Dropped(selection.reason, selection.left_out)
                else:
                    yield Kept(selection.rows, selection.left_out)

        manifests[stage] = run_job(
            build,
            problems,
            Path(arguments.output_dir) / stage,
            name=f"build_pairs: {stage}",
            parameters=parameters,
            shard_size=arguments.shard_size,
            extra_manifest={"rollouts": len(rollouts)},
        )
        check_something_left(manifests[stage])
    return manifests


if __name__ == "__main__":
    parser = TrlParser(BuildPairsArguments)
    main(*parser.parse_args_and_config())
