"""Rows of unequal length in one cache, against plain forward passes over whole sequences."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.support import tiny_model
from tokalign.routing.decode.slots import FORWARD_TOKENS, PADDED_SHARE, PADDING, ROOM, SPARE, CachedModel, forward_parts

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, max_position_embeddings=512,
)  # fmt: skip


def llama(**_):
    return tiny_model(60)


def qwen2(**_):
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def mistral(**_):
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))


def gemma2(**_):  # one sliding and one full layer, soft-capped logits, eager attention
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=5, head_dim=8))


@torch.no_grad()
def whole(model, sequence: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last hidden state after a sequence, without any cache."""
    ids = torch.tensor([sequence])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    return model(input_ids=ids, use_cache=False).logits[0, -1], hidden


@pytest.mark.parametrize("make", [llama, qwen2, mistral, gemma2])
def test_any_subset_of_rows_by_any_number_of_tokens(make):
    torch.manual_seed(0)
    model = make().eval()
    cached, draw = CachedModel(model), random.Random(0)
    sequences: list[list[int]] = []
    with torch.inference_mode():
        for turn in range(40):
            if turn % 4 == 0 and len(sequences) < 6:
                cached.add()
                sequences.append([])
            if turn % 9 == 8:  # a row leaves, the last one takes its number
                gone = draw.randrange(len(sequences))
                cached.drop(gone)
                last = sequences.pop()
                if gone < len(sequences):
                    sequences[gone] = last
            rows = sorted(draw.sample(range(len(sequences)), draw.randint(1, len(sequences))))
            most = draw.choice([1, 1, 3, 20])
            tokens = [[draw.randrange(6, 60) for _ in range(draw.randint(1, most))] for _ in rows]
            logits, hidden = cached.extend(rows, tokens, hidden=True)
            for place, (row, new) in enumerate(zip(rows, tokens, strict=True)):
                sequences[row] += new
                expected, state = whole(model, sequences[row])
                torch.testing.assert_close(logits[place], expected, atol=5e-4, rtol=1e-4)
                torch.testing.assert_close(hidden[place], state, atol=5e-4, rtol=1e-4)
            assert cached.lengths == [len(sequence) for sequence in sequences]
    assert max(cached.lengths) > ROOM  # buffers have been outgrown
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("make", [llama, gemma2])
def test_a_row_can_be_given_the_start_of_another(make):
    model = make().eval()
    cached = CachedModel(model)
    prompt = [7, 9, 20, 31, 8, 44, 12]
    with torch.inference_mode():
        cached.add()
        cached.extend([0], [[*prompt, 50, 51]])  # well beyond the prompt
        for _ in range(3):
            cached.add()
        cached.share(0, [1, 3], len(prompt))
        assert cached.lengths == [9, 7, 0, 7]
        logits, states = cached.extend([0, 1, 2, 3], [[52], [10, 11], [13], [14]])
    assert states is None
    for row, sequence in enumerate([[*prompt, 50, 51, 52], [*prompt, 10, 11], [13], [*prompt, 14]]):
        torch.testing.assert_close(logits[row], whole(model, sequence)[0], atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [llama, gemma2])
def test_the_last_tokens_of_each_row_are_given_and_can_be_forgotten(make):
    model = make().eval()
    cached = CachedModel(model)
    texts = [[7, 9, 20, 31], [8, 44], [12, 13, 14] * 100]
    with torch.inference_mode():
        for _ in texts:
            cached.add()
        drafts = [[21], [22, 23, 24], [25, 26]]
        logits, _ = cached.extend([0, 1, 2], [a + b for a, b in zip(texts, drafts, strict=True)], keep=3)
        assert logits.shape == (3, 3, 60)
        for row, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            for back in range(3):
                expected = whole(model, (text + draft)[: len(text + draft) - back])[0]
                torch.testing.assert_close(logits[row, -1 - back], expected, atol=5e-4, rtol=1e-4)
            cached.truncate(row, len(text))  # the draft is dropped, another text follows
        assert cached.lengths == [4, 2, 300]
        cached.truncate(0, 10)
        assert cached.lengths == [4, 2, 300]
        logits, _ = cached.extend([0, 1, 2], [[30, 31], [32], [33]])
    for row, new in enumerate([[30, 31], [32], [33]]):
        torch.testing.assert_close(logits[row], whole(model, texts[row] + new)[0], atol=5e-4, rtol=1e-4)


def test_what_rows_hold_is_told_before_they_grow():
    cached = CachedModel(tiny_model(60))
    with torch.inference_mode():
        for length in (3, 300, 70):
            before, cost = cached.held, cached.cost(len(cached.lengths), length)
            cached.add()
            cached.extend([len(cached.lengths) - 1], [[7] * length])
            assert cached.held == before + cost >= sum(cached.lengths)
        assert cached.cost(0, 1) == 0 and cached.cost(1, 500) >= 436
    cached.drop(1)
    assert cached.held < 300


