"""The two rules against plain loops, and what pairing leaves out."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tokalign.data.pairing import (
    BestWorstOptions,
    PairingOptions,
    best_rows,
    best_worst_pair,
    check_something_left,
    frequent_wrong_answers,
    group_consecutive,
    negative_rows,
    positive_rows,
    preference_pairs,
)
from tokalign.stage.errors import ContractError


def rollout(k: int, extracted: str | None, correct: bool = False, **changes) -> dict:
    return {
        "id": "p",
        "prompt": "question",
        "answer": "right",
        "prompt_ids": [5, 6],
        "completion_ids": [10 + k, 1],
        "completion": f"text {k}",
        "finish_reason": "stop",
        "extracted": extracted,
        "correct": correct,
        **changes,
    }


def mixed() -> list[dict]:
    answers = ["right", "a", "b", "right", "a", "c", "b", "a", "right"]  # wrong: a 3, b 2, c 1
    return [rollout(k, answer, answer == "right") for k, answer in enumerate(answers)]


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1), st.floats(0.01, 1))
def test_frequent_wrong_answers_is_the_papers_rule(answers, coverage):
    left, expected, covered = list(answers), [], 0
    while covered < coverage * len(answers):  # take the most frequent one left, until the share is covered
        best = max(sorted(set(left), key=lambda a: (a is None, a or "")), key=left.count)
        expected.append(best)
        covered += left.count(best)
        left = [answer for answer in left if answer != best]
    assert frequent_wrong_answers(answers, coverage) == expected


def test_frequent_wrong_answers_by_hand():
    assert frequent_wrong_answers(["a", "a", "a", "b", "b", "c"]) == ["a"]  # 3 of 6 is half
    assert frequent_wrong_answers(["a", "a", "b", "b", "c"]) == ["a", "b"]
    assert frequent_wrong_answers(["c", "b", "a"]) == ["a", "b"]  # ties: by the string
    assert frequent_wrong_answers([]) == []


def test_pairs_and_sft_rows_keep_what_the_chat_template_was_given():
    told = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}}
    rollouts = [{**row, **told, "reward": float(row["correct"])} for row in mixed()]
    rules = (preference_pairs, positive_rows, negative_rows, best_worst_pair, best_rows)
    rows = [rule(rollouts).rows[0] for rule in rules]
    for row in rows:
        assert told.items() <= row.items()
    assert told.keys().isdisjoint(preference_pairs(mixed()).rows[0])


def test_pairs_of_a_problem():
    selection = preference_pairs(mixed(), PairingOptions(coverage=0.8))
    assert selection.reason is None and selection.left_out == {}
    assert [row["rejected_answer"] for row in selection.rows] == ["a", "b"]
    assert [row["pair"] for row in selection.rows] == [0, 1]
    by_ids = {tuple(row["completion_ids"]): row for row in mixed()}
    for row in selection.rows:
        chosen, rejected = by_ids[tuple(row["chosen_ids"])], by_ids[tuple(row["rejected_ids"])]
        assert chosen["correct"] and rejected["extracted"] == row["rejected_answer"]
        assert (row["chosen"], row["rejected"]) == (chosen["completion"], rejected["completion"])
    assert len(preference_pairs(mixed(), PairingOptions(coverage=0.8, max_pairs_per_problem=1)).rows) == 1
    assert preference_pairs(mixed(), PairingOptions(coverage=0.8)) == selection  # nothing but the seed decides
    seeds = [preference_pairs(mixed(), PairingOptions(seed=seed)).rows[0] for seed in range(20)]
    assert len({tuple(row["chosen_ids"]) for row in seeds}) == 3
    assert len({tuple(row["rejected_ids"]) for row in seeds}) == 3


def test_sft_rows_are_the_same_trajectories():
    options = PairingOptions(coverage=1.0)
    negative = negative_rows(mixed(), options).rows
    pairs = preference_pairs(mixed(), options).rows
    assert [row["completion_ids"] for row in negative] == [row["rejected_ids"] for row in pairs]
    (positive,) = positive_rows(mixed(), options).rows
    assert positive["completion_ids"] in [[10, 1], [13, 1], [18, 1]]
    assert positive["input_ids"] == positive["prompt_ids"] + positive["completion_ids"]
    assert positive["completion_mask"] == [0, 0, 1, 1]


def test_unfinished_empty_and_unparsable_rollouts():
    rollouts = [
        rollout(0, "right", True),
        rollout(1, "right", True, finish_reason="length"),
        rollout(2, "a", finish_reason="length"),
        rollout(3, None, completion_ids=[], completion=""),
        rollout(4, None, completion_ids=[1], completion=""),
        rollout(5, None),
        rollout(6, None),
        rollout(7, "b"),
    ]
    selection = preference_pairs(rollouts)
    assert selection.left_out == {"truncated completion": 2, "empty completion": 2}
    assert [row["rejected_answer"] for row in selection.rows] == ["b"]
    assert selection.rows[0]["chosen_ids"] == [10, 1]
    selection = preference_pairs(rollouts, PairingOptions(include_unparsable=True))
    assert [row["rejected_answer"] for row in selection.rows] == [None]  # 2 of 3
    assert preference_pairs(rollouts[:-1]).reason == "no wrong rollout with an answer"
    assert negative_rows(rollouts[:-1]).reason == "no wrong rollout with an answer"
    assert preference_pairs(rollouts[1:5]).reason == "no finished rollout"


def test_answers_by_a_function_where_rollouts_have_none():
    rollouts = [{k: v for k, v in row.items() if k != "extracted"} for row in mixed()]
    selection = preference_pairs(rollouts, answer_of=lambda row: row["completion"])
    assert len(selection.rows) == 3  # six different texts, half of them


def test_problems_that_are_all_right_or_all_wrong():
    right, wrong = mixed()[::3][:2], mixed()[1:3]
    assert preference_pairs(right).reason == "no wrong rollout" == negative_rows(right).reason
    assert preference_pairs(wrong).reason == "no correct rollout" == positive_rows(wrong).reason
    assert positive_rows(right).rows and negative_rows(wrong).rows


def test_bad_rollouts_are_named():
    with pytest.raises(
        ContractError, match=r"Problem 'p': the same `completion_ids` are marked both correct and wrong"
    ):
        preference_pairs([rollout(0, "right", True), rollout(0, "a")])
    with pytest.raises(ContractError, match=r"Problem 'p': `prompt_ids` differ between its rollouts"):
        preference_pairs([rollout(0, "right", True), rollout(1, "a", prompt_ids=[5])])
    with pytest.raises(ContractError, match=r"Problem 'p': `correct` is missing"):
        preference_pairs([rollout(0, "a", None)])
    with pytest.raises(ContractError, match=r"coverage is 0"):
        PairingOptions(coverage=0)


def rewarded(rewards, **changes) -> list[dict]:
    return [rollout(k, None, None, answer=None, reward=reward, **changes) for k, reward in enumerate(rewards)]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.integers(0, 3), st.integers(0, 5))
def test_best_and_worst_is_the_papers_rule(rewards, margin, seed):
    best = worst = rewards[0]
    for reward in rewards:
        if reward > best:
            best = reward
        if reward < worst:
            worst = reward
    selection = best_worst_pair(rewarded(rewards), BestWorstOptions(min_margin=margin, seed=seed))
    if best - worst <= margin:
        assert selection == ([], "rewards no further apart than min_margin", {})
        return
    (row,) = selection.rows
    chosen, rejected = (int(row[side].removeprefix("text ")) for side in ("chosen", "rejected"))
    assert (rewards[chosen], rewards[rejected]) == (best, worst) == (row["reward_chosen"], row["reward_rejected"])
    assert (row["chosen_ids"], row["rejected_ids"]) == ([10 + chosen, 1], [10 + rejected, 1])
    assert (row["prompt_ids"], row["answer"], row["pair"]) == ([5, 6], None, 0)
    (best_row,) = best_rows(rewarded(rewards), BestWorstOptions(min_margin=margin, seed=seed)).rows
    assert best_row["completion_ids"] == row["chosen_ids"]  # the SFT baseline learns what the pairs prefer
    assert best_row["input_ids"] == [5, 6, 10 + chosen, 1] and best_row["completion_mask"] == [0, 0, 1, 1]


def test_ties_are_drawn_by_seed_and_problem():
    tied = [1.0, 0.0, 1.0, 0.5, 0.0, 1.0]
    pairs = [best_worst_pair(rewarded(tied), BestWorstOptions(seed=seed)).rows[0] for seed in range(40)]
    assert {pair["chosen"] for pair in pairs} == {"text 0", "text 2", "text 5"}
    assert {pair["rejected"] for pair in pairs} == {"text 1", "text 4"}
    again = [best_worst_pair(rewarded(tied), BestWorstOptions(seed=seed)).rows[0] for seed in range(40)]
    assert again == pairs
    others = [best_worst_pair(rewarded(tied, id=f"q{k}")).rows[0]["chosen"] for k in range(20)]
    assert len(set(others)) == 3


def test_best_and_worst_leave_out_what_the_other_rule_leaves_out():
    rollouts = rewarded([9.0, 1.0, 8.0, 2.0, 5.0, -9.0])
    rollouts[0]["finish_reason"] = "length"
    rollouts[2] |= {"completion_ids": [1], "completion": " "}
    rollouts[5]["finish_reason"] = "length"
    selection = best_worst_pair(rollouts)
    assert selection.left_out == {"truncated completion": 2, "empty completion": 1}
    assert (selection.rows[0]["reward_chosen"], selection.rows[0]["reward_rejected"]) == (5.0, 1.0)
    assert best_worst_pair(rollouts[:2]) == ([], "only one finished rollout", {"truncated completion": 1})
    assert best_worst_pair(rollouts[:1]) == ([], "no finished rollout", {"truncated completion": 1})


def test_best_and_worst_of_one_answer_are_no_pair():
    rollouts = rewarded([1.0, 0.5, 0.0])
    rollouts[0]["completion"], rollouts[2]["completion"] = "same\n", " same"  # a judge's noise, or its end tokens
    assert best_worst_pair(rollouts).reason == "best and worst rollout are the same answer"
    assert best_rows(rollouts).reason == "best and worst rollout are the same answer"
    rollouts = rewarded([1.0, 0.5, 0.0])
    rollouts[2]["completion_ids"] = rollouts[0]["completion_ids"]
    assert best_worst_pair(rollouts).reason == "best and worst rollout are the same answer"


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_named(reward):
    with pytest.raises(ContractError, match=r"Problem 'p': `reward` is (None|nan|inf), not a finite number; score the"):
        best_worst_pair(rewarded([1.0, reward, 0.0]))


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_margins_that_are_no_distance(margin):
    with pytest.raises(ContractError, match=r"min_margin is (-0\.1|nan|inf); it must be a number of at least 0"):
        BestWorstOptions(min_margin=margin)


def test_group_consecutive():
    groups = group_consecutive(Dataset.from_dict({"id": ["a"] * 3 + ["b"] + ["c"] * 2, "x": list(range(6))}), "id")
    assert groups.to_list() == [
        {"id": "a", "first": 0, "count": 3},
        {"id": "b", "first": 3, "count": 1},
        {"id": "c", "first": 4, "count": 2},
    ]
    with pytest.raises(ContractError, match=r"Row 3 \(id 'a'\): `id` appears again.*sort"):
        group_consecutive(Dataset.from_dict({"id": ["a", "a", "b", "a"]}), "id")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ({"no wrong rollout": 4, "truncated completion": 2}, "every rollout is correct; sample more or hotter"),
        ({"no correct rollout": 4}, "no rollout is correct; sample more, take easier problems"),
        ({"no finished rollout": 4}, "raise max_tokens"),
        ({"rewards no further apart than min_margin": 4}, "no problem's rewards differ; lower min_margin"),
        ({"no wrong rollout": 3, "no correct rollout": 1}, "no wrong rollout: 3, no correct rollout: 1"),
    ],
)
def test_nothing_left(dropped, message):
    check_something_left({"rows": 1})
    with pytest.raises(ContractError, match=f"Nothing is left of 4 problems for pairs: .*{message}"):
        check_something_left({"name": "pairs", "rows": 0, "rows_in": 4, "dropped": dropped})
