"""The ledger world: exact texts, no leak between splits, and a first error that a brute-force check confirms."""

import hashlib
import itertools
import json
import random

import jsonschema_rs
import pytest

from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.worlds import ledger, ledger_builder
from tokalign.worlds.ledger import (
    LedgerConfig,
    Problem,
    build_tokenizer,
    first_error,
    problems,
    solution,
    wrong_solution,
)


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
@pytest.mark.parametrize("slip_rate", [None, 0.4])
def test_wrong_solutions_end_in_a_wrong_answer(config, slip_rate):
    rng = random.Random(2)
    for problem in problems("train", 100, seed=9, config=config):
        answer = wrong_solution(problem, rng, slip_rate=slip_rate).rsplit("#### ", 1)[1]
        assert int(answer) != problem.answer


def test_slips_are_wrong_totals_and_other_events_at_the_rate_asked_for(tokenizer):
    """Line by line: every left number is the last total, and slips are as many and of the kinds that were asked for."""
    rng = random.Random(3)
    totals = events = possible = several = 0
    for problem in problems("train", 300, seed=12):
        text = wrong_solution(problem, rng, slip_rate=0.4)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        balance, slips = problem.start[0], 0
        for written, (line,) in zip(text.split("\n")[:-1], problem.steps, strict=True):
            left, op, right, _, total = written.split(": ")[1].split(" ")
            assert int(left) == balance
            wrong_total = ledger.apply(int(left), op, int(right)) != int(total)
            other_event = (op, int(right)) != (line.op, line.right)
            assert not (wrong_total and other_event)
            totals, events, possible = totals + wrong_total, events + other_event, possible + 1
            slips += wrong_total or other_event
            balance = int(total)
        assert text.endswith(f"#### {balance}") and slips >= 1
        several += slips > 1
    # At least one slip a solution, so somewhat above the rate; an event is a quarter of the draws.
    assert 0.35 < (totals + events) / possible < 0.55
    assert 2 * events < totals < 7 * events
    assert several > 60


@CONFIGS
@pytest.mark.parametrize("rendering", ledger.SCHEMAS)
def test_json_renderings_keep_their_schemas(rendering, config):
    validator = jsonschema_rs.validator_for(ledger.SCHEMAS[rendering], offline=True)
    rng = random.Random(0)
    for problem in problems("train", 20, seed=10, config=config):
        validator.validate(json.loads(solution(problem, rendering=rendering)))
        for _ in range(5):  # and a sloppy one never does
            sloppy = ledger.sloppy_solution(problem, rng, rendering=rendering)
            with pytest.raises((ValueError, jsonschema_rs.ValidationError)):
                validator.validate(json.loads(sloppy))


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


# --- the builder's SFT rows ------------------------------------------------------------------------------------------


def sft_rows(**options):
    arguments = ledger_builder.LedgerArguments(output_dir="unused", sft=400, **options)
    return list(ledger_builder._sft_rows(arguments, LedgerConfig()))


def problem_rows(split="test", **options):
    return list(
        ledger_builder._problem_rows(split, 100, ledger_builder.LedgerArguments("unused", **options), LedgerConfig())
    )


def rows_hash(rows):
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()


def test_rows_without_drafts_are_those_that_quoted_figures_were_measured_on():
    """Hashes taken before `draft_share` existed."""
    assert rows_hash(sft_rows()).startswith("1c599e7808955aea")
    assert rows_hash(sft_rows(request_share=0.5, renderings=["worked", "json"])).startswith("b8f734a351828256")


@pytest.mark.parametrize("rendering", ledger.RENDERINGS)
def test_drafts_are_fixed_on_request_or_kept_wrong(rendering):
    plain = {row["id"]: row for row in sft_rows(renderings=[rendering])}
    counts = {"none": 0, "correct, right draft": 0, "correct, wrong draft": 0, "wrong, wrong draft": 0}
    for row in sft_rows(renderings=[rendering], draft_share=0.5):
        asked, text = row["prompt"][0]["content"], row["completion"][0]["content"]
        right = plain[row["id"]]["completion"][0]["content"]
        if "Draft:" not in asked:
            assert row == plain[row["id"]]
            counts["none"] += 1
            continue
        request = next(name for name, sentence in ledger.REVISIONS.items() if sentence in asked)
        draft = asked.split("Draft:\n")[1].split("\n" + ledger.REVISIONS[request])[0]
        assert asked.endswith(ledger.ASKED.get(rendering, ledger.REVISIONS[request]))
        assert text == (right if request == "correct" else draft)
        counts[f"{request}, {'right' if draft == right else 'wrong'} draft"] += 1
    assert 160 < counts["none"] < 240
    assert 60 < counts["wrong, wrong draft"] < 140
    assert 25 < counts["correct, right draft"] < 80 and 25 < counts["correct, wrong draft"] < 80


# --- the builder's structured problems -------------------------------------------------------------------------------


def test_worked_problems_are_those_that_quoted_figures_were_measured_on():
    """Hash taken before `problem_rendering` existed."""
    assert rows_hash(problem_rows()).startswith("71ed909ccc4c3a5e")


@pytest.mark.parametrize("rendering", ledger.SCHEMAS)
def test_json_problems_hold_their_document_and_its_schema(rendering):
    worked = problem_rows()
    for row, plain in zip(problem_rows(problem_rendering=rendering), worked, strict=True):
        assert (row["id"], row["ledger"]) == (plain["id"], plain["ledger"])
        assert row["prompt"][0]["content"] == f"{plain['prompt'][0]['content']} {ledger.ASKED[rendering]}"
        assert row["answer"] == row["solution"]
        assert row["completion"] == [{"role": "assistant", "content": row["answer"]}]
        document, schema = json.loads(row["answer"]), json.loads(row["schema"])
        jsonschema_rs.validator_for(schema, offline=True).validate(document)
        answer = document["answer"] if rendering == "json" else document["answer"]["total"]
        assert schema == ledger.SCHEMAS[rendering] and str(answer) == plain["answer"]


def test_an_unknown_rendering_of_problems_says_so():
    with pytest.raises(ValueError, match="Unknown rendering 'xml': use one of worked, json, rows"):
        problem_rows(problem_rendering="xml")


def test_the_builder_writes_either_rendering(tmp_path):
    sizes = {"train": 5, "validation": 5, "test": 5, "sft": 5}
    for rendering in ledger.RENDERINGS:
        folder = tmp_path / rendering
        ledger_builder.main(ledger_builder.LedgerArguments(str(folder), **sizes, problem_rendering=rendering))
        structured = rendering in ledger.SCHEMAS
        stage = "structured" if structured else "problems"
        assert len(load_stage(folder, split="test", stage=stage)) == 5
        text = (folder / "README.md").read_text()
        assert ("| `schema` | JSON Schema of the document" in text) == structured
        assert (f"--problem_rendering {rendering}\n" in text) == structured
        # folders from before the option existed go on being this job's
        assert ("problem_rendering" in read_manifest(folder / "test")["parameters"]) == structured
