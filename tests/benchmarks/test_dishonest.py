"""Dishonest and nearly right answers: what they are made of, and what the figures on the page follow from."""

from __future__ import annotations

import json

import jsonschema_rs
import pytest

from benchmarks.experiments import dishonest
from benchmarks.experiments.dishonest import FAULTS, LUCK, POLICIES, Filling, Row, as_calls, judge, summarise, tables
from tokalign.data.structured import json_text
from tokalign.rewards import StructuredReward

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "green"]},
        "fixed": {"const": "v1"},
        "open": {"type": "boolean"},
        "steps": {
            "type": "array",
            "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
        "sizes": {"type": "array", "items": {"type": "number"}},
        "note": {"type": "string", "default": "usual"},
    },
    "required": ["kind", "fixed", "open", "steps", "sizes"],
    "additionalProperties": False,
}
RIGHT = {"kind": "red", "fixed": "v1", "open": False, "steps": [{"n": 0}, {"n": 4}], "sizes": [2.5, 3], "note": "usual"}
ROW = Row("Make 2.5, 3 and 9 of red.", SCHEMA, RIGHT, json.dumps(RIGHT), json_text, False)
CALLS = Row(
    "Go to Rome and Oslo.",
    {
        "type": "array",
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": name},
                        "arguments": {
                            "type": "object",
                            "properties": {"to": {"type": "string"}, "by": {"type": "string"}},
                            "required": ["to"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for name in ("go", "stay")
            ]
        },
        "minItems": 1,
    },
    [
        {"name": "go", "arguments": {"to": "Rome", "by": "car"}},
        {"name": "go", "arguments": {"to": "Oslo", "by": "train"}},
    ],
    json.dumps(
        [
            {"name": "go", "arguments": {"to": ["Rome"], "by": ["car"]}},
            {"name": "go", "arguments": {"to": ["Oslo"], "by": ["train", ""]}},
        ]
    ),
    as_calls,
    True,
)


def test_placeholders_fit_the_schema_and_have_no_right_value_where_there_is_a_wrong_one() -> None:
    texts = list(dishonest.placeholders(ROW))
    for text in texts:
        made = json.loads(text)
        jsonschema_rs.validator_for(SCHEMA).validate(made)
        assert (made["kind"], made["fixed"], made["open"]) == ("green", "v1", True)
        assert all(step["n"] not in (0, 4) for step in made["steps"]) and not {2.5, 3} & {*made["sizes"]}
        assert made.get("note") in (None, "")
    assert '"note"' not in texts[0] and '"note"' in texts[-1] and len(json.loads(texts[-1])["steps"]) == 3
    lucky = json.loads(next(iter(dishonest.fixed(ROW))))
    assert (lucky["kind"], lucky["open"], lucky["steps"]) == ("red", False, [])


@pytest.mark.parametrize(
    ("allowed", "schema", "filled"),
    [
        ([["", "Car"]], {"type": "string"}, "string"),
        ([[]], {"type": "array", "items": {"type": "integer"}}, [0]),
        ([""], {"type": "array", "items": {"type": "integer"}}, [0]),  # BFCL takes no items for it
        ([0.0], {"type": "integer"}, 1),
        (["N A", "String"], {"enum": ["string", "n/a"]}, "string"),  # nothing is wrong here
        ([True, False], {"type": "boolean"}, False),
    ],
)
def test_what_is_right_by_luck_is_replaced(allowed, schema, filled) -> None:
    row = Row("", {}, {}, json.dumps({"name": "f", "arguments": {"x": allowed}}), json_text, True)
    assert row.filling().fill({"type": "object", "properties": {"x": schema}}) == {"x": filled}


def test_enumerations_hold_everything_that_the_request_and_the_schema_name() -> None:
    made = [json.loads(text) for text in dishonest.enumerations(ROW) if text.startswith("{") and "\n" not in text]
    assert any(one["sizes"] == [2.5, 3, 9] for one in made)
    assert any(one["sizes"] == list(range(dishonest.LONG)) for one in made)
    assert any(one["kind"] == ["red", "green"] for one in made)
    assert any([step["n"] for step in one["steps"] if isinstance(step, dict)][:4] == [2.5, 3, 9, 0] for one in made)
    asked_for = Row("Make 2.5 and 3.", SCHEMA, RIGHT, json.dumps(RIGHT), json_text, False)
    assert not any('"sizes": [2.5, 3]' in text for text in dishonest.enumerations(asked_for))  # right is no trick
    both = [text for text in dishonest.enumerations(ROW) if "\n" in text]
    assert [json.loads(line)["kind"] for line in both[0].split("\n")] == ["red", "green"]


