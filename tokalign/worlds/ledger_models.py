"""Base models of the ledger world: two Llama architectures, about 1:20 in parameters, untrained.

tokalign/cli/ledger_models.py trains them and keeps them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerBase

# Heads of 32 dimensions: vLLM's CPU attention has no smaller ones.
PRESETS: dict[str, dict[str, Any]] = {
    "ledger-slm": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 2},
    "ledger-llm": {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 8},
}
# The weak one, trained for longer in a world with drafts to rewrite (`tokalign data ledger --draft_share`); it gives
# T-REG its token rewards.
PRESETS["ledger-slm-revise"] = PRESETS["ledger-slm"]
# What each is trained on: options of `tokalign data ledger`, by world. Only the weak one has read flawed authors, who
# have other habits too.
FLAWS = ("--flaw_rate", "0.9", "--habits", "1")
BASES: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {"ledger-slm": (), "ledger-llm": (), "ledger-slm-revise": ("--draft_share", "0.6")},
    "rich": {
        "ledger-slm": ("--sft", "36000", "--world", "rich", *FLAWS),
        "ledger-llm": ("--world", "rich"),
        "ledger-slm-revise": ("--world", "rich", "--draft_share", "0.6"),
    },
}

RICH_RECIPES = {"ledger-slm": "base_slm_rich"}  # those of the rich world that are not the plain world's


def model_config(preset: str, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Architecture of a preset for this tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
        **PRESETS[preset],
    )


def write_untrained(preset: str, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write tokenizer and architecture of `preset` to `path`; weights come from `tokalign sft --from_scratch`."""
    tokenizer.save_pretrained(path)
    model_config(preset, tokenizer).save_pretrained(path)
