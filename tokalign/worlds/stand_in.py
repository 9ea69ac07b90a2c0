"""A stand-in for a real model, made of a data set's own text: it is downloaded from nowhere and knows nothing else.

A byte-level BPE tokenizer trained on the text, and a small Llama that is to learn a few of the problems by heart, well
enough that some of its samples are right and some are wrong. Accuracy means nothing here.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template: any text survives encode → decode."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_stand_in(problems: Dataset, folder: Path, vocab_size: int) -> None:
    """Tokenizer trained on the problems' text, and the architecture of a small Llama for it."""
    tokenizer = train_tokenizer([*map(_asked, problems["prompt"]), *problems["solution"]], vocab_size)
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    ).save_pretrained(folder)


def shortest(problems: Dataset, n: int) -> list[dict]:
    """The `n` problems whose question and solution are the shortest, in the order of the data set."""
    lengths = [len(_asked(p)) + len(s) for p, s in zip(problems["prompt"], problems["solution"], strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)[:n]
    return [problems[i] for i in sorted(order)]


def _asked(prompt: list[dict[str, str]]) -> str:
    return prompt[-1]["content"]
