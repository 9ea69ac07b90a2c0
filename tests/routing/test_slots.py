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
from tokalign.routing.decode import row_attention
from tokalign.routing.decode import slots as slots_module
from tokalign.routing.decode.slots import SMALLEST, CachedModel, slots_for

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


@pytest.mark.parametrize("gathered", [0, 2**20])
@pytest.mark.parametrize("make", [llama, qwen2, mistral, gemma2])
def test_any_subset_of_rows_by_any_number_of_tokens(make, gathered, monkeypatch):
    monkeypatch.setattr(slots_module, "GATHERED", gathered)
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
            most = draw.choice([1, 1, 3, 20, 20 if turn < 20 else 300])
            tokens = [[draw.randrange(6, 60) for _ in range(draw.randint(1, most))] for _ in rows]
            logits, hidden = cached.extend(rows, tokens, hidden=True)
            for place, (row, new) in enumerate(zip(rows, tokens, strict=True)):
                sequences[row] += new
                expected, state = whole(model, sequences[row])
                torch.testing.assert_close(logits[place], expected, atol=5e-4, rtol=1e-4)
                torch.testing.assert_close(hidden[place], state, atol=5e-4, rtol=1e-4)
            assert cached.lengths == [len(sequence) for sequence in sequences]
    assert max(cached.lengths) > SMALLEST  # rows have changed their class, windows have wrapped
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
        assert cached.cost(0, 1) == 0 and cached.cost(1, 500) >= 500 - SMALLEST
    cached.drop(1)
    assert cached.held == 2 * SMALLEST


def buffers(cached) -> tuple[torch.Tensor, ...]:
    return tuple(keys for keys, _ in cached._layers[0].buffers.values())


def slots(cached) -> int:
    return sum(keys.shape[0] * keys.shape[2] for keys in buffers(cached))


def test_keys_and_values_are_read_in_place_and_an_empty_batch_holds_no_memory(monkeypatch):
    monkeypatch.setattr(slots_module, "GATHERED", 0)
    shown: list[torch.Tensor] = []
    plain = row_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        row_attention, "scaled_dot_product_attention", lambda q, k, *a, **b: shown.append(k) or plain(q, k, *a, **b)
    )
    cached = CachedModel(tiny_model(60, layers=1))
    with torch.inference_mode():
        for row in range(4):
            cached.add()
            cached.extend([row], [[7] * (row + 1)])
        for rows, blocks in (([0, 1, 2, 3], [4]), ([1, 2], [2]), ([0, 2, 3], [1, 2])):
            shown.clear()
            cached.extend(rows, [[8]] * len(rows))
            assert [len(keys) for keys in shown] == blocks
            assert {keys.shape[1] for keys in shown} == {2}  # never repeated for the query heads that share them
            (whole,) = buffers(cached)
            assert all(k.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for k in shown)
            assert max(k.shape[2] for k in shown) == max(cached.lengths[row] for row in rows)  # and no further
    for _ in range(4):
        cached.drop(0)
    assert not buffers(cached) and cached.lengths == [] and cached.held == 0


def test_a_long_row_does_not_widen_short_ones():
    model = tiny_model(60, layers=1)
    lengths = [3000, *[200] * 31]
    cached, read = CachedModel(model), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    with torch.inference_mode():
        for _ in lengths:
            cached.add()
        cached.extend(range(32), [[7] * length for length in lengths])
        assert read == [sum(lengths)]  # no padding
        assert sum(lengths) <= cached.held <= slots(cached) <= 2 * sum(lengths)
        cached.drop(0)
        assert slots(cached) <= 2 * sum(lengths[1:])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 193, 257, 400, 1025, 16_385, 40_960])
def test_a_row_takes_at_most_half_more_than_it_needs(length):
    assert length <= slots_for(length) <= max(1.5 * length, SMALLEST)
    assert slots_for(slots_for(length)) == slots_for(length)


def test_under_continuous_traffic_buffers_follow_the_rows_without_a_copy_a_step():
    cached, draw = CachedModel(tiny_model(60, layers=1)), random.Random(0)
    layer, fits, left, waiting_long, most = cached._layers[0], [], [], 0, 0
    fit = layer.fit
    layer.fit = lambda size: fits.append(fit(size))
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
            most = max(most, cached.held)
            left = [each - 1 for each in left]
            for row in reversed(range(8)):
                if not left[row]:
                    cached.drop(row)
                    left[row] = left[-1]
                    left.pop()
            assert slots(cached) <= 1.5 * cached.held + 512
    assert most >= 512 + 7 * SMALLEST and len(fits) < 30  # three long rows came and went


