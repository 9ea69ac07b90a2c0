"""A job killed anywhere and rerun equals one never killed; nothing else than this job's shards is ever accepted."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from tokalign.internals.datasets import loadable
from tokalign.stage.errors import JobError
from tokalign.stage.jobs import NOTHING_MADE, Dropped, Kept, run_job
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import manifest_of, read_manifest

ROOT = Path(__file__).parents[2]

# What every launch of the kill and the two-process tests runs; `delay` stretches it so that a kill strikes the work.
SCRIPT = textwrap.dedent(
    """
    import sys, time
    from datasets import Dataset
    from tokalign.stage.jobs import Dropped, Kept, run_job

    def work(rows):
        for row in rows:
            time.sleep(float(sys.argv[2]))
            k = int(row["id"][1:])
            if k % 7 == 3:
                yield Dropped("seventh")
            elif k % 5 == 0:
                yield Kept([{"id": row["id"], "part": i, "values": []} for i in range(2)], {"part": 1})
            else:
                yield {"id": row["id"], "part": 0, "values": [k / 2]}

    rows = Dataset.from_list([{"id": f"r{k}"} for k in range(50)])
    run_job(work, rows, sys.argv[1], name="work", parameters={"seed": 3}, shard_size=4)
    """
)


def launch(folder, delay: float, tmp_path, *prefix: str) -> list[str]:
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    return [*(prefix or (sys.executable,)), str(script), str(folder), str(delay)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def rows_of(folder) -> list[dict]:
    return load_stage(folder).to_list()


def numbers(count: int) -> Dataset:
    return Dataset.from_list([{"id": f"r{k}", "x": k} for k in range(count)])


def double(rows):
    return [{"id": row["id"], "y": 2 * row["x"]} for row in rows]


def run(folder, function=double, rows=None, **changes):
    arguments = {"name": "double", "parameters": {"seed": 1, "factor": 2}, "shard_size": 4, **changes}
    return run_job(function, numbers(10) if rows is None else rows, folder, **arguments)


def test_rows_counts_and_manifest(tmp_path):
    def function(rows):
        for row in rows:
            if row["x"] == 3:
                yield Dropped("three")
            elif row["x"] == 4:
                yield Kept([{"id": row["id"], "completion_ids": [1, 2]}], {"bad part": 5})
            else:
                yield [{"id": row["id"], "completion_ids": [1]}] * 2

    manifest = run(tmp_path / "out", function, extra_manifest={"models": {"policy": "tiny"}})
    assert manifest == read_manifest(tmp_path / "out")
    expected = {"rows": 17, "rows_in": 10, "dropped": {"three": 1}, "left_out": {"bad part": 5}}
    expected |= {"shards": 3, "tokens": 18}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["status"] == "complete" and manifest["seed"] == 1 and manifest["models"] == {"policy": "tiny"}
    names = sorted(file.name for file in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"part-0000{i}-of-00003.parquet" for i in range(3)]
    loaded = load_stage(tmp_path / "out")
    assert [row["id"] for row in loaded][:4] == ["r0", "r0", "r1", "r1"]
    assert manifest_of(loaded) == manifest


def test_a_finished_job_is_not_run_again(tmp_path):
    first = run(tmp_path)

    def never(rows):
        raise AssertionError("called again")

    assert run(tmp_path, never) == first


def test_killed_at_any_instant_and_rerun_equals_undisturbed(tmp_path):
    whole = tmp_path / "whole"
    subprocess.run(launch(whole, 0, tmp_path), env=environment(), check=True, capture_output=True)
    folder, draw = tmp_path / "killed", random.Random(0)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            launch(folder, 0.03, tmp_path), env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while not (folder / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.01)
        before = len(list(folder.glob("*.parquet")))
        while len(list(folder.glob("*.parquet"))) == before and process.poll() is None:
            time.sleep(0.005)  # the work of this launch has begun
        time.sleep(draw.uniform(0, 0.3))
        kills += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    assert kills, "no launch was killed while it worked"
    subprocess.run(launch(folder, 0, tmp_path), env=environment(), check=True, capture_output=True)
    assert rows_of(folder) == rows_of(whole)
    ours, theirs = read_manifest(folder), read_manifest(whole)
    for key in ("rows", "rows_in", "dropped", "left_out", "input", "parameters"):
        assert ours[key] == theirs[key]
    assert not list(folder.glob(".part-*"))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    subprocess.run(launch(tmp_path / "one", 0, tmp_path), env=environment(), check=True, capture_output=True)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = launch(tmp_path / "two", 0.01, tmp_path, *torchrun)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    writers = {pq.read_schema(file).metadata[b"tokalign"] for file in (tmp_path / "two").glob("*.parquet")}
    assert {json.loads(text)["process"] for text in writers} == {0, 1}
    changed = SCRIPT.replace('"seed": 3', '"seed": 4')
    (tmp_path / "work.py").write_text(changed)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    assert result.stderr.count("seed was 3 and is 4") >= 2  # both processes say it, neither waits for the other


def test_other_parameters_are_refused_by_name(tmp_path):
    run(tmp_path)
    with pytest.raises(JobError, match=r"factor was 2 and is 3, top_p was not set and is 0.9.*delete the folder"):
        run(tmp_path, parameters={"seed": 1, "factor": 3, "top_p": 0.9})
    with pytest.raises(JobError, match=r"shard_size was 4 and is 5"):
        run(tmp_path, shard_size=5)
    with pytest.raises(JobError, match=r"holds the job 'double', not 'triple'"):
        run(tmp_path, name="triple")


def test_another_input_is_refused_even_with_the_same_ids(tmp_path):
    run(tmp_path)
    with pytest.raises(JobError, match=r"another input .10 rows.*now 11 rows"):
        run(tmp_path, rows=numbers(11))
    same_ids = Dataset.from_list([{"id": f"r{k}", "x": k + (k == 9)} for k in range(10)])
    with pytest.raises(JobError, match=r"another input"):
        run(tmp_path, rows=same_ids)


@pytest.mark.parametrize("damage", ["truncated", "no metadata", "foreign", "missing"])
def test_a_damaged_shard_is_found_and_computed_again(tmp_path, damage, capsys):
    run(tmp_path / "a")
    expected = rows_of(tmp_path / "a")
    shard = tmp_path / "a" / "part-00001-of-00003.parquet"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-20])
    elif damage == "no metadata":
        pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    elif damage == "foreign":
        run(tmp_path / "b", rows=Dataset.from_list([{"id": f"q{k}", "x": k} for k in range(10)]))
        shard.write_bytes((tmp_path / "b" / shard.name).read_bytes())
    else:
        shard.unlink()
    seen = []
    run(tmp_path / "a", lambda rows: [seen.append(row["id"]) or {"id": row["id"], "y": 2 * row["x"]} for row in rows])
    assert seen == ["r4", "r5", "r6", "r7"]
    assert rows_of(tmp_path / "a") == expected
    if damage != "missing":
        assert "part-00001-of-00003.parquet" in capsys.readouterr().err.replace("\n", "")


def test_an_unfinished_stage_is_not_loaded(tmp_path):
    def dies(rows):
        for row in rows:
            if row["id"] == "r6":
                raise ConnectionError("server down")
            yield {"id": row["id"], "y": 2 * row["x"]}

    with pytest.raises(JobError, match=r"row 'r6' \(input row 6\) failed: ConnectionError: server down"):
        run(tmp_path, dies)
    with pytest.raises(ValueError, match=r"is unfinished, rerun the job that writes it"):
        load_stage(tmp_path)
    run(tmp_path)
    assert [row["y"] for row in rows_of(tmp_path)] == [2 * k for k in range(10)]


def test_two_runs_on_one_folder(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 7 on elsewhere")
        file.flush()
        with pytest.raises(JobError, match=r"Another run .process 7 on elsewhere. is writing"):
            run(tmp_path)
    run(tmp_path)  # free again


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = tmp_path / f".part-00000-of-00003.parquet.{host}.{dead.pid}.tmp"
    kept = tmp_path / f".part-00000-of-00003.parquet.{host}.{os.getppid()}.tmp"
    elsewhere = tmp_path / ".part-00000-of-00003.parquet.other-machine.1.tmp"
    for file in (gone, kept, elsewhere):
        file.write_text("half")
    run(tmp_path)
    assert not gone.exists() and kept.exists() and elsewhere.exists()


def test_shards_without_a_type_of_their_own_load_together(tmp_path):
    """Empty lists, None and whole numbers in one shard, floats in the next, and a shard in which all is dropped."""

    def function(rows):
        for row in rows:
            k = row["x"]
            if 4 <= k < 8:
                yield Dropped("middle")
            else:
                late = k >= 8
                yield {
                    "id": row["id"],
                    "scores": [0.5] if late else [],
                    "text": "t" if late else None,
                    "number": 0.5 if late else 1,
                    "messages": [{"role": "user", "content": "t" if late else None}],
                }

    run(tmp_path, function)
    rows = rows_of(tmp_path)
    assert len(rows) == 6 and rows[0]["scores"] == [] and rows[0]["number"] == 1.0 and rows[-1]["scores"] == [0.5]
    files = [str(file) for file in loadable(sorted(tmp_path.glob("*.parquet")))]  # by people without this package
    plain = load_dataset("parquet", data_files=files, split="train")
    assert plain.to_list() == rows
    schemas = {str(pq.read_schema(file).remove_metadata()) for file in tmp_path.glob("*.parquet")}
    assert len(schemas) == 1


def test_the_rows_that_are_told_add_up(tmp_path, capsys):
    """Rows read are rows dropped and rows that something was made of; rollouts inside them are counted apart."""
    made = [
        Dropped("silent", {"cut": 2}),
        [],
        Kept([], {"cut": 1}),
        {"id": "a"},
        [{"id": "b"}] * 3,
        Kept([{"id": "c"}], {}),
    ]
    manifest = run(tmp_path, lambda rows: [made[row["x"]] for row in rows], numbers(6))
    assert manifest["dropped"] == {NOTHING_MADE: 2, "silent": 1} and manifest["left_out"] == {"cut": 3}
    lines = [line.strip("│ ").split("│") for line in capsys.readouterr().err.splitlines() if line.startswith("│")]
    told = {name.strip(): int(count) for name, count in lines}
    assert told == {
        "rows read": 6,
        f"dropped: {NOTHING_MADE}": 2,
        "dropped: silent": 1,
        "rows written, from 3 of those read": 5,
        "parts of rows left out: cut": 3,
    }


def test_all_rows_dropped(tmp_path):
    manifest = run(tmp_path, lambda rows: [Dropped("bad") for _ in rows])
    assert manifest["rows"] == 0 and manifest["dropped"] == {"bad": 10}
    with pytest.raises(ValueError, match=r"has no rows: all were dropped"):
        load_stage(tmp_path)


def test_wrong_functions_and_input_are_named(tmp_path):
    with pytest.raises(JobError, match=r"3 items for 4 rows for rows 'r0' to 'r3'"):
        run(tmp_path / "few", lambda rows: double(rows)[:3])
    with pytest.raises(JobError, match=r"more items than rows"):
        run(tmp_path / "many", lambda rows: double(rows) * 2)
    with pytest.raises(JobError, match=r"column `z` is in some output rows only"):
        run(tmp_path / "odd", lambda rows: [{**row, **({"z": 1} if row["x"] == 2 else {})} for row in rows])
    with pytest.raises(JobError, match=r"column `y` cannot be stored"):
        run(tmp_path / "type", lambda rows: [{"id": r["id"], "y": 1 if r["x"] else "one"} for r in rows])
    with pytest.raises(JobError, match=r"no column `id`"):
        run(tmp_path / "id", rows=numbers(3).remove_columns("id"))
    with pytest.raises(JobError, match=r"must be JSON values"):
        run(tmp_path / "json", parameters={"x": {1, 2}})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "old.parquet").write_text("x")
    with pytest.raises(JobError, match=r"holds old.parquet, which this job does not write"):
        run(tmp_path / "foreign")
