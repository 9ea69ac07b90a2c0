"""Field credit: the equation against a plain loop, who is charged for what, and groups that span processes."""

from __future__ import annotations

import random
import statistics
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.support import ALPHABET, tiny_tokenizer
from tests.trainers.structured import make_trainer, problems, save_ledger_model
from tokalign.rewards import StructuredReward
from tokalign.stage.pieces import token_offsets
from tokalign.trainers.credits import field
from tokalign.trainers.credits.field import Charged, FieldCredit, Judged

# What the trainer sees of a group of `KINDS`: the field `answer` is right, wrong, missing, and right before other text
ANSWER = [1.0, 0.0, None, 1.0]
REWARD = StructuredReward({})
GROUP = 4
INVENTED = ("/extra", "invented")


def made_up(groups: int, seed: int) -> tuple[list[Judged], list[Charged]]:
    """Random completions: fields right, wrong, missing or absent, some invented, tokens that belong to several."""
    draw = random.Random(seed)
    judged, charged = [], []
    for _ in range(groups * GROUP):
        there = {(f"/{name}", "there"): float(draw.random() < 0.7) for name in "abc" if draw.random() < 0.8}
        values = there | {(at, "value"): draw.choice([0.0, 0.5, 1.0]) for (at, _), found in there.items() if found}
        if draw.random() < 0.4:
            values[INVENTED] = 0.0
        length = draw.randint(1, 12)
        tokens = {name: sorted(draw.sample(range(length), draw.randint(0, length))) for name in values}
        faults = sorted(draw.sample(range(length), draw.randint(0, 2) if length > 1 else 0))
        judged.append(Judged(values, draw.random()))
        charged.append(Charged(length, None if draw.random() < 0.1 else tokens, faults))
    return judged, charged


def deviation(value: float, values: list[float], scale: str, epsilon: float) -> float:
    if len(values) < 2:
        return 0.0
    centered = value - statistics.mean(values)
    return centered / (statistics.stdev(values) + epsilon) if scale == "group" else centered


def looped(credit: FieldCredit, judged: list[Judged], charged: list[Charged]) -> list[list[float] | None]:
    """The equation, token by token and field by field."""
    every = []
    for index, row in enumerate(charged):
        group = judged[index // GROUP * GROUP :][:GROUP]
        if row.tokens is None:
            every.append(None)
            continue
        numbers = []
        for token in range(row.length):
            forms = [member.form for member in group]
            form = deviation(judged[index].form, forms, credit.form_scale, credit.epsilon) * credit.form_weight
            here = [name for name, indices in row.tokens.items() if token in indices]
            number = 0.0
            for name in here:
                came = [member.values for member in group if name in member.values or name == INVENTED]
                values = [values.get(name, 1.0) for values in came]
                number += deviation(judged[index].values[name], values, credit.scale, credit.epsilon)
            if credit.overlap == "mean" and here:
                number /= len(here)
            if credit.form_on == "place" and token in row.faults:
                numbers.append(min(form, 0.0))
            elif credit.form_on == "place" and row.faults:
                numbers.append(max(form, 0.0) + credit.value_weight * number)
            else:
                numbers.append(form + credit.value_weight * number)
        every.append(numbers)
    return every


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form_weight": 0.3, "value_weight": 2.0, "epsilon": 0.1},
        {"scale": "none", "form_on": "place"},
        {"overlap": "mean", "value_weight": 0.5},
        {"form_scale": "none", "form_on": "place", "form_weight": 0.5},
    ],
)
def test_advantages_are_the_equations(options) -> None:
    credit = FieldCredit(REWARD, **options)
    for seed in range(5):
        judged, charged = made_up(groups=3, seed=seed)
        made = credit.advantages(judged, charged, GROUP)
        for numbers, expected in zip(made, looped(credit, judged, charged), strict=True):
            assert numbers == (expected and pytest.approx(expected, abs=1e-9))


def test_a_process_makes_its_own_rows_of_what_all_have_judged() -> None:
    """Groups of 4 over two processes of 6 completions each: the second group spans them."""
    credit = FieldCredit(REWARD)
    judged, charged = made_up(groups=3, seed=7)
    whole = credit.advantages(judged, charged, GROUP)
    parts = [credit.advantages(judged, charged[first : first + 6], GROUP, first) for first in (0, 6)]
    assert parts[0] + parts[1] == whole


