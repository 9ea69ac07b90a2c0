"""Claim scores against a plain loop over whole logits, and what counts as a claim."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.signals.support import save_adapter
from tokalign.signals import ClaimScorer
from tokalign.signals.claim import claims
from tokalign.signals.registry import get

TEXTS = [("How many pens", "We see 12 + 7 = 19 pens and Tom has more, so Tom has 19."), ("x", "Then 3 * 4 = 13")]


def encoded():
    """Words with the space before them, as byte-level BPE has them, and their ids."""
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d+| ?[^A-Za-z\d ]"), "isolated")
    words = {
        word: i
        for i, word in enumerate(dict.fromkeys(w for t in TEXTS for x in t for w, _ in split.pre_tokenize_str(x)))
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="x"))
    backend.pre_tokenizer, backend.decoder = split, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    pairs = [[tokenizer.encode(text, add_special_tokens=False) for text in texts] for texts in TEXTS]
    return tokenizer, [prompt for prompt, _ in pairs], [completion for _, completion in pairs]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_equals_a_plain_loop(tiny_path, tmp_path, with_adapter):
    tokenizer, prompts, completions = encoded()
    adapter = save_adapter(tmp_path / "a", tiny_path, seed=1) if with_adapter else None
    actual = ClaimScorer(tiny_path, tokenizer, adapter).score(prompts, completions)["claim"]
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    for (_, text), prompt, completion, scores in zip(TEXTS, prompts, completions, actual, strict=True):
        with torch.no_grad():
            table = model(torch.tensor([prompt + completion])).logits[0].double().softmax(-1)
        assert len(scores) == len(completion)
        before, words_before = "", set(tokenizer.decode(prompt).split())
        for t, (token, score) in enumerate(zip(completion, scores, strict=True)):
            after = tokenizer.decode(completion[: t + 1])
            piece, before = after[len(before) :], after
            word = piece.strip()
            if word.isdigit():
                amount = 1.0
            elif piece.startswith(" ") and word.isalpha() and (word.istitle() or len(word) > 3):
                amount = 0.2 if word in words_before else 0.1
            else:
                amount = 0.5 if word in ("+", "*", "=") else 0.05
            words_before.add(word)
            doubt = min(1.0, -table[len(prompt) + t - 1, token].log().item() / 6)
            assert score == pytest.approx(1 - amount * doubt, abs=2e-5)
        assert before == text


@pytest.mark.parametrize(
    ("piece", "new", "repeated"),
    [
        *[(piece, 1.0, 1.0) for piece in ("7", " 12", " ²")],
        *[(piece, 0.5, 0.5) for piece in (" =", "+", " ->")],
        *[(piece, 0.1, 0.2) for piece in (" apples", " Al")],
        *[(piece, 0.05, 0.05) for piece in (" the", "ples", " (", "\n", "")],
    ],
)
def test_what_claims(piece, new, repeated):
    assert claims([piece, piece], [5, 5], [6]) == [new, repeated]
    assert claims([piece], [5], [6, 5]) == [repeated]


def test_the_rows_weight_is_the_doubt():
    row = get("claim")
    assert (row.low, row.high, row.suspicious, row.passes) == (0.0, 1.0, "low", 1)
    assert row.rule("weight")(0.3) == pytest.approx(0.7)
    assert row.rule("reward")(1.0) == 0.5
