"""Offline jobs: a function on rows, run sharded, resumable and atomic over the processes of `accelerate launch`.

The input is cut into shards of a fixed number of rows; shards that are not on disk yet are shared over the processes,
and each becomes one parquet file under its final name only when it is whole. So a job killed at any instant and
started again gives the rows of one that was never killed, and two processes give the rows of one. All counts live in
the parquet metadata of the shard that they count: there is no second file that could disagree.

The output folder must be one that all processes see (on several machines: a shared file system).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

import tokalign
from tokalign.stage.errors import JobError
from tokalign.stage.hashes import ALLOW_OTHER_TOKENIZER, added_tokens, content_hash, former_hash, tokenizer_hash
from tokalign.stage.manifest import MANIFEST, SAMPLING, manifest_of, read_manifest, write_manifest
from tokalign.stage.processes import process_state
from tokalign.stage.progress import JobProgress
from tokalign.stage.shards import counts_of, job_hash, shard_name, shard_problem, write_shard

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, the user's quota, the process's largest file
_LOCK = ".lock"
_TEMPORARY = re.compile(r"^\.part-.*\.parquet\.(?P<host>.+)\.(?P<pid>\d+)\.tmp$")
_STALE_SECONDS = 3600  # a temporary file of another machine is left alone for this long
NOTHING_MADE = "nothing was made of it"  # why a row is dropped whose job gives no row and no reason
_POLL_SECONDS = 0.2  # how often a process that has finished looks for the others' shards
_SHARED_SECONDS = 30.0  # how long a network file system may take to show another machine's file


Row = dict[str, Any]  # of a stage, by column


class Dropped(NamedTuple):
    """An input row that gives no output row, and why; `counts` are of its parts that were left out (rollouts)."""

    reason: str
    counts: Mapping[str, int] | None = None


class Kept(NamedTuple):
    """Output rows of an input row of which some parts were left out, counted by reason (for example rollouts)."""

    rows: list[dict[str, Any]]
    counts: Mapping[str, int]


Item = Row | list[Row] | Dropped | Kept


def run_job(
    function: Callable[[list[dict[str, Any]]], Iterable[Item]],
    rows: Dataset,
    output_dir: str | Path,
    *,
    name: str,
    parameters: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard_size: int = 256,
    prompts: Mapping[str, Any] | None = None,
    extra_manifest: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Apply `function` to all rows and write the stage `output_dir`.

    Args:
        function: Gets the rows of one shard and gives one item an input row, in order: the output row, a list of
            output rows, `Dropped(reason)`, or `Kept(rows, counts)`. A generator shows progress by the row, and its
            errors are reported with the row's id. It must not depend on which rows share a shard.
        rows: Input with an `id` column.
        output_dir: Folder of the stage; finished shards in it are kept.
        name: Name of the job, kept in the manifest.
        parameters: JSON values that determine the output (put `weights_hash` of the models here). Resuming with
            others is refused.
        tokenizer: Whose ids the rows hold; without it the input stage's tokenizer hash is passed on.
        shard_size: Input rows a shard: what a kill can lose, and the unit that processes share.
        prompts: How the job renders prompts (`PromptRendering.record`); without it the input stage's is passed on.
        extra_manifest: Further entries for the manifest; not compared on resume.

    Returns:
        The manifest: `rows`, `rows_in`, `dropped` (input rows without an output row, by reason), `left_out` (parts of
            input rows, by reason), `shards`, `seconds` (of work, summed over processes and
        resumes), `tokens` (if rows have `completion_ids`), `parameters`, `input`, `tokenizer_hash` and the rest.

    Raises:
        JobError: another run holds the folder, other parameters or input than before, a row that fails, a full disk.
    """
    # The main process alone reads the folder and plans; the others get its plan or its error. Had each looked for
    # itself, they might see different folders on a network file system and wait for each other for ever.
    state = process_state()
    folder = Path(output_dir)
    console = Console(stderr=True)
    with _full_disk_named(folder), _locked(folder, state) as lock_error:
        plan: Any = lock_error
        if state.is_main_process and plan is None:
            try:
                with _full_disk_named(folder):
                    plan = _prepare(
                        rows, folder, name, parameters, tokenizer, shard_size, prompts, extra_manifest or {}, console
                    )
            except (JobError, ValueError, TypeError) as error:
                if state.num_processes == 1:
                    raise
                plan = str(error)  # every process stops with the same sentence, none waits for the others
        if state.num_processes > 1:
            plan = broadcast_object_list([plan])[0]
        if isinstance(plan, str):
            raise JobError(plan)
        _wait_until_visible(folder)
        # In turn, not in blocks: shards of a sorted input differ in cost, and after a resume what is left lies
        # anywhere.
        mine = plan["todo"][state.process_index :: state.num_processes]
        with JobProgress(folder, plan, state, console, name) as progress:
            for index in mine:
                _run_shard(function, rows, folder, plan, index, progress)
            # Not a barrier alone: collectives give up after minutes, and another process may have hours to go.
            while progress.unfinished():
                time.sleep(_POLL_SECONDS)
        state.wait_for_everyone()
        # Only now is every shard on disk: the manifest says complete, or the next start finds what is missing.
        if state.is_main_process and plan["manifest"]["status"] != "complete":
            _finish(folder, plan)
        state.wait_for_everyone()
        manifest = read_manifest(folder)
    if state.is_main_process:
        print_counts(manifest, console)
    return manifest


