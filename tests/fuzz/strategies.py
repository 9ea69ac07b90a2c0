"""Inputs for the targets: manifests, parquet tables, headers, answers, JSON Schemas, completions, HTTP messages.

Random bytes seldom get past the first check of a reader, so most inputs start from a right one and go wrong in one
place or two.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from tests.fuzz import files
from tests.fuzz.near_misses import (
    changed,
    damaged,
    dumped,
    encoded,
    json_values,
    missing,
    near_miss,
    scalars,
    spoiled,
    texts,
)
from tests.rewards import ordering

# ---------------------------------------------------------------------------------------------------------------- files

MANIFEST = {
    **{"name": "score_contrast", "status": "complete", "rows": 1, "shards": 1, "shard_size": 1, "tokenizer_hash": "ab"},
    **{"parameters": {"beta": 1.0}, "input": "x", "dropped": {}, "models": {"policy": {"weights_hash": "cd"}}},
}
cells = st.one_of(
    st.none(), st.integers(-2, 300), st.floats(width=32), st.text(max_size=3), st.booleans(), st.binary(max_size=3)
)
columns = st.one_of(
    st.lists(cells, min_size=1, max_size=1),
    st.lists(st.lists(cells, max_size=3), min_size=1, max_size=1),
    st.lists(st.lists(st.integers(-1, 300) | st.none(), max_size=6), min_size=1, max_size=1),
    st.lists(st.lists(st.floats(-1, 2) | st.none(), max_size=3), min_size=1, max_size=1),
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3), min_size=1, max_size=1),
    st.lists(st.dictionaries(st.sampled_from("ab"), st.integers(0, 9), min_size=1), min_size=1, max_size=1),
)
KINDS = (
    pa.int8(),
    pa.uint64(),
    pa.float16(),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.decimal128(9, 2),
    pa.list_(pa.int32()),
    pa.large_list(pa.int64()),
    pa.list_(pa.float32(), 2),
    pa.list_(pa.string()),
    pa.list_(pa.uint64()),
    pa.list_(pa.null()),
    pa.list_(pa.bool_()),
    pa.list_(pa.binary()),
    pa.null(),
    pa.timestamp("us"),
    pa.list_(pa.date32()),
    pa.dictionary(pa.int8(), pa.string()),
    pa.struct({"a": pa.int8()}),
)


@st.composite
def tables(draw: st.DrawFn, right: pa.Table) -> bytes:
    """A parquet file of a right table: rows gone or doubled, columns gone, of other values or other types."""
    table = right
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(table.column_names))
        at = table.column_names.index(name)
        what = draw(st.integers(0, 4))
        if what == 0 and table.num_columns > 1:
            table = table.drop_columns([name])
        elif what == 1:
            table = pa.concat_tables([table, table])
        else:
            values = draw(columns) * table.num_rows
            try:
                array = pa.array(values, draw(st.sampled_from(KINDS)) if what == 2 else None)
            except (pa.ArrowException, TypeError, OverflowError, ValueError):
                continue  # values that no column can hold
            table = table.set_column(at, name, array)
    return files.parquet(table.slice(0, 0 if draw(st.integers(0, 9)) == 9 else table.num_rows))


def label_table() -> pa.Table:
    """One right row of routing labels beside the features of `files.labels`."""
    count = list(range(files.POSITIONS))
    ids = {
        "prompt_ids": [1, 2],
        "completion_ids": count,
        "slm_ids": [i % 5 for i in count],
        "label": [0, 1, 2, -1, 0, 2],
    }
    row = {"id": "0", **ids, "features_file": files.features_name(), "features_first": 0}
    return pa.Table.from_pylist([row])


@st.composite
def feature_files(draw: st.DrawFn) -> bytes:
    """A feature file whose header has been tampered with."""
    data = files.features_bytes()
    length = int.from_bytes(data[:8], "little")
    header = draw(changed(json.loads(data[8 : 8 + length])))
    odd = st.sampled_from([0, 1, 2, 3, 6, 12, 24, 36, 2**31, 2**62, 2**63, 2**64, 10**30, -1])
    if isinstance(header, dict) and header and draw(st.booleans()):
        entry = header.get(draw(st.sampled_from(sorted(header))))
        if isinstance(entry, dict):
            key = draw(st.sampled_from(["shape", "data_offsets"]))
            entry[key] = draw(st.lists(odd, min_size=1, max_size=3))
    text = encoded(draw(near_miss(dumped(header))) if draw(st.booleans()) else dumped(header))
    said = draw(st.sampled_from([len(text)] * 8 + [0, len(text) + 1, 2**20, 2**63]))
    return said.to_bytes(8, "little") + text + data[8 + length :]


ROUTER = {
    **{"model_type": "token_router", "hidden_size": 4, "embedding_size": 4, "shared_vocab": 8, "top_k": 2, "width": 4},
    **{"expansion": 2, "num_blocks": 1, "dropout": 0.1, "inputs": ["hidden", "logits"], "architecture": "mlp"},
    **{"threshold": 0.5, "pos_weight": 2.0, "slm": {"name": "a/b", "weights_hash": "ab", "tokenizer_hash": "cd"}},
    "calibration": {
        **{"target": {"target_rate": 0.3}, "split": "calibration", "labels": "ef"},
        "achieved": {"rate": 0.3, "recall": 0.9, "accuracy": 0.8, "n_tokens": 9, "n_responses": 3, "ci": {}},
    },
}
TEMPLATE = {
    **{"system": "s", "user": "{question} {context} {first} {second}", "same": "SAME", "different": "OTHER"},
    **{"better": "{prompt} {completion}!", "worse": "{prompt} {completion}?"},
}

# ---------------------------------------------------------------------------------------------------------------- texts

PIECES = (
    "\\boxed{",
    "}",
    "{",
    "#### ",
    "The answer is ",
    "A: ",
    "\n",
    " ",
    "$",
    "\\frac",
    "\\frac{1}{2}",
    "\\sqrt{2}",
    "^",
    "x",
    "=",
    "+",
    "-",
    "1,234",
    "0.50",
    "3/4",
    "%",
    "\\pi",
    "(",
    ")",
    "[",
    "]",
    ",",
    ";",
    "\\cup",
    "\\pm",
    "e9",
    "10^",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "&",
    "\\\\",
    "\\text{",
    "cm",
    "m",
    " and ",
    "**",
    "```json\n",
    "```",
    "_2",
    '{"answer": ',
    '"',
    "5",
    "\\{",
    "\\}",
    "\\circ",
    "!",
    "dollars",
    "hundred",
    "infinity",
    "1 1/2",
    "\\in",
    "north",
)
answer_texts = st.one_of(
    st.lists(st.sampled_from(PIECES) | texts, max_size=12).map("".join),
    st.text(max_size=40),
    st.builds(lambda piece, count: piece * count, st.sampled_from(PIECES), st.sampled_from([30, 300, 9000])),
)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    text = draw(answer_texts)
    other = draw(near_miss(text[:200]) | answer_texts)
    return encoded(f"{text}\0{other}")


FORMATS = ("json", "json", "json", "yaml", "xml", "tool_call")
WORDS = tuple(
    (
        "type properties required items prefixItems minItems maxItems enum const pattern anyOf oneOf allOf not if "
        "then $ref $defs $schema $id additionalProperties format minimum multipleOf minLength patternProperties "
        "unevaluatedProperties dependentSchemas contains"
    ).split()
)
schema_values = st.recursive(
    st.one_of(
        scalars,
        st.sampled_from(
            ["object", "array", "string", "#", "#/$defs/a", "http://a/b", "^(a+)+$", "(?<=a)b", "date-time"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(WORDS) | st.sampled_from("ab"), inner, max_size=4),
    ),
    max_leaves=8,
)


@st.composite
def structured(draw: st.DrawFn) -> bytes:
    """Format, schema, reference, flawless document and completion; hostile schemas for one in three."""
    schema, value = True, draw(json_values)
    if draw(st.integers(0, 2)):
        schema = draw(ordering.schemas())
        value = draw(ordering.valid(schema))
        honest, shown = dumped(value), dumped(schema)
    else:
        schema = draw(st.dictionaries(st.sampled_from(WORDS), schema_values, min_size=1, max_size=4))
        honest, shown = "", draw(missing(schema))
    text = draw(
        st.one_of(
            missing(value),
            changed(value).flatmap(missing),
            st.sampled_from(ordering.hacks(schema, value)) if honest else st.text(max_size=30),
        )
    )
    reference = draw(st.sampled_from([honest, "", dumped(value)]))
    lines = [draw(st.sampled_from(FORMATS)), shown, reference, honest]
    return encoded("\n".join([*(line.replace("\n", " ") for line in lines), text]))


# -------------------------------------------------------------------------------------------------------------- servers

COMPLETION = {
    **{"model": "pair", "prompt": "abc", "max_tokens": 4, "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1},
    **{"stop": ["x"], "stop_token_ids": [3], "stream": True, "stream_options": {"include_usage": True}, "logprobs": 0},
    **{"return_token_ids": True, "routing_trace": True, "skip_special_tokens": False, "user": "u", "echo": False},
}
CHAT = {
    **{"model": "pair", "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 0, "stream": False},
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ],
    **{"chat_template_kwargs": {"a": 1}, "response_format": {"type": "text"}, "tools": []},
}
HEADERS = (
    "content-type: text/plain",
    "content-type:",
    "content-length: -1",
    "transfer-encoding: x",
    "expect: 100-continue",
    "authorization: Bearer \xff",
    "content-type: application/json; charset=utf-16",
    "host: é",
    ": x",
    "x" * 3000,
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    right, path = draw(st.sampled_from([(COMPLETION, "/v1/completions"), (CHAT, "/v1/chat/completions")]))
    some = {key: value for key, value in right.items() if key in ("prompt", "messages") or draw(st.booleans())}
    body = draw(changed(some).map(dumped).map(encoded) | spoiled(some))
    method = draw(st.sampled_from(["POST"] * 12 + ["GET", "PUT", "OPTIONS", "", "post"]))
    path = draw(st.sampled_from([path] * 12 + ["/v1/models", "/health", "/metrics", "/", "", "/v1/completions?a=%00"]))
    lines = [
        f"{method} {path}",
        "content-type: application/json",
        *draw(st.lists(st.sampled_from(HEADERS), max_size=1)),
    ]
    return "\n".join(lines).encode("latin-1") + b"\n\n" + body


def served(ids: list[int], finish: str | None, index: int = 0) -> dict[str, Any]:
    logprobs = {
        "token_logprobs": [-0.5] * len(ids),
        "tokens": ["a"] * len(ids),
        "top_logprobs": None,
        "text_offset": [],
    }
    return {"index": index, "text": "", "finish_reason": finish, "token_ids": ids, "logprobs": logprobs}


def envelope(*choices: dict[str, Any]) -> dict[str, Any]:
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    head = {"id": "1", "object": "text_completion", "created": 1, "model": "m"}
    return {**head, "choices": list(choices), "usage": usage}


ANSWERS = (
    envelope(served([7], "length"), served([9, 1], "stop", 1)),
    envelope(served([7], "length")),
    envelope(served([5], "stop")),
    {"error": {"message": "no", "type": "t", "code": 400}},
)
CHUNKS = (envelope(served([7], None)), envelope(served([8], "length")), {"error": {"message": "no"}}, envelope())
LISTED = {
    "object": "list",
    "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "o", "max_model_len": 99}],
}


@st.composite
def server_answers(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["completions"] * 4 + ["models"]))
    code = draw(st.sampled_from([200] * 12 + [204, 302, 400, 404, 429, 500, 503]))
    form = "application/json"
    if kind == "models":
        body = draw(spoiled(LISTED))
    elif draw(st.booleans()):
        body = draw(st.sampled_from(ANSWERS).flatmap(spoiled))
    else:
        form = "text/event-stream"
        events = draw(st.lists(st.sampled_from(CHUNKS).flatmap(spoiled), min_size=1, max_size=3))
        body = b"".join(b"data: " + event + b"\n\n" for event in events) + draw(
            st.sampled_from([b"data: [DONE]\n\n", b""])
        )
    form = draw(st.sampled_from([form] * 8 + ["text/html", "application/json; charset=x", ""]))
    return f"{kind} {code}\ncontent-type: {form}\n\n".encode() + body


STRATEGIES: dict[str, st.SearchStrategy[bytes]] = {
    "manifest": spoiled(MANIFEST),
    "shard": st.deferred(lambda: tables(files.preferences()) | damaged(files.parquet(files.preferences()))),
    "labels": st.deferred(lambda: tables(label_table()) | damaged(files.parquet(label_table()))),
    "features": st.deferred(lambda: feature_files() | damaged(files.features_bytes())),
    "template": spoiled(TEMPLATE),
    "router_config": spoiled(ROUTER),
    "answers": answers(),
    "structured": structured(),
    "request": requests(),
    "answer": server_answers(),
}
