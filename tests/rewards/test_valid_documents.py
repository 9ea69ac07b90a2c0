"""One schema has two readers, the validator and the grade: what is valid, with no key of its own, is perfect for both.

The search draws a document first and then a schema that describes it, each key by some part of the schema that holds
for this document: beside references, in alternatives that it fits several of, under conditions. `jsonschema` is the
judge of what is valid.
"""

from __future__ import annotations

import datetime
import enum
import json
import re
import uuid
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field

from tests.rewards.ordering import WRONG, kind_of, searching
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.schemas import SchemaError, compile_schema

DRAFT_4, DRAFT_6, DRAFT_7 = ({"$schema": f"http://json-schema.org/draft-0{n}/schema#"} for n in (4, 6, 7))
FULL = 1.0  # without a reference
CORRECT = 3.0
scalars = st.sampled_from([None, True, 3, 2.5, "a", "red", ""])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "n_1", "x y"]), inner),
    max_leaves=6,
)
documents = st.dictionaries(st.sampled_from(["a", "b", "n_1", "x y"]), values, min_size=1)


class Describer:
    """Draws schemas that a value fits; `old` is draft 7, else 2020-12."""

    def __init__(self, draw, old: bool):
        self.draw, self.old = draw, old
        self.definitions: dict[str, dict] = {}

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def wrong(self, value):
        """A schema that the value does not fit."""
        other = next(kind for kind in ("string", "boolean", "array") if kind != kind_of(value))
        return self.pick({"type": other}, {"const": "zz"}, {"not": {}}, False)

    def silent(self, value):
        """Words that say nothing of the value: they are about other types."""
        words = {
            "minItems": 9,
            "prefixItems": [False],
            "required": ["zz"],
            "properties": {"zz": False},
            "minLength": 99,
        }
        about = {"array": {"minItems", "prefixItems"}, "object": {"required", "properties"}, "string": {"minLength"}}
        word = self.pick(*sorted(words.keys() - about.get(kind_of(value), set())))
        return {word: words[word]}

    def named(self, schema):
        """A reference to the schema, of any form."""
        name = f"d{len(self.definitions)}"
        # an anchor, or an address of its own, in which references to what stands outside would lead nowhere
        anchor = {"$id": f"#{name}"} if self.old else {"$anchor": name}
        forms = ["pointer", "anchor", "address"][: 3 if "$ref" not in json.dumps(schema) else 1]
        form = self.pick(*forms)
        address = {"pointer": {}, "anchor": anchor, "address": {"$id": f"{name}.json"}}[form]
        self.definitions[name] = {"allOf": [schema]} | address if address.keys() & schema.keys() else schema | address
        pointer = f"#/{'definitions' if self.old else '$defs'}/{name}"
        return {"$ref": {"pointer": pointer, "anchor": f"#{name}", "address": f"{name}.json"}[form]}

    def schema(self, value):
        """A schema that the value fits and that names each of its keys."""
        if isinstance(value, dict):
            made = self.object(value)
        elif isinstance(value, list):
            made = self.array(value)
        else:
            other = self.pick("array", "object")
            made = self.pick({"type": kind_of(value)}, {"type": [kind_of(value), other]}, {"enum": [value, "zz"]}, {})
            made = made | self.pick({}, self.silent(value))
        for _ in range(self.pick(0, 0, 1, 2)):
            form = self.pick("named", "all", "any", "one", "then", "else")
            if form == "named":
                made = self.named(made)
                made |= {"type": "null", "minimum": 99} if self.old else self.pick({}, self.silent(value))
            elif form == "all":
                made = {"allOf": [self.pick({}, self.silent(value), True), made]}
            elif form == "any":
                made = {"anyOf": self.pick([made, self.wrong(value)], [self.wrong(value), made])}
            elif form == "one":
                made = {"oneOf": [self.wrong(value), made]}
            else:
                made = {"if": form == "then" or self.wrong(value), form: made}
        return made

    def object(self, value):
        # each key is described in one of several schemas for the same object, which hold together
        groups: dict[str, dict] = {}
        for key, item in value.items():
            groups.setdefault(self.pick("here", "here", "all", "any", "then", "depends"), {})[key] = item
        here = groups.pop("here", {})
        made = self.keys(here) if here or not groups else {}
        made |= self.pick({}, {"type": "object"}, {"type": ["object", "null"]})
        parts = {name: self.keys(group) for name, group in groups.items()}
        parts = {name: self.named(part) if self.pick(True, False) else part for name, part in parts.items()}
        if "all" in parts:
            made["allOf"] = [parts["all"]]
        if "any" in parts:
            made["anyOf"] = [*self.pick([], [self.wrong(value)]), parts["any"], *self.pick([], [self.keys(here)])]
        if "then" in parts:
            made |= {"if": {"type": "object"}, "then": parts["then"]}
        if "depends" in parts:
            made["dependencies" if self.old else "dependentSchemas"] = {next(iter(value)): parts["depends"]}
        return made

    def keys(self, value):
        made = {"properties": {key: self.schema(item) for key, item in value.items()}}
        if "n_1" in value and self.pick(True, False):
            made["patternProperties"] = {"^n_": made["properties"].pop("n_1")}
        required = self.draw(st.lists(st.sampled_from([*value]), unique=True)) if value else []
        return made | ({"required": required} if required else {}) | self.pick({}, {"type": "object"})

    def array(self, value):
        items = [self.schema(item) for item in value]
        made = self.pick({}, {"type": "array"})
        if self.pick(True, False) and items:
            return made | ({"items": items} if self.old else {"prefixItems": items, "items": False})
        return made | ({"items": {"anyOf": items}} if items else self.pick({}, {"items": {}}))


