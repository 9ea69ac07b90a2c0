"""Likelihood signals against a plain loop over whole logits, for models, adapters and heads of several kinds."""

from __future__ import annotations

import math
import random

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.signals.support import save_adapter
from tests.support import save_tiny, tiny_tokenizer
from tokalign.signals import LikelihoodScorer, likelihood
from tokalign.signals.registry import get
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import JobError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

SIGNALS = ("logprob", "entropy", "implicit_reward")


def rows(seed=0, count=9, vocabulary=80):
    rng = random.Random(seed)
    return [[[rng.randrange(vocabulary) for _ in range(rng.randint(1, top))] for _ in range(count)] for top in (30, 20)]


@torch.no_grad()
def plain(model, base, prompts, completions):
    """The three equations, token by token and word by word, from whole logits in float64."""
    results = {signal: [] for signal in SIGNALS}
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion])
        tables = [m(ids).logits[0].double().log_softmax(-1) for m in (model, base)]
        of_row = {signal: [] for signal in SIGNALS}
        for t, token in enumerate(completion):
            policy, reference = (table[len(prompt) + t - 1] for table in tables)
            of_row["logprob"].append(policy[token].item())
            of_row["entropy"].append(-sum(math.exp(value) * value for value in policy.tolist()))
            ratio = policy[token].item() - reference[token].item()
            of_row["implicit_reward"].append(1 / (1 + math.exp(-ratio)) - 0.5)
        for signal in SIGNALS:
            results[signal].append(of_row[signal])
    return results


def close(actual, expected):
    assert list(actual) == list(expected)
    for signal in expected:
        assert [len(a) for a in actual[signal]] == [len(e) for e in expected[signal]]
        for a, e in zip(actual[signal], expected[signal], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(e), rtol=1e-3, atol=2e-5)


@pytest.fixture(scope="module")
def adapters(tiny_path, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "layers": save_adapter(root / "layers", tiny_path, seed=1),
        "head": save_adapter(root / "head", tiny_path, seed=2, target_modules=("down_proj", "lm_head")),
        "whole_head": save_adapter(root / "whole", tiny_path, seed=3, modules_to_save=["lm_head"]),
    }


@pytest.mark.parametrize("name", ["layers", "head", "whole_head"])
def test_all_signals_of_an_adapter_and_its_base_in_one_model(tiny_path, adapters, name):
    """The base must be the base again after the adapter was on, also where the adapter holds a head."""
    prompts, completions = rows()
    base = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapters[name]).eval()
    expected = plain(policy, base, prompts, completions)
    scorer = LikelihoodScorer(tiny_path, tiny_tokenizer(), adapters[name], signals=SIGNALS, token_budget=150)
    close(scorer.score(prompts, completions), expected)
    assert max(max(map(abs, values)) for values in expected["implicit_reward"]) > 0.1


def test_signals_of_a_model_alone_in_the_order_asked_for(tiny_path):
    prompts, completions = rows(seed=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    expected = plain(model, model, prompts, completions)
    scorer = LikelihoodScorer(tiny_path, signals=["entropy", "logprob"])
    close(scorer.score(prompts, completions), {key: expected[key] for key in ("entropy", "logprob")})
    close(LikelihoodScorer(tiny_path).score(prompts, completions), {"logprob": expected["logprob"]})


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_soft_capped_scaled_biased_and_tied_heads(family, tmp_path):
    torch.manual_seed(0)
    own = {
        "gemma2": {"final_logit_softcapping": 5.0, "num_key_value_heads": 2, "head_dim": 8},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 4.0},
        "phi": {},
    }
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
        **own[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "a", str(tmp_path / "base"), seed=1, target_modules=("q_proj", "v_proj"))
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    prompts, completions = rows()
    scorer = LikelihoodScorer(str(tmp_path / "base"), None, adapter, signals=SIGNALS, tile_bytes=2000)
    close(scorer.score(prompts, completions), plain(policy, model, prompts, completions))


def test_batches_padding_tiles_and_order_do_not_change_signals(tiny_path, adapters):
    prompts, completions = rows(seed=4, count=13)
    variants = [
        LikelihoodScorer(tiny_path, tiny_tokenizer(), adapters["layers"], signals=SIGNALS, **arguments)
        for arguments in ({"token_budget": 1}, {"token_budget": 90, "tile_bytes": 1000}, {"token_budget": 10**6})
    ]
    alone, *others = (scorer.score(prompts, completions) for scorer in variants)
    for other in others:
        close(other, alone)
    order = random.Random(0).sample(range(13), 13)
    shuffled = variants[2].score([prompts[i] for i in order], [completions[i] for i in order])
    close(shuffled, {signal: [lists[i] for i in order] for signal, lists in alone.items()})
    assert variants[2].score([], []) == {signal: [] for signal in SIGNALS}


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_over_the_vocabulary_is_larger_than_the_tile(tiny_path, entropy):
    """Every tensor that is made is watched; the head's whole output would be 20 times the bound."""
    signals = ("logprob", "entropy") if entropy else ("logprob",)
    scorer = LikelihoodScorer(tiny_path, signals=signals, token_budget=10**6)
    scorer.tile_bytes = 4 * scorer.vocabulary * 10
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (scorer.vocabulary,):
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Watch():
        scorer.score([[5, 6]] * 10, [[7] * 20] * 10)
    assert 0 < largest <= scorer.tile_bytes


