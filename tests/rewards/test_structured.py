"""The structured reward's ordering, by search: no fault pays, no hack reaches an answer, a value put right pays."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel
from trl import GRPOConfig, GRPOTrainer

from tests.rewards import ordering
from tests.rewards.ordering import COMPONENTS, fault, hacks, is_attempt, schemas, searching, text_of, valid
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured import reward as module
from tokalign.rewards.structured.alignment import align
from tokalign.rewards.structured.documents.document import Limits
from tokalign.rewards.structured.reward import AROUND, BROKEN, WEIGHTS
from tokalign.rewards.structured.schemas import SchemaError
from tokalign.stage.errors import ContractError

FULL, FORM = 4.0, 1.0  # without bounds; and without a reference
weightings = st.fixed_dictionaries({}, optional={name: st.floats(0.01, 5) for name in COMPONENTS[1:]})


@st.composite
def rewards(draw, schema):
    """A reward with structure on, the others on or off with any weight, with any fence mode and perhaps bounds."""
    bounds = draw(st.sampled_from([{}, {"min_length": 10}, {"max_length": 200}, {"min_length": 5, "max_length": 400}]))
    weights = draw(weightings) | {"structure": draw(st.floats(0.01, 5))}
    fence = draw(st.sampled_from(["optional", "never", "required"]))
    return StructuredReward(schema, weights=weights, fence=fence, **bounds)


def components(result):
    return {name: result[name] for name in COMPONENTS if result[name] is not None}


@searching(400)
@given(st.data())
def test_one_more_fault_costs_and_raises_no_component(data):
    schema = data.draw(schemas())
    reward = data.draw(rewards(schema))
    value = data.draw(valid(schema))
    reference = data.draw(st.one_of(st.none(), st.just(value), valid(schema)))
    reference = None if reference is None else json.dumps(reference)
    before, after, fence = "", "", data.draw(st.sampled_from(["", "json"]))
    now = reward.score(text_of(value, before, after, fence), reference)
    for _ in range(data.draw(st.integers(1, 5))):
        if now["structure"] == 0:
            break
        where = data.draw(st.sampled_from(["inside", "inside", "inside", "inside", "after", "before"]))
        if where == "inside":
            worse = data.draw(fault(schema, value))
            assume(worse is not value)
            value = worse
        elif where == "after":
            after += data.draw(st.sampled_from(ordering.TRAILING))
        else:
            before = data.draw(st.sampled_from(ordering.LEADING)) + before
        then = reward.score(text_of(value, before, after, fence), reference)
        assert then["reason"] is not None
        assert then["structure"] < now["structure"] and then["total"] < now["total"]
        assert all(then[name] <= now[name] for name in components(now)), (now, then)
        now = then


@searching(150)
@given(st.data())
def test_without_structure_a_fault_never_pays(data):
    schema = data.draw(schemas())
    value = data.draw(valid(schema))
    reference = json.dumps(data.draw(st.one_of(st.just(value), valid(schema))))
    worse = value
    for _ in range(data.draw(st.integers(1, 3))):
        worse = data.draw(fault(schema, worse))
    for left_out in COMPONENTS:
        weights = {name: weight for name, weight in WEIGHTS.items() if name != left_out}
        reward = StructuredReward(schema, weights=weights, max_length=300)
        good, bad = (reward.score(json.dumps(v), reference)["total"] for v in (value, worse))
        assert bad <= good
        assert bad < good or left_out == "structure" or worse == value or good == 0


@searching(200)
@given(st.data())
def test_every_hack_is_below_every_honest_attempt(data):
    schema = data.draw(schemas())
    reward = data.draw(rewards(schema))
    perfect = data.draw(valid(schema))
    assume(perfect not in ({}, []))
    reference = data.draw(st.one_of(st.none(), st.just(perfect)))
    honest = perfect
    for _ in range(data.draw(st.integers(0, 8))):
        worse = data.draw(fault(schema, honest))
        honest = worse if is_attempt(schema, worse) else honest
    assume(is_attempt(schema, honest))
    least = reward.score(text_of(honest), reference)
    assert least["structure"] >= 0.1 and least["validity"] == 1
    for hack in hacks(schema, perfect):
        score = reward.score(hack, reference)
        assert score["reason"] is not None
        if score["correctness"]:  # the right document, broken off or with text around it
            assert (
                score["correctness"] <= AROUND and score["total"] < reward.score(text_of(perfect), reference)["total"]
            )
            score["total"] -= reward.weights.get("correctness", 0.0) * score["correctness"]
            score["correctness"] = 0.0
        assert score["total"] < least["total"], (hack, score, least)
        assert all(score[name] <= least[name] for name in components(least)), hack


@searching(60)
@given(st.data())
def test_a_value_put_right_pays(data):
    """Law 2, outside unions: there the tag alone would be put right, not what it tags."""
    schema = data.draw(schemas().filter(lambda schema: '"kind"' not in json.dumps(schema)))
    reference, value = data.draw(valid(schema)), data.draw(valid(schema))
    for _ in range(data.draw(st.integers(0, 2))):
        value = data.draw(fault(schema, value))
    reward = data.draw(rewards(schema))
    now = reward.score(json.dumps(value), json.dumps(reference))
    leaves = []
    align(value, reward.targets(reference, reward.schema)[0], leaves=leaves)
    wrong = [leaf for leaf in leaves if leaf.kind == "value" and leaf.credit < 1]
    wrong = [leaf for leaf in wrong if leaf.given and leaf.given.count("/") == leaf.pointer.count("/")]
    assume(wrong and now["validity"] == 1)
    leaf = data.draw(st.sampled_from(wrong))
    path = steps(value, leaf.given)
    right = ordering.spoiled(value, path, "type", ordering.at(reference, steps(reference, leaf.pointer)))
    then = reward.score(json.dumps(right), json.dumps(reference))
    assert then["correctness"] > now["correctness"] and then["structure"] >= now["structure"]
    assert then["total"] >= now["total"]
    assert then["total"] > now["total"] or not reward.weights.get("correctness")


@searching(40)
@given(st.data())
def test_what_says_nothing_right_is_below_what_says_half_with_one_fault_of_form(data):
    """Law 1, outside unions: a document of another alternative may lack every key that the reference has."""
    schema = data.draw(schemas().filter(lambda schema: '"kind"' not in json.dumps(schema)))
    reference, empty = data.draw(valid(schema)), data.draw(valid(schema))
    assume(isinstance(reference, dict) and reference)
    fence = data.draw(st.sampled_from(["optional", "never"]))
    reward = StructuredReward(schema, fence=fence, max_length=100_000)
    constants = reward.score(json.dumps(empty), reference)
    assume(constants["correctness"] == 0)
    near, paths = reference, sorted(scalars_of(reference), key=str)
    for path in data.draw(st.permutations(paths))[: len(paths) // 2]:
        now = ordering.at(reference, path)
        other = not now if isinstance(now, bool) else "zz" if isinstance(now, str) else 8 if now == 7 else 7
        near = ordering.spoiled(near, path, "type", other)
    assume(reward.score(json.dumps(near), reference)["correctness"] >= 0.5)
    assume(is_attempt(schema, near))
    least = 0.5
    where = data.draw(st.sampled_from(["key", "string", "before", "after", "fence", "optional"]))
    before = after = made = ""
    if where == "key":
        near, least = {**near, "zz_extra": 1}, 1 / 3
    elif where == "string":
        numbers = [path for path in scalars_of(near) if type(ordering.at(near, path)) in (int, float)]
        assume(numbers)
        path = data.draw(st.sampled_from(numbers))
        near, least = ordering.spoiled(near, path, "type", json.dumps(ordering.at(near, path))), 0.0
    elif where == "optional":
        optional = [key for key in near if key not in schema.get("required", ())]
        assume(optional)
        left = data.draw(st.sampled_from(optional))
        near = {key: item for key, item in near.items() if key != left}
    else:
        before, after = (
            ("", "\nEnjoy!") if where == "after" else ("Here it is: ", "") if where == "before" else ("", "")
        )
        made = "json" if where == "fence" else ""
    then = reward.score(text_of(near, before, after, made), reference)
    assume(then["correctness"] >= least * (AROUND if before or after else 1))
    assert constants["total"] < then["total"], (where, near)


def scalars_of(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from scalars_of(item, (*path, key))
    if not isinstance(value, dict | list):
        yield path


@searching(50)
@given(st.data())
def test_a_type_fault_costs_its_value_and_an_eighth(data):
    """Law 5, as long as the document stays an attempt: one without anything right is none."""
    schema = data.draw(schemas().filter(lambda schema: "anyOf" not in json.dumps(schema)))
    reference = data.draw(valid(schema))
    reward = StructuredReward(schema)
    paths = [path for path in scalars_of(reference) if path]
    assume(paths)
    path = data.draw(st.sampled_from(paths))
    worse = ordering.spoiled(reference, path, "type", data.draw(st.sampled_from(ordering.WRONG)))
    now, then = reward.score(json.dumps(reference), reference), reward.score(json.dumps(worse), reference)
    assume(then["validity"] == 1)
    lost = reward.weights["correctness"] * (now["correctness"] - then["correctness"])
    assert now["total"] - then["total"] <= lost + sum(WEIGHTS.values()) / 8
    assert now["correctness"] - then["correctness"] <= 1.001 / reward.targets(reference, reward.schema)[0].part.size


def test_a_document_broken_off_or_with_text_around_it_earns_part_of_its_correctness():
    """Law 2 beyond whole documents, and law 6: text after a document costs."""
    reward, right = StructuredReward(SCHEMA), {"name": "soup", "servings": 4, "note": "hot"}
    whole = json.dumps(right)
    assert reward.score(f"{whole} Enjoy!", right)["correctness"] == AROUND
    assert reward.score(whole[:-1], right)["correctness"] == BROKEN
    for before, after in (("", " Enjoy!"), ("Here: ", "")):
        totals = [
            reward.score(before + json.dumps(value) + after, right)["total"]
            for value in (
                {"name": "x", "servings": 1},
                {"name": "soup", "servings": 1},
                {"name": "soup", "servings": 4},
                right,
            )
        ]
        assert totals == sorted(set(totals)) and totals[-1] < reward.score(whole, right)["total"]
    broken = [reward.score(whole[:end], right)["correctness"] for end in range(len(whole))]
    assert broken == sorted(broken) and set(broken) == {0, BROKEN / 3, BROKEN * 2 / 3, BROKEN}
    assert reward.score(whole + whole, right)["total"] == 0


def test_correctness_has_most_of_the_weight():
    assert WEIGHTS["correctness"] >= sum(WEIGHTS.values()) / 2  # law 8


def test_placeholders_are_below_what_is_nearly_right():
    schema = {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "answer": {"type": "number"}},
        "required": ["reasoning", "answer"],
    }
    right = {"reasoning": "16-3-4=9 eggs, 9*2=18", "answer": 18}
    totals = [
        StructuredReward(schema).score(json.dumps(value), right)["total"]
        for value in (right, {**right, "answer": "18"}, {**right, "unit": "$"}, {"reasoning": "", "answer": 0})
    ]
    assert totals[0] == FULL and min(totals[1:3]) > 2 * totals[3] > 0


def test_a_list_without_its_first_item_is_above_an_empty_one():
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["title", "tags"],
    }
    right = {"title": "t", "tags": ["a", "b", "c", "d"]}
    less, empty = (StructuredReward(schema).score(json.dumps({"title": "t", "tags": t}), right) for t in ([*"bcd"], []))
    assert less["correctness"] == 4 / 5 and empty["correctness"] == 1 / 5


def test_parallel_calls_come_in_any_order():
    call = {
        "type": "object",
        "properties": {
            "name": {"const": "f"},
            "arguments": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
        "required": ["name", "arguments"],
    }
    reward = StructuredReward({"type": "array", "items": call, "minItems": 1}, output_format="tool_call")
    made = {city: {"name": "f", "arguments": {"city": city}} for city in ("Paris", "Rome")}

    def total(*cities):
        text = "\n".join(f"<tool_call>{json.dumps(made[city])}</tool_call>" for city in cities)
        return reward.score(text, reference=[*made.values()])["total"]

    assert total("Rome", "Paris") == total("Paris", "Rome") == FULL > total("Paris", "Paris") == total("Paris")
    single = StructuredReward(call, output_format="tool_call")
    text = f"<tool_call>{json.dumps(made['Rome'])}</tool_call>"
    assert single.score(text + text, made["Rome"])["total"] == 0  # nobody can tell which one is meant


def steps(value, pointer):
    """The path that a JSON pointer names in a document."""
    path: tuple = ()
    for step in pointer.split("/")[1:]:
        path += (int(step) if isinstance(ordering.at(value, path), list) else step,)
    return path


# -------------------------------------------------------------------------------------------- what scores what

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "servings": {"type": "integer", "minimum": 1},
        "note": {"type": "string"},
    },
    "required": ["name", "servings"],
}
GOOD = '{"name": "soup", "servings": 4}'


def test_a_flawless_answer_has_everything():
    reward = StructuredReward(SCHEMA, max_length=100)
    assert reward.score(GOOD, GOOD) == dict.fromkeys(COMPONENTS, 1.0) | {"total": sum(WEIGHTS.values()), "reason": None}


def test_components_that_do_not_apply_are_none():
    score = StructuredReward(SCHEMA).score(GOOD)
    assert score["correctness"] is None and score["length"] is None and score["total"] == FORM
    assert StructuredReward(SCHEMA).score("prose")["correctness"] is None
    assert StructuredReward(SCHEMA).score("prose", GOOD)["correctness"] == 0.0


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    "text", [GOOD, '{"name": "stew"}', "```json\n" + GOOD + "\n```", GOOD + " Enjoy!", '{"name": 1}', "x"]
)
def test_all_components_off_but_one(component, text):
    options = {"min_length": 20, "fence": "never"}
    whole = StructuredReward(SCHEMA, **options).score(text, GOOD)
    alone = StructuredReward(SCHEMA, weights={component: 2.0}, **options)
    assert alone.score(text, GOOD)["total"] == 2.0 * whole[component]
    assert alone.active == [component]


@pytest.mark.parametrize(
    ("text", "fence", "format_"),
    [
        (text, fence, fence == "optional" or (text[0] == "`") is (fence == "required"))
        for text in (GOOD, f"```json\n{GOOD}\n```")
        for fence in ("optional", "never", "required")
    ],
)
def test_fences(text, fence, format_):
    score = StructuredReward(SCHEMA, fence=fence).score(text)
    assert score["format"] == float(format_) and score["validity"] == 1


def test_length_is_a_bonus_for_the_flawless():
    reward = StructuredReward(SCHEMA, min_length=len(GOOD), max_length=40)
    assert reward.score(GOOD)["length"] == 1 and reward.score(" " * 20 + GOOD)["length"] == 0
    assert StructuredReward(SCHEMA, min_length=40).score(GOOD)["length"] == 0
    assert reward.score('{"name": "soup", "servings": "4"}')["length"] == 0


@pytest.mark.parametrize(
    ("output_format", "text"),
    [
        ("json", GOOD + " " * 400),
        ("json", "\n" * 400 + GOOD),
        ("json", GOOD.replace(": ", ":" + " " * 400)),
        ("json", f"```json\n{' ' * 400}{GOOD}\n```"),
        ("json", GOOD.replace("soup", "\\u0073\\u006f\\u0075\\u0070")),
        ("yaml", f"name: soup\nservings: 4\n# {'so ' * 200}"),
        ("xml", f"<r><!-- {'so ' * 200} --><name>soup</name><servings>4</servings></r>"),
        ("json", "<think>" + "so " * 200 + "</think>" + GOOD),
    ],
)
def test_what_says_nothing_earns_no_length(output_format, text):
    """White space, comments, escapes and reasoning count as written, never as said."""
    options = {"output_format": output_format, "reasoning_end": "</think>" if "</think>" in text else None}
    least = StructuredReward(SCHEMA, min_length=len(GOOD) + 1, **options).score(text)
    assert least["length"] == 0 and least["schema"] == 1
    assert StructuredReward(SCHEMA, min_length=len(GOOD), **options).score(text)["length"] == 1
    most = StructuredReward(SCHEMA, max_length=len(text) - 1, **options).score(text)
    assert most["length"] == (1 if "</think>" in text else 0)  # reasoning is not part of the answer


def test_the_length_of_a_parsed_call_is_that_of_its_document():
    call = {"name": "f", "arguments": {"x": 1}}
    message = [{"content": "", "tool_calls": [{"function": call}]}]
    size = len(json.dumps(call))
    for bounds, length in (((size, size), 1), ((size + 1, None), 0), ((None, size - 1), 0)):
        reward = StructuredReward(output_format="tool_call", min_length=bounds[0], max_length=bounds[1])
        assert reward.score(message)["length"] == length


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ('{"name": "soup"}', "the document: the key 'servings' is missing"),
        ('{"name": "soup", "servings": 0}', "/servings: the value is less than the minimum of 1"),
        ('{"name": "soup", "servings": 4, "x": 1}', "the document: the key 'x' is not in the schema"),
        ('{"name": "soup", "servings": 4, "x": 1, "y": 2}', "the document: the key 'x' is not in the schema"),
        ("{}", "the document: the key 'name' is missing"),
        ("[]", "the document: array where object is allowed"),
        (GOOD + ".", "text around the document"),
        (GOOD[:-1], "not JSON: Expecting ',' delimiter at character 30"),
    ],
)
def test_reasons(text, reason):
    assert StructuredReward(SCHEMA).score(text)["reason"] == reason


def test_an_empty_document_is_right_where_the_reference_is_empty():
    reward = StructuredReward({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert (
        reward.score("{}")["total"] == reward.score("{}", '{"a": 1}')["total"] == reward.score("{}", "[]")["total"] == 0
    )
    assert reward.score("{}", "{}")["total"] == FULL
    assert StructuredReward(SCHEMA).score("{}", "{}")["total"] == 0  # the reference itself does not fit


def test_without_a_schema_any_object_is_an_answer():
    reward = StructuredReward()
    assert reward.score(GOOD, GOOD)["total"] == FULL
    for hack in ("5", '"name"', "null", "{}", "[]", "prose"):
        assert reward.score(hack, GOOD)["total"] == 0


def test_words_of_free_text_can_be_compared():
    exact, tokens = StructuredReward(SCHEMA), StructuredReward(SCHEMA, text_match="tokens")
    text = '{"name": "Hot soup", "servings": 4}'
    assert exact.score(text, GOOD)["correctness"] == 0.5
    assert tokens.score(text, GOOD)["correctness"] == pytest.approx((2 / 3 + 1) / 2)


def test_tool_calls_with_allowed_values():
    schema = {
        "type": "object",
        "properties": {"name": {"const": "f"}, "arguments": {"type": "object"}},
        "required": ["name"],
    }
    reward = StructuredReward(schema, output_format="tool_call", references="allowed")
    reference = {"name": "f", "arguments": {"x": [1, 2], "unit": ["", "m"]}}
    assert reward.score('{"name": "f", "arguments": {"x": 2}}', reference)["correctness"] == 1
    assert reward.score('{"name": "f", "arguments": {"x": 3}}', json.dumps(reference))["correctness"] == 0
    message = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}]
    assert reward.score(message, reference)["total"] == FULL
    both = StructuredReward({"type": "array", "items": schema}, output_format="tool_call", references="allowed")
    two = [reference, {"name": "f", "arguments": {"x": [3]}}]
    for text, correctness in (("31", 1), ("13", 1), ("11", 0.5), ("3", 0.5)):
        calls = [{"name": "f", "arguments": {"x": int(x)}} for x in text]
        assert both.score(json.dumps(calls), json.dumps(two))["correctness"] == correctness


def test_references_in_the_output_format():
    yaml = StructuredReward(SCHEMA, output_format="yaml")
    assert yaml.score("name: soup\nservings: 4", "name: soup\nservings: 4")["total"] == FULL
    xml = StructuredReward(SCHEMA, output_format="xml")
    text = "<recipe><name>soup</name><servings>4</servings></recipe>"
    assert xml.score(text, text)["total"] == xml.score(text, GOOD)["total"] == FULL


class Recipe(BaseModel):
    name: str
    servings: int


def test_schemas_of_every_kind_score_alike(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(Recipe.model_json_schema()), encoding="utf-8")
    for schema in (Recipe, Recipe.model_json_schema(), json.dumps(Recipe.model_json_schema()), path, str(path)):
        reward = StructuredReward(schema)
        assert (
            reward.score(GOOD)["total"] == FORM
            and reward.score('{"name": "soup"}')["structure"] == 0.1 + 0.9 * 1.25 / 2.25
        )
    row = StructuredReward({"type": "array"})
    assert row.score(GOOD, schema=json.dumps(Recipe.model_json_schema()))["total"] == FORM  # a row's own wins


def test_more_values_than_a_score_may_visit():
    reward = StructuredReward({"type": "array", "items": {"type": "integer"}}, limits=Limits(max_values=4))
    assert reward.score("[1, 2, 3]")["total"] == FORM
    assert reward.score("[1, 2, 3, 4, 5]")["reason"] == "more than 4 values"
    assert reward.score('["a", ["b"], ["c"], {}, 5]')["reason"] == "more than 4 values"
    nested = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
    score = StructuredReward(nested, limits=Limits(max_values=4)).score('[["a"], ["b"], ["c"]]')
    assert score["total"] == 0 and score["reason"] == "more than 4 values"


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": {"beauty": 1}},
            r"Unknown component 'beauty'; components are structure, format, ",
        ),
        ({"weights": {"format": -1}}, r"The weight of format is -1; use 0 \(off\) or a positive number\."),
        ({"weights": {"format": float("inf")}}, r"The weight of format is inf; use 0"),
        ({"weights": {"format": float("nan")}}, r"The weight of format is nan; use 0"),
        ({"weights": {"format": 0}}, r"All components are off; give at least one a positive weight\."),
        ({"output_format": "toml"}, r"output_format is 'toml'; use one of 'json', 'yaml', 'xml', 'tool_call'\."),
        ({"preset": "ours"}, r"preset is 'ours'; use one of None, 'rl-struct'\."),
        ({"fence": "maybe"}, r"fence is 'maybe'; use one of 'optional', 'never', 'required'\."),
        ({"references": "all"}, r"references is 'all'; use one of 'value', 'allowed'\."),
        ({"text_match": "fuzzy"}, r"text_match is 'fuzzy'; use one of 'exact', 'tokens'\."),
        ({"min_length": 5, "max_length": 4}, r"min_length is 5 and max_length 4; exchange them\."),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        StructuredReward(SCHEMA, **options)


def test_an_invalid_schema_fails_at_start_up():
    with pytest.raises(SchemaError, match="The schema is invalid at /properties/a/type: "):
        StructuredReward({"properties": {"a": {"type": "int"}}})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"schema": ["{}", '{"type": "int"}']},
            r"^Row 'r1': `schema`: The schema is invalid at /type: .*; mend it there\.$",
        ),
        (
            {"schema": ["{}", "/etc/passwd"]},
            r"^Row 'r1': `schema`: The schema is not JSON \(.*\); give a JSON Schema as JSON\.$",
        ),
        (
            {"schema": ["{}", 5]},
            r"^Row 'r1': `schema`: A schema is a JSON object or a boolean, not int; give a JSON Schema\.$",
        ),
        ({"answer": [GOOD, "soup"]}, r"^Row 'r1': `answer`: is not JSON \(.*\); give the right document as JSON$"),
        ({"answer": [GOOD, '{"a": NaN}']}, r"^Row 'r1': `answer`: is not JSON \(NaN is not JSON\); give the right"),
        ({"answer": [GOOD, "[" * 100]}, r"^Row 'r1': `answer`: is not JSON \(nested deeper than 64\); give"),
    ],
)
def test_a_bad_row_is_named(columns, message):
    reward = StructuredReward()
    both = {"schema": [json.dumps(SCHEMA)] * 2, **columns}
    with pytest.raises(ValueError, match=message):
        reward(completions=[GOOD, GOOD], id=["r0", "r1"], **both)
    with pytest.raises(ValueError, match=message.replace("'r1'", "1")):
        reward(completions=[GOOD, GOOD], **both)
    row = {"schema": None, "reference": None} | {k.replace("answer", "reference"): v[1] for k, v in columns.items()}
    with pytest.raises(ValueError, match=message.partition(": `")[2].partition("`: ")[2].rstrip("$")):
        reward.check_row(**row)


def test_a_bad_reference_of_allowed_values_is_named():
    reward = StructuredReward({}, output_format="tool_call", references="allowed")
    for answer in ('{"name": "f"}', '{"name": "f", "arguments": {"x": 1}}', "[]"):
        with pytest.raises(ValueError, match=r"Row 0: `answer`: is not of the form .* set references to 'value'$"):
            reward(completions=["x"], answer=[answer])


# ------------------------------------------------------------------------------------------------- a batch, and TRL


class Log:
    """TRL's `log_extra` and `log_metric`."""

    def __init__(self):
        self.extra, self.metrics = {}, {}

    def log_extra(self, name, values):
        assert name not in self.extra
        self.extra[name] = values

    def log_metric(self, name, value):
        assert name not in self.metrics
        self.metrics[name] = value


