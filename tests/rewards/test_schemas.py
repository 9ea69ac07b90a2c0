"""Schemas: what compiles and what is refused, and the grade against a plain loop written from its equation."""

from __future__ import annotations

import enum
import json
import math
import socket

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from tests.rewards.ordering import fault, schemas, searching, valid
from tokalign.rewards.structured import schemas as module
from tokalign.rewards.structured.grading import BOUND, PRESENT, TooManyValues
from tokalign.rewards.structured.schemas import CompiledSchema, SchemaError, compile_schema, compile_text, load_schema
from tokalign.rewards.structured.shapes import ANY, type_of

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([1.0, 1.5]), st.text("ab", max_size=2)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "kind", "next", "zz"]), inner, max_size=3)
    ),
    max_leaves=8,
)


# ---------------------------------------------------------------------------------------------------------- the grade


def plain_grade(shape, value):
    """(by keys and types, with bounds, invented keys) from the equation in `grading.Walk`."""
    if shape is ANY:
        return 1.0, 1.0, 0
    if shape.options:
        grades = [plain_grade(option, value) for option in shape.options]
        best = max(grades, key=lambda grade: grade[0])  # the first of the best
        return best[0], max(grade[1] for grade in grades), best[2]
    if shape.allowed is not None and type_of(value) not in shape.allowed:
        return 0.0, 0.0, 0
    if isinstance(value, dict):
        base = PRESENT if shape.required else 1.0
        credits, invented, below, optional = [], 0, 0, []
        for key, item in value.items():
            child = shape.known(key) or (ANY if key in shape.required else None)
            if child is None:
                invented += 1
                continue
            *grades, inner = plain_grade(child, item)
            below += inner
            credit = [PRESENT + (1 - PRESENT) * grade for grade in grades]
            (credits if key in shape.required else optional).append(credit)
        found = [
            (base + math.fsum(credit[i] for credit in credits))
            / (base + len(shape.required) + invented + math.fsum(1 - credit[i] for credit in optional))
            for i in range(2)
        ]
        return found[0], found[1], invented + below
    if isinstance(value, list):
        grades = [plain_grade(shape.item(index), item) for index, item in enumerate(value)]
        share = min(1, (1 + len(value)) / (1 + shape.min_items))
        beyond = 0 if shape.max_items is None else max(0, len(value) - shape.max_items)
        found = [share / (1 + beyond + math.fsum(1 - grade[i] for grade in grades)) for i in range(2)]
        return found[0], found[1], sum(grade[2] for grade in grades)
    if shape.bounds is None or shape.bounds.is_valid(value):
        return 1.0, 1.0, 0
    return (BOUND if shape.constant else 1.0), BOUND, 0


@st.composite
def cases(draw):
    """A schema, and a document that fits it, nearly fits it, or has nothing to do with it."""
    schema = draw(schemas())
    if draw(st.integers(0, 3)) == 0:
        return schema, draw(anything)
    value = draw(valid(schema))
    for _ in range(draw(st.integers(0, 3))):
        value = draw(fault(schema, value))
    return schema, value


@searching(400)
@given(cases())
def test_grade_is_the_equation(case):
    schema, value = case
    compiled = compile_schema(schema)
    keys, full, invented = plain_grade(compiled.shape, value)
    grade = compiled.grade(value)
    if grade.keys == 0:  # nothing that is asked for is there
        assert not grade.attempt
    else:
        assert grade.keys == pytest.approx(keys, abs=1e-12) and grade.full == pytest.approx(full, abs=1e-12)
        assert 0 < grade.full <= grade.keys <= 1 or not compiled.shape.options
    if value:
        assert grade.invented == compiled.invented_keys(value) == (invented if isinstance(value, dict | list) else 0)


@searching(400)
@given(cases())
def test_is_perfect_is_the_slow_way(case):
    schema, value = case
    compiled = compile_schema(schema)
    perfect = compiled.is_perfect(value)
    if perfect is not None and value not in ({}, []):
        assert perfect == (plain_grade(compiled.shape, value)[0] == 1 and compiled.is_valid(value))


