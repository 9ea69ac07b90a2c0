"""How a problem's prompt becomes token ids: one rule for rollouts and evaluation, so that a model is tested on the
prompts it was trained on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign.data.contract import ContractError


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