def test_a_full_batch_is_read_in_place_and_an_empty_one_holds_no_memory():
    cached = CachedModel(tiny_model(60))
    with torch.inference_mode():
        for row in range(3):
            cached.add()
            cached.extend([row], [[7] * (row + 1)])
        layer = cached._layers[0]
        shown = []
        update = layer.update
        layer.update = lambda *args, **kwargs: shown.append(update(*args, **kwargs)) or shown[-1]
        cached.extend([0, 1, 2], [[8], [8], [8]])
        assert shown[0][0].untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()
        assert shown[0][0].shape[2] == 4  # no further than the longest row
        cached.extend([0, 2], [[8], [8]])  # a subset costs a copy
        assert shown[1][0].untyped_storage().data_ptr() != layer.keys.untyped_storage().data_ptr()
    for _ in range(3):
        cached.drop(0)
    assert layer.keys is None and cached.lengths == []


def test_buffers_fit_the_rows_that_are_live_when_they_grow():
    cached = CachedModel(tiny_model(60))
    with torch.inference_mode():
        for _ in range(40):
            cached.add()
        cached.extend(range(40), [[7, 8]] * 40)
        assert cached._layers[0].keys.shape[0] >= 40
        for _ in range(38):
            cached.drop(0)
        cached.extend([0], [[7] * 300])
        assert cached._layers[0].keys.shape[0] == 2 and cached._layers[0].keys.shape[2] == 302 + ROOM + 1


def test_a_long_row_that_leaves_takes_its_buffers_along():
    model = tiny_model(60).eval()
    cached, draw = CachedModel(model), random.Random(0)
    sequences = [[draw.randrange(6, 60) for _ in range(length)] for length in (900, 5, 9)]
    with torch.inference_mode():
        for row, sequence in enumerate(sequences):
            cached.add()
            cached.extend([row], [sequence])
        keys = cached._layers[0]
        assert keys.keys.shape[2] == 900 + ROOM + 1
        cached.drop(0)
        sequences = [sequences[2], sequences[1]]
        assert keys.keys.shape[0] == 2 and keys.keys.shape[2] == 9 + ROOM + 1
        logits, _ = cached.extend([0, 1], [[7], [8, 9]])
    for row, new in enumerate([[7], [8, 9]]):
        sequences[row] += new
        torch.testing.assert_close(logits[row], whole(model, sequences[row])[0], atol=5e-4, rtol=1e-4)


def test_rows_that_come_after_a_long_one_do_not_get_its_length():
    cached = CachedModel(tiny_model(60))
    with torch.inference_mode():
        for row, length in enumerate([320, 250, 250]):
            cached.add()
            cached.extend([row], [[7] * length])
        cached.drop(0)  # 2 rows of 250: not yet worth a copy
        assert cached._layers[0].keys.shape[2] == 320 + ROOM + 1
        for _ in range(6):
            cached.add()
        cached.extend(range(2, 8), [[7]] * 6)
        assert cached._layers[0].keys.shape[0] == 9 and cached._layers[0].keys.shape[2] == 250 + ROOM + 1


def test_under_continuous_traffic_buffers_follow_the_rows_without_a_copy_a_step():
    cached, draw = CachedModel(tiny_model(60)), random.Random(0)
    layer, fits, left, waiting_long, most = cached._layers[0], [], [], 0, 0
    fit = layer.fit
    layer.fit = lambda: fits.append(fit())
    with torch.inference_mode():
        for step in range(300):
            waiting_long += step % 100 == 20
            new = [[7] for _ in left]
            while len(left) < 8:
                cached.add()
                left.append(draw.randint(5, 60))
                new.append([7] * (500 if waiting_long else 1))
                waiting_long = 0
            cached.extend(range(8), new)
            most = max(most, layer.keys.shape[2])
            left = [each - 1 for each in left]
            for row in reversed(range(8)):
                if not left[row]:
                    cached.drop(row)
                    left[row] = left[-1]
                    left.pop()
            held = layer.keys.shape[0] * (layer.keys.shape[2] - 1)
            assert held <= SPARE * (len(left) + len(left) // 8) * (max(cached.lengths) + ROOM)
    assert most > 500 and 6 <= len(fits) < 20  # three long rows came and went


def test_a_long_prompt_does_not_drag_short_rows_along():
    assert forward_parts([7, 1, 20, 9]) == [[2, 3, 0, 1]]  # one catch-up pass
    assert forward_parts([500, 1, 1, 480, 1]) == [[0, 3], [1, 2, 4]]
    draw = random.Random(0)
    for _ in range(50):
        counts = [draw.choice([1, draw.randint(2, 40), draw.randint(100, 30000)]) for _ in range(draw.randint(1, 40))]
        parts = forward_parts(counts)
        assert sorted(i for part in parts for i in part) == list(range(len(counts)))
        for part in parts:
            own = [counts[i] for i in part]
            padded = max(own) * len(own)
            assert len(own) == 1 or padded <= min(FORWARD_TOKENS, max(PADDING, PADDED_SHARE * sum(own)))


def test_models_whose_cache_cannot_be_extended_row_by_row_are_refused():
    config = MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM \(model_type 'mamba'\) keeps more than one key"):
        CachedModel(MambaForCausalLM(config))
    model = tiny_model(60)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2', which takes no mask"):
        CachedModel(model)
