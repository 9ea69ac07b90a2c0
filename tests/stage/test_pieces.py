"""Each token's characters: against decoding every prefix, on tokenizers of three kinds; and who touches a span."""

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny_tokenizer
from tokalign.stage.pieces import spans_to_tokens, token_offsets
from tokalign.worlds import ledger

TEXT = '{"name": "Zoë 🤖", "sizes": [12, 3.5], "note": "a\\n“b”"} 😀 end'


class Characters(NamedTuple):
    start: int
    end: int


def byte_level():
    """Byte-level BPE with few merges: every emoji and most accents are split over several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentencepiece():
    """Llama-2's layout: ▁ for spaces, the first one stripped, and one token a byte of an unknown character."""
    words = ["<unk>", "</s>", "▁", "▁name", "▁end", *(f"<0x{i:02X}>" for i in range(256)), *'{}":,[].abcdensmotz12358']
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece(),
    "words": ledger.build_tokenizer(ledger.LedgerConfig()),
    "characters": tiny_tokenizer(),
}
kinds = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def check_tiling(offsets, ids, text):
    assert len(offsets) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    covered = 0
    for start, end in offsets:
        assert start <= covered  # no gap
        covered = max(covered, end)
    assert covered == len(text)
    # only a character that several tokens make up is in more than one range
    for (start, end), (after, _) in pairwise(pair for pair in offsets if pair[0] < pair[1]):
        assert "\ufffd" in text or after >= end - 1 >= start


@kinds
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_ranges_of_text_tile_it_and_each_stands_where_the_prefixes_end(tokenizer, data):
    text = data.draw(st.text('{}[]":, \n12abe né🤖😀', max_size=40)) if len(tokenizer) < 500 else TEXT
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = decoded(tokenizer, ids)
    offsets = token_offsets(tokenizer, ids, text)
    check_tiling(offsets, ids, text)
    for index, (start, end) in enumerate(offsets):  # the second reader: decode every prefix
        before, until = decoded(tokenizer, ids[:index]), decoded(tokenizer, ids[: index + 1])
        if "\ufffd" not in before + until and text.startswith(before) and text.startswith(until):
            assert text[:start] == before and text[:end] == until


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_ids_in_any_order_tile_their_text_or_are_refused(name, ids):
    tokenizer = TOKENIZERS[name]
    ids = [i for i in ids if i < len(tokenizer)]
    text = decoded(tokenizer, ids)
    offsets = token_offsets(tokenizer, ids, text)
    if offsets is not None:
        check_tiling(offsets, ids, text)
    assert offsets is not None or "\ufffd" in text


def test_every_token_of_a_split_character_has_it_in_its_range():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("a🧪b")["input_ids"]
    assert len(ids) > 3 and token_offsets(tokenizer, ids, "a🧪b") == [(0, 1), *[(1, 2)] * (len(ids) - 2), (2, 3)]


@kinds
def test_special_tokens_have_an_empty_range_at_their_place(tokenizer):
    ids, end = tokenizer("ab cd", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    for place in range(len(ids) + 1):
        mixed = [end, *ids[:place], end, *ids[place:], end, end]
        text = decoded(tokenizer, mixed)
        offsets = token_offsets(tokenizer, mixed, text)
        check_tiling(offsets, mixed, text)
        plain = token_offsets(tokenizer, ids, decoded(tokenizer, ids))
        at = plain[place][0] if place < len(ids) else len(text)
        assert offsets[0] == (0, 0) and offsets[place + 1] == (at, at)
        assert [pair for token, pair in zip(mixed, offsets, strict=True) if token != end] == plain


def test_a_special_token_within_a_character_has_no_part_of_it():
    tokenizer = TOKENIZERS["byte-level"]
    (first, *rest), end = tokenizer("🧪")["input_ids"], tokenizer.eos_token_id
    offsets = token_offsets(tokenizer, [first, end, *rest], "🧪")
    assert rest and offsets == [(0, 1), (0, 0), *[(0, 1)] * len(rest)]


@kinds
def test_text_that_the_tokens_do_not_join_to_has_no_ranges(tokenizer):
    ids = tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    for text in ("ab ce", "abcd and more", "xab cd"):
        assert token_offsets(tokenizer, ids, text) is None


def test_a_message_without_its_reasoning_is_the_end_of_the_tokens_text():
    tokenizer = TOKENIZERS["characters"]
    ids = tokenizer("<think>4</think>4")["input_ids"]
    offsets = token_offsets(tokenizer, ids, "4")
    assert offsets == [(0, 0)] * (len(ids) - 1) + [(0, 1)]


def test_long_runs_of_bytes_that_are_no_text_end():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("🤖")["input_ids"][:1] * 500 + tokenizer("done")["input_ids"]
    offsets = token_offsets(tokenizer, ids, decoded(tokenizer, ids))
    assert offsets is None or len(offsets) == len(ids)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_tokens_of_spans_are_those_that_share_a_character_with_them(data):
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer(data.draw(st.text("ab é🤖", max_size=12)))["input_ids"]
    ids = [token for i in ids for token in ([i, tokenizer.eos_token_id] if data.draw(st.booleans()) else [i])]
    text = decoded(tokenizer, ids)
    offsets = token_offsets(tokenizer, ids, text)
    spans = [
        Characters(*sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text))))))
        for _ in range(4)
    ]
    expected = [
        [i for i, pair in enumerate(offsets) if set(range(*pair)) & set(range(span.start, span.end))] for span in spans
    ]
    assert spans_to_tokens(offsets, spans) == expected
