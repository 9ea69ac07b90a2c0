"""Builders of structured problems: every completion is valid under its schema and is what the reference says."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import jsonschema_rs
import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard

from tests.data.test_builders import DATA, needs_data, write
from tests.support import tiny_tokenizer
from tokalign.data.builders import bfcl, cooking, gsm8k, gsm8k_json, snips
from tokalign.data.builders import problems as own
from tokalign.prompts import PromptRendering
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.calls import calls_match
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

needs_bfcl = pytest.mark.skipif(
    not (DATA / "bfcl" / "simple_python.jsonl").exists(),
    reason=f"no BFCL under {DATA}; set TOKALIGN_SHARED_DATA to its folder",
)


def checked(row: dict) -> dict:
    """The document of a row's completion, after the checks that every builder's rows pass."""
    (message,) = row["completion"]
    assert message["role"] == "assistant"
    assert row["prompt"][-1]["role"] == "user"
    schema = json.loads(row["schema"])
    texts = message["content"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    documents = [json.loads(text) for text in texts.split("\n</tool_call>\n<tool_call>\n")]
    assert texts.split("\n</tool_call>\n<tool_call>\n") == [json.dumps(one, ensure_ascii=False) for one in documents]
    document = documents if len(documents) > 1 else documents[0]
    jsonschema_rs.validator_for(schema, offline=True).validate(document)
    assert in_order(document, schema)
    return document


def in_order(value, schema: dict) -> bool:
    """Whether the keys of every object are in the order of its schema."""
    if isinstance(value, list):
        return all(in_order(item, schema.get("items", {})) for item in value)
    if not isinstance(value, dict) or "properties" not in schema:
        return True
    known = schema["properties"]
    return list(value) == [key for key in known if key in value] and all(in_order(value[k], known[k]) for k in value)


def leaves(value) -> Iterable:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


# ----------------------------------------------------------------------------------------------------------- GSM8K-JSON

SOLVED = [
    {"question": "Hens?", "answer": "3 + 2 = <<3+2=5>>5 hens.\n#### 5"},
    {
        "question": "Robe — how much? ",
        "answer": "Let x be it.\nIt costs $<<2*1,000.50=2,001.00>>2,001.\n\nThat is half.\n"
        "Tax <<5%*2001=100.05>>100.05.\nSo “much”.\n#### $2,101",
    },
    {"question": "Two marks?", "answer": "1+1=<<1+1=2>>2 and 2+2=<<2+2=4>>4.\n#### 4"},
    {"question": "A fraction?", "answer": "It is <<3/4=3/4>>3/4.\n#### 1"},
]
UNSOLVED = [
    {"question": "No end?", "answer": "<<1+1=2>>2"},
    {"question": "Half?", "answer": "<<1/2=.5>>\n#### 0.5"},
    {"question": "Words?", "answer": "<<1+1=2>>\n#### two"},
    {"question": "No mark?", "answer": "x = 5\n#### 5"},
    {"question": "A third?", "answer": "<<1/3=1/3>>\n#### 5"},
    {"question": "No number?", "answer": "<<1/3=x>>\n#### 5"},
    {"question": " ", "answer": "<<1+1=2>>\n#### 2"},
    {"question": "Nothing?", "answer": None},
]


def build_gsm8k(folder: Path, rows: list[dict], **options) -> Dataset:
    source = write(folder / "train.jsonl", rows)
    gsm8k_json.main(gsm8k_json.Gsm8kJsonArguments(source=source, output_dir=str(folder / "out"), **options))
    return load_stage(folder / "out", split="train", stage="structured")


def test_gsm8k_solutions_become_documents(tmp_path: Path) -> None:
    rows = build_gsm8k(tmp_path, SOLVED + UNSOLVED)
    documents = [checked(row) for row in rows]
    assert [row["answer"] for row in rows] == [row["completion"][0]["content"] for row in rows]
    assert rows["id"] == [f"gsm8k_json-train-{k}" for k in range(4)]
    assert documents == [
        {"steps": [{"text": "3 + 2 = 5 hens.", "calculation": "3+2", "result": 5}], "answer": 5},
        {
            "steps": [
                {"text": "Let x be it. It costs $2,001.", "calculation": "2*1,000.50", "result": 2001},
                {"text": "That is half. Tax 100.05. So “much”.", "calculation": "5%*2001", "result": 100.05},
            ],
            "answer": 2101,
        },
        {"steps": [{"text": "1+1=2 and 2+2=4.", "calculation": "2+2", "result": 4}], "answer": 4},
        {"steps": [{"text": "It is 3/4.", "calculation": "3/4", "result": 0.75}], "answer": 1},
    ]
    assert "“much”" in rows[1]["answer"] and '"result": 2001}' in rows[1]["answer"]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {
        "no final answer after ####": 2,
        "final answer is not an integer": 2,
        "no calculator mark": 1,
        "result is not an exact number": 2,
        "no question": 1,
    }


def test_gsm8k_prompts_show_what_was_asked_for(tmp_path: Path) -> None:
    shown = build_gsm8k(tmp_path / "shown", SOLVED[1:2])[0]
    question, instruction, schema = shown["prompt"][0]["content"].split("\n")
    assert (question, instruction) == ("Robe — how much?", "Answer with one JSON document and nothing else.")
    assert schema == "JSON Schema: " + shown["schema"]
    bare = build_gsm8k(tmp_path / "bare", SOLVED[:1], show_schema=False, instruction="")[0]
    assert bare["prompt"] == [{"role": "user", "content": "Hens?"}]
    text = build_gsm8k(tmp_path / "text", SOLVED[:1], show_schema=False, instruction="JSON.", prompt_style="string")[0]
    assert (text["prompt"], text["completion"]) == ("Hens?\nJSON.\n", text["answer"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 5 ", 5),
        ("-5", -5),
        ("$1,234.50", 1234.5),
        ("-$2", -2),
        ("50%", 50),
        ("12.00", 12),
        (".5", 0.5),
        ("5.", 5),
        ("1,234,567", 1234567),
        ("6/8", 0.75),
        ("0.1", 0.1),
        ("123456789012345", 123456789012345),
        ("1/3", None),
        ("3/0", None),
        ("1,5", None),
        ("12,34", None),
        ("1 2", None),
        ("", None),
        ("x", None),
        ("0.123456789012345", 0.123456789012345),
        ("1e9", None),
        ("9" * 5000, None),
        ("1.2.3", None),
        ("3$4", None),
        ("123456789012.123456789012345", None),  # more digits than a double has
    ],
)
def test_numbers_are_read_exactly_or_not_at_all(text: str, value: float | None) -> None:
    found = gsm8k_json.number(text)
    assert (type(found), found) == (type(value), value)
    if isinstance(found, float) and "/" not in text:
        assert Fraction(json.dumps(found)) == Fraction(text.strip("$ ").replace(",", ""))


def test_gsm8k_json_keeps_questions_on_the_side_that_gsm8k_puts_them(tmp_path: Path) -> None:
    rows = [{"question": f"What is {k} + 1?", "answer": f"<<{k}+1={k + 1}>>\n#### {k + 1}"} for k in range(200)]
    source = write(tmp_path / "train.jsonl", rows)
    shared = {"source": source, "validation_share": 0.25}
    gsm8k.main(gsm8k.Gsm8kArguments(**shared, output_dir=str(tmp_path / "plain")))
    gsm8k_json.main(gsm8k_json.Gsm8kJsonArguments(**shared, output_dir=str(tmp_path / "json")))
    plain, made = (load_stage(tmp_path / name, split="validation") for name in ("plain", "json"))
    questions = [prompt[0]["content"].split("\n")[0] for prompt in made["prompt"]]
    assert questions == [prompt.strip() for prompt in plain["prompt"]] and 20 < len(questions) < 80


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "columns question but none of answer; rename"),
        ({"prompt": "a", "answer": "b"}, "columns prompt, answer but none of question, problem; rename"),
    ],
)
def test_a_gsm8k_source_without_a_column_is_one_sentence(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        build_gsm8k(tmp_path, [row])


@needs_data
def test_real_gsm8k_becomes_documents(tmp_path: Path) -> None:
    gsm8k_json.main(
        gsm8k_json.Gsm8kJsonArguments(
            source=str(DATA / "gsm8k" / "test.jsonl"), output_dir=str(tmp_path), show_schema=False
        )
    )
    rows = load_stage(tmp_path, split="test", stage="structured")
    assert read_manifest(tmp_path / "test")["dropped"] == {"no calculator mark": 18}
    assert len(rows) == 1301
    for row in rows:
        document = checked(row)
        assert json.loads(row["answer"]) == document
        assert not any("<<" in step["text"] or not step["calculation"] for step in document["steps"])


# ---------------------------------------------------------------------------------------------------------------- SNIPS

SPOKEN = [
    {"text": "Play Motörhead on Deezer ", "intent": "Play", "slots": [["service", "Deezer "], ["artist", "Motörhead"]]},
    {"text": "Rate it 5", "intent": "Rate", "slots": [["value", "5"]]},
    {"text": "Play something", "intent": "Play", "slots": []},
    {"text": "Play Pandora on Deezer", "intent": "Play", "slots": [["service", "Pandora"], ["service", "Deezer"]]},
]


def build_snips(folder: Path, rows: list[dict], **options) -> Dataset:
    source = write(folder / "train.jsonl", rows)
    snips.main(snips.SnipsArguments(source=source, output_dir=str(folder / "out"), **options))
    return load_stage(folder / "out", split="train", stage="structured")


def test_snips_sentences_become_documents_and_no_slot_is_required(tmp_path: Path) -> None:
    rows = build_snips(tmp_path, SPOKEN)
    assert [checked(row) for row in rows] == [
        {"intent": "Play", "artist": "Motörhead", "service": "Deezer"},
        {"intent": "Rate", "value": "5"},
        {"intent": "Play"},
    ]
    assert rows["answer"] == [row["completion"][0]["content"] for row in rows]
    assert {row["schema"] for row in rows} == {rows[0]["schema"]}
    texts = {name: {"type": "string"} for name in ("artist", "service", "value")}
    assert json.loads(rows[0]["schema"]) == {
        "type": "object",
        "properties": {"intent": {"enum": ["Play", "Rate"]}, **texts},
        "required": ["intent"],
        "additionalProperties": False,
    }
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {"two texts for one slot": 1}


def test_snips_prompts_and_schemas_are_those_asked_for(tmp_path: Path) -> None:
    options = {"schemas": "intent", "show_schema": False, "show_keys": True, "instruction": ""}
    play, rate = build_snips(tmp_path / "intent", SPOKEN[:2], **options)
    assert play["prompt"][0]["content"] == "Play Motörhead on Deezer\nIntents: Play\nSlots: artist, service"
    assert json.loads(rate["schema"])["properties"] == {"intent": {"const": "Rate"}, "value": {"type": "string"}}
    shown = build_snips(tmp_path / "shown", SPOKEN[:2])[1]
    assert shown["prompt"][0]["content"].split("\n") == [
        "Rate it 5",
        "Answer with one JSON document and nothing else.",
        "JSON Schema: " + shown["schema"],
    ]
    with pytest.raises(ContractError, match="'one'; use 'all' or 'intent'"):
        build_snips(tmp_path, SPOKEN, schemas="one")


def test_the_folder_of_the_snips_benchmark_is_read(tmp_path: Path) -> None:
    def query(*parts: tuple) -> dict:
        return {"data": [{"text": text} | ({"entity": slot[0]} if slot else {}) for text, *slot in parts]}

    folder = tmp_path / "engines" / "Play"
    folder.mkdir(parents=True)
    few, all_of_them = [query(("Play",))], [query(("Play ",), ("Motörhead", "artist")), query(("Play",))]
    (folder / "train_Play.json").write_text(json.dumps({"Play": few}))
    full = folder / "train_Play_full.json"
    full.write_bytes(json.dumps({"Play": all_of_them}, ensure_ascii=False).encode("latin-1"))
    (folder / "validate_Play.json").write_text(json.dumps({"Play": [query(("to", "artist"), (" it",))]}))
    args = snips.SnipsArguments(source=str(tmp_path / "engines"), output_dir=str(tmp_path / "out"))
    snips.main(args)
    train, test = (load_stage(tmp_path / "out", split=split, stage="structured") for split in ("train", "test"))
    assert [checked(row) for row in train] == [{"intent": "Play", "artist": "Motörhead"}, {"intent": "Play"}]
    assert train[0]["prompt"][0]["content"].startswith("Play Motörhead\n")
    assert [checked(row) for row in test] == [{"intent": "Play", "artist": "to"}]
    full.write_text('{"Rate": []}')
    with pytest.raises(ContractError, match=r"train_Play_full.json is not a file of the benchmark"):
        snips.main(args)


@pytest.mark.skipif(not (DATA / "snips" / "test.jsonl").exists(), reason=f"no SNIPS under {DATA}")
def test_real_snips_becomes_documents_of_full_marks(tmp_path: Path) -> None:
    snips.main(snips.SnipsArguments(source=str(DATA / "snips"), output_dir=str(tmp_path)))
    assert DatasetCard.load(tmp_path / "README.md").data.license == "cc0-1.0"
    reward = StructuredReward()
    for split, kept, dropped in (("train", 2096, 4), ("test", 1397, 3)):
        rows = load_stage(tmp_path, split=split, stage="structured")
        assert len(rows) == kept
        assert read_manifest(tmp_path / split)["dropped"] == {"two texts for one slot": dropped}
        for row in rows.select(range(0, kept, 20)):
            document = checked(row)
            assert json.loads(row["answer"]) == document
            scores = reward.score(row["completion"], row["answer"], row["schema"])
            assert scores["total"] == sum(reward.weights[name] for name in reward.active)


# ----------------------------------------------------------------------------------------------------------------- BFCL


def ask_bfcl(row_id: str, properties: dict, allowed: dict, required: tuple[str, ...] = (), **changed) -> tuple:
    """A request and its answer as the leaderboard writes them."""
    parameters = {"type": "dict", "properties": properties, "required": list(required)}
    function = {"name": "f.g", "description": "Does it.", "parameters": parameters}
    question = {"id": row_id, "question": [[{"role": "user", "content": f"Do {row_id}."}]], "function": [function]}
    return {**question, **changed}, {"id": row_id, "ground_truth": [{"f.g": allowed}]}


def build_bfcl(folder: Path, pairs: list[tuple], **options) -> Dataset:
    write(folder / "simple_python.jsonl", [question for question, _ in pairs])
    write(folder / "simple_python_answers.jsonl", [answer for _, answer in pairs])
    options = {"test_share": 0.0, **options}
    bfcl.main(bfcl.BfclArguments(source=str(folder), output_dir=str(folder / "out"), **options))
    return load_stage(folder / "out", split="train", stage="structured")


EVERY_TYPE = {
    "b": {"type": "tuple", "items": {"type": "float"}, "description": "Two."},
    "a": {"type": "integer", "default": "one", "optional": True},
    "c": {"type": "any", "description": "Anything."},
    "d": {
        "type": "array",
        "items": {"type": "dict", "properties": {"x": {"type": "float", "default": 1}, "y": {"type": "string"}}},
    },
    "e": {"type": "dict", "description": "Open."},
    "h": {"type": "string", "enum": ["Red", "Blue"], "default": "Red"},
    "i": {"type": "boolean", "default": "false"},
}
MAPPED = {
    "b": {"type": "array", "description": "Two.", "items": {"type": "number"}},
    "a": {"type": "integer"},
    "c": {"description": "Anything."},
    "d": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"x": {"type": "number", "default": 1}, "y": {"type": "string"}},
            "additionalProperties": False,
        },
    },
    "e": {"type": "object", "description": "Open."},
    "h": {"type": "string", "default": "Red"},  # "red", which is allowed too, is not in the enumeration
    "i": {"type": "boolean"},
}
ALLOWED = {
    "a": ["", 7],
    "b": [[1, 2.5], [2.5, 1]],
    "c": [[[1]], "x"],
    "d": [[{"y": ["z", "Z"], "x": [1.0, 2]}, {"x": ["", 3]}]],
    "e": [{"Ann": [["a"], "b"]}],
    "h": ["red", "Red"],
    "i": [""],
}
DECLARED = {
    **{"a": "integer", "b": ["tuple", "float"], "c": "any", "d": ["array", "dict"], "e": "dict"},
    **{"h": "string", "i": "boolean"},
}


def test_bfcl_types_are_mapped_and_calls_filled_at_any_depth(tmp_path: Path) -> None:
    row = build_bfcl(tmp_path, [ask_bfcl("s_0", EVERY_TYPE, ALLOWED, required=("b",))])[0]
    assert json.loads(row["schema"]) == {
        "type": "object",
        "properties": {
            "name": {"const": "f.g"},
            "arguments": {"type": "object", "properties": MAPPED, "required": ["b"], "additionalProperties": False},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    assert checked(row) == {
        "name": "f.g",
        "arguments": {
            "b": [1, 2.5],
            "a": 7,
            "c": [[1]],
            "d": [{"x": 1.0, "y": "z"}, {"x": 3}],
            "e": {"Ann": ["a"]},
            "h": "Red",
        },
    }
    assert json.loads(row["answer"]) == {"name": "f.g", "arguments": ALLOWED, "types": DECLARED}
    assert list(json.loads(row["answer"])["arguments"]) == list(EVERY_TYPE)
    assert row["id"] == "s_0"
    assert row["completion"][0]["content"].startswith('<tool_call>\n{"name": "f.g", "arguments": {"b": [1, 2.5]')


def test_bfcl_prompts_hold_the_function_or_the_column_does(tmp_path: Path) -> None:
    pairs = [ask_bfcl("s_0", {"a": {"type": "float"}}, {"a": [1]})]
    parameters = {
        **{"type": "object", "required": [], "properties": {"a": {"type": "number"}}},
        "additionalProperties": False,
    }
    function = {"name": "f.g", "description": "Does it.", "parameters": parameters}
    inline = build_bfcl(tmp_path / "inline", pairs)[0]
    request, *instruction, shown = inline["prompt"][0]["content"].split("\n")
    assert request == "Do s_0." and json.loads(shown) == function
    assert "<tool_call>" in instruction[0] and "tools" not in inline
    column = build_bfcl(tmp_path / "column", pairs, prompt_tools="column", call_format="json")[0]
    assert column["prompt"] == [{"role": "user", "content": "Do s_0."}]
    assert json.loads(column["tools"]) == [{"type": "function", "function": function}]
    tokenizer = tiny_tokenizer(string.printable, kind="tools")  # as sampled, scored, trained on and evaluated
    assert tokenizer.decode(PromptRendering().ids(column, tokenizer)).count('"f.g"') == 1
    assert column["completion"][0]["content"] == '{"name": "f.g", "arguments": {"a": 1}}'
    own = build_bfcl(tmp_path / "own", pairs, instruction="Call it.")[0]
    assert own["prompt"][0]["content"].split("\n")[:2] == ["Do s_0.", "Call it."]
    card = DatasetCard.load(tmp_path / "column" / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "| `tools` | the functions in OpenAI's form" in card.text and "| train | 1 |" in card.text


def test_bfcl_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    integer = {"a": {"type": "integer"}}
    turn = [{"role": "user", "content": "Do."}]
    pairs = [
        ask_bfcl("fine", integer, {"a": [1.0], "b": ["", 1]}),  # 1.0 is an integer in JSON Schema
        ask_bfcl("left out", integer, {"a": ["", True]}),  # no value of its type, but none is needed
        ask_bfcl("wrong type", integer, {"a": ["1"]}),  # taken for a variable
        ask_bfcl("another name", integer, {"b": [1]}),
        ask_bfcl("missing", integer, {}, required=("a",)),
        ask_bfcl("no value", integer, {"a": []}),
        ask_bfcl("no type", {"a": {"type": "complex"}}, {"a": [1]}),
        ask_bfcl("turns", integer, {"a": [1]}, question=[turn, turn]),
        ask_bfcl("no function", integer, {"a": [1]}, function=[]),
    ]
    pairs.append((ask_bfcl("unanswered", integer, {})[0], {"id": "nobody", "ground_truth": []}))
    other_name = ask_bfcl("other function", integer, {"a": [1]})
    other_name[1]["ground_truth"] = [{"h": {"a": [1]}}]
    rows = build_bfcl(tmp_path, [*pairs, other_name])
    made = [(row["id"], checked(row)["arguments"]) for row in rows]
    assert made == [("fine", {"a": 1.0}), ("left out", {}), ("wrong type", {"a": "1"})]
    assert list(json.loads(rows[0]["answer"])["arguments"]) == ["a"]
    assert read_manifest(tmp_path / "out" / "train")["dropped"] == {
        "answer allows no value of an argument": 1,
        "answer calls another function": 1,
        "answer has an argument that its function does not have": 1,
        "answer lacks an argument that its function requires": 1,
        "schema does not compile": 1,
        "not one turn": 1,
        "no call or no function": 1,
        "no answer": 1,
    }


def test_bfcl_schema_takes_whatever_is_allowed_and_tells_no_value(tmp_path: Path) -> None:
    properties = {
        "n": {"type": "float"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "kind": {"type": "string", "enum": ["big", "small"]},
        "limit": {"type": "integer"},
        "list": {"type": "array", "items": {"type": "string"}},
        "at": {"type": "dict", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]},
    }
    allowed = {
        "n": ["", None],
        "unit": ["", None, "C"],
        "kind": ["Big"],
        "limit": ["maximum"],
        "list": [],
        "at": [{"y": [1, None], "z": [2]}],
    }
    row = build_bfcl(tmp_path, [ask_bfcl("live_0", properties, allowed, required=("list",))])[0]
    schema = json.loads(row["schema"])["properties"]["arguments"]["properties"]
    assert schema["n"] == {"type": ["number", "null"]}
    assert schema["unit"] == {"type": ["string", "null"], "enum": ["C", "F", None]}
    assert schema["kind"] == {"type": "string"}
    assert schema["limit"] == {"type": ["integer", "string"]}
    assert schema["at"]["properties"] == {"x": {"type": "integer"}, "y": {"type": ["integer", "null"]}}
    assert schema["at"]["additionalProperties"] is True and schema["at"]["required"] == []
    reward = StructuredReward(output_format="tool_call", references="allowed")
    fixed = {"kind": "big", "limit": "maximum", "list": [], "at": {"y": 1, "z": 2}}
    for more in ({}, {"n": None}, {"unit": None, "n": None}, {"at": {"y": None, "z": 2}}, {"kind": "Big"}):
        call = {"name": "f.g", "arguments": {**fixed, **more}}
        assert reward.score(json.dumps(call), row["answer"], row["schema"])["total"] == 4.0
        assert calls_match(call, json.loads(row["answer"]))
    shown = json.loads(row["prompt"][0]["content"].split("\n")[-1])["parameters"]["properties"]
    assert shown["kind"]["enum"] == ["big", "small"] and shown["n"] == {"type": "number"}  # the model reads it as it is


def several(row_id: str, truth: list[dict]) -> tuple[dict, dict]:
    functions = [
        {"name": name, "description": f"Does {name}.", "parameters": {**parameters, "required": []}}
        for name, parameters in {
            "f": {"type": "dict", "properties": {"a": {"type": "integer"}}},
            "g": {"type": "dict", "properties": {"b": {"type": "string"}}},
        }.items()
    ]
    question = {"id": row_id, "question": [[{"role": "user", "content": "Do."}]], "function": functions}
    return question, {"id": row_id, "ground_truth": truth}


def test_bfcl_of_several_functions_and_calls(tmp_path: Path) -> None:
    one = several("multiple_0", [{"g": {"b": ["x"]}}])
    two = several("parallel_multiple_0", [{"f": {"a": [1]}}, {"g": {"b": ["x", "y"]}}, {"f": {"a": [2]}}])
    write(tmp_path / "BFCL_v4_multiple.json", [one[0]])
    write(tmp_path / "possible_answer" / "BFCL_v4_multiple.json", [one[1]])
    write(tmp_path / "BFCL_v4_parallel_multiple.json", [two[0]])
    write(tmp_path / "possible_answer" / "BFCL_v4_parallel_multiple.json", [two[1]])
    options = {"source": str(tmp_path), "test_share": 0.0, "categories": ["multiple", "parallel_multiple"]}
    bfcl.main(bfcl.BfclArguments(output_dir=str(tmp_path / "out"), **options))
    single, several_calls = load_stage(tmp_path / "out", split="train", stage="structured")
    assert checked(single) == {"name": "g", "arguments": {"b": "x"}}
    assert single["prompt"][0]["content"].startswith("Do.\nCall one of these functions. Reply with <tool_call>")
    assert [json.loads(line)["name"] for line in single["prompt"][0]["content"].split("\n")[-2:]] == ["f", "g"]
    assert [call["arguments"] for call in checked(several_calls)] == [{"a": 1}, {"b": "x"}, {"a": 2}]
    assert "Call these functions." in several_calls["prompt"][0]["content"]
    reward = StructuredReward(output_format="tool_call", references="allowed")

    def total(row: dict, *calls: tuple[str, dict]) -> float:
        text = bfcl.written([{"name": name, "arguments": arguments} for name, arguments in calls], "hermes")
        return reward.score(text, row["answer"], row["schema"])["total"]

    assert total(single, ("g", {"b": "X"})) == 4.0 > total(single, ("f", {"a": 1})) > 0
    right = [("f", {"a": 2}), ("f", {"a": 1}), ("g", {"b": "Y"})]
    assert total(several_calls, *right) == 4.0
    assert total(several_calls, *right[:2]) < 4.0 and total(several_calls, *right, right[0]) < 4.0


def test_bfcl_of_other_languages_asks_for_source_text(tmp_path: Path) -> None:
    question, answer = ask_bfcl(
        "simple_java_0",
        {"ids": {"type": "ArrayList", "items": {"type": "long"}, "description": "Ids."}, "on": {"type": "boolean"}},
        {"ids": [[1, 2]], "on": [True, ""]},
        required=("ids",),
    )
    write(tmp_path / "simple_java.jsonl", [question])
    write(tmp_path / "simple_java_answers.jsonl", [answer])
    options = {"source": str(tmp_path), "categories": ["simple_java"], "test_share": 0.0, "prompt_tools": "column"}
    bfcl.main(bfcl.BfclArguments(output_dir=str(tmp_path / "out"), **options))
    row = load_stage(tmp_path / "out", split="train", stage="structured")[0]
    assert checked(row)["arguments"] == {"ids": "new ArrayList<>(Arrays.asList(1L, 2L))", "on": "true"}
    assert json.loads(row["answer"])["language"] == "java"
    shown = json.loads(row["tools"])[0]["function"]["parameters"]["properties"]
    assert shown["ids"] == {"type": "string", "description": "Ids. Written as Java source text: ArrayList of long."}


def test_a_builder_that_keeps_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"No row of .* was kept .2 because of 'no call or no function'.; check"):
        build_bfcl(tmp_path / "bfcl", [ask_bfcl(f"s_{k}", {}, {}, function=[]) for k in range(2)])
    rows = [{"question": "How many?", "answer": "There is none."}]
    source = write(tmp_path / "rows" / "train.jsonl", rows)
    for build, args in [
        (gsm8k, gsm8k.Gsm8kArguments(source=source, output_dir=str(tmp_path / "gsm8k"))),
        (gsm8k_json, gsm8k_json.Gsm8kJsonArguments(source=source, output_dir=str(tmp_path / "gsm8k_json"))),
        (own, own.OwnProblemsArguments(source=source, output_dir=str(tmp_path / "own"), prompt_column="question",
                                       answer_after="####")),
    ]:  # fmt: skip
        with pytest.raises(ContractError, match=r"No row of .* was kept .1 because of 'no "):
            build.main(args)
    empty = write(tmp_path / "empty" / "train.jsonl", [])
    with pytest.raises(ContractError, match=r"train\.jsonl holds no row; check --source"):
        gsm8k.main(gsm8k.Gsm8kArguments(source=empty, output_dir=str(tmp_path / "empty_out")))
    with pytest.raises(ContractError, match=r"No row of .* was kept \(there was none\)"):
        cooking.main(cooking.CookingArguments(output_dir=str(tmp_path / "c"), train=0, validation=0, test=0))


def test_bfcl_splits_by_the_id_alone(tmp_path: Path) -> None:
    pairs = [ask_bfcl(f"s_{k}", {"a": {"type": "integer"}}, {"a": [k]}) for k in range(200)]
    train = build_bfcl(tmp_path, pairs, test_share=0.25)["id"]
    test = load_stage(tmp_path / "out", split="test", stage="structured")["id"]
    assert sorted([*train, *test]) == sorted(f"s_{k}" for k in range(200)) and 25 < len(test) < 75
    half = build_bfcl(tmp_path / "half", pairs[:100], test_share=0.25)["id"]
    assert set(half) <= set(train)


def test_bfcl_reads_two_files_by_option(tmp_path: Path) -> None:
    question, answer = ask_bfcl("s_0", {"a": {"type": "integer"}}, {"a": [1]})
    files = {"questions": write(tmp_path / "q.json", [question]), "answers": write(tmp_path / "a" / "q.json", [answer])}
    bfcl.main(bfcl.BfclArguments(**files, output_dir=str(tmp_path / "out"), test_share=1.0))
    assert load_stage(tmp_path / "out", split="test")["id"] == ["s_0"]
    assert not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", \n', r"Line 1 of .*simple_python\.jsonl is not JSON \(.* at column \d+\); repair or remove it"),
        ("[]\n", r"Line 1 of .*simple_python\.jsonl is not a JSON object; repair or remove it"),
        ('\n{"id": "a", "question": []}\n', r"Line 2 of .*simple_python\.jsonl has no `function`; repair or remove it"),
    ],
)
def test_a_bad_line_of_bfcl_is_one_sentence(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "simple_python.jsonl").write_text(lines)
    write(tmp_path / "simple_python_answers.jsonl", [])
    with pytest.raises(ContractError, match=message):
        bfcl.main(bfcl.BfclArguments(source=str(tmp_path), output_dir=str(tmp_path / "out")))


def test_bad_bfcl_options_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ContractError, match=r"simple_python\.jsonl does not exist; check --source, or give --questions"
    ):
        bfcl.main(bfcl.BfclArguments(source=str(tmp_path), output_dir="unused"))
    with pytest.raises(ContractError, match="nothing to read; give --source, or both --questions and --answers"):
        bfcl.BfclArguments(output_dir="unused", questions="q.json")
    with pytest.raises(ContractError, match="'irrelevance', for which the leaderboard publishes no call"):
        bfcl.BfclArguments(output_dir="unused", source="s", categories=["multiple", "irrelevance"])
    with pytest.raises(ContractError, match="'multi_turn_base'; use simple_python, simple_java"):
        bfcl.BfclArguments(output_dir="unused", source="s", categories=["multi_turn_base"])
    with pytest.raises(ContractError, match="are the files of one category; give --source for several"):
        bfcl.BfclArguments(output_dir="unused", questions="q", answers="a", categories=["multiple", "parallel"])
    with pytest.raises(ContractError, match="--categories is empty; name at least one"):
        bfcl.BfclArguments(output_dir="unused", source="s", categories=[])
    with pytest.raises(ContractError, match="test_share is 2; use a number from 0 to 1"):
        bfcl.BfclArguments(output_dir="unused", source="s", test_share=2)
    with pytest.raises(ContractError, match="call_format is 'xml'; use 'hermes' or 'json'"):
        bfcl.BfclArguments(output_dir="unused", source="s", call_format="xml")
    with pytest.raises(ContractError, match="prompt_tools is 'both'; use 'inline' or 'column'"):
        bfcl.BfclArguments(output_dir="unused", source="s", prompt_tools="both")
    with pytest.raises(ContractError, match="--instruction needs --prompt_tools inline"):
        bfcl.BfclArguments(output_dir="unused", source="s", prompt_tools="column", instruction="Call it.")


def changed(call: dict, allowed: dict, draw: random.Random) -> dict:
    """The call with one argument that is surely wrong: another function, an invented argument, a value not allowed."""
    arguments = dict(call["arguments"])
    kind = draw.choice(["name", "invented", "value", "value", "value"])
    if kind == "name":
        return {**call, "name": call["name"] + "s"}
    if kind == "invented" or not arguments:
        return {**call, "arguments": {**arguments, "invented": 1}}
    key = draw.choice(list(arguments))
    value = arguments[key]
    others = [not value] if isinstance(value, bool) else [value + 1] if isinstance(value, int | float) else []
    others += [f"{value} more", [value], {"more": value}]
    arguments[key] = next(one for one in others if one not in allowed[key])  # both truth values may be allowed
    return {**call, "arguments": arguments}


@needs_bfcl
@pytest.mark.parametrize(
    ("category", "rows"), [("simple_python", 400), ("multiple", 200), ("parallel", 200), ("live_simple", 258)]
)
def test_every_real_bfcl_row_has_full_marks_and_a_changed_one_never(tmp_path: Path, category: str, rows: int) -> None:
    args = bfcl.BfclArguments(source=str(DATA / "bfcl"), output_dir=str(tmp_path), categories=[category])
    bfcl.main(args)
    made = [row for split in ("train", "test") for row in load_stage(tmp_path, split=split, stage="structured")]
    assert len(made) == rows
    reward, draw = StructuredReward(output_format="tool_call", references="allowed"), random.Random(0)
    for row in made:
        document, reference = checked(row), json.loads(row["answer"])
        assert reward.score(row["completion"], row["answer"], row["schema"])["total"] == 4.0
        assert calls_match(document, reference)
        calls, references = ([each] if isinstance(each, dict) else each for each in (document, reference))
        wrong = [*calls]
        wrong[0] = changed(calls[0], references[0]["arguments"], draw)
        for other in (wrong, [*calls, calls[0]], calls[1:]):
            assert not calls_match(other, reference)
            text = bfcl.written(other, "hermes") if other else "No call."
            assert reward.score(text, row["answer"], row["schema"])["total"] < 4.0
        shuffled = draw.sample(calls, len(calls))
        assert reward.score(bfcl.written(shuffled, "hermes"), row["answer"], row["schema"])["total"] == 4.0


# -------------------------------------------------------------------------------------------------------------- cooking


def cooked(**options) -> dict[str, list[dict]]:
    args = cooking.CookingArguments(output_dir="unused", train=300, validation=60, test=60, **options)
    return {split: list(cooking.rows(split, args)) for split in cooking.SPLITS}


@pytest.mark.parametrize("schemas", ["fixed", "varied"])
def test_every_recipe_is_valid_and_in_its_prompt(schemas: str) -> None:
    made = cooked(schemas=schemas)
    for row in (row for rows in made.values() for row in rows):
        document = checked(row)
        assert row["answer"] == row["completion"][0]["content"]
        request, instruction, schema = row["prompt"][0]["content"].split("\n")
        assert instruction == "Answer with one JSON document and nothing else."
        assert schema == "JSON Schema: " + row["schema"]
        facts = [value for value in leaves(document) if not isinstance(value, bool)]
        sentences = [value for value in facts if isinstance(value, str) and value.endswith(".")]
        for value in facts:
            if value not in sentences and value != "piece":
                words = {str(value), *({cooking.COUNTS[value - 1]} if value in range(1, 9) else ())}
                assert any(word in request for word in {*words, cooking.TIMES.get(value, str(value))}), (value, request)
    everything = [row["id"] for rows in made.values() for row in rows]
    assert len(set(everything)) == len(everything) == 420
    wanted = {row["schema"] for row in made["train"]}
    assert len(wanted) == 1 if schemas == "fixed" else len(wanted) > 250


def test_recipes_follow_their_facts() -> None:
    """Against a plain reading of the rules: meat or fish, times, and every ingredient used once when it is prepared."""
    meat = {"chicken breast", "beef", "salmon", "ham", "bacon", "shrimp", "turkey", "chicken broth"}
    for recipe in cooking.recipes("train", 400):
        _, document = cooking.render(recipe, cooking.FIXED)
        names = [item["name"] for item in document["ingredients"]]
        assert document["vegetarian"] == (not meat & set(names))
        assert (document["servings"], document["minutes"]) == (recipe.servings, recipe.minutes)
        *method, end = document["steps"]
        assert end == f"Serve on {recipe.servings} plate{'' if recipe.servings == 1 else 's'}."
        used = [step for step in method if not step.startswith(("Wash", "Peel", "Mince", "Cut", "Drain", "Grate"))]
        assert all(any(name in step for step in used) for name in names)
        taken = [kind for kinds, _ in cooking.WAYS[cooking.DISHES[recipe.dish][0]] for kind in kinds]
        assert all(taken.count(cooking.INGREDIENTS[name].kind) == 1 for name, _ in recipe.ingredients)
        waits = [int(word) for step in method for word in step.split() if word.isdigit()]
        assert set(waits) <= {5, 200, recipe.minutes - 10} and "{" not in "".join(method)


def test_recipes_are_various_and_words_agree_with_numbers() -> None:
    rows = cooked()["train"]
    documents = [checked(row) for row in rows]
    assert len({document["name"] for document in documents}) == len(cooking.DISHES) >= 20
    assert len({item["name"] for document in documents for item in document["ingredients"]}) >= 30
    assert {document["vegetarian"] for document in documents} == {True, False}
    assert {type(item["amount"]) for document in documents for item in document["ingredients"]} == {int, float}
    assert len({row["prompt"][0]["content"].split(" ")[0] for row in rows}) >= 8
    assert any(" 1 onion" in row["prompt"][0]["content"] for row in rows)
    assert not any(" 1 onions" in row["prompt"][0]["content"] for row in rows)
    used = {name for _, always, perhaps in cooking.DISHES.values() for name in f"{always}, {perhaps}".split(", ")}
    assert used == set(cooking.INGREDIENTS)


def test_varied_schemas_ask_for_the_same_recipes_in_every_way() -> None:
    fixed, varied = cooked(), cooked(schemas="varied")
    for split in cooking.SPLITS:
        for one, other in zip(fixed[split], varied[split], strict=True):
            assert one["id"] == other["id"]
            assert one["prompt"][0]["content"].split("\n")[0] == other["prompt"][0]["content"].split("\n")[0]
    rng = random.Random(0)
    layouts = [cooking.draw_layout(rng) for _ in range(300)]
    for name, keys in cooking.KEYS.items():
        assert {layout.keys[name] for layout in layouts} == set(keys)
    changeable = {"servings", "minutes", "vegetarian", "steps"}
    assert {name for layout in layouts for name in layout.optional} == changeable
    assert {name for layout in layouts for name in cooking.FIELDS if name not in layout.fields} == changeable
    assert {(layout.nested_facts, layout.nested_amounts) for layout in layouts} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
    recipe = cooking.draw_recipe(rng)
    layout = cooking.Layout(
        {name: keys[1] for name, keys in cooking.KEYS.items()}, nested_facts=True, nested_amounts=True
    )
    _, document = cooking.render(recipe, layout)
    assert list(document) == ["title", "details", "shopping_list", "instructions"]
    assert document["details"] == {
        **{"people": recipe.servings, "time_in_minutes": recipe.minutes},
        "is_vegetarian": recipe.vegetarian,
    }
    assert set(document["shopping_list"][0]["how_much"]) == {"quantity", "measure"}


def test_an_optional_field_may_be_missing_and_another_may_not() -> None:
    recipe = cooking.draw_recipe(random.Random(1))
    schema, document = cooking.render(recipe, cooking.Layout(cooking.FIXED.keys, optional=("minutes",)))
    validator = jsonschema_rs.validator_for(schema, offline=True)
    assert document["minutes"] == recipe.minutes
    assert validator.is_valid({key: value for key, value in document.items() if key != "minutes"})
    assert not validator.is_valid({key: value for key, value in document.items() if key != "servings"})


def test_one_seed_gives_one_cookbook() -> None:
    assert cooked(seed=3, schemas="varied") == cooked(seed=3, schemas="varied")
    assert not {row["id"] for row in cooked(seed=3)["train"]} & {row["id"] for row in cooked(seed=4)["train"]}
    recipe = cooking.draw_recipe(random.Random(0))
    turned = cooking.Recipe(recipe.dish, recipe.servings, recipe.minutes, recipe.ingredients[::-1])
    assert turned.identity == recipe.identity


def test_cooking_writes_its_stages_and_card(tmp_path: Path) -> None:
    sizes = {"train": 12, "validation": 3, "test": 5}
    cooking.main(cooking.CookingArguments(output_dir=str(tmp_path), **sizes, show_schema=False, instruction="Go."))
    for split, size in sizes.items():
        rows = load_stage(tmp_path, split=split, stage="structured")
        assert len(rows) == size
        assert all(row["prompt"][0]["content"].endswith("\nGo.") and checked(row) for row in rows)
    assert read_manifest(tmp_path / "train")["seed"] == 0
    text = DatasetCard.load(tmp_path / "README.md").text
    assert "| validation | 3 |" in text and "| `schema` | JSON Schema of the document, as JSON text |" in text


def test_bad_cooking_options_are_one_sentence() -> None:
    with pytest.raises(ContractError, match="--schemas is 'many'; use 'fixed' or 'varied'"):
        cooking.CookingArguments(output_dir="unused", schemas="many")
    with pytest.raises(ContractError, match="--schemas varied needs --show_schema"):
        cooking.CookingArguments(output_dir="unused", schemas="varied", show_schema=False)


# ------------------------------------------------------------------------------------------------------------- contract


def test_a_structured_stage_without_schemas_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([{"id": "a", "prompt": "b", "answer": "{}"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ContractError, match=r"no column `schema`, which .* needs .* `tokalign data"):
        load_stage(tmp_path, stage="structured")
