"""Texts that have cost somebody minutes, gigabytes or a process, and sound documents at the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

SCHEMA: dict[str, Any] = {  # of the hostile documents
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^(a+)+$"},
        "code": {"type": "string", "pattern": r"(a+)+\1b"},
        "count": {"type": "integer", "minimum": 0, "multipleOf": 3},
        "price": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "next": {"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/other"}]},
        "any": {},
    },
    "required": ["name", "count"],
    "$defs": {
        "other": {
            "type": "object",
            "properties": {"name": {"const": "other"}, "count": {"type": "integer"}, "next": {"$ref": "#"}},
            "required": ["name", "next"],
        }
    },
}
GOOD = {"name": "aaa", "count": 3}


def hostile() -> Iterator[tuple[str, str]]:
    """(name, completion): what has cost somebody minutes, gigabytes or a process, as large as is read and larger."""
    cap, name = 1 << 18, '{"name": "aaa", "count": 3, '
    yield "deep", "[" * 100_000
    yield "deep objects", '{"a":' * (cap // 5)
    yield "deep alternatives", (name + '"zz": 1, "next": ') * 63 + "{}" + "}" * 63
    yield "50 MB", '{"name": "' + "a" * 50_000_000 + '"}'
    yield "regular pattern", '{"count": 3, "name": "' + "a" * (cap - 40) + 'b"}'
    yield "backreference", '{"count": 3, "name": "a", "code": "' + "a" * (cap - 60) + '"}'
    yield "NaN", name + '"price": NaN}'
    yield "infinity", name + '"price": 1e999}'
    yield "digits", name + '"price": ' + "9" * 100_000 + "}"
    yield "repeated keys", "{" + '"a": 1,' * 9_000 + '"a": 1}'
    yield "escaped surrogates", '{"name": "' + "\\ud800" * 40_000 + '"}'
    yield "surrogates", '{"name": "' + "\ud800" * 40_000 + '"}'
    yield "empty containers", name + '"any": [' + "[]," * 80_000 + "[]]}"
    yield "keys", name + ",".join(f'"k{i}":1' for i in range(9_000)) + "}"
    yield "too many keys", name + ",".join(f'"k{i}":1' for i in range(20_000)) + "}"
    yield "wrong items", name + '"tags": [' + "1," * 9_000 + "1]}"
    yield "too many items", name + '"tags": [' + "1," * 100_000 + "1]}"
    yield "equal items", name + '"tags": [' + '"a",' * 9_000 + '"a"]}'
    yield "unclosed strings", "{" * 65 + '\\"' * 100_000
    yield "quotes", '"{' * 100_000
    yield "fence of spaces", "```" + " " * 200_000 + "```"
    yield "fences", "```json\n" * 30_000
    yield "fences without a line", "```" * 80_000
    yield "tags", "<tool_call>" * 23_000
    yield "empty tags", "<tool_call></tool_call>" * 11_000
    yield "named tags", "<tool_call>a" * 21_000
    yield "tags of pairs", "<tool_call>f<arg_key>a</arg_key><arg_value>" * 6_000
    yield "closed pairs", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value>" * 4_600
    yield "functions", "<function=f><parameter=a>" * 10_000
    yield "many parameters", "<function=f>" + "".join(f"<parameter=a{i}>1</parameter>" for i in range(8_000))
    yield "channels", "<|channel|>analysis<|message|>" * 8_700
    yield "recipients", "commentary to=functions.f " * 10_000
    yield "Mistral's marks", "[TOOL_CALLS]a" * 20_000
    yield "calls", '{"name":"f","parameters":{}};' * 9_000
    yield "Python's calls", "[" + "f(a=1)," * 30_000
    yield "Python's nesting", "f(a=" * 60_000
    yield "Python's quotes", "f(a='" + "\\'" * 120_000 + ")"
    yield "Python's lists", "f(a=" + "[" * 200_000 + ")"
    yield "spaces in tags", ("<tool_call>" + " " * 900) * 280
    yield "documents", '{"a":1} ' * 30_000
    yield "braces", "{ " * 130_000
    yield "broken off", name + '"any": ' + "[1," * 60 + "1," * 9_000
    yield "YAML aliases", "a: &a [x,x]\nb: &b [*a,*a]\n" * 5_000
    yield "YAML items", "- a\n" * 60_000
    yield "YAML keys", "name: aaa\ncount: 3\n" + "".join(f"k{i}: 1\n" for i in range(9_000))
    yield "YAML documents", "---\n" * 60_000
    yield "YAML deep", "- " * 130_000
    yield "YAML tags", "".join(f"%TAG !{i}! t:\n" for i in range(12_000)) + "--- a"
    yield "XML entities", '<!DOCTYPE r [<!ENTITY a "aaaa">]><r>' + "&a;" * 80_000 + "</r>"
    yield "XML external", '<!DOCTYPE r SYSTEM "file:///etc/passwd"><r>&a;</r>'
    yield "XML deep", "<a>" * 80_000
    yield "XML elements", "<r>" + "".join(f"<a{i}/>" for i in range(9_000)) + "</r>"
    yield "XML attributes", "<r " + " ".join(f'a{i}=""' for i in range(20_000)) + "/>"


def large() -> Iterator[tuple[str, str]]:
    """(name, document): sound JSON under `SCHEMA`, at the limits."""
    name = '{"name": "aaa", "count": 3, '
    yield "sound, deep", (name + '"next": ') * 63 + json.dumps(GOOD) + "}" * 63
    yield "sound, digits", name + '"any": [' + ",".join(["9" * 4200] * 60) + "]}"
    yield "sound, fraction", name + '"price": 0.' + "1" * 200_000 + "}"
    yield "sound, unique items", name + '"tags": [' + ",".join(f'"{i}"' for i in range(9_000)) + "]}"
    yield "sound, empty containers", name + '"any": [' + "[]," * 9_000 + "[]]}"
    yield "sound, long string", '{"count": 3, "name": "' + "a" * 200_000 + '"}'
