r"""What reaching a model server costs its client: a hand-off, the event loop, two engines at once, branches of labels.

    python -m benchmarks.experiments.handoff                        # five minutes; an idle machine for the wall times
    python -m benchmarks.experiments.handoff --parts handoff --lengths 1000 16000

The servers are a process that answers at once or after a model's step time, without a model: what is measured is ours.

* `handoff`: CPU time of this process for one hand-off to the LLM behind so many ids, eight of which are new, and the
  longest that one callback holds the event loop while 32 requests hand off, their first included, which encodes all
  ids. Beside it the `openai` client with the same request: how it was done before.
* `overlap`: so many requests at once, each waiting for its own steps (an SLM step a token, an LLM step a hand-off): the
  share of its time that it spends so, mean over the requests. What is missing from 1 the client adds; ran one engine
  after the other, the share would fall with the number of requests.
* `branches`: forks of one answer a second, 4,000 ids before the first: all together as `label_routing` asks for them,
  and one after the other with the whole prefix each. `HTTP` is the client's side alone (one by one by `openai`),
  `transformers` a small random model, which reads each prefix again one by one.

Writes results.json to `output_dir`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import openai
from transformers import HfArgumentParser

from benchmarks.experiments.measure import random_llama, word_tokenizer
from benchmarks.render import Tables, save
from tokalign.generation.arguments import EngineArguments
from tokalign.generation.completions import EncodedIds
from tokalign.generation.openai_engine import OpenAIEngine
from tokalign.generation.protocol import Engine, SamplingParams
from tokalign.generation.transformers_engine import TransformersEngine
from tokalign.routing.decode.orchestrator import Orchestrator
from tokalign.routing.decode.vllm.servers import ServedLLM, ServedSLM
from tokalign.routing.labels.branches import Fork, continue_forks

ROUTE, WORDS, NEW = 3, 1000, 8
GREEDY = SamplingParams(temperature=0, max_tokens=1)


@dataclass
class Arguments:
    """What to measure, and at which sizes."""

    parts: list[str] = field(default_factory=lambda: ["handoff", "overlap", "branches"])
    lengths: list[int] = field(default_factory=lambda: [1000, 4000, 8000, 16000, 32000])
    repeats: int = 20
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16, 64])
    slm_seconds: float = field(default=0.02, metadata={"help": "Step time of the SLM that is stood in for."})
    llm_seconds: float = field(default=0.1, metadata={"help": "Of the LLM."})
    rate: float = field(default=0.12, metadata={"help": "Share of tokens that the LLM writes."})
    new_tokens: int = 100
    prefix: int = field(default=4000, metadata={"help": "Ids before the first branch."})
    forks: int = 32
    branch_tokens: int = 16
    hidden_size: int = 256
    layers: int = 4
    dtype: str = "float32"
    device: str = "cpu"
    output_dir: str = "runs/benchmarks/handoff"


# ---------------------------------------------------------------------------------------------- servers without models


def headers(kind: str, length: int | None) -> bytes:
    size = b"transfer-encoding: chunked" if length is None else f"content-length: {length}".encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: " + kind.encode() + b"\r\n" + size + b"\r\n\r\n"


def choice(ids: list[int], finish: str | None) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5] * len(ids)}
    return {"index": 0, "text": "x", "token_ids": ids, "finish_reason": finish, "logprobs": logprobs}


async def stand_in(slm_seconds: float, llm_seconds: float, rate: float) -> None:
    """Both models' servers on one port, which is printed; a stream is the SLM's, a whole answer the LLM's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                writer.close()
                return
            size = re.search(rb"content-length: *(\d+)", head.lower())
            body = await reader.readexactly(int(size[1])) if size else b""
            fields = re.sub(rb'"prompt": ?\[[^]]*\],?', b"", body)
            if b'"stream":true' in fields:
                await stream(writer, fields)
                continue
            answer: dict[str, Any] = {"data": [{"id": "m", "max_model_len": 1 << 20}]}
            if b'"model"' in fields:
                agreeing = f'"stop_token_ids":[{ROUTE}]'.encode() in fields
                await asyncio.sleep(0 if agreeing else llm_seconds)
                most = int(re.search(rb'"max_tokens":(\d+)', fields)[1])  # type: ignore[index]
                ids = [ROUTE] if agreeing else [7] * most
                answer = {"choices": [choice(ids, "stop" if agreeing else "length")]}
            data = json.dumps(answer).encode()
            writer.write(headers("application/json", len(data)) + data)

    async def stream(writer: asyncio.StreamWriter, fields: bytes) -> None:
        most = int(re.search(rb'"max_tokens":(\d+)', fields)[1])  # type: ignore[index]
        writer.write(headers("text/event-stream", None))
        for k in range(most + 1):
            await asyncio.sleep(slm_seconds)
            routed = random.random() < rate
            done = routed or k == most - 1
            one = choice([ROUTE if routed else 8], "stop" if routed else "length" if done else None)
            event = b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            if done:
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                return

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def standing_in(slm_seconds: float = 0.0, llm_seconds: float = 0.0, rate: float = 0.0) -> Iterator[str]:
    """Their address."""
    run = f"asyncio.run(stand_in({slm_seconds}, {llm_seconds}, {rate}))"
    code = f"import asyncio; from {__spec__.name} import stand_in; {run}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        finally:
            server.kill()


