"""benchmarks/experiments/serve_load.py: its two clients against a server that writes letters, and what is counted."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import ExitStack

import pytest

from benchmarks.experiments.serve_load import (
    Chat,
    LoadArguments,
    ask,
    drive,
    figures,
    free_port,
    most_at_once,
    running,
    strike,
    tables,
    until_healthy,
)
from tests.routing.serving import FakeBackend, serving
from tokalign.routing.decode.backend import RowFailed


@pytest.mark.parametrize("scenario", ["plain", "disconnects"])
def test_a_load_of_two_seconds(scenario):
    backend = FakeBackend(pause=0.001)
    backend.max_length = 1200  # of which a prompt takes some hundred characters
    with serving(backend) as server:
        results = asyncio.run(drive(server.url, LoadArguments(minutes=1 / 30, chats=4), scenario, os.getpid()))
    burst, arrivals = results["burst"], results["arrivals"]
    assert (burst["chats"], burst["failed"], arrivals["failed"], results["left_running"]) == (4, 0, 0, 0)
    assert burst["errors"] == [] and burst["left"] == 0 and burst["tokens"] > 100
    assert (arrivals["left"] > 0) == (scenario == "disconnects" and backend.cancelled > 0)
    assert results["memory_mb"]["most"] >= results["memory_mb"]["first"] > 0
    rows = tables({"scenarios": {scenario: {**results, "exit_status": 0}}})
    assert len(rows["load"][1]) == 2 and all(len(row) == len(head) for head, table in rows.values() for row in table)


@pytest.mark.parametrize("number", [0, 1], ids=["openai", "http"])
def test_both_clients_see_tokens_failures_and_outages(number):
    with serving(FakeBackend(degraded=True)) as server:
        chat = asyncio.run(ask(server.url, number, "hello", most=7))
        assert (len(chat.at), chat.degraded, chat.failed, chat.error) == (8, True, False, None)
        chat = asyncio.run(ask(server.url, number, "hello", leave=3))
        assert (len(chat.at), chat.left, chat.failed) == (4, True, False)
        assert "400" in asyncio.run(ask(server.url, number, "hello", most=0)).error
    with serving(FakeBackend(fails_at=2, failure=RowFailed("not finite"))) as server:
        chat = asyncio.run(ask(server.url, number, "hello"))
        assert "not finite" in chat.error and chat.failed
        chat.expected = "not finite"
        assert not chat.failed


def test_the_server_of_the_llm_is_killed_and_comes_back(tmp_path):
    port, log = free_port(), tmp_path / "log"
    (tmp_path / "health").write_text("ok")
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]

    async def play():
        with ExitStack() as stack:
            process = stack.enter_context(running(command, log))
            await until_healthy(f"http://127.0.0.1:{port}", process, log)
            await strike(1 / 100, process, command, log, stack)
            assert process.wait(5) == -9
            await until_healthy(f"http://127.0.0.1:{port}", stack.enter_context(running(["sleep", "9"], log)), log)

    asyncio.run(play())


def test_figures():
    chats = [Chat("http", [0.0, 1.0, 1.5, 3.0]), Chat("http", [2.0, 2.5]), Chat("http", [4.0], expected="not finite")]
    counted = figures(chats)
    assert (counted["tokens"], counted["failed"], counted["meant_to_fail"]) == (4, 1, 1)
    assert counted["first_token"]["p50"] == 0.75 and counted["between_tokens"]["most"] == 1.5
    assert most_at_once(chats) == 2
