"""Answer problems with a small and a large model and verify the answers: the `rollouts` stage, with who wrote what.

Reads a `problems` stage and writes the columns of scripts/sample_rollouts.py and `written_by` (1 where the LLM wrote
the token), `scores` (the policy's; null where the SLM was not asked) and the work of both models (`handoffs`,
`slm_positions`, `llm_positions`). The manifest sums them up under `routing`: LLM rate, costs in parameters a token and
tokens/s. On-policy labelling (scripts/label_routing.py) reads this stage; evaluation compares policies by it.

accelerate launch scripts/generate_routed.py \
    --slm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --llm deepseek-ai/DeepSeek-R1-Distill-Qwen-32B \
    --router runs/router --dataset runs/problems --output_dir runs/routed --temperature 0 --max_tokens 8192
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from trl import TrlParser

from tokalign.generation.protocol import Ids, SamplingParams
from tokalign.generation.rollouts import sampler
from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.costs import activated_parameters, full_cost
from tokalign.routing.decode.generator import RoutedCompletion, RoutedGenerator
from tokalign.routing.decode.policies import (
    AlwaysLLM,
    EntropyPolicy,
    NeverLLM,
    RandomPolicy,
    RouterPolicy,
    RoutingPolicy,
)
from tokalign.stage.hashes import weights_hash
from tokalign.stage.jobs import Dropped, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import write_manifest
from tokalign.stage.processes import process_state
from tokalign.stage.shards import shard_name

WORK = ("handoffs", "slm_positions", "llm_positions")


@dataclass
class GenerateRoutedArguments:
    """Arguments of routed generation."""

    slm: str = field(metadata={"help": "Small model: hub id or path."})
    llm: str = field(metadata={"help": "Large model with the same tokenizer: hub id or path."})
    dataset: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the stage that is written."})
    router: str | None = field(default=None, metadata={"help": "Trained router, for policy=router: hub id or path."})
    policy: Literal["router", "entropy", "random", "always", "never"] = field(
        default="router", metadata={"help": "Who decides; `always` and `never` are the two models alone."}
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "A token goes to the LLM from this score on: unset is the router's own; entropy: nats."},
    )
    rate: float | None = field(default=None, metadata={"help": "policy=random: share of the tokens for the LLM."})
    llm_span: int = field(default=1, metadata={"help": "Most tokens that the LLM writes before it asks the SLM."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_problems: int | None = field(default=None, metadata={"help": "Take the first problems only."})
    num_rollouts: int = field(default=1, metadata={"help": "Completions a problem."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus kept while sampling."})
    max_tokens: int = field(default=512, metadata={"help": "Most tokens of a completion."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts are dropped and counted; unset is what both models can hold."}
    )
    prompt_format: Literal["chat", "raw"] = field(
        default="chat",
        metadata={"help": "`chat` renders a prompt by the chat template, `raw` encodes a string as it is."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all completions."})
    shard_size: int = field(default=64, metadata={"help": "Problems a shard: one batch, and what a kill loses."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."}
    )
    attn_implementation: Literal["sdpa", "eager"] | None = field(
        default=None, metadata={"help": "Attention kernel of transformers."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "Device of the SLM, e.g. `cuda:0`, or `auto`; unset is this process's device."}
    )
    llm_device_map: str | None = field(default=None, metadata={"help": "Likewise for the LLM; unset is device_map."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the checkpoints. Only for sources you trust."}
    )
    token_budget: int = field(
        default=65536, metadata={"help": "Most rows x (prompt + max_tokens) in one batch; bounds both KV caches."}
    )
    max_rows: int = field(default=256, metadata={"help": "Most rows in one batch."})


def chosen_policy(arguments: GenerateRoutedArguments) -> RoutingPolicy | None:
    """The policy, None for a router's; ValueError for arguments that do not belong to it, or that it lacks."""
    needs = {"router": {"router"}, "entropy": {"threshold"}, "random": {"rate"}, "always": set(), "never": set()}
    takes = needs[arguments.policy] | ({"threshold"} if arguments.policy == "router" else set())
    for name in ("router", "threshold", "rate"):
        given = getattr(arguments, name) is not None
        if given and name not in takes:
            raise ValueError(f"--{name} does not belong to --policy {arguments.policy}: leave one of them out.")
        if not given and name in needs[arguments.policy]:
            raise ValueError(f"--policy {arguments.policy} needs --{name}: give it, or choose another policy.")
    if arguments.policy == "entropy":
        return EntropyPolicy(arguments.threshold)
    if arguments.policy == "random":
        return RandomPolicy(arguments.rate)
    return {"always": AlwaysLLM(), "never": NeverLLM()}.get(arguments.policy)


