"""JSON values and what nearly is JSON: right documents after small accidents, for every kind of input."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

HOSTILE = ("\0", "\ud800", "\u2028", "𝟗", "٣", "é", "\\", '"', "{" * 300, "[" * 3000, "9" * 5000, "1e999", "-0", "NaN")
numbers = st.one_of(
    st.integers(-9, 9),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e308, math.inf, -math.inf, math.nan]),
)
texts = st.one_of(st.text(max_size=12), st.sampled_from(HOSTILE), st.sampled_from(["", "a", "1", "true", "null"]))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def dumped(value: Any) -> str:
    """JSON as Python writes it, NaN and surrogates included."""
    return json.dumps(value, ensure_ascii=False)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------- near misses


@st.composite
def near_miss(draw: st.DrawFn, text: str) -> str:
    """A text after up to three small accidents: characters lost, doubled or foreign, ends cut, nesting, fences."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        to = min(len(text), at + draw(st.integers(1, 6)))
        accident = draw(st.integers(0, 7))
        if accident == 0:
            text = text[:at] + text[to:]
        elif accident == 1:
            text = text[:to] + text[at:]
        elif accident == 2:
            text = text[:at] + draw(texts) + text[at:]
        elif accident == 3:
            text = text[:at]
        elif accident == 4:
            depth = draw(st.sampled_from([1, 70, 2000]))
            text = "[" * depth + text + "]" * draw(st.sampled_from([depth, depth - 1]))
        elif accident == 5:
            text = f"```{draw(st.sampled_from(['json', '', 'yaml', 'xml']))}\n{text}\n```"
        elif accident == 6:
            text = draw(st.sampled_from(["Sure: ", "<think>", "[TOOL_CALLS] "])) + text + draw(texts)
        else:
            text = text[:at] + draw(st.sampled_from(["NaN", "1e999", "-", "null", "'", '"', ",", ":"])) + text[to:]
    return text


def missing(value: Any) -> st.SearchStrategy[str]:
    return near_miss(dumped(value))


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a document with up to two of its values replaced or taken out."""
    value = json.loads(dumped(value))
    for _ in range(draw(st.integers(0, 2))):
        place, path = value, []
        while isinstance(place, dict | list) and place and (not path or draw(st.booleans())):
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            path.append((place, key))
            place = place[key]
        if not path:
            return draw(json_values)
        container, key = path[-1]
        if draw(st.integers(0, 4)) == 0:
            del container[key]
        else:
            container[key] = draw(json_values)
    return value


def spoiled(value: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a document with wrong values, with accidents, or with both."""
    values = changed(value)
    return st.one_of(values.map(dumped).map(encoded), values.flatmap(missing).map(encoded), st.binary(max_size=40))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes cut short, with some of them overwritten, or with one run of them gone."""
    made = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0, 4))):
        if made:
            made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    return bytes(made)
