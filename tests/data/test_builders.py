"""Dataset builders: contract columns out of files like the public ones, splits, cards, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from tokalign.rewards import answers_match
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("TOKALIGN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "gsm8k" / "train.jsonl").exists(),
    reason=f"no data under {DATA}; set TOKALIGN_SHARED_DATA to its folder",
)
GSM8K = [
    {"question": "Ann has 3 hens and buys 2. How many?", "answer": "3 + 2 = <<3+2=5>>5 hens.\n#### 5"},
    {"question": "A robe costs $1,000 twice over. Cost?", "answer": "It is 2*1000=$<<2*1000=2000>>2,000.\n#### 2,000"},
    {"question": "No final answer?", "answer": "There is none."},
    {"question": "  ", "answer": "#### 1"},
]
MATH = [
    {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
    {"problem": "Where?", "solution": "East. The answer is east.", "level": "Level 1", "type": "Algebra"},
]


def builder(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"builder_{name}", REPOSITORY / "data" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gsm8k, hendrycks_math, ultrafeedback = builder("gsm8k"), builder("hendrycks_math"), builder("ultrafeedback")


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_rows_have_the_contract_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "train.jsonl", GSM8K)
    gsm8k.main(gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "out")))
    rows = load_stage(tmp_path / "out", split="train", stage="problems")
    assert rows["answer"] == ["5", "2000"]
    assert rows["id"] == ["gsm8k-train-0", "gsm8k-train-1"]
    assert rows["prompt"][0] == "Ann has 3 hens and buys 2. How many?\n"
    assert rows["solution"][0] == "3 + 2 = 5 hens.\n#### 5"
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest["rows"] == 2
    assert manifest["dropped"] == {"no final answer after ####": 1, "no question": 1}


def test_gsm8k_keeps_calculator_marks_and_renders_messages_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "test.jsonl", GSM8K[:1])
    arguments = {"prompt_style": "messages", "instruction": "End with ####.", "calculator_marks": "keep"}
    gsm8k.main(gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "out"), **arguments))
    row = load_stage(tmp_path / "out", split="test", stage="problems")[0]
    assert row["prompt"] == [{"role": "user", "content": "Ann has 3 hens and buys 2. How many?\nEnd with ####."}]
    assert row["solution"].startswith("3 + 2 = <<3+2=5>>5")


def test_math_takes_the_answer_from_the_box(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", MATH)
    hendrycks_math.main(hendrycks_math.MathArguments(source=source, output_dir=str(tmp_path / "out")))
    rows = load_stage(tmp_path / "out", split="train", stage="problems")
    assert len(rows) == 1
    assert answers_match(rows[0]["answer"], "\\frac{1}{2}")
    assert rows[0]["level"] == "Level 1" and rows[0]["solution"] == MATH[0]["solution"]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"no final answer": 1}


def test_math_keeps_all_accepted_answers(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "question": "Half?", "answer": ["\\frac{1}{2}", "50\\%"]},
        {"id": 8, "question": "?", "answer": []},
    ]
    hendrycks_math.main(
        hendrycks_math.MathArguments(source=write(tmp_path / "test.jsonl", rows), output_dir=str(tmp_path / "out"))
    )
    made = load_stage(tmp_path / "out", split="test", stage="problems")
    assert len(made) == 1
    assert made[0]["answer"] == "\\frac{1}{2}"
    assert answers_match("50", made[0]["accepted"])


def test_validation_takes_its_share_and_never_a_question_of_train(tmp_path: Path) -> None:
    questions = [f"What is {i // 2} + 1?{' ' * (i % 2)}" for i in range(400)]  # each twice
    rows = [{"question": question, "answer": f"#### {i}"} for i, question in enumerate(questions)]
    source = write(tmp_path / "train.jsonl", rows)
    gsm8k.main(gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "out"), validation_share=0.25))
    train, validation = (load_stage(tmp_path / "out", split=split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 400
    assert 60 <= len(validation) <= 140
    assert not set(train["prompt"]) & set(validation["prompt"])
    assert not set(train["id"]) & set(validation["id"])


def test_a_second_run_keeps_what_is_there_and_other_options_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", GSM8K)
    arguments = {"source": source, "output_dir": str(tmp_path / "out")}
    gsm8k.main(gsm8k.Gsm8kArguments(**arguments))
    shard = next((tmp_path / "out" / "train").glob("*.parquet"))
    before = shard.stat().st_mtime_ns
    gsm8k.main(gsm8k.Gsm8kArguments(**arguments))
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(JobError, match="calculator_marks"):
        gsm8k.main(gsm8k.Gsm8kArguments(**arguments, calculator_marks="keep"))


def test_the_card_loads_and_lists_splits_columns_and_command(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", GSM8K)
    gsm8k.main(gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "out")))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "train/*.parquet"}]
    for text in ("| train | 2 |", "`solution`", "python "):
        assert text in card.text


def build_ultrafeedback(source: Path, out: Path, **options) -> None:
    ultrafeedback.main(ultrafeedback.UltraFeedbackArguments(source=str(source), output_dir=str(out), **options))


def test_ultrafeedback_keeps_prompts_once_and_no_answers(tmp_path: Path) -> None:
    train = ["Write a poem.", "Why is the sky blue?", "write a  POEM. ", " ", "Tell a joke.", "Name a tree."]
    rows = [{"prompt": text, "chosen": f"answer {k}", "prompt_id": str(k)} for k, text in enumerate(train)]
    write(tmp_path / "in" / "train.jsonl", rows)
    write(tmp_path / "in" / "test.jsonl", [{"prompt": "Tell a joke. "}, {"prompt": "Sing."}])
    build_ultrafeedback(tmp_path / "in", tmp_path / "out")
    made = {split: load_stage(tmp_path / "out", split=split, stage="problems") for split in ("train", "test")}
    contents = {split: [prompt[0]["content"] for prompt in rows["prompt"]] for split, rows in made.items()}
    assert contents["train"] == ["Write a poem.", "Why is the sky blue?", "Name a tree."]
    assert contents["test"] == ["Tell a joke.", "Sing."]  # the test keeps what both have
    assert made["train"]["id"] == ["ultrafeedback-train-0", "ultrafeedback-train-1", "ultrafeedback-train-5"]
    assert made["train"]["answer"] == [None] * 3
    assert made["train"].column_names == ["id", "prompt", "answer"]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"no question": 1, "repeated prompt": 2}
    assert "no reference answers" in DatasetCard.load(tmp_path / "out" / "README.md").text


def test_ultrafeedback_reads_parquet_and_takes_the_preference_splits(tmp_path: Path) -> None:
    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    for split, texts in (("train_prefs", ["a", "b"]), ("train_sft", ["a", "b", "c"]), ("test_prefs", ["d"])):
        Dataset.from_dict({"prompt": texts}).to_parquet(data / f"{split}-00000-of-00001.parquet")
    build_ultrafeedback(tmp_path / "clone", tmp_path / "out", prompt_style="string")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "test", "train"]
    assert load_stage(tmp_path / "out", split="train")["prompt"] == ["a\n", "b\n"]
    build_ultrafeedback(data / "test_prefs-00000-of-00001.parquet", tmp_path / "one", prompt_style="string")
    assert load_stage(tmp_path / "one", split="test")["prompt"] == ["d\n"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"Split train of .* has columns question but none of prompt, instruction; rename"),
        (
            {"prompt": [{"role": "user", "content": "a"}]},
            r"Column `prompt` of split train .* not text; give a",
        ),
    ],
)
def test_ultrafeedback_without_text_prompts_is_one_sentence(tmp_path: Path, row: dict, message: str) -> None:
    write(tmp_path / "train.jsonl", [row])
    with pytest.raises(ContractError, match=message):
        build_ultrafeedback(tmp_path / "train.jsonl", tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": \n', r"Line 2 of .*train\.jsonl is not JSON.*repair"),
        ('["a"]\n', r"Line 1 of .*train\.jsonl is not a JSON object; repair"),
        ('{"prompt": "a", "answer": "#### 1"}\n', "columns prompt, answer but none of question, problem; rename"),
        ('{"question": "a"}\n', "columns question but none of answer; rename"),
    ],
)
def test_a_bad_source_is_one_sentence(tmp_path: Path, lines: str, message: str) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text(lines)
    with pytest.raises(ContractError, match=message):
        gsm8k.main(gsm8k.Gsm8kArguments(source=str(source), output_dir=str(tmp_path / "out")))


def test_bad_options_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="calculator_marks is 'drop'; use 'strip' or 'keep'"):
        gsm8k.Gsm8kArguments(source="x", output_dir="y", calculator_marks="drop")
    with pytest.raises(ContractError, match=r"validation_share is 1\.5"):
        gsm8k.Gsm8kArguments(source="x", output_dir="y", validation_share=1.5)
    with pytest.raises(ContractError, match="prompt_style is 'chat'"):
        gsm8k.Gsm8kArguments(source="x", output_dir="y", prompt_style="chat")
    with pytest.raises(ContractError, match=r"neither a \.jsonl file, a folder .* check --source"):
        gsm8k.main(gsm8k.Gsm8kArguments(source=str(tmp_path / "absent"), output_dir=str(tmp_path / "out")))


@needs_data
def test_real_gsm8k_and_math500_build_without_a_dropped_row(tmp_path: Path) -> None:
    gsm8k.main(gsm8k.Gsm8kArguments(source=str(DATA / "gsm8k"), output_dir=str(tmp_path / "gsm8k")))
    train, test = (load_stage(tmp_path / "gsm8k", split=split, stage="problems") for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    assert not any("<<" in text or ">>" in text for text in train["solution"])
    assert all(text.endswith("#### " + text.rsplit("#### ", 1)[1]) for text in train["solution"])
    hendrycks_math.main(
        hendrycks_math.MathArguments(source=str(DATA / "math500"), output_dir=str(tmp_path / "math500"))
    )
    assert len(load_stage(tmp_path / "math500", split="test", stage="problems")) == 500
