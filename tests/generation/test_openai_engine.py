"""The OpenAI engine against a small HTTP server that fails in the ways servers fail."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tokalign.generation import EngineArguments, SamplingParams, load_engine, openai_engine

PROMPTS = [[7], [8, 9], [10, 11, 12], [13]]


def good(body: dict) -> dict:
    """Each choice writes the prompt's ids back, one higher, and the end token."""
    choices = []
    for k in range(body["n"]):
        ids = [token + 1 for token in body["prompt"]] + [1]
        logprobs = {"token_logprobs": [-0.5 - k] * len(ids), "tokens": [], "top_logprobs": [], "text_offset": []}
        choices.append({"index": k, "text": "", "finish_reason": "stop", "token_ids": ids, "logprobs": logprobs})
    choices.reverse()  # order is given by index alone
    return {"id": "1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}


@contextmanager
def serving(behave):
    """A server on a free port; `behave(attempt, body)` gives (status, payload) for the attempt at that prompt."""
    attempts, bodies, lock = Counter(), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body)
                attempts[tuple(body["prompt"])] += 1
                attempt = attempts[tuple(body["prompt"])]
            status, payload = behave(attempt, body)
            data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            # Half an answer: promise more than is sent, then hang up.
            self.send_header("Content-Length", str(len(data) * (2 if status == 299 else 1)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.bodies, server.attempts = bodies, attempts
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(openai_engine, "FIRST_PAUSE", 0.001)


def engine_at(tiny_path, *urls, **options):
    return load_engine(
        EngineArguments(tiny_path, engine="openai", base_urls=list(urls), **{"timeout": 10.0, **options})
    )


def check_answers(results, n=2):
    for prompt, completions in zip(PROMPTS, results, strict=True):
        assert [c.token_ids for c in completions] == [[token + 1 for token in prompt] + [1]] * n
        assert [c.logprobs[0] for c in completions] == [-0.5 - k for k in range(n)]
        assert all(c.finish_reason == "stop" for c in completions)


def test_what_is_sent_and_what_comes_back(tiny_path):
    with serving(lambda attempt, body: (200, good(body))) as server:
        engine = engine_at(tiny_path, server.url, served_model="policy")
        params = SamplingParams(
            n=2, seed=5, top_p=0.9, max_tokens=7, stop=("\n",), stop_token_ids=(3,), banned_token_ids=(50,)
        )
        check_answers(engine.generate(PROMPTS, params))
        engine.generate(PROMPTS[:1], SamplingParams(temperature=0, n=3), adapter="lora-7")
        engine.close()
    body = next(body for body in server.bodies if body["prompt"] == [8, 9])
    expected = {"model": "policy", "n": 2, "seed": 5, "temperature": 1.0, "top_p": 0.9, "max_tokens": 7}
    expected |= {"stop": ["\n"], "stop_token_ids": [3], "logit_bias": {"50": -100}}
    expected |= {"return_token_ids": True, "skip_special_tokens": False}
    # What a request leaves out, the server takes from the model's generation_config.json.
    expected |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: body[name] for name in expected} == expected
    assert (server.bodies[-1]["model"], server.bodies[-1]["n"]) == ("lora-7", 1)  # greedy is asked for once


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": {"message": "out of memory"}}),
        (429, {"error": {"message": "slow down"}}),
        (299, b'{"id": "1", "choices": ['),
        (200, b'{"id": "1", "choices": ['),
        (200, b"<html>gateway</html>"),
        (200, {"id": "1", "choices": []}),
    ],
    ids=["500", "429", "hangs up half way", "malformed JSON", "not JSON", "no choices"],
)
def test_passing_failures_are_repeated(tiny_path, failure):
    with serving(lambda attempt, body: failure if attempt <= 2 else (200, good(body))) as server:
        check_answers(engine_at(tiny_path, server.url).generate(PROMPTS, SamplingParams(n=2)))
    assert set(server.attempts.values()) == {3}


