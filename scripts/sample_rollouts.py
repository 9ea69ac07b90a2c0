"""Sample completions of problems and verify them: the `rollouts` stage, first step of critical-token DPO and T-REG.

Reads a `problems` stage and writes N rows a problem, each with its ids, log-probs, finish reason, final answer and
whether that answer is right (both null where the problem's `answer` is null or empty). A problem's seed comes from
`--seed` and its id, so shards, processes and resumed runs give the same rows. Every process loads its own engine.

accelerate launch scripts/sample_rollouts.py \
    --model meta-llama/Meta-Llama-3-8B-Instruct --engine vllm \
    --dataset runs/problems --output_dir runs/rollouts --num_rollouts 64 --temperature 1.0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import TrlParser

from tokalign.generation import EngineArguments, load_engine
from tokalign.generation.protocol import SamplingParams
from tokalign.generation.rollouts import sampler
from tokalign.rewards import answers_match, extract_answer
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state


@dataclass
class SampleRolloutsArguments:
    """Arguments of sampling."""

    dataset: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the rollouts stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_problems: int | None = field(default=None, metadata={"help": "Take the first problems only."})
    num_rollouts: int = field(default=64, metadata={"help": "Completions a problem (paper: 64)."})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy. Paper: about 10 wrong answers a problem."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus kept while sampling."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped and counted; unset is what the model can hold."}
    )
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all rollouts."})
    shard_size: int = field(default=64, metadata={"help": "Problems a shard: one engine call, and what a kill loses."})


def main(arguments: SampleRolloutsArguments, engine_arguments: EngineArguments) -> dict[str, Any]:
    state = process_state()
    problems = load_stage(arguments.dataset, split=arguments.split, stage="problems")
    if arguments.num_problems is not None:
        problems = problems.select(range(min(arguments.num_problems, len(problems))))
    models = {"model": engine_arguments.model, "adapter": engine_arguments.adapter}
    hashes: dict[str, str | None] = {}
    if state.is_main_process:  # only this process compares and writes them, and hashing 140 GB takes a while
        for name, path in models.items():
            remote = path is None or (engine_arguments.engine == "openai" and not Path(path).is_dir())
            hashes[name] = path if remote else weights_hash(path)
    unset = ("dataset", "output_dir", "shard_size", "num_problems")
    parameters = {key: value for key, value in vars(arguments).items() if key not in unset}
    parameters |= {"engine": engine_arguments.engine, "dtype": engine_arguments.dtype, "weights": hashes}
    engine = load_engine(engine_arguments)
    params = SamplingParams(
        n=arguments.num_rollouts,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop or ()),
    )
    try:
        return run_job(
            sampler(
                engine,
                params,
                extract=extract_answer,
                match=answers_match,
                seed=arguments.seed,
                prompt_format=arguments.prompt_format,
                max_prompt_length=arguments.max_prompt_length,
            ),
            problems,
            arguments.output_dir,
            name="sample_rollouts",
            parameters=parameters,
            tokenizer=engine.tokenizer,
            shard_size=arguments.shard_size,
            extra_manifest={"models": {key: {"path": models[key], "weights_hash": hashes[key]} for key in hashes}},
        )
    finally:
        engine.close()


if __name__ == "__main__":
    parser = TrlParser((SampleRolloutsArguments, EngineArguments))
    main(*parser.parse_args_and_config())
