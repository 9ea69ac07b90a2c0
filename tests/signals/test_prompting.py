"""Token rewards against a plain loop of their equation on whole logits, and their script on a stage on disk."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.signals.support import save_adapter
from tests.support import save_tiny, tiny_tokenizer
from tokalign.data.revision import load_templates, revision_prompt_ids, templates_hash
from tokalign.signals import PromptingScorer, prompting, token_reward
from tokalign.signals.registry import get
from tokalign.stage.contract import SIDES, check_preferences
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]


def equation(better: float, worse: float) -> float:
    """σ(better − worse) − 0.5 of one token."""
    return 1 / (1 + math.exp(-(better - worse))) - 0.5


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 3.0, 100.0]), ndim=st.integers(0, 3))
def test_is_the_equation_and_within_its_range(seed, scale, ndim):
    generator = torch.Generator().manual_seed(seed)
    better, worse = (-scale * torch.rand([3] * ndim, generator=generator) for _ in range(2))
    rewards = token_reward(better, worse)
    assert rewards.shape == better.shape and rewards.dtype == torch.float32
    for reward, b, w in zip(
        rewards.flatten().tolist(), better.flatten().tolist(), worse.flatten().tolist(), strict=True
    ):
        assert reward == pytest.approx(equation(b, w), abs=1e-6) and -0.5 <= reward <= 0.5
    torch.testing.assert_close(token_reward(worse, better), -rewards)


def test_half_precision_is_summed_in_fp32_and_shapes_must_agree():
    better, worse = torch.tensor([-1000.0, -2.0]).bfloat16(), torch.tensor([-1004.0, -2.0]).bfloat16()
    expected = [equation(*pair) for pair in zip(better.tolist(), worse.tolist(), strict=True)]
    assert token_reward(better, worse).tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"of the same tokens, got shapes \(2,\) and \(1,\)"):
        token_reward(better, worse[:1])


# --- the scorer ---------------------------------------------------------------------------------------------------


def rows(seed=0, count=9, vocabulary=80):
    rng = random.Random(seed)
    return [
        [[rng.randrange(vocabulary) for _ in range(rng.randint(1, top))] for _ in range(count)] for top in (40, 45, 20)
    ]


@torch.no_grad()
def plain_rewards(model, better, worse, completions):
    """Row by row and token by token from the model's whole logits."""
    result = []
    for *prompts, completion in zip(better, worse, completions, strict=True):
        logps = []
        for prompt in prompts:
            table = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
            logps.append([table[len(prompt) + t - 1, token].item() for t, token in enumerate(completion)])
        result.append([equation(b, w) for b, w in zip(*logps, strict=True)])
    return result


def close(actual, expected):
    assert [len(a) for a in actual] == [len(e) for e in expected]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(e), rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def adapter(tiny_path, tmp_path_factory) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny_path, seed=1)


@pytest.mark.parametrize("adapted", [False, True])
def test_scorer_equals_two_plain_forward_passes(tiny_path, adapter, adapted):
    better, worse, completions = rows()
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    if adapted:
        model = PeftModel.from_pretrained(model, adapter)
    scorer = PromptingScorer(tiny_path, tiny_tokenizer(), adapter if adapted else None)
    expected = plain_rewards(model.eval(), better, worse, completions)
    close(scorer.score(better, worse, completions), expected)
    assert max(max(map(abs, values)) for values in expected) > 0.1


def test_batches_padding_tiles_and_order_do_not_change_rewards(tiny_path):
    better, worse, completions = rows(seed=4, count=13)
    variants = [
        PromptingScorer(tiny_path, tiny_tokenizer(), **arguments)
        for arguments in ({"token_budget": 1}, {"token_budget": 300, "tile_bytes": 1000}, {"token_budget": 10**6})
    ]
    alone, *others = (scorer.score(better, worse, completions) for scorer in variants)
    for other in others:
        close(other, alone)
    order = random.Random(0).sample(range(13), 13)
    shuffled = variants[2].score(*([texts[i] for i in order] for texts in (better, worse, completions)))
    close(shuffled, [alone[i] for i in order])
    assert variants[2].score([], [], []) == []


def test_both_prompts_of_a_row_share_a_batch_and_the_head_sees_completions_only(tiny_path):
    better, worse, completions = rows(seed=2, count=20)
    scorer = PromptingScorer(tiny_path, None, token_budget=400)
    batches, positions = [], 0

    def backbone(module, args, kwargs):
        batches.append(kwargs["input_ids"].tolist())

    def head(module, args):
        nonlocal positions
        positions += args[0].shape[:-1].numel()

    scorer.base.base_model.register_forward_pre_hook(backbone, with_kwargs=True)
    scorer.head.register_forward_pre_hook(head)
    scorer.score(better, worse, completions)
    assert len(batches) > 3 and positions == 2 * sum(map(len, completions))
    for batch in batches:
        assert len(batch) % 2 == 0 and (len(batch) == 2 or len(batch) * len(batch[0]) <= 400)

    def holds(batch, ids):
        return any(row[: len(ids)] == ids and set(row[len(ids) :]) <= {0} for row in batch)

    for b, w, completion in zip(better, worse, completions, strict=True):
        assert any(holds(batch, b + completion) and holds(batch, w + completion) for batch in batches)


