r"""Rollout estimate of the critical token of wrong answers (arXiv 2411.19943v3): the costly reference of the contrast.

    tokalign score rollout --model meta-llama/Meta-Llama-3-8B --engine vllm --dtype bfloat16 \
        --dataset runs/pairs --output_dir runs/rollout_estimate --max_rows 200

reads preference pairs with an `answer` column and continues every prefix of every rejected completion `n` times. Adds
`rejected_rollout_accuracy` (share of right continuations a token), `critical_index` (−1: none), `with_correct` and
`without_correct` (right ones of `n` fresh continuations with and without the critical token; −1: none) and
`rollout_tokens` (tokens through the model). Writes the pass@k figure beside the stage. On many GPUs:
`tokalign score rollout … --accelerate_config ddp`, or `accelerate launch -m tokalign score rollout …`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokalign.generation.arguments import EngineArguments
from tokalign.generation.engines import load_engine
from tokalign.generation.protocol import cut_at_stop
from tokalign.rewards import answers_match, extract_answer
from tokalign.signals.job import PairsArguments, load_pairs, run_scoring
from tokalign.signals.rollout import estimated_rows, summarise
from tokalign.stage.errors import ContractError
from tokalign.stage.manifest import manifest_of, stop_strings
from tokalign.stage.processes import process_state


@dataclass(kw_only=True)
class Arguments(PairsArguments):
    """The estimate."""

    n: int = field(default=64, metadata={"help": "Continuations a prefix."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the continuations."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the continuations."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a continuation."})
    stop: list[str] | None = field(
        default=None,
        metadata={"help": "Strings that end a continuation; unset is those that ended the rollouts, by the manifest."},
    )
    threshold: float = field(default=0.05, metadata={"help": "Scores after the critical token stay below this."})
    seed: int = field(default=0, metadata={"help": "Fixes all continuations."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows; the estimate is costly."})
    shard_size: int = field(default=8, metadata={"help": "Rows a shard: what a kill can lose."})


def main(arguments: Arguments, engine_arguments: EngineArguments) -> None:
    state = process_state()
    engine = load_engine(engine_arguments)
    rows = load_pairs(arguments, engine.tokenizer)
    if "answer" not in rows.column_names:
        raise ContractError(f"{arguments.dataset} has no column `answer` to verify continuations with; add it by `id`.")
    rows = rows.select(range(min(len(rows), arguments.max_rows or len(rows))))
    sampling: dict[str, Any] = {key: getattr(arguments, key) for key in ("n", "temperature", "top_p", "max_tokens")}
    stop = stop_strings(manifest_of(rows)) if arguments.stop is None else arguments.stop
    sampling["stop"] = tuple(stop or ())

    def estimate(batch: list[dict[str, Any]]) -> Iterable[Any]:
        return estimated_rows(
            batch,
            engine,
            lambda text, answer: answers_match(extract_answer(cut_at_stop(text, sampling["stop"])), answer),
            sampling,
            threshold=arguments.threshold,
            seed=arguments.seed,
        )

    run_scoring(
        estimate,
        arguments,
        rows,
        engine.tokenizer,
        name="rollout_estimate",
        signals=["rollout_accuracy"],
        weights={"model": engine_arguments.model, "adapter": engine_arguments.adapter},
        parameters={
            **sampling,
            "threshold": arguments.threshold,
            "seed": arguments.seed,
            "engine": engine_arguments.engine,
            "dtype": engine_arguments.dtype,
        },
    )
    engine.close()
    if state.is_main_process:
        summarise(arguments.output_dir, arguments.n)
