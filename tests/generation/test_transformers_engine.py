"""The transformers engine against `model.generate`, against plain full forwards, and against itself alone."""

import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from tests.support import save_tiny, tiny_model, tiny_tokenizer
from tokalign.generation import EngineArguments, SamplingParams, continue_from_prefixes, load_engine
from tokalign.generation.transformers_engine import TransformersEngine


def make_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(6, 60) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def ids_of(results):
    return [[c.token_ids for c in completions] for completions in results]


@pytest.fixture(scope="module")
def engine(tiny_path):
    return load_engine(EngineArguments(model=tiny_path, token_budget=1500))  # small: batches are split and refilled


def greedy_of(model, prompt, max_tokens):
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def plain_logprobs(model, prompt, completion):
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1).tolist()


def test_greedy_equals_model_generate_in_the_callers_order(engine):
    prompts = make_prompts(40)
    results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    for prompt, (completion,) in zip(prompts, results, strict=True):
        assert completion.token_ids == greedy_of(engine.model, prompt, 24)
        ended = completion.token_ids[-1] == engine.tokenizer.eos_token_id
        assert completion.finish_reason == ("stop" if ended else "length")


@torch.no_grad()
def test_logprobs_are_the_models_own_whatever_the_sampling(engine):
    banned = tuple(range(6, 30))
    for params in [
        SamplingParams(n=3, seed=1, max_tokens=20),
        SamplingParams(n=3, seed=1, max_tokens=20, temperature=0.5, top_p=0.7, banned_token_ids=banned),
    ]:
        for prompt, completions in zip(make_prompts(6), engine.generate(make_prompts(6), params), strict=True):
            for c in completions:
                expected = plain_logprobs(engine.model, prompt, c.token_ids)
                assert c.logprobs == pytest.approx(expected, abs=2e-5)


def test_a_request_is_independent_of_its_batch(engine):
    prompts = make_prompts(20)
    each = [
        SamplingParams(
            n=1 + i % 5, seed=i, max_tokens=5 + i, temperature=(0.0, 0.7, 1.0)[i % 3], top_p=(1.0, 0.8)[i % 2]
        )
        for i in range(20)
    ]
    together = engine.generate(prompts, each)
    assert [len(completions) for completions in together] == [params.n for params in each]
    for prompt, params, expected in zip(prompts, each, together, strict=True):
        assert ids_of(engine.generate([prompt], params)) == [[c.token_ids for c in expected]]
    order = list(reversed(range(20)))
    backwards = engine.generate([prompts[i] for i in order], [each[i] for i in order])
    assert ids_of(backwards) == [ids_of(together)[i] for i in order]


def test_seeds(engine):
    prompt = make_prompts(1)
    params = SamplingParams(n=6, seed=3, max_tokens=12)
    first = ids_of(engine.generate(prompt, params))[0]
    assert len({tuple(ids) for ids in first}) == 6
    assert first == ids_of(engine.generate(prompt, params))[0]
    # More samples do not change the ones there were: sample k has its own random numbers.
    assert first == ids_of(engine.generate(prompt, SamplingParams(n=9, seed=3, max_tokens=12)))[0][:6]
    fresh = SamplingParams(n=6, max_tokens=12)
    assert ids_of(engine.generate(prompt, fresh)) != ids_of(engine.generate(prompt, fresh))


def test_each_distinct_prompt_is_prefilled_once(tiny_path):
    engine = load_engine(EngineArguments(model=tiny_path))
    shapes = []
    handle = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = make_prompts(3, longest=10)
    engine.generate([*prompts, *prompts], SamplingParams(n=8, max_tokens=4, seed=0))
    handle.remove()
    assert shapes[0] == (3, max(map(len, prompts)))
    assert all(width == 1 and rows <= 48 for rows, width in shapes[1:])


def test_rows_times_width_stays_in_the_budget_and_finished_rows_leave(engine):
    cells, rows = [], []

    def watch(module, args, kwargs):
        rows.append(kwargs["input_ids"].shape[0])
        cells.append(kwargs["attention_mask"].numel())

    handle = engine.model.register_forward_pre_hook(watch, with_kwargs=True)
    limits = [SamplingParams(max_tokens=100 if i == 7 else 3, seed=i, banned_token_ids=(1,)) for i in range(60)]
    engine.generate(make_prompts(60, longest=10), limits)
    handle.remove()
    assert max(cells) <= 1500
    assert rows[-1] == 1 and sum(rows) < 60 * 100 / 4  # the long row ran alone in the end, not sixty wide


