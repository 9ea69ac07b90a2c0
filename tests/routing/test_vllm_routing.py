"""Routed decoding in fp32, all engines real: the SLM in this process, LLM and a second SLM as servers."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.routing.probes import Weighed
from tests.support import tiny_model, tiny_tokenizer
from tokalign.generation import SamplingParams
from tokalign.routing.decode.backend import LLMUnavailable, RowFailed
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.policies import AlwaysLLM, NeverLLM, RouterPolicy
from tokalign.routing.decode.vllm.probe import probe_fields, probe_overrides, probe_server_options, read_probe

vllm = pytest.importorskip("vllm")

from tokalign.routing.decode.vllm.backend import VLLMBackend  # noqa: E402
from tokalign.routing.decode.vllm.plugin import choose_route_token, routed_overrides, routed_server_options  # noqa: E402

DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(6, 60) for _ in range(DRAW.randrange(3, 60))] for _ in range(8)]
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = SamplingParams(temperature=0, max_tokens=200)  # whatever happens to it happens before its end
POISON = 3  # an id that the SLM cannot read; neither model writes it
UNREADABLE = [*PROMPTS[3], POISON]


def save_model(path: Path, padding: int, **options) -> str:
    """A tiny model whose vocabulary is padded by ids that it never writes; the SLM cannot read `POISON`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    model = tiny_model(len(tokenizer) + padding, hidden_size=128, **options)  # vLLM's CPU kernels want heads of 32
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] = 0
        model.lm_head.weight[POISON] = 0
        if path.name == "slm":
            model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(path)
    return str(path)