@searching(200)
@given(cases())
def test_validity_is_json_schema(case):
    schema, value = case
    assert compile_schema(schema).is_valid(value) == jsonschema.Draft202012Validator(schema).is_valid(value)


@searching(200)
@given(cases())
def test_every_fault_has_words(case):
    schema, value = case
    compiled = compile_schema(schema)
    flawless = compiled.is_valid(value) and plain_grade(compiled.shape, value)[:2] == (1, 1)
    assert (compiled.first_error(value) is None) == flawless


@searching(100)
@given(st.data())
def test_valid_documents_are_perfect(data):
    schema = data.draw(schemas())
    value = data.draw(valid(schema))
    compiled = compile_schema(schema)
    assert compiled.is_valid(value) and compiled.is_perfect(value) is not False
    assert plain_grade(compiled.shape, value) == (1, 1, 0)
    assert not value or compiled.grade(value).keys == compiled.grade(value).full == 1


INTEGER = {"type": "integer"}
DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


@pytest.mark.parametrize(
    ("schema", "value", "keys"),
    [
        # no key is named, and none is wanted
        ({"type": "object", "properties": {}}, {"a": 1}, 0.0),
        # no key is spoken of at all
        ({"type": "object"}, {"a": 1}, 1.0),
        # a required key that is not among the properties
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["b"]}, {"b": None}, 1.0),
        # ... and has the type of all others
        ({"type": "object", "properties": {}, "required": ["b"], "additionalProperties": INTEGER}, {"b": "x"}, 0.4),
        # only patterns
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, {"x1": 1}, 1.0),
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, {"x1": 1, "y": 1}, 0.5),
        # keys that are known under a condition
        (
            {
                "type": "object",
                "properties": {"a": INTEGER},
                "required": ["a"],
                "if": {"properties": {"a": {"const": 1}}},
                "then": {"properties": {"b": INTEGER}, "required": ["b"]},
            },
            {"a": 1, "b": 2},
            1.0,
        ),
        ({"properties": {"a": INTEGER}, "dependentSchemas": {"a": {"properties": {"b": True}}}}, {"a": 1, "b": 2}, 1.0),
        ({"properties": {"a": INTEGER}, "dependencies": {"a": {"properties": {"b": {}}}}}, {"a": 1, "b": 2}, 1.0),
        # an integer written as a number
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, {"a": 1.0}, 1.0),
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, {"a": True}, 0.4),
        # arrays: positions, no more than so many, at least so many
        ({"type": "array", "prefixItems": [INTEGER, {"type": "string"}], "items": False}, [1, "a", 2], 0.5),
        ({**DRAFT_7, "type": "array", "items": [INTEGER], "additionalItems": {"type": "string"}}, [1, 2], 0.5),
        ({"type": "array", "items": INTEGER, "maxItems": 1}, [1, 2], 0.5),
        ({"allOf": [{"type": "array", "maxItems": 1}, {"maxItems": 9, "items": INTEGER}]}, [1, 2], 0.5),
        ({"type": "array", "items": INTEGER, "minItems": 3}, [1], 0.5),
        # all parts of an allOf hold for items
        ({"allOf": [{"type": "array", "items": {"type": "number"}}, {"items": {"type": "integer"}}]}, [1.5], 0.5),
        # a constant of the right type is half right, which tells alternatives apart
        ({"type": "array", "items": {"const": "a"}}, ["b"], 1 / 1.5),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, ["c"], 1.0),
        # what no value satisfies
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, {"a": 1}, 0.4),
    ],
)
def test_grade_of_odd_schemas(schema, value, keys):
    compiled = compile_schema(schema)
    grade = compiled.grade(value)
    assert grade.keys == pytest.approx(keys)
    perfect = compiled.is_perfect(value)
    assert perfect is None or perfect == (keys == 1 and compiled.is_valid(value))


