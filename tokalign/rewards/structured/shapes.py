"""What a JSON Schema says about keys and types at each place of a document: the shape that a value is graded beside.

A schema is compiled once into a graph of shapes: references and `allOf` are followed, alternatives (`anyOf`, `oneOf`)
become options with everything that stands beside them, a recursive schema becomes a cycle. Where the schema leaves a
choice (alternatives, `if`, dependencies), a value may fit several at once; `Shape.chosen` is then the shape of all that
holds for this value together, which makes a valid document perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from urllib.parse import unquote, urljoin

import jsonschema_rs

from tokalign.rewards.structured import validators

_MAX_OPTIONS = 64  # alternatives of one place in a schema; with more, that place is not graded
_MAX_SHAPES = 10_000
_NAMES = {str: "string", bool: "boolean", int: "integer", dict: "object", list: "array", type(None): "null"}
OBJECT_WORDS = {"properties", "required", "patternProperties", "additionalProperties", "propertyNames"}
ARRAY_WORDS = {"items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"}
_SCALAR_WORDS = set(
    "enum const minimum maximum exclusiveMinimum exclusiveMaximum multipleOf "
    "minLength maxLength pattern format not".split()
)
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")  # by name
_SCHEMAS = set(
    "not if then else allOf anyOf oneOf items additionalItems prefixItems contains unevaluatedItems "
    "additionalProperties unevaluatedProperties propertyNames contentSchema".split()
)
DATA = ("enum", "const", "default", "examples")  # values, not schemas
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_FOLLOWED = (*_REFERENCES, "allOf")
_SILENT = {*_FOLLOWED, "$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default"}
_ADDRESSES = {"$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor"}
_CHOICES = frozenset("anyOf oneOf if then else dependentSchemas dependencies".split())
_KEY_WORDS = OBJECT_WORDS | _CHOICES | {"dependentRequired"}  # that may name keys
# The draft that introduced a word: the validator ignores it in a schema of an older one.
_SINCE = {
    6: ("const", "contains", "propertyNames"),
    7: ("if", "then", "else"),
    2019: ("dependentSchemas", "dependentRequired", "unevaluatedProperties", "$anchor", "$recursiveRef"),
    2020: ("prefixItems", "$dynamicRef", "$dynamicAnchor"),
}
# Stands for what the grade cannot follow. Its keys are not known, so none is invented.
_OPEN = {"additionalProperties": True}


@dataclass(eq=False)
class Shape:
    """Keys and types that a place in a document may have.

    Attributes:
        allowed: JSON types allowed; None allows all.
        types: the same, but where the schema names no type, the one that its other words speak of (`properties` of an
            object): what a document should be.
        properties, required, patterns: known keys, those that must be there, and patterns of further known keys.
        matched: shape of a key from the patterns that it matches.
        additional: shape of other keys where the schema gives one; None makes them invented.
        items, prefix, min_items, max_items: of an array.
        empty: no object or array of this shape holds anything.
        options: alternatives; a shape with options has nothing else.
        chosen: gives the shape of all that holds for a value where the schema leaves a choice; None where it leaves
            none.
        bounds: validator of what the schema says about scalars beyond their type.
        constant: the bounds allow one value alone. Another value of its type has half the credit (`grading.BOUND`), by
            which alternatives are told apart.
        perfect: validator that passes an object or array only if it has no fault; None where there is none.
    """

    allowed: frozenset[str] | None = None
    types: frozenset[str] | None = None
    properties: dict[str, Shape] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    patterns: dict[str, Any] = field(default_factory=dict)
    matched: Any = None
    additional: Shape | None = None
    items: Shape | None = None
    prefix: list[Shape] = field(default_factory=list)
    min_items: int = 0
    max_items: int | None = None
    empty: bool = False
    options: list[Shape] = field(default_factory=list)
    chosen: Callable[[Any], Shape | None] | None = None
    bounds: Any = None
    constant: bool = False
    perfect: Any = None

    def known(self, key: str) -> Shape | None:
        """Shape of a key, None for an invented one."""
        if key in self.properties:
            return self.properties[key]
        if self.patterns:
            found = tuple(pattern for pattern, test in self.patterns.items() if test.is_valid(key))
            if found:
                return self.matched(found)
        return self.additional

    def item(self, index: int) -> Shape:
        """Shape of an array's item."""
        return self.prefix[index] if index < len(self.prefix) else self.items or ANY


