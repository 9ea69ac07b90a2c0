"""Problems in, verified completions out: what every script that lets one model answer a problems stage shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokalign.generation.protocol import Engine, SamplingParams, cut_at_stop
from tokalign.prompts import AS_CHAT, PromptRendering
from tokalign.stage.hashes import known_ids
from tokalign.stage.jobs import Dropped, Kept, Row
from tokalign.stage.seeds import problem_seed

Extract = Callable[[str], str | None]  # a text's final answer
Match = Callable[[str | None, str | None], bool]  # whether an answer is the reference's
TOO_LONG = "prompt longer than max_prompt_length"
UNKNOWN_ID = "a completion holds an id that the tokenizer does not know"


def sampler(
    engine: Engine,
    params: SamplingParams,
    *,
    extract: Extract,
    match: Match,
    seed: int = 0,
    rendering: PromptRendering = AS_CHAT,
    renderer: PreTrainedTokenizerBase | None = None,
    max_prompt_length: int | None = None,
    keep_unknown: bool = False,
) -> Callable[[list[dict]], list[list[dict] | Kept | Dropped]]:
    """The job's function: problems in, for each its rollouts or why it was dropped.

    Args:
        extract, match: read the final answer out of a completion, and compare it with the problem's reference
            (`tokalign.rewards.extract_answer`, `answers_match`).
        params: of every problem; each gets its own seed from `seed` and its id.
        rendering: how prompts become ids.
        renderer: tokenizer whose chat template renders them, where it is not the engine's.
        max_prompt_length: longer prompts are dropped; None is what the model can hold.
        keep_unknown: leave `without_unknown_ids` to the caller, who still has to put something beside every rollout.
    """
    tokenizer = engine.tokenizer
    known = known_ids(tokenizer)
    limit = max_prompt_length or getattr(engine, "max_length", None)
    if max_prompt_length is None and limit is not None:
        limit -= 1  # room for one token at least

    def sample(problems: list[dict[str, Any]]) -> list[list[dict[str, Any]] | Kept | Dropped]:
        prompts = [rendering.ids(problem, renderer or tokenizer) for problem in problems]
        kept = [i for i, ids in enumerate(prompts) if limit is None or len(ids) <= limit]
        each = [replace(params, seed=problem_seed(seed, problems[i]["id"], "rollouts")) for i in kept]
        items: list[list[dict[str, Any]] | Kept | Dropped] = [Dropped(TOO_LONG) for _ in problems]
        for i, completions in zip(kept, engine.generate([prompts[i] for i in kept], each), strict=True):
            rows = []
            for number, completion in enumerate(completions):
                text = str(tokenizer.decode(completion.token_ids, skip_special_tokens=True))
                reference = problems[i]["answer"]
                answer = (
                    extract(cut_at_stop(text, params.stop)) if reference else None
                )  # following instructions has no final answer
                rollout = {
                    "prompt_ids": prompts[i],
                    "completion_ids": completion.token_ids,
                    "completion": text,
                    "finish_reason": completion.finish_reason,
                    "logprobs": completion.logprobs,
                    "sample": number,
                    "extracted": answer,
                    "correct": match(answer, reference) if reference else None,
                }
                rows.append({**problems[i], **rollout})
            items[i] = rows if keep_unknown else without_unknown_ids(rows, known)
        return items

    return sample


def without_unknown_ids(rows: list[Row], known: np.ndarray) -> list[Row] | Kept | Dropped:
    """A problem's rollouts without those that hold an id of no token, which no later stage could read.

    Engines on vLLM draw from all rows of the model's matrix, of which some only pad it (NeMo-RL issue 237).
    """
    kept = [row for row in rows if all(i < len(known) and known[i] for i in row["completion_ids"])]
    lost = len(rows) - len(kept)
    if not lost:
        return rows
    return Kept(kept, {UNKNOWN_ID: lost}) if kept else Dropped(UNKNOWN_ID, {UNKNOWN_ID: lost})
