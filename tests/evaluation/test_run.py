"""An evaluation is verified, resumable, independent of its shards, and comparable by problem."""

import hashlib
import json

import pytest
from datasets import Dataset

from tests.support import tiny_tokenizer
from tokalign.evaluation.run import compare_runs, evaluate, prompt_ids, write_metrics
from tokalign.generation.protocol import Completion
from tokalign.prompts import PromptRendering
from tokalign.stage.errors import ContractError
from tokalign.stage.seeds import problem_seed

TOKENIZER = tiny_tokenizer()


class Solver:
    """Engine that answers `a + b` right for greedy decoding where a < `skill`, and by the seed's coin for samples."""

    def __init__(self, skill):
        self.skill, self.calls, self.closed, self.tokenizer = skill, 0, False, TOKENIZER

    def generate(self, prompts, params, *, adapter=None):
        self.calls += 1
        each = params if isinstance(params, list) else [params] * len(prompts)
        return [[self._answer(p, q, i) for i in range(q.n)] for p, q in zip(prompts, each, strict=True)]

    def _answer(self, prompt, params, sample):
        a, b = map(int, TOKENIZER.decode(prompt).removeprefix("<|user|>").split("<|end|>")[0].split(" + "))
        coin = hashlib.sha256(f"{params.seed}/{sample}".encode()).digest()[0] % 2 == 0
        right = a < self.skill if params.temperature == 0 else coin
        ids = TOKENIZER(f"#### {a + b + (not right)}")["input_ids"][: params.max_tokens]
        return Completion([*ids, 1], [0.0] * (len(ids) + 1), "stop" if len(ids) < params.max_tokens else "length")

    def close(self):
        self.closed = True


