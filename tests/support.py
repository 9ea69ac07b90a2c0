"""Tiny real components for the tests: a `PreTrainedTokenizerFast` with a chat template and a Llama on disk.

Tiny models are the test size, never the design size: everything here is an ordinary transformers object that
`from_pretrained` loads, so the code under test takes the path it takes with an 8B model.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unk|>"]


# What templates of real families do, on the same special tokens
TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "system": "<|system|>Be good.<|end|>" + CHAT_TEMPLATE,
    "tools": "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "no system role": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
    + CHAT_TEMPLATE,
    # A prompt without thinking ends with an empty thought, which the conversation writes before the last answer
    "thinking": "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}",
    # The prompt ends with an empty thought, which the conversation leaves out
    "thought left out": CHAT_TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think></think>{% endif"),
    "dated": "<|system|>{{ strftime_now('%d %b %Y %H:%M:%S') }}<|end|>" + CHAT_TEMPLATE,
}


ALPHABET = string.ascii_letters + string.digits + " .,:;?!#$+-*/=()<>'\"\n"


def tiny_tokenizer(alphabet: str = ALPHABET, *, kind: str = "plain") -> PreTrainedTokenizerFast:
    """Character-level tokenizer that decodes to exactly the text it encoded, with a chat template of `TEMPLATES`."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + list(dict.fromkeys(alphabet)))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def tiny_model(vocab_size: int, *, seed: int = 0, hidden_size: int = 32, layers: int = 2) -> LlamaForCausalLM:
    """Random Llama, fp32, sharp enough (wide initialisation) that greedy choices are not ties."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float().eval()


def save_tiny(path: str | Path, *, seed: int = 0, hidden_size: int = 32, layers: int = 2) -> str:
    """Write a tiny tokenizer and model to `path` and return it as a string, ready for `from_pretrained`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(len(tokenizer), seed=seed, hidden_size=hidden_size, layers=layers).save_pretrained(path)
    return str(path)
