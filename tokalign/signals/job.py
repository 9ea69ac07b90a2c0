"""What the commands `tokalign score …` share: their arguments, the way in for pairs, and the job that scores them.

A signal's file holds a scorer, its `Arguments` (a subclass of `ScoreArguments`) and a `main` of three steps:
`load_pairs`, the scorer, `score_pairs`. Everything that is the same for all signals happens here: ids are checked
against the tokenizer, pairs that are text become ids, rows that the scorer refuses are dropped and counted, finished
shards are kept, and the rate is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokalign.data.text_pairs import IDS, tokenize_pairs
from tokalign.generation.rollouts import UNKNOWN_ID
from tokalign.prompts import RECORD, TemplateArguments, rendering_of
from tokalign.signals.registry import get
from tokalign.stage.contract import SIDES, TEXT_ROWS, check_columns, check_preferences
from tokalign.stage.errors import ContractError
from tokalign.stage.hashes import allowance, known_ids, model_identity
from tokalign.stage.jobs import Dropped, Item, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of, read_manifest, write_manifest
from tokalign.stage.processes import process_state

Row = dict[str, Any]


@dataclass(kw_only=True)
class PairsArguments(TemplateArguments):
    """Pairs in, pairs out."""

    dataset: str = field(
        metadata={"help": "Pairs as text or with ids: .jsonl or .parquet file, folder (a stage or parquet), hub id."}
    )
    output_dir: str = field(metadata={"help": "Folder of the scored stage."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    shard_size: int = field(default=256, metadata={"help": "Rows a shard: what a kill can lose."})
    allow_other_tokenizer: bool = field(
        default=False, metadata={"help": "Take ids that another tokenizer has made; the manifest then says so."}
    )

    @property
    def template(self) -> TemplateArguments:
        """What the chat template is given; a signal's own prompts may have a format of theirs."""
        return TemplateArguments(chat_template_kwargs=self.chat_template_kwargs)


