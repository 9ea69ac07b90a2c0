"""Preference rows, trainers and a plain-loop oracle that the trainer tests share."""

from __future__ import annotations

import math
import random

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokalign.trainers import CriticalTokenDPOTrainer

WEIGHT = {  # a token's weight from its signal, written out
    "contrast": lambda s: 1.0 - s,
    "rollout_accuracy": lambda s: 1.0 - s,
    "entropy": lambda h: 1.0 - math.exp(-h),
    "logprob": lambda logp: 1.0 - math.exp(logp),
    "token_reward": lambda r: 0.5 - r,
    "implicit_reward": lambda r: 0.5 - r,
}
LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def preference_rows(path: str, count: int = 8, *, seed: int = 0, zero_scores: bool = False) -> list[dict]:
    """Contract rows of different lengths, with a random score for each token of both sides."""
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for i in range(count):
        prompt = [{"role": "user", "content": f"{rng.randrange(10 ** rng.randrange(1, 5))}+{rng.randrange(99)}?"}]
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        row = {"id": f"p{i}", "prompt": prompt, "prompt_ids": tokenizer(rendered)["input_ids"]}
        for side in ("chosen", "rejected"):
            text = f"It is {rng.randrange(10 ** rng.randrange(1, 7))}."
            row[side] = text
            row[f"{side}_ids"] = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            row[f"{side}_contrast"] = [0.0 if zero_scores else rng.random() for _ in row[f"{side}_ids"]]
        rows.append(row)
    return rows


def with_signals(rows: list[dict], seed: int = 5) -> list[dict]:
    """The rows with every other signal of `WEIGHT` too, random over most of its range, on both sides."""
    draw = random.Random(seed)
    kinds = {
        "rollout_accuracy": draw.random,
        "entropy": lambda: draw.choice([0.0, 6.0 * draw.random()]),
        "logprob": lambda: -draw.choice([0.0, 14.0 * draw.random()]),
        "token_reward": lambda: draw.random() - 0.5,
        "implicit_reward": lambda: draw.random() - 0.5,
    }
    columns = [
        (f"{side}_{name}", f"{side}_ids", kind) for name, kind in kinds.items() for side in ("chosen", "rejected")
    ]
    return [row | {column: [kind() for _ in row[ids]] for column, ids, kind in columns} for row in rows]


def as_text(rows: list[dict]) -> Dataset:
    """The same pairs as TRL's conversational text, which TRL tokenises to the same ids."""
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    )


def settings(output_dir, **changes) -> dict:
    return (
        dict(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,
            beta=0.5,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=3,
        )
        | changes
    )


def make_trainer(
    path, output_dir, rows, *, method=CriticalTokenDPOTrainer, lora=False, eval_rows=None, moved=False, **changes
):
    """A trainer on `rows`; with `moved`, its policy has left the reference by a fixed random step."""
    trainer = method(
        model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
        args=method._config_class(**settings(output_dir, **changes)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    if moved:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


def first_batch(trainer, count: int = 4) -> dict:
    """The collated first rows of the prepared train dataset."""
    columns = [c for c in trainer.train_dataset.column_names if c not in ("id", "prompt", "chosen", "rejected")]
    return trainer.data_collator([trainer.train_dataset.select_columns(columns)[i] for i in range(count)])


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def truncate(
    row: dict, side: str, max_length: int | None, mode: str, signal: str = "contrast"
) -> tuple[list[int], list[int], list[float]]:
    """ids, completion flags and signal of one sequence after truncation, written out."""
    ids = row["prompt_ids"] + row[f"{side}_ids"]
    flags = [0] * len(row["prompt_ids"]) + [1] * len(row[f"{side}_ids"])
    scores = [0.0] * len(row["prompt_ids"]) + list(row[f"{side}_{signal}"])
    if max_length is not None and len(ids) > max_length:
        cut = slice(0, max_length) if mode == "keep_start" else slice(len(ids) - max_length, None)
        ids, flags, scores = ids[cut], flags[cut], scores[cut]
    return ids, flags, scores


def token_logps(model, ids: list[int]) -> torch.Tensor:
    """log π(id_t | ids before t) for t ≥ 1 from the full logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def released_weight(side: str, token: int, score: float, end: int) -> float:
    """A token's weight in the released code: the end token counts in full; a chosen one by its score, not by 1 − it."""
    return 1.0 if token == end else score if side == "chosen" else 1.0 - score


def plain_loop(
    trainer, reference, rows, *, sides=("rejected",), max_length=None, mode="keep_start", sft=0.0
) -> torch.Tensor:
    """−log σ(β Σ ρ⁺ − β Σ w ρ⁻), token by token and one sequence at a time, plus `sft` × the chosen NLL."""
    losses, nll, tokens = [], 0.0, 0
    for row in rows:
        margin = torch.zeros(())
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            ids, flags, scores = truncate(row, side, max_length, mode, trainer.args.signal)
            policy = token_logps(trainer.model, ids)
            with torch.no_grad(), reference() as model:
                frozen = token_logps(model, ids)
            for t in range(1, len(ids)):
                if flags[t]:
                    weight = WEIGHT[trainer.args.signal](scores[t]) if side in sides else 1.0
                    if side in sides and trainer.args.end_token_weight is not None:
                        weight = released_weight(side, ids[t], scores[t], trainer._tokenizer.eos_token_id)
                    margin = margin + sign * trainer.beta * weight * (policy[t - 1] - frozen[t - 1])
                    if side == "chosen":
                        nll, tokens = nll - policy[t - 1], tokens + 1
        losses.append(-torch.nn.functional.logsigmoid(margin))
    loss = torch.stack(losses).mean()
    return loss + sft * nll / tokens if sft else loss
