r"""Answer problems with a small and a large model and verify the answers: the `rollouts` stage, with who wrote what.

Reads a `problems` stage and writes the columns of `tokalign sample` and `written_by` (1 where the LLM wrote the token),
`scores` (the policy's; null where the SLM was not asked) and the work of both models (`handoffs`, `slm_positions`,
`llm_positions`). The manifest sums them up under `routing`: LLM rate, costs in parameters a token and tokens/s.
`tokalign label --on_policy` labels this stage; `tokalign evaluate routing` compares policies by it.

    tokalign generate --slm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --llm deepseek-ai/DeepSeek-R1-Distill-Qwen-32B \
        --router runs/router --dataset runs/problems --output_dir runs/routed --temperature 0 --max_tokens 8192

On several GPUs `tokalign generate … --accelerate_config ddp`, or `accelerate launch -m tokalign generate …`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokalign.prompts import recorded_beside, rendering_of
from tokalign.rewards import answers_match, extract_answer
from tokalign.routing.decode.arguments import PairArguments, RoutedSamplingArguments
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies.named import PolicyName, named_policy
from tokalign.routing.decode.rollouts import pair_parameters, routed_sampler, routing_summary
from tokalign.stage.hashes import model_identity
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import write_manifest
from tokalign.stage.processes import process_state


@dataclass
class GenerateArguments:
    """Problems, who decides, and where the answers go."""

    dataset: str = field(metadata={"help": "Problems stage: folder or hub id."})
    output_dir: str = field(metadata={"help": "Folder of the stage that is written."})
    policy: PolicyName = field(
        default="router", metadata={"help": "Who decides; `always` and `never` are the two models alone."}
    )
    rate: float | None = field(default=None, metadata={"help": "policy=random: share of the tokens for the LLM."})
    back: float | None = field(
        default=None, metadata={"help": "policy=hysteresis: the LLM stops at this doubt of its own; unset: threshold."}
    )
    most: int | None = field(default=None, metadata={"help": "policy=hysteresis: most LLM tokens in a row."})
    value_head: str | None = field(default=None, metadata={"help": "policy=value: safetensors file of the head."})
    calls: list[str] | None = field(
        default=None, metadata={"help": "policy=call: TOKEN=NUMBER, how many tokens the LLM writes at a call."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    num_problems: int | None = field(default=None, metadata={"help": "Take the first problems only."})
    shard_size: int = field(default=64, metadata={"help": "Problems a shard: one batch, and what a kill loses."})
    max_rows: int = field(default=256, metadata={"help": "Most rows in one batch."})


def main(pair: PairArguments, sampling: RoutedSamplingArguments, arguments: GenerateArguments) -> dict[str, Any]:
    state = process_state()
    options = {name: getattr(arguments, name) for name in ("rate", "back", "most", "value_head", "calls")}
    if pair.verify and (arguments.back is not None or arguments.most is not None):
        raise ValueError(
            "--back and --most say how long the LLM writes, and with --verify it writes 1 token behind each draft: "
            "leave them out."
        )
    policy = named_policy(arguments.policy, router=pair.router, threshold=pair.threshold, **options)
    if arguments.value_head is not None:
        options["value_head"] = hashlib.sha256(Path(arguments.value_head).read_bytes()).hexdigest()
    problems = load_stage(arguments.dataset, split=arguments.split, stage="problems")
    if arguments.num_problems is not None:
        problems = problems.select(range(min(arguments.num_problems, len(problems))))
    models = {"slm": pair.slm, "llm": pair.llm, "router": pair.router}
    hashes = {name: model_identity(path) for name, path in models.items()}
    # Another policy than the router has taken the threshold for itself
    own = {"threshold": pair.threshold if policy is None else None, "max_rows": arguments.max_rows}
    generator = RoutedGenerator.from_pretrained(**{**vars(pair), **own}, policy=policy)
    rendering = rendering_of(
        sampling,
        generator.tokenizer,
        recorded=generator.prompts or recorded_beside(pair.slm, pair.llm),
        of="the router's labels" if generator.prompts else "the models' training",
        folder=arguments.output_dir,
    )
    manifest = run_job(
        routed_sampler(
            generator,
            sampling.params,
            extract=extract_answer,
            match=answers_match,
            seed=sampling.seed,
            rendering=rendering,
            max_prompt_length=sampling.max_prompt_length,
        ),
        problems,
        arguments.output_dir,
        name="generate_routed",
        parameters={
            **sampling.parameters(rendering),
            **{name: getattr(arguments, name) for name in ("policy", "rate", "split")},
            **{name: value for name, value in options.items() if value is not None},
            **({} if pair.score == "argmax" else {"score": pair.score}),
            **({"verify": True, "most_draft": pair.most_draft} if pair.verify else {}),
            "llm_span": pair.llm_span,
            "dtype": pair.dtype,
            "threshold": generator.policy.threshold,
            "weights": hashes,
        },
        tokenizer=generator.tokenizer,
        shard_size=arguments.shard_size,
        prompts=rendering.record(generator.tokenizer),
        extra_manifest={"models": {key: {"path": models[key], "weights_hash": hashes[key]} for key in hashes}},
    )
    if state.is_main_process:
        routing = routing_summary(arguments.output_dir, manifest, pair_parameters(generator))
        manifest = {**manifest, "routing": routing}
        write_manifest(arguments.output_dir, manifest)
    return manifest
