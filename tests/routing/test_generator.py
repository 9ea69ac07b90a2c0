"""Routed decoding against each model's own engine, and against a plain loop that keeps no cache at all."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.support import ALPHABET, tiny_model, tiny_tokenizer
from tokalign.generation.arguments import EngineArguments
from tokalign.generation.protocol import SamplingParams
from tokalign.generation.sampling import sample, uniforms
from tokalign.generation.transformers_engine import TransformersEngine
from tokalign.routing.decode.backend import RoutedStats
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import (
    AlwaysLLM,
    CallPolicy,
    EntropyPolicy,
    HysteresisPolicy,
    NeverLLM,
    NextTokens,
    RandomPolicy,
    ReplayPolicy,
    RouterPolicy,
    RoutingPolicy,
)
from tokalign.routing.decode.schedule import RoutedBatch
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.stage.hashes import weights_hash

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
SLM, LLM = tiny_model(VOCAB, seed=0), tiny_model(VOCAB, seed=1, hidden_size=48, layers=3)
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def make_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(6, 60) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def qwen2(vocab: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, eos_token_id=1, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@dataclass
class Toy(RoutingPolicy):
    """A policy that looks at everything a router looks at: states, and which token the SLM predicts."""

    threshold: float = 0.5
    needs_slm: bool = True
    needs_hidden: bool = True

    def scores(self, tokens):
        hidden, logits = tokens.hidden, tokens.logits
        weight = torch.sin(torch.arange(hidden.shape[1]) * 1.7)
        top = logits.topk(3).values
        return torch.sigmoid(hidden.float() @ weight + top[:, 0] - top[:, 1] + torch.cos(logits.argmax(-1).float()) - 1)


@torch.no_grad()
def plain(generator: RoutedGenerator, prompt: list[int], params: SamplingParams, number: int, span: int):
    """One completion by the definition: both models read the whole prefix anew at every token."""
    policy, shared = generator.policy, generator.shared_vocab
    repetition, presence, frequency = params.repetition_penalty, params.presence_penalty, params.frequency_penalty

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        text, changed = tokens[len(prompt) :], logits[0].tolist()
        for v in {*tokens}:
            changed[v] = changed[v] / repetition if changed[v] > 0 else changed[v] * repetition
            changed[v] -= frequency * text.count(v) + presence * (v in text)
        return sample(torch.tensor([changed]), *how)

    tokens, written_by, scores, logprobs, left = list(prompt), [], [], [], 0
    while True:
        at = [torch.tensor([x]) for x in (params.seed, number, len(tokens) - len(prompt))]
        ids = torch.tensor([tokens])
        how = uniforms(*at), torch.tensor([params.temperature]), torch.tensor([params.top_p], dtype=torch.float64)
        how += torch.tensor([params.top_k]), torch.tensor([params.min_p])
        score = None
        if not left:
            hidden = generator.slm.base_model(ids).last_hidden_state[:, -1]
            logits = generator.slm(ids).logits[:, -1, :shared]
            seen = NextTokens(hidden, logits, *at, drawn(logits))
            score, longest = policy.scores(seen).item(), policy.spans(seen)
            left = 0 if score < policy.threshold else span if longest is None else longest.item()
        by_llm = left > 0
        if by_llm:
            logits = generator.llm(ids).logits[:, -1, :shared]
            stop = policy.stop(NextTokens(None, logits, *at, drawn(logits)))
            left = 0 if stop is not None and stop.item() else left - 1
        token = drawn(logits).item()
        logprobs.append(logits.log_softmax(-1)[0, token].item())
        tokens.append(token)
        written_by.append(by_llm)
        scores.append(score)
        text = TOKENIZER.decode(tokens[len(prompt) :])
        if token == 1 or token in params.stop_token_ids or any(stop in text for stop in params.stop):
            return tokens[len(prompt) :], written_by, scores, logprobs, "stop"
        if len(written_by) == params.max_tokens:
            return tokens[len(prompt) :], written_by, scores, logprobs, "length"


def check_against_plain(generator: RoutedGenerator, prompts, each: list[SamplingParams]) -> list:
    results = generator.generate(prompts, each)
    for prompt, params, completions in zip(prompts, each, results, strict=True):
        assert len(completions) == params.n
        for number, c in enumerate(completions):
            number = 0 if params.greedy else number
            ids, written_by, scores, logprobs, reason = plain(generator, prompt, params, number, generator.llm_span)
            assert (c.token_ids, c.written_by, c.finish_reason) == (ids, written_by, reason)
            assert c.logprobs == pytest.approx(logprobs, abs=5e-5)
            assert [s is None for s in c.scores] == [s is None for s in scores]
            for got, expected in zip(c.scores, scores, strict=True):
                assert got is None or got == pytest.approx(expected, abs=5e-5)
    return [c for completions in results for c in completions]


def same(results, expected) -> None:
    for completions, others in zip(results, expected, strict=True):
        assert [(c.token_ids, c.finish_reason) for c in completions] == [(c.token_ids, c.finish_reason) for c in others]
        for c, other in zip(completions, others, strict=True):
            assert c.logprobs == pytest.approx(other.logprobs, abs=5e-5)


SAMPLED = SamplingParams(n=3, seed=5, temperature=0.8, top_p=0.9, max_tokens=24)


PENALIZED = SamplingParams(
    seed=5, max_tokens=24, top_k=9, min_p=0.05, repetition_penalty=1.2, presence_penalty=-0.4, frequency_penalty=0.3
)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALIZED])
@pytest.mark.parametrize(
    ("policy", "alone", "by_llm"),
    [(Toy(1.1), SLM, False), (NeverLLM(), SLM, False), (Toy(0.0), LLM, True), (AlwaysLLM(), LLM, True)],
)
def test_thresholds_beyond_the_ends_are_the_models_alone(policy, alone, by_llm, params):
    prompts = make_prompts(20)  # more than fit: rows leave and join
    results = RoutedGenerator(SLM, LLM, TOKENIZER, policy, max_rows=7).generate(prompts, params)
    engine = TransformersEngine(EngineArguments(model=""), model=alone, tokenizer=TOKENIZER)
    same(results, engine.generate(prompts, params))
    assert {by for completions in results for c in completions for by in c.written_by} == {by_llm}


@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("llm", [LLM, qwen2(VOCAB, 3)], ids=["llama", "qwen2"])
def test_equal_to_a_loop_without_caches(span, llm):
    generator = RoutedGenerator(SLM, llm, TOKENIZER, Toy(), max_rows=5, llm_span=span)
    each = [
        SamplingParams(
            n=1 + i % 3, seed=i, max_tokens=3 + 2 * i, temperature=(0.0, 0.7, 1.0)[i % 3], top_p=(1.0, 0.8)[i % 2]
        )
        for i in range(9)
    ]
    options = [{"top_k": 5, "min_p": 0.02}, {}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}]
    each = [replace(params, **options[i // 3]) for i, params in enumerate(each)]
    completions = check_against_plain(generator, make_prompts(9), each)
    rate = sum(map(sum, (c.written_by for c in completions))) / sum(len(c.token_ids) for c in completions)
    assert 0.1 < rate < 0.9  # both models write
    if span > 1:
        assert any(s is None for c in completions for s in c.scores)


@pytest.mark.parametrize(
    "policy",
    [
        RandomPolicy(0.3),
        EntropyPolicy(3.3),
        ReplayPolicy([[0, 1, 5], [2]]),
        HysteresisPolicy(0.8, back=0.6),
        HysteresisPolicy(0.8, back=0.3, most=3),
        CallPolicy({7: 2, "h": 3}, threshold=0.04),
    ],
)
def test_the_other_policies_equal_the_loop(policy):
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, policy, max_rows=4)
    each = [SamplingParams(n=2, seed=i, max_tokens=12) for i in range(5)]
    completions = check_against_plain(generator, make_prompts(5), each)
    assert {by for c in completions for by in c.written_by} == {False, True}


@pytest.mark.parametrize("pads", [(8, 0), (0, 8)])
def test_vocabularies_padded_differently_use_the_ids_they_share(pads):
    small, large = (tiny_model(VOCAB + pad, seed=i) for i, pad in enumerate(pads))
    for model in (small, large):
        with torch.no_grad():
            model.lm_head.weight[VOCAB:] *= 20  # the padding would win if it could
    generator = RoutedGenerator(small, large, TOKENIZER, Toy(), max_rows=4)
    assert generator.shared_vocab == VOCAB
    each = [SamplingParams(seed=i, n=2, max_tokens=12, temperature=i % 2) for i in range(6)]
    completions = check_against_plain(generator, make_prompts(6), each)
    assert all(i < VOCAB for c in completions for i in c.token_ids)
    with pytest.raises(ValueError, match=f"Prompt 0 has token id {VOCAB}"):
        generator.generate([[VOCAB]], GREEDY)


def test_a_request_is_independent_of_its_batch():
    prompts = make_prompts(12)
    each = [SamplingParams(n=1 + i % 2, seed=i, max_tokens=5 + i) for i in range(12)]
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, Toy(), token_budget=800)
    together = generator.generate(prompts, each)
    for prompt, params, expected in zip(prompts, each, together, strict=True):
        (alone,) = generator.generate([prompt], params)
        assert [(c.token_ids, c.written_by) for c in alone] == [(c.token_ids, c.written_by) for c in expected]
        streamed = list(generator.stream(prompt, params))
        assert [t.id for t in streamed] == expected[0].token_ids
        assert [t.by_llm for t in streamed] == expected[0].written_by
        assert [t.finish_reason for t in streamed] == [None] * (len(streamed) - 1) + [expected[0].finish_reason]
    fresh = SamplingParams(n=3, max_tokens=12)
    (first,), (second,) = (generator.generate(prompts[:1], fresh) for _ in range(2))
    assert [c.token_ids for c in first] != [c.token_ids for c in second]


def test_stop_ids_and_strings_whoever_writes_them():
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, RandomPolicy(0.5))
    prompts = make_prompts(6, seed=3)
    whole = [c for (c,) in generator.generate(prompts, SamplingParams(seed=1, max_tokens=30))]
    long = [i for i, c in enumerate(whole) if len(c.token_ids) >= 9]
    assert long
    each = [SamplingParams(seed=1, max_tokens=30)] * 6
    for i in long:  # three tokens make the string
        text = TOKENIZER.decode(whole[i].token_ids[6:9])
        each[i] = SamplingParams(seed=1, max_tokens=30, stop=(text, "never there"))
    completions = check_against_plain(generator, prompts, each)
    assert all(completions[i].finish_reason == "stop" and len(completions[i].token_ids) <= 9 for i in long)
    token = whole[long[0]].token_ids[5]
    params = SamplingParams(seed=1, max_tokens=30, stop_token_ids=(token,))
    (completion,) = check_against_plain(generator, prompts[long[0] : long[0] + 1], [params])
    assert completion.token_ids[-1] == token and len(completion.token_ids) <= 6


def count_forwards(model, shapes: list) -> object:
    return model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )


def test_one_prefill_a_handoff_no_rollback_and_the_work_is_counted():
    # Greedy from this prompt neither model ends early; the LLM writes tokens 2, 3 and 9 of 12.
    prompt, steps = [7, 9, 20, 31], [2, 3, 9]
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, ReplayPolicy([steps]))
    small, large = [], []
    handles = [count_forwards(SLM, small), count_forwards(LLM, large)]
    ((completion,),) = generator.generate([prompt], SamplingParams(temperature=0, seed=0, max_tokens=12))
    for handle in handles:
        handle.remove()
    assert len(completion.token_ids) == 12
    assert [t for t, by in enumerate(completion.written_by) if by] == steps
    assert small == [(1, 4)] + [(1, 1)] * 11
    assert large == [(1, 4 + 2), (1, 1), (1, 6)]
    assert completion.stats == RoutedStats(9, 3, 3, 4 + 11, 4 + 9)


@pytest.mark.parametrize(("policy", "idle"), [(AlwaysLLM(), SLM), (NeverLLM(), LLM)])
def test_always_and_never_leave_one_model_idle(policy, idle):
    shapes: list = []
    handle = count_forwards(idle, shapes)
    ((completion,),) = RoutedGenerator(SLM, LLM, TOKENIZER, policy).generate([[7, 8]], GREEDY)
    handle.remove()
    assert not shapes and completion.stats.handoffs == 0
    assert completion.scores == ([None] if policy == AlwaysLLM() else [0.0]) * len(completion.token_ids)


def test_draws_of_one_prompt_share_its_prefill_in_both_models():
    prompts = [p for p in make_prompts(3, seed=1) if len(p) > 2]
    small, large = [], []
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, RandomPolicy(0.4))
    handles = [count_forwards(SLM, small), count_forwards(LLM, large)]
    results = generator.generate(prompts, SamplingParams(n=8, seed=0, max_tokens=6))
    for handle in handles:
        handle.remove()
    # Rows stand side by side, without padding
    assert small[:2] == [(1, sum(len(prompt) - 1 for prompt in prompts)), (1, 8 * len(prompts))]
    stats = RoutedStats()
    for completions in results:
        for c in completions:
            stats += c.stats
    written = sum(len(c.token_ids) for completions in results for c in completions)
    # Each prompt but its last token is read once; every row reads that one and its own tokens but the last.
    assert stats.slm_positions == sum(len(p) - 1 for p in prompts) + written
    assert stats.llm_positions <= sum(len(p) - 1 for p in prompts) + written


def test_cancelling_frees_the_row_and_the_rest_goes_on():
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, Toy(), max_rows=2)
    prompts = make_prompts(4, seed=2)
    params = [SamplingParams(seed=i, max_tokens=15) for i in range(4)]
    expected = [c.token_ids for (c,) in generator.generate(prompts, params)]
    batch = RoutedBatch(generator)
    keys = [batch.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    written: dict[int, list[int]] = {key: [] for key in keys}
    for _ in range(3):
        for key, token, _ in batch.step():
            written[key].append(token.id)
    batch.cancel(keys[0])  # in flight
    batch.cancel(keys[2])  # waiting
    batch.cancel(999)  # unknown
    assert len(batch.rows) == 1 and [len(m.lengths) for m in batch._models] == [1, 1]
    while batch:
        for key, token, _ in batch.step():
            written[key].append(token.id)
    assert [written[keys[1]], written[keys[3]]] == [expected[1], expected[3]]
    assert written[keys[0]] == expected[0][:3] and not written[keys[2]]
    assert [m.lengths for m in batch._models] == [[], []]
    assert batch.stats.tokens == sum(map(len, written.values()))


def test_completions_end_where_the_shorter_context_ends():
    short = tiny_model(VOCAB, seed=4)
    short.config.max_position_embeddings = 60
    params = SamplingParams(seed=0, max_tokens=200, temperature=0.7)
    for pair in ((short, LLM), (SLM, short)):
        generator = RoutedGenerator(*pair, TOKENIZER, ReplayPolicy([[1, 4]]))
        assert generator.max_length == 60
        for prompt in make_prompts(6, seed=5):
            ((completion,),) = generator.generate([prompt], params)
            assert len(prompt) + len(completion.token_ids) <= 60
            assert (completion.finish_reason == "length") == (completion.token_ids[-1] != 1)
        with pytest.raises(ValueError, match="Prompt 0 has 60 tokens but the model holds 60 positions"):
            generator.generate([[7] * 60], params)
    assert RoutedGenerator(SLM, short, TOKENIZER, NeverLLM()).max_length == 512  # the LLM does not run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the SLM and the LLM."""
    path = tmp_path_factory.mktemp("pair")
    for name, model in (("slm", SLM), ("llm", LLM)):
        model.save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    return str(path / "slm"), str(path / "llm")


