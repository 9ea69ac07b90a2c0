"""Figures of structured output against plain loops, resume, the table of runs, and the script."""

import json
import math

import pytest
from datasets import Dataset

from tests.support import ALPHABET, tiny_model, tiny_tokenizer
from tokalign.cli.main import main
from tokalign.evaluation.structured import FIGURES, compare, evaluate_structured, judge, latency_of, plot
from tokalign.generation.protocol import Completion
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.content import leaf_f1
from tokalign.stage.errors import ContractError
from tokalign.stage.loading import load_stage

TOKENIZER = tiny_tokenizer(ALPHABET + "{}[]_\\")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"type": "string"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
)
REFERENCE = {"a": 1, "b": "x"}
# What the model writes -> valid, structure, compliance, invented keys; the reference is REFERENCE.
WRITTEN = {
    '{"a": 1, "b": "x"}': (True, True, True, 0),
    '{"a": 1.0, "b": "x"}': (True, True, True, 0),  # 1.0 is an integer in JSON Schema
    '{"a": 2, "b": "x"}': (True, True, True, 0),
    '{"a": 99, "b": "y"}': (True, True, False, 0),  # a bound is no matter of structure
    '{"a": "1", "b": "x"}': (True, False, False, 0),
    '{"a": 1}': (True, False, False, 0),
    '{"a": 1, "b": "x", "c": 3, "d": 4}': (True, False, False, 2),
    '{"a": 1, "b": "x"} so': (False, False, False, None),
    '{"a": 1, "b"': (False, False, False, None),
    "a is 1": (False, False, False, None),
}


class Writer:
    """Engine that writes the i-th text of WRITTEN for the prompt "i", or the reference if `good`."""

    def __init__(self, good=False):
        self.good, self.calls, self.closed, self.tokenizer = good, [], False, TOKENIZER

    def generate(self, prompts, params, *, adapter=None):
        each = params if isinstance(params, list) else [params] * len(prompts)
        self.calls.append((len(prompts), each))
        return [[self._write(p, q)] for p, q in zip(prompts, each, strict=True)]

    def _write(self, prompt, params):
        assert params.temperature == 0
        number = int(TOKENIZER.decode(prompt).removeprefix("<|user|>").split("<|end|>")[0])
        text = list(WRITTEN)[0 if self.good else number % len(WRITTEN)]
        ids = TOKENIZER(text)["input_ids"]
        ids = [*ids, 1]
        cut = ids[: params.max_tokens]
        return Completion(cut, [0.0] * len(cut), "stop" if len(cut) == len(ids) else "length")

    def close(self):
        self.closed = True


def problems_of(count=10, schema=SCHEMA, answer=None):
    answer = json.dumps(REFERENCE) if answer is None else answer
    return Dataset.from_list(
        [
            {
                "id": f"p{i}",
                "prompt": [{"role": "user", "content": str(i)}],
                "answer": None if i == 3 else answer,
                "schema": schema,
            }
            for i in range(count)
        ]
    )


def run(output_dir, problems=None, good=False, **settings):
    engine = Writer(good)
    settings.setdefault("reward", StructuredReward())
    metrics = evaluate_structured(
        lambda: engine, problems or problems_of(), output_dir, tokenizer=TOKENIZER, **settings
    )
    return metrics, engine


def test_every_figure_against_a_plain_loop(tmp_path):
    metrics, engine = run(tmp_path, shard_size=4)
    reward = StructuredReward(schema=SCHEMA)
    expected: dict[str, list[float]] = {name: [] for name in FIGURES}
    for i, (text, (valid, structure, compliance, invented)) in enumerate(WRITTEN.items()):
        expected["validity"].append(valid)
        expected["structure"].append(structure)
        expected["compliance"].append(compliance)
        expected["truncated"].append(0)
        expected["total"].append(reward.score(text, None if i == 3 else REFERENCE)["total"])
        if invented is not None:
            expected["invented_keys"].append(invented)
            expected["hallucinated"].append(invented > 0)
        if i != 3:  # it has no reference
            expected["content_f1"].append(leaf_f1(json.loads(text), REFERENCE) if valid else 0.0)
            expected["exact_match"].append(valid and json.loads(text) == REFERENCE and '"1"' not in text)
    for name, values in expected.items():
        figure = metrics["figures"][name]
        assert figure["n"] == len(values)
        assert math.isclose(figure["value"], sum(values) / len(values)), name
        assert figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]
    assert metrics["n"] == 10 and engine.closed
    assert metrics["figures"]["content_f1"]["n"] == 9 and metrics["figures"]["invented_keys"]["n"] == 7
    rows = load_stage(tmp_path)
    assert list(rows["completion"]) == list(WRITTEN)
    assert rows[9]["reason"] and rows[0]["reason"] is None and rows[0]["reward_correctness"] == 1.0


