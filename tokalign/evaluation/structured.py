"""Structured output of a model on a problems stage: is it a document, of the schema, with the right content, how fast.

Figures, each with its count and 95 % interval, of one completion a problem, greedy or sampled:

| figure | share or mean, over all problems unless said otherwise |
|---|---|
| `validity` | the completion is exactly one strict document |
| `structure` | all required keys with values of the right types and no invented key (`StructuredReward`: structure 1) |
| `compliance` | valid under the whole schema, and no invented key (`StructuredReward`: schema 1) |
| `content_f1` | F1 over typed leaves against the reference, 0 without a document; over problems with a reference |
| `exact_match` | typed equality with the reference, tool calls in any order; over problems with a reference |
| `invented_keys` | mean number of keys that the schema does not know; over documents |
| `hallucinated` | has any invented key; over documents |
| `total` | the reward |
| `truncated` | met `max_tokens` |

With references of allowed values (tool calls) `content_f1` is their agreement and `exact_match` the Berkeley
Function-Calling Leaderboard's AST accuracy (`tokalign.rewards.structured.calls`).

Time is measured around the engine's calls, after a first call of one token that also compiles the first grammar. It is
kept beside the rows, which stay the same however fast they were made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.evaluation.run import prompt_ids, rendering_settings
from tokalign.generation.protocol import Completion, Engine, SamplingParams, cut_at_stop
from tokalign.prompts import AS_CHAT, PromptRendering
from tokalign.rewards import StructuredReward
from tokalign.rewards.structured.calls import calls_match
from tokalign.rewards.structured.content import equal, leaf_f1
from tokalign.rewards.structured.documents.json import decode_json
from tokalign.rewards.structured.grading import TooManyValues
from tokalign.rewards.structured.reward import COMPONENTS
from tokalign.rewards.structured.schemas import SchemaError, compile_text
from tokalign.stage.contract import check_problems, check_prompt_ids
from tokalign.stage.errors import ContractError
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.stage.seeds import problem_seed
from tokalign.statistics import accuracy, mean_interval, paired_bootstrap, share_interval

TIMING = "timing"  # folder of one file a process start
OUTCOMES = ("validity", "structure", "compliance", "exact_match", "hallucinated", "truncated")  # 0 or 1 a problem
FIGURES = (
    "validity", "structure", "compliance", "content_f1", "exact_match", "invented_keys", "hallucinated", "total",
    "truncated",
)  # fmt: skip
DRAWN = ("validity", "structure", "compliance", "content_f1", "exact_match", "hallucinated")


def evaluate_structured(
    load: Callable[[], Engine],
    problems: Dataset,
    output_dir: str | Path,
    *,
    reward: StructuredReward,
    tokenizer: PreTrainedTokenizerBase,
    schema: str | None = None,
    constrained: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    rendering: PromptRendering = AS_CHAT,
    shard_size: int = 256,
    parameters: Mapping[str, Any] | None = None,
    extra_manifest: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer every problem once, judge the completion, and write rows.

    Args:
        load: gives the engine when the first unfinished shard needs it; a finished run loads no model.
        problems: problems stage; `schema` (JSON text) and `answer` (JSON text, or null) are read.
        reward: what judges; of its scores the figures need the default ones, not a preset.
        schema: JSON text of the schema of problems that have none of their own.
        constrained: decode under each problem's schema (JSON alone).
        temperature: 0 is greedy; else one sample a problem, by a seed made of `seed` and its id.
        max_tokens, stop, rendering: as for `tokalign.evaluation.run.evaluate`.
        parameters: what else determines the rows, e.g. hashes of the weights.

    Returns:
        `metrics_of` the rows, `latency_of` the run, and the settings.

    Raises:
        ContractError: an id that occurs twice, a problem without a schema, a reference that is not JSON.
        ValueError: options that exclude each other.
    """
    if constrained and reward.output_format != "json":
        raise ValueError(
            f"constrained decoding writes JSON, but output_format is {reward.output_format!r}: use json, or leave "
            "constrained out."
        )
    if reward.preset is not None:
        raise ValueError(f"preset {reward.preset!r} cannot judge structure and schema: use the default reward.")
    _check(problems, reward, schema)
    check_prompt_ids(problems, tokenizer, "the problems")
    started: list[tuple[Engine, Timing]] = []

    def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = [prompt_ids(row, tokenizer, rendering) for row in rows]
        each = [
            SamplingParams(
                temperature=temperature,
                seed=problem_seed(seed, row["id"], "evaluation"),
                max_tokens=max_tokens,
                stop=tuple(stop),
                json_schema=(row.get("schema") or schema) if constrained else None,
            )
            for row in rows
        ]
        if not started:
            timing = Timing(Path(output_dir) / TIMING)
            engine = timing.of("load", load)
            started.append((engine, timing))
            first = SamplingParams(temperature=0.0, max_tokens=1, json_schema=each[0].json_schema)
            timing.of("first_call", lambda: engine.generate(prompts[:1], first))
        engine, timing = started[0]
        completions = timing.of("generation", lambda: engine.generate(prompts, each))
        return [_row(row, one) for row, (one,) in zip(rows, completions, strict=True)]

    def _row(row: dict[str, Any], completion: Completion) -> dict[str, Any]:
        text = cut_at_stop(str(tokenizer.decode(completion.token_ids, skip_special_tokens=True)), stop)
        judged = judge(reward, text, row["answer"], row.get("schema") or schema)
        return {
            "id": row["id"],
            "answer": row["answer"],
            "completion_ids": completion.token_ids,
            "completion": text,
            "finish_reason": completion.finish_reason,
            **judged,
            "truncated": completion.finish_reason == "length",
        }

    settings = {
        "constrained": constrained,
        "temperature": temperature,
        "seed": seed,
        "output_format": reward.output_format,
        "fence": reward.fence,
        "references": reward.references,
        "text_match": reward.text_match,
        "reasoning_end": reward.reasoning_end,
        "weights": reward.weights,
        "schema": schema,
        "max_tokens": max_tokens,
        "stop": list(stop),
        **rendering_settings(rendering),
    }
    try:
        run_job(
            answer,
            problems,
            output_dir,
            name="evaluate_structured",
            parameters={**settings, **(parameters or {})},
            tokenizer=tokenizer,
            shard_size=shard_size,
            prompts=rendering.record(tokenizer),
            extra_manifest=extra_manifest,
        )
    finally:
        for engine, _ in started:
            engine.close()
    return {**metrics_of(load_stage(output_dir)), "latency": latency_of(output_dir), **settings}