@st.composite
def described(draw):
    """(schema, document that it describes)."""
    document, old = draw(documents), draw(st.booleans())
    describer = Describer(draw, old)
    made = describer.schema(document)
    root = {**DRAFT_7, "definitions": describer.definitions} if old else {"$defs": describer.definitions}
    return {**root, "type": "object", "allOf": [made]}, document


def judge(schema):
    return (jsonschema.Draft7Validator if "$schema" in schema else jsonschema.Draft202012Validator)(schema)


@searching(300)
@given(described())
def test_a_valid_document_without_keys_of_its_own_is_perfect(case):
    schema, document = case
    assert judge(schema).is_valid(document)
    grade = compile_schema(schema).grade(document)
    assert (grade.keys, grade.full, grade.invented, grade.attempt) == (1, 1, 0, True)
    score = StructuredReward(schema).score(json.dumps(document))
    assert score["total"] == FULL and score["reason"] is None


@searching(150)
@given(described(), st.data())
def test_an_invalid_document_is_not(case, data):
    schema, document = case
    document = json.loads(json.dumps(document))
    key = data.draw(st.sampled_from(sorted(document)))
    place = document[key] if isinstance(document[key], dict) and document[key] else document
    key = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        place[key] = data.draw(st.sampled_from(WRONG))
    else:
        del place[key]
    score = StructuredReward(schema).score(json.dumps(document))
    if not judge(schema).is_valid(document):
        assert score["total"] < FULL and score["reason"] is not None


