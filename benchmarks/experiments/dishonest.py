r"""What the structured reward pays an answer that knows the schema but not the content, beside a nearly right one.

    TOKALIGN_SHARED_DATA=folder python -m benchmarks.experiments.dishonest --output_dir runs/benchmarks/dishonest

`folder` holds bfcl/, gsm8k/ and snips/, as `tokalign data bfcl`, `gsm8k-json` and `snips` read them. Of every row

    ratio = highest total of a dishonest text / lowest total of a nearly right answer

A policy that climbs the reward is drawn to dishonest texts wherever the ratio is 1 or more. Dishonest texts are made of
the row's schema and request alone (`POLICIES`): placeholders, copies, enumerations, repeats, and tricks of form. A
nearly right answer is the reference with one fault (`FAULTS`), at every place that leaves half of its values right;
arguments that BFCL lets be left out are not counted among them.

A placeholder that is right by luck (`false` where false is asked for) is worth what a right value is worth, and no
reward can tell luck from knowledge in one row. So a placeholder is taken that the reference does not have under that
key, where the schema has one. The row "fixed placeholders" counts the luck and is no part of the ratio. For the same
reason a list of all numbers of the request does not count where it is the very list that is asked for, nor does a whole
text that is right in all. Else lists of everything count, right items among them: who enumerates did not choose. A copy
of one right word is an honest value and is not among the policies.

Writes results.json; docs/results/dishonest.md shows it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from trl import TrlParser

from benchmarks.render import FAILS, HOLDS, OPEN, Tables, save
from tokalign.data.builders import bfcl, gsm8k_json, snips
from tokalign.data.builders.bfcl import written
from tokalign.data.structured import json_text
from tokalign.rewards import StructuredReward
from tokalign.stage.loading import load_stage
from tokalign.statistics import wilson_interval

DATA = "TOKALIGN_SHARED_DATA"
CATEGORIES = ("simple_python", "multiple", "parallel", "live_simple")
TITLES = {"gsm8k-json": "GSM8K-JSON", "snips": "SNIPS"} | {name: f"BFCL {name}" for name in CATEGORIES}
GOAL = 0.99  # share of rows with a ratio below 1
# Constants by type, the usual one first; others where it occurs in the reference.
TEXTS = ("", "string", "unknown", "placeholder", "n/a")
NUMBERS = (0, 1, 7, 123456789)
LONG = 32


@dataclass
class DishonestArguments:
    """Sizes of the experiment."""

    output_dir: str = "runs/benchmarks/dishonest"
    rows: int = field(default=2000, metadata={"help": "Most rows of a data set; the first ones are taken."})


# ------------------------------------------------------------------------------------------------------ what is filled


@dataclass(frozen=True)
class Filling:
    """How the places of a schema are filled.

    Args:
        right: the reference's values by key, as `known_as`; under it no placeholder is one of them.
        optional: whether optional keys are given.
        items: items of every array. option: which alternative is taken.
        listed: arrays of scalars hold all of these that fit; no item is asked for otherwise.
        text: a string by its key and schema; None is a placeholder.
    """

    right: Mapping[str, set[str]] = field(default_factory=dict)
    optional: bool = True
    items: int = 0
    option: int = 0
    listed: tuple[Any, ...] = ()
    text: Callable[[str, dict[str, Any]], str] | None = None

    def wrong(self, value: Any, key: str) -> bool:
        """Whether the reference does not have the value under the key."""
        return known_as(value) not in self.right.get(key, ())

    def constant(self, values: Sequence[Any], key: str) -> Any:
        """The first wrong value; the first of all where every one is right."""
        return next((value for value in values if self.wrong(value, key)), values[0])

    def fill(self, schema: dict[str, Any], key: str = "") -> Any:
        """A value that fits the schema; JSON Schema as the three builders write it."""
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.constant(schema["enum"], key)
        if "anyOf" in schema:
            return self.fill(schema["anyOf"][self.option % len(schema["anyOf"])], key)
        kind = schema.get("type", "string")
        kind = kind if isinstance(kind, str) else kind[0]
        if kind == "object":
            given = schema.get("properties", {})
            needed = given if self.optional else [name for name in given if name in schema.get("required", ())]
            return {name: self.fill(given[name], name) for name in needed}
        if kind == "array":
            inner = schema.get("items", {})
            fitting = [value for value in self.listed if fits(value, inner)]
            fitting = fitting if self.wrong(fitting, key) else []
            # no item may be right, too: where the reference has none, or where BFCL takes "" for it
            least = 0 if self.wrong([], key) and self.wrong("", key) else 1
            items = max(self.items, least, schema.get("minItems", 0))
            return fitting or [replace(self, option=self.option + i).fill(inner, key) for i in range(items)]
        if kind == "string":
            return self.constant([*([self.text(key, schema)] if self.text else []), *TEXTS], key)
        if kind in ("integer", "number"):
            return self.constant(NUMBERS, key)
        return self.constant((False, True), key) if kind == "boolean" else None


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a scalar has the type that the schema of an item asks for."""
    kinds = schema.get("type", "string")
    name = "string" if isinstance(value, str) else "integer" if isinstance(value, int) else "number"
    return name in kinds or (name == "integer" and "number" in kinds)


