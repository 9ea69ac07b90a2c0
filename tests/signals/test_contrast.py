"""The contrastive score against a plain loop of its equation, and the scorer against two plain forward passes."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tests.signals.support import save_adapter
from tests.support import save_tiny, tiny_tokenizer
from tokalign.signals import ContrastiveScorer, contrast, contrastive_score


def equation(positive, negative, ids, beta):
    """log s_t = (1 + β) log P_p − β log P_n − log Z, Z = Σ_v P_p^(1+β) / P_n^β, one token and one word at a time."""
    scores = torch.zeros(ids.shape, dtype=torch.float64)
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            p = torch.softmax(positive[b, t].double(), -1).tolist()
            n = torch.softmax(negative[b, t].double(), -1).tolist()
            z = sum(p[v] ** (1 + beta) / n[v] ** beta for v in range(len(p)))
            y = int(ids[b, t])
            scores[b, t] = math.exp((1 + beta) * math.log(p[y]) - beta * math.log(n[y]) - math.log(z))
    return scores.float()


def draw(seed, batch=2, length=5, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (3 * torch.randn(batch, length, vocabulary, generator=generator) for _ in range(2))
    return positive, negative, torch.randint(vocabulary, (batch, length), generator=generator)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), beta=st.sampled_from([0.0, 0.25, 1.0, 2.5]), tile=st.sampled_from([1, 100, 10**6]))
def test_is_the_equation_and_a_probability(seed, beta, tile):
    positive, negative, ids = draw(seed)
    scores = contrastive_score(positive, negative, ids, beta=beta, tile_bytes=tile)
    torch.testing.assert_close(scores, equation(positive, negative, ids, beta), rtol=1e-4, atol=1e-6)
    assert ((scores >= 0) & (scores <= 1)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50), beta=st.floats(0, 3))
def test_invariants(seed, shift, beta):
    positive, negative, ids = draw(seed)
    scores = contrastive_score(positive, negative, ids, beta=beta)
    moved = contrastive_score(positive + shift, negative - 2 * shift, ids, beta=beta)  # logits have no zero point
    torch.testing.assert_close(moved, scores, rtol=1e-3, atol=1e-5)
    own = positive.softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    for same in (
        contrastive_score(positive, negative, ids, beta=0.0),
        contrastive_score(positive, positive, ids, beta=beta),
    ):
        torch.testing.assert_close(same, own, rtol=1e-4, atol=1e-6)


def test_sums_to_one_over_the_vocabulary():
    positive, negative, _ = draw(3, batch=1, length=4)
    total = sum(contrastive_score(positive, negative, torch.full((1, 4), v)) for v in range(11))
    torch.testing.assert_close(total, torch.ones(1, 4))


def test_leaves_half_precision_strided_logits_alone():
    positive, negative, ids = draw(5, length=6)
    positive, negative = positive.bfloat16(), negative.bfloat16()
    before = positive.clone(), negative.clone()
    scores = contrastive_score(positive[:, :-1], negative[:, :-1], ids[:, 1:])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores, equation(positive[:, :-1], negative[:, :-1], ids[:, 1:], 1.0), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


def test_refusals_name_what_is_wrong():
    positive, negative, ids = draw(1)
    broken = positive.clone()
    broken[1, 3, 7] = float("nan")
    with pytest.raises(ValueError, match="row 1, position 3"):
        contrastive_score(broken, negative, ids)
    broken[1, 3, 7] = float("inf")
    with pytest.raises(ValueError, match="row 1, position 3"):
        contrastive_score(broken, negative, ids)
    with pytest.raises(ValueError, match="one vocabulary"):
        contrastive_score(positive, negative[..., :-1], ids)
    with pytest.raises(ValueError, match="token_ids must be"):
        contrastive_score(positive, negative, ids[:, :-1])
    with pytest.raises(ValueError, match=r"in \[0, 11\)"):
        contrastive_score(positive, negative, ids + 11)
    with pytest.raises(ValueError, match="beta"):
        contrastive_score(positive, negative, ids, beta=float("nan"))


# --- the scorer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "positive": save_adapter(root / "positive", tiny_path, seed=1),
        "negative": save_adapter(root / "negative", tiny_path, seed=2),
        "head": save_adapter(root / "head", tiny_path, seed=3, target_modules=("down_proj", "lm_head")),
        "whole_head": save_adapter(root / "whole", tiny_path, seed=4, modules_to_save=["lm_head"]),
        "rotated": save_adapter(root / "dora", tiny_path, seed=5, target_modules=("q_proj", "o_proj"), use_dora=True),
    }


def rows(seed=0, count=9, vocabulary=80):
    rng = random.Random(seed)
    return [[[rng.randrange(vocabulary) for _ in range(rng.randint(1, top))] for _ in range(count)] for top in (12, 30)]


def plain_scores(base, positive, negative, prompts, completions, beta=1.0):
    """Row by row: each merged model's ordinary logits, then the pure function."""
    models = []
    for path in (positive, negative):
        model = AutoModelForCausalLM.from_pretrained(base)
        models.append((PeftModel.from_pretrained(model, path).merge_and_unload() if path else model).eval())
    result = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = [model(ids).logits[:, len(prompt) - 1 : -1] for model in models]
        result.append(contrastive_score(*logits, ids[:, len(prompt) :], beta=beta)[0].tolist())
    return result


