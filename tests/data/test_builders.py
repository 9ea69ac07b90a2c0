"""Dataset builders: contract columns out of files like the public ones, splits, cards, bad input."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from tokalign.data.builders import gsm8k, hendrycks_math, problems, svamp, ultrafeedback
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
    assert row["completion"] == [{"role": "assistant", "content": row["solution"]}]


def test_gsm8k_keeps_short_problems_on_request(tmp_path: Path) -> None:
    longer = {"question": "Both?", "answer": "<<1+1=2>>2 and <<2+2=4>>4.\n#### 4"}
    source = write(tmp_path / "train.jsonl", [GSM8K[0], longer])
    gsm8k.main(gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "out"), max_steps=1))
    assert load_stage(tmp_path / "out", split="train")["id"] == ["gsm8k-train-0"]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"more than 1 calculations": 1}


@pytest.mark.parametrize(
    ("equation", "solution", "answer"),
    [
        ("( 76.0 - 25.0 )", "76 - 25 = 51", "51"),
        ("( 6.0 - ( 3.0 + 2.0 ) )", "3 + 2 = 5\n6 - 5 = 1", "1"),
        ("( ( 1.0 / 4.0 ) * 1000000.0 )", "1 / 4 = 0.25\n0.25 * 1000000 = 250000", "250000"),
    ],
)
def test_svamp_is_worked_from_its_equation(tmp_path: Path, equation: str, solution: str, answer: str) -> None:
    row = {"Body": "Dan had some", "Question": "How many?", "Equation": equation, "Answer": float(answer)}
    rows = [row, row | {"Answer": 7.5}, row | {"Equation": "( 1.0 / 0.0 )"}, row | {"Equation": "f(1)"}]
    source = write(tmp_path / "svamp.jsonl", rows)
    svamp.main(svamp.SvampArguments(source=source, output_dir=str(tmp_path / "out"), test_share=0))
    (made,) = load_stage(tmp_path / "out", split="train", stage="problems")
    assert made["solution"] == f"{solution}\n#### {answer}" and made["answer"] == answer
    assert made["prompt"] == "Dan had some. How many?\n" and made["completion"] == made["solution"]
    dropped = read_manifest(tmp_path / "out" / "train")["dropped"]
    assert dropped == {"the equation does not give the answer": 3}


def svamp_splits(source: str, out: Path, **options) -> dict[str, list[str]]:
    svamp.main(svamp.SvampArguments(source=source, output_dir=str(out), **options))
    return {split.name: load_stage(out, split=split.name)["prompt"] for split in out.iterdir() if split.is_dir()}


def test_svamp_splits_have_no_story_in_common(tmp_path: Path) -> None:
    assert svamp.groups(["a b c d e f", "x", "p q r s t", "b c d e f p q r s t", "X 3"]) == [[0, 2, 3], [1, 4]]
    nouns = ("hens", "cups", "pens", "dolls", "keys", "nuts", "figs", "bags", "hats", "coins")
    told = [
        f"{noun} had {i} red {noun} and {i} blue {noun} {tail}"
        for noun in nouns
        for i, tail in enumerate(("", "now", "under it"))
    ]
    one = {"Question": "Sum?", "Equation": "( 1.0 + 1.0 )", "Answer": 2.0}
    source = write(tmp_path / "svamp.jsonl", [{"Body": body, **one} for body in told])
    splits = svamp_splits(source, tmp_path / "out", validation_share=0.2, test_share=0.3)
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 15, "validation": 6, "test": 9}
    found = {name: set().union(*map(svamp.runs, prompts)) for name, prompts in splits.items()}
    assert not (found["test"] | found["validation"]) & found["train"] and not found["test"] & found["validation"]
    other = svamp_splits(source, tmp_path / "other", validation_share=0.2, test_share=0.3, split_seed=1)
    assert other["validation"] == splits["validation"] and other["test"] != splits["test"]


@needs_data
def test_real_svamp_has_one_row_whose_equation_is_not_its_answer(tmp_path: Path) -> None:
    splits = svamp_splits(str(DATA / "svamp"), tmp_path / "out", validation_share=0.15)
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 550, "validation": 150, "test": 299}


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
    for text in ("| train | 2 |", "`solution`", f"tokalign data gsm8k --source {source} --output_dir {tmp_path}/out\n"):
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
    with pytest.raises(ContractError, match=r"neither a \.jsonl or \.parquet file, a folder .* check --source"):
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


# ------------------------------------------------------------------------------------------ files that say their split


def test_a_file_beside_the_data_is_no_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """GSM8K's own folder has example_model_solutions.jsonl, whose rows are no questions."""
    for name in ("gsm8k_train.jsonl", "dev.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"):
        write(tmp_path / "in" / name, GSM8K[:1])
    write(tmp_path / "in" / "example_model_solutions.jsonl", [{"ground_truth": "1"}])
    gsm8k.main(gsm8k.Gsm8kArguments(source=str(tmp_path / "in"), output_dir=str(tmp_path / "out")))
    assert "left alone, as the name says no split: example_model_solutions.jsonl\n" in capsys.readouterr().out
    lengths = {split: len(load_stage(tmp_path / "out", split=split)) for split in ("train", "validation", "test")}
    assert lengths == {"train": 1, "validation": 1, "test": 2}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", *sorted(lengths)]