def test_row_refusals_name_row_and_reason(tiny_path):
    scorer = PromptingScorer(tiny_path, None)
    assert scorer.problem([5], [5], [6]) is None
    assert scorer.problem([5] * 500, [5], [6] * 13) == scorer.problem([5], [5] * 500, [6] * 13)
    for better, worse, completion, message in [
        ([5], [5], [], "the completion is empty"),
        ([], [5], [6], "the prompt is empty, so nothing predicts"),
        ([5], [], [6], "the prompt is empty, so nothing predicts"),
        ([5], [5] * 500, [6] * 13, "prompt and completion are longer than the model's 512 positions"),
    ]:
        assert scorer.problem(better, worse, completion).startswith(message)
        with pytest.raises(ValueError, match=f"Row q7: {message}"):
            scorer.score([[5], better], [[5], worse], [[6], completion], names=["q6", "q7"])
    with pytest.raises(ValueError, match="Row 0: token id 999 is outside the model's vocabulary"):
        scorer.score([[5]], [[999]], [[6]])
    with pytest.raises(ValueError, match="1 prompts but 2 completions"):
        scorer.score([[5], [5]], [[5]], [[6], [7]])


def test_an_adapter_of_another_base_and_nan_in_one(tiny_path, adapter, tmp_path):
    other = save_tiny(tmp_path / "other", seed=3, hidden_size=64)
    with pytest.raises(ValueError, match="was trained on"):
        PromptingScorer(other, None, adapter)
    scorer = PromptingScorer(tiny_path, None, adapter)
    for name, parameter in scorer.base.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"Row a: the log-probability of completion token 0 is not finite; check the"):
        scorer.score([[5, 6]], [[5, 7]], [[7, 8]], names=["a"])


# --- the contract's range -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "options", "message"),
    [
        ("token_reward", {}, r"`rejected_token_reward` holds 0\.7, but .* lies in \[-0\.5, 0\.5\]; score"),
        ("implicit_reward", {}, r"`rejected_implicit_reward` holds 0\.7, but .* lies in \[-0\.5, 0\.5\]"),
        ("contrast", {"ranges": {"contrast": (0.0, 0.6)}}, r"`rejected_contrast` holds 0\.7.* in \[0, 0\.6\]; score"),
    ],
)
def test_rewards_outside_their_range_name_row_and_column(signal, options, message):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    good = {"id": "p0", **row, f"chosen_{signal}": [0.5], f"rejected_{signal}": [0.0, 0.5]}
    check_preferences(Dataset.from_list([good]), signals=[get(signal)], **options)
    bad = {**good, "id": "p1", f"rejected_{signal}": [0.0, 0.7]}
    with pytest.raises(ContractError, match=rf"^Row 1 \(id 'p1'\): {message}"):
        check_preferences(Dataset.from_list([good, bad]), signals=[get(signal)], **options)
    check_preferences(Dataset.from_list([good, bad]), signals=[get(signal)], ranges={signal: (-1.0, 1.0)})


# --- the script ---------------------------------------------------------------------------------------------------


