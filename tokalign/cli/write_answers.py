r"""Answer a file of instructions and write the answers as text, in the form that AlpacaEval 2 reads.

The questions are `alpaca_eval.json`, or any JSON list or JSON lines with `instruction` or `prompt`. The answers go to
`<output_dir>/<name>.json`; the work is a rollouts stage beside it, `<name>.work/`, where a killed run goes on.

    tokalign write-answers --questions alpaca_eval.json --output_dir runs/alpaca_eval --name llama-3-8b-treg \
        --model runs/treg --engine vllm

On several GPUs `tokalign write-answers … --accelerate_config ddp`, or `accelerate launch -m tokalign write-answers …`.
docs/reward_pairs.md says how AlpacaEval 2 and Arena-Hard go on from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from tokalign.evaluation.instructions import answer_entries, as_problems, read_questions
from tokalign.generation import Engine, EngineArguments, SamplingParams, load_engine
from tokalign.generation.arguments import engine_identities
from tokalign.generation.rollouts import sampler
from tokalign.prompts import TemplateArguments, recorded_beside, rendering_of
from tokalign.rewards import answers_match, extract_answer
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_text_atomically
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.processes import process_state


@dataclass
class WriteAnswersArguments(TemplateArguments):
    """The questions, how they are answered, and where the answers go."""

    questions: str = field(metadata={"help": "alpaca_eval.json, or another JSON file with `instruction` or `prompt`."})
    output_dir: str = field(metadata={"help": "Folder of the answer file."})
    name: str = field(metadata={"help": "The model's name in the benchmark's tables, and of the answer file."})
    limit: int | None = field(default=None, metadata={"help": "Answer the first questions only."})
    system_prompt: str | None = field(default=None, metadata={"help": "System message before every question."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus kept while sampling."})
    max_tokens: int = field(default=4096, metadata={"help": "Most tokens of an answer."})
    seed: int = field(default=0, metadata={"help": "Seed of sampled answers."})
    shard_size: int = field(default=64, metadata={"help": "Questions a shard: one engine call, and what a kill loses."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.name).name != self.name:
            raise ContractError(f"--name is {self.name!r}; it names the answer file, so leave out any folder.")


def main(arguments: WriteAnswersArguments, engine_arguments: EngineArguments) -> Path:
    """Write the answer file; returns its path."""
    state = process_state()
    questions = read_questions(arguments.questions)[: arguments.limit]
    work = Path(arguments.output_dir) / f"{arguments.name}.work"
    tokenizer = AutoTokenizer.from_pretrained(
        engine_arguments.tokenizer or engine_arguments.model, trust_remote_code=engine_arguments.trust_remote_code
    )
    recorded = recorded_beside(engine_arguments.adapter, engine_arguments.model)
    rendering = rendering_of(arguments, tokenizer, recorded=recorded, folder=work)
    identities = engine_identities(engine_arguments)
    models = {key: {"path": getattr(engine_arguments, key), "weights_hash": identities[key]} for key in identities}
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}
    engines: list[Engine] = []

    def answer(rows: list[dict[str, Any]]) -> list[Any]:
        if not engines:  # loaded by the first unfinished shard: a finished run loads no model
            engines.append(load_engine(engine_arguments))
        params = SamplingParams(**sampling)
        verify: dict[str, Any] = {"extract": extract_answer, "match": answers_match}
        return sampler(engines[0], params, seed=arguments.seed, rendering=rendering, **verify)(rows)

    try:
        manifest = run_job(
            answer,
            Dataset.from_list(as_problems(questions, arguments.system_prompt)),
            work,
            name="write_answers",
            parameters={
                **sampling,
                "system_prompt": arguments.system_prompt,
                "seed": arguments.seed,
                "engine": engine_arguments.engine,
                "dtype": engine_arguments.dtype,
                "weights": identities,
            },
            tokenizer=tokenizer,
            shard_size=arguments.shard_size,
            prompts=rendering.record(tokenizer),
            extra_manifest={"models": models},
        )
    finally:
        for engine in engines:
            engine.close()
    file = Path(arguments.output_dir) / f"{arguments.name}.json"
    if state.is_main_process:
        rollouts = load_stage(work).to_list()
        entries = answer_entries(questions, rollouts, arguments.name)
        write_text_atomically(file, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
        cut = sum(rollout["finish_reason"] == "length" for rollout in rollouts)
        print(f"{len(rollouts)} of {manifest['rows_in']} answered, {cut} cut by max_tokens; {file}")
    return file