# --------------------------------------------------------------------------------------------------------------- parts

HandOff = Callable[[EncodedIds], Awaitable[None]]


async def cpu_of_one(hand_off: HandOff, length: int, repeats: int) -> float:
    """CPU seconds of a hand-off behind `length` ids, of which eight are new each time."""
    ids = EncodedIds((i * 7919) % 150_000 for i in range(length))
    for turn in range(repeats + 3):
        if turn == 3:
            start = time.process_time()
        ids.extend(range(NEW))
        await hand_off(ids)
    return (time.process_time() - start) / repeats


async def longest_block(hand_off: HandOff, length: int) -> float:
    """The most CPU time that the event loop gave to one callback while 32 requests handed off four times each."""
    longest, run = 0.0, asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        nonlocal longest
        start = time.thread_time()
        run(handle)
        longest = max(longest, time.thread_time() - start)

    async def request(ids: EncodedIds) -> None:
        for _ in range(4):
            ids.extend(range(NEW))
            await hand_off(ids)

    texts = [EncodedIds((first + i * 7919) % 150_000 for i in range(length)) for first in range(32)]
    with mock.patch.object(asyncio.Handle, "_run", timed_run):
        await asyncio.gather(*[request(ids) for ids in texts])
    return longest


async def hand_offs(arguments: Arguments) -> list[dict[str, Any]]:
    with standing_in() as url:
        ours = ServedLLM([url], None, api_key="none", timeout=60.0, max_retries=0)
        theirs = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60.0)

        async def by_us(ids: EncodedIds) -> None:
            async with aclosing(ours.write(ids, GREEDY, 1, 5, place=0, unseen=NEW)) as pieces:
                async for _ in pieces:
                    pass

        async def by_openai(ids: EncodedIds) -> None:
            extra = {"return_token_ids": True, "stop_token_ids": []}
            await theirs.completions.create(
                model="m", prompt=list(ids), max_tokens=1, temperature=0.0, seed=5, logprobs=0, extra_body=extra
            )

        rows = []
        for length in arguments.lengths:
            row: dict[str, Any] = {"ids": length}
            for name, hand_off in (("ours", by_us), ("openai", by_openai)):
                row[name] = {
                    "cpu_seconds": await cpu_of_one(hand_off, length, arguments.repeats),
                    "longest_block": await longest_block(hand_off, length),
                }
            rows.append(row)
        await ours.close()
        await theirs.close()
    return rows


async def overlap(arguments: Arguments) -> list[dict[str, Any]]:
    tokenizer = word_tokenizer(WORDS)
    params = SamplingParams(temperature=0, max_tokens=arguments.new_tokens)
    rows = []
    with standing_in(arguments.slm_seconds, arguments.llm_seconds, arguments.rate) as url:
        for batch in arguments.batch_sizes:
            llm = ServedLLM([url], None, api_key="none", timeout=60.0, max_retries=0)
            slm = ServedSLM(url, ROUTE, WORDS, 0.5, api_key="none", timeout=60.0)
            backend = Orchestrator(slm, llm, tokenizer, threshold=0.5, shared_vocab=WORDS)

            async def request(row: int, backend: Orchestrator = backend) -> float:
                """Its own steps' time as a share of the time that it took."""
                prompt = [(row + 7 * i) % WORDS for i in range(arguments.prefix)]
                start, waits = time.perf_counter(), 0.0
                async with aclosing(backend.generate(prompt, params)) as tokens:
                    async for token in tokens:
                        # A hand-off costs the SLM's step that proposed it, and the LLM's
                        waits += arguments.slm_seconds + arguments.llm_seconds * token.by_llm
                return waits / (time.perf_counter() - start)

            start, cpu = time.perf_counter(), time.process_time()
            shares = await asyncio.gather(*[request(row) for row in range(batch)])
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            stats = backend.stats
            rows.append(
                {"batch": batch, "llm_rate": stats.llm_rate, "tokens_per_second": stats.tokens / seconds,
                 "cpu_of_a_token": cpu / stats.tokens, "shares": shares}
            )  # fmt: skip
            await backend.close()
    return rows