def test_truncated_documents_are_none(tmp_path):
    metrics, _ = run(tmp_path, good=True, max_tokens=6)
    assert metrics["figures"]["truncated"]["value"] == 1 and metrics["figures"]["validity"]["value"] == 0
    assert metrics["figures"]["invented_keys"] is None and metrics["figures"]["exact_match"]["value"] == 0


def test_constrained_sends_each_problem_its_schema(tmp_path):
    other = json.dumps({"type": "object", "properties": {"z": {"type": "null"}}})
    rows = problems_of(4).to_list()
    rows[2]["schema"] = None
    _, engine = run(tmp_path / "a", Dataset.from_list(rows), schema=other, constrained=True)
    (one, warm), (four, each) = engine.calls
    assert (one, warm[0].max_tokens, warm[0].json_schema) == (1, 1, SCHEMA)  # engine start and first grammar, apart
    assert four == 4 and [params.json_schema for params in each] == [SCHEMA, SCHEMA, other, SCHEMA]
    _, engine = run(tmp_path / "b", Dataset.from_list(rows), schema=other)
    assert all(params.json_schema is None for _, each in engine.calls for params in each)


def test_time_is_kept_beside_the_rows(tmp_path):
    metrics, engine = run(tmp_path, shard_size=4)
    latency = metrics["latency"]
    assert latency["tokens"] == sum(len(ids) for ids in load_stage(tmp_path)["completion_ids"])
    assert latency["tokens_per_second"] == pytest.approx(latency["tokens"] / latency["generation_seconds"])
    assert latency["first_call_seconds"] > 0 and [count for count, _ in engine.calls] == [1, 4, 4, 2]
    with open(next((tmp_path / "timing").iterdir()), "a") as stream:
        stream.write('{"what": "gener')  # a process that was killed while it wrote
    assert latency_of(tmp_path) == latency
    assert latency_of(tmp_path / "nowhere")["tokens_per_second"] is None


class Killed(Writer):
    def generate(self, prompts, params, *, adapter=None):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().generate(prompts, params, adapter=adapter)


