"""The three engines side by side in fp32: vLLM in this process, vLLM's own API server, and transformers."""

import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support import save_tiny
from tokalign.generation import EngineArguments, SamplingParams, continue_from_prefixes, load_engine

vllm = pytest.importorskip("vllm")
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(6, 60) for _ in range(DRAW.randrange(1, 30))] for _ in range(12)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Name -> (engine, how it calls the adapter)."""
    folder = tmp_path_factory.mktemp("engines")
    base = save_tiny(folder / "base", hidden_size=128)  # vLLM's CPU kernels want heads of 32
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapter = str(folder / "adapter")
    model.save_pretrained(adapter)

    port, log = free_port(), folder / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--served-model-name", "policy", "--enable-lora",
        "--lora-modules", f"tuned={adapter}",
    ]  # fmt: skip
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--gpu-memory-utilization", "0.3", "--no-enable-chunked-prefill"]
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        inside = load_engine(EngineArguments(base, engine="vllm", dtype="float32"))
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/v1"
        yield {
            "transformers": (load_engine(EngineArguments(base, dtype="float32")), adapter),
            "vllm": (inside, adapter),
            "openai": (
                load_engine(EngineArguments(base, engine="openai", base_urls=[url], served_model="policy")),
                "tuned",
            ),
        }
        inside.close()
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def check_equal(engines, params, *, with_adapter=False):
    expected = None
    for name, (engine, adapter) in engines.items():
        results = engine.generate(PROMPTS, params, adapter=adapter if with_adapter else None)
        if expected is None:
            expected = results
            continue
        for row, (a, b) in enumerate(zip(expected, results, strict=True)):
            assert [c.token_ids for c in a] == [c.token_ids for c in b], (name, row)
            assert [c.finish_reason for c in a] == [c.finish_reason for c in b], (name, row)
            for x, y in zip(a, b, strict=True):
                assert x.logprobs == pytest.approx(y.logprobs, abs=5e-4), (name, row)
    return expected


@pytest.mark.slow
def test_engines_agree(engines):
    greedy = check_equal(engines, SamplingParams(n=2, temperature=0, max_tokens=20))
    tuned = check_equal(engines, SamplingParams(temperature=0, max_tokens=20), with_adapter=True)
    assert [c[0].token_ids for c in greedy] != [c[0].token_ids for c in tuned]

    banned = tuple({c[0].token_ids[0] for c in greedy})  # each prompt's own first choice is among them
    always = check_equal(engines, SamplingParams(temperature=0, max_tokens=20, banned_token_ids=banned))
    assert not {i for (c,) in always for i in c.token_ids} & set(banned)
    check_equal(engines, SamplingParams(temperature=0, max_tokens=20, banned_token_ids=banned, banned_steps=1))

    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    penalized = check_equal(engines, SamplingParams(temperature=0, max_tokens=20, **penalties))
    assert [c[0].token_ids for c in greedy] != [c[0].token_ids for c in penalized]
    for option in ({"top_k": 1}, {"min_p": 1.0}):  # nothing else is left to be drawn
        narrow = check_equal(engines, SamplingParams(seed=5, max_tokens=20, **option))
        assert [c[0].token_ids for c in narrow] == [c[0].token_ids for c in greedy]

    tokenizer = engines["transformers"][0].tokenizer
    stop = tokenizer.decode(greedy[0][0].token_ids[3:5])
    stopped = check_equal(engines, SamplingParams(temperature=0, max_tokens=20, stop=(stop,)))
    assert stopped[0][0].finish_reason == "stop" and len(stopped[0][0].token_ids) <= 5
    check_equal(engines, SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(greedy[1][0].token_ids[4],)))

    # Under a schema, one a request; log-probs are the model's own in the transformers engine alone.
    number, word = '{"type": "integer", "minimum": 10, "maximum": 500}', '{"enum": ["yes", "no"]}'
    bound = [SamplingParams(temperature=0, max_tokens=9, json_schema=(number, word, None)[i % 3]) for i in range(12)]
    written = [[c.token_ids for (c,) in engine.generate(PROMPTS, bound)] for engine, _ in engines.values()]
    assert written[0] == written[1] == written[2]
    assert tokenizer.decode(written[0][1], skip_special_tokens=True) in ('"yes"', '"no"')

    # Sampled ids differ between engines, but in each the seed fixes a request whatever it is batched with.
    params = SamplingParams(n=4, seed=11, max_tokens=10)
    for name, (engine, _) in engines.items():
        batch = [[c.token_ids for c in r] for r in engine.generate(PROMPTS, params)]
        assert len({tuple(ids) for ids in batch[2]}) == 4, name
        assert [c.token_ids for c in engine.generate(PROMPTS[2:3], params)[0]] == batch[2], name

    # More prompt tokens than one step takes: vLLM's CPU backend dies of a split prefill with a seed.
    long = [[DRAW.randrange(6, 60) for _ in range(400)] for _ in range(40)]
    for name, (engine, _) in engines.items():
        results = engine.generate(long, SamplingParams(seed=1, max_tokens=2))
        assert all(len(completion.token_ids) <= 2 for (completion,) in results), name

    # vLLM has no shared-prefix method of its own; its prefix cache must not change results.
    completion = greedy[3][0].token_ids
    lengths = list(range(0, len(completion), 4))
    continued = [
        [
            c.token_ids
            for (c,) in continue_from_prefixes(
                e, PROMPTS[3], completion, lengths, SamplingParams(temperature=0, max_tokens=8)
            )
        ]
        for e, _ in engines.values()
    ]
    assert continued[0] == continued[1] == continued[2]

    for name in ("vllm", "transformers"):
        with pytest.raises(ValueError, match="no adapter at"):
            engines[name][0].generate(PROMPTS, params, adapter="/nowhere/adapter")
    with pytest.raises(ValueError, match="was refused by"):
        engines["openai"][0].generate(PROMPTS[:1], params, adapter="unknown")