INTEGER = {"type": "integer"}
POINT = {"type": "object", "properties": {"x": INTEGER}, "required": ["x"]}
EMAIL, PHONE = ({"properties": {name: {"type": "string"}}, "required": [name]} for name in ("email", "phone"))
RESOURCE = {"$id": "https://example.com/part.json", "$defs": {"n": {"$anchor": "here", **POINT}}, "$ref": "#here"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ({"type": "string", "$ref": "#/definitions/point", **DRAFT_7}, {"x": 1}),  # old drafts ignore what is beside it
        ({"$ref": "#/definitions/word", "minItems": 2}, "A"),
        ({"type": ["object", "null"], "allOf": [{"properties": {"x": INTEGER}}]}, None),
        ({"type": ["array", "string"], "required": ["x"]}, ["a"]),
        (
            {"if": {"required": ["a"]}, "then": {"$ref": "#/definitions/point"}, "properties": {"a": {}}},
            {"a": 1, "x": 2},
        ),
        ({"if": {"required": ["a"]}, "else": {"anyOf": [POINT, EMAIL]}, "properties": {"b": {}}}, {"b": 1, "x": 2}),
        ({"dependentSchemas": {"a": {"allOf": [POINT]}}, "properties": {"a": {}}}, {"a": 1, "x": 2}),
        ({"dependentRequired": {"a": ["b"]}, "properties": {"a": {}}}, {"a": 1, "b": 2}),
        ({"anyOf": [EMAIL, PHONE]}, {"email": "a", "phone": "b"}),
        ({"anyOf": [{"type": "null"}, {"anyOf": [EMAIL, PHONE, POINT]}]}, {"email": "a", "phone": "b"}),
        ({"anyOf": [{"properties": {"v": EMAIL}}, {"properties": {"v": PHONE}}]}, {"v": {"email": "a", "phone": "b"}}),
        ({"properties": {"ab": EMAIL}, "patternProperties": {"^a": PHONE}}, {"ab": {"email": "a", "phone": "b"}}),
        ({"patternProperties": {"^a": EMAIL, "b$": PHONE}}, {"a_b": {"email": "a", "phone": "b"}}),
        ({"items": EMAIL, "contains": PHONE}, [{"email": "a", "phone": "b"}, {"email": "c"}]),
        ({"allOf": [{"items": EMAIL}, {"prefixItems": [PHONE, INTEGER]}]}, [{"email": "a", "phone": "b"}]),
        ({"properties": {"a": {}}, "unevaluatedProperties": INTEGER}, {"a": 1, "b": 2}),
        (
            {"properties": {"a": {}}, "allOf": [{"unevaluatedProperties": True}], "unevaluatedProperties": False},
            {"b": 1},
        ),
        ({"anyOf": [{"const": n} for n in range(70)] + [POINT]}, {"x": 1}),
        ({"const": 5, "prefixItems": [INTEGER], **DRAFT_4}, ["a"]),  # words that draft 4 does not know
        ({"$ref": "https://example.com/part.json#here"}, {"x": 1}),
        ({"$ref": "https://example.com/part.json"}, {"x": 1}),
        ({"$dynamicRef": "#node", "$dynamicAnchor": "node", "properties": {"n": {"$dynamicRef": "#node"}}}, {"n": {}}),
    ],
)
def test_one_place(place, value):
    dialect = {"$schema": place["$schema"]} if "$schema" in place else {}
    schema = {
        **dialect,
        "type": "object",
        "properties": {"v": {word: item for word, item in place.items() if word != "$schema"}},
        "required": ["v"],
        "definitions": {"point": POINT, "word": {"type": "string"}, **({} if dialect else {"part": RESOURCE})},
    }
    reward = StructuredReward(schema)
    assert reward.score(json.dumps({"v": value}))["total"] == FULL
    spoiled = reward.score(json.dumps({"v": value, "zz": 1}))
    assert 0 < spoiled["structure"] < 1 and spoiled["total"] < FULL


def test_what_an_anchor_names_is_graded():
    anchored = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": INTEGER},
        "required": ["name", "age"],
    }
    for schema in (
        {"$ref": "#person", "$defs": {"p": {"$anchor": "person", **anchored}}},
        {"$dynamicRef": "#person", "$defs": {"p": {"$dynamicAnchor": "person", **anchored}}},
        {"$ref": "p.json", "$id": "https://example.com/a/b.json", "$defs": {"p": {"$id": "p.json", **anchored}}},
        {"$ref": "#/$defs/q", "$defs": {"q": {"$id": "q", "$ref": "#/$defs/p", "$defs": {"p": anchored}}}},
        {"allOf": [{"$ref": "#person"}], "definitions": {"p": {"$id": "#person", **anchored}}, **DRAFT_6},
        {"allOf": [{"$ref": "#person"}], "definitions": {"p": {"id": "#person", **anchored}}, **DRAFT_4},
        {"$recursiveRef": "#", "$schema": "https://json-schema.org/draft/2019-09/schema", **anchored},
    ):
        good, less, none = ('{"name": "a", "age": 1}', '{"name": "a"}', '{"zzz": 1}')
        scores = [StructuredReward(schema).score(text)["total"] for text in (good, less, none)]
        assert scores[0] == FULL > scores[1] > scores[2] == 0, schema


def test_alternatives_that_a_value_fits_together_take_linear_time():
    itself = {"$ref": "#/$defs/E"}
    options = [{"properties": {"of": itself, name: INTEGER}, "required": [name]} for name in "abc"]
    schema = {"$defs": {"E": {"anyOf": options}}, **itself}
    value: dict = {"a": 1, "b": 2}
    for _ in range(60):
        value = {"of": value, "a": 1, "b": 2}
    compiled = compile_schema(schema)
    assert compiled.grade(value, max_values=4000).keys == 1 and compiled.grade(value).invented == 0
    assert compiled.grade(value | {"zz": 1}, max_values=4000).keys < 1