def pair(number: int, tokenizer, messages: bool) -> dict:
    texts = {"prompt": f"What is {number}+1? ", "chosen": f"#### {number + 1}", "rejected": f"so #### {number + 3}"}
    ids = {f"{name}_ids": tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()}
    for side in SIDES:
        ids[f"{side}_ids"].append(tokenizer.eos_token_id)
    if messages:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        texts = {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}
    return {"id": f"p{number}", **texts, **ids}


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "messages"])
def pairs(request, tiny_path, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("stage") / "pairs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    source = Dataset.from_list([pair(number, tokenizer, request.param) for number in range(6)])
    run_job(lambda batch: batch, source, folder, name="pairs", parameters={}, tokenizer=tokenizer)
    return folder


def arguments(tiny_path, pairs, output_dir, **changes) -> prompting.Arguments:
    values = {"model": tiny_path, "dataset": str(pairs), "output_dir": str(output_dir), "shard_size": 4, **changes}
    return prompting.Arguments(**values)


def test_script(tiny_path, pairs, adapter, tmp_path, capsys):
    run = arguments(tiny_path, pairs, tmp_path / "rewarded", adapter=adapter, templates="math")
    prompting.main(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rewarded = load_stage(tmp_path / "rewarded", stage="preferences", tokenizer=tokenizer, signals=["token_reward"])
    check_preferences(rewarded, tokenizer, signals=[get("token_reward")])
    templates = load_templates("math")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapter).eval()
    through = 0
    for side in SIDES:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in rewarded[side]]
        prompts = [
            revision_prompt_ids(prompt, text, templates, tokenizer)
            for prompt, text in zip(rewarded["prompt"], texts, strict=True)
        ]
        better, worse = ([p[i] for p in prompts] for i in (0, 1))
        completions = rewarded[f"{side}_ids"][:]
        close(rewarded[f"{side}_token_reward"][:], plain_rewards(model, better, worse, completions))
        through += sum(len(b) + len(w) + 2 * len(c) for b, w, c in zip(better, worse, completions, strict=True))

    manifest = read_manifest(tmp_path / "rewarded")
    assert manifest["scored_tokens"] == sum(len(ids) for s in SIDES for ids in rewarded[f"{s}_ids"])
    assert manifest["model_tokens"] == sum(rewarded["token_reward_tokens"]) == through
    assert manifest["tokens_per_second"] > 0 and "through the model" in capsys.readouterr().out
    assert manifest["parameters"]["templates"] == templates_hash(templates)
    assert manifest["templates"] == {"name": "math", "better": templates.better, "worse": templates.worse}
    with pytest.raises(JobError, match="templates was"):
        prompting.main(arguments(tiny_path, pairs, tmp_path / "rewarded", adapter=adapter))
    with pytest.raises(JobError, match="adapter was"):
        prompting.main(arguments(tiny_path, pairs, tmp_path / "rewarded", templates="math"))


def test_script_by_path_raw_and_what_it_drops(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rows = [pair(number, tokenizer, False) for number in range(4)]
    rows[1]["rejected_ids"] = []
    rows[2]["prompt"] = "many words " * 60
    run_job(
        lambda batch: batch, Dataset.from_list(rows), tmp_path / "odd", name="odd", parameters={}, tokenizer=tokenizer
    )
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"better": "{prompt}: not {completion} but ", "worse": "{prompt} and {completion} or "}))
    run = arguments(
        tiny_path, tmp_path / "odd", tmp_path / "out", prompt_format="raw", templates=str(file), token_budget=300
    )
    prompting.main(run)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["rows"] == 2 and manifest["dropped"] == {
        "chosen: prompt and completion are longer than the model's 512 positions": 1,
        "rejected: the completion is empty": 1,
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    row = load_stage(tmp_path / "out")[0]
    better = tokenizer(f"{row['prompt']}: not {row['chosen']} but ")["input_ids"]
    worse = tokenizer(f"{row['prompt']} and {row['chosen']} or ")["input_ids"]
    close([row["chosen_token_reward"]], plain_rewards(model, [better], [worse], [row["chosen_ids"]]))


def test_script_refuses_another_tokenizers_ids(tiny_path, tmp_path):
    """Of a stage by its manifest; of rows from elsewhere by the text that their ids hold."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rows = Dataset.from_list([pair(number, tokenizer, False) for number in range(3)])
    run_job(lambda batch: batch, rows, tmp_path / "stage", name="x", parameters={}, tokenizer=tokenizer)
    (tmp_path / "foreign").mkdir()
    rows.to_parquet(tmp_path / "foreign" / "train.parquet")
    other = save_tiny(tmp_path / "other")
    tiny_tokenizer(alphabet="zyxwvutsrqponmlkjihgfedcbaABCDEW0123456789 #+?").save_pretrained(other)
    with pytest.raises(
        ContractError, match=r"were made with another tokenizer .* use the model that they were made for"
    ):
        prompting.main(arguments(other, tmp_path / "stage", tmp_path / "a"))
    with pytest.raises(ContractError, match=r"Row 0 \(id 'p0'\): .*use the tokenizer that made these ids"):
        prompting.main(arguments(other, tmp_path / "foreign", tmp_path / "b"))
    prompting.main(arguments(tiny_path, tmp_path / "foreign", tmp_path / "c"))
    assert read_manifest(tmp_path / "c")["rows"] == 3


@pytest.mark.slow
def test_two_processes_reward_as_one(tiny_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    rows = Dataset.from_list([pair(number, tokenizer, False) for number in range(6)])
    run_job(lambda batch: batch, rows, tmp_path / "pairs", name="x", parameters={}, tokenizer=tokenizer)
    prompting.main(arguments(tiny_path, tmp_path / "pairs", tmp_path / "one", shard_size=2))
    flags = vars(arguments(tiny_path, tmp_path / "pairs", tmp_path / "two", shard_size=2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "score.py"), "token-reward"]
    command += [part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_stage(tmp_path / "one"), load_stage(tmp_path / "two")
    assert one["id"][:] == two["id"][:] and len(two) == 6
    for side in SIDES:
        for alone, shared in zip(one[f"{side}_token_reward"], two[f"{side}_token_reward"], strict=True):
            assert shared == pytest.approx(alone, abs=1e-6)  # other threads may round the last bit otherwise
