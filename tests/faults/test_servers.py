"""Servers that hang, close the connection or die in the middle of a job, beside those of the engines' own tests."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from contextlib import contextmanager

import pytest

from tests.generation.test_openai_engine import PROMPTS, check_answers, engine_at, good, serving
from tokalign.cli.sample import SampleArguments
from tokalign.cli.sample import main as sample_rollouts
from tokalign.generation import EngineArguments, SamplingParams, openai_engine
from tokalign.generation.arguments import SamplingArguments
from tokalign.routing.decode.backend import LLMUnavailable
from tokalign.routing.decode.vllm.servers import ServedLLM
from tokalign.stage.errors import JobError
from tokalign.stage.loading import load_stage
from tokalign.stage.manifest import read_manifest


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE", 0.001)


@contextmanager
def raw_server(answers):
    """A server that sends, to the n-th connection, the n-th of these bytes and hangs up; None is silence."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    over, opened = threading.Event(), []

    def serve():
        for answer in answers:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            opened.append(connection)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            if answer is not None:
                connection.sendall(answer)
                connection.close()
        over.wait(20)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", opened
    finally:
        over.set()
        listener.close()
        for connection in opened:
            connection.close()
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 200", HEAD, HEAD + b'content-length: 900\r\n\r\n{"id": "1", "choi', b"\x00\x01\xff\r\n\r\n"],
    ids=["no byte", "half a line", "no end of the headers", "half an answer", "no HTTP"],
)
def test_a_connection_that_breaks_is_tried_again(tiny_path, answer):
    with raw_server([answer] * 2) as (url, opened):
        with serving(lambda attempt, body: (200, good(body))) as well:
            check_answers(engine_at(tiny_path, url, well.url, concurrency=1).generate(PROMPTS, SamplingParams(n=2)))
        assert opened
    with raw_server([answer] * 3) as (url, opened):
        with pytest.raises(
            ConnectionError, match=r"^Prompt 0 got no answer in 3 attempts at .*start again\.$"
        ) as error:
            engine_at(tiny_path, url, max_retries=2).generate(PROMPTS[:1], SamplingParams())
        assert "\n" not in str(error.value) and len(opened) == 3


def test_a_server_that_hangs_is_given_up_after_the_timeout(tiny_path):
    with raw_server([None] * 2) as (url, opened), serving(lambda attempt, body: (200, good(body))) as well:
        engine = engine_at(tiny_path, url, well.url, concurrency=1, timeout=0.3)
        check_answers(engine.generate(PROMPTS, SamplingParams(n=2)))
    with raw_server([None] * 2) as (url, opened):
        with pytest.raises(ConnectionError, match=r"^Prompt 0 got no answer in 2 attempts .*timed out.*start again\.$"):
            engine_at(tiny_path, url, max_retries=1, timeout=0.2).generate(PROMPTS[:1], SamplingParams())
        assert len(opened) == 2


def test_a_server_that_dies_in_the_middle_of_a_job(tiny_path, tmp_path):
    """The job stops with one sentence and keeps its shards; the same command ends with the rows of a sound server."""
    (tmp_path / "problems").mkdir()
    problems = [json.dumps({"id": f"p{k}", "prompt": f"{k}?", "answer": str(k)}) for k in range(10)]
    (tmp_path / "problems" / "train.jsonl").write_text("\n".join(problems))

    def sample(url: str, folder: str):
        engine = EngineArguments(tiny_path, engine="openai", base_urls=[url], max_retries=1, timeout=10, concurrency=1)
        arguments = SampleArguments(str(tmp_path / "problems"), str(tmp_path / folder), shard_size=2)
        return sample_rollouts(arguments, SamplingArguments(num_rollouts=2, max_tokens=40), engine)

    asked = []

    def dies(attempt, body):
        asked.append(body)
        return (200, good(body)) if len(asked) <= 5 else (500, {"error": {"message": "out of memory"}})

    with serving(lambda attempt, body: (200, good(body))) as well:
        sample(well.url, "want")
        with (
            serving(dies) as ill,
            pytest.raises(JobError, match=r"rows 'p4' to 'p5' .* failed: ConnectionError: Prompt 1 got .*out of mem"),
        ):
            sample(ill.url, "out")
        assert read_manifest(tmp_path / "out")["status"] == "running"
        kept = {file.name: os.stat(file).st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
        assert len(kept) == 2
        sample(well.url, "out")
    assert {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in kept} == kept
    assert load_stage(tmp_path / "out").to_list() == load_stage(tmp_path / "want").to_list()


def event(ids) -> bytes:
    choice = {"index": 0, "text": "", "token_ids": ids, "finish_reason": None, "logprobs": None}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "served", "max_model_len": 64}]}).encode()
LIST = HEAD + b"connection: close\r\ncontent-length: " + str(len(MODELS)).encode() + b"\r\n\r\n" + MODELS


@pytest.mark.parametrize("cut", [10, 40, len(event([13, 14])) - 3])
def test_half_an_event_of_a_routed_stream_writes_nothing(cut):
    """What came whole is kept once; the half event's tokens are asked for again, here in vain."""
    with raw_server([LIST, STREAM + event([12]) + event([13, 14])[:cut]]) as (url, _):

        async def write():
            llm = ServedLLM([url], None, api_key="none", timeout=2, max_retries=0)
            try:
                async for piece in llm.write([7], SamplingParams(max_tokens=40), 40, None, place=0, unseen=1):
                    got.extend(piece.ids)
            finally:
                await llm.close()

        got: list[int] = []
        with pytest.raises(LLMUnavailable, match=r"The LLM cannot be reached"):
            asyncio.run(write())
    assert got == [12]
