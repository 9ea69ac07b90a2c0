"""From rollouts to preference pairs and SFT sets, by one of two rules.

Answer-frequency rule, for verified rollouts (critical-token DPO, arXiv 2411.19943v3, §3): a problem's wrong answers are
sorted by how often they occur and taken until they cover half of its incorrect samples, one trajectory an answer. These
trajectories are the negative SFT set and the rejected sides of the pairs. The positive SFT set has one random correct
trajectory a problem, and the chosen side of each pair is a random correct one.

Choices that the paper leaves open: answers are compared as the strings that `extract_answer` gives; a wrong rollout
without an answer forms no class and does not count towards the half, unless `include_unparsable`; rollouts that hit
the token limit or are empty are left out of both sides, because neither a cut-off proof nor silence says which token
was wrong. Every random choice is drawn from a seed and the problem's id, so it does not depend on shards or processes.

Best/worst rule, for rewarded rollouts (T-REG, arXiv 2412.02685): a problem's rollout of the highest reward is chosen,
the one of the lowest rejected. Rollouts are left out as above; of rollouts with equal rewards one is drawn. A problem
gives no pair if its rewards do not differ, or if its best and worst rollout are the same text.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from tokalign.prompts import TEMPLATE_COLUMNS
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import content_hash
from tokalign.stage.jobs import Dropped, Kept, Row, run_job
from tokalign.stage.manifest import SAMPLING, manifest_of, stop_strings
from tokalign.stage.processes import process_state

NO_CORRECT, NO_WRONG = "no correct rollout", "no wrong rollout"
NO_ANSWER, NO_FINISHED = "no wrong rollout with an answer", "no finished rollout"
ONE_FINISHED, EQUAL_REWARDS = "only one finished rollout", "rewards no further apart than min_margin"
SAME_ANSWER = "best and worst rollout are the same answer"
TRUNCATED, EMPTY = "truncated completion", "empty completion"


@dataclass(frozen=True)
class PairingOptions:
    """How pairs are chosen.

    Attributes:
        coverage: Share of a problem's incorrect samples that the chosen wrong answers cover (paper: 0.5).
        max_pairs_per_problem: Keep the pairs of the most frequent wrong answers only; None keeps all.
        include_unparsable: Treat "no answer" as one more wrong answer.
        seed: Of the random trajectories.
    """

    coverage: float = 0.5
    max_pairs_per_problem: int | None = None
    include_unparsable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.coverage <= 1:
            raise ContractError(f"coverage is {self.coverage}; it must be above 0 and at most 1.")
        if self.max_pairs_per_problem is not None and self.max_pairs_per_problem < 1:
            raise ContractError(f"max_pairs_per_problem is {self.max_pairs_per_problem}; it must be at least 1.")


@dataclass(frozen=True)
class BestWorstOptions:
    """How the best and the worst rollout of a problem are chosen.

    Attributes:
        min_margin: Their rewards must be further apart than this; 0 asks for any difference.
        seed: Of the draws among rollouts of one reward.
    """

    min_margin: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ContractError(f"min_margin is {self.min_margin}; it must be a number of at least 0.")


class Selection(NamedTuple):
    """Rows made of one problem's rollouts; why there are none; and how many rollouts were left out, by reason."""

    rows: list[Row]
    reason: str | None
    left_out: dict[str, int]


def group_consecutive(dataset: Dataset, column: str = "id") -> Dataset:
    """Runs of equal values as rows `id, first, count`, read from that column alone.

    Raises:
        ContractError: a value comes back after another one, so its rollouts are not contiguous.
    """
    ids: list[Any] = []
    firsts: list[int] = []
    seen: set[Any] = set()
    index = 0
    for batch in dataset.select_columns([column]).with_format(None).iter(batch_size=10_000):
        for value in batch[column]:
            if not ids or value != ids[-1]:
                if value in seen:
                    raise ContractError(
                        f"Row {index} ({column} {value!r}): `{column}` appears again after another problem's rows; "
                        f"sort the dataset by `{column}`, or make problem ids unique, and rerun."
                    )
                seen.add(value)
                ids.append(value)
                firsts.append(index)
            index += 1
    counts = [end - first for first, end in zip(firsts, [*firsts[1:], index], strict=True)]
    return Dataset.from_dict({"id": ids, "first": firsts, "count": counts})


