"""Whether tool calls are right, by lists of allowed values, as the Berkeley Function-Calling Leaderboard has it.

A reference is one call, or a list of calls whose order is free:

    {"name": …, "arguments": {argument: [allowed value, …]}, "types": …, "required": …, "language": …}

"" among the values lets the argument be left out. In an allowed object every value is such a list too. The last three
keys may be missing: "types" names the declared type of each argument as the leaderboard does (`PYTHON`; of a container
`[type, type of its items]`), "required" the arguments that may not be left out although "" is among their values, and
"language" ("java", "javascript") says that arguments are source text (`tokalign.rewards.structured.literals`).

`calls_match` is the leaderboard's AST accuracy, the figure `exact_match`:

- There are as many calls as in the reference. Each of the reference, in its order, takes the first call that fits it
  and that none before it took.
- A call fits if its name is the reference's, no argument is unknown and none is missing that may not be left out.
- A value has exactly the declared type (True is no integer; a whole number passes for a float), or the type of the
  first allowed value: then it is taken for a variable's name or the like, and must equal an allowed value.
- Strings are compared without case, spaces and the signs , . / - _ * ^, and ' is ".
- An array equals an allowed one item by item, its strings compared as above; each item has the declared type of items
  or that of the first item of an allowed array. As an array of no items and as a string of no letters, "" is a value.
- An object has known keys with allowed values, and lacks only keys that may be left out; an array of objects is such
  objects in the allowed order.

`AllowedAligner` is its graded form for the reward: which arguments are right, over calls matched as well as they can
be. Without a declared type, and for the grade, a value is right if it equals an allowed one as JSON (1.0 is 1, at any
depth), its strings compared as above.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokalign.rewards.structured.alignment import (
    MISTYPED,
    Aligner,
    CallAligner,
    Part,
    align,
    below,
    mistyped,
    target_of,
)
from tokalign.rewards.structured.content import equal
from tokalign.rewards.structured.literals import read_literal
from tokalign.rewards.structured.shapes import Shape

PYTHON: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_OTHERS: dict[str, type] = {
    **dict.fromkeys(("byte", "short", "integer", "long", "Bigint"), int),
    **dict.fromkeys(("float", "double"), float),
    **dict.fromkeys(("boolean", "Boolean"), bool),
    **dict.fromkeys(("char", "String", "any"), str),
    **dict.fromkeys(("Array", "ArrayList", "array", "Queue", "Stack"), list),
    **dict.fromkeys(("HashMap", "Hashtable", "dict"), dict),
}
_KEYS = {"name", "arguments", "types", "required", "language"}
_IN_PARTS = 0.9  # most that an array or object earns which is not right as a whole
_IGNORED = re.compile(r"[ ,./\-_*^]")

Reference = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def is_allowed_reference(reference: Any) -> bool:
    """Whether a parsed reference has the form that the top of this file describes."""
    calls = reference if isinstance(reference, list) and reference else [reference]
    return all(
        isinstance(call, dict)
        and {"name", "arguments"} <= call.keys() <= _KEYS
        and isinstance(call["arguments"], dict)
        and all(isinstance(values, list) for values in call["arguments"].values())
        for call in calls
    )


def calls_match(value: Any, reference: Reference) -> bool:
    """Whether the calls of a completion are right by the leaderboard's AST accuracy.

    Args:
        value: a call `{"name": …, "arguments": {…}}`, or a list of them.
        reference: see the top of this file.
    """
    given, wanted = _listed(value), _listed(reference)
    if len(given) != len(wanted):
        return False
    left = list(given)
    for one in wanted:
        index = next((i for i, call in enumerate(left) if _fits(call, one)), None)
        if index is None:
            return False
        del left[index]
    return True


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _arguments(call: Any, reference: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arguments of a call of the function that the reference names; None for anything else."""
    if not isinstance(call, dict) or call.get("name") != reference["name"]:
        return None
    arguments = call.get("arguments")
    return arguments if isinstance(arguments, dict) else None


def _fits(call: Any, reference: Mapping[str, Any]) -> bool:
    arguments, allowed = _arguments(call, reference), reference["arguments"]
    return (
        arguments is not None
        and all(key in arguments for key in reference.get("required", ()))
        and all(key in arguments or "" in values for key, values in allowed.items())
        and all(key in allowed and _right(value, key, reference) for key, value in arguments.items())
    )


