"""Targets that read what a model wrote: final answers, and documents under a schema.

A policy under optimisation chooses this text, so the properties hold for all of it: nothing raises, scores are finite
and within their bounds, and no text that is not one document reaches a flawless one.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tests.fuzz.properties import check_sentence, lines_of
from tokalign.rewards import StructuredReward, answers_match, extract_answer
from tokalign.rewards.structured.documents.document import FORMATS
from tokalign.rewards.structured.reward import AROUND, COMPONENTS, FLOOR, WEIGHTS


def answers(data: bytes) -> None:
    """A completion and another answer, cut at the first NUL."""
    text, _, other = data.decode("utf-8", "surrogateescape").partition("\0")
    found = extract_answer(text)
    lenient = extract_answer(text, last_number=True)
    assert found is None or lenient == found
    for answer in {found, lenient, other} - {None}:
        if answer.strip():
            assert answers_match(answer, answer), f"{answer!r} is not itself"
    if found is not None:
        assert found.strip()
        assert answers_match(found, other) == answers_match(other, found), f"{found!r} and {other!r} by their order"


def structured(data: bytes) -> None:
    """Four lines (format, schema, reference, a flawless document if there is one) and a completion of any text."""
    *head, text = lines_of(data, 4)
    output_format, schema, reference, honest = head
    reward = StructuredReward(output_format=output_format if output_format in FORMATS else "json")  # type: ignore[arg-type]
    try:
        reward.check_row(schema or None, reference or None)
    except ValueError as error:
        message = str(error) if str(error).endswith(".") else f"{error}."  # a row's error is ended by its caller
        check_sentence(message)
        return
    for completion in (text, [{"role": "assistant", "content": text}]):
        score = reward.score(completion, reference or None, schema or None)
        check_score(score, reward.weights)
        assert score == reward.score(completion, reference or None, schema or None)
    paper = StructuredReward(output_format=reward.output_format, preset="rl-struct")
    check_total(paper.score(text, reference or None, schema or None), paper.weights)
    if honest and reward.output_format == "json":
        check_order(reward, schema or None, honest, text)


def check_score(score: dict[str, Any], weights: dict[str, float]) -> None:
    assert score.keys() == {*COMPONENTS, "total", "reason"}
    check_total(score, weights)
    assert score["total"] <= sum(WEIGHTS.values())
    assert score["reason"] is None or (isinstance(score["reason"], str) and len(score["reason"]) < 2000)


def check_total(score: dict[str, Any], weights: dict[str, float]) -> None:
    for name in weights:
        assert score[name] is None or (math.isfinite(score[name]) and 0 <= score[name] <= 1), (name, score)
    expected = sum(weight * (score[name] or 0.0) for name, weight in weights.items())
    assert math.isfinite(score["total"]) and abs(score["total"] - expected) < 1e-9


def check_order(reward: StructuredReward, schema: str | None, honest: str, text: str) -> None:
    """No text pays more than a flawless answer; what is not one document has no form, and less for what is right."""
    try:
        best = reward.score(honest, honest, schema)
    except ValueError:
        return  # the mutated line is no document
    if best["reason"] is not None or best["correctness"] != 1:
        return
    score = reward.score(text, honest, schema)
    assert score["total"] <= best["total"], (score, best)
    if not is_document(text):
        assert score["structure"] < FLOOR and score["correctness"] <= AROUND, (score, best)
        assert not any(score[name] for name in ("format", "validity", "schema"))


def is_document(text: str) -> bool:
    """Whether Python's own reader takes the text for JSON; a fence may hold some."""
    if "```" in text:
        return True
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
