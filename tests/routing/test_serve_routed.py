"""`tokalign serve` on a tiny pair: the text of the generator, its refusals, and a real SIGTERM."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import get_type_hints

import httpx
import openai
import pytest
import torch
from trl import TrlParser

from tests.routing.serving import serving, wait_for
from tests.support import save_tiny, tiny_model, tiny_tokenizer
from tokalign.cli import serve
from tokalign.generation.protocol import SamplingParams
from tokalign.routing.decode.generator import RoutedGenerator
from tokalign.routing.decode.schedule import RoutedBatch
from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
from tokalign.routing.serve import start
from tokalign.routing.serve.start import load_backend, server_settings
from tokalign.stage.hashes import weights_hash


def arguments(**options):
    """The groups of arguments of `tokalign serve`, by its parser."""
    words = [word for name, value in options.items() for word in (f"--{name}", *_words(value))]
    return TrlParser(list(get_type_hints(serve.main).values())[:-1]).parse_args_and_config(words)


def _words(value):
    return map(str, value if isinstance(value, list) else [value])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Paths of an SLM, an LLM and a router whose threshold splits the tokens."""
    folder = tmp_path_factory.mktemp("pair")
    slm = save_tiny(folder / "slm", seed=0)
    llm = save_tiny(folder / "llm", seed=1, hidden_size=48, layers=3)
    torch.manual_seed(0)
    config = TokenRouterConfig(
        hidden_size=32, shared_vocab=len(tiny_tokenizer()), top_k=10, width=16, num_blocks=1, threshold=0.5
    )
    config.slm = {"name": "slm", "weights_hash": weights_hash(slm), "tokenizer_hash": None}
    TokenRouter(config).save_pretrained(folder / "router")
    return {"slm": slm, "llm": llm, "router": str(folder / "router")}


@pytest.fixture(scope="module")
def server(pair):
    own, engine, names, limits = arguments(**pair, dtype="float32", max_running=8, max_choices=8)
    settings = dataclasses.asdict(server_settings(own, engine, names, limits))
    backend = load_backend(own, engine, limits)
    with serving(backend, **settings) as server:
        server.backend = backend
        yield server


def test_the_server_writes_what_the_generator_writes(pair, server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
    generator = RoutedGenerator.from_pretrained(**pair, dtype="float32")
    tokenizer = generator.tokenizer
    prompts = [f"What is {i}+{i}?" for i in range(20)]
    params = [SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=12) for i in range(20)]
    expected = generator.generate([tokenizer(prompt)["input_ids"] for prompt in prompts], params)
    shares = [sum(one.written_by) / len(one.written_by) for (one,) in expected]
    assert 0 < sum(shares) < 20  # both models write

    def ask(i):
        each = {"prompt": prompts[i], "seed": i, "temperature": params[i].temperature, "max_tokens": 12}
        extra = {"return_token_ids": True, "routing_trace": True}
        answer = client.completions.create(model="slm+llm", logprobs=0, extra_body=extra, **each)
        chunks = list(client.completions.create(model="slm+llm", stream=True, **each))
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
        return answer

    with ThreadPoolExecutor(20) as pool:  # twenty at once
        answers = list(pool.map(ask, range(20)))
    for answer, (one,), share in zip(answers, expected, shares, strict=True):
        choice = answer.choices[0]
        assert choice.token_ids == one.token_ids and choice.finish_reason == one.finish_reason
        assert choice.text == tokenizer.decode(one.token_ids, skip_special_tokens=True)
        assert choice.routing["written_by"] == ["llm" if by_llm else "slm" for by_llm in one.written_by]
        assert choice.logprobs.token_logprobs == pytest.approx(one.logprobs, abs=1e-3)
        assert answer.routing["llm_rate"] == pytest.approx(share)


def test_a_client_that_leaves_frees_the_rows_of_both_models(server, monkeypatch):
    backend = server.backend
    step = RoutedBatch.step
    monkeypatch.setattr(RoutedBatch, "step", lambda batch: (time.sleep(0.02), step(batch))[1])  # 10 s for all tokens
    backend.generator.end_ids = [set(), set()]  # tiny random models would end by themselves
    body = {"prompt": "a", "max_tokens": 500, "stream": True, "n": 4}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as answer,
    ):
        next(answer.iter_lines())
        wait_for(lambda: len(backend._in_flight) == 4)
    wait_for(lambda: not backend._in_flight and not backend._batch)
    assert backend.stats.tokens < 4 * 500


