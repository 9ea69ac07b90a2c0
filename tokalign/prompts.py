"""How a prompt becomes token ids: one rule for rollouts, training and evaluation, so that a model is tested on the
prompts it was trained on; and prompt templates as data, a JSON object that ships with the package or is a user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign.stage.errors import ContractError


def render_prompt(
    prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt_format: str = "chat"
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: a string or messages.
        prompt_format: "chat" renders messages, or a string as the user's message, by the chat template with the
            generation prompt; "raw" encodes a string as it is.

    Raises:
        ContractError: messages with "raw", or "chat" with a tokenizer that has no chat template.
    """
    if prompt_format == "raw" and isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if prompt_format != "chat":
        raise ContractError(f"`prompt` holds messages, which `{prompt_format}` cannot render: use `chat`.")
    if tokenizer.chat_template is None:
        raise ContractError("This tokenizer has no chat template: use prompt_format `raw`, or an instruct model.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def read_template(name_or_path: str | Path, built_in: Path, *, absent: str, parts: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a template; what has to be in it is the caller's to check.

    Args:
        name_or_path: the stem of a file in `built_in`, or a path.
        built_in: folder of the package's own.
        absent: how the sentence begins if there is none, e.g. "There is no judge template".
        parts: what a file must hold, for the remedy, e.g. "`better` and `worse`".

    Raises:
        ContractError: neither a name nor a readable file, or not a JSON object.
    """
    names = sorted(file.stem for file in built_in.glob("*.json"))
    file = built_in / f"{name_or_path}.json" if name_or_path in names else Path(name_or_path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        one = "one of " if len(names) > 1 else ""
        raise ContractError(
            f"{absent} {str(name_or_path)!r} ({error.strerror}); use {one}{', '.join(names)}, or the path of a JSON "
            "file."
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise ContractError(f"{file} is not JSON ({error}); write an object with {parts}.") from None
    if not isinstance(content, dict):
        raise ContractError(f"{file} is not a JSON object; write an object with {parts}.")
    return file.stem, content