def save_router(path: Path, slm: str) -> str:
    from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
    from tokalign.stage.hashes import tokenizer_hash, weights_hash

    torch.manual_seed(3)
    vocab = len(tiny_tokenizer()) + 8
    hashes = {"name": "slm", "weights_hash": weights_hash(slm), "tokenizer_hash": tokenizer_hash(tiny_tokenizer())}
    config = TokenRouterConfig(
        hidden_size=128, embedding_size=128, shared_vocab=vocab, top_k=20, width=32, num_blocks=1, slm=hashes
    )
    TokenRouter(config).save_pretrained(path)
    return str(path)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(model: str, log: Path, *options: str):
    """Start a vLLM server; gives (its address, the process, a function that waits for it)."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--served-model-name", "served", *options,
    ]  # fmt: skip
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--gpu-memory-utilization", "0.3", "--no-enable-chunked-prefill"]
        command += ["--block-size", "32"]
    with open(log, "w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,  # so that its engine and workers, which outlive a killed server, can be killed too
        )

    def wait() -> None:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)

    try:
        yield f"http://127.0.0.1:{port}/v1", server, wait
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


class Pair:
    """Both engines and, beside them, the transformers generator on the same models."""

    def __init__(self, slm: str, llm: str, router: str):
        from tokalign.routing.router.model import TokenRouter

        self.slm, self.llm, self.router = slm, llm, router
        self.tokenizer = tiny_tokenizer()
        self.models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (slm, llm)]
        self.policy = RouterPolicy(TokenRouter.from_pretrained(router), 2.0)
        scores = sorted(s for (c,) in self.expected(self.policy, GREEDY) for s in c.scores)
        # About 30 % routed, and no score so near the threshold that rounding could decide.
        for k in range(int(0.7 * len(scores)), len(scores)):
            self.policy.threshold = self.threshold = (scores[k - 1] + scores[k]) / 2
            met = [
                s for n in (1, 3) for (c,) in self.expected(self.policy, GREEDY, n) for s in c.scores if s is not None
            ]
            if min(abs(s - self.threshold) for s in met) > 1e-4:
                break

    def expected(self, policy, params, span=1):
        generator = RoutedGenerator(*self.models, self.tokenizer, policy, llm_span=span)
        return generator.generate(PROMPTS, params)


async def collect(backend, params, sample=0, prompts=PROMPTS):
    async def one(prompt):
        return [token async for token in backend.generate(prompt, params, sample=sample)]

    return await asyncio.gather(*[one(prompt) for prompt in prompts])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    slm = save_model(folder / "slm", 8, seed=1)
    llm = save_model(folder / "llm", 16, seed=2, layers=3)
    pair = Pair(slm, llm, save_router(folder / "router", slm))
    config = pair.models[0].config
    route = choose_route_token(pair.tokenizer, config.vocab_size)
    # Started with another threshold than the backend's, which it must be told.
    overrides = routed_overrides(config, pair.router, route, threshold=2.0, shared_vocab=config.vocab_size)
    # The LLM has a probe, which changes nothing that it writes
    reserved = pair.models[1].config.vocab_size - 1
    probed = probe_overrides(pair.models[1].config, "tests.routing.probes:Weighed", reserved, arguments={"scale": 3.0})
    llm_options = ["--enable-prompt-tokens-details", *probe_server_options(probed)]
    with (
        serving(llm, folder / "llm.log", *llm_options) as (llm_url, llm_server, wait_llm),
        serving(slm, folder / "slm.log", *routed_server_options(overrides)) as (slm_url, _, wait_slm),
        asyncio.Runner() as runner,
    ):
        wait_llm()
        options = {"llm": llm, "threshold": pair.threshold, "dtype": "float32", "max_retries": 1}

        async def start():
            return VLLMBackend(slm, pair.router, [llm_url], **options)

        backend = runner.run(start())
        wait_slm()

        async def connect():
            return VLLMBackend(slm, pair.router, [llm_url], slm_url=slm_url, **options)

        served = runner.run(connect())
        yield pair, backend, served, llm_server, runner
        runner.run(served.close())
        runner.run(backend.close())


def check_equal(results, expected):
    for row, (tokens, (completion,)) in enumerate(zip(results, expected, strict=True)):
        assert [t.id for t in tokens] == completion.token_ids, row
        assert [t.by_llm for t in tokens] == completion.written_by, row
        assert tokens[-1].finish_reason == completion.finish_reason, row
        assert all(t.finish_reason is None for t in tokens[:-1]), row
        # Each engine leaves other ids that nobody writes out of the sum, and these models give those logits of 0.
        assert [t.logprob for t in tokens] == pytest.approx(completion.logprobs, abs=2e-2), row


@pytest.mark.slow
def test_routed_decoding_on_vllm(world):
    pair, backend, served, llm_server, runner = world
    run = runner.run
    expected = pair.expected(pair.policy, GREEDY)
    rate = sum(sum(c.written_by) for (c,) in expected) / sum(len(c.token_ids) for (c,) in expected)
    assert 0.1 < rate < 0.6, rate  # both models write

    # Greedy: the same ids by the same writers, by sessions, by new requests, and with the SLM behind a server.
    assert backend.slm.sessions
    check_equal(run(collect(backend, GREEDY)), expected)
    for name in ("slm_tokens", "llm_tokens", "handoffs", "slm_positions"):
        assert getattr(backend.stats, name) == sum(getattr(c.stats, name) for (c,) in expected), name
    assert backend.stats.llm_positions >= sum(c.stats.llm_positions for (c,) in expected)
    backend.slm.sessions = False
    check_equal(run(collect(backend, GREEDY)), expected)
    backend.slm.sessions = True
    check_equal(run(collect(served, GREEDY)), expected)

    # Longer spans, stop strings and stop ids.
    backend.llm_span = 3
    check_equal(run(collect(backend, GREEDY)), pair.expected(pair.policy, GREEDY, span=3))
    backend.llm_span = 1
    stop = pair.tokenizer.decode(expected[0][0].token_ids[4:6])
    ids = (expected[1][0].token_ids[3], expected[2][0].token_ids[7])
    stopping = SamplingParams(temperature=0, max_tokens=24, stop=(stop,), stop_token_ids=ids)
    stopped = pair.expected(pair.policy, stopping)
    assert len(stopped[0][0].token_ids) <= 6 and stopped[0][0].finish_reason == "stop"
    check_equal(run(collect(backend, stopping)), stopped)
    check_equal(run(collect(served, stopping)), stopped)

    # The threshold moves by a call into the workers; its ends are the two models alone.
    for one in (backend, served):
        run(one.set_threshold(1.5))
        check_equal(run(collect(one, GREEDY)), pair.expected(NeverLLM(), GREEDY))
        run(one.set_threshold(0.0))
        before = one.stats.slm_positions
        check_equal(run(collect(one, GREEDY)), pair.expected(AlwaysLLM(), GREEDY))
        assert one.stats.slm_positions == before
        run(one.set_threshold(pair.threshold))
    check_equal(run(collect(backend, GREEDY)), expected)

    # A seed fixes a sampled completion whatever runs beside it; samples differ.
    for one in (backend, served):
        params = SamplingParams(n=3, seed=11, temperature=0.8, top_p=0.9, max_tokens=20)
        draws = [run(collect(one, params, sample=k)) for k in range(3)]
        assert len({tuple(t.id for t in draw[2]) for draw in draws}) == 3
        alone = run(collect(one, params, sample=1, prompts=PROMPTS[2:3]))
        assert [t.id for t in alone[0]] == [t.id for t in draws[1][2]]
        assert {t.by_llm for draw in draws for tokens in draw for t in tokens} == {True, False}

    # Closing an iterator frees the request's place.
    async def cancel():
        async with aclosing(backend.generate(PROMPTS[0], GREEDY)) as tokens:
            async for token in tokens:
                assert token.finish_reason is None
                break
        await asyncio.sleep(0)
        return backend.slm.engine.get_num_unfinished_requests()

    assert run(cancel()) == 0

    # A probe's numbers come back for every token: those of transformers' hidden states and logits.
    reserved = pair.models[1].config.vocab_size - 1
    with openai.OpenAI(base_url=backend.llm.urls[0], api_key="none") as client:
        answer = client.completions.create(
            model="served", prompt=PROMPTS[0], max_tokens=20, temperature=1.5, seed=3,
            extra_body=probe_fields(reserved) | {"return_token_ids": True},
        )  # fmt: skip
    (choice,) = answer.choices
    text = torch.tensor([PROMPTS[0] + choice.token_ids[:-1]])
    with torch.no_grad():
        passed = pair.models[1](text, output_hidden_states=True)
        wanted = Weighed(3.0)(passed.hidden_states[-1], passed.logits)[0, len(PROMPTS[0]) - 1 :]
    assert len(choice.token_ids) == len(wanted) > 5 and wanted.std() > 0.1
    assert read_probe(choice, reserved) == pytest.approx(wanted.tolist(), abs=1e-3)

    # Where the SLM has no word, the LLM writes. Nothing that counts is asked of this SLM afterwards: vLLM 0.30 on the
    # CPU gives such numbers to whoever gets the blocks of the cache that held them.
    (lost,) = run(collect(served, GREEDY, prompts=[UNREADABLE]))
    assert all(token.by_llm for token in lost) and lost[-1].finish_reason and not served.degraded

    # The LLM's server dies mid-stream: with "slm" every completion goes on without it, with "error" it ends.
    async def kill():
        served.on_llm_outage = "error"
        tasks = [asyncio.create_task(collect(one, LONG)) for one in (backend, served)]
        while not backend.stats.llm_tokens > tokens_before or not served.stats.llm_tokens > served_before:
            await asyncio.sleep(0.001)
        assert not any(task.done() for task in tasks)
        os.killpg(llm_server.pid, signal.SIGKILL)
        llm_server.wait()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert run(backend.llm_healthy()) and not backend.degraded
    tokens_before, served_before = backend.stats.llm_tokens, served.stats.llm_tokens
    survived, ended = run(kill())
    assert backend.degraded and not run(backend.llm_healthy())
    assert all(tokens[-1].finish_reason for tokens in survived)
    assert isinstance(ended, LLMUnavailable) and "check that its servers run" in str(ended)
    check_equal(run(collect(backend, GREEDY)), pair.expected(NeverLLM(), GREEDY))

    # Without the LLM there is nobody to write where the SLM has no word.
    with pytest.raises(RowFailed, match="The SLM gave logits that are not finite numbers"):
        run(collect(backend, GREEDY, prompts=[UNREADABLE]))
