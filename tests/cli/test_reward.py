"""From prompts without answers to best/worst pairs (`tokalign reward`), and `tokalign write-answers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from tests.cli.test_sampling import Scripted
from tests.rewards.test_reward_model import save_reward_model
from tokalign.cli import pairs, reward, sample, write_answers
from tokalign.evaluation.instructions import read_questions
from tokalign.generation.arguments import EngineArguments, SamplingArguments
from tokalign.rewards.judges import by_function, load_function
from tokalign.rewards.reward_model import RewardModel
from tokalign.stage.contract import check_preferences
from tokalign.stage.errors import ContractError, JobError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Yes.", "No, not at all.", "Perhaps.", "I do not know what you mean."]
FUNCTION = """
def brevity(prompts, completions, completion_ids, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(columns["sample"])
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text) for text in texts]

async def no_perhaps(completions, **_):
    return [None if "Perhaps" in c else 1.0 for c in completions]

def few(completions, **_):
    return [1.0]

def none_at_all(completions, **_):
    return [None] * len(completions)

def nan(completions, **_):
    return [float("nan") if "know" in c else 0 for c in completions]

def infinite(completions, **_):
    return [float("inf") if "know" in c else 0 for c in completions]

def words(completions, **_):
    return ["good"] * len(completions)

def single(completions, **_):
    return 1.0
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def functions(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(FUNCTION)
    return str(tmp_path / "rewards.py")


def rollouts(folder: Path, problems: int = 4, samples: int = 3, **changes) -> str:
    """A rollouts stage without a manifest: problem p<k>'s completions are of the lengths 1, 2 … characters."""
    rows = [
        {
            "id": f"p{k}",
            "prompt": f"question {k}",
            "answer": "2",
            "prompt_ids": [5, 6],
            "completion_ids": [10 + sample, 1],
            "completion": "abcdefgh"[: sample + 1],
            "finish_reason": "stop",
            "logprobs": [-1.0, -1.0],
            "sample": sample,
            "extracted": "2" if sample == 0 else None,
            "correct": sample == 0,
            **changes,
        }
        for k in range(problems)
        for sample in range(samples)
    ]
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder)


def score(tmp_path: Path, name: str = "rewarded", **changes) -> dict:
    values = {"dataset": str(tmp_path / "rollouts"), "output_dir": str(tmp_path / name), "shard_size": 5, **changes}
    return reward.main(reward.RewardArguments(**values))


def pair(tmp_path: Path, **changes) -> dict:
    values = {"dataset": str(tmp_path / "rewarded"), "output_dir": str(tmp_path / "pairs"), "rule": "best_worst"}
    return pairs.main(pairs.PairsArguments(**values | {"shard_size": 2} | changes))


def sample_three(tmp_path: Path, monkeypatch, tiny_path: str, answers: list[str | None]) -> None:
    prompts = [[{"role": "user", "content": f"Is {k} a lot?"}] for k in range(len(answers))]
    ids = [f"p{k}" for k in range(len(answers))]
    (tmp_path / "problems").mkdir()
    rows = Dataset.from_dict({"id": ids, "prompt": prompts, "answer": answers})
    rows.to_parquet(tmp_path / "problems" / "train.parquet")
    monkeypatch.setattr(sample, "load_engine", lambda arguments: Scripted(tiny_path, TEXTS))
    arguments = sample.SampleArguments(str(tmp_path / "problems"), str(tmp_path / "rollouts"), shard_size=2)
    sample.main(arguments, SamplingArguments(num_rollouts=3), EngineArguments(model=tiny_path))


# ------------------------------------------------------------------------------------------------ prompts to pairs


