"""Cells of an experiment: processes share them, what is there is kept, and a kill loses the cell in work alone."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.common import fast_products, kept, shared
from benchmarks.render import read_json

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_share_the_cells(tmp_path):
    """Each cell is worked on once, by whichever process is free, and both have all of them."""
    work = (
        "import sys, json; from functools import partial; from pathlib import Path\n"
        "from benchmarks.experiments.common import shared\n"
        "folder, me = Path(sys.argv[1]), sys.argv[2]\n"
        "def cell(name):\n"
        "    file = folder / name\n"
        "    if not file.exists():\n"
        "        file.write_text(me)\n"
        "        with open(folder / 'log', 'a') as log: log.write(name)\n"
        "    return name\n"
        "print(json.dumps(shared({n: partial(cell, n) for n in 'abcdef'}, folder / 'locks')))\n"
    )
    words = [[sys.executable, "-c", work, str(tmp_path), me] for me in ("one", "two")]
    running = [subprocess.Popen(w, stdout=subprocess.PIPE, text=True, cwd=ROOT) for w in words]
    found = [json.loads(process.communicate()[0]) for process in running]
    assert found[0] == found[1] == {name: name for name in "abcdef"}
    assert sorted((tmp_path / "log").read_text()) == list("abcdef")


def test_a_cell_that_another_is_at_comes_last(tmp_path):
    order: list[str] = []
    (tmp_path / "a").touch()
    with open(tmp_path / "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def last() -> str:  # the other is done while we are at the last free cell
            fcntl.flock(other, fcntl.LOCK_UN)
            return "b"

        shared({"a": lambda: order.append("a"), "b": lambda: order.append(last())}, tmp_path)
    assert order == ["b", "a"]


def test_a_kept_cell_is_never_made_again(tmp_path):
    made: list[str] = []
    seen: list[list[str]] = []

    def work(name: str) -> dict[str, float]:
        made.append(name)
        return {"value": len(made)}

    def run(names: str, **settings: float) -> dict[str, dict[str, float]]:
        cells = {name: lambda name=name: work(name) for name in names}
        return kept(cells, tmp_path, settings=settings, after=lambda found: seen.append(list(found)))

    first = run("ab", rates=(1e-4, 1e-3))
    assert run("ab", rates=(1e-4, 1e-3)) == first and made == ["a", "b"]
    assert seen == [["a"], ["a", "b"]]  # results can be written while others are at work
    assert run("abc", rates=(1e-4, 1e-3)) == first | {"c": {"value": 3}} and made == ["a", "b", "c"]
    run("a", rates=(1e-4,))  # of other sizes, so it is another cell
    assert made == ["a", "b", "c", "a"] and read_json(tmp_path / "a.json")["cell"] == {"value": 4}


def test_a_kill_loses_the_cell_in_work_alone(tmp_path):
    made: list[str] = []

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept({"a": lambda: made.append("a"), "b": killed}, tmp_path)
    assert {file.name for file in tmp_path.glob("*.json")} == {"a.json"}
    kept({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, tmp_path)
    assert made == ["a", "b"]


def test_the_faster_products_end_with_their_context() -> None:
    kernels = torch.backends.mkldnn.matmul
    before = kernels.fp32_precision
    layer, x = torch.nn.Linear(512, 256), torch.randn(3, 5, 512)
    usual = torch.nn.Linear.forward
    with fast_products():
        assert kernels.fp32_precision == "bf16"
        for _ in range(2):  # it follows the weights, which training changes in place
            with torch.no_grad():
                torch.testing.assert_close(layer(x), usual(layer, x), atol=1e-5, rtol=1e-5)
            layer(x).square().sum().backward()
            torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert kernels.fp32_precision == before and torch.nn.Linear.forward is usual
