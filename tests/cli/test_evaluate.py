"""`tokalign evaluate answers` and `tokalign view` on a tiny model."""

import json
import shutil

import pytest
from datasets import Dataset

from tests.support import tiny_tokenizer
from tokalign.cli.main import main
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import note_beside_model


def _run(verb, *arguments):
    main([*verb.split(), *map(str, arguments)])


def _stages(folder):
    """A problems stage and a signals stage as plain parquet folders."""
    tokenizer = tiny_tokenizer()
    problems = [{"id": f"p{i}", "prompt": f"{i} + 1 = ", "answer": str(i + 1)} for i in range(6)]
    pairs = []
    for problem in problems:
        row = {"id": problem["id"], "prompt": problem["prompt"], "answer": problem["answer"]}
        row |= {"chosen": f"#### {problem['answer']}", "rejected": "#### <b>", "first_error": 5}
        row |= {f"{side}_ids": tokenizer(row[side])["input_ids"] for side in ("prompt", "chosen", "rejected")}
        row["rejected_contrast"] = [0.5] * len(row["rejected_ids"])
        pairs.append(row)
    for name, rows in (("problems", problems), ("pairs", pairs)):
        (folder / name).mkdir()
        Dataset.from_list(rows).to_parquet(folder / name / "train.parquet")
    return folder / "problems", folder / "pairs"


def test_evaluate_compare_and_resume(tiny_path, tmp_path, capsys):
    problems, pairs = _stages(tmp_path)
    common = ["--model", tiny_path, "--problems", problems, "--split", "train", "--max_tokens", 8, "--samples", 2]
    common += ["--shard_size", 4, "--preferences", pairs]
    _run("evaluate answers", *common, "--output_dir", tmp_path / "a")
    first = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert first["n"] == 6 and 0 <= first["ci95"][0] <= first["greedy_accuracy"] <= first["ci95"][1] <= 1
    assert first["sampled_ci95"] and [row["k"] for row in first["pass_at_k"]] == [1, 2]
    assert first["logps"]["chosen"]["n"] == 6 and first["logps"]["chosen"]["mean"] < 0
    _run("evaluate answers", *common, "--output_dir", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == first
    capsys.readouterr()
    _run("evaluate answers", *common, "--output_dir", tmp_path / "b", "--compare", tmp_path / "a")
    second = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert second["comparison"]["greedy"]["difference"] == 0 and second["comparison"]["greedy"]["p"] == 1
    assert second["comparison"]["logps"]["chosen"]["difference"] == 0
    assert "greedy accuracy" in capsys.readouterr().out


def test_pairs_that_cannot_be_read_are_found_before_anything_is_sampled(tiny_path, tmp_path):
    problems, _ = _stages(tmp_path)
    Dataset.from_list([{"id": "a", "prompt": "1", "chosen": "2", "rejected": "3"}]).to_parquet(tmp_path / "own.parquet")
    asked = [
        "--model",
        tiny_path,
        "--problems",
        problems,
        "--split",
        "train",
        "--preferences",
        tmp_path / "own.parquet",
    ]
    with pytest.raises(ContractError, match=r"no column `prompt_ids`.* give what `tokalign score likelihood`"):
        _run("evaluate answers", *asked, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    scored = tmp_path / "scored"
    _run("score likelihood", "--model", tiny_path, "--dataset", tmp_path / "own.parquet", "--output_dir", scored)
    assert load_stage(scored, stage="preferences")["id"] == ["a"]


def test_evaluation_stops_where_sampling_stopped(tiny_path, tmp_path, capsys):
    """By the manifest of the rollouts, of the pairs, or of what the model was trained on; and it says which."""
    problems, pairs = _stages(tmp_path)
    rows = load_stage(pairs)
    sampling = {"stop": ["\n\n"], "end_ids": [1], "end_token_id": 1, "base_model": True}
    extra, ids = {"sampling": sampling}, {"parameters": {}, "tokenizer": tiny_tokenizer()}
    run_job(lambda batch: batch, rows, tmp_path / "stage", name="pairs", extra_manifest=extra, **ids)
    shutil.copytree(tiny_path, tmp_path / "trained")
    note_beside_model(tmp_path / "trained", "DPO", load_stage(tmp_path / "stage"), allowed=False)
    common = ["--problems", problems, "--split", "train", "--max_tokens", 2]
    stage, trained = tmp_path / "stage", tmp_path / "trained"
    for name, options, path in (
        ("rollouts", ["--model", tiny_path, "--rollouts", stage], stage),
        ("pairs", ["--model", tiny_path, "--preferences", stage], stage),
        ("model", ["--model", trained, "--preferences", pairs], trained),
    ):
        _run("evaluate answers", *common, *options, "--output_dir", tmp_path / "eval" / name)
        assert json.loads((tmp_path / "eval" / name / "metrics.json").read_text())["stop"] == ["\n\n"]
        said = " ".join(capsys.readouterr().out.split())
        assert "Completions end at ['\\n\\n'], as the rollouts behind" in said and path.name in said
    _run("evaluate answers", *common, "--model", trained, "--stop", "END", "--output_dir", tmp_path / "given")
    assert json.loads((tmp_path / "given" / "metrics.json").read_text())["stop"] == ["END"]
    with pytest.raises(ContractError, match="does not say where its rollouts stopped; give --stop"):
        _run("evaluate answers", *common, "--model", tiny_path, "--rollouts", pairs, "--output_dir", tmp_path / "no")


def test_view_writes_one_page(tiny_path, tmp_path):
    _, pairs = _stages(tmp_path)
    page = tmp_path / "page.html"
    _run("view", "--dataset", pairs, "--tokenizer", tiny_path, "--output", page, "--limit", 2)
    html = page.read_text(encoding="utf-8")
    assert "Rows 0–1 of 6" in html and "true first error" in html and "<b>p1</b>" in html
    assert "reference answer: <b>2</b>" in html and "answer read: 2" in html
    with pytest.raises(ContractError, match="no row 9"):
        _run("view", "--dataset", pairs, "--tokenizer", tiny_path, "--start", 9)
    with pytest.raises(ContractError, match=r"--sides names 'choosen'.*; use one of chosen, rejected"):
        _run("view", "--dataset", pairs, "--tokenizer", tiny_path, "--sides", "rejected", "choosen")