def test_from_prompts_without_answers_to_pairs(tmp_path, monkeypatch, tiny_path, judge, capsys):
    sample_three(tmp_path, monkeypatch, tiny_path, [None] * 6)
    rows = load_stage(tmp_path / "rollouts", stage="rollouts")
    assert rows["correct"] == rows["extracted"] == rows["answer"] == [None] * 18
    with pytest.raises(JobError, match=r"Problem 'p0': `correct` is missing; .*, or pair them by reward"):
        pair(tmp_path, dataset=str(tmp_path / "rollouts"), rule="frequency", output_dir=str(tmp_path / "by_answer"))

    score(tmp_path, reward_model=judge)
    assert "rewards from " in capsys.readouterr().out
    rewarded = load_stage(tmp_path / "rewarded", stage="rollouts")
    assert rewarded.remove_columns("reward").to_list() == rows.to_list()  # the same rows, in order
    model = RewardModel(judge)
    expected = model.score([model.encode(row["prompt"], row["completion"]) for row in rows])
    assert rewarded["reward"] == pytest.approx(expected, rel=1e-4, abs=1e-5)

    manifests = pair(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    pairs = load_stage(tmp_path / "pairs" / "pairs", stage="preferences", tokenizer=tokenizer)
    check_preferences(pairs, tokenizer)
    assert manifests["pairs"]["rows"] == len(pairs) == 6
    for row in pairs:
        own = [r for r in rewarded if r["id"] == row["id"]]
        by_text = {r["completion"]: r["reward"] for r in own}
        assert row["reward_chosen"] == max(by_text.values()) == by_text[row["chosen"]]
        assert row["reward_rejected"] == min(by_text.values()) == by_text[row["rejected"]]
    positive = load_stage(tmp_path / "pairs" / "positive", stage="sft")
    assert positive["completion_ids"] == pairs["chosen_ids"]
    assert not (tmp_path / "pairs" / "negative").exists()
    assert pair(tmp_path) == manifests  # nothing runs twice
    with pytest.raises(JobError, match=r"min_margin was 0\.0 and is 0\.5"):
        pair(tmp_path, min_margin=0.5)


def test_problems_with_and_without_answers_make_one_stage(tmp_path, monkeypatch, tiny_path, functions):
    sample_three(tmp_path, monkeypatch, tiny_path, [None, None, "2", "", None, "2"])  # the first shard has none at all
    rows = load_stage(tmp_path / "rollouts", stage="rollouts")
    assert [r["correct"] for r in rows if r["sample"] == 0] == [None, None, False, None, None, False]
    score(tmp_path, reward_function=f"{functions}:brevity")
    assert pair(tmp_path)["pairs"]["rows"] == 6


def test_verified_rollouts_by_reward(tmp_path):
    rollouts(tmp_path / "rollouts")
    score(tmp_path, verifier=True)
    assert load_stage(tmp_path / "rewarded")["reward"] == [1.0, 0.0, 0.0] * 4
    assert pair(tmp_path)["pairs"]["rows"] == 4
    pairs = load_stage(tmp_path / "pairs" / "pairs")
    assert set(pairs["chosen"]) == {"a"} and set(pairs["rejected"]) <= {"ab", "abc"}
    assert pairs["reward_chosen"] == [1.0] * 4 and pairs["reward_rejected"] == [0.0] * 4


def test_pairs_that_are_not_made_are_counted(tmp_path, functions):
    rollouts(tmp_path / "rollouts")
    with pytest.raises(ContractError, match=r"has no column `reward`.*`tokalign reward`"):
        pair(tmp_path, dataset=str(tmp_path / "rollouts"))
    score(tmp_path, reward_function=f"{functions}:brevity")
    with pytest.raises(ContractError, match=r"Nothing is left of 4 problems for .*: no problem's rewards differ"):
        pair(tmp_path, min_margin=2.0)  # the lengths 1 and 3 are no further apart
    manifest = read_manifest(tmp_path / "pairs" / "pairs")
    assert manifest["dropped"] == {"rewards no further apart than min_margin": 4}
    assert manifest["parameters"]["rule"] == "best_worst"


# ----------------------------------------------------------------------------------------------------- the judges


def test_functions_get_what_trl_gives_them(tmp_path, monkeypatch, functions):
    rollouts(tmp_path / "rollouts")
    score(tmp_path, reward_function=f"{functions}:brevity")
    assert load_stage(tmp_path / "rewarded")["reward"] == [-1.0, -2.0, -3.0] * 4
    monkeypatch.chdir(tmp_path)  # an importable module instead of a path, from the working folder
    score(tmp_path, "again", reward_function="rewards:brevity")
    assert load_stage(tmp_path / "again").to_list() == load_stage(tmp_path / "rewarded").to_list()
    prompt = [{"role": "user", "content": "q"}]
    rows = [{"id": "p", "prompt": prompt, "completion": "ab", "completion_ids": [1], "x": 3}]
    seen: dict = {}
    by_function(lambda **arguments: seen.update(arguments) or [0], "f")(rows)
    assert seen == {
        "prompts": [prompt],
        "completions": [[{"role": "assistant", "content": "ab"}]],
        "completion_ids": [[1]],
        "id": ["p"],
        "x": [3],
    }


def test_rollouts_without_a_reward_are_dropped_and_counted(tmp_path, functions, judge):
    rollouts(tmp_path / "rollouts", completion="Perhaps", correct=None)
    with pytest.raises(ContractError, match=r"No rollout of .* has a reward \(the reward function gave None: 12\)"):
        score(tmp_path, "none", reward_function=f"{functions}:no_perhaps")
    with pytest.raises(ContractError, match=r"a reward \(not verified: `correct` is null: 12\); choose another judge"):
        score(tmp_path, "unverified", verifier=True)
    rows = load_stage(tmp_path / "rollouts").to_list()
    rows[4]["completion"], rows[5]["completion"] = "x" * 200, "Yes"
    Dataset.from_list(rows).to_parquet(tmp_path / "rollouts" / "train.parquet")
    manifest = score(tmp_path, reward_model=judge)
    reason = "prompt and completion are longer than the reward model's 128 positions"
    assert manifest["dropped"] == {reason: 1} and manifest["rows"] == 11
    assert [r["sample"] for r in load_stage(tmp_path / "rewarded") if r["id"] == "p1"] == [0, 2]
    assert score(tmp_path, "some", reward_function=f"{functions}:no_perhaps")["rows"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "few",
            r"few gave 1 rewards for 5 rollouts, from row 'p0' \(sample 0\) to 'p1' \(sample 1\): it must",
        ),
        ("single", r"single gave 1 rewards for 5 rollouts"),
        ("nan", r"Row 'p0' \(sample 2\): .*nan gave nan, not a finite number; mend it, or return None"),
        ("infinite", r"Row 'p0' \(sample 2\): .*infinite gave inf, not a finite number"),
        ("words", r"Row 'p0' \(sample 0\): .*words gave 'good', not a finite number"),
        ("absent", r"--reward_function: .*rewards\.py has no function 'absent'; check the name"),
    ],
)
def test_bad_functions_are_one_sentence(tmp_path, functions, name, message):
    rollouts(tmp_path / "rollouts")
    rows = load_stage(tmp_path / "rollouts").to_list()
    rows[2]["completion"] = "I know"
    Dataset.from_list(rows).to_parquet(tmp_path / "rollouts" / "train.parquet")
    with pytest.raises((JobError, ContractError), match=message):
        score(tmp_path, reward_function=f"{functions}:{name}")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("rewards.py", r"--reward_function is 'rewards\.py': write module\.path:function or"),
        ("absent.py:f", r"--reward_function: there is no file absent\.py; check the path"),
        ("no.such.module:f", r"--reward_function: no\.such\.module cannot be imported \(No module named 'no'\)"),
    ],
)
def test_functions_that_are_not_there(where, message):
    with pytest.raises(ContractError, match=message):
        load_function(where)


