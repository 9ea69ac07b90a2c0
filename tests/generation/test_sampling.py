"""Sampling against the distributions that it claims to draw from, and the hash against its definition."""

import pytest
import torch
from scipy import stats

from tokalign.generation.sampling import Penalties, sample, uniforms

MASK = 2**64 - 1


def splitmix(x: int) -> int:
    """The published finaliser in plain integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_uniforms_equal_the_hash_in_plain_integers():
    triples = [(0, 0, 0), (1, 2, 3), (2**63 - 1, 63, 511), (12345678901234567, 0, 40000)]
    got = uniforms(*(torch.tensor(column) for column in zip(*triples, strict=True)))
    for value, (seed, k, step) in zip(got.tolist(), triples, strict=True):
        assert value == (splitmix(splitmix(splitmix(seed) ^ k) ^ step) >> 12) / 2**52


def test_uniforms_are_uniform_in_each_of_their_numbers():
    count = torch.arange(20000)
    zero = torch.zeros_like(count)
    for triple in [(count, zero, zero), (zero, count, zero), (zero, zero, count)]:
        assert stats.kstest(uniforms(*triple).numpy(), "uniform").pvalue > 0.001


def nucleus(probs: list[float], top_p: float) -> list[float]:
    """The definition in a plain loop: most probable tokens until their sum reaches top_p."""
    kept, total = [0.0] * len(probs), 0.0
    for v in sorted(range(len(probs)), key=lambda v: -probs[v]):
        kept[v] = probs[v]
        total += probs[v]
        if total >= top_p:
            break
    return [p / sum(kept) for p in kept]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (0.7, 0.9)])
def test_draws_follow_the_exact_probabilities(temperature, top_p):
    torch.manual_seed(0)
    logits = torch.randn(12) * 1.5
    logits[3] = -torch.inf  # banned
    expected = nucleus((logits.double() / temperature).softmax(-1).tolist(), top_p)
    draws = 40000
    u = uniforms(torch.full((draws,), 7), torch.arange(draws), torch.zeros(draws, dtype=torch.long))
    ids = sample(
        logits.expand(draws, -1),
        u,
        torch.full((draws,), temperature),
        torch.full((draws,), top_p, dtype=torch.float64),
    )
    counts = ids.bincount(minlength=12).tolist()
    possible = [v for v in range(12) if expected[v] > 0]
    assert sum(counts) == sum(counts[v] for v in possible)
    test = stats.chisquare([counts[v] for v in possible], [expected[v] * draws for v in possible])
    assert test.pvalue > 0.001


def test_rows_of_different_settings_do_not_disturb_each_other():
    torch.manual_seed(1)
    logits, u = torch.randn(60, 30), torch.rand(60, dtype=torch.float64)
    temperature = torch.tensor([0.0, 1.0, 0.3] * 20)
    top_p = torch.tensor([1.0, 0.4, 0.9, 1.0] * 15, dtype=torch.float64)
    together = sample(logits, u, temperature, top_p)
    alone = [sample(logits[k : k + 1], u[k : k + 1], temperature[k : k + 1], top_p[k : k + 1]) for k in range(60)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[::3].tolist() == logits[::3].argmax(-1).tolist()


def test_a_flat_tail_of_a_large_vocabulary_keeps_its_probability():
    """128k tokens of 1e-8 each after one of almost 1: a float32 sum would lose all of them."""
    logits = torch.full((1, 131072), -18.4)
    logits[0, 0] = 0.0
    tail = 1 - logits.double().softmax(-1)[0, 0].item()
    u = torch.tensor([1 - tail / 2], dtype=torch.float64)
    drawn = sample(logits, u, torch.ones(1), torch.ones(1, dtype=torch.float64)).item()
    assert 64000 < drawn < 67000  # the middle of the tail


def test_the_largest_uniform_never_draws_a_banned_last_token():
    logits = torch.zeros(1, 5)
    logits[0, 3:] = -torch.inf
    u = torch.tensor([1 - 2.0**-52], dtype=torch.float64)
    assert sample(logits, u, torch.ones(1), torch.ones(1, dtype=torch.float64)).item() == 2


def narrowed(probs: list[float], top_k: int, min_p: float) -> list[float]:
    """Both definitions in a plain loop."""
    least = max(min_p * max(probs), sorted(probs, reverse=True)[min(top_k, len(probs)) - 1] if top_k > 0 else 0)
    kept = [p if p >= least else 0.0 for p in probs]
    return [p / sum(kept) for p in kept]


@pytest.mark.parametrize(("top_k", "min_p", "top_p"), [(3, 0.0, 1.0), (0, 0.3, 1.0), (99, 0.1, 0.7), (4, 0.2, 0.8)])
def test_draws_follow_top_k_min_p_and_then_top_p(top_k, min_p, top_p):
    torch.manual_seed(3)
    logits = torch.randn(12)
    logits[5] = logits[2]  # a tie is kept or dropped as one
    expected = nucleus(narrowed(logits.double().softmax(-1).tolist(), top_k, min_p), top_p)
    draws = 20000
    u = uniforms(torch.full((draws,), 7), torch.arange(draws), torch.zeros(draws, dtype=torch.long))
    columns = [torch.full((draws,), value, dtype=torch.float64) for value in (1.0, top_p)]
    ids = sample(logits.expand(draws, -1), u, *columns, torch.full((draws,), top_k), torch.full((draws,), min_p))
    counts = ids.bincount(minlength=12).tolist()
    possible = [v for v in range(12) if expected[v] > 0]
    assert 1 < len(possible) < 12 and sum(counts) == sum(counts[v] for v in possible)
    assert stats.chisquare([counts[v] for v in possible], [expected[v] * draws for v in possible]).pvalue > 0.001


def test_neighbours_with_top_k_and_min_p_change_no_bit_of_a_row():
    torch.manual_seed(2)
    logits, u = torch.randn(40, 30), torch.rand(40, dtype=torch.float64)
    ones, top_p = torch.ones(40), torch.tensor([1.0, 0.8] * 20, dtype=torch.float64)
    top_k, min_p = torch.tensor([0, 0, 2, -1] * 10), torch.tensor([0.0, 0.0, 0.0, 0.5] * 10)
    together = sample(logits, u, ones, top_p, top_k, min_p)
    plain = sample(logits, u, ones, top_p)
    free = [k for k in range(40) if k % 4 < 2]
    assert together[free].tolist() == plain[free].tolist() and together.tolist() != plain.tolist()


def test_penalties_are_the_published_ones():
    """Token by token in plain numbers: repetition over prompt and text, the other two over the text alone."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
    prompt, text, (r, a, f) = [0, 1], [3, 4, 3, 5], (1.5, 0.25, 0.125)
    penalties = Penalties(torch.tensor(prompt), 6, repetition=r, presence=a, frequency=f)
    for token in text:
        penalties.add(token)
    expected = []
    for v, z in enumerate(logits.tolist()):
        if v in prompt + text:
            z = z / r if z > 0 else z * r
        expected.append(z - f * text.count(v) - a * (v in text))
    changed = logits.clone()
    penalties.apply_(changed)
    assert changed.tolist() == pytest.approx(expected)