def test_who_is_charged_for_what() -> None:
    """One right, one wrong, one that lacks the value, one that broke off before it and had invented another."""
    there, value = ("/a", "there"), ("/a", "value")
    rows = [{there: 1.0, value: 1.0}, {there: 1.0, value: 0.0}, {there: 0.0}, {INVENTED: 0.0}]
    places = {there: [0], value: [1], INVENTED: [2]}
    judged = [Judged(values, 1.0) for values in rows]
    charged = [Charged(3, {name: places[name] for name in values}) for values in rows]
    right, wrong, lacks, invents = FieldCredit(REWARD).advantages(judged, charged, GROUP)
    # Of three that came to it, two have it: mean 2/3, std 0.577. Of the two that have it, one is right: std 0.707.
    assert right == pytest.approx([0.577, 0.707, 0.0], abs=1e-3)
    assert wrong == pytest.approx([0.577, -0.707, 0.0], abs=1e-3)
    assert lacks == pytest.approx([-1.155, 0.0, 0.0], abs=1e-3)
    assert invents == pytest.approx([0.0, 0.0, -1.5], abs=1e-3)  # of the four, three did not


def test_a_form_that_all_have_and_fields_that_all_have_right_move_nothing() -> None:
    judged = [Judged({("/a", "value"): 1.0}, 0.9)] * GROUP
    charged = [Charged(2, {("/a", "value"): [0, 1]})] * GROUP
    assert FieldCredit(REWARD).advantages(judged, charged, GROUP) == [pytest.approx([0.0, 0.0], abs=1e-9)] * GROUP


def test_a_field_is_the_references_wherever_it_stands() -> None:
    """The first item is left out: what stands first is the second's, with its key, and a bracket lacks the first."""
    tokenizer = tiny_tokenizer(ALPHABET + "[]{}")
    credit = FieldCredit(StructuredReward({}))
    credit.attach(SimpleNamespace(processing_class=tokenizer))
    text = '{"a": [{"n": "b"}], "z": 3}'
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    judged, charged = credit.judge(text, ids, '{"a": [{"n": "a"}, {"n": "b"}]}', None)
    lacks, has, value, invents = ("/a/0/n", "there"), ("/a/1/n", "there"), ("/a/1/n", "value"), ("/z", "invented")
    assert judged.values == {lacks: 0.0, has: 1.0, value: 1.0, invents: 0.0}
    texts = {name: tokenizer.decode([ids[i] for i in tokens]) for name, tokens in charged.tokens.items()}
    assert texts == {lacks: "]", has: '"n":', value: '"b"', invents: ', "z": 3'}
    _, after = credit.judge(text + " ok", ids[:-1] + tokenizer(" ok")["input_ids"], '{"a": []}', None)
    assert [i for i in after.faults if i < len(text)] == [] and len(after.faults) >= 2


# --------------------------------------------------------------------------------------------------------- in a trainer


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_ledger_model(tmp_path_factory.mktemp("ledger"))


def generated(trainer) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def forms(trainer, group: int = 0) -> list[float]:
    """The form components' advantages of a group, from the reward's scores alone."""
    scores, weights = trainer.structured.last_scores, trainer.structured.weights
    worth = [
        sum(weight * (row[name] or 0.0) for name, weight in weights.items() if name != "correctness")
        for row in scores[group * GROUP :][:GROUP]
    ]
    return [deviation(value, worth, "group", 1e-4) for value in worth]


def texts_where(trainer, batch, row: int, numbers) -> str:
    """The text of the row's tokens whose advantage is not `numbers`."""
    mask = batch["completion_mask"][row].bool()
    ids, made = batch["completion_ids"][row][mask], batch["advantages"][row][mask]
    return trainer.processing_class.decode(ids[(made - numbers).abs() > 1e-3])


def test_the_tokens_of_a_field_answer_for_it_and_all_for_the_form(path, tmp_path) -> None:
    trainer = make_trainer(path, tmp_path, credit="field")
    batch = generated(trainer)
    form = forms(trainer)
    there, values = [float(answer is not None) for answer in ANSWER], [a for a in ANSWER if a is not None]
    for row, answer in enumerate(ANSWER):
        elsewhere = texts_where(trainer, batch, row, form[row]).replace(" ", "")
        assert elsewhere.startswith(',"answer":') if answer is not None else elsewhere == "}"
        made = batch["advantages"][row][batch["completion_mask"][row].bool()]
        at = [number for number in made.tolist() if abs(number - form[row]) > 1e-3]
        charged = [deviation(there[row], there, "group", 1e-4)]
        if answer is not None:
            charged.append(deviation(answer, values, "group", 1e-4))
        assert sorted({round(number - form[row], 3) for number in at}) == pytest.approx(sorted(charged), abs=2e-3)
    metrics = trainer._metrics["train"]
    assert metrics["credit/field/by_sequence"] == [0.0] and metrics["credit/field/coverage"] == [1.0]


