"""The SLM's pass, sentences and branches, each against a plain loop: token by token, row by row, without batches."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import save_tiny, tiny_tokenizer
from tokalign.generation import EngineArguments, load_engine
from tokalign.routing.labels.branches import Fork, continue_forks, own_branch, spans
from tokalign.routing.labels.divergence import DivergenceScorer, differences
from tokalign.routing.labels.sentences import SentenceRule, sentence_rule

END = 1


def make_rows(count: int = 7, seed: int = 0, longest: int = 30) -> tuple[list[list[int]], list[list[int]]]:
    draw = random.Random(seed)
    return tuple(
        [[draw.randrange(6, 60) for _ in range(draw.randint(1, longest))] for _ in range(count)] for _ in range(2)
    )


@pytest.fixture(scope="module")
def model(tiny_path):
    return AutoModelForCausalLM.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def engine(tiny_path):
    return load_engine(EngineArguments(model=tiny_path, dtype="float32"))


# --- the SLM's one pass -----------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_prefill(model, prompt, completion, shared, top_k):
    """One forward a position, over what is before it."""
    rows = []
    for t, token in enumerate(completion):
        ids = torch.tensor([[*prompt, *completion[:t]]])
        hidden = model.base_model(ids).last_hidden_state[0, -1]
        logits = model(ids).logits[0, -1, :shared].double()
        logprobs = logits.log_softmax(-1)
        rows.append(
            {
                "predicted": int(logits.argmax()),
                "logprob": float(logprobs[token]),
                "hidden": hidden,
                "top_logits": torch.tensor(sorted(logits.tolist(), reverse=True)[:top_k]),
                "entropy": -float((logprobs.exp() * logprobs).sum()),
            }
        )
    return rows


@pytest.mark.parametrize(("shared", "top_k"), [(None, 10), (61, 1000)])
def test_prefill_equals_a_plain_loop_over_positions(tiny_path, model, shared, top_k):
    shared = shared or model.config.vocab_size
    prompts, completions = make_rows()
    scorer = DivergenceScorer(
        tiny_path, tiny_tokenizer(), shared_vocab=shared, top_k=top_k, token_budget=120, tile_bytes=9000
    )
    for prompt, completion, read in zip(prompts, completions, scorer.prefill(prompts, completions), strict=True):
        expected = plain_prefill(model, prompt, completion, shared, top_k)
        assert read.predicted.tolist() == [row["predicted"] for row in expected]
        assert max(read.predicted) < shared
        assert read.logprobs.tolist() == pytest.approx([row["logprob"] for row in expected], abs=1e-4)
        features = read.features
        assert {key: value.dtype.name for key, value in features.items()} == {
            "hidden": "float16",
            "top_logits": "float16",
            "predicted": "int32",
            "entropy": "float32",
        }
        assert features["top_logits"].shape == (len(completion), min(top_k, shared))
        for name in ("hidden", "top_logits"):
            wanted = torch.stack([row[name] for row in expected]).float()
            torch.testing.assert_close(torch.tensor(features[name]).float(), wanted, rtol=2e-3, atol=2e-3)
        assert features["entropy"].tolist() == pytest.approx([row["entropy"] for row in expected], abs=1e-4)
        assert features["predicted"].tolist() == read.predicted.tolist()


def test_prefill_without_features_and_what_it_refuses(tiny_path):
    scorer = DivergenceScorer(tiny_path, tiny_tokenizer(), shared_vocab=50, features=False)
    (read,) = scorer.prefill([[7, 8]], [[9]])
    assert read.features is None and read.predicted.shape == (1,)
    assert scorer.problem([7], [9]) is None
    assert scorer.problem([7], []) == "the completion is empty"
    assert scorer.problem([7], [50]) == "an id that the two models do not share (50 shared)"
    assert "longer than the model's 512 positions" in scorer.problem([7] * 500, [7] * 13)


def test_not_finite_is_named(tmp_path):
    path = save_tiny(tmp_path / "broken")
    broken = AutoModelForCausalLM.from_pretrained(path)
    scorer = DivergenceScorer(broken, tiny_tokenizer(), shared_vocab=80)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = float("nan")
    with pytest.raises(ValueError, match=r"Row p1: the log-probability of completion token 0 is not finite"):
        scorer.prefill([[7], [7]], [[8, 8], [9, 8]], names=["p0", "p1"])


def test_differences_and_spans():
    assert differences([1, 2, 3, 4], [1, 3, 3, 5]) == [1, 3]
    with pytest.raises(ValueError):
        differences([1], [1, 2])
    assert spans(iter("aabccc")) == {"a": range(0, 2), "b": range(2, 3), "c": range(3, 6)}
    assert spans([]) == {}


# --- sentences --------------------------------------------------------------------------------------------------------


def text_rule() -> tuple[SentenceRule, list[str]]:
    """Words as tokens, so that every kind of token is there."""
    words = ["a", "b", ".", "...", "\n", "end.", ".com", "!)", " ", "。", "�", ","]

    class Words:
        all_special_ids = (len(words),)

        def __len__(self):
            return len(words) + 1

        def batch_decode(self, ids, **_):
            return [words[i] for (i,) in ids]

    return sentence_rule(Words(), 1000), words


def test_which_tokens_end_sentences():
    rule, words = text_rule()
    assert {words[i] for i in rule.marks} == {".", "...", "\n", "end.", "!)", "。"}
    assert {words[i] for i in rule.words} == {"a", "b", "end.", ".com", "�"}


@pytest.mark.parametrize(
    ("tokens", "begun", "length"),
    [
        (["a", ".", "b", ".", "a"], True, 4),
        ([".", "b", "."], True, 3),  # the fork's own token ends the current sentence
        ([".", "b", "."], False, None),  # … or there is none open, and it ends nothing
        (["a", ".", "\n", "...", "b", "!)"], True, 6),  # marks without a word between them are one end
        (["end.", "end.", "a"], False, 2),
        (["a", ".com", ",", "b", "."], True, None),
        ([], True, None),
    ],
)
def test_cut_after_the_current_sentence_and_one_more(tokens, begun, length):
    rule, words = text_rule()
    assert rule.cut([words.index(token) for token in tokens], begun) == length


def test_open_before_is_the_state_that_cut_goes_on_from():
    rule, words = text_rule()
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(words)) for _ in range(15)]
        states = rule.open_before(ids)
        assert len(states) == 16
        for t in range(16):
            since = 0  # the plain rule: words since the last mark that ended something, or marks that ended nothing
            for token in ids[:t]:
                since += token in rule.words
                if token in rule.marks:
                    since = 0
            assert states[t] is (since > 0)


# --- branches ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_branch(model, fork, ends, max_tokens, rule, positions=512):
    """Token by token with whole forwards; ends looked for after every token."""
    branch = [fork.token]
    while True:
        if branch[-1] in ends or (rule is not None and rule.cut(branch, fork.begun) is not None):
            return branch, "stop"
        prefix = [*fork.prompt_ids, *fork.completion_ids[: fork.position], *branch]
        if len(branch) > max_tokens or len(prefix) >= positions:
            return branch, "length"
        branch.append(int(model(torch.tensor([prefix])).logits[0, -1].argmax()))


def make_forks(rule, count=6, seed=3):
    prompts, completions = make_rows(count, seed)
    draw = random.Random(seed)
    forks = []
    for prompt, completion in zip(prompts, completions, strict=True):
        begun = rule.open_before(completion) if rule else [False] * (len(completion) + 1)
        for t in sorted(draw.sample(range(len(completion)), min(3, len(completion)))):
            forks.append(Fork(prompt, completion, t, draw.choice([END, *range(6, 60)]), begun[t]))
    return forks


@pytest.mark.parametrize("shared_prefill", [10**9, 0])
@pytest.mark.parametrize("sentences", [None, 1, 2])
def test_branches_equal_a_plain_loop(engine, model, shared_prefill, sentences):
    # a rule under which sentences are short: a third of the ids end one
    rule = SentenceRule(frozenset(range(6, 80, 3)), frozenset(range(6, 80, 2)), sentences) if sentences else None
    forks = make_forks(rule)
    expected = [plain_branch(model, fork, {END}, 25, rule) for fork in forks]
    assert continue_forks(engine, forks, {END}, max_tokens=25, rule=rule, shared_prefill=shared_prefill) == expected
    assert {reason for _, reason in expected} == {"stop", "length"} or sentences
    assert len({len(branch) for branch, _ in expected}) > 1


def test_an_end_token_is_a_finished_branch_and_no_room_an_unfinished_one(engine):
    full = Fork([7] * 500, [8] * 12, 11, 9)
    ended = Fork([7], [8, 9], 1, END)
    assert continue_forks(engine, [ended, full], {END}, max_tokens=5) == [([END], "stop"), ([9], "length")]
    ((branch, reason),) = continue_forks(engine, [Fork([7] * 500, [8] * 12, 9, 9)], {END}, max_tokens=50)
    assert len(branch) <= 3 and (reason == "length" or branch[-1] == END)
    assert continue_forks(engine, [], {END}, max_tokens=5) == []


def test_a_round_is_one_engine_call_for_all_branches():
    class Counting:
        tokenizer, max_length, calls = tiny_tokenizer(), None, []

        def generate(self, prompts, params, *, adapter=None):
            from tokalign.generation.protocol import Completion

            self.calls.append(
                [(len(p), each.max_tokens, each.stop_token_ids) for p, each in zip(prompts, params, strict=True)]
            )
            return [[Completion([10, 20], [0.0, 0.0], "stop")] for _ in prompts]

    engine, rule = Counting(), SentenceRule(frozenset({20}), frozenset({10, 11}), 2)
    forks = [Fork([7], [8, 9], 1, 11, True), Fork([7, 7], [8], 0, 20, True)]
    assert continue_forks(engine, forks, {END}, max_tokens=8, rule=rule, positions=9) == [
        ([11, 10, 20, 10, 20], "stop"),
        ([20, 10, 20], "stop"),
    ]
    # positions bound what a server is asked for
    assert engine.calls == [[(3, 6, (20,)), (3, 6, (20,))], [(5, 4, (20,))]]


def test_own_branch_is_cut_by_the_same_rule():
    rule = SentenceRule(frozenset({20}), frozenset({10, 11}), 2)
    completion = [10, 20, 11, 20, 10, 20, 10]
    begun = rule.open_before(completion)
    assert own_branch(Fork([7], completion, 0, 99, begun[0]), rule, 50) == [10, 20, 11, 20]
    assert own_branch(Fork([7], completion, 1, 99, begun[1]), rule, 50) == [20, 11, 20]
    assert own_branch(Fork([7], completion, 5, 99, begun[5]), rule, 50) == [20, 10]
    assert own_branch(Fork([7], completion, 0, 99, begun[0]), rule, 2) == [10, 20, 11]


def test_last_tokens_of_prefixes(engine):
    from tokalign.generation.protocol import SamplingParams, continue_from_prefixes

    prompts, completions = make_rows(1, seed=5)
    prompt, completion = prompts[0], completions[0]
    lengths, last = [1, 3, 3, len(completion)], [40, 41, 42, 43]
    params = SamplingParams(temperature=0, max_tokens=10)
    expected = engine.generate(
        [[*prompt, *completion[: t - 1], token] for t, token in zip(lengths, last, strict=True)], params
    )
    found = continue_from_prefixes(engine, prompt, completion, lengths, params, last_tokens=last)
    assert [c[0].token_ids for c in found] == [c[0].token_ids for c in expected]
    with pytest.raises(ValueError, match="There are 2 prefix lengths and 1 last tokens: give one each"):
        continue_from_prefixes(engine, prompt, completion, [1, 2], params, last_tokens=[3])
    with pytest.raises(ValueError, match="no length 0, which has no token"):
        continue_from_prefixes(engine, prompt, completion, [0], params, last_tokens=[3])
