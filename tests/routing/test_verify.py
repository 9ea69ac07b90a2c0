"""Lossless decoding: the LLM's own completion at every threshold, for fewer passes of the LLM."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from tests.routing.test_generator import (
    GREEDY,
    LLM,
    SAMPLED,
    SLM,
    TOKENIZER,
    VOCAB,
    Toy,
    make_prompts,
    same,
    tiny_router,
)
from tests.routing.test_schedule import poisoned
from tokalign.generation.protocol import SamplingParams
from tokalign.generation.sampling import sample, uniforms
from tokalign.routing.decode import schedule, slots
from tokalign.routing.decode.backend import RoutedStats, RowFailed
from tokalign.routing.decode.costs import full_cost
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import (
    AlwaysLLM,
    CallPolicy,
    EntropyPolicy,
    HysteresisPolicy,
    NeverLLM,
    ReplayPolicy,
    RouterPolicy,
    RoutingPolicy,
)


def near(model, noise: float):
    """The model with other weights, so near that the two often agree."""
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim == 2:
                weight.add_(noise * weight.std() * torch.randn_like(weight))
    return other


NEAR = near(LLM, 0.02)


def pair(policy: RoutingPolicy, *, slm=NEAR, **options) -> RoutedGenerator:
    return RoutedGenerator(slm, LLM, TOKENIZER, policy, max_rows=options.pop("max_rows", 5), verify=True, **options)


def stats_of(results) -> RoutedStats:
    stats = RoutedStats()
    for completions in results:
        for c in completions:
            stats += c.stats
    return stats


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "policy",
    [EntropyPolicy(t) for t in (0.0, 2.5, 3.3, 99.0)]
    + [Toy(0.5), HysteresisPolicy(0.7), CallPolicy({7: 4}), RouterPolicy(tiny_router(), 0.5), AlwaysLLM()],
)
def test_completions_are_the_llms_alone_whatever_the_policy(policy, params):
    prompts = make_prompts(8)
    alone = RoutedGenerator(SLM, LLM, TOKENIZER, AlwaysLLM()).generate(prompts, params)
    slm = SLM if isinstance(policy, RouterPolicy) else NEAR  # whose hidden size the router knows
    same(pair(policy, slm=slm, most_draft=5).generate(prompts, params), alone)


def test_fewer_passes_of_the_llm_and_counts_that_add_up():
    prompts = make_prompts(8)
    results = pair(EntropyPolicy(3.2), max_rows=3).generate(prompts, GREEDY)
    stats = stats_of(results)
    written = sum(len(c.token_ids) for completions in results for c in completions)
    assert stats.tokens == written and 0 < stats.slm_tokens < stats.drafted
    assert written > 1.5 * stats.handoffs  # a pass gives more than a token
    for (c,) in results:
        assert c.stats.llm_tokens == sum(c.written_by) <= c.stats.handoffs <= c.stats.llm_tokens + 1
        # Who wrote a token, and whether the SLM had drawn it: a kept draft agrees, a correction does not
        assert all(agreed for by_llm, agreed in zip(c.written_by, c.agreed, strict=True) if not by_llm)
        assert [s is None for s in c.scores] == [a is None for a in c.agreed]
    # The LLM reads each prompt and each draft once, and each of its own tokens but a completion's last
    last = sum(c.written_by[-1] for (c,) in results)
    assert stats.llm_positions == sum(len(p) for p in prompts) + stats.drafted + stats.llm_tokens - last
    assert full_cost(stats, 1.0, 10.0, 0.5) * written == pytest.approx(
        stats.slm_positions + 10 * stats.llm_positions + 0.5 * (stats.drafted + stats.handoffs)
    )


def test_a_replayed_look_is_where_the_llm_writes():
    """An SLM that is the LLM: every draft is kept, so the LLM writes at the looks and behind full drafts alone."""
    ((c,),) = pair(ReplayPolicy([[3, 4]]), slm=LLM, most_draft=6).generate(
        [make_prompts(1)[0]], SamplingParams(seed=0, max_tokens=20)
    )
    places = [i for i, by_llm in enumerate(c.written_by) if by_llm]
    assert places == [i for i in (3, 4, 11, 18) if i < len(c.token_ids)] and len(c.token_ids) > 12
    assert [c.agreed[i] for i in places[:3]] == [True, True, None]  # behind a full draft the SLM was not asked
    assert c.stats.handoffs in (len(places), len(places) + 1)


def test_the_callback_is_a_stream_of_labels_of_the_llms_text():
    heard: list[tuple[list[int], list[bool | None]]] = []
    prompts = make_prompts(6)
    params = [SamplingParams(seed=i, max_tokens=15) for i in range(6)]
    generator = pair(EntropyPolicy(3.2), on_verified=lambda ids, agreed: heard.append((ids, agreed)))
    results = generator.generate(prompts, params)
    expected = {tuple(p + c.token_ids): c.agreed for p, (c,) in zip(prompts, results, strict=True)}
    assert {tuple(ids): agreed for ids, agreed in heard} == expected and len(heard) == 6
    # What it says is what the SLM draws behind the LLM's text, read anew and without a cache
    look = RoutedGenerator(NEAR, LLM, TOKENIZER, NeverLLM())
    for prompt, p, (c,) in zip(prompts, params, results, strict=True):
        for step, agreed in enumerate(c.agreed):
            if agreed is not None:
                # The draw of this step: the SLM alone, whose first steps are the LLM's text
                drawn = draw_at(look, prompt + c.token_ids[:step], p, step)
                assert agreed == (drawn == c.token_ids[step])


def draw_at(generator: RoutedGenerator, ids: list[int], params: SamplingParams, step: int) -> int:
    """What the SLM draws behind these ids as step `step` of a request."""
    with torch.no_grad():
        logits = generator.slm(torch.tensor([ids])).logits[:, -1, : generator.shared_vocab]
    u = uniforms(*(torch.tensor([x]) for x in (params.seed, 0, step)))
    return int(sample(logits, u, torch.tensor([params.temperature]), torch.tensor([params.top_p])))


def test_stop_strings_ends_and_limits_inside_a_draft():
    prompts = make_prompts(10, seed=4)
    alone = RoutedGenerator(SLM, LLM, TOKENIZER, AlwaysLLM())
    texts = [TOKENIZER.decode(c.token_ids) for (c,) in alone.generate(prompts, GREEDY)]
    stops = tuple({text[5:7] for text in texts if len(text) > 8})
    for params in (
        replace(GREEDY, stop=stops),
        replace(GREEDY, stop_token_ids=(9, 12, 30)),
        replace(GREEDY, max_tokens=1),
        replace(GREEDY, max_tokens=7),
    ):
        expected = alone.generate(prompts, params)
        same(pair(NeverLLM(), most_draft=9).generate(prompts, params), expected)
        assert params.max_tokens < 24 or any(c.finish_reason == "stop" for (c,) in expected)


def test_a_stream_gives_nothing_that_is_not_verified_and_cancelling_leaves_the_rest():
    prompts = make_prompts(4, seed=2)
    params = [SamplingParams(seed=i, max_tokens=15) for i in range(4)]
    generator = pair(EntropyPolicy(99.0), max_rows=2)
    expected = [c.token_ids for (c,) in generator.generate(prompts, params)]
    assert [token.id for token in generator.stream(prompts[0], params[0])] == expected[0]
    batch = generator.batch()
    keys = [batch.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    written: dict[int, list[int]] = {key: [] for key in keys}
    for step in range(1000):
        if step == 3:  # in the middle of a draft
            batch.cancel(keys[0])
        for key, token, _ in batch.step():
            written[key].append(token.id)
        if not batch:
            break
    assert [written[key] for key in keys[1:]] == expected[1:] and not written[keys[0]]
    assert [m.lengths for m in batch._models] == [[], []] and not batch._drafts


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"llm_span": 2}, "llm_span is 2: with verify"), ({"most_draft": 0}, "most_draft is 0")],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pair(NeverLLM(), **options)


@pytest.mark.parametrize("options", [{"llm_wait": 0}, {"llm_wait": 3}, {"prefill_chunk": 4}, {"token_budget": 150}])
def test_the_schedule_changes_no_verified_token(options, monkeypatch):
    monkeypatch.setattr(slots, "SMALLEST", 8)
    monkeypatch.setattr(schedule, "ROOM", 8)  # so that the small budget lets several rows in, and sends some away
    prompts = make_prompts(8)
    each = [SamplingParams(seed=i, max_tokens=30, temperature=0.7 * (i % 2)) for i in range(8)]
    alone = RoutedGenerator(SLM, LLM, TOKENIZER, AlwaysLLM()).generate(prompts, each)
    same(pair(EntropyPolicy(3.2), most_draft=6, **options).generate(prompts, each), alone)


@pytest.mark.parametrize("policy", [EntropyPolicy(3.2), AlwaysLLM()])
def test_a_row_without_finite_logits_fails_alone(policy):
    generator = poisoned()
    generator = RoutedGenerator(generator.slm, generator.llm, TOKENIZER, policy, verify=True, max_rows=3)
    with torch.no_grad():
        generator.llm.get_input_embeddings().weight[5] = torch.inf
    batch = generator.batch()
    bad = batch.add([7, 5, *[8] * 40], GREEDY)
    prompts = make_prompts(5)
    keys = [batch.add(prompt, GREEDY) for prompt in prompts]
    given: dict[int, list] = {key: [] for key in [bad, *keys]}
    while batch:
        for key, token, _ in batch.step():
            given[key].append(token)
    assert [type(token) for token in given[bad]] == [RowFailed]
    expected = generator.generate(prompts, GREEDY)
    assert [[token.id for token in given[key]] for key in keys] == [c.token_ids for (c,) in expected]


def test_penalties_and_narrow_sampling_are_the_llms_too():
    prompts = make_prompts(6)
    each = [
        SamplingParams(
            seed=i,
            max_tokens=24,
            temperature=0.8 * (i % 2),
            repetition_penalty=(1.0, 1.3)[i % 3 > 0],
            presence_penalty=0.4 * (i % 3 == 2),
            frequency_penalty=0.5 * (i % 3 == 1),
            top_k=(0, 9)[i > 3],
        )
        for i in range(6)
    ]
    alone = RoutedGenerator(SLM, LLM, TOKENIZER, AlwaysLLM()).generate(prompts, each)
    results = pair(EntropyPolicy(99.0), most_draft=6).generate(prompts, each)
    same(results, alone)
    assert any(not all(c.written_by) for (c,) in results[1:3])  # drafts of rows with penalties are kept too


def test_layers_with_a_sliding_window_are_rolled_back_too():
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=8, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    llm = MistralForCausalLM(config).eval()
    slm, prompts = near(llm, 0.02), make_prompts(4)
    each = [SamplingParams(seed=i, max_tokens=60, temperature=0.8 * (i % 2)) for i in range(4)]
    alone = RoutedGenerator(slm, llm, TOKENIZER, AlwaysLLM()).generate(prompts, each)
    results = RoutedGenerator(slm, llm, TOKENIZER, NeverLLM(), verify=True, max_rows=3).generate(prompts, each)
    same(results, alone)
    assert max(len(c.token_ids) for (c,) in results) > 4 * 8 and stats_of(results).slm_tokens > 20


def test_no_draft_reaches_over_the_length_at_which_longrope_changes():
    torch.manual_seed(1)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, rope_parameters=rope, max_position_embeddings=512,
        original_max_position_embeddings=40, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    llm = Phi3ForCausalLM(config).eval()
    prompts = [[7 + i + j for j in range(30 + i)] for i in range(11)]  # some end just before the switch, one at it
    each = [SamplingParams(seed=i, max_tokens=24, temperature=0.5 * (i % 2)) for i in range(11)]
    alone = RoutedGenerator(llm, llm, TOKENIZER, AlwaysLLM()).generate(prompts, each)
    for slm in (llm, near(llm, 0.02)):
        results = RoutedGenerator(slm, llm, TOKENIZER, NeverLLM(), verify=True, max_rows=4).generate(prompts, each)
        same(results, alone)
    assert stats_of(results).slm_tokens > 20


@pytest.mark.parametrize("budget", [65536, 150])
@pytest.mark.parametrize("poisoned_side", [0, 1])
def test_a_draft_at_which_a_model_overflows_is_dropped_and_not_the_row(poisoned_side, budget, monkeypatch):
    monkeypatch.setattr(slots, "SMALLEST", 8)
    monkeypatch.setattr(schedule, "ROOM", 8)
    models = near(LLM, 0.02), copy.deepcopy(LLM)
    with torch.no_grad():
        models[0].lm_head.weight[5] = 2 * models[0].lm_head.weight[9]  # often drafted, never written by the LLM
        models[1].lm_head.weight[5] = 0
        models[poisoned_side].get_input_embeddings().weight[5] = torch.inf
    prompts = make_prompts(8)
    alone = RoutedGenerator(*models, TOKENIZER, AlwaysLLM()).generate(prompts, GREEDY)
    generator = RoutedGenerator(*models, TOKENIZER, NeverLLM(), verify=True, max_rows=5, token_budget=budget)
    results = generator.generate(prompts, GREEDY)
    same(results, alone)
    assert stats_of(results).slm_tokens > 20