def frequent_wrong_answers(answers: Sequence[str | None], coverage: float = 0.5) -> list[str | None]:
    """The most frequent answers among incorrect samples that together cover a share `coverage` of them.

    Args:
        answers: Answer of each incorrect sample, None for "no answer" (a class like any other here).
        coverage: Share to reach.

    Returns:
        Distinct answers, most frequent first; ties in order of the string, None last.
    """
    order = sorted(Counter(answers).items(), key=lambda pair: (-pair[1], pair[0] is None, pair[0] or ""))
    chosen: list[str | None] = []
    covered = 0
    for answer, count in order:
        if covered >= coverage * len(answers):
            break
        chosen.append(answer)
        covered += count
    return chosen


def _random(seed: int, purpose: str, problem_id: Any) -> random.Random:
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{problem_id}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def _finished(rollouts: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Rollouts that finished and say something, and the counts of the others."""
    finished: list[Row] = []
    left_out: Counter[str] = Counter()
    for rollout in rollouts:
        if rollout["prompt_ids"] != rollouts[0]["prompt_ids"]:
            raise ContractError(
                f"Problem {rollout['id']!r}: `prompt_ids` differ between its rollouts; give each prompt its own id "
                "and sample again."
            )
        if rollout["finish_reason"] == "length":
            left_out[TRUNCATED] += 1
        elif not rollout["completion_ids"] or not rollout["completion"].strip():
            left_out[EMPTY] += 1
        else:
            finished.append(rollout)
    return finished, dict(left_out)


def _usable(rollouts: Sequence[Row]) -> tuple[list[Row], list[Row], dict[str, int]]:
    """Correct and wrong rollouts that finished and say something, and the counts of the others."""
    if any(rollout["correct"] is None for rollout in rollouts):
        raise ContractError(
            f"Problem {rollouts[0]['id']!r}: `correct` is missing; verify the rollouts first, or pair them by reward "
            "(rule `best_worst`)."
        )
    finished, left_out = _finished(rollouts)
    correct = [rollout for rollout in finished if rollout["correct"]]
    return correct, [rollout for rollout in finished if not rollout["correct"]], left_out


def _frequent_wrong(
    wrong: Sequence[Row], options: PairingOptions, answer_of: Callable[[Row], str | None]
) -> list[tuple[str | None, Row]]:
    """One random trajectory for each answer of the frequency rule, most frequent answer first."""
    answered = [(answer_of(rollout), rollout) for rollout in wrong]
    if not options.include_unparsable:
        answered = [pair for pair in answered if pair[0] is not None]
    if not answered:
        return []
    draw = _random(options.seed, "wrong", wrong[0]["id"])
    frequent = frequent_wrong_answers([answer for answer, _ in answered], options.coverage)
    return [(answer, draw.choice([row for own, row in answered if own == answer])) for answer in frequent]


def _extracted(rollout: Row) -> str | None:
    return rollout["extracted"]


def preference_pairs(
    rollouts: Sequence[Row],
    options: PairingOptions = PairingOptions(),
    answer_of: Callable[[Row], str | None] = _extracted,
) -> Selection:
    """Preference rows of one problem: each frequent wrong answer's trajectory against a random correct one.

    Rows have the columns of the stage `preferences`, and `answer`, `rejected_answer` and `pair` (0, 1 …).
    """
    correct, wrong, left_out = _usable(rollouts)
    if not correct or not wrong:
        return Selection([], _why_none(correct, wrong), left_out)
    rejected = _frequent_wrong(wrong, options, answer_of)[: options.max_pairs_per_problem]
    draw = _random(options.seed, "chosen", rollouts[0]["id"])
    rows: list[Row] = []
    for pair, (answer, worse) in enumerate(rejected):
        better = draw.choice(correct)
        if better["completion_ids"] == worse["completion_ids"]:
            raise ContractError(
                f"Problem {worse['id']!r}: the same `completion_ids` are marked both correct and wrong; verify the "
                "rollouts again with one verifier."
            )
        rows.append(
            {
                "id": worse["id"],
                "pair": pair,
                "prompt": worse["prompt"],
                "answer": worse["answer"],
                "chosen": better["completion"],
                "rejected": worse["completion"],
                "rejected_answer": answer,
                "prompt_ids": worse["prompt_ids"],
                "chosen_ids": better["completion_ids"],
                "rejected_ids": worse["completion_ids"],
                **_asked_with(worse),
            }
        )
    return Selection(rows, None if rows else NO_ANSWER, left_out)


def positive_rows(rollouts: Sequence[Row], options: PairingOptions = PairingOptions()) -> Selection:
    """SFT row of one problem: one random correct trajectory."""
    correct, wrong, left_out = _usable(rollouts)
    if not correct:
        return Selection([], _why_none(correct, wrong), left_out)
    return Selection([_sft_row(_random(options.seed, "positive", correct[0]["id"]).choice(correct))], None, left_out)


def negative_rows(
    rollouts: Sequence[Row],
    options: PairingOptions = PairingOptions(),
    answer_of: Callable[[Row], str | None] = _extracted,
) -> Selection:
    """SFT rows of one problem: the trajectories of its frequent wrong answers (those that pairs reject)."""
    correct, wrong, left_out = _usable(rollouts)
    if not wrong:
        return Selection([], NO_WRONG if correct else NO_FINISHED, left_out)
    rows = [_sft_row(rollout) for _, rollout in _frequent_wrong(wrong, options, answer_of)]
    return Selection(rows, None if rows else NO_ANSWER, left_out)


def _best_and_worst(
    rollouts: Sequence[Row], options: BestWorstOptions
) -> tuple[tuple[Row, Row] | None, str | None, dict[str, int]]:
    """The rollouts of the highest and the lowest reward, or why there are none, and what was left out."""
    finished, left_out = _finished(rollouts)
    if len(finished) < 2:
        return None, ONE_FINISHED if finished else NO_FINISHED, left_out
    for rollout in finished:
        if rollout["reward"] is None or not math.isfinite(rollout["reward"]):
            raise ContractError(
                f"Problem {rollout['id']!r}: `reward` is {rollout['reward']}, not a finite number; score the rollouts "
                "with `tokalign reward`."
            )
    rewards = [rollout["reward"] for rollout in finished]
    if max(rewards) - min(rewards) <= options.min_margin:
        return None, EQUAL_REWARDS, left_out
    best, worst = (
        _random(options.seed, purpose, rollouts[0]["id"]).choice([r for r in finished if r["reward"] == reward])
        for purpose, reward in (("best", max(rewards)), ("worst", min(rewards)))
    )
    if best["completion_ids"] == worst["completion_ids"] or best["completion"].strip() == worst["completion"].strip():
        return None, SAME_ANSWER, left_out
    return (best, worst), None, left_out


def best_worst_pair(rollouts: Sequence[Row], options: BestWorstOptions = BestWorstOptions()) -> Selection:
    """The preference row of one problem: its best rollout against its worst, by `reward`.

    The row has the columns of the stage `preferences`, and `answer`, `pair` (0), `reward_chosen`, `reward_rejected`
    (one number a side; `chosen_<signal>` is the name of a list with a number a token).
    """
    pair, reason, left_out = _best_and_worst(rollouts, options)
    if pair is None:
        return Selection([], reason, left_out)
    best, worst = pair
    row = {
        "id": best["id"],
        "pair": 0,
        "prompt": best["prompt"],
        "answer": best["answer"],
        "chosen": best["completion"],
        "rejected": worst["completion"],
        "prompt_ids": best["prompt_ids"],
        "chosen_ids": best["completion_ids"],
        "rejected_ids": worst["completion_ids"],
        "reward_chosen": best["reward"],
        "reward_rejected": worst["reward"],
        **_asked_with(best),
    }
    return Selection([row], None, left_out)


def best_rows(rollouts: Sequence[Row], options: BestWorstOptions = BestWorstOptions()) -> Selection:
    """SFT row of one problem: its best rollout, for the problems that give a pair (the chosen side of that pair)."""
    pair, reason, left_out = _best_and_worst(rollouts, options)
    return Selection([] if pair is None else [_sft_row(pair[0])], reason, left_out)


def _why_none(correct: Sequence[Row], wrong: Sequence[Row]) -> str:
    if not correct and not wrong:
        return NO_FINISHED
    return NO_WRONG if correct else NO_CORRECT


def _sft_row(rollout: Row) -> Row:
    """A row that TRL's `SFTTrainer` trains on as it is: `input_ids` mark it as tokenised, `completion_mask` keeps the
    loss off the prompt (`completion_only_loss`, which `prompt` and `completion` columns switch on)."""
    prompt_ids, completion_ids = rollout["prompt_ids"], rollout["completion_ids"]
    return {
        "id": rollout["id"],
        "prompt": rollout["prompt"],
        "completion": rollout["completion"],
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "input_ids": prompt_ids + completion_ids,
        "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
        **_asked_with(rollout),
    }


def _asked_with(rollout: Row) -> Row:
    """What the chat template was given besides the prompt, for whoever renders it again."""
    return {name: rollout[name] for name in TEMPLATE_COLUMNS if name in rollout}


def check_something_left(manifest: Mapping[str, Any]) -> None:
    """Refuse a stage without rows, in one sentence that says what to sample instead.

    Args:
        manifest: Of a finished stage: `rows`, `rows_in` (problems) and `dropped` are read.
    """
    if manifest["rows"]:
        return
    problems, dropped = manifest["rows_in"], manifest["dropped"]
    if dropped.get(NO_WRONG) == problems:
        why = "every rollout is correct; sample more or hotter, or take harder problems"
    elif dropped.get(NO_CORRECT) == problems:
        why = "no rollout is correct; sample more, take easier problems or a stronger model, or check the answers"
    elif dropped.get(NO_FINISHED) == problems:
        why = "no rollout finished with text; raise max_tokens"
    elif dropped.get(EQUAL_REWARDS) == problems:
        why = "no problem's rewards differ; lower min_margin, sample more or hotter, or choose another judge"
    else:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        why = f"no problem gives a row ({reasons}); sample more rollouts a problem"
    raise ContractError(f"Nothing is left of {problems} problems for {manifest['name']}: {why}.")


# --------------------------------------------------------------------------------------------------------- the stages

_READ = ("id", "prompt", "answer", "prompt_ids", "completion_ids", "completion", "finish_reason")


def write_pairs(
    rollouts: Dataset,
    output_dir: str | Path,
    options: PairingOptions | BestWorstOptions,
    *,
    extract: Callable[[str], str | None],
    name: str = "the dataset",
    shard_size: int = 512,
    end_token: bool | None = None,
    end_token_id: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the stages of a rule: `pairs`, `positive` and, by answer frequency, `negative`.

    A rollout that a stop string ended holds no end token, and a model trained on such rows never learns to end: at
    evaluation it writes on behind its answer. With `end_token` these rows get the model's end token.

    Args:
        rollouts: stage whose problems' rows are contiguous; verified, or with `reward` for `BestWorstOptions`.
        extract: reads the final answer out of a text, for rollouts without `extracted`.
        name: what errors call the rollouts.
        shard_size: problems a shard.
        end_token: whether; None is yes for a base model (prompts as they are, or no chat template), by the manifest.
        end_token_id: the model's end token, where the manifest of the rollouts does not say it.

    Returns:
        The manifest of each stage.

    Raises:
        ContractError: a column is missing, a problem's rows are not contiguous, a stage would be empty, or nobody says
            which id the end token is.
    """
    by_reward = isinstance(options, BestWorstOptions)
    if by_reward and "reward" not in rollouts.column_names:
        raise ContractError(
            f"{name} has no column `reward`, which the rule best_worst needs; make it with `tokalign reward`."
        )
    parameters: dict[str, Any] = {"rule": "best_worst", **vars(options)} if by_reward else dict(vars(options))
    ends = _end_tokens(manifest_of(rollouts) or {}, end_token, end_token_id, name)
    if ends:
        parameters["end_token_id"] = ends[0]
    # In this order: the hash of the input, by which a run resumes, depends on it.
    read = (*_READ, "reward") if by_reward else (*_READ, "correct", "extracted")
    read = (*read, *TEMPLATE_COLUMNS)
    rollouts = rollouts.select_columns([column for column in read if column in rollouts.column_names])
    if process_state().is_main_process:
        parameters["rollouts"] = content_hash(rollouts)
    problems = group_consecutive(rollouts, "id")
    problems.info.description = rollouts.info.description  # the stage's manifest: its tokenizer is theirs
    manifests = {}
    for stage, select in _stages(options, extract).items():
        manifests[stage] = run_job(
            partial(_select_all, rollouts=rollouts, select=select, ends=ends),
            problems,
            Path(output_dir) / stage,
            name=f"build_pairs: {stage}",
            parameters=parameters,
            shard_size=shard_size,
            extra_manifest={"rollouts": len(rollouts)},
        )
        check_something_left(manifests[stage])
    return manifests


def _stages(
    options: PairingOptions | BestWorstOptions, extract: Callable[[str], str | None]
) -> dict[str, Callable[[list[Row]], Selection]]:
    """For each stage of the rule what it takes from one problem's rollouts."""
    if isinstance(options, BestWorstOptions):
        return {"pairs": partial(best_worst_pair, options=options), "positive": partial(best_rows, options=options)}

    def answer_of(rollout: Row) -> str | None:
        return rollout["extracted"] if "extracted" in rollout else extract(rollout["completion"])

    return {
        "pairs": partial(preference_pairs, options=options, answer_of=answer_of),
        "positive": partial(positive_rows, options=options),
        "negative": partial(negative_rows, options=options, answer_of=answer_of),
    }


def _end_tokens(manifest: Mapping[str, Any], wanted: bool | None, given: int | None, name: str) -> list[int]:
    """The id that ends rows which a stop string has ended, and the others that end a completion; empty for none."""
    sampling = manifest.get(SAMPLING) or {}
    end = sampling.get("end_token_id") if given is None else given
    if wanted is None:
        wanted = given is not None or bool(sampling.get("base_model") and end is not None)
    if not wanted or not (stop_strings(manifest) or given is not None):
        return []
    if end is None:
        raise ContractError(
            f"{name} does not say which id ends a completion of its model, and a stop string has ended some: give "
            "end_token_id, or set end_token to false."
        )
    return [end, *sampling.get("end_ids", [])]


def _select_all(
    groups: list[Row], *, rollouts: Dataset, select: Callable[[list[Row]], Selection], ends: Sequence[int] = ()
) -> Iterator[Dropped | Kept]:
    """The job's function: `group_consecutive`'s rows in, each problem's selection out."""
    for group in groups:
        rows = rollouts.select(range(group["first"], group["first"] + group["count"])).to_list()
        for row in rows:
            ids = row["completion_ids"]
            if ends and ids and row["finish_reason"] == "stop" and ids[-1] not in ends:
                ids.append(ends[0])
        selection = select(rows)
        if selection.reason is not None:
            yield Dropped(selection.reason, selection.left_out)
        else:
            yield Kept(selection.rows, selection.left_out)
