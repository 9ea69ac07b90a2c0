r"""What a step of structured GRPO costs with field credit beside one with sequence credit: time.

    python -m benchmarks.experiments.credit_step                        # CPU, 32k words
    python -m benchmarks.experiments.credit_step --device cuda --dtype bfloat16 --hidden_size 4096 --layers 32 \
        --vocab_size 128256 --batch_size 16

A step is sampling by the trained model itself (transformers), reward, credit, loss, backward and optimizer. The model
has random weights and would write nothing that has fields. So it samples as many tokens as a completion may have, which
takes its time, and a document stands in the place of each: the kinds of structured_credit.py, one each in a group of 8
(right, one fault, text around, broken off). Both trainers are in one process and take turns, and the median of the
pairs' ratios counts. The target is ≤ 1.05. Writes results.json to `output_dir`; speed.py judges it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from trl import TrlParser

from benchmarks.experiments.measure import in_turns, random_llama
from benchmarks.experiments.structured_credit import StructuredCreditArguments, kinds
from benchmarks.render import Tables, save
from tokalign.trainers import StructuredGRPOConfig, StructuredGRPOTrainer
from tokalign.worlds.ledger import JSON_SCHEMA
from tokalign.worlds.stand_in import train_tokenizer

GROUP = 8  # a completion of each kind
CREDITS = ("sequence", "field")


@dataclass
class CreditStepArguments:
    """Shape of the model and the batch, and how often to measure."""

    vocab_size: int = field(default=32000, metadata={"help": "Words of the model; the documents need 400 of them."})
    hidden_size: int = 256
    layers: int = 4
    batch_size: int = field(default=8, metadata={"help": "Completions a step, a multiple of 8."})
    size: int = field(default=500, metadata={"help": "Bytes of a flawless completion."})
    dtype: str = "float32"
    device: str = "cpu"
    pairs: int = field(default=11, metadata={"help": "Pairs of steps to time, after two to warm up."})
    output_dir: str = "runs/benchmarks/credit_step"


def make_step(arguments: CreditStepArguments, credit: str, folder: str) -> Callable[[], None]:
    """One training step with this credit, as a function to call again and again."""
    documents = kinds(StructuredCreditArguments(completions=arguments.batch_size, size=arguments.size, group=GROUP))
    *first, _ = documents.values()  # without those that have no reference
    pairs = [first[i % GROUP][i] for i in range(arguments.batch_size)]
    tokenizer = train_tokenizer([text for text, _ in documents["flawless"]], 400)
    written = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text, _ in pairs]
    longest = max(map(len, written))
    schema = json.dumps(JSON_SCHEMA)
    rows = [{"prompt": "Give the steps.", "schema": schema, "answer": reference} for _, reference in pairs]
    args = StructuredGRPOConfig(
        output_dir=f"{folder}/out",
        credit=[credit],
        num_generations=GROUP,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=1,
        max_completion_length=longest,
        generation_kwargs={"min_new_tokens": longest},
        model_init_kwargs={"dtype": arguments.dtype},
        use_cpu=arguments.device == "cpu",
        bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = StructuredGRPOTrainer(
        f"{folder}/model", args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    sample = trainer._generate_single_turn

    def sample_and_write(*inputs: Any, **options: Any) -> Any:
        _, *rest = sample(*inputs, **options)
        return written, *rest

    trainer._generate_single_turn = sample_and_write  # type: ignore[method-assign]
    trainer.create_optimizer()
    trainer.model.to(trainer.accelerator.device).train()
    trainer.current_gradient_accumulation_steps = 1  # `train` would set it

    def step() -> None:
        trainer.training_step(trainer.model, rows, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def main(arguments: CreditStepArguments) -> dict[str, Any]:
    if arguments.batch_size % GROUP:
        raise SystemExit(f"--batch_size is {arguments.batch_size}; use a multiple of {GROUP}, the kinds of documents.")
    with tempfile.TemporaryDirectory() as folder:
        heads = max(1, arguments.hidden_size // 64)
        shape = {"vocab_size": arguments.vocab_size, "intermediate_size": 3 * arguments.hidden_size}
        random_llama(f"{folder}/model", arguments, **shape, num_attention_heads=heads, num_key_value_heads=heads)
        steps = {credit: make_step(arguments, credit, folder) for credit in CREDITS}
        seconds = in_turns(steps, arguments.pairs, arguments.device)
    ratio = statistics.median(ours / plain for plain, ours in zip(*seconds.values(), strict=True))
    return save(arguments.output_dir, {"arguments": asdict(arguments), "seconds": seconds, "time_ratio": ratio}, tables)


def tables(results: dict[str, Any]) -> Tables:
    """Median seconds of a step with either credit, and their ratio."""
    medians = [f"{statistics.median(results['seconds'][credit]):.3f}" for credit in CREDITS]
    row = [*medians, f"{results['time_ratio']:.3f}"]
    return {"step": (("sequence credit, s", "field credit, s", "time ratio"), [row])}


if __name__ == "__main__":
    main(*TrlParser((CreditStepArguments,)).parse_args_and_config())