def test_one_file_may_have_any_name_and_several_may_not(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "homework.jsonl", GSM8K[:1])
    for name, where in (("file", source), ("folder", str(tmp_path / "in"))):
        gsm8k.main(gsm8k.Gsm8kArguments(source=where, output_dir=str(tmp_path / name)))
        assert len(load_stage(tmp_path / name, split="train")) == 1
    write(tmp_path / "in" / "exam.jsonl", GSM8K[:1])
    with pytest.raises(ContractError, match=r"No file of .* \(exam\.jsonl, homework\.jsonl\); call them train"):
        gsm8k.main(gsm8k.Gsm8kArguments(source=str(tmp_path / "in"), output_dir=str(tmp_path / "out")))


# --------------------------------------------------------------------------------------------------------- own rows


def build_own(source: str | Path, out: Path, **options) -> Dataset:
    problems.main(problems.OwnProblemsArguments(source=str(source), output_dir=str(out), **options))
    return load_stage(out, stage="problems")


def test_own_rows_of_any_column_names(tmp_path: Path) -> None:
    rows = [
        {"question": "Two?", "worked": "It is #### no, #### 2 ", "name": "a", "level": 1},
        {"question": "Three?", "worked": "#### 3", "name": 7, "level": "hard"},  # of another type: not read
        {"question": "Four?", "worked": "4", "name": "c"},
        {"question": " ", "worked": "#### 5", "name": "d"},
        {"question": "Six?", "worked": "#### 6", "name": None},
    ]
    options = {"prompt_column": "question", "answer_column": "worked", "answer_after": "####", "id_column": "name"}
    source = write(tmp_path / "rows.jsonl", rows)
    made = build_own(source, tmp_path / "out", **options, solution_column="worked", instruction="Think.")
    assert made.to_list() == [
        {
            "id": str(row["name"]),
            "prompt": [{"role": "user", "content": f"{row['question']}\nThink."}],
            "answer": answer,
            "solution": row["worked"],
        }
        for row, answer in zip(rows, ("2", "3"), strict=False)
    ]
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest["dropped"] == {"no answer": 1, "no id": 1, "no question": 1}
    write(tmp_path / "rows.jsonl", [*rows, {"question": "?", "worked": "#### 1", "name": "a"}])
    with pytest.raises(
        ContractError, match=r"Row 5 of split train: `name` 'a' occurs twice, first in row 0; give every row its own"
    ):
        build_own(source, tmp_path / "again", **options)


def test_own_answers_as_they_are_or_as_the_text_states_them(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "How much?"}]
    rows = [{"prompt": talk, "answer": answer} for answer in (5, "so \\boxed{6}", None, "")]
    source = write(tmp_path / "rows.jsonl", rows)
    made = build_own(source, tmp_path / "given")
    assert made["answer"] == ["5", "so \\boxed{6}"] and made["prompt"] == [talk] * 2
    assert made["id"] == ["own-train-0", "own-train-1"]
    made = build_own(source, tmp_path / "read", extract_answers=True, instruction="Briefly.")
    assert made["answer"] == ["6"]
    assert made["prompt"] == [[talk[0], {"role": "user", "content": "How much?\nBriefly."}]]