def test_names_keys_and_limits_come_from_the_arguments(pair, monkeypatch):
    monkeypatch.setenv("PAIR_KEY", "s3cret")
    settings = server_settings(*arguments(**pair, api_key_env="PAIR_KEY", max_tokens=7, max_queue=100))
    assert (settings.model, settings.api_key, settings.max_tokens) == ("slm+llm", "s3cret", 7)
    assert not settings.llm_required
    names = {"slm": "Qwen/Qwen3-0.6B", "llm": "Qwen/Qwen3-8B", "router": "r"}
    hub = server_settings(*arguments(**names, engine="vllm", on_llm_outage="error"))
    assert hub.model == "Qwen3-0.6B+Qwen3-8B" and hub.llm_required and hub.api_key is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_rate": 1.5}, r"^target_rate is 1.5"),
        ({"target_rate": 0.1, "threshold": 2.0}, r"^The threshold is 2.0: a budget can only steer one between"),
        ({"max_tokens": 0}, r"^max_tokens is 0"),
        ({"llm_urls": ["http://localhost:1/v1"]}, r"^--llm_urls belongs to --engine vllm"),
        ({"engine": "vllm"}, r"^llm_urls is empty"),
        ({"llm_timeout": 5.0}, r"^--llm_timeout belongs to --engine vllm"),
        ({"on_llm_outage": "error"}, r"^--on_llm_outage belongs to --engine vllm"),
        ({"engine": "vllm", "llm_wait": "3"}, r"^--llm_wait belongs to --engine transformers"),
        ({"engine": "vllm", "token_budget": 4096}, r"^--token_budget belongs to --engine transformers"),
        ({"engine": "vllm", "verify": True}, r"^--verify needs --engine transformers"),
        ({"engine": "vllm", "score": "drawn"}, r"^--score drawn needs --engine transformers"),
        ({"verify": True, "llm_span": 4}, r"^llm_span is 4: with verify the LLM writes 1 token"),
        ({"engine": "vllm", "llm_urls": ["http://127.0.0.1:9/v1"]}, r"127.0.0.1:9"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(pair, change, message):
    with pytest.raises((SystemExit, ValueError), match=message) as stopped:
        serve.main(*arguments(**pair, **change))
    assert "\n" not in str(stopped.value)


def test_pairs_that_cannot_be_served(pair, tmp_path):
    other = save_tiny(tmp_path / "other", seed=2)
    tiny_tokenizer("abc").save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"^The SLM's tokenizer .* is not the LLM's"):
        serve.main(*arguments(**pair | {"llm": other}))
    with pytest.raises(SystemExit, match="The router was trained on another SLM"):
        serve.main(*arguments(**pair | {"slm": save_tiny(tmp_path / "third", seed=3)}))
    router = TokenRouter.from_pretrained(pair["router"])
    router.config.threshold = None
    router.save_pretrained(tmp_path / "uncalibrated")
    with pytest.raises(SystemExit, match=r"^The router has no threshold: calibrate it"):
        serve.main(*arguments(**pair | {"router": str(tmp_path / "uncalibrated")}))
    with pytest.raises(SystemExit, match=r"^Serving needs --router"):
        serve.main(*arguments(slm=pair["slm"], llm=pair["llm"]))


@pytest.mark.slow
def test_the_command_serves_until_sigterm(pair, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {**pair, "port": port, "host": "0.0.0.0", "target_rate": 0.3, "dtype": "float32"}
    command = [sys.executable, "-m", "tokalign", "serve"]
    command += [part for name in options for part in (f"--{name}", str(options[name]))]
    log = tmp_path / "log"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"

        def up():
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{url}/health").status_code == 200
            except httpx.TransportError:
                time.sleep(0.1)
                return False

        wait_for(up, seconds=60)
        body = {"messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] <= 4
        assert "tokalign_routing_budget_target_rate 0.3" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
    assert "Serving on 0.0.0.0 without an API key" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_default_chats_of_a_long_context_run_side_by_side(tmp_path):
    """Each may fill 40,960 positions. A server that kept them free for it would answer one chat after the other."""
    paths = {}
    for seed, name in enumerate(("slm", "llm")):
        model, paths[name] = tiny_model(len(tiny_tokenizer()), seed=seed), str(tmp_path / name)
        model.config.max_position_embeddings = 40960
        with torch.no_grad():
            model.lm_head.weight[1] = 0  # hardly ends by itself
        model.save_pretrained(paths[name])
        tiny_tokenizer().save_pretrained(paths[name])
    torch.manual_seed(0)
    config = TokenRouterConfig(
        hidden_size=32, shared_vocab=len(tiny_tokenizer()), top_k=10, width=16, num_blocks=1, threshold=0.5
    )
    config.slm = {"name": "slm", "weights_hash": weights_hash(paths["slm"]), "tokenizer_hash": None}
    TokenRouter(config).save_pretrained(tmp_path / "router")
    own, engine, names, limits = arguments(**paths, router=str(tmp_path / "router"), dtype="float32")
    settings = dataclasses.asdict(server_settings(own, engine, names, limits))
    with serving(load_backend(own, engine, limits), **settings) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
        ask = {"model": settings["model"], "messages": [{"role": "user", "content": "Hello"}]}
        chats = [client.chat.completions.create(**ask, seed=seed, stream=True) for seed in range(12)]
        # An answer's head comes with its first token, so all twelve have one.
        short = client.completions.create(model=settings["model"], prompt="abc", max_tokens=5)
        assert short.usage.completion_tokens <= 5
        running = httpx.get(f"{server.url}/health").json()["running"]
        for chat in chats:
            chat.close()
        wait_for(lambda: httpx.get(f"{server.url}/health").json()["running"] == 0)
    assert running >= 10  # a few may have ended


def test_a_backend_that_has_died_is_a_failed_command(pair, monkeypatch):
    async def dies(*groups):
        raise start.BackendDied("The backend has died (RuntimeError: no device): start the server again.")

    monkeypatch.setattr(start, "serve", dies)
    with pytest.raises(SystemExit, match="The backend has died") as stopped:  # a sentence is exit status 1
        serve.main(*arguments(**pair))
    assert isinstance(stopped.value.code, str)