def test_exactly_one_judge(tmp_path, judge):
    for judges in ({}, {"verifier": True, "reward_model": judge}, {"reward_model": judge, "reward_function": "a:b"}):
        with pytest.raises(ContractError, match="Choose one judge"):
            score(tmp_path, **judges)
    rollouts(tmp_path / "rollouts")
    with pytest.raises(ContractError, match=r"--reward_chat_template: there is no file absent\.jinja"):
        score(tmp_path, reward_model=judge, reward_chat_template="absent.jinja")


def test_another_judge_is_refused_on_resume(tmp_path, judge, functions):
    rollouts(tmp_path / "rollouts")
    score(tmp_path, reward_model=judge)
    with pytest.raises(JobError, match='judge was "reward_model" and is "verifier"'):
        score(tmp_path, verifier=True)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    with pytest.raises(JobError, match="chat_template was"):
        score(tmp_path, reward_model=judge, reward_chat_template=str(template))
    score(tmp_path, "template", reward_model=judge, reward_chat_template=str(template))
    assert load_stage(tmp_path / "template")["reward"] != load_stage(tmp_path / "rewarded")["reward"]
    score(tmp_path, "function", reward_function=f"{functions}:brevity")
    Path(functions).write_text(FUNCTION.replace("-len", "len"))
    with pytest.raises(JobError, match="source was"):
        score(tmp_path, "function", reward_function=f"{functions}:brevity")