TEXTS = [GOOD, '{"name": "stew"}', "prose"]


@pytest.mark.parametrize("conversational", [False, True])
def test_as_a_reward_function(conversational):
    reward, log = StructuredReward(max_length=40), Log()
    completions = [[{"role": "assistant", "content": text}] if conversational else text for text in TEXTS]
    totals = reward(
        prompts=["p"] * 3,
        completions=completions,
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
        log_extra=log.log_extra,
        log_metric=log.log_metric,
        schema=[json.dumps(SCHEMA)] * 3,
        answer=[GOOD, GOOD, None],
        id=["a", "b", "c"],
        environments=None,
    )
    alone = [reward.score(text, answer, SCHEMA) for text, answer in zip(TEXTS, [GOOD, GOOD, None], strict=True)]
    assert totals == [score["total"] for score in alone] and all(isinstance(total, float) for total in totals)
    for name in COMPONENTS:
        column = [score[name] for score in alone]
        values = [value for value in column if value is not None]
        assert log.extra[name] == column and log.metrics[f"structured/{name}"] == sum(values) / len(values)
    assert log.extra["reason"] == [score["reason"] for score in alone]
    assert reward.__name__ == "structured" and set(log.metrics) == {f"structured/{name}" for name in COMPONENTS}


def test_only_active_components_are_logged():
    reward, log = (
        StructuredReward(SCHEMA, weights={"structure": 1, "correctness": 1, "length": 1}, name="recipe"),
        Log(),
    )
    reward(completions=TEXTS, log_extra=log.log_extra, log_metric=log.log_metric)
    assert set(log.metrics) == {"recipe/structure"}  # no reference, no bounds
    assert set(log.extra) == {
        "recipe/structure",
        "recipe/correctness",
        "recipe/reason",
    }  # beside other rewards' columns
    assert log.extra["recipe/correctness"] == [None] * 3