@pytest.mark.parametrize(
    ("schema", "text", "total"),
    [
        ({"type": "object", "properties": {}}, "{}", FULL),
        ({"type": "object", "additionalProperties": False}, "{}", FULL),
        ({"type": "object", "maxProperties": 0}, "{}", FULL),
        ({"const": {}}, "{}", FULL),
        ({"type": "array", "maxItems": 0}, "[]", FULL),
        ({"type": "array", "items": False}, "[]", FULL),
        ({"type": ["object", "array"], "maxItems": 0, "properties": {"a": False}}, "[]", FULL),
        ({"type": "object", "properties": {}}, '{"a": 1}', 0),
        # something can be said, or nothing is right
        ({"type": "object", "properties": {"a": INTEGER}}, "{}", 0),
        ({"type": "object"}, "{}", 0),
        ({"type": "array"}, "[]", 0),
        ({"anyOf": [{"type": "object", "properties": {}}, POINT]}, "{}", 0),
        ({"type": "object", "properties": {}, "minProperties": 1}, "{}", 0),
        (False, "{}", 0),
    ],
)
def test_an_empty_document_is_right_where_it_is_the_only_one(schema, text, total):
    assert StructuredReward(schema).score(text)["total"] == total


def test_a_document_of_another_kind_than_the_schema_speaks_of_is_no_attempt():
    """Valid by the letter, and the cheapest of all answers."""
    for schema, text in (({"properties": {"a": INTEGER}, "required": ["a"]}, "[5]"), ({"items": INTEGER}, '{"a": 1}')):
        assert compile_schema(schema).is_valid(json.loads(text))
        assert StructuredReward(schema).score(text)["total"] == 0


@pytest.mark.parametrize("dialect", [DRAFT_4, DRAFT_6, DRAFT_7, {}])
@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("uuid", str(uuid.UUID(int=1)), "not-a-uuid"),
        ("duration", "P1DT2H", "a day"),
        ("iri", "https://example.com/ä", "a b"),
        ("json-pointer", "/a/b", "a/b"),
        ("date-time", "2024-01-02T03:04:05Z", "yesterday"),
        ("colour", "any text: nobody knows this format", None),
    ],
)
def test_formats_are_checked_in_every_draft(dialect, name, good, bad):
    schema = {**dialect, "type": "object", "properties": {"f": {"type": "string", "format": name}}, "required": ["f"]}
    reward = StructuredReward(schema)
    assert reward.score(json.dumps({"f": good}))["total"] == FULL
    if bad is not None:
        score = reward.score(json.dumps({"f": bad}))
        assert score["total"] < FULL and name in score["reason"]


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"pattern": "(["}}}, "/properties/a/pattern"),
        ({"patternProperties": {"([": {}}}, "/patternProperties"),
        ({**DRAFT_7, "items": [{"propertyNames": {"pattern": "(["}}]}, "/items/0/propertyNames/pattern"),
        ({"$defs": {"a": {"anyOf": [{}, {"pattern": "(["}]}}, "$ref": "#/$defs/a"}, "/$defs/a/anyOf/1/pattern"),
    ],
)
def test_a_refused_pattern_is_named(schema, place):
    with pytest.raises(
        SchemaError, match=rf"invalid at {re.escape(place)}: the pattern '\(\[' is no regular expression"
    ):
        compile_schema(schema)


# ------------------------------------------------------------------------------------------------------------ Pydantic


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


class Pair(NamedTuple):
    left: int
    right: str


@dataclass
class Plain:
    when: datetime.datetime


class Inner(BaseModel):
    inner_name: int = Field(alias="innerName")


class Node(BaseModel):
    value: Decimal
    children: list[Node] = []