def test_what_a_pass_cannot_hold_is_read_in_several(monkeypatch):
    monkeypatch.setattr(slots_module, "FORWARD_TOKENS", 8)
    model, draw = tiny_model(60), random.Random(0)
    cached, read = CachedModel(model), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    texts = [[draw.randrange(6, 60) for _ in range(count)] for count in (5, 26, 3, 8, 1)]
    with torch.inference_mode():
        for _ in texts:
            cached.add()
        logits, states = cached.extend(range(5), texts, keep=3, hidden=True)
    assert max(read) == 8 and sum(read) == sum(map(len, texts))
    for row, text in enumerate(texts):
        for back in range(min(3, len(text))):
            expected, state = whole(model, text[: len(text) - back])
            torch.testing.assert_close(logits[row, -1 - back], expected, atol=5e-4, rtol=1e-4)
            if not back:
                torch.testing.assert_close(states[row], state, atol=5e-4, rtol=1e-4)


def test_sliding_layers_keep_their_window_and_rows_forget_what_they_can_go_on_from():
    model, draw = mistral().eval(), random.Random(0)
    cached = CachedModel(model)
    text = [draw.randrange(6, 60) for _ in range(1000)]
    with torch.inference_mode():
        for _ in range(3):
            cached.add()
        cached.extend([0], [text])
        (keys,) = buffers(cached)
        assert keys.shape[2] < 1000 < cached.held  # the window of 5, and what may be forgotten
        cached.truncate(0, 1000 - row_attention.SLACK)
        cached.share(0, [1], 1000 - row_attention.SLACK)
        assert cached.lengths == [1000 - row_attention.SLACK] * 2 + [0]
        logits, _ = cached.extend([0, 1], [[7, 8], [9]])
        for row, new in enumerate([[7, 8], [9]]):
            expected, _ = whole(model, text[: 1000 - row_attention.SLACK] + new)
            torch.testing.assert_close(logits[row], expected, atol=5e-4, rtol=1e-4)
        cached.share(0, [2], 300)  # long gone: the row reads the text itself
        cached.truncate(0, 300)
        assert cached.lengths[0] == cached.lengths[2] == 0
        logits, _ = cached.extend([0, 2], [text[:400], text[:20]])
        cached.truncate(0, 390)
        assert cached.lengths[0] == 390
        logits, _ = cached.extend([0, 2], [[7], [8]])
    for place, sequence in enumerate(([*text[:390], 7], [*text[:20], 8])):
        torch.testing.assert_close(logits[place], whole(model, sequence)[0], atol=5e-4, rtol=1e-4)


def test_models_whose_cache_cannot_be_extended_row_by_row_are_refused():
    config = MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"MambaForCausalLM \(model_type 'mamba'\)"):
        CachedModel(MambaForCausalLM(config))
    model = tiny_model(60)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2', which takes no mask"):
        CachedModel(model)


def test_a_row_that_is_not_finite_leaves_nothing_where_it_has_been(monkeypatch):
    monkeypatch.setattr(slots_module, "SMALLEST", 16)
    sick = tiny_model(60, seed=0)
    with torch.no_grad():
        sick.get_input_embeddings().weight[5] = torch.inf
    model = CachedModel(sick)
    for _ in range(3):
        model.add()
    model.extend([0, 1], [[5] + [7] * 9, [7, 8, 9]])
    model.extend([0], [[7] * 10])  # moves to a larger class; the next row takes its place
    model.extend([2], [[9] * 12])
    logits, _ = model.extend([1, 2], [[7], [8]])  # of unequal length, so that the shorter one's free slots are masked
    assert logits.isfinite().all()
    model.wipe(0)
    model.drop(0)
    model.add()
    model.extend([2], [[7] * 17])
    assert model.extend([0, 1, 2], [[7], [7], [7]])[0].isfinite().all()


def test_a_model_that_is_spread_over_devices_is_given_places_and_no_tensor():
    """accelerate would move a tensor to the first device; what it is to choose from stands on the last."""
    model = tiny_model(60)
    given: list = []
    model.register_forward_pre_hook(lambda _, __, named: given.append(named.get("logits_to_keep")), with_kwargs=True)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    cached = CachedModel(model)
    for _ in range(2):
        cached.add()
    texts = [[7, 8, 9], [10, 11]]
    logits, states = cached.extend([0, 1], texts, keep=2, hidden=True)
    assert given == [[3, 4, 0, 1]]  # the two tokens of the second row stand first
    for row, text in enumerate(texts):
        expected, state = whole(model.eval(), text)
        torch.testing.assert_close(logits[row, -1], expected, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(states[row], state, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [llama, mistral])
def test_what_is_forgotten_because_it_is_not_finite_is_not_seen_beside_a_longer_row(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.inf
    cached, texts = CachedModel(model), [[7, 8, 9] * 100, [10, 11] * 170]
    with torch.inference_mode():
        for _ in texts:
            cached.add()
        cached.extend([0, 1], texts)
        cached.extend([0], [[12, 5, 13]])
        cached.wipe(0, 300)
        cached.truncate(0, 300)
        logits, _ = cached.extend([0, 1], [[14], [15]])
    for row, (text, new) in enumerate(zip(texts, (14, 15), strict=True)):
        torch.testing.assert_close(logits[row], whole(model, [*text, new])[0], atol=5e-4, rtol=1e-4)
