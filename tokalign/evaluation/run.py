"""Verified accuracy of a model on a problems stage, and the comparison of two such runs problem by problem.

Greedy decoding gives one outcome a problem; `samples` completions at a temperature give the sampled accuracy and pass@k
(arXiv 2107.03374). The rows of a run are a stage like any other (`tokalign.stage.jobs`): a killed evaluation resumes,
and two runs can be compared long after their models are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokalign.generation.protocol import Engine, SamplingParams, cut_at_stop
from tokalign.generation.rollouts import Extract, Match
from tokalign.prompts import AS_CHAT, RECORD, PromptRendering
from tokalign.stage.contract import SIDES, check_problems, check_prompt_ids
from tokalign.stage.errors import ContractError
from tokalign.stage.files import write_json_atomically
from tokalign.stage.hashes import allowance
from tokalign.stage.jobs import run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest
from tokalign.stage.seeds import problem_seed
from tokalign.statistics import accuracy, paired_bootstrap, pass_at_k_report, sampled_accuracy

METRICS = "metrics.json"


def evaluate(
    load: Callable[[], Engine],
    problems: Dataset,
    output_dir: str | Path,
    *,
    extract: Extract,
    match: Match,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    seed: int = 0,
    rendering: PromptRendering = AS_CHAT,
    shard_size: int = 256,
    parameters: Mapping[str, Any] | None = None,
    extra_manifest: Mapping[str, Any] | None = None,
    allow_other_tokenizer: bool = False,
) -> dict[str, Any]:
    """Answer every problem greedily and `samples` times, verify, and write rows and `metrics.json`.

    Args:
        load: gives the engine when the first unfinished shard needs it; a finished run loads no model.
        problems: problems stage; ids must be unique, because runs are compared by id.
        extract, match: read the final answer out of a text, and compare it with the reference
            (`tokalign.rewards.extract_answer`, `answers_match`).
        stop: strings that end a completion, as they did when the training data were sampled; base models run on past
            their answer without. What comes after one is no answer.
        seed: each problem draws from a seed of its own made from this one and its id, so that neither shards nor
            other problems change its samples.
        rendering: how prompts become ids; use what the rollouts used.
        parameters: what else determines the rows, e.g. hashes of the weights.
        allow_other_tokenizer: take `prompt_ids` of the problems that another tokenizer has made.

    Returns:
        `metrics_of` the rows.

    Raises:
        ContractError: no problems, a prompt that is missing, an id that occurs twice, or `prompt_ids` of another
            tokenizer.
    """
    if samples < 0:
        raise ValueError(f"samples is {samples}: use 0 for greedy decoding alone, or more.")
    check_problems(problems, "the problems")
    check_prompt_ids(problems, tokenizer, "the problems", allow_other_tokenizer=allow_other_tokenizer)
    engines: list[Engine] = []

    def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not engines:
            engines.append(load())
        prompts = [prompt_ids(row, tokenizer, rendering) for row in rows]
        greedy = engines[0].generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=tuple(stop)))
        each = [
            SamplingParams(
                n=max(1, samples),
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                stop=tuple(stop),
                seed=problem_seed(seed, row["id"], "evaluation"),
            )
            for row in rows
        ]
        sampled = engines[0].generate(prompts, each) if samples else [[] for _ in rows]
        return [_row(row, g[0], s) for row, g, s in zip(rows, greedy, sampled, strict=True)]

    def _row(row: dict[str, Any], greedy: Any, sampled: Sequence[Any]) -> dict[str, Any]:
        text, *texts = (str(tokenizer.decode(c.token_ids, skip_special_tokens=True)) for c in (greedy, *sampled))
        answer, *answers = (extract(cut_at_stop(each, stop)) for each in (text, *texts))
        return {
            "id": row["id"],
            "answer": row["answer"],
            "greedy_ids": greedy.token_ids,
            "greedy": text,
            "greedy_answer": answer,
            "greedy_correct": match(answer, row["answer"]),
            "greedy_finish_reason": greedy.finish_reason,
            "sampled_answers": answers,
            "sampled_correct": [match(a, row["answer"]) for a in answers],
            "sampled_finish_reasons": [s.finish_reason for s in sampled],
        }

    settings = {
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "stop": list(stop),
        "seed": seed,
        **rendering_settings(rendering),
    }
    try:
        manifest = run_job(
            answer,
            problems,
            output_dir,
            name="evaluate",
            parameters={**settings, **(parameters or {})},
            tokenizer=tokenizer,
            shard_size=shard_size,
            prompts=rendering.record(tokenizer),
            extra_manifest={**(extra_manifest or {}), **allowance(allow_other_tokenizer)},
        )
    finally:
        for engine in engines:
            engine.close()
    return {**metrics_of(load_stage(output_dir)), **settings, "seconds": manifest["seconds"]}


def metrics_of(rows: Dataset) -> dict[str, Any]:
    """Figures of a run's rows.

    Returns:
        `greedy_accuracy`, `n`, `ci95` (Wilson), `truncated` (share of greedy completions that met max_tokens), and with
        samples `sampled_accuracy`, `sampled_ci95` (bootstrap over problems), `pass_at_k`; None without.
    """
    greedy = accuracy(rows["greedy_correct"])
    correct = list(rows["sampled_correct"])
    figures: dict[str, Any] = {
        "greedy_accuracy": greedy["accuracy"],
        "sampled_accuracy": None,
        "n": greedy["n"],
        "ci95": greedy["ci95"],
        "sampled_ci95": None,
        "pass_at_k": None,
        "truncated": sum(reason == "length" for reason in rows["greedy_finish_reason"]) / len(rows),
    }
    if correct[0]:
        sampled = sampled_accuracy(correct)
        figures["sampled_accuracy"] = sampled["accuracy"]
        figures["sampled_ci95"] = sampled["ci95"]
        figures["pass_at_k"] = pass_at_k_report([len(c) for c in correct], [sum(c) for c in correct])
    return figures


def compare_runs(run: str | Path, other: str | Path) -> dict[str, Any]:
    """Paired differences run − other on the same problems.

    Returns:
        `greedy` and `sampled` (`paired_bootstrap` results; sampled None unless both runs have samples), `logps` (change
        of the mean chosen, rejected and margin log-prob, if both runs scored the same pairs), and `settings` that the
        two runs do not share, as {name: [run, other]}.

    Raises:
        ContractError: a folder without a finished run, or with other pairs; ValueError: other problems.
    """
    first, second = load_stage(run), load_stage(other)
    for where, rows in ((run, first), (other, second)):
        if "greedy_correct" not in rows.column_names:
            raise ContractError(
                f"{where} holds no evaluation rows; run `tokalign evaluate answers` with this output_dir."
            )
    result: dict[str, Any] = {
        "greedy": paired_bootstrap(_by_id(first, "greedy_correct"), _by_id(second, "greedy_correct")),
        "sampled": None,
        "logps": None,
        "settings": _differences(*_settings(read_manifest(run), read_manifest(other))),
    }
    if first[0]["sampled_correct"] and second[0]["sampled_correct"]:
        result["sampled"] = paired_bootstrap(_by_id(first, "sampled_correct"), _by_id(second, "sampled_correct"))
    if (Path(run) / "logps").is_dir() and (Path(other) / "logps").is_dir():
        result["logps"] = compare_logps(Path(run) / "logps", Path(other) / "logps")
    return result


def compare_logps(run: str | Path, other: str | Path) -> dict[str, Any]:
    """Change run − other of the mean log-prob of chosen, rejected and their margin on the same pairs, in nats."""
    first, second = load_stage(run), load_stage(other)
    # Several pairs may share a problem's id, so pairs are joined by their order.
    if list(first["id"]) != list(second["id"]):
        raise ContractError(f"{run} and {other} scored different pairs; score both with the same preferences.")
    changes: dict[str, Any] = {}
    values = {side: (list(first[f"{side}_logp"]), list(second[f"{side}_logp"])) for side in SIDES}
    values["margin"] = (
        [c - r for c, r in zip(values["chosen"][0], values["rejected"][0], strict=True)],
        [c - r for c, r in zip(values["chosen"][1], values["rejected"][1], strict=True)],
    )
    for name, (now, before) in values.items():
        paired = paired_bootstrap(now, before)
        changes[name] = {key: paired[key] for key in ("difference", "ci95", "p", "n")}
    return changes


def prompt_ids(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rendering: PromptRendering = AS_CHAT
) -> list[int]:
    """Ids of a problem's prompt, rendered as the rollouts are, or its own `prompt_ids` where it has them."""
    if row.get("prompt_ids") is not None:
        return list(row["prompt_ids"])
    return rendering.ids(row, tokenizer)


def rendering_settings(rendering: PromptRendering) -> dict[str, Any]:
    """What the settings of a run say of its prompts."""
    variables = {"chat_template_kwargs": dict(rendering.chat_template_kwargs)} if rendering.chat_template_kwargs else {}
    return {"prompt_format": rendering.format, **variables}


def write_metrics(output_dir: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` atomically."""
    write_json_atomically(Path(output_dir) / METRICS, metrics)


def _by_id(rows: Dataset, column: str) -> dict[str, float]:
    values = [sum(v) / len(v) if isinstance(v, list) else float(v) for v in rows[column]]
    return dict(zip(rows["id"], values, strict=True))


def _settings(*manifests: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters of runs, with template and date of their prompts where all of them say these."""
    tell = all(RECORD in manifest for manifest in manifests)
    for manifest in manifests:
        prompts = {key: manifest[RECORD].get(key) for key in ("template", "date")} if tell else {}
        yield {**manifest["parameters"], **prompts}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted({*first, *second})
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}