def test_other_columns_can_be_read():
    reward = StructuredReward(schema_column="form", reference_column="gold")
    assert reward(completions=[GOOD], form=[json.dumps(SCHEMA)], gold=[GOOD], answer=["not read"]) == [FULL]


@pytest.mark.parametrize("preset", [None, "rl-struct"])
def test_a_batch_without_its_schema_is_refused(preset):
    """Where an integer `a` is required, `{"b": "x"}` is worth nothing, and without the schema it would be an answer."""
    wrong, rows = '{"b": "x"}', ['{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}']
    assert (
        StructuredReward(preset=preset)(completions=[wrong], schema=rows)[0]
        < StructuredReward({}, preset=preset)([], [wrong])[0]
    )
    absent = "^The batch has no column `schema` and no schema is given for all rows; set `schema` .*_columns` false"
    for function in (StructuredReward(preset=preset), *StructuredReward(preset=preset).component_rewards()):
        with pytest.raises(ContractError, match=absent):
            function(completions=[wrong], shema=rows)
    with pytest.raises(ValueError, match=r"^Row 'r1': `schema`: is missing; give it a JSON Schema, or drop the row"):
        StructuredReward(preset=preset)(completions=[wrong] * 2, schema=[*rows, None], id=["r0", "r1"])
    with pytest.raises(ContractError, match=r"^The batch has no column `shema`; set `schema_column`"):
        StructuredReward(SCHEMA, preset=preset, schema_column="shema")(completions=[wrong], schema=rows)
    assert StructuredReward(SCHEMA, preset=preset)(completions=[], log_extra=None) == []  # a process without rows


