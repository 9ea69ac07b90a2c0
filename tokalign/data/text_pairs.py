"""Preference pairs that somebody wrote as text, made into ids as TRL's `DPOTrainer` makes them.

Every form that TRL takes is taken: `prompt`, `chosen`, `rejected` as texts or as messages, and the prompt left out
where both answers begin with it. The ids are TRL's own, by its own code, so a token signal belongs to the very tokens
that training sees.
"""

from __future__ import annotations

import copy

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from tokalign.prompts import AS_CHAT, UNRENDERED, PromptRendering, give_variables, refused_row, tell_the_date
from tokalign.stage.contract import SIDES, check_present, first_row
from tokalign.stage.errors import ContractError

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokenize_pairs(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, where: str, rendering: PromptRendering = AS_CHAT
) -> Dataset:
    """Pairs of text with `prompt_ids`, `chosen_ids` and `rejected_ids`; the texts stay as they were written.

    Args:
        rows: `chosen`, `rejected` and, unless they begin with it, `prompt`: texts or messages.
        where: what to call the dataset in errors.
        rendering: variables and date of the chat template, for messages.

    Raises:
        ContractError: an answer or a prompt is missing, or messages meet a tokenizer without a chat template, or with
            one that refuses them.
    """
    from trl import is_conversational, maybe_extract_prompt  # a second; pairs with ids do without

    first = first_row(rows, where)
    check_present(rows, [name for name in ("prompt", *SIDES) if name in rows.column_names], where)
    messages = is_conversational({"chosen": first["chosen"]})
    if messages and tokenizer.chat_template is None:
        raise ContractError(
            f"{where} holds messages, but the tokenizer has no chat template; give texts, or a model that has one."
        )
    # A prompt as text beside answers as whole conversations, as some hub datasets have it, is not what TRL reads
    if "prompt" not in first or is_conversational({"prompt": first["prompt"]}) != messages:
        rows = rows.map(maybe_extract_prompt, desc="Taking the prompt out of both answers")
    from tokalign.internals.trl import ids_of_dpo_trainer

    told = copy.copy(tokenizer)
    if rendering.date is not None:
        tell_the_date(told, rendering.date)
    given = give_variables(rows, rendering.chat_template_kwargs)
    try:
        ids = ids_of_dpo_trainer(given, told).select_columns(list(IDS))
    except UNRENDERED as error:
        raise refused_row(given, told, error) from error
    return concatenate_datasets([rows, ids], axis=1)
