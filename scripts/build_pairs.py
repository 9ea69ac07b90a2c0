"""Build preference pairs and the positive and negative SFT sets from verified rollouts, by the answer-frequency rule.

Reads a `rollouts` stage and writes three: `<output_dir>/pairs` (preferences), `<output_dir>/positive` and
`<output_dir>/negative` (SFT rows that `SFTTrainer` takes without tokenising again). See `tokalign/data/pairing.py`.

python scripts/build_pairs.py --dataset runs/rollouts --output_dir runs/pairing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl import TrlParser

from tokalign.data.contract import content_hash, load_stage
from tokalign.data.pairing import (
    PairingOptions,
    Row,
    Selection,
    check_something_left,
    group_consecutive,
    negative_rows,
    positive_rows,
    preference_pairs,
)
from tokalign.jobs import Dropped, Kept, process_state, run_job
from tokalign.rewards import extract_answer

COLUMNS = (
    *("id", "prompt", "answer", "prompt_ids", "completion_ids", "completion", "finish_reason", "correct", "extracted"),
)


@dataclass
class BuildPairsArguments:
    """Arguments of pairing."""

    dataset: str = field(metadata={"help": "Rollouts stage: folder or hub id; a problem's rows are contiguous."})
    output_dir: str = field(metadata={"help": "Folder of the three stages."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    coverage: float = field(
        default=0.5, metadata={"help": "Share of a problem's incorrect samples that its chosen wrong answers cover."}
    )
    max_pairs_per_problem: int | None = field(default=None, metadata={"help": "Most pairs of one problem."})
    include_unparsable: bool = field(
        default=False, metadata={"help": "Count a wrong rollout without an answer as one more wrong answer."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random trajectories."})
    shard_size: int = field(default=512, metadata={"help": "Problems a shard."})


def main(arguments: BuildPairsArguments) -> dict[str, dict[str, Any]]:
    state = process_state()
    rollouts = load_stage(arguments.dataset, split=arguments.split, stage="rollouts")
    rollouts = rollouts.select_columns([column for column in COLUMNS if column in rollouts.column_names])
    problems = group_consecutive(rollouts, "id")
    problems.info.description = rollouts.info.description  # the stage's manifest: its tokenizer is theirs
    options = PairingOptions(
        coverage=arguments.coverage,
        max_pairs_per_problem=arguments.max_pairs_per_problem,
        include_unparsable=arguments.include_unparsable,
        seed=arguments.seed,
    )

    def answer_of(rollout: Row) -> str | None:
        return rollout["extracted"] if "extracted" in rollout else extract_answer(rollout["completion"])

    stages: dict[str, Callable[[list[Row]], Selection]] = {
        "pairs": partial(preference_pairs, options=options, answer_of=answer_of),
        "positive": partial(positive_rows, options=options),
        "negative": partial(negative_rows, options=options, answer_of=answer_of),
    }
    parameters = {**vars(options), "rollouts": content_hash(rollouts) if state.is_main_process else None}
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