def test_a_killed_run_goes_on(tmp_path, judge, monkeypatch):
    rollouts(tmp_path / "rollouts")
    score(tmp_path, reward_model=judge)
    scored = RewardModel.score
    calls = []

    def dies(self, rows, **arguments):
        calls.append(len(rows))
        if len(calls) == 2:
            raise RuntimeError("killed")
        return scored(self, rows, **arguments)

    monkeypatch.setattr(RewardModel, "score", dies)
    with pytest.raises(JobError, match="killed"):
        score(tmp_path, "killed", reward_model=judge)
    score(tmp_path, "killed", reward_model=judge)
    assert calls == [5, 5, 5, 2]  # the first shard is not judged again
    assert load_stage(tmp_path / "killed").to_list() == load_stage(tmp_path / "rewarded").to_list()


@pytest.mark.slow
def test_two_processes_judge_as_one(tmp_path, judge):
    rollouts(tmp_path / "rollouts")
    score(tmp_path, reward_model=judge)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tokalign", "reward", "--reward_model", judge, "--shard_size", "5"]
    command += ["--dataset", str(tmp_path / "rollouts"), "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_stage(tmp_path / "rewarded"), load_stage(tmp_path / "two")
    # other batches and other threads: the last bits of a reward may differ
    assert two["reward"][:] == pytest.approx(one["reward"][:], abs=1e-5)
    assert two.remove_columns("reward").to_list() == one.remove_columns("reward").to_list()
    assert done.stdout.count("rewards from") == 1


# -------------------------------------------------------------------------------------------------- answer files

ALPACA = [
    {"dataset": "koala", "instruction": "Say yes.", "output": "Yes", "generator": "text_davinci_003"},
    {"dataset": "vicuna", "instruction": "Say no.", "output": "No", "generator": "text_davinci_003"},
    {"dataset": "vicuna", "instruction": "Say it.", "output": "It", "generator": "text_davinci_003"},
]


def questions(path: Path, rows: list) -> str:
    as_list = path.suffix == ".json"
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer(tmp_path, monkeypatch, tiny_path, texts, engine=Scripted, **changes) -> Path:
    source = questions(tmp_path / "alpaca_eval.json", ALPACA)
    monkeypatch.setattr(write_answers, "load_engine", lambda arguments: engine(tiny_path, list(texts)))
    values = {"questions": source, "output_dir": str(tmp_path / "answers"), "name": "tiny", "shard_size": 2, **changes}
    return write_answers.main(write_answers.WriteAnswersArguments(**values), EngineArguments(model=tiny_path))


def test_alpaca_eval_reads_the_answers(tmp_path, monkeypatch, tiny_path, capsys):
    file = answer(tmp_path, monkeypatch, tiny_path, ["\nOf course. "], system_prompt="Be brief.")
    assert file == tmp_path / "answers" / "tiny.json"
    assert json.loads(file.read_text()) == [
        {key: row[key] for key in ("dataset", "instruction")} | {"output": "Of course.", "generator": "tiny"}
        for row in ALPACA
    ]
    assert "3 of 3 answered, 0 cut by max_tokens" in capsys.readouterr().out
    asked = load_stage(tmp_path / "answers" / "tiny.work", stage="rollouts")["prompt"][1]
    assert asked == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say no."}]


def test_a_killed_run_of_answers_goes_on_and_a_finished_one_loads_no_model(tmp_path, monkeypatch, tiny_path):
    calls = []

    class Dies(Scripted):
        def generate(self, prompts, params, *, adapter=None):
            calls.append(len(prompts))
            if len(calls) == 2:
                raise RuntimeError("killed")
            return super().generate(prompts, params, adapter=adapter)

    with pytest.raises(JobError, match="killed"):
        answer(tmp_path, monkeypatch, tiny_path, TEXTS, Dies, temperature=1.0)
    assert not (tmp_path / "answers" / "tiny.json").exists()
    file = answer(tmp_path, monkeypatch, tiny_path, TEXTS, Dies, temperature=1.0)
    assert calls == [2, 1, 1]
    once = answer(tmp_path, monkeypatch, tiny_path, TEXTS, temperature=1.0, output_dir=str(tmp_path / "once"))
    before = file.read_bytes()
    assert once.read_bytes() == before
    file.unlink()
    answer(tmp_path, monkeypatch, tiny_path, [], engine=None, temperature=1.0)
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["tiny.json", "tiny.work"]


def test_a_real_engine_answers_greedily_and_long_questions_are_counted(tmp_path, tiny_path, capsys):
    rows = [{"uid": "short", "prompt": "Do it."}, {"uid": "long", "prompt": "x" * 600}]
    values = {"questions": questions(tmp_path / "question.jsonl", rows), "output_dir": str(tmp_path), "name": "tiny"}
    arguments = write_answers.WriteAnswersArguments(**values, max_tokens=6)
    file = write_answers.main(arguments, EngineArguments(model=tiny_path))
    assert [(row["uid"], row["instruction"]) for row in json.loads(file.read_text())] == [("short", "Do it.")]
    assert "1 of 2 answered" in capsys.readouterr().out
    assert list(read_manifest(tmp_path / "tiny.work")["dropped"].values()) == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a"}], r"Row 0 of .*question\.jsonl has no `instruction` in words; mend"),
        ([ALPACA[0], {"prompt": ["a", "image"]}], r"Row 1 of .* has no `instruction` in words"),
        ([ALPACA[0], "a"], r"Row 1 of .* has no `instruction` in words"),
        ([], r"holds no questions"),
    ],
)
def test_bad_questions_are_one_sentence(tmp_path, rows, message):
    with pytest.raises(ContractError, match=message):
        read_questions(questions(tmp_path / "question.jsonl", rows))


def test_files_that_are_no_questions_are_one_sentence(tmp_path):
    with pytest.raises(ContractError, match=r"There is no questions file absent\.json; download"):
        read_questions("absent.json")
    for name, text in (("a.json", "[{]"), ("a.jsonl", '{"prompt": "p"}\n{"uid"\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(ContractError, match=r"is neither a JSON list nor JSON lines \(.*\); download it again"):
            read_questions(str(tmp_path / name))
    with pytest.raises(ContractError, match="--name is 'a/b'; it names the answer file, so leave out any folder"):
        write_answers.WriteAnswersArguments(questions="q", output_dir="o", name="a/b")
