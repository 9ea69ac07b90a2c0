"""Small inputs on which every offline job runs for a second or two, and the jobs on them.

Problems and solutions of the ledger world, two small models with random weights (wide enough that greedy choices are no
ties), adapters and a judge. Rollouts are written rather than sampled: random models have no right answers.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from faults import Job, finish, start
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from tokalign.prompts import render_prompt
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.worlds import ledger
from tokalign.worlds.ledger_models import model_config

PROBLEMS = 64
MAX_TOKENS = "16"


@dataclass(frozen=True)
class Inputs:
    """Folder with `world`, `json`, `rollouts`, `preferences`, the models and `questions.json`."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name)


def make_inputs(folder: Path) -> Inputs:
    """Write what the jobs read; a folder that is there is used as it is."""
    inputs = Inputs(folder)
    if (folder / "done").exists():
        return inputs
    folder.mkdir(parents=True, exist_ok=True)
    sizes = ("--train", str(PROBLEMS), "--validation", "8", "--test", "8", "--sft", "8")
    world = Job("world", "data/ledger.py", ("--output_dir", "{out}", *sizes))
    finish(start(world, folder / "world"), world, folder / "world")
    structured = Job("json", world.script, (*world.arguments, "--problem_rendering", "json"))
    finish(start(structured, folder / "json"), structured, folder / "json")
    tokenizer = ledger.build_tokenizer()
    _write_models(folder, tokenizer)
    _write_rollouts(folder, tokenizer)
    pairs = Job("pairs", "scripts/build_pairs.py", ("--dataset", inputs.rollouts, "--output_dir", "{out}"))
    finish(start(pairs, folder / "preferences"), pairs, folder / "preferences")
    questions = [{"instruction": row["prompt"][0]["content"]} for row in load_stage(folder / "world" / "train")]
    (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    (folder / "done").touch()
    return inputs


def _write_models(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for seed, (name, preset) in enumerate((("slm", "ledger-slm"), ("llm", "ledger-llm"))):
        torch.manual_seed(seed)
        config = model_config(preset, tokenizer)
        config.initializer_range = 0.2
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for seed, name in enumerate(("positive", "negative")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / "slm"), lora).save_pretrained(folder / name)
    config = model_config("ledger-slm", tokenizer)
    config.num_labels = 1
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")


def _write_rollouts(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Two right and two wrong solutions of every problem, as scripts/sample_rollouts.py writes them."""

    def answer(rows):
        for row in rows:
            problem, draw = ledger.Problem.from_json(row["ledger"]), random.Random(row["id"])
            prompt, rollouts = render_prompt(row["prompt"], tokenizer), []
            for sample in range(4):
                right = sample % 2 == 0
                text = ledger.solution(problem) if right else ledger.wrong_solution(problem, draw)
                ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                logprobs = [-draw.random() for _ in ids]
                answered = text.rsplit("####", 1)[1].strip()
                rollout = {"completion_ids": ids, "completion": text, "finish_reason": "stop", "logprobs": logprobs}
                more = {"prompt_ids": prompt, "sample": sample, "extracted": answered, "correct": right}
                rollouts.append({key: row[key] for key in ("id", "prompt", "answer")} | more | rollout)
            yield rollouts

    problems: Dataset = load_stage(folder / "world" / "train")
    run_job(answer, problems, folder / "rollouts", name="solutions", parameters={}, tokenizer=tokenizer)


def jobs_on(inputs: Inputs) -> list[Job]:
    """Every offline job of scripts/ and a builder of data/."""
    pairs = ("--dataset", inputs.preferences + "/pairs")
    problems = ("--dataset", inputs.world + "/train")
    small, to = ("--model", inputs.slm), ("--output_dir", "{out}")
    few = ("--max_tokens", MAX_TOKENS)
    pair = ("--slm", inputs.slm, *problems, "--stop", "e", "1", *to, "--max_tokens", MAX_TOKENS)
    both = ("--positive", inputs.positive, "--negative", inputs.negative)

    def script(name: str, *arguments: str, shard: int, files: tuple[str, ...] = ()) -> Job:
        return Job(name, f"scripts/{name}.py", (*arguments, "--shard_size", str(shard)), files)

    def score(name: str, what: str, *arguments: str, shard: int) -> Job:
        return Job(name, "scripts/score.py", (what, *arguments, "--shard_size", str(shard)))

    return [
        Job(
            "ledger", "data/ledger.py", (*to, "--train", "2000", "--validation", "400", "--test", "400", "--sft", "900")
        ),
        script("sample_rollouts", *small, *problems, *to, *few, "--num_rollouts", "2", shard=4),
        script("build_pairs", "--dataset", inputs.rollouts, *to, shard=2),
        score("score_contrast", "contrast", *small, *both, *pairs, *to, shard=4),
        score(
            "score_likelihood", "likelihood", *small, "--adapter", inputs.positive, *LIKELIHOODS, *pairs, *to, shard=4
        ),
        script("score_rewards", "--dataset", inputs.rollouts, "--reward_model", inputs.judge, *to, shard=8),
        score("score_token_rewards", "token-reward", *small, "--templates", "ledger", *pairs, *to, shard=4),
        score("rollout_estimate", "rollout", *small, *pairs, *to, *few, "--n", "2", "--max_rows", "10", shard=1),
        Job(
            "mark_first_errors",
            "scripts/score.py",
            ("first-error", *pairs, "--problems", inputs.world + "/train", "--tokenizer", inputs.slm, *to),
        ),
        script(
            *("label_routing", "--model", inputs.llm, *pair, "--num_problems", "24"),
            shard=4,
            files=("prefill/features/*.safetensors",),
        ),
        script("generate_routed", "--llm", inputs.llm, *pair, "--policy", "random", "--rate", "0.3", shard=4),
        script(
            *("write_answers", *small, *to, *few, "--questions", f"{inputs.folder}/questions.json"),
            *("--name", "small"),
            shard=4,
            files=("small.json",),
        ),
        script("evaluate", *small, "--problems", inputs.world + "/train", "--split", "train", *to, *few, shard=4),
        script(
            *("evaluate_structured", *small, "--problems", inputs.json + "/train", "--split", "train", *to, *few),
            shard=4,
        ),
    ]


LIKELIHOODS = ("--signals", "logprob", "entropy", "implicit_reward")
