"""What token ids mean: which ids two models share, and which of them end a completion."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokalign.stage.hashes import added_tokens, known_ids, other_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)


def check_pair(
    slm_tokenizer: PreTrainedTokenizerBase,
    llm_tokenizer: PreTrainedTokenizerBase,
    slm_vocab: int,
    llm_vocab: int,
) -> int:
    """How many ids a small model (SLM) and a large one (LLM) share: those that both models and the tokenizer have.

    Vocabularies are often padded, to different sizes; no decoder may write an id above the smallest one. What changes
    no id may differ: chat templates (which is logged: the SLM's is used), the end token, a padding token that one of
    them has added.

    Args:
        slm_vocab, llm_vocab: rows of the models' LM heads (`config.vocab_size`).

    Raises:
        ValueError: the ids mean different things.
    """
    if slm_tokenizer is not llm_tokenizer:
        slm = {"tokenizer_hash": tokenizer_hash(slm_tokenizer), "added_tokens": added_tokens(slm_tokenizer)}
        if (reason := other_tokenizer(slm, llm_tokenizer)) is not None:
            raise ValueError(
                f"The SLM's tokenizer ({slm_tokenizer.name_or_path}, {len(slm_tokenizer)} tokens) is not the LLM's "
                f"({llm_tokenizer.name_or_path}, {len(llm_tokenizer)} tokens; {reason}): route between two models of "
                "one family."
            )
        if llm_tokenizer.chat_template not in (None, slm_tokenizer.chat_template):
            logger.warning(
                "The chat templates of %s and %s differ: both models read chats as that of the SLM, the first of the "
                "two, renders them; labelling, decoding and serving do alike.",
                slm_tokenizer.name_or_path,
                llm_tokenizer.name_or_path,
            )
    return min(slm_vocab, llm_vocab, len(known_ids(slm_tokenizer)), len(known_ids(llm_tokenizer)))


def unknown_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Ids that a model of this vocabulary size could draw and the tokenizer has no token for, most often padding."""
    known = known_ids(tokenizer)
    return [i for i in range(vocab_size) if i >= len(known) or not known[i]]


def end_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a completion of a model: its generation config's and its tokenizer's."""
    ends = config.eos_token_id if config is not None else None
    listed = [ends] if isinstance(ends, int) else list(ends or [])
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


def stored_generation_config(model: str | Path, *, trust_remote_code: bool = False) -> GenerationConfig | None:
    """The generation config of a checkpoint (hub id or folder); None for one without."""
    try:
        return GenerationConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError:
        return None