def test_closing_does_not_make_alternatives_exclusive():
    first = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
    second = {"type": "object", "properties": {"b": INTEGER}}
    compiled = compile_schema({"oneOf": [first, second]})
    assert not compiled.is_valid({"a": 1}) and compiled.is_perfect({"a": 1}) is False


def test_a_key_invented_below_a_property_that_is_named_like_a_keyword():
    inner = {"type": "object", "properties": {"a": INTEGER}}
    compiled = compile_schema({"type": "object", "properties": {"default": inner, "enum": inner}, "required": ["enum"]})
    assert compiled.is_perfect({"default": {"a": 1}, "enum": {}}) is True
    for name in ("default", "enum"):
        assert compiled.is_perfect({"default": {}, "enum": {}} | {name: {"zz": 1}}) is False
        assert compiled.invented_keys({"default": {}, "enum": {}} | {name: {"zz": 1}}) == 1


def test_the_tag_of_a_union_counts():
    calls = [
        {"type": "object", "properties": {"name": {"const": n}, "x": INTEGER, "y": INTEGER}, "required": required}
        for n, required in (("f", ["name", "x", "y"]), ("g", ["name", "x"]))
    ]
    compiled = compile_schema({"anyOf": calls})
    assert compiled.grade({"name": "f", "x": 1, "y": 1}).keys == 1
    assert compiled.grade({"name": "f", "x": 1}).keys < 1  # perfect but for the name under g


def test_alternatives_of_a_recursive_schema_take_linear_time():
    options = [
        {
            "type": "object",
            "properties": {"op": {"const": op}, "of": {"$ref": "#/$defs/E"}},
            "required": ["op", "of"],
            "minProperties": 2,
        }
        for op in ("neg", "abs", "not")
    ]
    schema = {"$defs": {"E": {"anyOf": [*options, INTEGER]}}, "$ref": "#/$defs/E"}
    value: object = "wrong"
    for _ in range(60):
        value = {"op": "abs", "of": value, "zz": 1}
    compiled = compile_schema(schema)
    assert 0 < compiled.grade(value, max_values=2000).keys < 1  # 3^60 without memory
    assert compiled.invented_keys(value) == 60 and not compiled.is_valid(value)
    assert compiled.first_error(value) == "/of" * 60 + ": string where object is allowed"


@pytest.mark.parametrize("word", ["anyOf", "oneOf", "allOf"])
def test_recursion_is_explained_in_little_time(word):
    """The validator's own explanation, or its walk over a valid value for one, takes 2^60 steps here."""
    part = {"properties": {"of": {"$ref": "#/$defs/E"}}}
    schema = {"$defs": {"E": {word: [part, part | {"minProperties": 1}]}}, "$ref": "#/$defs/E", "maxProperties": 1}
    for extra in ({}, {"more": 1}):
        value: dict = {}
        for _ in range(60):
            value = {"of": value}
        compile_schema(schema).first_error(value | extra)


@pytest.mark.parametrize(
    ("schema", "value", "words"),
    [
        (
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {},
            "the document: the key 'a' is missing",
        ),
        ({"type": "array", "items": {"type": "object", "required": ["a"]}}, [{}], "/0: the key 'a' is missing"),
        ({"type": "object", "properties": {"a": INTEGER}}, {"b": 1}, "the document: the key 'b' is not in the schema"),
        ({"type": "object", "properties": {"a": INTEGER}}, {"a": "1"}, "/a: string where integer is allowed"),
        ({"type": ["object", "null"]}, [], "the document: array where null or object is allowed"),
        ({"properties": {"a": False}}, {"a": 1}, "/a: integer where nothing is allowed"),
        (
            {"type": "object", "properties": {"a": {"maximum": 1}}},
            {"a": 2},
            "/a: the value is greater than the maximum of 1",
        ),
        ({"type": "array", "items": INTEGER, "minItems": 2}, [1], "the document: 1 items"),
        ({"type": "array", "uniqueItems": True}, [1, 1], "the document: the value has non-unique elements"),
        (
            {"anyOf": [{"type": "array"}, {"type": "object", "required": ["a", "b"]}]},
            {"a": 1},
            "the document: the key 'b'",
        ),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"minProperties": 2}}},
            {"a": 1},
            "the document: a rule of the schema is broken",
        ),
        ({"type": "object"}, {"a": 1}, None),
    ],
)
def test_words(schema, value, words):
    found = compile_schema(schema).first_error(value)
    assert found == words or found.startswith(words)