def test_a_named_reference_column_must_be_there():
    with pytest.raises(ContractError, match=r"^The batch has no column `anwser`; set `reference_column` to the column"):
        StructuredReward(SCHEMA, reference_column="anwser")(completions=[GOOD], answer=[GOOD])
    alone = StructuredReward(SCHEMA, reference_column="anwser", weights={"structure": 1})  # it compares with none
    assert alone(completions=[GOOD]) == [1.0]
    with pytest.warns(UserWarning, match="Rows have no column `answer`: the component correctness is off"):
        assert StructuredReward(SCHEMA)(completions=[GOOD]) == [FORM]


def test_components_share_one_reading(monkeypatch):
    reads = []
    monkeypatch.setattr(module, "read_document", lambda *a, _=module.read_document, **k: reads.append(a) or _(*a, **k))
    reward, log = StructuredReward(SCHEMA, max_length=100), Log()
    functions = reward.component_rewards()
    columns = {"answer": [GOOD, None, GOOD], "log_extra": log.log_extra, "log_metric": log.log_metric}
    found = {f.component: f(prompts=[], completions=TEXTS, **columns) for f in functions}
    assert len(reads) == len(TEXTS)
    assert [f.__name__ for f in functions] == [f"structured_{name}" for name in COMPONENTS]
    for index, (text, answer) in enumerate(zip(TEXTS, columns["answer"], strict=True)):
        score = StructuredReward(SCHEMA, max_length=100).score(text, answer)
        assert {name: values[index] for name, values in found.items()} == {name: score[name] for name in COMPONENTS}
    assert found["correctness"][1] is None
    assert reward.last_scores == reward.score_batch(TEXTS, answer=columns["answer"])
    other = reward(completions=TEXTS, answer=[None, None, None])
    assert other[0] == pytest.approx(FORM + WEIGHTS["length"])  # other references are another batch