@dataclass(kw_only=True)
class ScoreArguments(PairsArguments):
    """Pairs in, pairs out, and the model that reads them."""

    model: str = field(metadata={"help": "Model that reads the answers, or base of its adapters: hub id or path."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of one forward pass, padding included."})
    dtype: str = field(default="auto", metadata={"help": "Weights' type; `auto` is the checkpoint's own."})
    device_map: str | None = field(
        default=None, metadata={"help": "`auto` spreads a large model over all visible GPUs (one process)."}
    )

    def model_options(self) -> dict[str, Any]:
        """How the scorer holds the model: keyword arguments of `CompletionScorer`."""
        return {"token_budget": self.token_budget, "dtype": self.dtype, "device_map": self.device_map}


class Scorer(Protocol):
    """What `score_pairs` asks of a scorer. Both functions take ids of prompts, as many as the signal reads, and of the
    completion: `problem` those of one completion, `score` lists of them and `names` for errors."""

    @property
    def base(self) -> PreTrainedModel: ...

    @property
    def problem(self) -> Callable[..., str | None]: ...

    @property
    def score(self) -> Callable[..., Any]: ...


def load_pairs(arguments: PairsArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Preference pairs whose ids are this tokenizer's: made here from text, or checked.

    A stage's ids are known by its manifest; those of other datasets by the text that they read as. Rows without `id`
    are called by their number. The manifest of pairs made here says how they were rendered, as that of a stage does.

    Raises:
        ContractError: as `load_stage`, `tokenize_pairs` and `check_preferences`, the dataset holds no pairs, or its
            prompts were rendered otherwise than the arguments say.
    """
    path_or_id, allow = arguments.dataset, arguments.allow_other_tokenizer
    rows = load_stage(path_or_id, split=arguments.split, tokenizer=tokenizer, allow_other_tokenizer=allow)
    columns = set(rows.column_names)
    if not columns & {*IDS} and not columns >= {"chosen", "rejected"}:
        raise ContractError(
            f"{path_or_id} holds neither pairs as text (`prompt`, `chosen`, `rejected`) nor their ids (it has "
            f"{', '.join(rows.column_names)}); rename its columns, or make pairs with `tokalign pairs`."
        )
    if "id" not in columns:
        rows = rows.add_column("id", [str(number) for number in range(len(rows))])
    if not columns & {*IDS}:
        prompt_format = "raw" if isinstance(rows[0]["chosen"], str) else "chat"  # as TRL takes texts and messages
        rendering = rendering_of(
            arguments.template, tokenizer, folder=arguments.output_dir, prompt_format=prompt_format
        )
        rows = tokenize_pairs(rows, tokenizer, path_or_id, rendering)
        rows.info.description = json.dumps({RECORD: rendering.record(tokenizer)})
        return rows
    check_columns(rows, path_or_id, "preferences", ())
    manifest = manifest_of(rows) or {}
    if manifest.get("tokenizer_hash") is None:
        check_preferences(rows, tokenizer, text_rows=0 if allow else TEXT_ROWS)
    recorded = manifest.get(RECORD)
    rendering_of(arguments.template, tokenizer, recorded=recorded, of=path_or_id, must_agree=True, any_template=allow)
    return rows


def the_prompt(row: Row, side: str) -> Sequence[Sequence[int]]:
    """What most signals read a completion behind: the row's prompt."""
    return (row["prompt_ids"],)


def score_pairs(
    arguments: ScoreArguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    *,
    name: str,
    signals: Sequence[str],
    weights: Mapping[str, str | None],
    parameters: Mapping[str, Any],
    prompts: Callable[[Row, str], Sequence[Sequence[int]]] = the_prompt,
    extra_manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write `rows` again with `<side>_<signal>` for every signal and each of its sides.

    Args:
        scorer: gives a list of numbers a completion, or several by the signal's name.
        name: of the job.
        signals: registered names.
        weights: paths of the models whose weights determine the result, by what they are for.
        parameters: what else determines it.
        prompts: ids of the prompts behind which the scorer reads a side of a row.
    """
    sides, counted = get(signals[0]).sides, get(signals[0]).counted
    known = known_ids(tokenizer)

    def score(batch: list[Row]) -> list[Item]:
        """All rows of a shard at once, so that the scorer can put completions of one length together."""
        items: list[Item] = []
        asked: list[tuple[Row, str, list[Sequence[int]]]] = []
        for row in batch:
            ids = {side: [*prompts(row, side), row[f"{side}_ids"]] for side in sides}
            problems = (f"{side}: {p}" for side in sides if (p := scorer.problem(*ids[side])) is not None)
            problem = next(problems, None)
            if problem is None and not all(i < len(known) and known[i] for side in SIDES for i in row[f"{side}_ids"]):
                problem = UNKNOWN_ID  # sampled by an engine that draws from padding; no trainer would take the row
            if problem is not None:
                items.append(Dropped(problem))
                continue
            if counted:
                row[counted] = sum(len(p) + len(completion) for *before, completion in ids.values() for p in before)
            items.append(row)
            asked += [(row, side, ids[side]) for side in sides]
        if asked:
            columns = (list(column) for column in zip(*(ids for _, _, ids in asked), strict=True))
            scores = scorer.score(*columns, names=[f"{row['id']!r} ({side})" for row, side, _ in asked])
            for signal, lists in (scores if isinstance(scores, Mapping) else {signals[0]: scores}).items():
                for (row, side, _), values in zip(asked, lists, strict=True):
                    row[f"{side}_{signal}"] = values
        return items

    run_scoring(
        score,
        arguments,
        rows,
        tokenizer,
        name=name,
        signals=signals,
        weights=weights,
        parameters={**parameters, "dtype": str(scorer.base.dtype)},
        extra_manifest=extra_manifest,
    )


def run_scoring(
    function: Callable[[list[Row]], Iterable[Item]],
    arguments: PairsArguments,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    signals: Sequence[str],
    weights: Mapping[str, str | None],
    parameters: Mapping[str, Any],
    extra_manifest: Mapping[str, Any] | None = None,
) -> None:
    """`run_job` of a function that adds signals to rows, and the report of its rate; arguments as of `score_pairs`."""
    hashes = {key: model_identity(path) for key, path in weights.items()}
    run_job(
        function,
        rows,
        arguments.output_dir,
        name=name,
        parameters={**parameters, **hashes, "split": arguments.split},
        tokenizer=tokenizer,
        shard_size=arguments.shard_size,
        extra_manifest={**weights, **allowance(arguments.allow_other_tokenizer), **(extra_manifest or {})},
    )
    if process_state().is_main_process:
        report_rate(arguments.output_dir, signals[0])


def report_rate(output_dir: str | Path, name: str) -> None:
    """Add to a finished stage's manifest how many tokens the signal `name` has and how many a second of work gave.

    Several signals of one reading count once, so one of them is named. Where the job counted the tokens that went
    through the model (`Signal.counted`), their sum and the cost of a scored token are added too.
    """
    manifest = read_manifest(output_dir)
    if not manifest["rows"]:
        return
    signal = get(name)
    lists = [f"{side}_{name}" for side in signal.sides]
    read = [*lists, signal.counted] if signal.counted else lists
    scored = through = 0
    for table in load_stage(output_dir).select_columns(read).with_format("arrow").iter(batch_size=1000):
        scored += sum(pc.sum(pc.list_value_length(table[column])).as_py() for column in lists)
        through += pc.sum(table[signal.counted]).as_py() if signal.counted else 0
    seconds = max(manifest["seconds"], 1e-3)
    report = {"scored_tokens": scored, "tokens_per_second": round(scored / seconds, 1)}
    if signal.counted:
        report |= {"model_tokens": through, "tokens_per_scored_token": round(through / scored, 1)}
    write_manifest(output_dir, {**manifest, **report})
    besides = f" ({through / seconds:,.0f} through the model)" if signal.counted else ""
    print(f"{scored:,} tokens scored, {scored / seconds:,.0f} a second of work{besides}; {output_dir}")
