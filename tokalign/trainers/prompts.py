"""How a training renders its prompts, told before it starts and recorded beside the model, so that whoever samples from
the model or evaluates it asks it in the same way (`tokalign.prompts.recorded_beside`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from tokalign.prompts import RECORD, PromptRendering, TemplateArguments, rendering_of, tell_the_date, template_hash
from tokalign.stage.manifest import MANIFEST, manifest_of, read_manifest, write_manifest


def training_prompts(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    variables: dict[str, Any] | str | None,
    *,
    of: str,
    folder: str | Path,
    resumed: bool,
    any_template: bool = False,
) -> PromptRendering | None:
    """The rendering of a training on `rows`; None if nobody knows it.

    Pairs with ids were rendered by whoever made them, as their manifest says; all else TRL renders: messages by the
    chat template, texts as they are. A template that asks for the date is told one, from here on.

    Args:
        rows: training rows.
        tokenizer: renders them.
        variables: of the chat template.
        of: name of the rows, for errors.
        folder: where the model is written, and `note_prompts` notes the rendering.
        resumed: the training goes on, so it keeps the date that its folder says.
        any_template: ids that another tokenizer's template rendered are taken, and noted as they are.

    Raises:
        ContractError: the rows hold ids that were rendered otherwise.
    """
    first = next(iter(rows), None)
    if first is None:
        return None  # the trainer refuses them
    has_ids = not first.keys().isdisjoint(("prompt_ids", "input_ids"))
    record = (manifest_of(rows) or {}).get(RECORD)
    if has_ids and record is None:
        return None
    asked = next(({key: first[key]} for key in ("prompt", "messages", "chosen") if key in first), {})
    rendering = rendering_of(
        TemplateArguments(chat_template_kwargs=variables),
        tokenizer,
        recorded=record,
        of=of,
        must_agree=has_ids,
        any_template=any_template,
        folder=folder if resumed else None,
        prompt_format="chat" if is_conversational(asked) else "raw",
    )
    if has_ids and record is not None and record.get("template") != template_hash(tokenizer):
        rendering = replace(rendering, template=record.get("template"))
    if rendering.date is not None:
        tell_the_date(tokenizer, rendering.date)
    return rendering


def note_prompts(folder: str | Path, rendering: PromptRendering | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the rendering into the manifest beside the model, which keeps whatever else it says."""
    if not PartialState().is_main_process:
        return
    before = read_manifest(folder) if (Path(folder) / MANIFEST).is_file() else {"name": "training"}
    note = {} if rendering is None else {RECORD: rendering.record(tokenizer)}
    if note or RECORD in before:  # of a former training into the same folder
        write_manifest(folder, {key: value for key, value in before.items() if key != RECORD} | note)
