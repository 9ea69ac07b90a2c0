"""What it costs to say which characters of a completion earned what, beside the plain reward, and which tokens.

    python -m benchmarks.experiments.structured_credit

Completions of 500 bytes under the ledger's JSON Schema, those of the structured reward's own figures in
docs/results/speed.md: flawless, with one fault, with text around, broken off. Every `group` of them share the first
one's reference. `reward.credit` and `reward.score` take turns on the same completions in one process; times are process
time, and the median of the rounds counts. Offsets are those of a byte-level BPE tokenizer trained on the documents.
Writes results.json to `output_dir`.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trl import TrlParser

from benchmarks.render import Tables, save
from tokalign.rewards import StructuredReward
from tokalign.stage.pieces import token_offsets
from tokalign.worlds.ledger import JSON_SCHEMA
from tokalign.worlds.stand_in import train_tokenizer


@dataclass
class StructuredCreditArguments:
    """How much is measured."""

    completions: int = field(default=400, metadata={"help": "Completions of each kind."})
    size: int = field(default=500, metadata={"help": "Bytes of a flawless completion."})
    group: int = field(default=8, metadata={"help": "Completions that share a reference."})
    rounds: int = field(default=5, metadata={"help": "Timed rounds; the median counts."})
    device: str = field(default="cpu", metadata={"help": "Rewards run on the CPU whatever stands here."})
    output_dir: str = field(default="runs/benchmarks/structured_credit", metadata={"help": "Folder of results.json."})


def document(numbers: random.Random, size: int) -> dict[str, Any]:
    """A flawless document of the ledger world whose text has `size` bytes."""
    made: dict[str, Any] = {"steps": [], "answer": numbers.randrange(1, 30)}
    step: dict[str, Any] = {}
    while len(json.dumps(made)) < size - 70:
        left, right = numbers.randrange(10, 30), numbers.randrange(10, 30)
        name = numbers.choice(["Anna", "Bela"])
        step = {"name": name, "left": left, "op": "+", "right": right, "total": left + right}
        made["steps"].append(step)
    step["name"] += "a" * (size - len(json.dumps(made)))
    return made


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "key missing": lambda value: value["steps"][1].pop("op"),
    "key invented": lambda value: value["steps"][2].update(note="n"),
    "type wrong": lambda value: value["steps"][3].update(left="12"),
    "answer missing": lambda value: value.pop("answer"),
}


def kinds(arguments: StructuredCreditArguments) -> dict[str, list[tuple[str, str | None]]]:
    """(completion, reference) by kind."""
    numbers = random.Random(0)
    documents = [document(numbers, arguments.size) for _ in range(arguments.completions)]
    texts = [json.dumps(value) for value in documents]
    references = [texts[i - i % arguments.group] for i in range(len(texts))]
    made = {"flawless": texts}
    for name, spoil in FAULTS.items():
        spoiled = copy.deepcopy(documents)
        for value in spoiled:
            spoil(value)
        made[name] = [json.dumps(value) for value in spoiled]
    made["text around"] = [f"Here it is: {text} Enjoy!" for text in texts]
    made["broken off"] = [text[: numbers.randrange(len(text) // 2, len(text))] for text in texts]
    pairs: dict[str, list[tuple[str, str | None]]] = {
        name: list(zip(texts, references, strict=True)) for name, texts in made.items()
    }
    pairs["equal to the reference"] = [(text, text) for text in texts]
    pairs["no reference"] = [(text, None) for text in texts]
    return pairs


def seconds(run: Callable[[Any], Any], items: list[Any]) -> float:
    """Process time of a call for each item, an item."""
    start = time.process_time()
    for item in items:
        run(item)
    return (time.process_time() - start) / len(items)


def main(arguments: StructuredCreditArguments) -> dict[str, Any]:
    reward = StructuredReward(JSON_SCHEMA)
    rows = []
    for kind, pairs in kinds(arguments).items():
        times = [
            (seconds(lambda pair: reward.score(*pair), pairs), seconds(lambda pair: reward.credit(*pair), pairs))
            for _ in range(arguments.rounds + 1)
        ][1:]  # the first one warms up
        score, credit = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(credit / score for score, credit in times)
        rows.append({"kind": kind, "score": score, "credit": credit, "ratio": ratio})
    texts = [text for text, _ in kinds(arguments)["flawless"]]
    tokenizer = train_tokenizer(texts, 400)
    completions = [(tokenizer(text)["input_ids"], text) for text in texts]
    tokens = sum(len(ids) for ids, _ in completions) / len(completions)
    times = [
        (
            seconds(lambda pair: tokenizer.decode(pair[0], skip_special_tokens=True), completions),
            seconds(lambda pair: token_offsets(tokenizer, *pair), completions),
        )
        for _ in range(arguments.rounds + 1)
    ][1:]
    decode, offsets = (1e6 * statistics.median(column) / tokens for column in zip(*times, strict=True))
    measured = {"tokens": tokens, "decode": decode, "offsets": offsets}
    return save(arguments.output_dir, {"arguments": asdict(arguments), "results": rows, "offsets": measured}, tables)


def tables(results: dict[str, Any]) -> Tables:
    """Microseconds a completion of each kind, and a token."""
    rows = [
        [row["kind"], f"{1e6 * row['score']:.0f}", f"{1e6 * row['credit']:.0f}", f"{row['ratio']:.2f}"]
        for row in results["results"]
    ]
    offsets = results["offsets"]
    return {
        "credit": (("completions", "score, µs", "credit, µs", "credit / score"), rows),
        "offsets": (
            ("tokens a completion", "decoding, µs a token", "offsets, µs a token"),
            [[f"{offsets['tokens']:.0f}", f"{offsets['decode']:.2f}", f"{offsets['offsets']:.2f}"]],
        ),
    }


if __name__ == "__main__":
    main(*TrlParser((StructuredCreditArguments,)).parse_args_and_config())
