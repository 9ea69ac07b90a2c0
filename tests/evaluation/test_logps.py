"""Completion log-probs against one plain forward pass a row, with the whole logits written out."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokalign.evaluation.logps import LogProbScorer, completion_logps
from tokalign.evaluation.run import compare_logps

GENERATOR = torch.Generator().manual_seed(0)


def _rows(count=7, vocab=60):
    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=GENERATOR))
        return torch.randint(6, vocab, (length,), generator=GENERATOR).tolist()

    return [draw(1, 12) for _ in range(count)], [draw(1, 20) for _ in range(count)]


@torch.no_grad()
def _plain(model, prompts, completions):
    values = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        values.append(sum(logps[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)))
    return values


def _adapter(tiny_path, folder, targets, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("token_budget", [1, 60, 10_000])
def test_equals_one_plain_pass_a_row(tiny_path, token_budget):
    prompts, completions = _rows()
    expected = _plain(AutoModelForCausalLM.from_pretrained(tiny_path).eval(), prompts, completions)
    scorer = LogProbScorer(tiny_path, token_budget=token_budget)
    assert scorer.score(prompts, completions) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_adapter_counts_even_on_the_head(tiny_path, tmp_path, targets):
    adapter = _adapter(tiny_path, tmp_path / "adapter", targets, seed=1)
    prompts, completions = _rows()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapter).eval()
    expected = _plain(model, prompts, completions)
    assert LogProbScorer(tiny_path, adapter).score(prompts, completions) == pytest.approx(expected, abs=2e-4)
    assert LogProbScorer(tiny_path).score(prompts, completions) != pytest.approx(expected, abs=0.1)


def test_batches_stay_within_the_budget(tiny_path):
    scorer = LogProbScorer(tiny_path, token_budget=40)
    lengths = [3, 50, 10, 9, 20, 1]
    batches = list(scorer._batches(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 40 for b in batches)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [([], [7], "empty prompt or completion"), ([7], [], "empty prompt"), ([7] * 500, [7] * 13, "513 tokens but")],
)
def test_bad_rows_are_one_sentence(tiny_path, prompt, completion, message):
    with pytest.raises(ValueError, match=f"Row 1 has .*{message}"):
        LogProbScorer(tiny_path).score([[7], prompt], [[8], completion])


def _pairs(tokenizer):
    rows = []
    for i in range(5):
        chosen, rejected = f"{i} + 1 = {i + 1}", f"{i} + 1 = {i + 3}."
        rows.append({"id": f"p{i // 2}", "prompt": "q:", "chosen": chosen, "rejected": rejected})
        rows[-1] |= {f"{k}_ids": tokenizer(rows[-1][k])["input_ids"] for k in ("prompt", "chosen", "rejected")}
    return Dataset.from_list(rows)


def test_preferences_as_a_job_and_the_change_between_models(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    pairs = _pairs(tokenizer)
    adapter = _adapter(tiny_path, tmp_path / "adapter", ["q_proj"], seed=2)
    before = completion_logps(tiny_path, None, pairs, tmp_path / "base", tokenizer=tokenizer, shard_size=2)
    after = completion_logps(tiny_path, adapter, pairs, tmp_path / "tuned", tokenizer=tokenizer, shard_size=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    for side in ("chosen", "rejected"):
        plain = _plain(model, list(pairs["prompt_ids"]), list(pairs[f"{side}_ids"]))
        assert before[side]["mean"] == pytest.approx(sum(plain) / 5, abs=2e-4)
        assert before[side]["n"] == 5 and before[side]["ci95"][0] <= before[side]["mean"] <= before[side]["ci95"][1]
    change = compare_logps(tmp_path / "tuned", tmp_path / "base")
    for name in ("chosen", "rejected", "margin"):
        assert change[name]["difference"] == pytest.approx(after[name]["mean"] - before[name]["mean"], abs=1e-9)
