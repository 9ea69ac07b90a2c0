"""Streams of text against decoding everything at once."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny_tokenizer
from tokalign.routing.serve.detokenize import Detokenizer

TEXT = "naïve café — 你好，世界! 👩‍👩‍👧 und ß; emoji 🧑🏽‍🚀 ok\n\n  two  spaces"


def byte_level() -> PreTrainedTokenizerFast:
    """Every token is a byte, but for a few merges: characters are split over tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["the cat, the mat and the hat"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama-2's kind: spaces are ▁, the first is stripped, unknown characters are runs of byte tokens."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", *"abcdefghijklmnopqrstuvwxyz,!ï"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback(), "characters": tiny_tokenizer()}


def pieces_of(tokenizer, ids, stop=(), **options):
    stream = Detokenizer(tokenizer).stream(stop, **options)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_decoded_text(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(TEXT * 5)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if name != "characters":
        assert TEXT in "".join(pieces)
        assert "\ufffd" not in "".join(pieces) and "" in pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
def test_any_ids_at_all_even_bytes_that_are_no_text(name, skip):
    tokenizer = TOKENIZERS[name]
    draw = random.Random(0)
    for length in (0, 1, 2, 7, 60, 400):
        for _ in range(10):
            ids = [draw.randrange(len(tokenizer)) for _ in range(length)]
            whole = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=skip)) == whole


def test_a_character_arrives_when_its_last_byte_does():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer("a你b🚀")["input_ids"]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "你", "b", "", "", "", "🚀", ""]


def test_bytes_that_never_become_a_character_do_not_slow_the_stream():
    tokenizer = TOKENIZERS["byte-level"]
    bad = tokenizer.convert_tokens_to_ids("ÿ")  # the byte 0xFF
    stream = Detokenizer(tokenizer).stream()
    text = "".join(stream.push(bad) for _ in range(2000))
    assert len(stream._window) <= 25
    assert text + stream.finish() == tokenizer.decode([bad] * 2000) == "\ufffd" * 2000


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcabd, end", ["abd"], "abc"),
        ("one. two\n\nthree", ["\n\n", "three"], "one. two"),
        ("one. two\nthree", ["\n\n"], "one. two\nthree"),  # only nearly a stop string
        ("aaab", ["aab"], "a"),
        ("xabcy", ["abcd", "b"], "xa"),  # the shorter one is complete first
        ("stop", ["stop"], ""),
        ("ends in sto", ["stop"], "ends in sto"),  # held back, then let go
        ("你好。再见", ["。"], "你好"),
    ],
)
@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
def test_stop_strings_are_cut_and_never_shown(name, text, stop, expected):
    tokenizer = TOKENIZERS[name]
    pieces = pieces_of(tokenizer, tokenizer(text)["input_ids"], stop)
    assert "".join(pieces) == expected
    for n in range(len(pieces)):
        assert expected.startswith("".join(pieces[:n]))


def test_special_tokens_are_left_out_or_written():
    tokenizer = TOKENIZERS["byte-level"]
    ids = [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert "".join(pieces_of(tokenizer, ids)) == "the cat"
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == "the cat<|end|>"
    assert Detokenizer(tokenizer).token(ids[-1]) == "<|end|>"