def judge(reward: StructuredReward, text: str, reference: str | None, schema: str | None) -> dict[str, Any]:
    """What the figures need of one completion: its scores and, None where they do not apply, its outcomes."""
    scores = reward.score(text, reference=reference, schema=schema)
    document = reward.read(text, schema)
    invented = None
    if document.whole:
        compiled = reward.schema if schema is None else compile_text(schema)
        assert compiled is not None  # `_check` saw to it
        try:
            invented = compiled.invented_keys(document.value, max_values=reward.limits.max_values)
        except (TooManyValues, RecursionError):  # the reward calls such a document nothing
            invented = None
    content = exact = None
    if reference is not None:
        if not document.whole:
            content, exact = 0.0, False
        elif reward.references == "allowed":
            content, exact = scores["correctness"], calls_match(document.value, decode_json(reference))
        else:
            right = decode_json(reference)
            exact = _exactly(document.value, right, reward.output_format)
            content = 1.0 if exact else leaf_f1(document.value, right)
    return {
        "total": scores["total"],
        "reason": scores["reason"],
        **{f"reward_{name}": scores[name] for name in COMPONENTS},
        "validity": document.whole,
        "structure": scores["structure"] == 1.0,
        "compliance": scores["schema"] == 1.0,
        "content_f1": content,
        "exact_match": exact,
        "invented_keys": invented,
        "hallucinated": None if invented is None else invented > 0,
    }


def _exactly(value: Any, right: Any, output_format: str) -> bool:
    """Typed equality; the order of tool calls is free."""
    if output_format != "tool_call" or not (isinstance(value, list) and isinstance(right, list)):
        return equal(value, right)
    # equality is transitive, so each call may take the first that it equals
    left = list(right)
    for call in value:
        index = next((index for index, one in enumerate(left) if equal(call, one)), None)
        if index is None:
            return False
        del left[index]
    return not left


class Timing:
    """How long each call took since this process started, a line of JSON for each: a killed run keeps what it has."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"

    def of(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of `call`, whose seconds and tokens are noted."""
        begin = time.perf_counter()
        result = call()
        line: dict[str, Any] = {"what": what, "seconds": time.perf_counter() - begin}
        if what != "load":
            line["tokens"] = sum(len(one.token_ids) for completions in result for one in completions)
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return result


