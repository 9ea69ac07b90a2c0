"""What token ids mean: which ids two models share, and which of them end a completion."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokalign.stage.hashes import tokenizer_hash


def check_pair(
    slm_tokenizer: PreTrainedTokenizerBase,
    llm_tokenizer: PreTrainedTokenizerBase,
    slm_vocab: int,
    llm_vocab: int,
) -> int:
    """How many ids a small model (SLM) and a large one (LLM) share: those below both vocabulary sizes.

    Vocabularies are often padded to different sizes; no decoder may write an id above the smaller one. Chat templates
    may differ, because they do not change what an id means.

    Args:
        slm_vocab, llm_vocab: rows of the models' LM heads (`config.vocab_size`).

    Raises:
        ValueError: the ids mean different things.
    """
    if slm_tokenizer is not llm_tokenizer:
        slm, llm = (_ids_hash(tokenizer) for tokenizer in (slm_tokenizer, llm_tokenizer))
        if slm != llm:
            raise ValueError(
                f"The SLM's tokenizer ({slm_tokenizer.name_or_path}, {len(slm_tokenizer)} tokens, hash {slm[:12]}) is "
                f"not the LLM's ({llm_tokenizer.name_or_path}, {len(llm_tokenizer)} tokens, hash {llm[:12]}): route "
                "between two models of one family."
            )
    return min(slm_vocab, llm_vocab)


def _ids_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """`tokenizer_hash` without the chat template."""
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    return tokenizer_hash(bare)


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