def test_a_killed_run_goes_on_and_a_finished_one_loads_nothing(tmp_path):
    whole, _ = run(tmp_path / "whole", shard_size=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate_structured(
            Killed, problems_of(), tmp_path / "killed", reward=StructuredReward(), tokenizer=TOKENIZER, shard_size=4
        )
    resumed, engine = run(tmp_path / "killed", shard_size=4)
    assert [count for count, _ in engine.calls] == [1, 4, 2]
    assert load_stage(tmp_path / "killed").to_list() == load_stage(tmp_path / "whole").to_list()
    assert resumed["figures"] == whole["figures"]
    assert resumed["latency"]["tokens"] == whole["latency"]["tokens"]
    again, engine = run(tmp_path / "killed", shard_size=4)
    assert engine.calls == [] and again == resumed


def test_allowed_values_are_judged_by_their_agreement(tmp_path):
    schema = json.dumps({"type": "object", "properties": {"city": {"type": "string"}}})
    answer = json.dumps({"name": "weather", "arguments": {"city": ["Rome", "Roma"], "day": ["", "today"]}})
    wanted = json.dumps({"type": "object", "properties": {"name": {}, "arguments": json.loads(schema)}})
    texts = ['{"name": "weather", "arguments": {"city": "Roma"}}', '{"name": "weather", "arguments": {"city": "Oslo"}}']

    class Caller(Writer):
        def _write(self, prompt, params):
            number = int(TOKENIZER.decode(prompt).removeprefix("<|user|>").split("<|end|>")[0])
            ids = [*TOKENIZER(texts[number])["input_ids"], 1]
            return Completion(ids, [0.0] * len(ids), "stop")

    metrics = evaluate_structured(
        Caller,
        problems_of(2, wanted, answer),
        tmp_path,
        reward=StructuredReward(references="allowed"),
        tokenizer=TOKENIZER,
    )
    assert metrics["figures"]["exact_match"]["value"] == 0.5
    assert metrics["figures"]["content_f1"]["value"] == pytest.approx((1 + 1 / 2) / 2)


def test_calls_with_values_match_in_any_order():
    call = {"type": "object", "required": ["name", "arguments"], "properties": {"name": {}, "arguments": {}}}
    reward = StructuredReward({"type": "array", "items": call}, output_format="tool_call")
    one, two = ({"name": "f", "arguments": {"x": x}} for x in (1, True))
    answer = json.dumps([one, two, one])
    for calls, exact in (
        ([two, one, one], True),
        ([one, two, one], True),
        ([one, two, two], False),
        ([one, two], False),
    ):
        judged = judge(reward, json.dumps(calls), answer, None)
        assert judged["exact_match"] is exact and (judged["content_f1"] == 1.0) is exact
        assert (judged["reward_correctness"] == 1.0) is exact


def test_runs_side_by_side(tmp_path):
    run(tmp_path / "bad", shard_size=5)
    run(tmp_path / "good", problems_of().select(range(9, -1, -1)), good=True)  # another order
    table = compare([tmp_path / "bad", tmp_path / "good"], ["base", "ours"])
    base, ours = table["runs"]
    assert (base["name"], base["differences"], ours["name"]) == ("base", None, "ours")
    assert base["figures"] == run(tmp_path / "bad", shard_size=5)[0]["figures"]
    difference = ours["differences"]["validity"]
    assert difference["difference"] == pytest.approx(0.3) and difference["n"] == 10
    assert (difference["wins"], difference["losses"]) == (3, 0)
    # Keys are counted in documents, so only problems with one in both runs are compared.
    assert ours["differences"]["invented_keys"]["n"] == 7
    assert ours["differences"]["invented_keys"]["difference"] == pytest.approx(-2 / 7)
    assert ours["differences"]["exact_match"]["n"] == 9
    assert [run["name"] for run in compare([tmp_path / "bad", tmp_path / "good"])["runs"]] == ["bad", "good"]
    plot(table, tmp_path / "table.png")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(ValueError, match="There are 2 runs but 1 names"):
        compare([tmp_path / "bad", tmp_path / "good"], ["a"])
    with pytest.raises(ValueError, match="Two runs are called 'a'"):
        compare([tmp_path / "bad", tmp_path / "good"], ["a", "a"])
    run(tmp_path / "more", problems_of(11))
    with pytest.raises(ContractError, match="do not both hold problem 'p10'; evaluate them on the same"):
        compare([tmp_path / "bad", tmp_path / "more"])
    problems_of().to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(ContractError, match="has no column `validity`; run `tokalign evaluate structured`"):
        compare([tmp_path / "other"])


def changed(**columns):
    rows = problems_of(3).to_list()
    for row in rows[2:]:
        row |= columns
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("problems", "settings", "sentence"),
    [
        (changed(id="p0"), {}, "Row 2 of the problems: `id` 'p0' occurs twice, first in row 0"),
        (changed(schema=None), {}, "Row 'p2': there is no `schema`; add the column, or give --schema"),
        (problems_of(3).remove_columns("schema"), {}, "Row 'p0': there is no `schema`"),
        (changed(schema='{"type": "foo"}'), {}, "Row 'p2': `schema`: .*invalid"),
        (changed(answer="{"), {}, "Row 'p2': `answer` .*; give the reference as JSON text"),
        (
            problems_of(3),
            {"reward": StructuredReward(output_format="yaml"), "constrained": True},
            "constrained decoding writes JSON, but output_format is 'yaml'",
        ),
        (problems_of(3), {"reward": StructuredReward(preset="rl-struct")}, "preset 'rl-struct' cannot judge structure"),
    ],
)
def test_bad_input_stops_before_any_generation(problems, settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        evaluate_structured(
            lambda: pytest.fail("the engine was loaded"),
            problems,
            tmp_path,
            tokenizer=TOKENIZER,
            **{"reward": StructuredReward(), **settings},
        )


def test_the_verb_free_constrained_and_the_table(tmp_path, capsys):
    model = tmp_path / "model"
    TOKENIZER.save_pretrained(model)
    tiny_model(len(TOKENIZER)).save_pretrained(model)
    short = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    problems = [{"id": f"p{i}", "prompt": str(i), "answer": '{"a": 1}'} for i in range(6)]
    Dataset.from_list(problems).to_parquet(tmp_path / "problems" / "train.parquet")
    (tmp_path / "schema.json").write_text(json.dumps(short))

    def script(*arguments):
        main(["evaluate", "structured", *map(str, arguments)])

    common = ["--model", model, "--problems", tmp_path / "problems", "--split", "train", "--max_tokens", 60]
    common += ["--schema", tmp_path / "schema.json", "--limit", 5]
    script(*common, "--output_dir", tmp_path / "free")
    script(*common, "--output_dir", tmp_path / "bound", "--constrained", "true")
    free, bound = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("free", "bound"))
    assert free["n"] == bound["n"] == 5 and (free["constrained"], bound["constrained"]) == (False, True)
    assert free["figures"]["validity"]["value"] == 0
    figures = bound["figures"]
    assert figures["validity"]["value"] == figures["compliance"]["value"] > 0
    assert figures["validity"]["value"] == pytest.approx(1 - figures["truncated"]["value"])
    assert bound["latency"]["tokens_per_second"] > 0
    capsys.readouterr()
    script("--runs", tmp_path / "free", tmp_path / "bound", "--names", "free", "bound", "--output_dir", tmp_path / "t")
    assert "schema compliance" in capsys.readouterr().out
    table = json.loads((tmp_path / "t" / "table.json").read_text())
    difference = table["runs"][1]["differences"]["validity"]["difference"]
    assert difference == pytest.approx(figures["validity"]["value"])
    assert (tmp_path / "t" / "table.png").exists()
    with pytest.raises(ValueError, match="An evaluation needs --model and --problems, or --runs"):
        script("--output_dir", tmp_path / "nothing")