class _Recorder:
    """The generator as an engine that keeps its last completions, for the columns that plain rollouts do not have."""

    def __init__(self, generator: RoutedGenerator):
        self.tokenizer, self.max_length = generator.tokenizer, generator.max_length
        self.generator = generator
        self.last: list[list[RoutedCompletion]] = []

    def generate(self, prompts: Sequence[Ids], params: Sequence[SamplingParams]) -> list[list[RoutedCompletion]]:
        self.last = self.generator.generate(prompts, params)
        return self.last


def routed_sampler(
    generator: RoutedGenerator, params: SamplingParams, **options: Any
) -> Callable[[list[dict]], list[list[dict] | Dropped]]:
    """`tokalign.generation.rollouts.sampler` of a pair, with who wrote what."""
    recorder = _Recorder(generator)
    sample = sampler(recorder, params, **options)

    def routed(problems: list[dict[str, Any]]) -> list[list[dict[str, Any]] | Dropped]:
        items = sample(problems)
        rows = [row for item in items if not isinstance(item, Dropped) for row in item]
        completions = [completion for each in recorder.last for completion in each]
        for row, completion in zip(rows, completions, strict=True):
            row["written_by"] = [int(by_llm) for by_llm in completion.written_by]
            row["scores"] = completion.scores
            for name in WORK:
                row[name] = getattr(completion.stats, name)
        return items

    return routed


def summary(folder: Path, manifest: dict[str, Any], parameters: dict[str, int]) -> dict[str, Any]:
    """LLM rate, costs and speed of a finished stage, read from its rows, whichever runs wrote them."""
    stats = RoutedStats()
    for index in range(manifest["shards"]):
        file = pq.ParquetFile(folder / shard_name(index, manifest["shards"]))
        for batch in file.iter_batches(batch_size=256, columns=["written_by", *WORK]) if manifest["rows"] else ():
            for row in batch.to_pylist():
                by_llm = sum(row["written_by"])
                stats += RoutedStats(len(row["written_by"]) - by_llm, by_llm, *[row[name] for name in WORK])
    report: dict[str, Any] = {"parameters": parameters, **asdict(stats)}
    if stats.tokens:
        report["llm_rate"] = stats.llm_rate
        report["activated_parameters"] = activated_parameters(stats, parameters["slm"], parameters["llm"])
        report["full_cost"] = full_cost(stats, parameters["slm"], parameters["llm"], parameters["router"])
        report["tokens_per_second"] = stats.tokens / max(manifest["seconds"], 1e-3)  # of one process
    return report


def main(arguments: GenerateRoutedArguments) -> dict[str, Any]:
    state = process_state()
    policy = chosen_policy(arguments)
    problems = load_stage(arguments.dataset, split=arguments.split, stage="problems")
    if arguments.num_problems is not None:
        problems = problems.select(range(min(arguments.num_problems, len(problems))))
    models = {"slm": arguments.slm, "llm": arguments.llm, "router": arguments.router}
    hashes: dict[str, str | None] = {}
    if state.is_main_process:  # only this process compares and writes them, and hashing 140 GB takes a while
        hashes = {name: path and weights_hash(path) for name, path in models.items()}
    generator = RoutedGenerator.from_pretrained(
        arguments.slm,
        arguments.llm,
        arguments.router,
        policy=policy,
        threshold=arguments.threshold if policy is None else None,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        llm_device_map=arguments.llm_device_map,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
        llm_span=arguments.llm_span,
        token_budget=arguments.token_budget,
        max_rows=arguments.max_rows,
    )
    determine = ("policy", "rate", "llm_span", "split", "num_rollouts", "temperature", "top_p", "max_tokens", "stop")
    determine += ("max_prompt_length", "prompt_format", "seed", "dtype")
    parameters = {name: getattr(arguments, name) for name in determine}
    parameters |= {"threshold": generator.policy.threshold, "weights": hashes}
    params = SamplingParams(
        n=arguments.num_rollouts,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop or ()),
    )
    manifest = run_job(
        routed_sampler(
            generator,
            params,
            extract=extract_answer,
            match=answers_match,
            seed=arguments.seed,
            prompt_format=arguments.prompt_format,
            max_prompt_length=arguments.max_prompt_length,
        ),
        problems,
        arguments.output_dir,
        name="generate_routed",
        parameters=parameters,
        tokenizer=generator.tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest={"models": {key: {"path": models[key], "weights_hash": hashes[key]} for key in hashes}},
    )
    if state.is_main_process:
        sizes = {"slm": generator.slm.num_parameters(), "llm": generator.llm.num_parameters(), "router": 0}
        if isinstance(generator.policy, RouterPolicy):
            sizes["router"] = generator.policy.router.num_parameters()
        manifest = {**manifest, "routing": summary(Path(arguments.output_dir), manifest, sizes)}
        write_manifest(arguments.output_dir, manifest)
    return manifest


if __name__ == "__main__":
    parser = TrlParser(GenerateRoutedArguments)
    main(*parser.parse_args_and_config())
