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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign.prompts import read_template, render_prompt
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


def revision_prompt_ids(
    prompt: str | Messages,
    completion: str,
    templates: RevisionTemplates,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: str = "chat",
    *,
    name: str | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of the prompts that ask for a better and for a worse revision of a completion.

    Args:
        prompt: a string, or messages of which the last one is the user's; earlier turns and a system message stay.
        completion: the text that the prompts quote. The ids that are scored behind the prompts are the caller's own.
        prompt_format: "chat" or "raw", as in `render_prompt`.
        name: what to call the row in errors.

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
        raise ContractError(
            f"{row}`prompt` does not end with a text of the user, which the revision prompts replace; end it there."
        )
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    prompts, joints = [], []
    for template in (templates.better, templates.worse):
        text = _fill(template, {"prompt": asked, "completion": completion})
        revision: Any = text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
        ids = render_prompt(revision, tokenizer, prompt_format)
        if prompt_format == "raw":
            joint = _joint(ids, tokenizer(text + completion)["input_ids"])
        else:
            messages = [{"role": "user", "content": text}] if isinstance(prompt, str) else revision
            unanswered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=False, return_dict=True)
            joint = _joint(unanswered["input_ids"], ids)
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