def _problems(count=20):
    return Dataset.from_list([{"id": f"p{i}", "prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(count)])


def _evaluate(output_dir, skill=15, problems=None, **settings):
    engine = Solver(skill)
    metrics = evaluate(
        lambda: engine,
        problems or _problems(),
        output_dir,
        extract=lambda text: text.removeprefix("#### ") or None,
        match=lambda prediction, reference: prediction == reference,
        tokenizer=TOKENIZER,
        **settings,
    )
    return metrics, engine


def test_figures_of_a_known_solver(tmp_path):
    metrics, engine = _evaluate(tmp_path, samples=4, shard_size=6)
    assert metrics["greedy_accuracy"] == 0.75 and metrics["n"] == 20 and metrics["truncated"] == 0
    assert metrics["ci95"][0] < 0.75 < metrics["ci95"][1]
    coins = [
        [
            hashlib.sha256(f"{problem_seed(0, f'p{i}', 'evaluation')}/{s}".encode()).digest()[0] % 2 == 0
            for s in range(4)
        ]
        for i in range(20)
    ]
    assert metrics["sampled_accuracy"] == pytest.approx(sum(map(sum, coins)) / 80)
    assert [row["k"] for row in metrics["pass_at_k"]] == [1, 2, 4]
    assert metrics["pass_at_k"][2]["mean"] == pytest.approx(sum(map(any, coins)) / 20)
    assert engine.closed
    write_metrics(tmp_path, metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_shards_change_no_figure_and_a_finished_run_needs_no_engine(tmp_path):
    first, _ = _evaluate(tmp_path / "a", samples=3, shard_size=4)
    second, _ = _evaluate(tmp_path / "b", samples=3, shard_size=20)
    again, engine = _evaluate(tmp_path / "b", samples=3, shard_size=20)
    assert engine.calls == 0
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert again == second


def test_greedy_alone(tmp_path):
    metrics, engine = _evaluate(tmp_path)
    assert metrics["sampled_accuracy"] is None and metrics["pass_at_k"] is None and engine.calls == 1


def test_truncated_answers_are_counted(tmp_path):
    metrics, _ = _evaluate(tmp_path, max_tokens=3)
    assert metrics["truncated"] == 1 and metrics["greedy_accuracy"] == 0


def test_what_comes_after_a_stop_string_is_no_answer(tmp_path):
    """The last `####` of a model that ran on is the answer to a question of its own."""

    class RunsOn(Solver):
        def _answer(self, prompt, params, sample):
            answer = super()._answer(prompt, params, sample)
            more = TOKENIZER("\n\n1 + 1\n#### 99")["input_ids"]
            return Completion([*answer.token_ids[:-1], *more, 1], [0.0] * (len(answer.token_ids) + len(more)), "stop")

    engine = RunsOn(15)
    options = dict(tokenizer=TOKENIZER, match=lambda prediction, reference: prediction == reference, samples=2)
    options["extract"] = lambda text: text.rpartition("#### ")[2].strip() or None
    ran_on = evaluate(lambda: engine, _problems(), tmp_path / "a", **options)
    cut = evaluate(lambda: engine, _problems(), tmp_path / "b", stop=["\n\n"], **options)
    assert (ran_on["greedy_accuracy"], cut["greedy_accuracy"]) == (0, 0.75)
    assert ran_on["sampled_accuracy"] == 0 < cut["sampled_accuracy"]


def test_prompt_ids_of_another_tokenizer_are_refused(tmp_path):
    """A problem that has `prompt_ids`, such as a rollout, is not rendered again."""
    rows = [row | {"prompt_ids": TOKENIZER(f"<|user|>{row['prompt']}<|end|>")["input_ids"]} for row in _problems()]
    metrics, _ = _evaluate(tmp_path / "own", problems=Dataset.from_list(rows))
    assert metrics["greedy_accuracy"] == 0.75
    for row in rows:
        row["prompt_ids"] = [6 + (i + 20) % 80 for i in row["prompt_ids"]]
    with pytest.raises(ContractError, match=r"Row 0 \(id 'p0'\): `prompt` is not what .* reads in `prompt_ids`"):
        _evaluate(tmp_path / "other", problems=Dataset.from_list(rows))


def test_runs_are_compared_by_problem(tmp_path):
    _evaluate(tmp_path / "weak", skill=5, samples=2)
    # The same problems in another order.
    _evaluate(tmp_path / "strong", skill=15, samples=2, problems=_problems().select(range(19, -1, -1)))
    comparison = compare_runs(tmp_path / "strong", tmp_path / "weak")
    assert comparison["greedy"]["difference"] == 0.5
    assert (comparison["greedy"]["wins"], comparison["greedy"]["losses"]) == (10, 0)
    assert comparison["sampled"]["difference"] == 0  # the same seeds, the same coins
    assert comparison["logps"] is None and comparison["settings"] == {}
    _evaluate(tmp_path / "other", problems=_problems(21), max_tokens=99)
    with pytest.raises(ValueError, match="1 problems are in one run only, the first with id 'p20'"):
        compare_runs(tmp_path / "other", tmp_path / "weak")


def test_settings_that_differ_are_told(tmp_path):
    _evaluate(tmp_path / "a")
    _evaluate(tmp_path / "b", max_tokens=99)
    assert compare_runs(tmp_path / "a", tmp_path / "b")["settings"] == {"max_tokens": [512, 99]}


def test_repeated_ids_are_refused(tmp_path):
    problems = Dataset.from_list([{"id": "p", "prompt": "1 + 1", "answer": "2"}] * 2)
    with pytest.raises(ContractError, match="Row 1 of the problems: `id` 'p' occurs twice"):
        _evaluate(tmp_path, problems=problems)


def test_prompts_become_the_ids_that_the_model_is_trained_on():
    messages = [{"role": "user", "content": "1 + 1"}]
    templated = TOKENIZER("<|user|>1 + 1<|end|><|assistant|>")["input_ids"]
    assert prompt_ids({"prompt": messages}, TOKENIZER) == prompt_ids({"prompt": "1 + 1"}, TOKENIZER) == templated
    assert prompt_ids({"prompt": "1 + 1"}, TOKENIZER, PromptRendering("raw")) == TOKENIZER("1 + 1")["input_ids"]
    assert prompt_ids({"prompt": "x", "prompt_ids": [5, 6]}, TOKENIZER) == [5, 6]
    with pytest.raises(ContractError, match="holds messages, which `raw` cannot render: use `chat`"):
        prompt_ids({"prompt": messages}, TOKENIZER, PromptRendering("raw"))
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ContractError, match="no chat template: use prompt_format `raw`"):
        prompt_ids({"prompt": "1 + 1"}, plain)