def close(actual, expected, **tolerance):
    assert [len(a) for a in actual] == [len(e) for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(e), **(tolerance or {"rtol": 1e-3, "atol": 1e-5}))


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ("positive", "negative"),
        ("positive", None),
        (None, "negative"),
        ("head", "negative"),
        ("positive", "whole_head"),
        ("head", None),
        ("rotated", "head"),
    ],
)
def test_scorer_equals_two_plain_forward_passes(tiny_path, adapters, positive, negative):
    positive, negative = adapters.get(positive), adapters.get(negative)
    prompts, completions = rows()
    scorer = ContrastiveScorer(tiny_path, tiny_tokenizer(), positive, negative, beta=0.7)
    close(
        scorer.score(prompts, completions),
        plain_scores(tiny_path, positive, negative, prompts, completions, beta=0.7),
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiny vocabularies in several blocks, as large ones are."""
    monkeypatch.setattr(contrast, "SMALLEST_BLOCK", 7)


def test_batches_padding_tiles_and_order_do_not_change_scores(tiny_path, adapters, small_blocks):
    prompts, completions = rows(seed=4, count=13)
    tokenizer = tiny_tokenizer()
    variants = [
        ContrastiveScorer(tiny_path, tokenizer, adapters["positive"], adapters["negative"], **arguments)
        for arguments in (
            {"token_budget": 1},
            {"token_budget": 60, "tile_bytes": 1000},
            {"token_budget": 10**6, "tile_bytes": 7000},
        )
    ]
    alone, small, large = (scorer.score(prompts, completions) for scorer in variants)
    close(small, alone)
    close(large, alone)
    order = random.Random(0).sample(range(13), 13)
    shuffled = variants[2].score([prompts[i] for i in order], [completions[i] for i in order])
    close(shuffled, [alone[i] for i in order])
    assert variants[2].score([], []) == []


def test_batches_keep_to_the_budget_and_hold_each_row_once(tiny_path):
    scorer = ContrastiveScorer(tiny_path, None, None, None, token_budget=100)
    lengths = [random.Random(1).randint(1, 150) for _ in range(50)]
    batches = list(scorer._batches(lengths))
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[r] for r in batch) <= 100


@pytest.mark.parametrize("positive", ["positive", "head"])  # through the head's weight; through an adapted head
def test_no_intermediate_is_larger_than_the_tile(tiny_path, adapters, positive):
    """Every tensor that is made after the backbone is watched; one spanning the vocabulary must fit the tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    scorer = ContrastiveScorer(tiny_path, None, adapters[positive], adapters["negative"])
    scorer.tile_bytes = 4 * scorer.vocabulary * 6
    positions, width = 40, scorer.head.weight.shape[1]
    hidden = [torch.randn(positions, width) for _ in range(2)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            is_weight = isinstance(result, torch.Tensor) and width in result.shape
            if isinstance(result, torch.Tensor) and result.is_floating_point() and not is_weight:
                largest = max(largest, result.numel() * result.element_size())
            return result

    with torch.no_grad(), Watch():
        scorer._combine(*hidden, torch.arange(positions))
    assert 0 < largest <= scorer.tile_bytes < 4 * scorer.vocabulary * positions


def test_soft_capped_scaled_and_tied_heads(tmp_path, small_blocks):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
        initializer_range=0.5,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    base = str(tmp_path / "gemma")
    positive, negative = (save_adapter(tmp_path / str(i), base, seed=i) for i in (1, 2))
    prompts, completions = rows()
    scorer = ContrastiveScorer(base, None, positive, negative, tile_bytes=500)
    assert scorer.softcap == 5.0 and scorer.head.weight is scorer.base.get_input_embeddings().weight
    close(scorer.score(prompts, completions), plain_scores(base, positive, negative, prompts, completions))


@pytest.mark.parametrize("family", ["cohere", "granite", "phi"])  # logit_scale; logits_scaling; LM-head bias
def test_other_heads(family, tmp_path, small_blocks):
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 4.0}, "phi": {}}[family],
    )
    model = AutoModelForCausalLM.from_config(config)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    base = str(tmp_path / "base")
    model.save_pretrained(base)
    targets = ("q_proj", "v_proj")
    positive, negative = (save_adapter(tmp_path / str(i), base, seed=i, target_modules=targets) for i in (1, 2))
    prompts, completions = rows()
    scorer = ContrastiveScorer(base, None, positive, negative, tile_bytes=500)
    close(scorer.score(prompts, completions), plain_scores(base, positive, negative, prompts, completions))


