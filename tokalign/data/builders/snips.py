"""Build SNIPS (Coucke et al. 2018, arXiv 1805.10190) as structured problems: a sentence to a voice assistant, as JSON.

    tokalign data snips --source folder/with/train.jsonl/and/test.jsonl --output_dir runs/snips
    tokalign data snips --source nlu-benchmark/2017-06-custom-intent-engines --output_dir runs/snips

    {"intent": "PlayMusic", "artist": "Trick-trick", "service": "Slacker", "sort": "popular"}

The document is the intent and the sentence's slots, each a text of the sentence. No slot is required, so the schema
alone does not say which ones the sentence fills. `--schemas all` is one schema for all intents, with every slot of
each; `--schemas intent` has the intent of the row as a constant and only its slots. Intents and slots are those of the
source, in the order of the alphabet, and so are the keys of a document.

A source is JSON lines of `text`, `intent` and `slots` (pairs of name and text), or the benchmark's own folder: there
`<intent>/validate_<intent>.json` is the test split, and `train_<intent>_full.json`, or where it is missing
`train_<intent>.json`, the train split. A file that is not UTF-8 is read as Latin-1.

Dropped and counted in the manifest: rows with two texts for one slot.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source
from tokalign.data.structured import SchemaPromptArguments, ask, assistant, json_text, user
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

Slots = Mapping[str, list[str]]  # the names of an intent's slots


@dataclass
class SnipsArguments(SchemaPromptArguments, ProblemArguments):
    """What to build."""

    prompt_style: str = field(
        default="messages", metadata={"help": "'messages' or 'string', of prompt and completion alike."}
    )
    schemas: str = field(
        default="all", metadata={"help": "'all' (one schema for all intents) or 'intent' (the schema of the row's)."}
    )
    show_keys: bool = field(
        default=False, metadata={"help": "Whether lines of the prompt name the intents and the slots."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schemas not in ("all", "intent"):
            raise ContractError(f"--schemas is {self.schemas!r}; use 'all' or 'intent'.")


def schema_of(slots: Slots) -> dict[str, Any]:
    """JSON Schema of a document that has one of these intents; only the intent is required."""
    intents = sorted(slots)
    names = sorted({name for own in slots.values() for name in own})
    return {
        "type": "object",
        "properties": {
            "intent": {"enum": intents} if len(intents) > 1 else {"const": intents[0]},
            **{name: {"type": "string"} for name in names},
        },
        "required": ["intent"],
        "additionalProperties": False,
    }


def document(intent: str, slots: Iterable[tuple[str, str]]) -> dict[str, str] | Dropped:
    """The document that a sentence's intent and slots are, or why there is none."""
    made: dict[str, str] = {}
    for name, text in sorted(slots):
        if name in made:
            return Dropped("two texts for one slot")
        made[name] = text.strip()
    return {"intent": intent, **made}


def read_benchmark(folder: Path) -> dict[str, Dataset]:
    """The splits of the benchmark's own folder, as rows of the JSON lines; empty where it has none of its files."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for own in sorted(part for part in folder.iterdir() if part.is_dir()) if folder.is_dir() else ():
        for split, stems in (("train", ("train_{}_full", "train_{}")), ("test", ("validate_{}",))):
            files = [file for stem in stems if (file := own / f"{stem.format(own.name)}.json").exists()]
            for file in files[:1]:
                splits[split] += _sentences(file, own.name)
    return {split: Dataset.from_list(rows) for split, rows in splits.items() if rows}


def _sentences(file: Path, intent: str) -> list[dict[str, Any]]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    try:
        queries = [query["data"] for query in json.loads(text)[intent]]
        return [
            {
                "text": "".join(part["text"] for part in parts),
                "intent": intent,
                "slots": [[part["entity"], part["text"]] for part in parts if "entity" in part],
            }
            for parts in queries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ContractError(f"{file} is not a file of the benchmark ({error!r}); repair or remove it.") from None


def main(args: SnipsArguments) -> None:
    """Write every split of the source, and the card."""
    splits = read_benchmark(Path(args.source)) or open_source(args.source)
    names: dict[str, set[str]] = {}
    for split, rows in splits.items():
        for needed in ("text", "intent", "slots"):
            column(rows, (needed,), f"Split {split} of {args.source}")
        for row in rows.select_columns(["intent", "slots"]):
            names.setdefault(row["intent"], set()).update(name for name, _ in row["slots"])
    slots = {intent: sorted(own) for intent, own in sorted(names.items())}
    everything = schema_of(slots)
    schemas = {intent: everything if args.schemas == "all" else schema_of({intent: slots[intent]}) for intent in slots}

    def convert(row: dict, split: str) -> dict | Dropped:
        made = document(row["intent"], row["slots"])
        if isinstance(made, Dropped):
            return made
        schema, request = schemas[row["intent"]], row["text"].strip()
        if args.show_keys:
            intents = list(slots) if args.schemas == "all" else [row["intent"]]
            keys = [key for key in schema["properties"] if key != "intent"]
            request = f"{request}\nIntents: {', '.join(intents)}\nSlots: {', '.join(keys)}"
        prompt, text = ask(request, schema, args), json_text(made)
        messages = args.prompt_style == "messages"
        return {
            "prompt": user(prompt) if messages else prompt + "\n",
            "answer": text,
            "schema": json_text(schema),
            "completion": assistant(text) if messages else text,
        }

    build_problems(
        "snips",
        splits,
        convert,
        args,
        title="SNIPS as tokalign structured problems",
        licence="cc0-1.0",
        question=("text",),
        notes=(
            "Sentences to a voice assistant, of the Snips NLU benchmark of 2017: seven intents with their slots. "
            "`answer` is the document as JSON text, `completion` the same for SFT, `schema` its JSON Schema, in which "
            "only the intent is required. A slot that the sentence does not fill is not in the document."
        ),
    )
