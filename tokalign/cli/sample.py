r"""Sample completions of problems and verify them: the `rollouts` stage, first step of critical-token DPO and T-REG.

Reads a `problems` stage and writes N rows a problem, each with its ids, log-probs, finish reason, final answer and
whether that answer is right (both null where the problem's `answer` is null or empty). A problem's seed comes from
`--seed` and its id, so shards, processes and resumed runs give the same rows. Every process loads its own engine.

    tokalign sample --model meta-llama/Meta-Llama-3-8B-Instruct --engine vllm \
        --dataset runs/problems --output_dir runs/rollouts --num_rollouts 64 --temperature 1.0
    tokalign sample --config recipes/llama-3-8b/sample_rollouts.yaml --accelerate_config ddp

With a launcher: `accelerate launch -m tokalign sample …`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.arguments import SamplingArguments, engine_identities
from tokalign.generation.rollouts import sampler
from tokalign.prompts import recorded_beside, rendering_of
from tokalign.rewards import answers_match, extract_answer
from tokalign.stage.ids import answer_ends
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import SAMPLING
from tokalign.stage.processes import process_state


@dataclass
class SampleArguments:
    """The problems, and where their rollouts go."""

    dataset: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the rollouts stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_problems: int | None = field(default=None, metadata={"help": "Take the first problems only."})
    shard_size: int = field(default=64, metadata={"help": "Problems a shard: one engine call, and what a kill loses."})


def main(arguments: SampleArguments, sampling: SamplingArguments, engine_arguments: EngineArguments) -> dict[str, Any]:
    """Write the rollouts; returns the stage's manifest."""
    process_state()
    problems = load_stage(arguments.dataset, split=arguments.split, stage="problems")
    if arguments.num_problems is not None:
        problems = problems.select(range(min(arguments.num_problems, len(problems))))
    identities = engine_identities(engine_arguments)
    models = {key: {"path": getattr(engine_arguments, key), "weights_hash": identities[key]} for key in identities}
    engine = load_engine(engine_arguments)
    try:
        rendering = rendering_of(
            sampling,
            engine.tokenizer,
            recorded=recorded_beside(engine_arguments.adapter, engine_arguments.model),
            folder=arguments.output_dir,
        )
        return run_job(
            sampler(
                engine,
                sampling.params,
                extract=extract_answer,
                match=answers_match,
                seed=sampling.seed,
                rendering=rendering,
                max_prompt_length=sampling.max_prompt_length,
            ),
            problems,
            arguments.output_dir,
            name="sample_rollouts",
            parameters={
                **sampling.parameters(rendering),
                "split": arguments.split,
                "engine": engine_arguments.engine,
                "dtype": engine_arguments.dtype,
                "weights": identities,
            },
            tokenizer=engine.tokenizer,
            shard_size=arguments.shard_size,
            prompts=rendering.record(engine.tokenizer),
            extra_manifest={
                "models": models,
                SAMPLING: {
                    "stop": list(sampling.stop or []),
                    "end_ids": sorted(answer_ends(engine.tokenizer) | set(getattr(engine, "end_ids", ()))),
                    "end_token_id": engine.tokenizer.eos_token_id,
                    "base_model": engine.tokenizer.chat_template is None or rendering.format == "raw",
                },
            },
        )
    finally:
        engine.close()