def test_a_completion_whose_ids_are_not_its_text_keeps_its_sequences_advantage(path, tmp_path, monkeypatch) -> None:
    """The second completion of each group; for the others its fields count as they are."""
    plain = generated(make_trainer(path, tmp_path, credit="field"))["advantages"]
    sequence = generated(make_trainer(path, tmp_path, credit="sequence"))["advantages"]
    seen: list[str] = []

    def offsets(tokenizer, ids, text):
        seen.append(text)
        return None if len(seen) % GROUP == 2 else token_offsets(tokenizer, ids, text)

    monkeypatch.setattr(field, "token_offsets", offsets)
    trainer = make_trainer(path, tmp_path, credit="field")
    batch = generated(trainer)
    unread = torch.arange(len(sequence)) % GROUP == 1
    expected = torch.where(unread[:, None], sequence[:, None], plain) * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], expected)
    assert trainer._metrics["train"]["credit/field/by_sequence"] == [0.25]


def test_groups_that_span_processes_are_gathered(path, tmp_path, monkeypatch) -> None:
    """One group of 16 over two processes; this is the second."""
    judged, charged = made_up(groups=4, seed=3)
    credit = FieldCredit(REWARD)
    whole = credit.advantages(judged, charged, 16)

    accelerator = SimpleNamespace(process_index=1)
    credit.attach(SimpleNamespace(accelerator=accelerator, _mode_and_group=lambda: ("train", 16)))
    monkeypatch.setattr(field, "gather_object", lambda own: [*judged[:8], *own])
    rows = dict(zip("abcdefgh", zip(judged[8:], charged[8:], strict=True), strict=True))
    monkeypatch.setattr(credit, "judge", lambda completion, *_: rows[completion])
    assert credit([None] * 8, list("abcdefgh"), [[]] * 8, [0.0] * 8) == whole[8:]


def brevity(completions, **_):
    return [-float(len(completion[0]["content"])) for completion in completions]


def test_fields_count_beside_other_rewards_as_their_rewards_weight_does(path, tmp_path) -> None:
    alone = generated(make_trainer(path, tmp_path, credit="field"))["advantages"]
    short = generated(make_trainer(path, tmp_path, reward_funcs=[brevity, REWARD], reward_weights=[0.5, 0.0]))
    trainer = make_trainer(
        path, tmp_path, credit="field", reward_funcs=[brevity, StructuredReward()], reward_weights=[0.5, 1.0]
    )
    batch = generated(trainer)
    expected = (short["advantages"][:, None] + 2.0 * alone) * batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], expected)
    two = [StructuredReward(name=name) for name in ("one", "two")]
    trainer = make_trainer(path, tmp_path, credit="field", reward_funcs=two)
    assert trainer.credit_func_names == ["field_one", "field_two"]
    torch.testing.assert_close(generated(trainer)["advantages"], alone)


def test_the_coefficient_is_of_the_fields_within_the_form(path, tmp_path) -> None:
    alone = generated(make_trainer(path, tmp_path, credit="field"))["advantages"]
    doubled = generated(make_trainer(path, tmp_path, credit="field", credit_coefficient=2.0))["advantages"]
    without = generated(make_trainer(path, tmp_path, credit="field", credit_coefficient=0.0))["advantages"]
    assert without.dim() == 1  # nothing that differs from token to token is left
    torch.testing.assert_close(doubled - alone, alone - without[:, None] * (alone != 0))
    trainer = make_trainer(path, tmp_path, credit="field", scale_rewards="none")
    assert (trainer.credit_funcs[0].scale, trainer.credit_funcs[0].form_scale) == ("none", "none")


def test_evaluation_and_other_formats(path, tmp_path) -> None:
    """Evaluation has groups of its own size; a format without spans trains by its sequences, to the last bit."""
    trainer = make_trainer(path, tmp_path, credit="field", eval_dataset=Dataset.from_list(problems(16)[:4]))
    assert trainer.evaluate()["eval_credit/field/coverage"] == 1.0
    advantages = [
        generated(make_trainer(path, tmp_path, credit=credit, output_format="yaml"))["advantages"]
        for credit in ("field", "sequence")
    ]
    assert advantages[0].dim() == 1 and torch.equal(*advantages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_preset": "rl-struct"}, "The preset 'rl-struct' does not know fields; set credit to 'sequence'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalises each field by itself already"),
        ({"credit_mode": "weight"}, "an advantage of its own; leave credit_mode unset"),
    ],
)
def test_field_credit_is_refused_where_there_is_none(path, tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(path, tmp_path, credit="field", **options)