def tiny_router(**options) -> TokenRouter:
    """The paper's architecture with random weights that spread its scores."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "shared_vocab": VOCAB, "top_k": 10, "width": 16, "num_blocks": 2}
    router = TokenRouter(TokenRouterConfig(**sizes, **options))
    with torch.no_grad():
        router.head.weight.mul_(20)
    return router


@pytest.mark.parametrize("inputs", [["hidden", "token", "logits"], ["entropy"], ["token"]])
def test_a_router_decides_as_it_does_without_caches(inputs):
    router = tiny_router(inputs=inputs).train()  # dropout must not be on while decoding
    prompts = make_prompts(5)
    look = RoutedGenerator(SLM, LLM, TOKENIZER, RouterPolicy(router, 1.1)).generate(prompts, GREEDY)
    scores = sorted({round(score, 4) for (c,) in look for score in c.scores})
    threshold = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2  # between two scores, away from rounding
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, RouterPolicy(router, threshold), max_rows=3)
    completions = check_against_plain(generator, prompts, [replace(GREEDY, seed=i) for i in range(5)])
    assert {by for c in completions for by in c.written_by} == {False, True}


def test_a_router_that_scores_the_drawn_token_is_the_same_when_greedy_and_another_when_sampling():
    router, prompts = tiny_router(), make_prompts(4)
    argmax, drawn = (
        RoutedGenerator(SLM, LLM, TOKENIZER, RouterPolicy(router, 0.5, score=s)) for s in ("argmax", "drawn")
    )
    same(drawn.generate(prompts, GREEDY), argmax.generate(prompts, GREEDY))
    each = [replace(SAMPLED, seed=i) for i in range(4)]
    completions = check_against_plain(drawn, prompts, each)
    others = [c for completions in argmax.generate(prompts, each) for c in completions]
    assert [c.token_ids for c in completions] != [c.token_ids for c in others]


def test_a_router_is_loaded_with_its_threshold_and_only_for_its_own_slm(folders, tmp_path):
    slm, llm = folders
    router = tiny_router(threshold=0.4, slm={"name": slm, "weights_hash": weights_hash(slm)})
    router.save_pretrained(tmp_path / "router")
    loaded = RoutedGenerator.from_pretrained(slm, llm, str(tmp_path / "router"))
    assert loaded.policy.threshold == 0.4
    made = RoutedGenerator(SLM, LLM, TOKENIZER, RouterPolicy(router))
    prompts = make_prompts(4)
    same(loaded.generate(prompts, GREEDY), made.generate(prompts, GREEDY))
    assert RoutedGenerator.from_pretrained(slm, llm, str(tmp_path / "router"), threshold=1.5).policy.threshold == 1.5
    router.config.slm["weights_hash"] = "0" * 64
    router.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on another SLM"):
        RoutedGenerator.from_pretrained(slm, llm, str(tmp_path / "other"))


def test_several_processes_keep_the_weights_where_one_process_has_them(folders, monkeypatch):
    one = RoutedGenerator.from_pretrained(*folders, policy=Toy())
    # What accelerate gives to each process of a CPU launch
    state = SimpleNamespace(device=torch.device("cpu", 0))
    monkeypatch.setattr("tokalign.stage.processes.process_state", lambda: state)
    several = RoutedGenerator.from_pretrained(*folders, policy=Toy())
    for a, b in ((one.slm, several.slm), (one.llm, several.llm)):
        for mine, other in zip(a.parameters(), b.parameters(), strict=True):
            assert mine.data_ptr() % 64 == other.data_ptr() % 64 and other.device == torch.device("cpu")


def test_the_pair_loads_from_folders(folders):
    slm, llm = folders
    loaded = RoutedGenerator.from_pretrained(slm, llm, policy=Toy(), llm_span=2)
    made = RoutedGenerator(SLM, LLM, TOKENIZER, Toy(), llm_span=2)
    prompts = make_prompts(4)
    same(loaded.generate(prompts, GREEDY), made.generate(prompts, GREEDY))
    with pytest.raises(ValueError, match="Give either a router or a policy"):
        RoutedGenerator.from_pretrained(slm, llm)
    with pytest.raises(ValueError, match="threshold belongs to a router"):
        RoutedGenerator.from_pretrained(slm, llm, policy=Toy(), threshold=0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"llm_span": 0}, "llm_span is 0"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"llm_wait": "soon"}, "llm_wait is 'soon'"),
        ({"llm_tokenizer": tiny_tokenizer(ALPHABET[::-1])}, "is not the LLM's"),
    ],
)
def test_generators_that_cannot_be_made(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        RoutedGenerator(SLM, LLM, TOKENIZER, NeverLLM(), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], SamplingParams(), "Prompt 1 is empty"),
        ([7], SamplingParams(json_schema="{}"), "Prompt 1 has json_schema, which routed decoding does not apply"),
        ([7], SamplingParams(banned_token_ids=(3,)), "Prompt 1 has banned_token_ids, which routed decoding"),
    ],
)
def test_refusals_name_the_row(prompt, params, sentence):
    generator = RoutedGenerator(SLM, LLM, TOKENIZER, NeverLLM())
    with pytest.raises(ValueError, match=sentence) as error:
        generator.generate([[7], prompt], [SamplingParams(max_tokens=1), params])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "policy"), [("SLM", NeverLLM()), ("LLM", AlwaysLLM())])
def test_logits_that_are_not_numbers_are_refused(side, policy):
    broken = tiny_model(VOCAB)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    pair = (broken, LLM) if side == "SLM" else (SLM, broken)
    with pytest.raises(ValueError, match=f"The {side} gave logits that are not finite"):
        RoutedGenerator(*pair, TOKENIZER, policy).generate([[7]], GREEDY)