class AllowedAligner(CallAligner):
    """Of calls with a reference of allowed values: the function's name and each argument are leaves.

    An argument has credit 1 if its value is right, `alignment.MISTYPED` if it spells an allowed one. An array or object
    that is not right has `_IN_PARTS` of the share of it that is. Any other value has 0. An argument that may be left
    out counts only where it is wrong; one that the reference does not know is invented.
    """

    @staticmethod
    def part(reference: Any, shape: Shape | None) -> Part:
        calls: Any = [{"name": call["name"], "arguments": {}} for call in _listed(reference)]
        plain = Aligner.part(calls if isinstance(reference, list) else calls[0], shape)
        parts = []
        for call, one in zip(_listed(reference), plain.items or [plain], strict=True):
            name = (one.keys or {"name": one})["name"]
            size = name.size + sum([_needed(key, call) for key in call["arguments"]])
            parts.append(Part(call, size, False, {"name": name}))
        if not isinstance(reference, list):
            return parts[0]
        return Part(reference, sum([part.size for part in parts]), False, None, parts)

    @staticmethod
    def same(value: Any, part: Part) -> bool:
        return False  # a reference is no document

    @staticmethod
    def forms(part: Part) -> list[Any]:
        name, allowed = part.value["name"], part.value["arguments"]
        first = {key: next((each for each in values if each != ""), "") for key, values in allowed.items()}
        needed = {key: each for key, each in first.items() if _needed(key, part.value)}
        return [{"name": name, "arguments": arguments} for arguments in (first, needed)]

    def call(self, value: Any, part: Part, at: str | None, given: str | None) -> float:
        reference = part.value
        arguments, allowed = _arguments(value, reference), reference["arguments"]
        if arguments is None:
            named = isinstance(value, dict) and "name" in value
            self._lost_call(part, at, below(given, "name") if named else None, given)
            return 0.0
        begin = len(self.leaves or ())
        credit, invented = 0.0, 0.0
        if part.keys and part.keys["name"].size:
            credit = 1.0
            self.note(below(at, "name"), below(given, "name"), 1.0, "value")
        at, given = below(at, "arguments"), below(given, "arguments")
        for key, argument in arguments.items():
            if key in allowed:
                own, weight = _credit(argument, key, reference), 1.0
                if _needed(key, reference):
                    credit += own
                else:
                    # Leaving it out is as right as a right value, which therefore pays nothing: else a guess of what
                    # may be anything (either truth value, say) would raise the share. What is wrong is an invention.
                    own, weight = float(own == 1.0), 1.0 - own
                    invented += weight
                self.note(below(at, key), below(given, key), own, "value", weight)
            else:
                invented += 1
                self.note(below(given, key), below(given, key), 0.0, "invented")
        for key in allowed:
            if key not in arguments and _needed(key, reference):
                self.note(below(at, key), None, 0.0, "missing", 1, given)
        return self.diluted(credit, part.size, invented, begin) if invented else credit

    def lost(self, part: Part, at: str | None, given: str | None, parent: str | None) -> None:
        self._lost_call(part, at, given, parent)

    def _lost_call(self, part: Part, at: str | None, name: str | None, parent: str | None) -> None:
        """Note the leaves of a call without credit: missing in `parent`, but for its name if another stands for it."""
        if part.keys and part.keys["name"].size:
            kind = "missing" if name is None else "value"
            self.note(below(at, "name"), name, 0.0, kind, 1, parent if name is None else None)
        for key in part.value["arguments"]:
            if _needed(key, part.value):
                self.note(below(below(at, "arguments"), key), None, 0.0, "missing", 1, parent)


def _needed(key: str, reference: Mapping[str, Any]) -> bool:
    return key in reference.get("required", ()) or "" not in reference["arguments"][key]


def _credit(value: Any, key: str, reference: Mapping[str, Any]) -> float:
    allowed = reference["arguments"][key]
    if _right(value, key, reference) or any(_is_allowed(value, one) for one in allowed):
        return 1.0
    return _best(value, allowed)


# ------------------------------------------------------------------------------------- arrays and objects, in parts


def _best(value: Any, allowed: list[Any]) -> float:
    """Credit of a value that is not right, by the allowed one that it comes nearest to."""
    if isinstance(value, list | dict):
        # The rest is for a value that is right as a whole, by its declared type too.
        return _IN_PARTS * max((_parts(value, one) for one in allowed), default=0.0)
    return MISTYPED if any(mistyped(value, one) for one in allowed) else 0.0


def _parts(value: Any, one: Any) -> float:
    """Share of an array or object that is right, by the rules of the alignment; 0 of two kinds."""
    if isinstance(value, list) and isinstance(one, list):
        return align(value, target_of(_first_allowed(one))).share
    if not isinstance(value, dict) or not isinstance(one, dict):
        return 0.0
    lists = _alternatives(one)
    known = value.keys() & lists.keys()
    size = len(known) + sum(key not in value and "" not in values for key, values in lists.items())
    credit = sum(
        [
            1.0 if any(_is_allowed(value[key], each) for each in lists[key]) else _best(value[key], lists[key])
            for key in sorted(known)
        ]
    )
    return credit / max(size + len(value) - len(known), 1)