ANY = Shape()
ANY.additional = ANY


class ShapeCompiler:
    """Turns a schema and what it refers to into shapes; a recursive schema becomes a cyclic graph of them.

    Args:
        root: a schema that the validator has compiled.
        parts: (JSON pointer, schema) of it and of every schema within it (`subschemas`).
        closed: validators of its closed copy, which pass what is perfect alone; None where there is none.
        formats: checks that its validators need (`validators.own_formats`).
    """

    def __init__(
        self,
        root: dict[str, Any] | bool,
        parts: list[tuple[str, dict[str, Any]]],
        closed: jsonschema_rs.ValidatorMap | None,
        formats: Mapping[str, Any],
    ):
        self.root = root
        self.formats = formats
        # Whether a value may fit several alternatives, or a key several patterns: then the closed copy refuses what
        # each of them alone does not name, though all together do.
        self.overlapping = False
        self.pointers = {id(part): at for at, part in parts}
        self.perfect = {} if closed is None else {id(part): closed.get(at) for at, part in parts}
        self.dialect = {"$schema": root["$schema"]} if isinstance(root, dict) and "$schema" in root else {}
        self.draft = validators.draft(root)
        self.unknown = {word for since, words in _SINCE.items() if since > self.draft for word in words}
        self.unknown |= {"$recursiveRef"} if self.draft == 2020 else set()
        self.made: dict[tuple[int, ...], Shape] = {}
        self.filling: list[Shape] = []
        self.without_: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}  # kept: a part is known by its id
        self.conditions: dict[int, dict[str, Any]] = {}
        # the address that each schema's references start from, and what stands at each address
        self.bases: dict[int, str] = {}
        self.addresses: dict[str, Any] = {"": root}
        self.dynamic: dict[str, list[Any]] = {}
        if any(_ADDRESSES & part.keys() for _, part in parts):
            self._index(root, "")

    def shape(self, schemas: tuple[Any, ...]) -> Shape:
        """Shape of a place that all of `schemas` describe."""
        # Schemas with the same parts describe the same place. A shape is known before it is filled, so that a recursive
        # schema finds itself there and becomes a cycle.
        seen: set[int] = set()
        parts = {id(part): part for schema in schemas for part in self._parts(schema, seen)}
        key = tuple(parts)
        if key in self.made:
            return self.made[key]
        # Alternatives below alternatives multiply. A place beyond the bound is not graded: full validation alone judges
        # it.
        if len(self.made) >= _MAX_SHAPES:
            return ANY
        shape = self.made[key] = Shape()
        if len(schemas) == 1:
            shape.perfect = self.perfect.get(id(schemas[0]))
        self.filling.append(shape)
        self._fill(shape, list(parts.values()))
        self.filling.pop()
        return shape

    def _parts(self, schema: Any, seen: set[int]) -> list[Any]:
        """A schema, what it refers to, and the members of its `allOf`: all hold at the same place."""
        if not isinstance(schema, dict):
            return [] if schema is not False else [schema]
        if not schema or id(schema) in seen:
            return []
        seen.add(id(schema))
        if self.draft < 2019 and "$ref" in schema:  # what stands beside it is ignored
            return self._parts(self._target("$ref", schema), seen)
        # a part as the validator reads it, without the words that its draft does not know
        later = tuple(sorted(self.unknown & schema.keys()))
        schema = self._without(schema, later) if later else schema
        parts = [schema] if schema.keys() - _SILENT else []
        for word in _REFERENCES:
            if isinstance(schema.get(word), str):
                parts += self._parts(self._target(word, schema), seen)
        for member in schema.get("allOf", ()):
            parts += self._parts(member, seen)
        return parts

    # ------------------------------------------------------------------------------------------------------ references

    def _index(self, schema: Any, base: str) -> None:
        """Note the addresses in a schema that stands below the address `base`."""
        if isinstance(schema, list):
            for item in schema:
                self._index(item, base)
        if not isinstance(schema, dict):
            return
        if not (self.draft < 2019 and "$ref" in schema):
            name = schema.get("id" if self.draft == 4 else "$id")
            if isinstance(name, str):
                address, _, anchor = name.partition("#")  # old drafts write an anchor so
                if address:
                    base = urljoin(base, address)
                    self.addresses.setdefault(base, schema)
                if anchor and self.draft < 2019:
                    self.addresses.setdefault(f"{base}#{anchor}", schema)
            for word in {"$anchor", "$dynamicAnchor"} - self.unknown:
                if isinstance(schema.get(word), str):
                    self.addresses.setdefault(f"{base}#{schema[word]}", schema)
                    if word == "$dynamicAnchor":
                        self.dynamic.setdefault(schema[word], []).append(schema)
            if schema.get("$recursiveAnchor") is True:
                self.dynamic.setdefault("", []).append(schema)
        self.bases[id(schema)] = base
        for word, item in schema.items():  # what stands under a word that is not known has no address
            if word in NAMED and isinstance(item, dict):
                self._index([*item.values()], base)
            elif word in _SCHEMAS:
                self._index(item, base)

    def _target(self, word: str, schema: dict[str, Any]) -> Any:
        """What a reference of `schema` means: never anything outside the root."""
        base = self.bases.get(id(schema), "")
        address, _, fragment = schema[word].partition("#")
        address, fragment = urljoin(base, address) if address else base, unquote(fragment)
        named = fragment and not fragment.startswith("/")
        target = self.addresses.get(f"{address}#{fragment}" if named else address, _OPEN)
        # Which of several dynamic anchors holds depends on the way by which the validator came here.
        anchors = [] if word == "$ref" else self.dynamic.get(fragment, [])
        if len(anchors) > 1 and any(one is target for one in anchors):
            return _OPEN
        for step in fragment[1:].split("/") if fragment and not named else ():
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and step.isdigit() and int(step) < len(target):
                target = target[int(step)]
            elif isinstance(target, dict) and step in target:
                target = target[step]
            else:
                return _OPEN
        return target

    # --------------------------------------------------------------------------------------------------------- choices

    def _chosen(self, parts: list[Any], made: dict[tuple[int, ...], Shape], value: Any) -> Shape | None:
        """Shape of all that holds for an object or array together; None where it fits no alternative.

        That is what stands beside the choices, and each schema that they come to for this value. `made` remembers it.
        """
        holding: list[Any] = []
        for part in parts:
            for word in ("anyOf", "oneOf"):
                if word in part:
                    fitting = [branch for branch in part[word] if self._fits(branch, value)]
                    if not fitting:
                        return None
                    holding += fitting
            if "if" in part:
                met = self._fits(part["if"], value)
                holding += [part[word] for word in (("if", "then") if met else ("else",)) if word in part]
            if isinstance(value, dict):
                holding += [schema for key, schema in _dependent(part) if key in value]
        key = tuple(map(id, holding))
        if key not in made:
            if len(self.made) >= _MAX_SHAPES:
                return None
            made[key] = self.shape((*(self._without(part, (*_FOLLOWED, *_CHOICES)) for part in parts), *holding))
        return made[key]

    def _are_exclusive(self, branches: list[Any]) -> bool:
        """Whether no object or array can fit two of the branches, as far as their types and constants tell."""
        tags: list[dict[str, set[str]]] = []
        for branch in branches:
            parts = self._parts(branch, set())
            types = frozenset() if False in parts else _types(parts)
            if types is not None and not types & {"object", "array"}:
                continue
            required = {name for part in parts for name in part.get("required", ())}
            tags.append({name: values for name in required if (values := self._constants(parts, name))})
        # a key that each of them requires, with constants of its own
        return len(tags) < 2 or any(
            all(name in tag for tag in tags)
            and sum(len(tag[name]) for tag in tags) == len(set.union(*(tag[name] for tag in tags)))
            for name in tags[0]
        )

    def _constants(self, parts: list[Any], name: str) -> set[str]:
        """The texts that a key may have; empty where it may have others."""
        for schema in _schemas_of_key(parts, name, ()):
            for part in self._parts(schema, set()):
                values = part and ([part["const"]] if "const" in part else part.get("enum"))
                if values and all(isinstance(value, str) for value in values):
                    return set(values)
        return set()

    def _fits(self, schema: Any, value: Any) -> bool:
        if not isinstance(schema, dict):
            return schema is True
        validator = self._validators.get(self.pointers.get(id(schema), ""))
        return validator is not None and validator.is_valid(value)

    @cached_property
    def _validators(self) -> jsonschema_rs.ValidatorMap:
        return validators.validator_map(self.root, self.formats)

    def _conditional(self, schema: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
        """Parts of a schema and of every choice in it, whatever holds."""
        for part in self._parts(schema, seen):
            if part is not False:
                yield part
                branches = [*part.get("anyOf", ()), *part.get("oneOf", ())]
                for inner in (*branches, *_conditions(part)):
                    yield from self._conditional(inner, seen)

    # --------------------------------------------------------------------------------------------------------- filling

    def _fill(self, shape: Shape, parts: list[Any]) -> None:
        # `false` holds for nothing, so no type is right here.
        if any(part is False for part in parts):
            shape.allowed = shape.types = frozenset()
            return
        words: set[str] = set().union(*parts)
        chosen = partial(self._chosen, list(parts), {})
        for part in parts if words & {"anyOf", "oneOf"} else ():
            for word in ("anyOf", "oneOf"):
                branches = part.get(word)
                if isinstance(branches, list) and len(branches) > _MAX_OPTIONS:
                    parts = [*parts, _OPEN]
                elif isinstance(branches, list):
                    several = word == "anyOf" and not self._are_exclusive(branches)
                    self.overlapping = self.overlapping or several
                    # What stands beside the alternatives holds for each of them. References and `allOf` have been
                    # followed into parts of their own already; followed again here they might never end.
                    others = [self._without(p, (*_FOLLOWED, word) if p is part else _FOLLOWED) for p in parts]
                    options: list[Shape] = []
                    for branch in branches:
                        option = self.shape((*others, branch))
                        if option not in self.filling:  # an alternative to itself says nothing
                            options += option.options or [option]
                        # alternatives within this one are options here, but for what they come to together
                        nested = bool(option.options) and option.chosen is not None
                        several = several or nested or option in self.filling
                    shape.chosen = chosen if several else None
                    if len(options) <= _MAX_OPTIONS:
                        shape.options = options
                    else:
                        shape.additional = shape  # anything goes
                    return
        shape.chosen = chosen if words & _CHOICES else None
        shape.allowed = _types(parts)
        shape.types = shape.allowed if shape.allowed is not None else _spoken_of(parts)
        outer, self.filling = self.filling, []  # below a key or an item, an alternative may well be met again
        if words & _KEY_WORDS:
            self._fill_object(shape, parts)
        shape.additional = self._additional(parts)
        if words & ARRAY_WORDS:
            self._fill_array(shape, parts)
        self.filling = outer
        shape.empty = _is_empty(shape, parts)
        # The library judges what remains to be said of scalars, in one validator for all parts.
        if words & _SCALAR_WORDS:
            bounds = [{key: item for key, item in part.items() if key in _SCALAR_WORDS} for part in parts]
            try:
                shape.bounds = validators.validator({**self.dialect, "allOf": bounds}, self.formats)
                shape.constant = any("const" in part or len(part.get("enum", ())) == 1 for part in parts)
            except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
                shape.bounds = None  # `not` with a reference: left to the full validation

    def _fill_object(self, shape: Shape, parts: list[Any]) -> None:
        patterns = {pattern for part in parts for pattern in part.get("patternProperties", ())}
        shape.patterns = {pattern: validators.validator({"pattern": pattern}) for pattern in sorted(patterns)}
        names: dict[str, list[Any]] = {}
        for part in parts:
            for name in part.get("properties", ()):
                if name not in names:
                    matched = tuple(pattern for pattern, test in shape.patterns.items() if test.is_valid(name))
                    names[name] = _schemas_of_key(parts, name, matched)
            shape.required = tuple(dict.fromkeys((*shape.required, *part.get("required", ()))))
        self.overlapping = self.overlapping or (bool(patterns) and len(patterns) + len(names) > 1)
        # Keys that are known under a condition: `chosen` and the full validation say whether they are right.
        seen: set[int] = set()
        for part in parts if shape.chosen is not None or any("dependentRequired" in part for part in parts) else ():
            conditional = [one for schema in _conditions(part) for one in self._conditional(schema, seen)]
            under = [name for one in conditional for word in ("properties", "required") for name in one.get(word, ())]
            for word in ("dependentRequired", "dependencies"):
                under += [name for keys in part.get(word, {}).values() if isinstance(keys, list) for name in keys]
            for name in under:
                names.setdefault(name, [True])
        shape.properties = {name: self.shape(tuple(schemas)) for name, schemas in names.items()}
        if patterns:
            known = {(pattern,): self._of_patterns(parts, (pattern,)) for pattern in shape.patterns}
            shape.matched = lambda found: known.get(found) or known.setdefault(found, self._of_patterns(parts, found))

    def _of_patterns(self, parts: list[Any], matched: tuple[str, ...]) -> Shape:
        return self.shape(tuple(_schemas_of_key(parts, None, matched)))

    def _fill_array(self, shape: Shape, parts: list[Any]) -> None:
        positions: list[tuple[list[Any], Any]] = []  # (schemas of the first items, schema of the others) of each part
        most = [int(part["maxItems"]) for part in parts if "maxItems" in part]
        for part in parts:
            shape.min_items = max(shape.min_items, int(part.get("minItems", 0)))
            prefix, rest = part.get("prefixItems", []), part.get("items")
            if isinstance(rest, list):  # drafts before 2020-12
                prefix, rest = rest, part.get("additionalItems")
            if rest is False:
                most.append(len(prefix))
            if prefix or isinstance(rest, dict):
                positions.append((prefix, rest if isinstance(rest, dict) else True))
        # items that `contains` looks for may have its keys
        if positions:
            for part in parts:
                if isinstance(part.get("contains"), dict):
                    condition = self.conditions.setdefault(id(part["contains"]), {"if": part["contains"]})
                    positions.append(([], condition))
        longest = max((len(prefix) for prefix, _ in positions), default=0)
        shape.prefix = [
            self.shape(tuple(prefix[i] if i < len(prefix) else rest for prefix, rest in positions))
            for i in range(longest)
        ]
        shape.max_items = min(most, default=None)
        rests = tuple(rest for _, rest in positions if rest is not True)
        shape.items = self.shape(rests) if rests else None

    def _without(self, part: Any, words: tuple[str, ...]) -> Any:
        """A part less some words, the same object each time: shapes are found again by the ids of their parts."""
        if not any(word in part for word in words):
            return part
        key = (id(part), words)
        if key not in self.without_:
            self.without_[key] = {k: v for k, v in part.items() if k not in words}
            if id(part) in self.bases:
                self.bases[id(self.without_[key])] = self.bases[id(part)]
        return self.without_[key]

    def _additional(self, parts: list[Any]) -> Shape | None:
        # JSON Schema allows keys that a schema does not speak of; the grade does not. Else an answer could be padded
        # with keys of its own at no cost. Only a schema that says what further keys hold lets them in.
        given = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
        if not given:
            given = [part["unevaluatedProperties"] for part in parts if "unevaluatedProperties" in part]
            # of several, one within another holds before it: which is left to the validation
            given = [True] if len(given) > 1 and any(given) else given
        if any(schema is False for schema in given):
            return None
        if given:
            return self.shape(tuple(given))
        # an object of which no key is named may hold any
        return None if any("properties" in part or "patternProperties" in part for part in parts) else ANY


def _dependent(part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, schema that holds where it is there)."""
    for word in ("dependentSchemas", "dependencies"):
        for key, schema in part.get(word, {}).items():
            if isinstance(schema, dict | bool):
                yield key, schema


def _conditions(part: dict[str, Any]) -> list[Any]:
    """Schemas that hold at the same place under a condition."""
    return [part[word] for word in ("if", "then", "else") if word in part] + [schema for _, schema in _dependent(part)]


def _schemas_of_key(parts: list[Any], name: str | None, matched: tuple[str, ...]) -> list[Any]:
    """What the parts say of a key with a name, which matches some patterns: each by these, else as of any other key."""
    schemas: list[Any] = []
    for part in parts:
        properties, patterns = part.get("properties", {}), part.get("patternProperties", {})
        own = [properties[name]] if name in properties else []
        own += [patterns[pattern] for pattern in matched if pattern in patterns]
        # `false` for all others is left to the validation: another part knows the key
        if not own and isinstance(part.get("additionalProperties"), dict):
            own = [part["additionalProperties"]]
        schemas += own
    return schemas


def _is_empty(shape: Shape, parts: list[Any]) -> bool:
    """Whether no document of this shape holds anything."""
    values = [part["enum"] if "enum" in part else [part["const"]] for part in parts if {"enum", "const"} & part.keys()]
    if any(not any(value for value in some if isinstance(value, dict | list)) for some in values):
        return True
    keys = shape.required or shape.patterns or shape.additional is not None
    keys = keys or any(child.allowed != frozenset() for child in shape.properties.values())
    objects = keys and not any(part.get("maxProperties") == 0 for part in parts)
    holding = {kind for kind, full in (("object", objects), ("array", shape.max_items != 0)) if full}
    return not holding if shape.allowed is None else not holding & shape.allowed


def _types(parts: list[Any]) -> frozenset[str] | None:
    # all parts hold, so a type must be allowed by each
    allowed: frozenset[str] | None = None
    for part in parts:
        types = part.get("type")
        if types is None:
            if "const" in part:
                types = [type_of(part["const"])]
            elif isinstance(part.get("enum"), list):
                types = [type_of(value) for value in part["enum"]]
            else:
                continue
        now = frozenset([types] if isinstance(types, str) else types)
        if "number" in now:
            now |= {"integer"}
        allowed = now if allowed is None else allowed & now
    return allowed


def _spoken_of(parts: list[Any]) -> frozenset[str] | None:
    # Of parts that name no type. Words of a type say nothing of values of another type, so nothing is refused by this:
    # it is for readers, and for the question whether a document was an attempt.
    for words, kind in ((OBJECT_WORDS, "object"), (ARRAY_WORDS, "array")):
        if any(words & part.keys() for part in parts):
            return frozenset([kind])
    return None


def type_of(value: Any) -> str:
    """JSON type of a value; a number without a fraction is an integer, as JSON Schema has it."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return _NAMES[type(value)]


def subschemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(JSON pointer, schema) of a schema and of every schema within it."""
    if isinstance(schema, list):
        for index, item in enumerate(schema):
            yield from subschemas(item, f"{pointer}/{index}")
    elif isinstance(schema, dict):
        yield pointer, schema
        for word, item in schema.items():
            if word in NAMED and isinstance(item, dict):
                for name, member in item.items():
                    yield from subschemas(member, f"{pointer}/{word}/{name.replace('~', '~0').replace('/', '~1')}")
            elif word not in DATA:
                yield from subschemas(item, f"{pointer}/{word}")
