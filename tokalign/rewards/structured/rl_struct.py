"""The reward of RL-Struct (arXiv 2512.00319) as its equation says, for comparison; it is easily gamed.

    R = 1.0 R_structure + 0.5 R_format + 1.0 R_validity + 0.5 R_correctness + 0.1 R_length
    R_structure = [every required key occurs in the text]      R_format = 0.5 [a Markdown fence] + 0.3 [the word json]
    R_validity = [the text parses]      R_correctness = F1 of words with the reference
    R_length = −0.1 [length outside the bounds]

Keys are looked for as substrings and the whole text must parse, so that a fenced answer is invalid while the bare JSON
string `"reasoning answer ```json"` earns 2.40 of 2.90. The paper leaves open what F1 runs over: words here. The limits
on size and depth hold for this reward too.
"""

from __future__ import annotations

import json
from typing import Any

from tokalign.rewards.structured.content import token_f1
from tokalign.rewards.structured.documents.document import MISSING, Fault, Limits, Source, unreadable
from tokalign.rewards.structured.documents.json import check_limits
from tokalign.rewards.structured.documents.reading import text_of

WEIGHTS = {"structure": 1.0, "format": 0.5, "validity": 1.0, "correctness": 0.5, "length": 0.1}


def components(
    completion: Source,
    reference: Any,
    schema: dict[str, Any] | bool,
    bounds: tuple[int | None, int | None],
    limits: Limits,
) -> dict[str, Any]:
    """The paper's components of a completion.

    Args:
        reference: parsed; MISSING makes correctness None.
        schema: JSON Schema; only its `required` is read, of alternatives what each of them requires.
        bounds: fewest and most characters; without any, length is None.
    """
    text = text_of(completion)
    fault = unreadable(text, limits)
    if fault is not None:
        text = ""
    shortest, longest = bounds
    length = None
    if shortest is not None or longest is not None:
        within = (shortest or 0) <= len(text) and (longest is None or len(text) <= longest)
        length = 0.0 if within else -0.1
    error = fault or _syntax_error(text, limits)
    return {
        "structure": float(bool(text) and all(key in text for key in _required(schema))),
        "format": 0.5 * ("```" in text) + 0.3 * ("json" in text),
        "validity": float(error is None),
        "schema": None,
        "correctness": None if reference is MISSING else token_f1(text, json.dumps(reference, ensure_ascii=False)),
        "length": length,
        "_reason": error,
    }


def _required(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    each = [_required(option) for option in schema.get("anyOf", ())] or [[]]
    return [*schema.get("required", ()), *(key for key in each[0] if all(key in keys for keys in each))]


def _syntax_error(text: str, limits: Limits) -> str | None:
    try:
        check_limits(text, limits)
        json.loads(text)
    except (Fault, ValueError, RecursionError) as error:
        return str(error)[:200]
    return None