def _first_allowed(one: Any) -> Any:
    """An allowed value with its objects as plain ones: of each key the first value."""
    if isinstance(one, list):
        return [_first_allowed(item) for item in one]
    if not isinstance(one, dict):
        return one
    first = {key: next((each for each in values if each != ""), "") for key, values in _alternatives(one).items()}
    return {key: _first_allowed(each) for key, each in first.items()}


def _alternatives(one: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The allowed values of each key of an object; of one that holds plain values, those alone."""
    plain = not all(isinstance(values, list) for values in one.values())
    return {key: [values] if plain else values for key, values in one.items()}


# ------------------------------------------------------------------------------------------- values, by declared type


def _right(value: Any, key: str, reference: Mapping[str, Any]) -> bool:
    """Whether an argument's value is right by the leaderboard's rules."""
    allowed, kind = reference["arguments"][key], reference.get("types", {}).get(key)
    if kind is None:
        return any(_is_allowed(value, one) for one in allowed)
    outer, inner = kind if isinstance(kind, list) else (kind, None)
    language = reference.get("language")
    if language is None:
        types = PYTHON
        if outer == "float" and type(value) is int:
            value = float(value) if abs(value) < 2**1023 else value
    else:
        if not isinstance(value, str):
            return False
        types, value = _OTHERS, read_literal(value, kind, language)
        inner = None if inner == "any" else inner  # such items were read by their look
    if outer not in types:
        return any(_is_allowed(value, one) for one in allowed)
    return _typed_right(value, allowed, types[outer], types.get(inner) if inner else None)


def _typed_right(value: Any, allowed: list[Any], expected: type, items: type | None) -> bool:
    given, first = type(value), _first_type(allowed)
    if given is not expected:
        # a variable, written as its name where another type is declared: only an equal value is right
        return given is first and value in allowed
    if items is not None and not any(_items_typed(value, one, items) for one in allowed):
        return False
    if first is not None and first is not expected:
        return value in allowed
    if expected is dict:
        return any(_object_right(value, one) for one in allowed)
    if expected is list and items is dict:
        return any(_objects_right(value, one) for one in allowed)
    if expected is list:
        plain = _plain_items(value)
        return any(plain == ([] if one == "" else _plain_items(one)) for one in allowed if isinstance(one, str | list))
    if expected is str:
        return standard(value) in [standard(one) for one in allowed if isinstance(one, str)]
    return value in allowed


def _first_type(allowed: Any) -> type | None:
    """Type of the first allowed value that is not the sign for a missing one."""
    return next((type(one) for one in allowed if one != ""), None)


def _items_typed(value: list[Any], one: Any, items: type) -> bool:
    return not isinstance(one, list) or all(type(item) in (items, _first_type(one)) for item in value)


def standard(text: str) -> str:
    """A string as the leaderboard compares it: without case, spaces and most punctuation."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _plain(value: Any) -> Any:
    return standard(value) if isinstance(value, str) else value


def _plain_items(value: list[Any] | str) -> list[Any]:
    return [_plain(item) for item in value]


def _object_right(value: Any, one: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(value, dict):
        return False
    lists = {key: values if isinstance(values, list) else [values] for key, values in one.items()}
    return all(key in lists and _plain(item) in _plain_items(lists[key]) for key, item in value.items()) and all(
        key in value or "" in values for key, values in lists.items()
    )


def _objects_right(value: list[Any], one: Any) -> bool:
    if one == "":
        return not value
    return isinstance(one, list) and len(one) == len(value) and all(map(_object_right, value, one))


# ---------------------------------------------------------------------------------------------------- values, as JSON


def _is_allowed(value: Any, allowed: Any) -> bool:
    """Whether a value equals an allowed one as JSON; objects in `allowed` hold lists of allowed values."""
    if isinstance(allowed, dict) and isinstance(value, dict):
        if not all(isinstance(values, list) for values in allowed.values()):
            return equal(value, allowed)  # an object of plain values, not of lists of allowed ones
        return all(
            any(_is_allowed(value[key], one) for one in allowed.get(key, ())) if key in value else "" in allowed[key]
            for key in allowed.keys() | value.keys()
        )
    if isinstance(allowed, list) and isinstance(value, list):
        return len(value) == len(allowed) and all(map(_is_allowed, value, allowed))
    if isinstance(allowed, str) and isinstance(value, str):
        return standard(value) == standard(allowed)
    return equal(value, allowed)
