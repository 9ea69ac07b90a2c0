"""Whether token ids are a tokenizer's, where no manifest says so: what it knows, and what it reads in them.

Another tokenizer's ids are most often inside the vocabulary, so nothing fails: the model is trained on other words. Two
things give them away. Rows usually carry their text, and the ids read as another one. Tokenizers that differ in their
special tokens alone read the same text, but end it otherwise: what ends an answer there begins a message here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokalign.stage.hashes import former_hash, known_ids, other_tokenizer

_ANSWER = "0x7Q"  # stands for an answer where a chat template is asked how it ends one; no template has it


class IdReader:
    """A tokenizer as the checks of ids need it. Make one a dataset: a vocabulary is read whole for it.

    Args:
        tokenizer: whose ids they should be.
        manifest: of the dataset, if it has one; `named` is whether it says that this tokenizer made the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, manifest: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.known = known_ids(tokenizer)
        whole = manifest is not None and (
            isinstance(manifest.get("added_tokens"), dict) or manifest.get("tokenizer_hash") == former_hash(tokenizer)
        )
        self.named = whole and other_tokenizer(manifest, tokenizer) is None

    def unknown(self, ids: np.ndarray) -> np.ndarray:
        """Which of these ids (not below 0) the tokenizer has no token for, as their places in the array."""
        beyond = ids >= len(self.known)
        return np.flatnonzero(beyond | ~self.known[np.where(beyond, 0, ids).astype(np.int64)])

    def reads(self, ids: Sequence[int], text: Any, prompt_ids: Sequence[int] = ()) -> bool:
        """Whether a completion's ids read as its text, which is a string or messages of which the last one counts.

        A text may be the ids' own, with or without their special tokens; or somebody's, of which the tokenizer keeps
        less (one that lowers capitals), or whose first letters share a token with the prompt's last ones.
        """
        seen = self._decode(ids)
        if isinstance(text, list) and text and isinstance(text[-1], dict):
            # The template may put more around the last message (a line break, an empty thought) and set its thought
            # otherwise; and a call of tools has no text
            content = text[-1].get("content")
            return not isinstance(content, str) or content.rpartition("</think>")[2].strip() in seen
        if not isinstance(text, str):
            return False
        text = text.strip()
        if text in (seen, self._decode(ids, special=True), self._decode(self._without_end(ids), special=True)):
            return True
        kept = self._decode(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = [self._decode([*prompt_ids, *self._without_end(ids)], special=special) for special in (False, True)]
        return kept == seen or any(one.endswith(each) for one in whole for each in (text, kept) if each)

    def reads_prompt(self, ids: Sequence[int], prompt: Any) -> bool:
        """Whether a prompt stands in its ids: a string, or messages of which the last one counts."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[-1].get("content")
        if not isinstance(prompt, str):  # images, calls of tools
            return True
        seen, kept = self._decode(ids), self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return prompt.strip() in seen or self._decode(kept) in seen

    def wrong_end(self, ids: Sequence[int]) -> str | None:
        """The special token at the end of a completion that ends no answer of this model; None if it is in order."""
        last = ids[-1]
        return str(self.tokenizer.convert_ids_to_tokens(last)) if last in self._special - self._ends else None

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special)).strip()  # typed for batches too

    def _without_end(self, ids: Sequence[int]) -> Sequence[int]:
        last = len(ids)
        while last and ids[last - 1] in self._special:
            last -= 1
        return ids[:last]

    @cached_property
    def _special(self) -> frozenset[int]:
        added = (i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset([*self.tokenizer.all_special_ids, *added])

    @cached_property
    def _ends(self) -> frozenset[int]:
        """What ends an answer: by the tokenizer, the model's generation configuration beside it, and the template."""
        return frozenset([*answer_ends(self.tokenizer), *self._template_ends()])

    def _template_ends(self) -> list[int]:
        if self.tokenizer.chat_template is None:
            return []
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError):  # one that wants more than a question: it says nothing here
            return []
        tail = self.tokenizer(rendered.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
        return [i for i in tail if i in self._special]


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's end token, and those of the generation configuration beside it."""
    ends = {tokenizer.eos_token_id}
    try:
        stored = GenerationConfig.from_pretrained(tokenizer.name_or_path, local_files_only=True).eos_token_id
    except (OSError, ValueError):  # no name, or no such file
        stored = None
    return {i for i in [*ends, *(stored if isinstance(stored, list) else [stored])] if i is not None}