def test_a_head_that_is_not_known_is_refused_not_misread(tiny_path):
    class Doubled(type(AutoModelForCausalLM.from_pretrained(tiny_path))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    with pytest.raises(ValueError, match="does not know"):
        ContrastiveScorer(Doubled.from_pretrained(tiny_path), None, None, None)


def test_half_precision_stays_near_fp32(tiny_path, adapters):
    prompts, completions = rows()
    pair = adapters["positive"], adapters["negative"]
    half = ContrastiveScorer(tiny_path, None, *pair, dtype=torch.bfloat16, beta=0.2)
    full = ContrastiveScorer(tiny_path, None, *pair, beta=0.2)
    assert next(half.base.parameters()).dtype == torch.bfloat16
    gaps = [
        abs(a - b)
        for x, y in zip(half.score(prompts, completions), full.score(prompts, completions), strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert sum(gaps) / len(gaps) < 0.05


def test_row_refusals_name_row_and_reason(tiny_path, adapters):
    scorer = ContrastiveScorer(tiny_path, None, adapters["positive"], adapters["negative"])
    with pytest.raises(ValueError, match="Row 1: the completion is empty"):
        scorer.score([[5], [5]], [[6], []])
    with pytest.raises(ValueError, match="Row q7: the prompt is empty"):
        scorer.score([[]], [[6]], names=["q7"])
    with pytest.raises(ValueError, match=r"Row 0: .* longer than the model's 512 positions"):
        scorer.score([[5] * 500], [[6] * 13])
    with pytest.raises(ValueError, match="Row 0: token id 999 is outside"):
        scorer.score([[5]], [[999]])
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        scorer.score([[5]], [[6], [7]])


def test_nan_in_an_adapter_names_the_row(tiny_path, adapters):
    scorer = ContrastiveScorer(tiny_path, None, adapters["positive"], adapters["negative"])
    for name, parameter in scorer.base.named_parameters():
        if "lora_B.negative" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"Row a: .* token 0 are not finite"):
        scorer.score([[5, 6]], [[7, 8]], names=["a"])


def test_adapter_of_another_base(tiny_path, adapters, tmp_path):
    """Refused by its recorded base, and by its weights where the record says nothing."""
    unrecorded = {}
    for name in ("positive", "negative"):
        unrecorded[name] = shutil.copytree(adapters[name], tmp_path / f"unrecorded_{name}")
        file = unrecorded[name] / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    for change in ({"hidden_size": 64}, {"layers": 3}, {"layers": 1}):
        other = save_tiny(tmp_path / f"other{change}", **change)
        own = save_adapter(tmp_path / f"own{change}", other, seed=1)
        with pytest.raises(ValueError, match="was trained on"):
            ContrastiveScorer(other, None, own, adapters["negative"])
        with pytest.raises(ValueError, match=r"The negative adapter .* does not fit .*: use it with the base"):
            ContrastiveScorer(other, None, own, str(unrecorded["negative"]))
        with pytest.raises(ValueError, match=r"The positive adapter .* does not fit .*: use it with the base"):
            ContrastiveScorer(other, None, str(unrecorded["positive"]), None)


def test_a_base_that_moved_is_still_the_adapters_base(tiny_path, adapters, tmp_path):
    moved = shutil.copytree(tiny_path, tmp_path / "elsewhere")
    here, there = (ContrastiveScorer(str(p), None, adapters["positive"], None) for p in (tiny_path, moved))
    assert here.score([[5, 6]], [[7, 8]]) == there.score([[5, 6]], [[7, 8]])


def test_prompt_tuning_is_refused(tiny_path, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_path), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="LoRA-like adapters only"):
        ContrastiveScorer(tiny_path, None, str(tmp_path / "prompt"), None)
