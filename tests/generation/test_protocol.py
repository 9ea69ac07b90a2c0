"""The protocol's own checks, and bans for engines that cannot lift them midway."""

import pytest
from trl import TrlParser

from tokalign.generation import Completion, EngineArguments, SamplingParams, continue_from_prefixes, load_engine
from tokalign.generation.protocol import generate_with_early_bans, params_of_each


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": "text"},
        {"banned_steps": 0},
    ],
)
def test_parameters_outside_their_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is .*") as error:
        SamplingParams(**wrong)
    assert "\n" not in str(error.value)


def test_arguments_parse_from_a_command_line_and_yaml(tmp_path):
    (arguments,) = TrlParser((EngineArguments,)).parse_args_and_config(
        ["--model", "m", "--engine", "openai", "--base_urls", "http://a/v1", "http://b/v1"]
    )
    assert arguments == EngineArguments("m", engine="openai", base_urls=["http://a/v1", "http://b/v1"])
    (tmp_path / "a.yaml").write_text("model: m\nengine: vllm\ntoken_budget: 7\nenforce_eager: true\n")
    (arguments,) = TrlParser((EngineArguments,)).parse_args_and_config(["--config", str(tmp_path / "a.yaml")])
    assert arguments == EngineArguments("m", engine="vllm", token_budget=7, enforce_eager=True)


def test_a_missing_vllm_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs vLLM: install tokalign\[vllm\]"):
        load_engine(EngineArguments("m", engine="vllm"))


def test_one_or_each():
    assert params_of_each(SamplingParams(n=2), 3) == [SamplingParams(n=2)] * 3
    with pytest.raises(ValueError, match="3 prompts but 2"):
        params_of_each([SamplingParams()] * 2, 3)


class Counting:
    """An engine that writes max_tokens times the number of banned ids, and remembers what it was asked."""

    tokenizer = None

    def __init__(self):
        self.asked = []

    def generate(self, prompts, params, *, adapter=None):
        each = params_of_each(params, len(prompts))
        self.asked.append((prompts, each))
        return [
            [Completion([len(p.banned_token_ids)] * p.max_tokens, [0.0] * p.max_tokens, "length") for _ in range(p.n)]
            for p in each
        ]


def test_early_bans_in_two_parts():
    engine = Counting()
    early = SamplingParams(n=2, max_tokens=5, seed=1, banned_token_ids=(8, 9), banned_steps=2)
    always = SamplingParams(max_tokens=3, banned_token_ids=(8,))
    results = generate_with_early_bans(engine.generate, [[4], [5]], [early, always])
    assert [[c.token_ids for c in r] for r in results] == [[[2, 2, 0, 0, 0]] * 2, [[1, 1, 1]]]
    assert all(len(c.logprobs) == len(c.token_ids) for r in results for c in r)
    prompts, params = engine.asked[1]
    assert prompts == [[4, 2, 2], [4, 2, 2]] and params[0].seed != params[1].seed
    with pytest.raises(ValueError, match="Prompt 0 has both banned_steps and stop"):
        generate_with_early_bans(
            engine.generate, [[4]], [SamplingParams(stop=("a",), banned_token_ids=(1,), banned_steps=1)]
        )


def test_prefixes_without_a_shared_cache_are_plain_prompts():
    engine = Counting()
    continue_from_prefixes(engine, [1, 2], [3, 4, 5], [0, 2], SamplingParams(max_tokens=1))
    assert engine.asked[0][0] == [[1, 2], [1, 2, 3, 4]]
    with pytest.raises(ValueError, match="Prefix length 4 is outside"):
        continue_from_prefixes(engine, [1, 2], [3, 4, 5], [4], SamplingParams())