class Everything(BaseModel):
    naive: datetime.datetime = datetime.datetime(2024, 1, 2, 9, 30)
    aware: datetime.datetime = datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)
    date: datetime.date = datetime.date(2024, 2, 29)
    time: datetime.time = datetime.time(9, 30)
    durations: list[datetime.timedelta] = [datetime.timedelta(days=-1), datetime.timedelta(seconds=1.5)]
    decimals: list[Decimal] = [Decimal("1.10"), Decimal("1E+5"), Decimal("-0.00000001")]
    colour: Colour = Colour.RED
    size: Size = Size.SMALL
    pair: tuple[int, str] = (1, "a")
    named: Pair = Pair(1, "a")
    numbers: frozenset[int] = frozenset({3, 1})
    raw: bytes = b"abc"
    identity: uuid.UUID = uuid.UUID(int=1)
    path: Path = Path("a/b")
    by_number: dict[int, datetime.datetime] = {1: datetime.datetime(2024, 1, 1)}
    plain: Plain = Plain(datetime.datetime(2024, 1, 1))
    node: Node = Node(value=Decimal(1), children=[Node(value=Decimal(2))])
    nothing: datetime.time | None = None


class Aliases(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    first_name: str = Field(alias="firstName")
    born: datetime.datetime
    inner: Inner


class Written(BaseModel):
    width: int
    secret: str = Field(exclude=True)

    @computed_field
    @property
    def area(self) -> int:
        return self.width**2


class Encoded(BaseModel):
    model_config = ConfigDict(ser_json_timedelta="float", ser_json_bytes="base64", serialize_by_alias=True)
    length: datetime.timedelta = Field(datetime.timedelta(hours=1), alias="theLength")
    raw: bytes = b"a?>"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


MODELS = [
    Everything(),
    Aliases(firstName="a", born=datetime.datetime(2024, 1, 1), inner=Inner(innerName=1)),
    Written(width=2, secret="s"),
    Encoded(),
    RootModel[list[Cat | Dog]]([Cat(), Dog(name="a")]),
    RootModel[dict[Colour, Plain]]({Colour.RED: Plain(datetime.datetime(2024, 1, 1))}),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_what_a_model_writes_is_a_perfect_answer_to_itself(model):
    reward = StructuredReward(type(model))
    text = model.model_dump_json()
    for reference in (text, model.model_dump(mode="json"), model.model_dump(), model):
        score = reward.score(text, reference)
        assert (score["total"], score["correctness"], score["reason"]) == (FULL + CORRECT, 1, None), type(reference)
    assert reward.score(model.model_dump_json(by_alias=True), model)["total"] == FULL + CORRECT
    for key in json.loads(text) if text[0] == "{" else ():
        broken = json.loads(text) | {key: [{"zz": None}]}
        assert reward.score(json.dumps(broken), model)["total"] < FULL + CORRECT


def test_the_forms_of_a_model_do_not_mix():
    reward, good = StructuredReward(Aliases), MODELS[1].model_dump(mode="json", by_alias=True)
    both = reward.score(json.dumps(good | {"first_name": "a"}))
    assert both["total"] < FULL and both["reason"] == "the document: the key 'first_name' is not in the schema"
    missing = {key: item for key, item in good.items() if key != "firstName"}
    assert reward.score(json.dumps(missing))["reason"] == "the document: the key 'firstName' is missing"
    assert reward.score(json.dumps(good | {"born": "2024-13-01T00:00:00"}))["total"] < FULL


def test_the_literal_reward_reads_the_keys_that_all_forms_require():
    reward = StructuredReward(Aliases, preset="rl-struct")
    assert reward.score("born inner")["structure"] == 1 and reward.score("inner first_name")["structure"] == 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"a": object()}, r"cannot be read as JSON \(Unable to serialize unknown type.*\); give the right document"),
        ({"a": b"\xff"}, "cannot be read as JSON"),
        (
            {"a": datetime.datetime(2024, 1, 1)},
            r"as JSON does not fit the schema \(/a: string where boolean is allowed\)",
        ),
        (Cat(), r"as JSON does not fit the schema \(the document: the key 'a' is missing\)"),
    ],
)
def test_a_reference_that_cannot_be_read_is_refused(reference, message):
    reward = StructuredReward({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    with pytest.raises(ValueError, match=message):
        reward.score('{"a": true}', reference)
    with pytest.raises(ValueError, match=f"Row 7: `answer`: {message}"):
        reward(completions=['{"a": true}'], answer=[reference], id=[7])


def test_a_model_without_a_json_schema_is_refused():
    class Odd(BaseModel):
        call: type

    with pytest.raises(SchemaError, match=r"The Pydantic model Odd has no JSON Schema \(.*\)"):
        StructuredReward(Odd)