def test_too_many_values():
    compiled = compile_schema({"type": "object", "properties": {"a": {"type": "array", "items": INTEGER}}})
    assert compiled.grade({"a": ["x"] * 50}, max_values=100).keys > 0
    with pytest.raises(TooManyValues):
        compiled.grade({"a": ["x"] * 200}, max_values=100)


# ------------------------------------------------------------------------------------------------------ what compiles


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Part(BaseModel):
    name: str = Field(min_length=1)
    colour: Colour
    parts: list[Part] = []


class Thing(BaseModel):
    title: str
    count: int | None = None
    part: Part


def test_pydantic_models():
    compiled = compile_schema(Thing)
    part = {"name": "a", "colour": "red", "parts": [{"name": "b", "colour": "green", "parts": []}]}
    good = {"title": "x", "count": None, "part": part}
    assert compiled.is_perfect(good) and compiled.is_valid(Thing.model_validate(good).model_dump(mode="json"))
    assert compiled.grade(good).keys == 1
    assert compiled.is_perfect(good | {"part": part | {"colour": "blue"}}) is False
    deep = json.loads(json.dumps(good))
    deep["part"]["parts"][0]["zz"] = 1
    assert compiled.is_perfect(deep) is False and compiled.invented_keys(deep) == 1


def test_files_text_and_objects(tmp_path):
    schema = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
    path = tmp_path / "true.json"
    path.write_text(json.dumps(schema), encoding="utf-8")
    for given_as in (schema, json.dumps(schema), "  " + json.dumps(schema), path, str(path)):
        assert load_schema(given_as) == schema
        assert compile_schema(given_as).is_valid({"a": 1}) and not compile_schema(given_as).is_valid({"a": "1"})
    assert compile_schema(True).is_valid(5) and not compile_schema(False).is_valid(5)
    assert compile_schema("false").grade({"a": 1}).keys == 0