def test_half_precision_stays_near_fp32(tiny_path):
    prompts, completions = rows()
    half, full = (
        LikelihoodScorer(tiny_path, dtype=dtype).score(prompts, completions) for dtype in ("bfloat16", "auto")
    )
    gaps = [
        abs(a - b) for x, y in zip(half["logprob"], full["logprob"], strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(gaps) / len(gaps) < 0.05 * sum(-v for x in full["logprob"] for v in x) / len(gaps)


def test_what_cannot_be_scored_is_one_sentence(tiny_path, adapters, tmp_path):
    with pytest.raises(ValueError, match="no likelihood signal 'logprobs': use logprob, entropy, implicit_reward"):
        LikelihoodScorer(tiny_path, signals=["logprobs"])
    with pytest.raises(ValueError, match="compares an adapter with its base: give the adapter, or leave it out"):
        LikelihoodScorer(tiny_path, signals=["implicit_reward"])
    with pytest.raises(ValueError, match="was trained on"):
        LikelihoodScorer(save_tiny(tmp_path / "other", layers=1), None, adapters["layers"])

    scorer = LikelihoodScorer(tiny_path, None, adapters["layers"])
    for prompt, completion, message in [
        ([5], [], "the completion is empty"),
        ([], [5], "the prompt is empty, so nothing predicts"),
        ([5] * 500, [6] * 13, "prompt and completion are longer than the model's 512 positions"),
    ]:
        assert scorer.problem(prompt, completion).startswith(message)
        with pytest.raises(ValueError, match=f"Row 1: {message}"):
            scorer.score([[5], prompt], [[5], completion])
    with pytest.raises(ValueError, match="Row q: token id -1 is outside the model's vocabulary"):
        scorer.score([[5]], [[-1]], names=["q"])
    for name, parameter in scorer.base.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="Row q: the log-probability of completion token 0 is not finite"):
        scorer.score([[5]], [[6]], names=["q"])


def test_a_head_that_is_not_known_is_refused_not_misread(tiny_path):
    class Doubled(type(AutoModelForCausalLM.from_pretrained(tiny_path))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    with pytest.raises(ValueError, match=r"in a way LikelihoodScorer does not know \(difference .*: use another model"):
        LikelihoodScorer(Doubled.from_pretrained(tiny_path))


# --- the script ---------------------------------------------------------------------------------------------------


def test_script(tiny_path, adapters, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    texts = [(f"What is {i}+1? ", f"#### {i + 1}", f"so #### {i + 3}") for i in range(7)]
    source = [
        {"id": f"p{i}", "prompt": q, "chosen": a, "rejected": b}
        | {f"{k}_ids": tokenizer(t)["input_ids"] for k, t in (("prompt", q), ("chosen", a), ("rejected", b))}
        for i, (q, a, b) in enumerate(texts)
    ]
    source[3]["chosen_ids"] = []
    source[5]["prompt_ids"] = [7] * 510
    run_job(
        lambda batch: batch,
        Dataset.from_list(source),
        tmp_path / "pairs",
        **{"name": "pairs", "parameters": {}, "tokenizer": tokenizer},
    )
    options = {"model": tiny_path, "dataset": str(tmp_path / "pairs"), "output_dir": str(tmp_path / "scored")}
    options |= {"adapter": adapters["layers"], "shard_size": 4}
    likelihood.main(likelihood.Arguments(**options, signals=list(SIGNALS)))
    scored = load_stage(tmp_path / "scored", stage="preferences", tokenizer=tokenizer, signals=SIGNALS)
    check_preferences(scored, tokenizer, signals=[get(signal) for signal in SIGNALS])
    base = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapters["layers"]).eval()
    for side in ("chosen", "rejected"):
        expected = plain(policy, base, scored["prompt_ids"][:], scored[f"{side}_ids"][:])
        close({signal: scored[f"{side}_{signal}"][:] for signal in SIGNALS}, expected)

    manifest = read_manifest(tmp_path / "scored")
    assert manifest["dropped"] == {
        "chosen: prompt and completion are longer than the model's 512 positions": 1,
        "chosen: the completion is empty": 1,
    }
    assert manifest["scored_tokens"] == sum(len(ids) for s in ("chosen", "rejected") for ids in scored[f"{s}_ids"])
    assert manifest["tokens_per_second"] > 0
    with pytest.raises(JobError, match="signals was"):
        likelihood.main(likelihood.Arguments(**options))