def fork_rates(engine: Engine, forks: list[Fork], one: Callable[[list[int]], None], tokens: int) -> dict[str, float]:
    """Branches a second, together and one after the other."""
    rates = {}
    for name in ("warm-up", "together", "one by one"):
        start = time.perf_counter()
        if name == "one by one":
            for fork in forks:
                one([*fork.prompt_ids, *fork.completion_ids[: fork.position], fork.token])
        else:
            continue_forks(engine, forks, [], max_tokens=tokens)
        rates[name] = len(forks) / (time.perf_counter() - start)
    del rates["warm-up"]
    return rates


def branches(arguments: Arguments) -> list[dict[str, Any]]:
    answer = [(i * 7919) % WORDS for i in range(arguments.prefix + 2 * arguments.forks)]
    forks = [Fork([5, 6, 7], answer, arguments.prefix + 2 * k, 9) for k in range(arguments.forks)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * arguments.hidden_size}
        random_llama(folder, arguments, vocab_size=WORDS, **heads)
        word_tokenizer(WORDS).save_pretrained(folder)
        with standing_in() as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            served = OpenAIEngine(EngineArguments(folder, engine="openai", base_urls=[url]))

            def by_openai(prompt: list[int]) -> None:
                client.completions.create(model="m", prompt=prompt, max_tokens=arguments.branch_tokens, temperature=0)

            rows.append({"engine": "HTTP", **fork_rates(served, forks, by_openai, arguments.branch_tokens)})
            served.close()
        engine = TransformersEngine(EngineArguments(folder, dtype=arguments.dtype))
        params = SamplingParams(temperature=0, max_tokens=arguments.branch_tokens)

        def by_engine(prompt: list[int]) -> None:
            engine.generate([prompt], params)

        rows.append({"engine": "transformers", **fork_rates(engine, forks, by_engine, arguments.branch_tokens)})
        engine.close()
    return rows


def tables(results: dict[str, Any]) -> Tables:
    milliseconds = "{:.2f}".format
    shown: Tables = {}
    if "handoff" in results:
        shown["a hand-off"] = (
            ("ids", "ours, ms CPU", "openai, ms CPU", "ratio", "longest block, ms", "openai's"),
            [
                [
                    f"{row['ids']:,}",
                    *(milliseconds(1e3 * row[name]["cpu_seconds"]) for name in ("ours", "openai")),
                    f"{row['openai']['cpu_seconds'] / row['ours']['cpu_seconds']:.0f}",
                    *(milliseconds(1e3 * row[name]["longest_block"]) for name in ("ours", "openai")),
                ]
                for row in results["handoff"]
            ],
        )
    if "overlap" in results:
        shown["two engines at once"] = (
            ("requests", "LLM rate", "tokens/s", "ms CPU a token", "own steps / time"),
            [
                [
                    str(row["batch"]),
                    f"{100 * row['llm_rate']:.1f} %",
                    f"{row['tokens_per_second']:.0f}",
                    milliseconds(1e3 * row["cpu_of_a_token"]),
                    f"{statistics.mean(row['shares']):.2f}",
                ]
                for row in results["overlap"]
            ],
        )
    if "branches" in results:
        shown["branches a second"] = (
            ("engine", "together", "one by one", "ratio"),
            [
                [
                    row["engine"],
                    *(f"{row[way]:.1f}" for way in ("together", "one by one")),
                    f"{row['together'] / row['one by one']:.1f}",
                ]
                for row in results["branches"]
            ],
        )
    return shown


def main(arguments: Arguments) -> dict[str, Any]:
    results: dict[str, Any] = {"arguments": asdict(arguments)}
    if unknown := set(arguments.parts) - {"handoff", "overlap", "branches"}:
        raise SystemExit(f"--parts has {', '.join(sorted(unknown))}: use handoff, overlap or branches.")
    if "handoff" in arguments.parts:
        results["handoff"] = asyncio.run(hand_offs(arguments))
    if "overlap" in arguments.parts:
        results["overlap"] = asyncio.run(overlap(arguments))
    if "branches" in arguments.parts:
        results["branches"] = branches(arguments)
    return save(arguments.output_dir, results, tables)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