def test_stop_token_and_string(engine):
    prompt = make_prompts(1)[0]
    whole = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=30, banned_token_ids=(1,)))[0][0]
    cut = 9
    token = whole.token_ids[cut]
    first = whole.token_ids.index(token)
    params = SamplingParams(temperature=0, max_tokens=30, banned_token_ids=(1,), stop_token_ids=(token,))
    stopped = engine.generate([prompt], params)[0][0]
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[: first + 1], "stop")

    decode = engine.tokenizer.decode
    text = decode(whole.token_ids[cut - 2 : cut + 1])  # three tokens make the string
    end = next(t for t in range(1, 31) if text in decode(whole.token_ids[:t]))
    params = SamplingParams(temperature=0, max_tokens=30, banned_token_ids=(1,), stop=(text, "never there"))
    # In one batch with a row that has no stop string.
    both = engine.generate([prompt, prompt], [params, SamplingParams(temperature=0, max_tokens=30)])
    assert (both[0][0].token_ids, both[0][0].finish_reason) == (whole.token_ids[:end], "stop")
    assert len(both[1][0].token_ids) > end or both[1][0].token_ids[-1] == 1


def test_bans_for_every_token_or_the_first_ones_only(engine):
    prompts = make_prompts(8)
    banned = tuple(range(6, 40))
    everywhere = engine.generate(prompts, SamplingParams(n=4, seed=0, max_tokens=30, banned_token_ids=banned))
    assert not {i for ids in ids_of(everywhere) for row in ids for i in row} & set(banned)
    params = SamplingParams(n=4, seed=0, max_tokens=30, banned_token_ids=banned, banned_steps=2)
    early = [row for ids in ids_of(engine.generate(prompts, params)) for row in ids]
    assert not {i for row in early for i in row[:2]} & set(banned)
    assert {i for row in early for i in row[2:]} & set(banned)


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0, max_tokens=12), SamplingParams(n=3, seed=5, max_tokens=12)]
)
def test_prefixes_equal_plain_generation_from_one_prefill(engine, params):
    prompt = make_prompts(1)[0]
    completion = engine.generate([prompt], SamplingParams(seed=2, max_tokens=40, banned_token_ids=(1,)))[0][0].token_ids
    lengths = [7, 0, 40, 1, 7, *range(20, 30)]
    widths = []
    handle = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    shared = continue_from_prefixes(engine, prompt, completion, lengths, params)
    handle.remove()
    assert [w for w in widths if w > 1] == [len(prompt) + 40]
    plain = engine.generate([prompt + completion[:t] for t in lengths], params)
    assert ids_of(shared) == ids_of(plain)
    for a, b in zip(shared, plain, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=2e-5)
    one_token = continue_from_prefixes(engine, prompt[:1], [], [0], params)
    assert ids_of(one_token) == ids_of(engine.generate([prompt[:1]], params))


def test_a_sliding_window_model_falls_back_and_agrees():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    engine = TransformersEngine(EngineArguments(model="", token_budget=400), model=model, tokenizer=tiny_tokenizer())
    prompts = make_prompts(10, longest=20)
    results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    assert [c.token_ids for (c,) in results] == [greedy_of(model, prompt, 16) for prompt in prompts]
    params = SamplingParams(n=2, seed=1, max_tokens=10)
    lengths = [0, 3, 12]
    shared = continue_from_prefixes(engine, prompts[0], prompts[1] * 5, lengths, params)
    plain = engine.generate([prompts[0] + (prompts[1] * 5)[:t] for t in lengths], params)
    assert ids_of(shared) == ids_of(plain)


def save_adapter(base: str, path, seed: int) -> str:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(path)
    return str(path)


