"""TRL's chat templates render a call in the format that the structured reward reads; which ones TRL ships varies."""

from __future__ import annotations

import re
from pathlib import Path

import trl
from transformers.utils.chat_template_utils import render_jinja_template

from tests.rewards.test_tool_calls import ARGUMENTS, ARGUMENTS_TEXT, CALL, SHAPE
from tokalign.rewards.structured.documents.reading import read_document


def test_the_chat_templates_of_trl_write_what_is_read() -> None:
    """What a template renders as an assistant's call is what its model learnt to write."""
    folder = Path(trl.__file__).parent / "chat_templates"
    names = ["qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_6", "glm4moe", "gptoss", "llama3_1", "lfm2_v2", "deepseekv3"]
    names = [name for name in names if (folder / f"{name}.jinja").exists()]
    assert len(names) >= 5
    for name in names:
        arguments = ARGUMENTS_TEXT if name == "deepseekv3" else ARGUMENTS
        call = {"type": "function", "id": "call_1", "function": {"name": "geo.find", "arguments": arguments}}
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        options = {"chat_template": (folder / f"{name}.jinja").read_text(), "bos_token": "", "eos_token": ""}
        ((prompt,), _), ((whole,), _) = (
            render_jinja_template([turns], add_generation_prompt=len(turns) == 1, **options)
            for turns in (messages[:1], messages)
        )
        begin = next(
            (i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(prompt)
        )
        while whole[begin - 1] == "<":  # two marks may begin alike
            begin -= 1
        text = re.sub(r"(<\|im_end\|>|<\|eot_id\|>|<｜end▁of▁sentence｜>)\s*$", "", whole[begin:].strip())
        text = text.removeprefix("<｜Assistant｜>").rpartition("</think>")[2] if name != "gptoss" else text
        found = read_document(text, "tool_call", types=SHAPE)
        assert (found.value, found.error) == (CALL, None), name