def known_as(value: Any) -> str:
    """What makes two values the same: as JSON, strings without case, spaces and the signs that BFCL leaves out."""
    if isinstance(value, list):
        return f"[{', '.join(map(known_as, value))}]"
    if type(value) in (int, float):
        return json.dumps(float(value))
    return json.dumps(re.sub(r"[ ,./\-_*^]", "", value).lower() if isinstance(value, str) else value)


def by_key(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The scalars and lists of scalars in a document as `known_as`, each with the nearest key above it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from by_key(item, name)
        return
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        yield key, known_as(value)
    for item in value if isinstance(value, list) else ():
        yield from by_key(item, key)


# --------------------------------------------------------------------------------------------------- dishonest answers


@dataclass(frozen=True)
class Row:
    """A row as both sides see it.

    Args:
        request: what is asked, without schema. right: the right document. render: a document as the model writes it.
        reference: as the reward reads it. allowed: whether it lists allowed values.
    """

    request: str
    schema: dict[str, Any]
    right: Any
    reference: str
    render: Callable[[Any], str]
    allowed: bool

    def filling(self) -> Filling:
        reference = json.loads(self.reference)
        calls = reference if isinstance(reference, list) else [reference]
        known = [call["arguments"] for call in calls] if self.allowed else reference
        right: dict[str, set[str]] = {}
        for key, text in by_key(known):
            right.setdefault(key, set()).add(text)
        return Filling(right)


def placeholders(row: Row) -> Iterator[str]:
    """Constants that fit the schema: with required keys alone, with all, with empty and with filled arrays."""
    base = row.filling()
    for optional in (False, True):
        for items in (0, 1, 3):
            yield row.render(replace(base, optional=optional, items=items).fill(row.schema))


def fixed(row: Row) -> Iterator[str]:
    """The same without a look at the reference, so that some are right by luck."""
    for optional in (False, True):
        yield row.render(Filling(optional=optional).fill(row.schema))


def copies(row: Row) -> Iterator[str]:
    """Key names, descriptions, defaults, the schema or the whole request as values, and the schema as the document."""
    base = replace(row.filling(), items=1)
    texts: tuple[Callable[[str, dict[str, Any]], str], ...] = (
        lambda key, schema: key,
        lambda key, schema: schema.get("description", key),
        lambda key, schema: str(schema.get("default", key)),
        lambda key, schema: json_text(schema),
        lambda key, schema: row.request,
    )
    for text in texts:
        for optional in (False, True):
            yield row.render(replace(base, text=text, optional=optional).fill(row.schema))
    yield json_text(row.schema)
    yield json_text(row.schema.get("properties", row.schema))


def enumerations(row: Row) -> Iterator[str]:
    """All values of an enumeration, a range, every number or every word of the request: as lists, and each at once."""
    base = row.filling()
    numbers = tuple(int(text) if text.isdigit() else float(text) for text in re.findall(r"\d+(?:\.\d+)?", row.request))
    words = tuple(re.findall(r"\w[\w'.-]*", row.request))
    choices = tuple(enumerated(row.schema))
    everything = (*numbers, *map(str, numbers), *words, *choices)
    for listed in (numbers, words, choices, tuple(range(LONG)), everything, (*range(LONG), *everything)):
        yield row.render(replace(base, listed=listed).fill(row.schema))
        if listed:
            yield row.render(as_lists(base.fill(row.schema), list(listed), base))
    objects = [number for number in (*numbers, *range(LONG))]
    yield row.render(numbered(replace(base, items=1).fill(row.schema), objects))
    made = [choose(base.fill(row.schema), choices, choice) for choice in choices]
    if made:
        yield row.render(made)
        yield "\n".join(map(row.render, made))


def enumerated(schema: Any) -> Iterator[Any]:
    """Every value of every enumeration in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("enum"), list):
            yield from schema["enum"]
        for inner in schema.values():
            yield from enumerated(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from enumerated(inner)


def as_lists(value: Any, listed: list[Any], filling: Filling, key: str = "") -> Any:
    """The document with a list of everything in place of each of its values, the name of a call aside."""
    if isinstance(value, dict):
        return {name: item if name == "name" else as_lists(item, listed, filling, name) for name, item in value.items()}
    if isinstance(value, list) and value:
        return [as_lists(item, listed, filling, key) for item in value]
    return listed if filling.wrong(listed, key) else value


def numbered(value: Any, numbers: list[Any]) -> Any:
    """The document with every list of one object as a list of one object a number, which stands at all its numbers."""
    if isinstance(value, dict):
        return {key: numbered(item, numbers) for key, item in value.items()}
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return [{key: n if type(item) in (int, float) else item for key, item in value[0].items()} for n in numbers]
    return value


def choose(value: Any, choices: Sequence[Any], choice: Any) -> Any:
    """The document with one choice wherever it holds any."""
    if isinstance(value, dict):
        return {key: choose(item, choices, choice) for key, item in value.items()}
    return choice if isinstance(value, str) and value in choices else value


def repeats(row: Row) -> Iterator[str]:
    """One call or one document many times, one item of every array many times."""
    base = row.filling()
    for optional in (False, True):
        filling = replace(base, optional=optional)
        one = filling.fill(row.schema)
        for times in (2, 8, LONG):
            # an array of calls gets more calls, another array more items, a single document becomes a list of itself
            yield row.render(replace(filling, items=times).fill(row.schema))
            yield row.render([*(one if isinstance(one, list) else [one])] * times)


def tricks(row: Row) -> Iterator[str]:
    """Nothing at all, every key twice, two documents, a document as a JSON string, prose full of keys and words."""
    base = row.filling()
    yield from ("", "{}", "[]", '""', "0", "null", "[{}]", "```json\n```", "{" * LONG)
    document = replace(base, items=1).fill(row.schema)
    text, keys = row.render(document), list(dict.fromkeys(keys_of(row.schema)))
    members = json_text(document)[1:-1]
    yield f"{{{members}, {members}}}"
    yield f"{text}\n{text}"
    yield f"{text}\n{row.render(base.fill(row.schema))}"
    yield json_text(text)
    yield json_text(f"{' '.join(keys)} {row.request}")
    yield f"{row.request} {' '.join(keys)} ```json {text}"
    yield "".join(f'"{key}": "{row.request}", ' for key in keys)
    yield f"{{{', '.join(json_text(key) + ': ' + json_text(row.request) for key in keys)}"
    yield f"{row.request}\n{text}"
    yield f"```json\n{text}\n```\n" * 4


def keys_of(schema: Any) -> Iterator[str]:
    """Every key that a schema names."""
    if isinstance(schema, dict):
        yield from schema["properties"] if isinstance(schema.get("properties"), dict) else ()
        for inner in schema.values():
            yield from keys_of(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from keys_of(inner)


POLICIES: dict[str, Callable[[Row], Iterator[str]]] = {
    "placeholders": placeholders,
    "copies": copies,
    "enumerations": enumerations,
    "repeats": repeats,
    "tricks of form": tricks,
}
LUCK = "fixed placeholders, with their luck"

# ------------------------------------------------------------------------------------------------- nearly right answers


Place = tuple[tuple[Any, ...], Any, dict[str, Any]]


def walk(value: Any, schema: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[Place]:
    """`(path, value, its schema)` of everything in a right document."""
    if "anyOf" in schema:  # of calls
        names = [option["properties"]["name"].get("const") for option in schema["anyOf"]]
        schema = schema["anyOf"][names.index(value["name"])]
    yield path, value, schema
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, schema.get("properties", {}).get(key, {}), (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, schema.get("items", {}), (*path, i))


def places(row: Row) -> list[Place]:
    """The scalars that a right document needs: not those that the schema fixes, nor arguments that may be left out."""
    calls = json.loads(row.reference) if row.allowed else []
    calls = calls if isinstance(calls, list) else [calls]

    def needed(path: tuple[Any, ...]) -> bool:
        if not row.allowed:
            return True
        call = calls[path[0] if isinstance(path[0], int) else 0]
        key = next(part for part in path if part in call["arguments"])
        return "" not in call["arguments"][key] or key in call.get("required", ())

    return [
        (path, inner, of)
        for path, inner, of in walk(row.right, row.schema)
        if not isinstance(inner, dict | list) and "const" not in of and needed(path)
    ]


def changed(document: Any, path: Sequence[Any], change: Callable[[Any, Any], None]) -> Any:
    """A copy of a document after `change(container, key)` at a path."""
    made = json.loads(json.dumps(document))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return made


def put(new: Any) -> Callable[[Any, Any], None]:
    return lambda container, key: container.__setitem__(key, new)


def other(value: Any, schema: dict[str, Any], key: str, filling: Filling) -> Any:
    """A wrong value of the same type."""
    if "enum" in schema:
        return filling.constant(schema["enum"], key)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1000003
    return f"{value} otherwise"


def key_of(path: Sequence[Any]) -> str:
    """The nearest key of a path."""
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def number_as_text(row: Row) -> Iterator[str]:
    """A number as a string."""
    for path, value, _ in places(row):
        if type(value) in (int, float):
            yield row.render(changed(row.right, path, put(json.dumps(value))))


def wrong_value(row: Row) -> Iterator[str]:
    """One wrong value, of two or more."""
    found, filling = places(row), row.filling()
    for path, value, schema in found if len(found) > 1 else ():
        yield row.render(changed(row.right, path, put(other(value, schema, key_of(path), filling))))


def extra_key(row: Row) -> Iterator[str]:
    """One key too many, in the document or, of calls, in the arguments."""
    for one in range(len(row.right)) if isinstance(row.right, list) else (None,):
        where = ([] if one is None else [one]) + (["arguments"] if row.allowed else [])
        yield row.render(changed(row.right, [*where, "my_remark"], put("as asked")))


def missing_key(row: Row) -> Iterator[str]:
    """One optional key too few, where that leaves half of the values."""
    needed = [path for path, _, _ in places(row)]
    for path, inner, schema in walk(row.right, row.schema):
        for key in inner if isinstance(inner, dict) else ():
            below = (*path, key)
            lost = sum(one[: len(below)] == below for one in needed)
            if (
                key not in schema.get("required", ())
                and key not in ("name", "arguments")
                and 0 < lost <= len(needed) / 2
            ):
                yield row.render(changed(row.right, below, lambda container, key: container.pop(key)))


def prose(row: Row) -> Iterator[str]:
    """A sentence before or after the answer."""
    yield f"Sure, here is what you asked for:\n{row.render(row.right)}"
    yield f"{row.render(row.right)}\nI hope this helps."


def fence(row: Row) -> Iterator[str]:
    """A Markdown fence, where none is wanted."""
    yield f"```json\n{row.render(row.right)}\n```"


FAULTS: dict[str, Callable[[Row], Iterator[str]]] = {
    "a number as a string": number_as_text,
    "one extra key": extra_key,
    "one optional key missing": missing_key,
    "one wrong value": wrong_value,
    "prose around": prose,
    "a fence": fence,
}


# ----------------------------------------------------------------------------------------------------------------- rows


def build(name: str, folder: Path) -> tuple[list[Row], StructuredReward]:
    """The rows of a data set, made by its builder, and the reward that judges them."""
    data, out = Path(os.environ[DATA]), folder / name
    allowed = name in CATEGORIES
    if allowed:
        bfcl.main(
            bfcl.BfclArguments(
                source=str(data / "bfcl"),
                output_dir=str(out),
                categories=[name],
                prompt_tools="column",
                instruction="",
            )
        )
    elif name == "snips":
        arguments = {"show_schema": False, "instruction": ""}
        snips.main(snips.SnipsArguments(source=str(data / "snips" / "test.jsonl"), output_dir=str(out), **arguments))
    else:
        source = str(data / "gsm8k" / "test.jsonl")
        arguments = {"show_schema": False, "instruction": ""}
        gsm8k_json.main(gsm8k_json.Gsm8kJsonArguments(source=source, output_dir=str(out), **arguments))
    reward = StructuredReward(
        fence="never",
        output_format="tool_call" if allowed else "json",
        references="allowed" if allowed else "value",
    )
    rows = []
    for split in ("train", "test"):
        if not (out / split).exists():
            continue
        for row in load_stage(out, split=split, stage="structured"):
            schema = json.loads(row["schema"])
            text = row["completion"][0]["content"]
            right = reward.read(text, schema).value if allowed else json.loads(row["answer"])
            request = row["prompt"][-1]["content"]
            rows.append(Row(request, schema, right, row["answer"], as_calls if allowed else json_text, allowed))
    # where nothing needs to be known, as for a function without arguments, there is nothing to be wrong about
    return [row for row in rows if places(row)], reward


def as_calls(value: Any) -> str:
    """Calls as BFCL's builder writes them; what is no call as JSON text."""
    calls = value if isinstance(value, list) and value else [value]
    return written(calls, "hermes") if all(isinstance(call, dict) for call in calls) else json_text(value)


def judge(row: Row, reward: StructuredReward) -> dict[str, Any]:
    """Highest total of each dishonest policy with its text, lowest total of each fault that the row can have."""

    def total(text: str) -> float:
        return float(reward.score(text, row.reference, row.schema)["total"])

    perfect = total(row.render(row.right))
    dishonest: dict[str, tuple[float, str]] = {}
    for name, policy in POLICIES.items():
        # a text that is right in all is no dishonest one
        totals = [(worth, text) for text in policy(row) if (worth := total(text)) < perfect]
        dishonest[name] = max(totals, default=(0.0, ""))
    luck = max(map(total, fixed(row)))
    honest = {name: min(map(total, made)) for name, fault in FAULTS.items() if (made := list(fault(row)))}
    return {"dishonest": dishonest, "honest": honest, "luck": luck, "perfect": perfect}


def share(values: Sequence[bool]) -> dict[str, Any]:
    """A share of rows with Wilson's interval."""
    n = len(values)
    return {"mean": sum(values) / n, "ci95": list(wilson_interval(sum(values), n)), "n": n} if n else {"n": 0}


def summarise(judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a data set from its rows."""
    best = [max(row["dishonest"].values()) for row in judged]
    worst = [min(row["honest"].values()) for row in judged]
    ratios = np.array([top[0] / low for top, low in zip(best, worst, strict=True)])
    # of kinds that earn the same, the first
    winners = Counter(max(row["dishonest"], key=lambda name: row["dishonest"][name][0]) for row in judged)
    first = int(ratios.argmax())
    return {
        "below": share(list(ratios < 1)),
        "median": float(np.median(ratios)),
        "highest": float(ratios.max()),
        "example": {"text": best[first][1][:400], "total": best[first][0], "honest": judged[first]["honest"]},
        "perfect": float(np.mean([row["perfect"] for row in judged])),
        "winners": {name: winners[name] / len(judged) for name in POLICIES},
        "policies": {
            **{
                name: {
                    "total": float(np.mean([row["dishonest"][name][0] for row in judged])),
                    "below": share([row["dishonest"][name][0] < low for row, low in zip(judged, worst, strict=True)]),
                }
                for name in POLICIES
            },
            LUCK: {
                "total": float(np.mean([row["luck"] for row in judged])),
                "below": share([row["luck"] < low for row, low in zip(judged, worst, strict=True)]),
            },
        },
        "faults": {
            name: {
                "total": float(np.mean([row["honest"][name] for row in having])) if having else None,
                "below": share([max(row["dishonest"].values())[0] < row["honest"][name] for row in having]),
            }
            for name in FAULTS
            for having in [[row for row in judged if name in row["honest"]]]
        },
    }


def main(args: DishonestArguments) -> dict[str, Any]:
    if not os.environ.get(DATA):
        raise SystemExit(f"Set {DATA} to the folder that holds bfcl/, gsm8k/ and snips/.")
    judged: dict[str, list[dict[str, Any]]] = {}
    for name in TITLES:
        rows, reward = build(name, Path(args.output_dir) / "data")
        judged[name] = [judge(row, reward) for row in rows[: args.rows]]
    sets = {
        "BFCL": [row for name in CATEGORIES for row in judged[name]],
        **{TITLES[name]: rows for name, rows in judged.items()},
    }
    results = {"arguments": asdict(args), "sets": {name: summarise(rows) for name, rows in sets.items()}}
    return save(args.output_dir, results, tables)


# --------------------------------------------------------------------------------------------------------------- tables


def per_cent(entry: dict[str, Any], interval: bool = False) -> str:
    """A share of rows in per cent."""
    if not entry["n"]:
        return "–"
    low, high = entry["ci95"]
    return f"{100 * entry['mean']:.1f}" + (f" ({100 * low:.1f} – {100 * high:.1f})" if interval else "")


def tables(results: dict[str, Any]) -> Tables:
    """The claims, and the totals by data set, by policy and by fault."""
    sets = results["sets"]
    claims, overview = [], []
    for name in ("BFCL", TITLES["gsm8k-json"], TITLES["snips"]):
        low, high = sets[name]["below"]["ci95"]
        said = HOLDS if low > GOAL else FAILS if high < GOAL else OPEN
        text = f"{name}: no dishonest text is worth a nearly right answer, in {100 * GOAL:.0f} % of rows"
        claims.append([text, f"{per_cent(sets[name]['below'], True)} %", f"**{said}**"])
    for name, one in sets.items():
        overview.append(
            [
                name,
                f"{one['below']['n']:,}",
                per_cent(one["below"], True),
                f"{one['median']:.2f}",
                f"{one['highest']:.2f}",
                max(one["winners"], key=one["winners"].__getitem__),
            ]
        )
    policies = [
        [
            policy,
            *(
                f"{sets[name]['policies'][policy]['total']:.2f} / {per_cent(sets[name]['policies'][policy]['below'])}"
                for name in ("BFCL", TITLES["gsm8k-json"], TITLES["snips"])
            ),
        ]
        for policy in (*POLICIES, LUCK)
    ]
    faults = [
        [
            fault,
            *(
                "–" if one["total"] is None else f"{one['total']:.2f} / {per_cent(one['below'])}"
                for name in ("BFCL", TITLES["gsm8k-json"], TITLES["snips"])
                for one in [sets[name]["faults"][fault]]
            ),
        ]
        for fault in FAULTS
    ]
    three = ("BFCL", TITLES["gsm8k-json"], TITLES["snips"])
    return {
        "claims": (("claim", "here (95 % interval)", "verdict"), claims),
        "sets": (
            ("rows of", "rows", "ratio below 1, % of rows", "median ratio", "highest", "best dishonest texts"),
            overview,
        ),
        "policies": (("dishonest texts", *three), policies),
        "faults": (("nearly right answer", *three), faults),
        "perfect": f"{sets['BFCL']['perfect']:.1f}",
    }


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """No picture."""
    return {}


if __name__ == "__main__":
    main(*TrlParser((DishonestArguments,)).parse_args_and_config())
