"""The ledger world: exact texts, no leak between splits, and a first error that a brute-force check confirms."""

import itertools
import random

import pytest

from tokalign.data import ledger
from tokalign.data.ledger import LedgerConfig, Problem, build_tokenizer, first_error, problems, solution, wrong_solution


@pytest.fixture(scope="module", params=["whole", "split"])
def tokenizer(request):
    return build_tokenizer(digits=request.param)


# Two people make gifts, and with them the lines whose order is free.
TWO = LedgerConfig(people=2, min_events=2, max_events=4, max_start=12, max_change=9, max_number=60)
CONFIGS = pytest.mark.parametrize("config", [LedgerConfig(), TWO], ids=["one person", "two people"])


def encode(tokenizer, text):
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def right_solutions(problem, rendering):
    """Every text that counts as right, spelled out."""
    parts = ledger._alternatives(problem, rendering)
    return {"".join(choice) for choice in itertools.product(*parts)}


@CONFIGS
def test_every_text_survives_the_tokenizer(tokenizer, config):
    rng = random.Random(0)
    for problem in problems("train", 60, seed=3, config=config):
        texts = [problem.text()]
        for rendering in ledger.RENDERINGS:
            texts += [solution(problem, rendering=rendering), wrong_solution(problem, rng, rendering=rendering)]
        for request in ledger.REQUESTS:
            texts.append(ledger.prompt(problem, request=request, rendering="json"))
            texts.append(ledger.prompt(problem, request=request, draft=solution(problem)))
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


@CONFIGS
def test_solution_follows_the_story(config):
    """The worked solution equals one computed by a plain interpreter of the sentences."""
    for problem in problems("train", 200, seed=5, config=config):
        owned = {}
        *story, question = problem.text().replace("?", ".").removesuffix(".").split(". ")
        for sentence in story:
            words = sentence.split()
            if words[1] == "has":
                owned[words[0]] = int(words[2])
            elif words[1] == "finds":
                owned[words[0]] += int(words[2])
            elif words[1] == "loses":
                owned[words[0]] -= int(words[2])
            elif words[1] == "gives":
                owned[words[0]] -= int(words[2])
                owned[words[-1]] += int(words[2])
            elif words[1] == "doubles":
                owned[words[0]] *= 2
            else:
                assert owned[words[0]] % 2 == 0
                owned[words[0]] //= 2
            assert min(owned.values()) >= 0
        asked = question.split()
        assert problem.answer == (sum(owned.values()) if "all" in asked else owned[asked[4]])
        assert solution(problem).endswith(f"#### {problem.answer}")


@CONFIGS
def test_splits_share_no_identity_and_repeat_none(config):
    seen = {split: [p.identity for p in problems(split, 300, seed=1, config=config)] for split in ledger.SPLITS}
    everything = list(itertools.chain.from_iterable(seen.values()))
    assert len(everything) == len(set(everything))


def test_identity_ignores_names_and_things():
    problem = next(problems("train", 1, seed=2))
    renamed = Problem(
        tuple(reversed(ledger.NAMES))[: len(problem.names)],
        next(thing for thing in ledger.THINGS if thing != problem.thing),
        problem.start,
        problem.events,
        problem.asked,
        problem.steps,
        problem.answer,
    )
    assert renamed.text() != problem.text()
    assert renamed.identity == problem.identity


def test_one_seed_gives_one_world():
    assert [p.text() for p in problems("test", 20, seed=4)] == [p.text() for p in problems("test", 20, seed=4)]
    assert [p.text() for p in problems("test", 20, seed=4)] != [p.text() for p in problems("test", 20, seed=5)]


@CONFIGS
@pytest.mark.parametrize("rendering", ledger.RENDERINGS)
def test_right_solutions_have_no_error(tokenizer, rendering, config):
    for problem in problems("train", 25, seed=6, config=config):
        rights = sorted(right_solutions(problem, rendering))
        assert solution(problem, rendering=rendering) in rights
        for text in random.Random(0).sample(rights, min(len(rights), 4)):
            ids = encode(tokenizer, text)
            assert first_error(problem, ids, tokenizer, rendering=rendering) is None
            assert first_error(problem, ids[:-3], tokenizer, rendering=rendering) is None  # right as far as it goes


@CONFIGS
@pytest.mark.parametrize("rendering", ledger.RENDERINGS)
def test_first_error_is_where_no_right_solution_goes_on(tokenizer, rendering, config):
    """Against brute force: the longest prefix that any right solution shares ends just before the first error."""
    rng = random.Random(1)
    for problem in problems("train", 15, seed=7, config=config):
        rights = [encode(tokenizer, text) for text in right_solutions(problem, rendering)]
        for _ in range(3):
            ids = encode(tokenizer, wrong_solution(problem, rng, rendering=rendering))
            shared = max(
                sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, right, strict=False)))
                for right in rights
            )
            assert first_error(problem, ids, tokenizer, rendering=rendering) == shared < len(ids)


def test_text_after_the_end_is_an_error(tokenizer):
    problem = next(problems("train", 1, seed=8))
    ids = encode(tokenizer, solution(problem))
    assert first_error(problem, [*ids, ids[0]], tokenizer) == len(ids)


@CONFIGS
def test_wrong_solutions_end_in_a_wrong_answer(config):
    rng = random.Random(2)
    for problem in problems("train", 100, seed=9, config=config):
        answer = wrong_solution(problem, rng).rsplit("#### ", 1)[1]
        assert int(answer) != problem.answer


@CONFIGS
def test_json_rendering_keeps_its_schema(config):
    jsonschema_rs = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    import json

    for problem in problems("train", 20, seed=10, config=config):
        jsonschema_rs.validate(json.loads(solution(problem, rendering="json")), ledger.JSON_SCHEMA)


@CONFIGS
def test_a_problem_survives_its_json(config):
    for problem in problems("train", 50, seed=11, config=config):
        again = Problem.from_json(problem.to_json())
        assert (again.text(), again.answer, again.steps) == (problem.text(), problem.answer, problem.steps)


def test_difficulty_is_obeyed():
    config = LedgerConfig(people=1, min_events=5, max_events=6, max_start=3, max_change=2, max_number=9)
    for problem in problems("train", 50, config=config):
        assert len(problem.names) == 1 and 5 <= len(problem.events) <= 6
        assert all(line.total <= 9 for step in problem.steps for line in step)


def test_a_world_too_small_says_so():
    config = LedgerConfig(people=1, min_events=1, max_events=1, max_start=1, max_change=1)
    with pytest.raises(ValueError, match=r"Only .* distinct problems"):
        list(problems("train", 500, config=config))
