"""Revision prompts of T-REG (arXiv 2412.02685): an answer shown to a model that is asked to rewrite it for the better,
and for the worse.

A model that reads "rewrite this answer so that it is correct" finds the wrong tokens of the answer less likely than a
model that reads "so that it is incorrect"; the difference is the token reward (`tokalign.signals.prompting`).

Templates are JSON files, `{"better": "…{prompt}…{completion}…", "worse": "…"}`: those in `revision_templates/`
(`general`, `math`, `code`, `ledger`), or one's own by path. They are data: fields are replaced as text, once, so a
brace in a prompt or an answer stays a brace. The built-in ones are written for chat models. A base model (prompt format
`raw`) continues the text itself, so its templates should end where an answer begins.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign.prompts import AS_CHAT, PromptRendering, read_template, render_prompt
from tokalign.stage.errors import ContractError

BUILT_IN = Path(__file__).parent / "revision_templates"
FIELDS = ("prompt", "completion")
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class RevisionTemplates:
    """The two revision prompts of an answer.

    Attributes:
        name: what to call them in messages.
        better, worse: texts with the fields `{prompt}` (the user's last message) and `{completion}` (the answer).

    Raises:
        ContractError: a side that is no text, lacks a field or has another one, or two equal sides.
    """

    name: str
    better: str
    worse: str

    def __post_init__(self) -> None:
        for side in ("better", "worse"):
            text = getattr(self, side)
            where = f"Revision templates {self.name!r}: `{side}`"
            if not isinstance(text, str):
                raise ContractError(
                    f"{where} is missing or not a text; write a text with {{prompt}} and {{completion}}."
                )
            fields = _FIELD.findall(text)
            if missing := [field for field in FIELDS if field not in fields]:
                raise ContractError(f"{where} lacks the field {{{missing[0]}}}; put it where that text belongs.")
            if unknown := [field for field in fields if field not in FIELDS]:
                raise ContractError(
                    f"{where} has the unknown field {{{unknown[0]}}}; the fields are {{prompt}} and {{completion}}."
                )
        if self.better == self.worse:
            raise ContractError(
                f"Revision templates {self.name!r}: `better` and `worse` are the same text, so every reward is 0; "
                "ask for opposite revisions."
            )


def load_templates(name_or_path: str | Path) -> RevisionTemplates:
    """Templates by name (`general`, `math`, `code`, `ledger`) or from a JSON file.

    Raises:
        ContractError: neither a name nor a readable file, not a JSON object, or what `RevisionTemplates` refuses.
    """
    name, content = read_template(
        name_or_path, BUILT_IN, absent="There are no revision templates", parts="`better` and `worse`"
    )
    return RevisionTemplates(name, content.get("better"), content.get("worse"))  # type: ignore[arg-type]


def templates_hash(templates: RevisionTemplates) -> str:
    """Identity of what the templates say, whatever they are called."""
    return hashlib.sha256(json.dumps([templates.better, templates.worse]).encode()).hexdigest()


def revision_prompts(
    row: Mapping[str, Any],
    side: str,
    templates: RevisionTemplates,
    tokenizer: PreTrainedTokenizerBase,
    rendering: PromptRendering = AS_CHAT,
) -> tuple[list[int], list[int]]:
    """`revision_prompt_ids` of one side of a pair with ids, rendered as its own prompt is: with the row's tools and
    template variables, and without the end of the generation prompt that the row's `prompt_ids` lack.

    TRL starts the answer where prompt and conversation differ, so a template that opens a thinking block for the prompt
    and closes it in the conversation leaves part of that block to the answer.
    """
    options = rendering.options(row)
    name = f"{row.get('id')!r} ({side})"
    both = revision_prompt_ids(
        row["prompt"], quoted(row, side, tokenizer), templates, tokenizer, rendering.format, name=name, **options
    )
    if rendering.format == "raw":
        return both
    whole, kept = render_prompt(row["prompt"], tokenizer, name=name, **options), len(row["prompt_ids"])
    left_out = whole[kept:] if whole[:kept] == list(row["prompt_ids"]) else []
    better, worse = (ids[: -len(left_out)] if left_out and ids[-len(left_out) :] == left_out else ids for ids in both)
    return better, worse


def quoted(row: Mapping[str, Any], side: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a side that revision prompts quote: as it was written, or as the model writes it.

    A text, or an answer of one message that is nothing but text, is quoted as it is, without end tokens behind it (TRL
    appends one to texts), which would end the user's turn. Anything else, such as several turns, a call of tools, or
    reasoning in a field of its own, is what the side's ids read as: the template knows how these are written.

    Raises:
        ContractError: the template writes none of it.
    """
    answer = row[side]
    if not isinstance(answer, str):
        said = {key for message in answer for key, value in message.items() if value} - {"role"}
        if len(answer) > 1 or said != {"content"} or not isinstance(answer[0]["content"], str):
            written = str(tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True)).strip()
            if not written:  # a template without tools may leave out a call
                raise ContractError(
                    f"Row {row.get('id')!r}: the chat template writes nothing of the messages in `{side}`; use a model "
                    "whose template knows what they hold, or drop the row."
                )
            return written
        answer = answer[0]["content"]
    while end := next((token for token in tokenizer.all_special_tokens if answer.endswith(token)), ""):
        answer = answer.removesuffix(end)
    return answer


