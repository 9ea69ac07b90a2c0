"""Field credit: the equation against a plain loop, who is charged for what, and groups that span processes."""

from __future__ import annotations

import random
import statistics

import pytest

from tokalign.rewards import StructuredReward
from tokalign.trainers.credits.field import Charged, FieldCredit, Judged

REWARD = StructuredReward({})
GROUP = 4
INVENTED = ("/extra", True)


def made_up(groups: int, seed: int) -> tuple[list[Judged], list[Charged]]:
    """Random completions: fields right, wrong, missing or absent, some invented, tokens that belong to several."""
    draw = random.Random(seed)
    judged, charged = [], []
    for _ in range(groups * GROUP):
        values = {(f"/{name}", False): draw.choice([0.0, 0.5, 1.0]) for name in "abc" if draw.random() < 0.8}
        if draw.random() < 0.4:
            values[INVENTED] = 0.0
        length = draw.randint(1, 12)
        tokens = {name: sorted(draw.sample(range(length), draw.randint(0, length))) for name in values}
        faults = sorted(draw.sample(range(length), draw.randint(0, 2) if length > 1 else 0))
        judged.append(Judged(values, draw.random()))
        charged.append(Charged(length, None if draw.random() < 0.1 else tokens, faults))
    return judged, charged


def deviation(value: float, values: list[float], scale: str, epsilon: float) -> float:
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
            form = deviation(judged[index].form, forms, credit.form_scale, credit.epsilon)
            if credit.form_on == "place" and row.faults and (token in row.faults) != (form < 0):
                form = 0.0
            number = credit.form_weight * form
            for name, indices in row.tokens.items():
                if token in indices:
                    values = [member.values.get(name, 1.0 if name[1] else 0.0) for member in group]
                    value = judged[index].values[name]
                    number += credit.value_weight * deviation(value, values, credit.scale, credit.epsilon)
            numbers.append(number)
        every.append(numbers)
    return every


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"form_weight": 0.3, "value_weight": 2.0, "epsilon": 0.1},
        {"scale": "none", "form_on": "place"},
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
    """One right, one wrong, one that lacks the field, one that invents another and broke off before it."""
    name = ("/a", False)
    rows = [{name: 1.0}, {name: 0.0}, {name: 0.0}, {INVENTED: 0.0}]
    judged = [Judged(values, 1.0) for values in rows]
    charged = [Charged(3, {field: [1] for field in values}) for values in rows]
    right, wrong, lacks, invents = FieldCredit(REWARD).advantages(judged, charged, GROUP)
    assert right == pytest.approx([0.0, 1.5, 0.0], abs=1e-3)  # of the four, one is right: std 0.5
    assert wrong == lacks == pytest.approx([0.0, -0.5, 0.0], abs=1e-3)
    assert invents == pytest.approx([0.0, -1.5, 0.0], abs=1e-3)  # of the four, three did not


def test_a_form_that_all_have_and_fields_that_all_have_right_move_nothing() -> None:
    judged = [Judged({("/a", False): 1.0}, 0.9)] * GROUP
    charged = [Charged(2, {("/a", False): [0, 1]})] * GROUP
    assert FieldCredit(REWARD).advantages(judged, charged, GROUP) == [pytest.approx([0.0, 0.0], abs=1e-9)] * GROUP