def test_servers_take_turns_and_stand_in_for_a_dead_one(tiny_path):
    with serving(lambda a, body: (200, good(body))) as one, serving(lambda a, body: (200, good(body))) as two:
        check_answers(engine_at(tiny_path, one.url, two.url).generate(PROMPTS, SamplingParams(n=2)))
        assert (len(one.bodies), len(two.bodies)) == (2, 2)
        with serving(lambda a, body: (200, good(body))) as dead:
            address = dead.url
        check_answers(engine_at(tiny_path, one.url, address).generate(PROMPTS, SamplingParams(n=2)))


def test_a_lasting_failure_names_the_row_and_the_servers(tiny_path):
    broken = tuple(PROMPTS[2])

    def behave(attempt, body):
        return (503, {"error": {"message": "loading"}}) if tuple(body["prompt"]) == broken else (200, good(body))

    with serving(behave) as one, serving(behave) as two:
        engine = engine_at(tiny_path, one.url, two.url, max_retries=3)
        with pytest.raises(ConnectionError, match=r"^Prompt 2 got no answer in 4 attempts") as error:
            engine.generate(PROMPTS, SamplingParams())
        assert one.url in str(error.value) and two.url in str(error.value) and "loading" in str(error.value)
        assert "\n" not in str(error.value)
        assert one.attempts[broken] + two.attempts[broken] == 4


def test_refusals_are_not_repeated(tiny_path):
    with serving(lambda a, body: (404, {"error": {"message": "no model named x"}})) as server:
        with pytest.raises(ValueError, match=r"^Prompt 0 was refused by .*no model named x"):
            engine_at(tiny_path, server.url).generate(PROMPTS[:1], SamplingParams())
        assert len(server.bodies) == 1


def test_a_server_without_token_ids_is_refused(tiny_path):
    def behave(attempt, body):
        answer = good(body)
        for choice in answer["choices"]:
            del choice["token_ids"]
        return 200, answer

    with serving(behave) as server, pytest.raises(ValueError, match="answered prompt 0 without token ids"):
        engine_at(tiny_path, server.url).generate(PROMPTS[:1], SamplingParams())


def test_a_banned_id_in_the_answer_is_refused(tiny_path):
    with (
        serving(lambda a, body: (200, good(body))) as server,
        pytest.raises(ValueError, match="sampled the banned token id 8"),
    ):
        engine_at(tiny_path, server.url).generate(PROMPTS[:1], SamplingParams(banned_token_ids=(8,)))


def test_a_probability_above_one_is_no_answer(tiny_path):
    """A log-prob that rounding has lifted over 0 is 0; one far above it comes from something else than a model."""

    def answer(attempt, body, value):
        payload = good(body)
        payload["choices"][0]["logprobs"]["token_logprobs"][0] = value
        return 200, payload

    with serving(lambda attempt, body: answer(attempt, body, 1e-7)) as server:
        assert engine_at(tiny_path, server.url).generate([[7]], SamplingParams())[0][0].logprobs[0] == 0
    message = r"holds the log-prob 0.7, and a probability is at most 1"
    with serving(lambda *request: answer(*request, 0.7)) as server, pytest.raises(ConnectionError, match=message):
        engine_at(tiny_path, server.url, max_retries=1).generate([[7]], SamplingParams())


def test_no_more_requests_in_flight_than_allowed(tiny_path):
    now, most, lock = [0], [0], threading.Lock()
    gate = threading.Barrier(3)

    def behave(attempt, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        gate.wait(timeout=10)  # opens only if three requests are in flight together
        with lock:
            now[0] -= 1
        return 200, good(body)

    with serving(behave) as server:
        engine_at(tiny_path, server.url, concurrency=3).generate([[7 + i] for i in range(12)], SamplingParams())
    assert most[0] == 3


def test_missing_urls(tiny_path):
    with pytest.raises(ValueError, match="needs base_urls"):
        engine_at(tiny_path)