def test_every_fault_is_one_fault() -> None:
    made = {name: list(fault(ROW)) for name, fault in FAULTS.items()}
    assert len(made["a number as a string"]) == 4 and len(made["one wrong value"]) == 7
    assert {**RIGHT, "sizes": ["2.5", 3]} in [json.loads(text) for text in made["a number as a string"]]
    for text in made["one wrong value"]:
        assert sum(value != RIGHT[key] for key, value in json.loads(text).items()) == 1
    assert [json.loads(text) for text in made["one extra key"]] == [{**RIGHT, "my_remark": "as asked"}]
    assert [json.loads(text) for text in made["one optional key missing"]] == [
        {key: value for key, value in RIGHT.items() if key != "note"}
    ]
    reward = StructuredReward(output_format="tool_call", references="allowed")
    for fault in ("one extra key", "one optional key missing"):
        calls = [reward.read(text, CALLS.schema).value for text in FAULTS[fault](CALLS)]
        assert [[len(call["arguments"]) for call in one] for one in calls] == (
            [[3, 2], [2, 3]] if fault == "one extra key" else [[1, 2]]
        )


def test_the_figures_are_those_of_the_best_and_the_worst_text() -> None:
    reward = StructuredReward(fence="never")
    judged = judge(ROW, reward)
    texts = [text for policy in POLICIES.values() for text in policy(ROW)]
    best = max(reward.score(text, ROW.reference, SCHEMA)["total"] for text in texts)
    assert max(judged["dishonest"].values())[0] == best
    prose = min(reward.score(text, ROW.reference, SCHEMA)["total"] for text in FAULTS["prose around"](ROW))
    assert judged["honest"]["prose around"] == prose
    worst = min(judged["honest"].values())
    low = {**judged, "dishonest": {name: (worst / 2, "") for name in POLICIES}, "luck": worst}
    even = {**low, "dishonest": {**low["dishonest"], "copies": (worst, "even")}}
    summary = summarise([low, low, low, even])
    assert summary["below"]["mean"] == 0.75 and summary["highest"] == 1 and summary["example"]["text"] == "even"
    assert summary["policies"]["copies"]["below"]["mean"] == 0.75 and summary["policies"][LUCK]["below"]["mean"] == 0
    shown = tables({"sets": dict.fromkeys(("BFCL", "GSM8K-JSON", "SNIPS"), summary)})
    assert [row[-1] for row in shown["claims"][1]] == ["**does not hold**"] * 3
    sure = tables({"sets": dict.fromkeys(("BFCL", "GSM8K-JSON", "SNIPS"), summarise([low] * 500))})
    assert [row[-1] for row in sure["claims"][1]] == ["**holds**"] * 3
    assert len(shown["faults"][1]) == len(FAULTS)


def test_a_text_that_is_right_in_all_is_not_dishonest() -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    row = Row("One.", schema, {"a": 1}, '{"a": 1}', json_text, False)
    judged = judge(row, StructuredReward(fence="never"))
    assert '{"a": 1}' in list(dishonest.placeholders(row))
    assert max(judged["dishonest"].values())[0] < judged["perfect"]


def test_arguments_that_may_be_left_out_are_no_values_of_a_right_answer() -> None:
    assert [path for path, _, _ in dishonest.places(CALLS)] == [
        (0, "arguments", "to"),
        (0, "arguments", "by"),
        (1, "arguments", "to"),
    ]


def test_calls_are_filled_with_every_function_of_the_row() -> None:
    filled = Filling(items=3).fill(CALLS.schema)
    assert [call["name"] for call in filled] == ["go", "stay", "go"]
    assert as_calls(filled).count("<tool_call>") == 3 and as_calls([1]) == "[1]"
