"""Structured problems with rollouts that are known beforehand, so that rewards, advantages and losses can be checked.

`table_rollouts` stands for sampling: the k-th completion of a prompt is the k-th of DOCUMENTS, whatever process asks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tokalign.trainers import StructuredGRPOConfig, StructuredGRPOTrainer
from tokalign.worlds import ledger
from tokalign.worlds.ledger_models import model_config

CONFIG = ledger.LedgerConfig(min_events=2, max_events=2, max_start=9, max_change=9, max_number=40)
KINDS = ("right", "wrong answer", "no answer", "text after")  # a group


def save_ledger_model(path: str | Path, *, seed: int = 0) -> str:
    """An untrained ledger model with its tokenizer; it can spell JSON, and vLLM takes its heads."""
    tokenizer = ledger.build_tokenizer(CONFIG)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(model_config("ledger-slm", tokenizer)).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_byte_level_model(path: str | Path, *, seed: int = 0) -> str:
    """An untrained Llama with a GPT-2-like tokenizer, whose entries spell their own bytes; vLLM takes its heads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(model_config("ledger-slm", tokenizer)).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def short_problems(count: int) -> list[dict[str, Any]]:
    """Problems with two schemas in turn, whose documents are so short that a random model can finish them."""
    keys = ("a", "b")
    return [
        {
            "prompt": [{"role": "user", "content": f"Give {keys[i % 2]}."}],
            "schema": json.dumps(
                {
                    "type": "object",
                    "properties": {keys[i % 2]: {"enum": [1, 2]}},
                    "required": [keys[i % 2]],
                    "additionalProperties": False,
                }
            ),
        }
        for i in range(count)
    ]


def problems(count: int) -> list[dict[str, Any]]:
    """Structured problems of the ledger world."""
    return [
        {
            "id": problem.identity,
            "prompt": [{"role": "user", "content": ledger.prompt(problem, rendering="json")}],
            "answer": ledger.solution(problem, rendering="json"),
            "schema": json.dumps(ledger.JSON_SCHEMA),
        }
        for problem in ledger.problems("train", count, seed=0, config=CONFIG)
    ]


def document(answer: str, kind: str) -> str:
    """A completion of a kind for a problem with this right document."""
    made = json.loads(answer)
    if kind == "wrong answer":
        made["answer"] = (made["answer"] + 1) % 40
    elif kind == "no answer":
        del made["answer"]
    return json.dumps(made) + (" All have 1 coins." if kind == "text after" else "")


class TableRollouts:
    """A TRL rollout function that looks completions up. It takes groups of len(KINDS) that lie next to each other."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.answers = {row["prompt"][0]["content"]: row["answer"] for row in rows}

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        made: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        for number, prompt in enumerate(prompts):
            text = document(self.answers[prompt[0]["content"]], KINDS[number % len(KINDS)])
            made["prompt_ids"].append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            made["completion_ids"].append([*ids, tokenizer.eos_token_id])
        return made


def odd_length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells even random completions apart: there is something to learn from."""
    return [float(len(ids) % 7) for ids in completion_ids]


class ByToken:
    """A token credit that differs from token to token, and from prompt to prompt."""

    __name__ = "by_token"
    mode = "advantage"

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[token % 3 - 1.0 for token in ids] for ids in completion_ids]


def settings(output_dir: str | Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_generations": len(KINDS),
        "max_completion_length": 48,
        "save_strategy": "no",
        "seed": 3,
    } | changes


def make_trainer(path: str, output_dir: str | Path, *, table: bool = True, **options: Any) -> StructuredGRPOTrainer:
    """A trainer on 16 problems, their completions known with `table`. Options are the trainer's or the config's."""
    rows = options.pop("rows", None) or problems(16)
    of_trainer = (
        "reward_funcs",
        "reward_processing_classes",
        "credit_funcs",
        "peft_config",
        "eval_dataset",
        "callbacks",
    )
    given = {name: options.pop(name) for name in (*of_trainer, "callbacks") if name in options}
    return StructuredGRPOTrainer(
        model=path,
        args=StructuredGRPOConfig(**settings(output_dir, **options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        rollout_func=TableRollouts(rows) if table else None,
        **given,
    )
