"""The commands `tokalign score` and `tokalign compare`, from one stage on disk to the next, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.signals.support import save_adapter
from tests.support import ALPHABET, save_tiny, tiny_tokenizer
from tokalign.cli import compare, first_error, rollout
from tokalign.generation.arguments import EngineArguments
from tokalign.signals import ContrastiveScorer, contrast, likelihood, prompting
from tokalign.signals.registry import get
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stage(tiny_path, tmp_path_factory) -> dict[str, str]:
    """Six preference pairs and two adapters on disk."""
    root = tmp_path_factory.mktemp("stage")
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)

    def pair(row):
        i = row["number"]
        texts = {"prompt": f"What is {i}+1? ", "chosen": f"#### {i + 1}", "rejected": f"so #### {i + 3}"}
        ids = {f"{name}_ids": tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()}
        for side in ("chosen", "rejected"):
            ids[f"{side}_ids"].append(tokenizer.eos_token_id)
        return [{"id": row["id"], "answer": str(i + 1), **texts, **ids, "first_error": len(ids["rejected_ids"]) - 2}]

    problems = Dataset.from_list([{"id": f"p{i}", "number": i} for i in range(6)])
    run_job(
        lambda rows: [pair(row) for row in rows],
        problems,
        root / "pairs",
        name="pairs",
        parameters={},
        tokenizer=tokenizer,
    )
    return {
        "model": tiny_path,
        "pairs": str(root / "pairs"),
        "positive": save_adapter(root / "positive", tiny_path, seed=1),
        "negative": save_adapter(root / "negative", tiny_path, seed=2),
    }


def arguments(stage, output_dir, **changes) -> contrast.Arguments:
    common = {key: stage[key] for key in ("model", "positive", "negative")}
    values = {**common, "dataset": stage["pairs"], "output_dir": str(output_dir), "shard_size": 4, **changes}
    return contrast.Arguments(**values)


def test_score_contrast(stage, tmp_path):
    contrast.main(arguments(stage, tmp_path / "scored", beta=0.5))
    tokenizer = AutoTokenizer.from_pretrained(stage["model"])
    scored = load_stage(tmp_path / "scored", stage="preferences", tokenizer=tokenizer, signals=["contrast"])
    check_preferences(scored, tokenizer, signals=[get("contrast")])
    scorer = ContrastiveScorer(stage["model"], tokenizer, stage["positive"], stage["negative"], beta=0.5)
    for side in ("chosen", "rejected"):
        expected = scorer.score(scored["prompt_ids"], scored[f"{side}_ids"])
        for actual, wanted in zip(scored[f"{side}_contrast"], expected, strict=True):
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(wanted), rtol=1e-3, atol=1e-5)

    manifest = read_manifest(tmp_path / "scored")
    assert manifest["parameters"]["beta"] == 0.5
    assert manifest["scored_tokens"] == sum(len(ids) for s in ("chosen", "rejected") for ids in scored[f"{s}_ids"])
    assert manifest["tokens_per_second"] > 0 and manifest["positive"] == stage["positive"]
    with pytest.raises(JobError, match=r"beta was 0\.5 and is 1\.0"):
        contrast.main(arguments(stage, tmp_path / "scored"))
    with pytest.raises(JobError, match="positive was"):
        contrast.main(arguments(stage, tmp_path / "scored", beta=0.5, positive=stage["negative"]))


def test_score_contrast_counts_what_it_drops(stage, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(stage["model"])
    rows = load_stage(stage["pairs"]).to_list()
    rows[1]["rejected_ids"] = []
    rows[2]["prompt_ids"] = [7] * 600
    rows[3]["chosen_ids"][0] = len(tokenizer) + 3  # of a model's padding
    run_job(
        lambda batch: batch, Dataset.from_list(rows), tmp_path / "odd", name="odd", parameters={}, tokenizer=tokenizer
    )
    contrast.main(arguments(stage, tmp_path / "scored", dataset=str(tmp_path / "odd")))
    manifest = read_manifest(tmp_path / "scored")
    assert manifest["rows"] == 3
    assert manifest["dropped"] == {
        "a completion holds an id that the tokenizer does not know": 1,
        "chosen: prompt and completion are longer than the model's 512 positions": 1,
        "rejected: the completion is empty": 1,
    }


@pytest.mark.slow
def test_two_processes_score_as_one(stage, tmp_path):
    contrast.main(arguments(stage, tmp_path / "one", shard_size=2))
    flags = vars(arguments(stage, tmp_path / "two", shard_size=2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "scripts" / "score.py"), "contrast"]
    command += [part for key, value in flags.items() if value is not None for part in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_stage(tmp_path / "one"), load_stage(tmp_path / "two")
    assert one["id"][:] == two["id"][:] and len(two) == 6
    assert one["rejected_contrast"][:] == two["rejected_contrast"][:]
    assert done.stdout.count("tokens scored") == 1  # two processes of one job, not two jobs


def test_rollout_estimate_then_compare_signals(stage, tmp_path):
    sampling = {"n": 4, "max_tokens": 4, "shard_size": 2, "max_rows": 3}
    rollout.main(
        rollout.Arguments(dataset=stage["pairs"], output_dir=str(tmp_path / "rollout"), **sampling),
        EngineArguments(model=stage["model"], dtype="float32"),
    )
    tokenizer = AutoTokenizer.from_pretrained(stage["model"])
    estimated = load_stage(tmp_path / "rollout", stage="preferences", signals=["rollout_accuracy"])
    check_preferences(estimated, tokenizer, signals=[get("rollout_accuracy")], sides=["rejected"])
    # a random model never answers, so the first token is already hopeless, with it or without
    assert estimated["critical_index"][:] == [0, 0, 0]
    assert estimated["with_correct"][:] == estimated["without_correct"][:] == [0, 0, 0]
    manifest = read_manifest(tmp_path / "rollout")
    assert manifest["model_tokens"] == sum(estimated["rollout_tokens"]) > manifest["scored_tokens"]
    assert manifest["scored_tokens"] == sum(len(ids) for ids in estimated["rejected_ids"])
    assert manifest["critical_tokens_found"] == 3 and (tmp_path / "rollout" / "pass_at_k.png").exists()
    assert json.loads((tmp_path / "rollout" / "pass_at_k.json").read_text())["problems"] == 3

    contrast.main(arguments(stage, tmp_path / "scored"))
    stages = [str(tmp_path / "scored"), str(tmp_path / "rollout")]
    results = compare.main(compare.Arguments(stages, str(tmp_path / "agreement"), samples=50))
    assert json.loads((tmp_path / "agreement" / "agreement.json").read_text()) == results
    assert (tmp_path / "agreement" / "agreement.png").exists()
    assert set(results) == {"first_error", "critical_index"}
    first = results["first_error"]
    assert first["solutions"] == 3
    assert set(first["signals"]) == {"contrast", "rollout_accuracy", "rollout critical token", "chance"}
    assert "rollout_accuracy" not in results["critical_index"]["signals"]
    costs = {name: entry["tokens_per_scored_token"] for name, entry in first["signals"].items()}
    assert costs["chance"] == 0 and 2 < costs["contrast"] < costs["rollout_accuracy"]


def test_rollout_estimate_needs_an_answer_and_a_wrong_answer(stage, tmp_path):
    rows = load_stage(stage["pairs"])
    tokenizer = AutoTokenizer.from_pretrained(stage["model"])
    bare, solved = tmp_path / "bare", tmp_path / "solved"
    run_job(lambda b: b, rows.remove_columns("answer"), bare, name="x", parameters={}, tokenizer=tokenizer)
    engine = EngineArguments(model=stage["model"], dtype="float32")
    with pytest.raises(ContractError, match="no column `answer`"):
        rollout.main(rollout.Arguments(dataset=str(bare), output_dir=str(tmp_path / "a")), engine)
    swapped = rows.remove_columns("rejected_ids").add_column("rejected_ids", rows["chosen_ids"][:]).select([0])
    run_job(lambda b: b, swapped, solved, name="x", parameters={}, tokenizer=tokenizer)
    rollout.main(rollout.Arguments(dataset=str(solved), output_dir=str(tmp_path / "b")), engine)
    assert read_manifest(tmp_path / "b")["dropped"] == {"the rejected completion has the right answer": 1}

    full = rows.select([0]).to_list()
    full[0]["rejected_ids"] = [7] * (512 - len(full[0]["prompt_ids"]))
    run_job(lambda b: b, Dataset.from_list(full), tmp_path / "full", name="x", parameters={}, tokenizer=tokenizer)
    rollout.main(rollout.Arguments(dataset=str(tmp_path / "full"), output_dir=str(tmp_path / "c")), engine)
    assert read_manifest(tmp_path / "c")["dropped"] == {"no room for a continuation in the model's 512 positions": 1}


def test_compare_signals_says_what_is_missing(stage, tmp_path):
    with pytest.raises(ContractError, match=r"rejected_contrast.*tokalign score contrast"):
        compare.main(compare.Arguments([stage["pairs"]], str(tmp_path), signals=["contrast"]))


def test_every_scorer_refuses_another_tokenizers_ids_without_a_manifest(stage, tmp_path):
    other = save_tiny(tmp_path / "other")
    tiny_tokenizer(alphabet="zyxwvutsrqponmlkjihgfedcbaABCDEW0123456789 #+?").save_pretrained(other)
    (tmp_path / "foreign").mkdir()
    load_stage(stage["pairs"]).to_parquet(tmp_path / "foreign" / "train.parquet")
    out = {"dataset": str(tmp_path / "foreign"), "output_dir": str(tmp_path / "out")}
    adapters = {name: stage[name] for name in ("positive", "negative")}
    scorers = {
        contrast: contrast.Arguments(model=other, **adapters, **out),
        likelihood: likelihood.Arguments(model=other, **out),
        prompting: prompting.Arguments(model=other, **out),
        first_error: first_error.Arguments(tokenizer=other, problems="none", **out),
    }
    for module, arguments in scorers.items():
        with pytest.raises(ContractError, match="use the tokenizer that made these ids"):
            module.main(arguments)
    with pytest.raises(ContractError, match="use the tokenizer that made these ids"):
        rollout.main(rollout.Arguments(**out), EngineArguments(model=other, dtype="float32"))
    tiny_tokenizer(ALPHABET[::-1]).save_pretrained(other)  # whose ids are all inside the vocabulary
    likelihood.main(likelihood.Arguments(model=other, allow_other_tokenizer=True, **out))
    assert read_manifest(out["output_dir"])["allow_other_tokenizer"] is True