def latency_of(output_dir: str | Path) -> dict[str, Any]:
    """Time of a run, summed over processes and resumes.

    Returns:
        `load_seconds`, `first_call_seconds` (one token, first grammar), `generation_seconds`, `tokens` that these
        generated, and `tokens_per_second` of a process; None where nothing was measured.
    """
    seconds = {"load": 0.0, "first_call": 0.0, "generation": 0.0}
    tokens = 0
    for file in sorted((Path(output_dir) / TIMING).glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the last line of a killed process
                continue
            seconds[line["what"]] += line["seconds"]
            tokens += line["tokens"] if line["what"] == "generation" else 0
    rate = tokens / seconds["generation"] if seconds["generation"] else None
    return {
        **{f"{what}_seconds": value for what, value in seconds.items()},
        "tokens": tokens,
        "tokens_per_second": rate,
    }


def metrics_of(rows: Dataset) -> dict[str, Any]:
    """The figures of a run's rows: for each of FIGURES `value`, `ci95` and `n`, or None where n is 0."""
    return {"n": len(rows), "figures": {name: _figure(name, _column(rows, name)) for name in FIGURES}}


def _figure(name: str, values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    if name in OUTCOMES:
        figure = accuracy(values)  # type: ignore[arg-type]
        return {"value": figure["accuracy"], "ci95": figure["ci95"], "n": figure["n"]}
    interval = share_interval if name == "content_f1" else mean_interval
    return {"value": sum(values) / len(values), "ci95": list(interval(values)), "n": len(values)}


def _column(rows: Dataset, name: str) -> list[float]:
    return [float(value) for value in rows[name] if value is not None]


def compare(runs: Sequence[str | Path], names: Sequence[str] | None = None) -> dict[str, Any]:
    """Finished runs side by side, each against the first.

    Args:
        runs: output_dir of each run, on the same problems.
        names: how to call them; unset is each folder's own name.

    Returns:
        `runs`: for each `name`, `path`, `n`, `figures`, `latency`, `parameters`, and `differences` to the first run,
        by figure (`paired_bootstrap` over the problems for which both have it; None where there are none).

    Raises:
        ContractError: a folder without such a run, other problems; ValueError: names that do not fit.
    """
    names = [Path(run).resolve().name for run in runs] if names is None else list(names)
    if len(names) != len(runs):
        raise ValueError(f"There are {len(runs)} runs but {len(names)} names: give one name a run.")
    if len(set(names)) != len(names):
        raise ValueError(f"Two runs are called {max(names, key=names.count)!r}: give each a name of its own.")
    table: list[dict[str, Any]] = []
    first: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        rows = load_stage(run)
        if missing := [column for column in FIGURES if column not in rows.column_names]:
            raise ContractError(
                f"{run} has no column `{missing[0]}`; run `tokalign evaluate structured` with this output_dir."
            )
        own = {figure: dict(zip(rows["id"], rows[figure], strict=True)) for figure in FIGURES}
        first = first or own
        if own["validity"].keys() != first["validity"].keys():
            other = min(own["validity"].keys() ^ first["validity"].keys())
            raise ContractError(f"{run} and {runs[0]} do not both hold problem {other!r}; evaluate them on the same.")
        differences = {figure: _paired(own[figure], first[figure]) for figure in FIGURES} if table else None
        table.append(
            {
                "name": name,
                "path": str(run),
                **metrics_of(rows),
                "latency": latency_of(run),
                "parameters": read_manifest(run)["parameters"],
                "differences": differences,
            }
        )
    return {"runs": table}


def _paired(own: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any] | None:
    both = [key for key, value in own.items() if value is not None and first[key] is not None]
    if not both:
        return None
    return paired_bootstrap({key: float(own[key]) for key in both}, {key: float(first[key]) for key in both})


def plot(table: Mapping[str, Any], path: str | Path) -> None:
    """Bars with 95 % intervals of `compare`'s shares, a group a figure and a bar a run."""
    from matplotlib.figure import Figure

    runs = table["runs"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        drawn = [(k, run["figures"][name]) for k, name in enumerate(DRAWN) if run["figures"][name] is not None]
        places = [k + (i - (len(runs) - 1) / 2) * width for k, _ in drawn]
        values = [one["value"] for _, one in drawn]
        errors = [
            [max(0.0, value - one["ci95"][0]) for value, (_, one) in zip(values, drawn, strict=True)],
            [max(0.0, one["ci95"][1] - value) for value, (_, one) in zip(values, drawn, strict=True)],
        ]
        axes.bar(places, values, width, yerr=errors, capsize=2, label=run["name"])
    axes.set_xticks(range(len(DRAWN)), [name.replace("_", " ") for name in DRAWN])
    axes.set(ylim=(0, 1.05), ylabel="share", title=f"{runs[0]['n']} problems, 95 % intervals")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _check(problems: Dataset, reward: StructuredReward, schema: str | None) -> None:
    """Stop before any generation at what would spoil it."""
    check_problems(problems, "the problems")
    own = "schema" in problems.column_names
    for row in problems.select_columns(["id", "answer", *(["schema"] if own else [])]):
        assert isinstance(row, dict)
        if not row.get("schema") and schema is None:
            raise ContractError(f"Row {row['id']!r}: there is no `schema`; add the column, or give --schema.")
        try:
            if row["answer"] is not None:
                decode_json(row["answer"])
            reward.check_row(row.get("schema") or schema, row["answer"])
        except SchemaError as error:
            raise ContractError(f"Row {row['id']!r}: `schema`: {error}") from error
        except ValueError as error:
            raise ContractError(f"Row {row['id']!r}: `answer` {error}; give the reference as JSON text.") from error