def print_counts(manifest: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a job read, wrote and dropped as a small table."""
    table = Table("", "count", title=str(manifest["name"]), title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("rows read", f"{manifest['rows_in']:,}")
    for reason, count in manifest["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    used = manifest["rows_in"] - sum(manifest["dropped"].values())
    made = "rows written" if used == manifest["rows"] else f"rows written, from {used:,} of those read"
    table.add_row(made, f"{manifest['rows']:,}")
    for reason, count in manifest.get("left_out", {}).items():
        table.add_row(f"parts of rows left out: {reason}", f"{count:,}")
    (console or Console(stderr=True)).print(table)


# ------------------------------------------------------------------------------------------------- before the work


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise JobError(
            f"{folder} takes no more data ({error.strerror}); make room and start the same command again, which keeps "
            "the finished shards."
        ) from error


@contextmanager
def _locked(folder: Path, state: PartialState) -> Iterator[str | None]:
    """Hold the folder for this launch. The kernel frees the lock when the process dies, however it dies."""
    if not state.is_main_process:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield f"Another run ({file.read().strip()}) is writing {folder}; wait for it or choose another folder."
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield None


def _prepare(
    rows: Dataset,
    folder: Path,
    name: str,
    parameters: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    shard_size: int,
    prompts: Mapping[str, Any] | None,
    extra_manifest: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Check the folder against this job, clean it, write the first manifest, and list the shards still to do."""
    if shard_size < 1:
        raise JobError(f"shard_size is {shard_size}; it must be at least 1.")
    if "id" not in rows.column_names:
        raise JobError(f"The input of {name} has no column `id`; add one that names each row.")
    if len(rows) == 0:
        raise JobError(f"The input of {name} has no rows; check the stage before it.")
    try:
        parameters = json.loads(json.dumps(dict(parameters), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise JobError(f"The parameters of {name} must be JSON values: {error}.") from None
    source = manifest_of(rows) or {}
    before = read_manifest(folder) if (folder / MANIFEST).exists() else None
    ids = {key: source.get(key) for key in ("tokenizer_hash", "added_tokens")}
    if tokenizer is not None:
        ids = {"tokenizer_hash": tokenizer_hash(tokenizer), "added_tokens": added_tokens(tokenizer)}
        theirs = before.get("tokenizer_hash") if before is not None else None
        if theirs not in (None, ids["tokenizer_hash"]) and theirs == former_hash(tokenizer):
            ids["tokenizer_hash"] = theirs  # begun before 0.2: it goes on under its own name
    manifest: dict[str, Any] = {
        "name": name,
        "status": "running",
        "package_version": tokalign.__version__,
        "parameters": parameters,
        **{key: value for key, value in ids.items() if value is not None or key == "tokenizer_hash"},
        **{key: source[key] for key in _INHERITED if key in source and key not in extra_manifest},
        "input": {"name": source.get("name"), "rows": len(rows), "content": content_hash(rows)},
        "shard_size": shard_size,
        "shards": -(-len(rows) // shard_size),
    }
    if (record := source.get("prompts") if prompts is None else dict(prompts)) is not None:
        manifest["prompts"] = record
    if "seed" in parameters:
        manifest["seed"] = parameters["seed"]
    job = job_hash(manifest)
    assert job is not None
    # Compared before anything is deleted: a mistyped folder is refused whole.
    if before is not None:
        _compare(before, manifest, folder)
        if before.get("status") == "complete":
            manifest = before
    names = [shard_name(i, manifest["shards"]) for i in range(manifest["shards"])]
    _clean(folder, set(names))
    # A shard is trusted by its content, not by its name: a disk that was full or a copy that was cut short leaves files
    # under right names. Damaged ones are deleted here, before any process looks at what is there.
    todo = []
    for i, file in enumerate(names):
        problem = shard_problem(folder / file, job, i, pages=True)  # as costly as the hash of the input above
        if problem is None:
            continue
        todo.append(i)
        if (folder / file).exists():
            console.print(f"[yellow]{name}: {file} {problem}; it is computed again.")
            (folder / file).unlink()  # the others take a file that exists for a finished one
    # The folder says "running" before the first row is computed, so a killed job never passes for a finished stage.
    if todo:
        manifest = {key: value for key, value in manifest.items() if key not in _RESULTS} | {"status": "running"}
    if manifest["status"] != "complete":
        manifest = {**extra_manifest, **manifest}
        write_manifest(folder, manifest)
        done = manifest["shards"] - len(todo)
        if done:
            console.print(f"{name}: resumes with {done} of {manifest['shards']} shards finished.")
    else:
        console.print(f"{name}: already finished in {folder}.")
    return {"manifest": manifest, "job": job, "todo": todo}


_INHERITED = (ALLOW_OTHER_TOKENIZER, SAMPLING)  # what stays true of rows that are made of rows
_RESULTS = ("rows", "rows_in", "dropped", "left_out", "seconds", "tokens")


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    remedy = "delete the folder or choose another one"
    if before.get("name") != now["name"]:
        raise JobError(f"{folder} holds the job {before.get('name')!r}, not {now['name']!r}; {remedy}.")
    old, new = dict(before.get("parameters", {})), dict(now["parameters"])
    for key in ("shard_size", "tokenizer_hash"):
        old[key], new[key] = before.get(key), now[key]
    if "prompts" in before:  # stages of earlier versions do not say how they rendered
        old["prompts"], new["prompts"] = before["prompts"], now.get("prompts")
    absent = object()
    different = [key for key in sorted({*old, *new}) if old.get(key, absent) != new.get(key, absent)]
    if different:
        changes = ", ".join(f"{key} was {_show(old, key)} and is {_show(new, key)}" for key in different)
        raise JobError(f"{folder} was started with other parameters ({changes}); {remedy}.")
    if before.get("input") != now["input"]:
        was, now_is = before.get("input") or {}, now["input"]
        raise JobError(
            f"{folder} was started with another input ({was.get('rows')} rows of {was.get('name') or 'a dataset'}, "
            f"content {str(was.get('content'))[:12]}; now {now_is['rows']} rows of {now_is['name'] or 'a dataset'}, "
            f"content {now_is['content'][:12]}); {remedy}."
        )


def _show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"


def _clean(folder: Path, names: set[str]) -> None:
    """Remove what dead processes left half-written; refuse a folder that holds someone else's parquet files."""
    foreign = sorted(file.name for file in folder.glob("*.parquet") if file.name not in names)
    if foreign:
        raise JobError(f"{folder} holds {foreign[0]}, which this job does not write; choose an empty folder.")
    for file in folder.glob(f".{MANIFEST}.*.tmp"):
        file.unlink(missing_ok=True)  # only who holds the lock writes the manifest
    for file in folder.glob(".part-*.tmp"):
        match = _TEMPORARY.match(file.name)
        if match is None:
            continue
        here = match["host"] == socket.gethostname()
        if not _alive(int(match["pid"])) if here else time.time() - file.stat().st_mtime > _STALE_SECONDS:
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_until_visible(folder: Path) -> None:
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (folder / MANIFEST).exists():
        if time.monotonic() > deadline:
            raise JobError(f"{folder} is not shared with the main process; use a file system that all machines see.")
        time.sleep(_POLL_SECONDS)


# -------------------------------------------------------------------------------------------------------- the work


def _run_shard(
    function: Callable[[list[dict[str, Any]]], Iterable[Item]],
    rows: Dataset,
    folder: Path,
    plan: Mapping[str, Any],
    index: int,
    progress: JobProgress,
) -> None:
    manifest = plan["manifest"]
    first = index * manifest["shard_size"]
    last = min(first + manifest["shard_size"], len(rows))
    inputs = rows.with_format(None).select(range(first, last)).to_list()
    started = time.monotonic()
    output: list[dict[str, Any]] = []
    # Of two kinds, so that the rows add up: rows read = rows dropped + rows that something was made of
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    ids = [row["id"] for row in inputs]
    for position, item in enumerate(_items(function, inputs, manifest["name"], first), start=1):
        if isinstance(item, Dropped):
            dropped[item.reason] += 1
            left_out.update(item.counts or {})
        else:
            left_out.update(item.counts if isinstance(item, Kept) else {})
            made = item.rows if isinstance(item, Kept) else [item] if isinstance(item, dict) else item
            dropped.update([] if made else [NOTHING_MADE])
            output.extend(made)
        progress.advance(position)
    table = _to_table(output, f"{manifest['name']}, rows {ids[0]!r} to {ids[-1]!r}")
    # Counts go into the shard that they count. In a file of their own they could be of another state than the rows.
    counts = {
        "job": plan["job"],
        "shard": index,
        "process": process_state().process_index,
        "first": first,
        "rows_in": last - first,
        "rows": len(output),
        "dropped": dict(sorted(dropped.items())),
        "left_out": dict(sorted(left_out.items())),
        "seconds": round(time.monotonic() - started, 3),
    }
    if output and "completion_ids" in output[0]:
        counts["tokens"] = sum(len(row["completion_ids"]) for row in output)
    file = shard_name(index, manifest["shards"])
    write_shard(table, counts, folder / file)
    progress.finished(file)


def _items(
    function: Callable[[list[dict[str, Any]]], Iterable[Item]], inputs: list[dict[str, Any]], name: str, first: int
) -> Iterator[Item]:
    """The function's items, one an input row; an error is reported with the row that it struck."""
    count = 0
    where = f"rows {inputs[0]['id']!r} to {inputs[-1]['id']!r} (input rows {first} to {first + len(inputs) - 1})"
    try:
        iterator = iter(function(inputs))
        while True:
            if isinstance(iterator, _Lazy) and count < len(inputs):
                where = f"row {inputs[count]['id']!r} (input row {first + count})"
            try:
                item = next(iterator)
            except StopIteration:
                break
            count += 1
            if count > len(inputs):
                break
            yield item
    except Exception as error:  # whatever the function raises, named by its row and raised again
        raise JobError(f"{name}: {where} failed: {type(error).__name__}: {error}") from error
    if count != len(inputs):
        more = "more items than rows" if count > len(inputs) else f"{count} items for {len(inputs)} rows"
        raise JobError(f"{name}: the function gave {more} for {where}; it must give one item a row.")


_Lazy = type(_ for _ in ())  # a generator does its work row by row, so its position names the failing row


def _to_table(output: list[dict[str, Any]], where: str) -> pa.Table:
    if not output:
        return pa.table({})
    columns = list(output[0])
    for row in output:
        if row.keys() != output[0].keys():
            odd = sorted(row.keys() ^ output[0].keys())[0]
            raise JobError(f"{where}: column `{odd}` is in some output rows only; give it to all, None if empty.")
    arrays = {}
    for column in columns:
        try:
            arrays[column] = pa.array([row[column] for row in output])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise JobError(f"{where}: column `{column}` cannot be stored: {error}.") from None
    return pa.table(arrays)


def _finish(folder: Path, plan: Mapping[str, Any]) -> None:
    """Give all shards one schema, add up their counts and write the final manifest."""
    manifest = plan["manifest"]
    files = [folder / shard_name(i, manifest["shards"]) for i in range(manifest["shards"])]
    counts = [counts_of(file) for file in files]
    schemas = [pq.read_schema(file).remove_metadata() for file in files]
    filled = [schema for schema, count in zip(schemas, counts, strict=True) if count["rows"]]
    if odd := {name for schema in filled for name in {*schema.names} ^ {*filled[0].names}}:
        raise JobError(
            f"{manifest['name']}: column `{sorted(odd)[0]}` is in some shards only; give it to all rows, None if empty."
        )
    try:
        # A shard whose lists are all empty or whose values are all None has no type of its own for that column.
        schema = pa.unify_schemas(filled, promote_options="permissive") if filled else pa.schema([])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise JobError(f"{manifest['name']}: the shards disagree about a column: {error}.") from None
    # Shards are written apart, so their types may differ; readers of a folder expect one schema.
    for file, own, count in zip(files, schemas, counts, strict=True):
        if own != schema:
            table = pq.read_table(file) if count["rows"] else schema.empty_table()
            write_shard(table.select(schema.names).cast(schema), count, file)
    dropped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for count in counts:
        dropped.update(count["dropped"])
        left_out.update(count.get("left_out", {}))  # shards of an earlier version count both in `dropped`
    results: dict[str, Any] = {
        "rows": sum(count["rows"] for count in counts),
        "rows_in": sum(count["rows_in"] for count in counts),
        "dropped": dict(sorted(dropped.items())),
        "left_out": dict(sorted(left_out.items())),
        "seconds": round(sum(count["seconds"] for count in counts), 3),
    }
    if any("tokens" in count for count in counts):
        results["tokens"] = sum(count.get("tokens", 0) for count in counts)
    write_manifest(folder, {**manifest, **results, "status": "complete"})
