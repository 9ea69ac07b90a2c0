"""One of two processes dies: the launch ends with an error instead of waiting for ever, and a rerun has all rows."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
import time

import pytest

from tests.launch.support import free_port, launch_command, launch_environment

SCRIPT = textwrap.dedent(
    """
    import os, sys, time
    from datasets import Dataset
    from tokalign.stage.processes import end_processes, process_state
    from tokalign.stage.jobs import run_job

    def work(rows):
        with open(f"{sys.argv[1]}.pid.{process_state().process_index}", "w") as file:
            file.write(str(os.getpid()))
        for row in rows:
            time.sleep(float(sys.argv[2]))
            yield {"id": row["id"], "square": int(row["id"]) ** 2}

    process_state()
    rows = Dataset.from_list([{"id": str(k)} for k in range(40)])
    run_job(work, rows, sys.argv[1], name="squares", parameters={}, shard_size=2)
    end_processes()
    """
)


@pytest.mark.slow
def test_the_others_do_not_wait_for_a_dead_process(forks, tmp_path):
    script = tmp_path / "squares.py"
    script.write_text(SCRIPT)
    out, want = tmp_path / "out", tmp_path / "want"
    options = ("--num_processes", "2", "--main_process_port", str(free_port()))
    command = launch_command("cpu.yaml", script, [str(out), "0.5"], options)
    launched = subprocess.Popen(
        command, env=launch_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    pids = [tmp_path / f"out.pid.{number}" for number in range(2)]
    try:
        while not (all(file.exists() and file.read_text() for file in pids) and any(out.glob("*.parquet"))):
            assert launched.poll() is None, launched.stderr.read().decode()[-3000:]
            time.sleep(0.05)
        dead, other = int(pids[1].read_text()), int(pids[0].read_text())
        os.kill(dead, signal.SIGKILL)
        said = launched.communicate(timeout=90)[1].decode()
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
    assert launched.returncode != 0 and f"(pid: {dead})" in said
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)
    before = len(list(out.glob("*.parquet")))
    assert 0 < before < 20
    job = forks.Job("squares", str(script), ("{out}", "0"))
    forks.undisturbed(job, want)
    forks.finish(forks.start(job, out), job, out)  # with one process, what two have begun
    assert sum(forks.differences(job, want, out).values()) == 0