def test_a_pydantic_model_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "recipes_of_mine.py").write_text(
        "from pydantic import BaseModel\nclass Recipe(BaseModel):\n    name: str\nnumber = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compile_schema("recipes_of_mine:Recipe").is_valid({"name": "soup"})
    with pytest.raises(SchemaError, match=r"recipes_of_mine:Stew cannot be imported .* check PYTHONPATH"):
        compile_schema("recipes_of_mine:Stew")
    with pytest.raises(SchemaError, match="recipes_of_mine:number is not a Pydantic model"):
        compile_schema("recipes_of_mine:number")
    with pytest.raises(SchemaError, match="is not JSON"):  # a row's schema is data: it imports nothing
        compile_text("recipes_of_mine:Recipe")


def test_a_schema_is_compiled_once(monkeypatch):
    made = []
    monkeypatch.setattr(module, "CompiledSchema", lambda schema: made.append(schema) or CompiledSchema(schema))
    texts = [json.dumps({"type": "object", "title": f"once {i}"}) for i in range(20)]
    for _ in range(3):
        for text in texts:
            assert compile_schema(text) is compile_text(text) is compile_schema(json.loads(text))
    assert len(made) == 20


def test_the_text_of_a_row_is_never_a_path(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SchemaError, match="The schema is not JSON"):
        compile_text(str(path))


@pytest.mark.parametrize(
    "dialect", ["http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"]
)
def test_older_drafts(dialect):
    schema = {
        "$schema": dialect,
        "type": "object",
        "definitions": {"n": {"type": "integer", "minimum": 1}},
        "properties": {
            "a": {"$ref": "#/definitions/n"},
            "b": {"type": "array", "items": [INTEGER, {"type": "string"}]},
        },
        "required": ["a"],
    }
    if "04" in dialect:
        schema["definitions"]["n"]["exclusiveMinimum"] = True
    compiled = compile_schema(schema)
    assert compiled.is_perfect({"a": 2, "b": [1, "x"]}) is True and compiled.is_valid({"a": 1}) == ("07" in dialect)
    assert compiled.grade({"a": 1}).full == (
        1 if "07" in dialect else (PRESENT + PRESENT + 0.75 * BOUND) / (1 + PRESENT)
    )
    assert compiled.grade({"a": 2, "b": ["x", 1]}).keys < 1


def test_references_within_the_schema():
    schema = {
        "$id": "https://example.com/schemas/a.json",
        "$defs": {"a/b %": INTEGER, "anchored": {"$anchor": "here", "type": "string"}},
        "type": "object",
        "properties": {
            "x": {"$ref": "#/$defs/a~1b%20%25"},
            "y": {"$ref": "#here"},
            "z": {"$ref": "https://example.com/schemas/a.json#/$defs/a~1b%20%25"},
        },
        "required": ["x"],
    }
    compiled = compile_schema(schema)
    assert compiled.is_valid({"x": 1, "y": "a", "z": 1}) and not compiled.is_valid({"x": 1, "z": "a"})
    assert compiled.grade({"x": 1, "y": "a"}).keys == 1 and compiled.grade({"x": "a"}).keys < 0.5


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"type": "string"}]}, {"allOf": [{"$ref": "#"}]}]
)
def test_a_schema_that_refers_to_nothing_but_itself(schema):
    compiled = compile_schema(schema)
    for value in ({"a": 1}, [1], "a", 5):
        compiled.grade(value)
        compiled.is_valid(value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"type": "int"}}}, r"invalid at /properties/a/type: .*; mend it there\."),
        ({"type": "object", "required": "a"}, r"invalid at /required: "),
        ({"properties": {"a": {"pattern": "(["}}}, r"invalid at /properties/a/pattern"),
        ({"$schema": "https://example.com/dialect"}, r"/\$schema \(https://example.com/dialect\)"),
        (
            {"properties": {"a": {"$ref": "https://example.com/b.json"}}},
            r"/properties/a/\$ref \(https://example.com/b.json\)",
        ),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, r"/properties/a/\$ref \(file:///etc/passwd\)"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, r"/properties/a/\$ref \(#/\$defs/none\)"),
        (
            "/no/such/file.json",
            r"The schema file /no/such/file.json cannot be read \(No such file or directory\); check",
        ),
        ("nul\0byte", r"cannot be read \(.*null byte\); check the path"),
        ("{", r"The schema is not JSON \(.*\); give a JSON Schema as JSON\."),
        ('{"a":' * 100_000, r"The schema is not JSON \(.*\); give"),
        ("true false", r"The schema file true false cannot be read"),
        (5, r"A schema is a JSON object or a boolean, not int; give a JSON Schema\."),
        ({"const": {1, 2}}, r"The schema is not JSON \(.*set.*\); give a JSON Schema\."),
    ],
)
def test_refused(schema, message, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(SchemaError, match=message):
        compile_schema(schema)


def test_refused_files(tmp_path):
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(SchemaError, match=r"cannot be read \(.*decode.*\); check the path"):
        compile_schema(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(SchemaError, match="not list; give a JSON Schema"):
        compile_schema(path)


def test_a_schema_that_is_nested_too_deep():
    schema: dict = INTEGER
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(SchemaError, match=r"nested too deep; simplify it|cannot be compiled|is not JSON"):
        compile_schema(schema)


def test_irregular_patterns_have_bounded_steps():
    compiled = compile_schema({"type": "object", "properties": {"a": {"pattern": r"^(a+)+\1$"}}, "required": ["a"]})
    assert compiled.is_valid({"a": "aa"}) and not compiled.is_valid({"a": "a" * 100_000 + "b"})
    assert compiled.grade({"a": "a" * 100_000 + "b"}).full < 1
