"""Token heatmap of a signals dataset: one self-contained HTML file.

    tokalign view --dataset runs/scored --tokenizer meta-llama/Meta-Llama-3-8B --output heatmap.html

One process reads and writes it.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from tokalign.rewards import extract_answer
from tokalign.stage.contract import SIDES
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.view import token_heatmap


@dataclass
class ViewArguments:
    """The scored pairs, and what the page shows of them."""

    dataset: str = field(metadata={"help": "Signals dataset: folder or hub id."})
    tokenizer: str = field(metadata={"help": "Hub id or path of the tokenizer (or model) that made the ids."})
    output: str = field(default="heatmap.html", metadata={"help": "HTML file to write."})
    split: str = field(default="train", metadata={"help": "Split to show."})
    signals: list[str] | None = field(
        default=None, metadata={"help": "Signals to show, the first one coloured, e.g. `contrast`; unset is all."}
    )
    sides: list[str] | None = field(
        default=None, metadata={"help": "Completions to show; unset is chosen and rejected, where they are there."}
    )
    start: int = field(default=0, metadata={"help": "First row shown."})
    limit: int = field(default=50, metadata={"help": "Rows shown."})
    title: str | None = field(default=None, metadata={"help": "Heading of the page."})


def main(arguments: ViewArguments) -> None:
    """Write the page."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    dataset = load_stage(arguments.dataset, split=arguments.split, tokenizer=tokenizer)
    there = [name.removesuffix("_ids") for name in dataset.column_names if name.endswith("_ids")]
    for side in arguments.sides or ():
        if side not in there or side == "prompt":
            known = ", ".join(name for name in there if name != "prompt")
            raise ContractError(
                f"--sides names {side!r}, but {arguments.dataset} has no column `{side}_ids`; use one of {known}."
            )
    html = token_heatmap(
        dataset,
        tokenizer,
        signals=arguments.signals,
        sides=arguments.sides or SIDES,
        title=arguments.title or f"Tokens of {arguments.dataset}",
        start=arguments.start,
        limit=arguments.limit,
        extract=extract_answer,
    )
    Path(arguments.output).write_text(html, encoding="utf-8")
    Console().print(f"Wrote {arguments.output} ({len(html) / 1e6:.1f} MB): open it in a browser.")