def revision_prompt_ids(
    prompt: str | Messages,
    completion: str,
    templates: RevisionTemplates,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "chat",
    *,
    name: str | None = None,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """Token ids of the prompts that ask for a better and for a worse revision of a completion.

    Args:
        prompt: a string, or messages of which the last one is the user's; earlier turns and a system message stay.
        completion: the text that the prompts quote. The ids that are scored behind the prompts are the caller's own.
        prompt_format: "chat" or "raw", as in `render_prompt`.
        name: what to call the row in errors.
        options: further ones of `render_prompt`.

    Returns:
        Ids behind which a revised answer begins: (better, worse).

    Raises:
        ContractError: the last message is not a user's text, what `render_prompt` refuses, or two prompts that
            join the completion differently, so that its ids belong behind at most one of them.
    """
    row = "" if name is None else f"Row {name}: "
    if not isinstance(prompt, str) and (
        not prompt or prompt[-1]["role"] != "user" or not isinstance(prompt[-1]["content"], str)
    ):
        last = f"its last message is of `{prompt[-1]['role']}`" if prompt else "it has no message"
        raise ContractError(
            f"{row}`prompt` does not end with a text of the user, which the revision prompts replace ({last}); drop "
            "the row, or train with another signal."
        )
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    prompts, joints = [], []
    for template in (templates.better, templates.worse):
        text = _fill(template, {"prompt": asked, "completion": completion})
        revision: Any = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
        ids = render_prompt(revision, tokenizer, prompt_format, name=name, **options)
        if prompt_format == "raw":
            joint = _joint(ids, tokenizer(text + completion)["input_ids"])
        else:
            joint = _joint(render_prompt(revision, tokenizer, add_generation_prompt=False, **options), ids)
        prompts.append(ids)
        joints.append(joint)
    if joints[0] != joints[1]:
        what = "completion" if prompt_format == "raw" else "generation prompt"
        raise ContractError(
            f"{row}the {what} reads as other ids behind the revision prompt `better` than behind `worse` of "
            f"{templates.name!r}; let both templates end in the same word and the same space."
        )
    return prompts[0], prompts[1]


def _fill(template: str, values: dict[str, str]) -> str:
    """One pass over the template, so that nothing inside a filled-in text counts as a field."""
    return _FIELD.sub(lambda match: values[match[1]], template)


def _joint(before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
    """What becomes of the ids `before` when text is added: those replaced, and those in their place and behind them."""
    common = 0
    while common < min(len(before), len(after)) and before[common] == after[common]:
        common += 1
    return before[common:], after[common:]
