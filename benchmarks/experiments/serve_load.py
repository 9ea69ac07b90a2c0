r"""The routed server under load: chats of a pair with 40,960 positions, none of which says how long its answer may be.

    python -m benchmarks.experiments.serve_load --output_dir runs/benchmarks/serve_load
    python -m benchmarks.experiments.serve_load --scenarios plain poison --minutes 2
    python -m benchmarks.experiments.serve_load --scenarios outage        # on vLLM, with a server of the LLM

A default chat may fill the context, so a server that reserves what a chat may write serves them one by one. Here
`--chats` of them come at once, and when all are answered more come as a Poisson process, at `--load` times the rate at
which the first half of their tokens came. Every other chat is of the `openai` client, the rest raw HTTP; all are
streams, and each token is an event. Scenarios:

- `plain`: nothing else happens.
- `poison`: once a minute a prompt comes on which the SLM's logits are not finite. It has to fail, alone.
- `disconnects`: a third of the clients leave within their first 50 tokens.
- `outage`: the LLM's server is killed after a third of the time, and started again after two thirds. Chats go on.

Counted: seconds to the first token and between tokens, the failures that the scenario does not ask for, the completions
that still run when all clients have gone, and the memory of the server with its child processes. The pair is tiny
and untrained, and the client and the server share the machine: the seconds say what the schedule does, not how fast a
real pair is. Writes results.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import openai
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import TrlParser

from benchmarks.render import Tables, save
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.stage.hashes import weights_hash

SCENARIOS = ("plain", "poison", "disconnects", "outage")
VOCAB = 300  # a random model ends about every 300 tokens
POISON = VOCAB - 1  # the id whose embedding is infinite
LONGEST_WAIT = 300.0  # seconds for a server to start, and for the last chats to end


@dataclass
class LoadArguments:
    """What comes, and for how long."""

    output_dir: str = field(default="runs/benchmarks/serve_load", metadata={"help": "Folder of results.json."})
    scenarios: list[str] = field(default_factory=lambda: [*SCENARIOS[:3]], metadata={"help": ", ".join(SCENARIOS)})
    minutes: float = field(default=10.0, metadata={"help": "Minutes of Poisson arrivals in each scenario."})
    chats: int = field(default=32, metadata={"help": "Chats that come at once, before them."})
    load: float = field(default=0.7, metadata={"help": "Rate of arrivals, as a share of the first chats' rate."})
    positions: int = field(default=40960, metadata={"help": "Positions of both models."})
    seed: int = field(default=0, metadata={"help": "Seed of models, prompts and arrivals."})


@dataclass
class Chat:
    """What one client saw. `at`: seconds at which it asked, and at which each token came.

    Attributes:
        left: it left on purpose. expected: how it had to fail, if it had to.
    """

    client: str
    at: list[float]
    left: bool = False
    expected: str | None = None
    error: str | None = None
    degraded: bool = False

    @property
    def failed(self) -> bool:
        return self.error != self.expected if self.expected is None else self.expected not in (self.error or "")


# ---------------------------------------------------------------------------------------------- the pair and its server


def save_pair(folder: Path, positions: int, seed: int) -> dict[str, str]:
    """A random SLM, LLM and router; one word's embedding in the SLM is infinite."""
    words = {"<pad>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}t2 {{ message.content }} {% endfor %}t3"
    paths = {name: str(folder / name) for name in ("slm", "llm", "router")}
    for number, (name, layers) in enumerate({"slm": 2, "llm": 6}.items()):
        torch.manual_seed(seed + number)
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        config = LlamaConfig(
            vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=positions, **shape, **ends
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            # The first number of each state stays what the embedding says, and speaks against writing the word: it
            # comes in prompts alone.
            model.get_input_embeddings().weight[:, 0] = 0.05
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = 0
                layer.mlp.down_proj.weight[0] = 0
            model.lm_head.weight[:, 0] = 0
            model.lm_head.weight[POISON] = 0
            model.lm_head.weight[POISON, 0] = -1000
            if name == "slm":
                model.get_input_embeddings().weight[POISON] = torch.inf
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    torch.manual_seed(seed)
    router = TokenRouterConfig(hidden_size=128, shared_vocab=VOCAB, top_k=20, width=32, num_blocks=1, threshold=0.5)
    router.slm = {"name": paths["slm"], "weights_hash": weights_hash(paths["slm"]), "tokenizer_hash": None}
    TokenRouter(router).save_pretrained(paths["router"])
    return paths


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, which is ended with all its children."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a server's /health; RuntimeError with the end of its log if it ends or takes too long."""
    end = time.monotonic() + LONGEST_WAIT
    async with httpx.AsyncClient() as client:
        while True:
            with suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The server at {url} did not start: {log.read_text()[-2000:]}")
            await asyncio.sleep(0.5)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    total = 0
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        status = Path(f"/proc/{pid}/status").read_text()
        total = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(resident_bytes(int(child)) for child in children.read_text().split())
    return total


# -------------------------------------------------------------------------------------------------------------- clients


async def ask(url: str, number: int, words: str, *, most: int | None = None, leave: int | None = None) -> Chat:
    """One chat, by `openai` if its number is even and by raw HTTP otherwise.

    Args:
        most: `max_tokens`; None says nothing, as most clients do. leave: tokens after which the client goes away.
    """
    chat = Chat("openai" if number % 2 == 0 else "http", [time.perf_counter()])
    body = {"messages": [{"role": "user", "content": words}], "stream": True, "seed": number, "return_token_ids": True}
    body |= {} if most is None else {"max_tokens": most}
    events = by_openai(url, body) if chat.client == "openai" else by_http(url, body)
    try:
        async for event in events:
            now = time.perf_counter()
            for choice in event.get("choices") or ():
                chat.at += [now] * len(choice.get("token_ids") or ())
            chat.degraded |= bool((event.get("routing") or {}).get("degraded"))
            if leave is not None and len(chat.at) > leave:
                chat.left = True
                break
        else:
            if len(chat.at) == 1:
                chat.error = "the stream held no token"
    except (openai.OpenAIError, httpx.HTTPError) as error:
        chat.error = f"{type(error).__name__}: {error}"
    finally:
        await events.aclose()  # type: ignore[attr-defined]
    return chat


async def by_openai(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900) as client:
        extra = {"return_token_ids": body["return_token_ids"]}
        asked = {name: value for name, value in body.items() if name not in extra}
        model = (await client.models.list()).data[0].id
        async with await client.chat.completions.create(model=model, extra_body=extra, **asked) as stream:
            async for chunk in stream:
                yield chunk.model_dump()


async def by_http(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with (
        httpx.AsyncClient(timeout=900) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
    ):
        if answer.status_code != 200:
            raise httpx.HTTPError(f"{answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line in ("", "data: [DONE]"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise httpx.HTTPError(str(event["error"]))
            yield event


async def still_running(url: str) -> float:
    """Completions that the server still writes or keeps waiting, a moment after the last client has gone."""
    async with httpx.AsyncClient() as client:
        for _ in range(20):
            health = (await client.get(f"{url}/health")).json()
            if not (left := health["running"] + health["queued"]):
                break
            await asyncio.sleep(0.25)
    return left


# ------------------------------------------------------------------------------------------------------------ scenarios


async def drive(url: str, arguments: LoadArguments, scenario: str, pid: int) -> dict[str, Any]:
    """The burst, the arrivals and what the scenario does to them; returns what was counted.

    Args:
        pid: the server's process.
    """
    draw = random.Random(arguments.seed)
    numbers = iter(range(10**9))

    def words() -> str:
        return " ".join(f"t{draw.randrange(4, POISON)}" for _ in range(draw.randrange(5, 200)))

    # 1. All at once. How fast the first half of their tokens came, while most were there, sets the pace of the rest.
    before = time.perf_counter()
    burst = await asyncio.gather(*(ask(url, next(numbers), words()) for _ in range(arguments.chats)))
    half = float(np.median([moment for chat in burst for moment in chat.at[1:]]))
    rate = arguments.load * len(burst) / 2 / (half - before)
    memory = [resident_bytes(pid)]

    # 2. Arrivals with exponential pauses, whoever is still being answered: a slow server is not given time.
    begun, tasks = time.perf_counter(), []
    end, minute = begun + 60 * arguments.minutes, 0
    while True:
        await asyncio.sleep(draw.expovariate(rate))
        now = time.perf_counter()
        if now > end:
            break
        if scenario == "poison" and now > begun + 60 * minute:
            minute += 1
            tasks.append(asyncio.create_task(poisoned(url, next(numbers), words())))
        leave = draw.randrange(1, 50) if scenario == "disconnects" and draw.random() < 1 / 3 else None
        tasks.append(asyncio.create_task(ask(url, next(numbers), words(), leave=leave)))
        memory.append(resident_bytes(pid))
    chats = await asyncio.wait_for(asyncio.gather(*tasks), LONGEST_WAIT)
    memory.append(resident_bytes(pid))
    return {
        "burst": figures(burst),
        "arrivals": figures(chats),
        "chats_per_second": rate,
        "most_at_once": most_at_once(chats),
        "left_running": await still_running(url),
        "memory_mb": {"first": memory[0] / 2**20, "last": memory[-1] / 2**20, "most": max(memory) / 2**20},
    }


async def poisoned(url: str, number: int, words: str) -> Chat:
    """A chat on which the SLM's logits are not finite."""
    chat = await ask(url, number, f"{words} t{POISON} t5", most=20)
    chat.expected = "not finite"
    return chat


async def strike(
    minutes: float, process: subprocess.Popen[bytes], command: list[str], log: Path, stack: ExitStack
) -> None:
    """Kill the LLM's server after a third of the time, and start it again after two thirds."""
    await asyncio.sleep(20 * minutes)
    os.killpg(process.pid, signal.SIGKILL)
    await asyncio.sleep(20 * minutes)
    stack.enter_context(running(command, log))


async def run(arguments: LoadArguments, scenario: str, folder: Path, paths: dict[str, str]) -> dict[str, Any]:
    """One scenario on a server of its own."""
    logs = Path(arguments.output_dir).resolve() / scenario
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tokalign", "serve", "--port", str(port), "--dtype", "float32"]
    command += [word for name, path in paths.items() for word in (f"--{name}", path)]
    command += ["--max_running", str(2 * arguments.chats), "--max_queue", "1000", "--target_rate", "0.12"]
    with ExitStack() as stack:
        struck: asyncio.Task[None] | None = None
        if scenario == "outage":
            llm_port = free_port()
            served = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", paths["llm"]]
            served += ["--port", str(llm_port), "--host", "127.0.0.1", "--dtype", "float32"]
            served += ["--enable-prompt-tokens-details", "--max-num-batched-tokens", str(arguments.positions)]
            share = (
                "0.3" if torch.cuda.is_available() else "0.1"
            )  # of one GPU, or of the host's memory, for each engine
            served += ["--gpu-memory-utilization", share]
            if not torch.cuda.is_available():
                served += ["--enforce-eager", "--no-enable-chunked-prefill"]
            llm = stack.enter_context(running(served, logs / "llm.log"))
            await until_healthy(f"http://127.0.0.1:{llm_port}", llm, logs / "llm.log")
            command += ["--engine", "vllm", "--llm_urls", f"http://127.0.0.1:{llm_port}/v1", "--llm_timeout", "10"]
            command += ["--gpu_memory_utilization", share]
        server = stack.enter_context(running(command, logs / "server.log"))
        await until_healthy(url, server, logs / "server.log")
        if scenario == "outage":
            struck = asyncio.create_task(strike(arguments.minutes, llm, served, logs / "llm.log", stack))
        results = await drive(url, arguments, scenario, server.pid)
        if struck is not None:
            await struck
        server.send_signal(signal.SIGTERM)
        results["exit_status"] = await asyncio.to_thread(server.wait, 60)
    return results


# -------------------------------------------------------------------------------------------------------------- figures


def figures(chats: list[Chat]) -> dict[str, Any]:
    """Seconds to the first token and between two, and how the chats ended."""
    answered = [chat for chat in chats if len(chat.at) > 1]
    first = [chat.at[1] - chat.at[0] for chat in answered]
    gaps = np.concatenate([np.diff(chat.at[1:]) for chat in answered]) if answered else np.zeros(0)
    return {
        "chats": len(chats),
        "tokens": sum(len(chat.at) - 1 for chat in chats),
        "first_token": quantiles(first),
        "between_tokens": quantiles(gaps),
        "left": sum(chat.left for chat in chats),
        "degraded": sum(chat.degraded for chat in chats),
        "meant_to_fail": sum(chat.expected is not None for chat in chats),
        "failed": sum(chat.failed for chat in chats),
        "errors": sorted({str(chat.error)[:200] for chat in chats if chat.failed})[:10],
    }


def quantiles(seconds: Any) -> dict[str, float | None]:
    names = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: float(np.quantile(seconds, q)) if len(seconds) else None for name, q in names.items()}


def most_at_once(chats: list[Chat]) -> int:
    """The largest number of chats that were open at a time."""
    steps = sorted([(chat.at[0], 1) for chat in chats] + [(chat.at[-1], -1) for chat in chats])
    return int(max(np.cumsum([step for _, step in steps]), default=0)) if steps else 0


def tables(results: dict[str, Any]) -> Tables:
    """A row for the chats that came at once, and one for those that came by and by, of each scenario."""
    heads = ("scenario", "chats", "tokens", "first token, p50 / p99", "between tokens, p50 / p99", "left", "SLM alone")
    rows, memory = [], []
    for name, run in results["scenarios"].items():
        for part, what in (("burst", "at once"), ("arrivals", f"{run['chats_per_second']:.2f} a second")):
            one = run[part]
            times = [
                " / ".join("–" if one[key][q] is None else f"{one[key][q]:.3f} s" for q in ("p50", "p99"))
                for key in ("first_token", "between_tokens")
            ]
            counts = [f"{one['chats']:,}", f"{one['tokens']:,}", *times, str(one["left"]), str(one["degraded"])]
            failed = f"**{one['failed']}** ({one['meant_to_fail']} meant to)"
            rows.append([f"{name}, {what}", *counts, failed])
        sizes = [f"{run['memory_mb'][when]:,.0f}" for when in ("first", "last", "most")]
        memory.append([name, *sizes, str(run["most_at_once"]), f"{run['left_running']:g}", str(run["exit_status"])])
    names = ("scenario", "MB after the burst", "MB at the end", "MB at most", "most at once", "left running", "exit")
    return {"load": ((*heads, "failed"), rows), "server": (names, memory)}


def main(arguments: LoadArguments) -> dict[str, Any]:
    if unknown := set(arguments.scenarios) - set(SCENARIOS):
        raise SystemExit(f"--scenarios has no {', '.join(sorted(unknown))}: use {', '.join(SCENARIOS)}.")
    with TemporaryDirectory() as folder:
        paths = save_pair(Path(folder), arguments.positions, arguments.seed)
        scenarios = {name: asyncio.run(run(arguments, name, Path(folder), paths)) for name in arguments.scenarios}
    return save(arguments.output_dir, {"arguments": asdict(arguments), "scenarios": scenarios}, tables)


if __name__ == "__main__":
    main(*TrlParser((LoadArguments,)).parse_args_and_config())
