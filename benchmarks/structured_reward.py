"""The structured reward: completions a second on one core, what hostile text costs a batch, a schema for every row.

    python benchmarks/structured_reward.py
    python benchmarks/structured_reward.py --completions 8000 --rounds 9 --schemas 2000

Throughput: completions of 500 bytes under the ledger's JSON Schema, each with its reference: flawless, with one fault,
with text around, broken off; beside it the same reward with its jsonschema-rs validators replaced by the `jsonschema`
package. Hostile text: a batch of 64 ordinary completions with and without one hostile one, for every kind and format,
reasons included, as a trainer asks for them. Times are process time, medians of the rounds. Targets: 20,000 a second
and 5 times `jsonschema`; at most 50 ms more for a hostile completion. Writes `structured_reward.json` and `.png`.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table
from trl import TrlParser

from tokalign.rewards import StructuredReward
from tokalign.rewards.structured import schemas, validators
from tokalign.rewards.structured.documents.document import FORMATS
from tokalign.worlds.ledger import JSON_SCHEMA

SCHEMA: dict[str, Any] = {  # of the hostile documents
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^(a+)+$"},
        "code": {"type": "string", "pattern": r"(a+)+\1b"},
        "count": {"type": "integer", "minimum": 0, "multipleOf": 3},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "next": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/other"}]},
        "any": {},
    },
    "required": ["name", "count"],
    "$defs": {
        "other": {
            "type": "object",
            "properties": {"name": {"const": "other"}, "count": {"type": "integer"}, "next": {"$ref": "#"}},
            "required": ["name", "next"],
        }
    },
}
GOOD = {"name": "aaa", "count": 3}


@dataclass
class StructuredBenchmarkArguments:
    """How much is measured, and where the results go."""

    completions: int = field(default=4000, metadata={"help": "Completions of a round, of each kind."})
    size: int = field(default=500, metadata={"help": "Bytes of a flawless completion."})
    group: int = field(default=8, metadata={"help": "Completions that share a reference."})
    schemas: int = field(default=1000, metadata={"help": "Different schemas of rows."})
    batch: int = field(default=64, metadata={"help": "Ordinary completions beside a hostile one."})
    rounds: int = field(default=5, metadata={"help": "Timed rounds; the median counts."})
    seed: int = 0
    output_dir: str = field(
        default="runs/benchmarks/structured_reward", metadata={"help": "Where results are written."}
    )


# -------------------------------------------------------------------------------------------------------- throughput


def document(numbers: random.Random, size: int) -> dict[str, Any]:
    """A flawless document of the ledger world whose text has `size` bytes."""
    made: dict[str, Any] = {"steps": [], "answer": numbers.randrange(1, 30)}
    step: dict[str, Any] = {}
    while len(json.dumps(made)) < size - 70:
        left, right = numbers.randrange(10, 30), numbers.randrange(10, 30)
        step = {
            "name": numbers.choice(["Anna", "Bela"]),
            "left": left,
            "op": "+",
            "right": right,
            "total": left + right,
        }
        made["steps"].append(step)
    step["name"] += "a" * (size - len(json.dumps(made)))
    return made


FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "key missing": lambda value: value["steps"][1].pop("op"),
    "key invented": lambda value: value["steps"][2].update(note="n"),
    "type wrong": lambda value: value["steps"][3].update(left="12"),
    "answer missing": lambda value: value.pop("answer"),
}


def kinds(arguments: StructuredBenchmarkArguments) -> tuple[dict[str, list[str]], list[str]]:
    """Completions by kind, and their references."""
    numbers = random.Random(arguments.seed)
    documents = [document(numbers, arguments.size) for _ in range(arguments.completions)]
    references = [json.dumps(documents[i - i % arguments.group]) for i in range(len(documents))]
    texts = [json.dumps(value) for value in documents]
    made = {"flawless": texts}
    for name, spoil in FAULTS.items():
        spoiled = copy.deepcopy(documents)
        for value in spoiled:
            spoil(value)
        made[name] = [json.dumps(value) for value in spoiled]
    made["text around"] = [f"Here it is: {text} Enjoy!" for text in texts]
    made["broken off"] = [text[: numbers.randrange(len(text) // 2, len(text))] for text in texts]
    return made, references


class Slow:
    """The `jsonschema` package as a validator of ours."""

    def __init__(self, schema: Any):
        import jsonschema

        self.is_valid = jsonschema.Draft202012Validator(schema).is_valid


class SlowMap:
    """The `jsonschema` package as our validators by JSON pointer, for a schema without references."""

    def __init__(self, schema: Any):
        self.schema = schema

    def get(self, pointer: str) -> Slow:
        found = self.schema
        for step in pointer.split("/")[1:]:
            found = found[int(step)] if isinstance(found, list) else found[step]
        return Slow(found)


def slow_schema(schema: dict[str, Any]) -> schemas.CompiledSchema:
    """A schema of ours that validates by `jsonschema`."""
    with mock.patch.object(validators, "validator", Slow), mock.patch.object(validators, "validator_map", SlowMap):
        return schemas.CompiledSchema(schema)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median process time of a call, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return statistics.median(found[1:])


def throughput(arguments: StructuredBenchmarkArguments) -> list[dict[str, Any]]:
    ours, slow = StructuredReward(JSON_SCHEMA), StructuredReward(JSON_SCHEMA)
    slow.schema = slow_schema(JSON_SCHEMA)
    made, references = kinds(arguments)
    rows = []
    for name, texts in made.items():
        few = max(1, len(texts) // 4)
        assert ours(completions=texts[:few], answer=references[:few]) == slow(
            completions=texts[:few], answer=references[:few]
        )

        def rate(reward: StructuredReward, count: int, texts: list[str] = texts, **log: Any) -> float:
            answers = references[:count]
            # a new list each time: the same list is the same batch, which is scored once
            return count / seconds(lambda: reward(completions=texts[:count], answer=answers, **log), arguments.rounds)

        row = {
            "kind": name,
            "bytes": statistics.mean(map(len, texts)),
            "ours": rate(ours, len(texts)),
            "ours_with_reasons": rate(ours, len(texts), log_extra=lambda *_: None),
            "jsonschema": rate(slow, few),
        }
        rows.append({**row, "ratio": row["ours"] / row["jsonschema"]})
    return rows


# ------------------------------------------------------------------------------------------------------ hostile text


def hostile() -> Iterator[tuple[str, str]]:
    """(name, completion): what has cost somebody minutes, gigabytes or a process, as large as is read and larger."""
    cap, name = 1 << 18, '{"name": "aaa", "count": 3, '
    yield "deep", "[" * 100_000
    yield "deep objects", '{"a":' * (cap // 5)
    yield "deep alternatives", (name + '"zz": 1, "next": ') * 63 + "{}" + "}" * 63
    yield "50 MB", '{"name": "' + "a" * 50_000_000 + '"}'
    yield "regular pattern", '{"count": 3, "name": "' + "a" * (cap - 40) + 'b"}'
    yield "backreference", '{"count": 3, "name": "a", "code": "' + "a" * (cap - 60) + '"}'
    yield "NaN", name + '"price": NaN}'
    yield "infinity", name + '"price": 1e999}'
    yield "digits", name + '"price": ' + "9" * 100_000 + "}"
    yield "repeated keys", "{" + '"a": 1,' * 9_000 + '"a": 1}'
    yield "escaped surrogates", '{"name": "' + "\\ud800" * 40_000 + '"}'
    yield "surrogates", '{"name": "' + "\ud800" * 40_000 + '"}'
    yield "empty containers", name + '"any": [' + "[]," * 80_000 + "[]]}"
    yield "keys", name + ",".join(f'"k{i}":1' for i in range(9_000)) + "}"
    yield "too many keys", name + ",".join(f'"k{i}":1' for i in range(20_000)) + "}"
    yield "wrong items", name + '"tags": [' + "1," * 9_000 + "1]}"
    yield "too many items", name + '"tags": [' + "1," * 100_000 + "1]}"
    yield "equal items", name + '"tags": [' + '"a",' * 9_000 + '"a"]}'
    yield "unclosed strings", "{" * 65 + '\\"' * 100_000
    yield "quotes", '"{' * 100_000
    yield "fence of spaces", "```" + " " * 200_000 + "```"
    yield "fences", "```json\n" * 30_000
    yield "fences without a line", "```" * 80_000
    yield "tags", "<tool_call>" * 23_000
    yield "empty tags", "<tool_call></tool_call>" * 11_000
    yield "documents", '{"a":1} ' * 30_000
    yield "braces", "{ " * 130_000
    yield "broken off", name + '"any": ' + "[1," * 60 + "1," * 9_000
    yield "YAML aliases", "a: &a [x,x]\nb: &b [*a,*a]\n" * 5_000
    yield "YAML items", "- a\n" * 60_000
    yield "YAML keys", "name: aaa\ncount: 3\n" + "".join(f"k{i}: 1\n" for i in range(9_000))
    yield "YAML documents", "---\n" * 60_000
    yield "YAML deep", "- " * 130_000
    yield "YAML tags", "".join(f"%TAG !{i}! t:\n" for i in range(12_000)) + "--- a"
    yield "XML entities", '<!DOCTYPE r [<!ENTITY a "aaaa">]><r>' + "&a;" * 80_000 + "</r>"
    yield "XML external", '<!DOCTYPE r SYSTEM "file:///etc/passwd"><r>&a;</r>'
    yield "XML deep", "<a>" * 80_000
    yield "XML elements", "<r>" + "".join(f"<a{i}/>" for i in range(9_000)) + "</r>"
    yield "XML attributes", "<r " + " ".join(f'a{i}=""' for i in range(20_000)) + "/>"


def large() -> Iterator[tuple[str, str]]:
    """(name, document): sound JSON under `SCHEMA`, at the limits."""
    name = '{"name": "aaa", "count": 3, '
    yield "sound, deep", (name + '"next": ') * 63 + json.dumps(GOOD) + "}" * 63
    yield "sound, digits", name + '"any": [' + ",".join(["9" * 4200] * 60) + "]}"
    yield "sound, fraction", name + '"price": 0.' + "1" * 200_000 + "}"
    yield "sound, unique items", name + '"tags": [' + ",".join(f'"{i}"' for i in range(9_000)) + "]}"
    yield "sound, empty containers", name + '"any": [' + "[]," * 9_000 + "[]]}"
    yield "sound, long string", '{"count": 3, "name": "' + "a" * 200_000 + '"}'


ORDINARY = {
    "json": json.dumps(GOOD),
    "tool_call": json.dumps(GOOD),
    "yaml": "name: aaa\ncount: 3\n",
    "xml": "<r><name>aaa</name><count>3</count></r>",
}


def hostile_costs(arguments: StructuredBenchmarkArguments) -> list[dict[str, Any]]:
    """Milliseconds that one hostile completion adds to a batch, in the format where it adds most."""
    answer, rows = json.dumps(GOOD), []
    rewards = {name: StructuredReward(SCHEMA, output_format=name) for name in FORMATS}
    for kind, text in (*hostile(), *large()):
        found = {}
        for name, reward in rewards.items():

            def run(last: str, reward: StructuredReward = reward, name: str = name) -> list[float]:
                completions = [ORDINARY[name]] * (arguments.batch - 1) + [last]
                return reward(completions=completions, answer=[answer] * arguments.batch, log_extra=lambda *_: None)

            with_it = seconds(lambda run=run, text=text: run(text), arguments.rounds)
            without = seconds(lambda run=run, name=name: run(ORDINARY[name]), arguments.rounds)
            found[name] = 1000 * (with_it - without)
        worst = max(found, key=lambda name: found[name])
        rows.append({"kind": kind, "characters": len(text), "format": worst, "ms": found[worst], "by_format": found})
    return sorted(rows, key=lambda row: -row["ms"])


# ----------------------------------------------------------------------------------------------- a schema for every row


def row_schemas(arguments: StructuredBenchmarkArguments) -> dict[str, Any]:
    """Milliseconds a row of the first and the second pass over rows of which each has its own schema."""
    numbers = random.Random(arguments.seed)
    texts, columns = [], []
    for index in range(arguments.schemas):
        schema = copy.deepcopy(JSON_SCHEMA)
        schema["properties"]["answer"]["maximum"] = 1000 + index
        columns.append(json.dumps(schema))
        texts.append(json.dumps(document(numbers, arguments.size)))
    reward, before = StructuredReward(), schemas.compile_text.cache_info().misses
    made: dict[str, Any] = {"rows": len(texts)}
    for name in ("first", "second"):
        begin = time.process_time()
        reward(completions=list(texts), schema=columns)
        made[f"{name}_pass_ms"] = 1000 * (time.process_time() - begin) / len(texts)
    return {**made, "compiled": schemas.compile_text.cache_info().misses - before}


# ------------------------------------------------------------------------------------------------------------ results


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    rows = report["throughput"]
    places = range(len(rows))
    for shift, name, colour in ((-0.2, "ours", "#4c72b0"), (0.2, "jsonschema", "#c44e52")):
        bars = left.barh([p + shift for p in places], [row[name] for row in rows], 0.4, label=name, color=colour)
        left.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    left.set_yticks(list(places), [row["kind"] for row in rows])
    left.axvline(20_000, color="grey", linestyle=":")
    left.set_xlabel("completions a second, one core")
    left.legend(frameon=False)
    worst = report["hostile"][:16]
    bars = right.barh(
        [f"{row['kind']} ({row['format']})" for row in worst], [row["ms"] for row in worst], color="#4c72b0"
    )
    right.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=8)
    right.axvline(50, color="grey", linestyle=":")
    right.set_xlabel(f"milliseconds more for a batch of {report['arguments']['batch']}")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"Completions of {report['arguments']['size']} bytes a second, one core")
    for heading in ("completion", "ours", "with reasons", "jsonschema", "ratio"):
        table.add_column(heading, justify="left" if heading == "completion" else "right")
    for row in report["throughput"]:
        rates = (f"{row[name]:,.0f}" for name in ("ours", "ours_with_reasons", "jsonschema"))
        table.add_row(row["kind"], *rates, f"{row['ratio']:.1f}x")
    console.print(table)
    table = Table(title=f"A hostile completion in a batch of {report['arguments']['batch']}: the ten that cost most")
    for heading in ("completion", "characters", "format", "ms more"):
        table.add_column(heading, justify="right" if heading in ("characters", "ms more") else "left")
    for row in report["hostile"][:10]:
        table.add_row(row["kind"], f"{row['characters']:,}", row["format"], f"{row['ms']:.1f}")
    console.print(table)
    rows = report["row_schemas"]
    console.print(
        f"{rows['rows']} rows with a schema each: {rows['compiled']} compiled; "
        f"first pass {rows['first_pass_ms']:.3f} ms a row, second {rows['second_pass_ms']:.3f} ms."
    )


def main(arguments: StructuredBenchmarkArguments) -> dict[str, Any]:
    console = Console()
    report = {
        "arguments": asdict(arguments),
        "throughput": throughput(arguments),
        "hostile": hostile_costs(arguments),
        "row_schemas": row_schemas(arguments),
    }
    show(report, console)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "structured_reward.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, output / "structured_reward.png")
    console.print(f"Wrote {output / 'structured_reward.json'} and {output / 'structured_reward.png'}")
    return report


if __name__ == "__main__":
    (arguments,) = TrlParser((StructuredBenchmarkArguments,)).parse_args_and_config()
    main(arguments)