def test_a_batch_is_known_by_what_it_holds_not_by_its_list():
    reward, metrics = StructuredReward(SCHEMA, weights={"validity": 1, "correctness": 1}), []
    validity, correctness = reward.component_rewards()
    texts, answers = [GOOD, GOOD], [GOOD, GOOD]

    def both():
        columns = {"answer": answers, "log_metric": lambda name, value: metrics.append(name)}
        return [function(completions=texts, **columns) for function in (validity, correctness)]

    assert both() == [[1.0, 1.0], [1.0, 1.0]] and reward(completions=texts, answer=answers) == [2.0, 2.0]
    texts[0], answers[1] = "prose", json.dumps({"name": "other", "servings": 1})
    assert both() == [[0.0, 1.0], [0.0, 0.0]] and reward(completions=texts, answer=answers) == [0.0, 1.0]
    message = [{"role": "assistant", "content": GOOD}]
    texts[0] = message
    assert both()[0] == [1.0, 1.0]
    message[0]["content"] = "prose"
    assert both()[0] == [0.0, 1.0]
    before = len(metrics)
    both()  # an equal batch is a batch of its own: logged once more, once for both
    assert len(metrics) == before + 2


def test_schemas_of_rows_are_compiled_once(monkeypatch):
    from tokalign.rewards.structured import schemas as compiling

    made = []
    original = compiling.CompiledSchema
    monkeypatch.setattr(compiling, "CompiledSchema", lambda schema: made.append(schema) or original(schema))
    texts = [json.dumps({**SCHEMA, "title": f"row {i}"}) for i in range(10)]
    reward = StructuredReward()
    for _ in range(3):
        reward(completions=[GOOD] * 40, schema=[texts[i // 4] for i in range(40)])
    assert len(made) == 10


def test_references_are_parsed_once_and_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 4)
    parsed = []
    monkeypatch.setattr(module, "decode_json", lambda text, _=module.decode_json: parsed.append(text) or _(text))
    reward = StructuredReward(SCHEMA)
    reward(completions=[GOOD] * 8, answer=[GOOD] * 8)
    assert len(parsed) == 1
    reward(completions=[GOOD] * 10, answer=[json.dumps({"name": str(i), "servings": 1}) for i in range(10)])
    assert len(parsed) == 11 and len(reward._references) <= 4


def test_reads_documents():
    reward = StructuredReward(SCHEMA)
    assert reward.read(GOOD).value == json.loads(GOOD) and reward.read(GOOD).whole
    assert reward.read("x").error.startswith("not JSON") and not reward.read("x").whole


def test_trains_in_trls_grpo(tiny_path, tmp_path):
    torch.manual_seed(0)
    rows = [{"prompt": [{"role": "user", "content": f"soup {i}"}], "id": str(i)} for i in range(4)]
    rows = [row | {"schema": json.dumps(SCHEMA), "answer": GOOD if i % 2 else None} for i, row in enumerate(rows)]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=16,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    reward = StructuredReward(max_length=64)
    args.remove_unused_columns = True  # TRL's trainer then drops whatever a reward reads
    with pytest.raises(ContractError, match=r"The batch has no column `schema`.* leave `remove_unused_columns` false"):
        GRPOTrainer(tiny_path, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows)).train()
    args.remove_unused_columns = False
    trainer = GRPOTrainer(tiny_path, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["rewards/structured/mean"] == entry["structured/structure"] == 0  # a random model writes no JSON
        assert {f"structured/{name}" for name in COMPONENTS} <= entry.keys()
    assert {"reason", *COMPONENTS} <= trainer._logs["extra"].keys()
    assert all(reason.startswith(("not JSON", "empty")) for reason in trainer._logs["extra"]["reason"])