def test_own_parquet_keeps_its_splits_and_takes_a_validation_share(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for split, count in (("train", 200), ("test", 3)):
        rows = [{"id": i, "prompt": f"{split} {i}?", "answer": f"The answer is {i}."} for i in range(count)]
        Dataset.from_list(rows).to_parquet(tmp_path / "in" / f"{split}.parquet")
    options = {"extract_answers": True, "solution_column": "answer", "id_column": "id", "prompt_style": "string"}
    train = build_own(tmp_path / "in", tmp_path / "out", **options, validation_share=0.2)
    validation, test = (load_stage(tmp_path / "out", split=split) for split in ("validation", "test"))
    assert len(train) + len(validation) == 200 and 20 <= len(validation) <= 60
    assert {*train["id"], *validation["id"]} == {str(i) for i in range(200)}
    assert test.to_list()[1] == {"id": "1", "prompt": "test 1?\n", "answer": "1", "solution": "The answer is 1."}


def test_own_rows_keep_what_the_chat_template_is_given(tmp_path: Path) -> None:
    off, tools = {"enable_thinking": False}, [{"type": "function", "function": {"name": "add"}}]
    rows = [
        {"prompt": "1 + 1", "answer": "2", "chat_template_kwargs": off, "tools": tools},
        {"prompt": "1 + 2", "answer": "3"},
    ]
    made = build_own(write(tmp_path / "mine.jsonl", rows), tmp_path / "out")
    assert made["chat_template_kwargs"] == [off, None]
    assert made["tools"] == [json.dumps(tools), None]


def test_own_rows_are_read_in_parts_whose_objects_differ(tmp_path: Path, monkeypatch) -> None:
    asked = {"role": "user", "content": "?"}
    rows = [
        {"prompt": [asked], "answer": 1},
        {"prompt": [{**asked, "name": "Ann"}], "answer": "2", "chat_template_kwargs": {}},
        {"prompt": [asked, {"role": "assistant", "content": None}, asked], "answer": [3]},
        {"prompt": [asked], "answer": None, "chat_template_kwargs": {"level": 1, "on": True}},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    at_once = build_own(source, tmp_path / "at_once")
    monkeypatch.setattr(problems, "_CHUNK", 1)
    made = build_own(source, tmp_path / "parts")
    assert made.to_list() == at_once.to_list() and made.features == at_once.features
    assert made["answer"] == ["1", "2", "[3]"] and made[1]["prompt"] == [{**asked, "name": "Ann"}]
    # the same file with other rows is read anew
    write(tmp_path / "rows.jsonl", [{"prompt": "b", "answer": "4"}])
    assert build_own(source, tmp_path / "changed")["answer"] == ["4"]
    write(
        tmp_path / "rows.jsonl",
        [{"prompt": [{"content": "b"}], "answer": "4"}, {"prompt": [{"content": 1}], "answer": "4"}],
    )
    with pytest.raises(ContractError, match=r"cannot be read as rows .*; write all prompts alike"):
        build_own(source, tmp_path / "unlike")


def test_own_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} " + "long " * 400, "answer": str(i)} for i in range(5000)]  # 10 MB
    arguments = problems.OwnProblemsArguments(source=str(write(tmp_path / "rows.jsonl", rows)), output_dir="")
    del rows
    tracemalloc.start()
    try:
        opened = problems._open(arguments)["train"]
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()
    assert len(opened) == 5000


def test_own_rows_with_a_schema_are_structured_problems(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    rows = [
        {"prompt": "p", "answer": {"a": 1}, "schema": schema},
        {"prompt": "p", "answer": '{"a": 2}', "schema": json.dumps(schema)},
        {"prompt": "p", "answer": {"b": 1}, "schema": schema},
        {"prompt": "p", "answer": "one", "schema": {"type": "string"}},
        {"prompt": "p", "answer": {}, "schema": {"type": "thing"}},
        {"prompt": "p", "answer": {}},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    build_own(source, tmp_path / "out", schema_column="schema")
    made = load_stage(tmp_path / "out", stage="structured")
    assert made["answer"] == ['{"a": 1}', '{"a": 2}'] and made["schema"] == [json.dumps(schema)] * 2
    assert made["completion"][0] == [{"role": "assistant", "content": '{"a": 1}'}]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {
        "answer breaks its schema": 1,
        "answer is not JSON": 1,
        "no schema": 1,
        "schema does not compile": 1,
    }


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "a", "answer": "1"}, {}, r"has columns answer, question but no `prompt`; set --prompt_column"),
        (
            {"prompt": "a", "answer": "1"},
            {"id_column": "key"},
            r"has columns answer, prompt but no `key`; set --id_column",
        ),
        ({"prompt": ["a"], "answer": "1"}, {}, r"`prompt` of .*rows\.jsonl is text in some rows and not in others"),
        (
            {"prompt": "a", "answer": "1"},
            {"answer_after": "#", "extract_answers": True},
            r"--answer_after and --extract_answers both say",
        ),
    ],
)
def test_own_rows_that_cannot_be_read_are_one_sentence(tmp_path: Path, row, options, message: str) -> None:
    rows = [row, {"prompt": "b", "answer": "2"}] if isinstance(row.get("prompt"), list) else [row]
    with pytest.raises(ContractError, match=message):
        build_own(write(tmp_path / "rows.jsonl", rows), tmp_path / "out", **options)
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    if "prompt" not in row:
        with pytest.raises(ContractError, match=message):
            build_own(tmp_path / "rows.parquet", tmp_path / "out", **options)
