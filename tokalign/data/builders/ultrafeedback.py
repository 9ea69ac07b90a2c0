"""Build the prompts of UltraFeedback (Cui et al. 2023, arXiv 2310.01377) as problems without an answer.

    tokalign data ultrafeedback --output_dir runs/ultrafeedback
    tokalign data ultrafeedback --source HuggingFaceH4/ultrafeedback_binarized --output_dir runs/ultrafeedback
    tokalign data ultrafeedback --source prompts.jsonl --output_dir runs/prompts

Any source with one instruction a row will do: a hub id, a `.jsonl` or `.parquet` file, or a folder of them. Only its
prompts are taken; the answers beside them come from other models, and on-policy pairs need the policy's own. `answer`
is null: a reward judges the rollouts (`tokalign reward`).

A prompt that occurs again, in the words and in any split, is dropped and counted; a prompt that is both trained and
tested on stays in the test. Of a source with splits `train_prefs`, `train_sft` …, the `_prefs` ones are taken.
"""

import hashlib
from dataclasses import dataclass, field

from datasets import Dataset, Value

from tokalign.data.problems import ProblemArguments, build_problems, column, open_source
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import Dropped

QUESTION = ("prompt", "instruction")
REPEATED = "repeated prompt"


@dataclass
class UltraFeedbackArguments(ProblemArguments):
    """What to build."""

    source: str = field(
        default="princeton-nlp/llama3-ultrafeedback-armorm",
        kw_only=True,
        metadata={"help": "Hub id, a .jsonl or .parquet file, or a folder of them."},
    )
    prompt_style: str = field(
        default="messages", metadata={"help": "'messages' (one user message) or 'string' (the prompt and a newline)."}
    )


def _open(source: str) -> dict[str, Dataset]:
    """The splits of the source, its prompts alone."""
    splits = open_source(source)
    preferences = {name.removesuffix("_prefs"): rows for name, rows in splits.items() if name.endswith("_prefs")}
    prompts = {}
    for name, rows in (preferences or splits).items():
        asked = column(rows, QUESTION, f"Split {name} of {source}")
        if rows.features[asked] not in (Value("string"), Value("large_string")):
            raise ContractError(
                f"Column `{asked}` of split {name} of {source} holds {rows.features[asked]}, not text; give a source "
                "with one instruction a row as a string."
            )
        prompts[name] = rows.select_columns([asked])
    return prompts


def _repeated(splits: dict[str, Dataset]) -> set[str]:
    """Ids, as `build_problems` gives them, of the rows whose prompt another row has already."""
    seen: set[bytes] = set()
    repeated = set()
    for split in sorted(splits, key=lambda name: name == "train"):  # test first: it keeps what train repeats
        (asked,) = splits[split].column_names
        number = 0
        for batch in splits[split].iter(batch_size=10_000):
            for text in batch[asked]:
                words = " ".join((text or "").split()).casefold()
                identity = hashlib.blake2b(words.encode(), digest_size=8).digest()
                if identity in seen:
                    repeated.add(f"ultrafeedback-{split}-{number}")
                seen.add(identity)
                number += 1
    return repeated


def main(args: UltraFeedbackArguments) -> None:
    """Write every split of the source, and the card."""
    splits = _open(args.source)
    repeated = _repeated(splits)

    def convert(row: dict, split: str) -> dict | Dropped:
        return Dropped(REPEATED) if row["id"] in repeated else {"answer": None}

    build_problems(
        "ultrafeedback",
        splits,
        convert,
        args,
        title="UltraFeedback prompts as tokalign problems",
        licence="mit",
        question=QUESTION,
        notes="Prompts only. There are no reference answers (`answer` is null): a reward judges what a model writes.",
    )