@torch.no_grad()
def test_an_id_that_the_tokenizer_does_not_know_is_never_drawn():
    """Rows that only pad the matrix, and a hole in the vocabulary, though the model wants nothing else."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer) + 7)
    model.lm_head.weight[-7:] += 5 * model.lm_head.weight[:6].abs().sum()
    model.lm_head.weight[-7:-4] *= -1  # whatever the sign of the state, some of them are wanted
    wanted = model(torch.tensor([[9, 10]])).logits[0, -1].argmax().item()
    assert wanted >= len(tokenizer)
    engine = TransformersEngine(EngineArguments("", token_budget=400), model=model, tokenizer=tokenizer)
    for params in (SamplingParams(temperature=0, max_tokens=12), SamplingParams(n=8, seed=0, max_tokens=12)):
        for completions in engine.generate([[9, 10], [11]], params):
            for completion in completions:
                assert max(completion.token_ids) < len(tokenizer)
    (completion,), _ = engine.generate([[9, 10], [11]], SamplingParams(n=1, seed=0, max_tokens=4))
    assert completion.logprobs == pytest.approx(plain_logprobs(model, [9, 10], completion.token_ids), rel=1e-4)


def test_adapters_by_path_on_one_base(tiny_path, tmp_path):
    one, two = (save_adapter(tiny_path, tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))
    engine = load_engine(EngineArguments(model=tiny_path))
    prompts, params = make_prompts(5), SamplingParams(temperature=0, max_tokens=12)
    before = ids_of(engine.generate(prompts, params))
    for path in (one, two, one):
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), path)
        got = [c.token_ids for (c,) in engine.generate(prompts, params, adapter=path)]
        assert got == [greedy_of(expected, prompt, 12) for prompt in prompts]
    assert ids_of(engine.generate(prompts, params)) == before  # None is the base again
    in_memory = TransformersEngine(EngineArguments(""), model=expected, tokenizer=engine.tokenizer)  # a PeftModel
    assert ids_of(in_memory.generate(prompts, params)) == ids_of(engine.generate(prompts, params, adapter=one))
    default = load_engine(EngineArguments(model=tiny_path, adapter=two))
    assert ids_of(default.generate(prompts, params)) == ids_of(engine.generate(prompts, params, adapter=two))
    assert ids_of(default.generate(prompts, params)) != before


def test_adapters_that_do_not_belong(tiny_path, tmp_path):
    engine = load_engine(EngineArguments(model=tiny_path))
    prompts, params = make_prompts(2), SamplingParams(temperature=0, max_tokens=6)
    before = ids_of(engine.generate(prompts, params))
    with pytest.raises(ValueError, match=r"no adapter at .*nowhere"):
        engine.generate(prompts, params, adapter=str(tmp_path / "nowhere"))
    other_seed = save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"was trained on .*other but this engine holds"):
        engine.generate(prompts, params, adapter=save_adapter(other_seed, tmp_path / "a", 0))
    # Same name recorded, other shapes: only the weights can tell.
    wide = get_peft_model(tiny_model(60, hidden_size=64), LoraConfig(r=4, target_modules=["q_proj"]))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="does not fit the layers"):
        engine.generate(prompts, params, adapter=str(tmp_path / "wide"))
    assert ids_of(engine.generate(prompts, params)) == before  # a refused adapter leaves no trace
    good = save_adapter(tiny_path, tmp_path / "good", 0)
    fresh = load_engine(EngineArguments(model=tiny_path))
    assert ids_of(engine.generate(prompts, params, adapter=good)) == ids_of(
        fresh.generate(prompts, params, adapter=good)
    )


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], SamplingParams(), "Prompt 1 is empty"),
        ([7, 999], SamplingParams(), "Prompt 1 has token id 999 but the model's vocabulary"),
        ([7] * 512, SamplingParams(), "Prompt 1 has 512 tokens but the model holds 512 positions"),
        ([7], SamplingParams(banned_token_ids=(5000,)), "Prompt 1 bans token ids outside"),
    ],
)
def test_refusals_name_the_row(engine, prompt, params, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        engine.generate([[7], prompt], [SamplingParams(max_tokens=1), params])
    assert "\n" not in str(error.value)


def test_completions_end_where_the_models_positions_end(engine):
    completion = engine.generate([[7] * 508], SamplingParams(max_tokens=50, seed=0, banned_token_ids=(1,)))[0][0]
    assert (len(completion.token_ids), completion.finish_reason) == (4, "length")


def test_logits_that_are_not_numbers_are_refused():
    model = tiny_model(60)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    engine = TransformersEngine(EngineArguments(model=""), model=model, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="not finite numbers for prompt 0"):
        engine.generate([[7]], SamplingParams(max_tokens=2, seed=0))


def test_a_model_in_training_stays_in_training(tiny_path):
    model = tiny_model(60).train()
    TransformersEngine(EngineArguments(model=""), model=model, tokenizer=tiny_tokenizer()).generate(
        [[7]], SamplingParams(max_tokens=2, seed=0)
    )
    assert model.training


@torch.no_grad()
def test_penalties_choose_the_greedy_token_of_the_penalized_logits(engine):
    """Against a plain loop over full forwards, beside rows without penalties, whose ids do not change."""
    prompts = make_prompts(6, seed=5)
    asks = SamplingParams(
        temperature=0, max_tokens=16, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2
    )
    plain = SamplingParams(temperature=0, max_tokens=16)
    results = engine.generate(prompts, [asks, plain] * 3)
    assert ids_of(results)[1::2] == ids_of(engine.generate(prompts[1::2], plain))
    for prompt, (completion,) in list(zip(prompts, results, strict=True))[::2]:
        written: list[int] = []
        while len(written) < 16 and (not written or written[-1] not in engine.end_ids):
            logits = engine.model(torch.tensor([[*prompt, *written]])).logits[0, -1].tolist()
            for v in {*prompt, *written}:
                logits[v] = logits[v] / 1.4 if logits[v] > 0 else logits[v] * 1.4
            for v in set(written):
                logits[v] -= 0.3 + 0.2 * written.count(v)
            written.append(max(range(len(logits)), key=logits.__getitem__))
        assert completion.token_ids == written
        assert completion.logprobs == pytest.approx(plain_logprobs(engine.model, prompt, written), abs=2e-5)


def test_top_k_of_one_and_min_p_of_one_are_greedy(engine):
    prompts = make_prompts(8, seed=6)
    greedy = ids_of(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8)))
    for option in ({"top_k": 1}, {"min_p": 1.0}):
        assert ids_of(engine.generate(prompts, SamplingParams(seed=3, max_tokens=8, **option))) == greedy
