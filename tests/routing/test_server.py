"""The routed server as OpenAI's client sees it, and as a badly behaved one does."""

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.routing.serving import FakeBackend, serving, wait_for
from tests.routing.test_detokenize import byte_level
from tests.support import tiny_tokenizer
from tokalign.generation import EngineArguments, SamplingParams, load_engine
from tokalign.routing.decode.backend import RoutedToken, RowFailed
from tokalign.routing.serve.api import MOST_STOP_CHARACTERS, MOST_STOP_IDS, MOST_STOPS
from tokalign.routing.serve.budget import BudgetController
from tokalign.routing.serve.server import BackendDied, GracefulServer, ServerSettings, create_app, exposure_warning

HELLO = [{"role": "user", "content": "Hello"}]


def client_of(server, key="none", **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=20, **{"max_retries": 0, **options})


def post(server, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=20, **options)


def metrics_of(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def pair():
    """A server that most tests share, with its backend."""
    backend = FakeBackend()
    with serving(backend) as server:
        server.backend = backend
        yield server


def text_of(seed, sample=0, prompt="abc", length=12):
    backend = FakeBackend()
    ids = backend.tokenizer(prompt)["input_ids"]
    params = SamplingParams(seed=seed)
    return backend.tokenizer.decode([backend._next(ids, params, sample, step) for step in range(length)])


# ------------------------------------------------------------------------------------------------ what is answered


def test_completion(pair):
    raw = client_of(pair).completions.with_raw_response.create(model="pair", prompt="abc", max_tokens=12, seed=5)
    answer = raw.parse()
    assert raw.headers["x-routing-llm-rate"] == "0.2500" and "x-routing-degraded" not in raw.headers
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "pair", "cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, text_of(5), "length")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 12, 15)
    assert answer.routing == {"llm_rate": 0.25, "degraded": False}


def test_chat_uses_the_chat_template(pair):
    answer = client_of(pair).chat.completions.create(model="pair", messages=HELLO, max_completion_tokens=8, seed=1)
    prompt, params, _ = pair.backend.calls[-1]
    expected = pair.backend.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=True)
    assert prompt == expected["input_ids"]
    assert (params.max_tokens, params.temperature, params.top_p) == (8, 1.0, 1.0)
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert len(answer.choices[0].message.content) == 8
    # The answer's message can be sent back, and parts of text are one text.
    more = [
        *HELLO,
        answer.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ]
    client_of(pair).chat.completions.create(model="pair", messages=more, max_tokens=4)
    decoded = pair.backend.tokenizer.decode(pair.backend.calls[-1][0])
    assert decoded.endswith(f"<|assistant|>{answer.choices[0].message.content}<|end|><|user|>x<|end|><|assistant|>")


def test_a_chat_without_max_tokens_may_fill_the_context_and_a_completion_gets_16(pair):
    answer = client_of(pair).chat.completions.create(model="pair", messages=HELLO)
    assert answer.usage.total_tokens == pair.backend.max_length
    assert client_of(pair).completions.create(model="pair", prompt="a").usage.completion_tokens == 16


def test_n_seeds_and_several_prompts(pair):
    client = client_of(pair)
    ask = {"model": "pair", "prompt": ["abc", "xy"], "max_tokens": 12, "n": 3, "temperature": 0.7, "top_p": 0.5}
    answer = client.completions.create(**ask, seed=7)
    assert [c.index for c in answer.choices] == list(range(6))
    assert [c.text for c in answer.choices] == [text_of(7, k, p) for p in ("abc", "xy") for k in range(3)]
    assert [c.text for c in client.completions.create(**ask, seed=7).choices] == [c.text for c in answer.choices]
    assert [c.text for c in client.completions.create(**ask, seed=8).choices] != [c.text for c in answer.choices]
    assert client.completions.create(**ask).choices[0].text != client.completions.create(**ask).choices[0].text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 72)
    params = pair.backend.calls[-1][1]
    assert (params.temperature, params.top_p, params.seed) == (0.7, 0.5, None)


def test_greedy_choices_are_written_once(pair):
    before = len(pair.backend.calls)
    answer = client_of(pair).completions.create(model="pair", prompt="abc", n=3, temperature=0, max_tokens=5)
    assert len(pair.backend.calls) == before + 1
    assert len({c.text for c in answer.choices}) == 1 and len(answer.choices) == 3
    assert answer.usage.completion_tokens == 15


def test_prompts_as_ids_are_not_encoded_again(pair):
    answer = client_of(pair).completions.create(
        model="pair", prompt=[[7, 8], [9]], max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert [call[0] for call in pair.backend.calls[-2:]] == [[7, 8], [9]]
    assert [c.prompt_token_ids for c in answer.choices] == [[7, 8], [9]]
    assert all(len(c.token_ids) == 3 for c in answer.choices)
    client_of(pair).completions.create(model="pair", prompt=[7, 8], max_tokens=1)
    assert pair.backend.calls[-1][0] == [7, 8]


def test_stop_strings_are_cut(pair):
    full = text_of(5)
    stop = full[5:7]
    answer = client_of(pair).completions.create(
        model="pair", prompt="abc", max_tokens=12, seed=5, stop=stop, extra_body={"return_token_ids": True}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (full[: full.index(stop)], "stop")
    assert len(answer.choices[0].token_ids) == full.index(stop) + 2  # the ids are what was written
    several = client_of(pair).completions.create(model="pair", prompt="abc", max_tokens=12, seed=5, stop=["##", stop])
    assert several.choices[0].text == answer.choices[0].text
    by_id = client_of(pair).completions.create(
        model="pair",
        prompt="abc",
        max_tokens=12,
        seed=5,
        extra_body={"stop_token_ids": answer.choices[0].token_ids[-1:]},
    )
    assert by_id.choices[0].finish_reason == "stop" and by_id.choices[0].text == full[: full.index(stop[1]) + 1]


def test_trace_and_logprobs(pair):
    answer = client_of(pair).completions.create(
        model="pair", prompt="abc", max_tokens=8, seed=5, logprobs=0, extra_body={"routing_trace": True}
    )
    choice = answer.choices[0]
    assert choice.routing == {"written_by": ["slm", "slm", "slm", "llm"] * 2, "scores": [0.25, 0.25, 0.25, 0.75] * 2}
    assert choice.logprobs.token_logprobs == [-0.5] * 8
    assert "".join(choice.logprobs.tokens) == choice.text and choice.logprobs.text_offset == list(range(8))
    chat = client_of(pair).chat.completions.create(
        model="pair", messages=HELLO, max_tokens=8, logprobs=True, extra_body={"return_token_ids": True}
    )
    content = chat.choices[0].logprobs.content
    assert "".join(token.token for token in content) == chat.choices[0].message.content
    assert bytes(content[0].bytes).decode() == content[0].token and content[0].logprob == -0.5
    assert len(chat.prompt_token_ids) == chat.usage.prompt_tokens


# -------------------------------------------------------------------------------------------------------- streams


def test_streams_join_to_what_is_answered_whole(pair):
    client = client_of(pair)
    ask = {"model": "pair", "prompt": ["abc", "xy"], "max_tokens": 12, "n": 2, "seed": 3, "stop": [text_of(3)[7:9]]}
    whole = client.completions.create(**ask)
    texts, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices] and reasons == [c.finish_reason for c in whole.choices]
    assert "stop" in reasons and usage == whole.usage


def test_chat_stream(pair):
    client = client_of(pair)
    ask = {"model": "pair", "messages": HELLO, "max_tokens": 9, "seed": 2, "logprobs": True}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, extra_body={"routing_trace": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].routing["written_by"] for chunk in chunks] == [["slm"], ["slm"], ["slm"], ["llm"]] * 2 + [
        ["slm"]
    ]
    logprobs = [token for chunk in chunks for token in chunk.choices[0].logprobs.content]
    assert logprobs == whole.choices[0].logprobs.content
    assert chunks[-1].routing == {"llm_rate": pytest.approx(2 / 9), "degraded": False}


def test_the_wire_format_of_a_stream(pair):
    answer = post(pair, "/v1/completions", {"prompt": "abc", "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and len(events) == 4
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["finish_reason"] is None


def test_no_half_characters_and_no_beginnings_of_stop_strings_on_the_wire():
    tokenizer = byte_level()
    text = "naïve 你好 🚀 fin"
    backend = FakeBackend(tokenizer, script=tokenizer(text + "ale")["input_ids"])
    with serving(backend) as server:
        client = client_of(server)
        parts = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="pair", prompt="the", max_tokens=99, stop="finale", stream=True
            )
        ]
    assert "".join(parts) == "naïve 你好 🚀 " and "\ufffd" not in "".join(parts)
    assert all("f" not in part for part in parts)


def test_our_own_engine_can_evaluate_the_pair_through_the_server(pair, tiny_path):
    arguments = EngineArguments(tiny_path, engine="openai", base_urls=[f"{pair.url}/v1"], served_model="pair")
    engine = load_engine(arguments)
    prompt = engine.tokenizer("abc")["input_ids"]
    params = SamplingParams(n=2, seed=5, max_tokens=12, stop=("##",), stop_token_ids=(3,))
    completions = engine.generate([prompt], params)[0]
    engine.close()
    assert [engine.tokenizer.decode(c.token_ids) for c in completions] == [text_of(5, 0), text_of(5, 1)]
    assert completions[0].logprobs == [-0.5] * 12 and completions[0].finish_reason == "length"


# ----------------------------------------------------------------------------------------------------- bad requests

OK = {"prompt": "abc", "max_tokens": 4}
CHAT = {"messages": HELLO, "max_tokens": 4}
BAD = [
    (b"", "The body is not JSON"),
    (b"{", "The body is not JSON"),
    (b'{"prompt": "\xff"}', "The body is not JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "The body is not JSON"),
    (b"[" * 100_000, "The body is not JSON"),
    (b"[1]", "The body is not a JSON object"),
    ({}, "`prompt` is missing"),
    (OK | {"prompt": []}, "`prompt` must be a string, a list of token ids"),
    (OK | {"prompt": {"a": 1}}, "`prompt` must be a string"),
    (OK | {"prompt": ["a", 1]}, "`prompt` must be a string"),
    (OK | {"prompt": [True]}, "`prompt` must be a string"),
    (OK | {"prompt": ""}, "Prompt 0 is empty"),
    (OK | {"prompt": ["a", ""]}, "Prompt 1 is empty"),
    (OK | {"prompt": [[1], []]}, "Prompt 1 is empty"),
    (OK | {"prompt": [5, 10**6]}, "Prompt 0 has token id 1000000, but ids go from 0 to"),
    (OK | {"prompt": [-1]}, "Prompt 0 has token id -1"),
    (OK | {"prompt": [13]}, "brings bad luck"),  # the backend's own refusal
    (OK | {"prompt": "a" * 600}, "Prompt 0 has 600 tokens and `max_tokens` is 4, but the models hold 512"),
    (OK | {"max_tokens": 510}, "Prompt 0 has 3 tokens and `max_tokens` is 510"),
    (OK | {"max_tokens": 0}, "max_tokens is 0: allow at least 1"),
    (OK | {"max_tokens": "4"}, "`max_tokens` is not valid"),
    (OK | {"max_tokens": True}, "`max_tokens` is not valid"),
    (OK | {"n": 0}, "n is 0: ask for at least 1"),
    (OK | {"n": -(10**6)}, "n is -1000000"),
    (OK | {"n": 65}, "asks for 65 completions, but this server writes at most 64"),
    (OK | {"prompt": ["a"] * 65}, "asks for 65 completions"),
    (OK | {"temperature": -1}, "temperature is -1"),
    (OK | {"temperature": "hot"}, "`temperature` is not valid"),
    (OK | {"top_p": 0}, "top_p is 0"),
    (OK | {"top_p": 1.1}, "top_p is 1.1"),
    (OK | {"seed": 2**63}, "seed is 9223372036854775808"),
    (OK | {"stop": [""]}, "stop is"),
    (OK | {"stop": ["a"] * (MOST_STOPS + 1)}, f"`stop` has {MOST_STOPS + 1} strings: give at most {MOST_STOPS}"),
    (OK | {"stop": ["a", "b" * 257]}, "`stop` has a string of 257 characters: give at most 256 each"),
    (OK | {"stop": "b" * 100_000}, "`stop` has a string of 100000 characters"),
    (OK | {"stop": [1]}, "`stop` is not valid"),
    (OK | {"stop_token_ids": [5] * 65}, "`stop_token_ids` has 65 ids: give at most 64"),
    (OK | {"stop_token_ids": [10**6]}, "`stop_token_ids` has token id 1000000"),
    (OK | {"logprobs": 1}, "Only the written tokens' own log-probs are known"),
    (OK | {"stream": "yes"}, "`stream` is not valid"),
    (OK | {"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
    (OK | {"top_k": -2}, "top_k is -2: keep at least 1 token"),
    (OK | {"top_k": 1.5}, "`top_k` is not valid"),
    (OK | {"min_p": 1.5}, "min_p is 1.5"),
    (OK | {"repetition_penalty": 0}, "repetition_penalty is 0"),
    (OK | {"presence_penalty": 2.5}, "presence_penalty is 2.5"),
    (OK | {"frequency_penalty": -2.5}, "frequency_penalty is -2.5"),
    (OK | {"stream_options": 1}, "`stream_options` is not valid"),
    (OK | {"echo": True}, "`echo` is not supported by this server"),
    (OK | {"best_of": 4}, "`best_of` is not supported"),
    (OK | {"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
    (OK | {"suffix": "x"}, "`suffix` is not supported"),
    (OK | {"guided_json": {}}, "`guided_json` is not supported"),
    (OK | {"model": "other"}, "There is no model 'other' here: use 'pair'"),
]
BAD_CHATS = [
    ({}, "`messages` is missing"),
    (CHAT | {"messages": "Hello"}, "`messages` is not valid"),
    (CHAT | {"messages": ["Hello"]}, "`messages` is not valid"),
    (CHAT | {"messages": [{"role": "user"}]}, r"`messages.0.content` is missing"),
    (CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "Role 'tool' is not known here"),
    (
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        "Content of type 'image_url' is not supported",
    ),
    (
        CHAT | {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "`tool_calls` in a message is not supported",
    ),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "Content of type 'text' is not supported"),
    (CHAT | {"max_completion_tokens": 510}, "`max_tokens` is 510, but the models hold 512"),
    (CHAT | {"top_logprobs": 5, "logprobs": True}, "Only the written tokens' own log-probs"),
    (CHAT | {"tools": [{"type": "function"}]}, "`tools` is not supported"),
    (CHAT | {"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
    (CHAT | {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "cannot set `chat_template`"),
    (CHAT | {"chat_template_kwargs": {"x": [1]}}, "`chat_template_kwargs` is not valid"),
]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [("/v1/completions", *case) for case in BAD] + [("/v1/chat/completions", *case) for case in BAD_CHATS],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(pair, path, body, message, stream):
    if isinstance(body, dict):
        body = body if "stream" in body else body | {"stream": stream}
    answer = post(pair, path, body)
    assert answer.status_code == (404 if "There is no model" in message else 400)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    with pytest.raises(ValueError, match=message):
        raise ValueError(error["message"])
    assert "\n" not in error["message"] and len(error["message"]) < 400


def test_the_longest_stops_are_taken(pair):
    longest = {"stop": ["#" * MOST_STOP_CHARACTERS] * MOST_STOPS, "stop_token_ids": [3] * MOST_STOP_IDS}
    assert post(pair, "/v1/completions", OK | longest).status_code == 200


def test_what_public_clients_send_is_read_as_vllm_reads_it(pair):
    client = client_of(pair)
    options = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    client.completions.create(
        model="pair", prompt="abc", max_tokens=2, presence_penalty=0.5, frequency_penalty=-0.5, extra_body=options
    )
    params = pair.backend.calls[-1][1]
    assert params.vllm_options == {**options, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    for seed, expected in [(-1, None), (-5, 2**63 - 5), (5, 5)]:
        client.completions.create(model="pair", prompt="abc", max_tokens=2, seed=seed, extra_body={"top_k": -1})
        assert pair.backend.calls[-1][1].seed == expected
    # The later name of the limit wins, whatever the other asks for.
    answer = client.chat.completions.create(model="pair", messages=HELLO, max_tokens=10**6, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    stream = client.chat.completions.create(
        model="pair", messages=HELLO, max_tokens=2, stream=True, stream_options={"include_obfuscation": False}
    )
    assert len(list(stream)) == 2
    post(pair, "/v1/completions", OK | {"stream": True, "stream_options": {"include_usage": None}})


def test_messages_reach_the_template_as_vllm_hands_them_over():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}{{ m.name or '' }}>{{ m.content }}"
        "{{ '(' + m.reasoning_content + m.reasoning + ')' if m.reasoning else '' }}{% endfor %}"
        "{{ reasoning_effort or '' }}{{ enable_thinking if enable_thinking is defined else '' }}"
    )
    backend = FakeBackend(tokenizer)
    backend.max_length = 1000

    def rendered(server, messages, **options):
        answer = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 2, **options})
        assert answer.status_code == 200, answer.text
        return tokenizer.decode(backend.calls[-1][0]), answer.headers.get("x-routing-ignored")

    def part(kind, text):
        return {"type": kind, {"refusal": "refusal", "thinking": "thinking"}.get(kind, "text"): text}

    kinds = ("text", "input_text", "output_text", "refusal", "thinking")
    talk = [
        {"role": "developer", "content": "a"},
        {"role": "user", "name": "bo", "content": [part(kind, f"{k}") for k, kind in enumerate(kinds)] + ["x"]},
        {"role": "assistant", "content": None, "reasoning_content": "t"},
    ]
    with serving(backend) as server:
        text = "<userbo>0\n1\n2\n3\n4\nx<assistant>(tt)"
        assert rendered(server, talk) == (f"<system>a{text}", None)  # the template knows no developer
        assert rendered(server, talk[:1], reasoning_effort="none")[0] == "<system>anoneFalse"
        own = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
        assert rendered(server, talk[:1], **own)[0] == "<system>alowFalse"
        tokenizer.chat_template += "{# developer #}"
        assert rendered(server, talk) == (f"<developer>a{text}", None)


def test_unknown_fields_are_ignored_and_named(pair, caplog):
    fields = {"nonsense": 1, "limit": 2, "a\r\nb": 3, "stream_options": {"deep": 1}} | {f"z{k}": 0 for k in range(30)}
    with caplog.at_level(logging.WARNING):
        for stream in (False, True):
            answer = post(pair, "/v1/completions", OK | fields | {"stream": stream})
            named = answer.headers["x-routing-ignored"].split(", ")
            assert answer.status_code == 200 and named[:4] == ["a??b", "deep", "limit", "nonsense"] and len(named) == 16
    assert caplog.text.count("nonsense") == 1  # once a field, whoever sends it
    message = {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}], "task": "y"}
    answer = post(pair, "/v1/chat/completions", CHAT | {"messages": [message]})
    assert answer.headers["x-routing-ignored"] == "cache_control, task"
    assert "x-routing-ignored" not in post(pair, "/v1/completions", OK).headers


def test_fields_that_ask_for_nothing_are_taken(pair):
    nothing = {"user": "me", "logit_bias": {}, "best_of": 1, "echo": False, "presence_penalty": 0, "suffix": None}
    assert post(pair, "/v1/completions", OK | nothing | {"stop": None, "logprobs": None}).status_code == 200
    nothing = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "store": False, "metadata": {}}
    assert post(pair, "/v1/chat/completions", CHAT | nothing).status_code == 200


def test_the_client_gets_its_own_exceptions(pair):
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client_of(pair).completions.create(model="pair", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client_of(pair).chat.completions.create(model="gpt", messages=HELLO)


def test_other_paths_methods_and_types(pair):
    assert httpx.get(f"{pair.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found."
    assert httpx.get(f"{pair.url}/v1/completions").status_code == 405
    answer = post(pair, "/v1/completions", OK, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]
    assert [model.id for model in client_of(pair).models.list()] == ["pair"]
    assert client_of(pair).models.retrieve("pair").max_model_len == pair.backend.max_length
    with pytest.raises(openai.NotFoundError, match="There is no model 'a/b'"):
        client_of(pair).models.retrieve("a/b")
    assert httpx.head(f"{pair.url}/health").status_code == 200


def test_a_model_without_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with serving(FakeBackend(tokenizer)) as server:
        answer = post(server, "/v1/chat/completions", CHAT)
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]


def test_a_template_that_refuses_the_messages():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(FakeBackend(tokenizer)) as server:
        answer = post(server, "/v1/chat/completions", CHAT)
        assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]


def test_variables_of_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if think %}a{% else %}b{% endif %}"
    backend = FakeBackend(tokenizer)
    with serving(backend) as server:
        post(server, "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"think": True}})
        post(server, "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"think": False}})
    with serving(backend, chat_template_kwargs={"think": True}) as server:  # those of the router's labels
        post(server, "/v1/chat/completions", CHAT)
        post(server, "/v1/chat/completions", CHAT | {"chat_template_kwargs": {"think": False}})
    assert [tokenizer.decode(call[0]) for call in backend.calls] == ["a", "b", "a", "b"]


# ----------------------------------------------------------------------------------------------- keys and limits


def test_the_api_key():
    with serving(FakeBackend(), api_key="s3cret") as server:
        for key in ("wrong", "s3cret2", "S3CRET"):
            with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
                client_of(server, key).completions.create(model="pair", prompt="a")
        assert post(server, "/v1/completions", OK).status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        client_of(server, "s3cret").completions.create(model="pair", prompt="a")
        for scheme, status in [("bearer", 200), ("BEARER", 200), ("Basic", 401)]:
            answer = post(server, "/v1/completions", OK, headers={"Authorization": f"{scheme} s3cret"})
            assert answer.status_code == status
    assert "s3cret" not in repr(ServerSettings("pair", api_key="s3cret"))


def test_limits_of_one_request():
    limits = {"max_body_bytes": 1000, "max_prompt_tokens": 20, "max_tokens": 10, "max_choices": 3}
    with serving(FakeBackend(), **limits) as server:
        for body, status, message in [
            (OK | {"prompt": "a" * 1000}, 413, "The body is longer than 1000 bytes"),
            (OK | {"prompt": "a" * 21}, 400, "Prompt 0 has 21 tokens, but this server takes 20"),
            (OK | {"max_tokens": 11}, 400, "`max_tokens` is 11, but this server writes at most 10"),
            (OK | {"n": 4}, 400, "asks for 4 completions, but this server writes at most 3"),
        ]:
            answer = post(server, "/v1/completions", body)
            assert answer.status_code == status and message in answer.json()["error"]["message"]
        assert post(server, "/v1/completions", {"prompt": "a"}).json()["usage"]["completion_tokens"] == 10
        assert post(server, "/v1/chat/completions", {"messages": HELLO}).json()["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": ""}, "The API key is empty"),
        ({"max_running": 0}, "max_running is 0: allow at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"header_timeout": -1}, "header_timeout is -1"),
        ({"max_choices": 64, "max_running": 8, "max_queue": 8}, "could never be admitted"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings("pair", **settings)


def test_a_sentence_for_an_open_door():
    assert exposure_warning("127.0.0.1", None) is None
    assert exposure_warning("::1", None) is None
    assert exposure_warning("localhost", None) is None
    assert exposure_warning("0.0.0.0", "key") is None
    for host in ("0.0.0.0", "10.0.0.7", "gpu-1"):
        assert exposure_warning(host, None).startswith(f"Serving on {host} without an API key")


def test_twenty_at_once():
    backend = FakeBackend(pause=0.002)
    with serving(backend, max_running=8, max_choices=8) as server:
        client = client_of(server)

        def ask(seed):
            if seed % 2:
                return client.completions.create(model="pair", prompt="abc", max_tokens=12, seed=seed).choices[0].text
            chunks = client.completions.create(model="pair", prompt="abc", max_tokens=12, seed=seed, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(ask, range(20))) == [text_of(seed) for seed in range(20)]
        assert 2 <= backend.most_open <= 8
        assert metrics_of(server)['tokalign_routing_requests_total{endpoint="/v1/completions",status="200"}'] == 20


def test_a_full_queue_is_429_and_the_places_come_back():
    backend = FakeBackend()
    backend.gate = threading.Event()
    with serving(backend, max_running=2, max_queue=3, max_choices=3) as server, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, server, "/v1/completions", OK | {"n": n}) for n in (3, 2)]
        wait_for(lambda: len(backend.calls) == 2)
        wait_for(lambda: metrics_of(server)["tokalign_routing_queued"] == 3)
        assert metrics_of(server)["tokalign_routing_running"] == 2
        answer = post(server, "/v1/completions", OK)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="try again in a second"):
            client_of(server).completions.create(model="pair", prompt="a")
        backend.gate.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert post(server, "/v1/completions", OK | {"n": 3}).status_code == 200
        seen = metrics_of(server)
        assert (seen["tokalign_routing_queued"], seen["tokalign_routing_running"]) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream):
    backend = FakeBackend(pause=0.06)
    with serving(backend, request_timeout=0.3) as server:
        answer = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 400, "stream": stream})
        if stream:  # it had begun
            assert answer.status_code == 200
            error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
            error = answer.json()["error"]
        assert error["code"] == "timeout" and "ask for fewer tokens" in error["message"]
        assert (backend.open, backend.cancelled) == (0, 1)


# ---------------------------------------------------------------------------------- disconnects, outages, draining


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_completions(stream):
    backend = FakeBackend(pause=0.01)
    with serving(backend, max_running=2, max_queue=2, max_choices=3) as server:
        body = {"prompt": "abc", "max_tokens": 400, "n": 3, "stream": stream}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
        wait_for(lambda: backend.open == 0)
        assert backend.cancelled == 2 and len(backend.calls) == 2  # the third had no place yet, and never began
        wait_for(lambda: metrics_of(server)["tokalign_routing_queued"] == 0)
        seen = metrics_of(server)
        if stream:
            assert seen['tokalign_routing_broken_streams_total{reason="client"}'] == 1
        else:
            assert seen['tokalign_routing_requests_total{endpoint="/v1/completions",status="499"}'] == 1
        assert post(server, "/v1/completions", OK | {"n": 3}).status_code == 200


def test_the_llm_dies_before_the_first_token(caplog):
    with serving(FakeBackend(dies_at=0)) as server, caplog.at_level(logging.WARNING):
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="The large model cannot be reached") as error:
                client_of(server).completions.create(model="pair", prompt="a", stream=stream)
            assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "5"
            assert error.value.code == "llm_unavailable"
            assert "llm:8000" not in error.value.response.text  # where it is, is for the log
    assert "http://llm:8000 does not answer" in caplog.text


def test_the_llm_dies_mid_stream():
    backend = FakeBackend(dies_at=5)
    with serving(backend) as server:
        chunks = []
        with pytest.raises(openai.APIError, match="The large model cannot be reached"):
            for chunk in client_of(server).chat.completions.create(model="pair", messages=HELLO, n=2, stream=True):
                chunks.append(chunk)
        assert len(chunks) >= 5
        raw = post(server, "/v1/completions", {"prompt": "a", "stream": True}).text
        assert (
            "[DONE]" not in raw and json.loads(raw.strip().split("\n\n")[-1][6:])["error"]["code"] == "llm_unavailable"
        )
        assert post(server, "/v1/completions", {"prompt": "a"}).status_code == 503
        assert backend.open == 0
        assert metrics_of(server)['tokalign_routing_broken_streams_total{reason="llm_unavailable"}'] == 2


def test_a_completion_that_fails_alone_says_why():
    backend = FakeBackend(fails_at=2, failure=RowFailed("The SLM gave logits that are not finite: load it in float32."))
    with serving(backend) as server:
        answer = post(server, "/v1/completions", OK)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "completion_failed"
        assert "not finite: load it in float32" in answer.json()["error"]["message"]
        assert "not finite: load it in float32" in post(server, "/v1/completions", OK | {"stream": True}).text


class Refused(FakeBackend):
    """Its engine's server says no, after `good` tokens."""

    good, error, cause = 0, ValueError, openai.OpenAIError("401 wrong key k3y")

    async def generate(self, prompt_ids, params, *, sample=0):
        await asyncio.sleep(0.01)  # for the server's answer
        for step in range(self.good):
            yield RoutedToken(self._next(prompt_ids, params, sample, step), False)
        raise self.error("The server http://llm:8000 refused a request: check its key.") from self.cause


@pytest.mark.parametrize("error", [ValueError, ConnectionError])
def test_what_a_models_server_refuses_is_not_the_clients_fault_nor_its_to_read(error, caplog):
    backend = Refused()
    backend.error = error
    with serving(backend) as server, caplog.at_level(logging.ERROR):
        for stream in (False, True):
            answer = post(server, "/v1/completions", OK | {"stream": stream})
            assert answer.status_code == 502 and answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["type"] == "server_error"
            assert answer.json()["error"]["message"].startswith("A model behind this server failed or refused")
            assert "llm:8000" not in answer.text
        backend.good = 2
        answer = post(server, "/v1/completions", OK | {"stream": True})
        assert answer.status_code == 200 and '"code": "upstream_error"' in answer.text
        assert "llm:8000" not in answer.text
        assert "http://llm:8000 refused a request" in caplog.text
        backend.good, backend.cause = 0, None  # an engine's ValueError in this process, after it had begun
        if error is ValueError:
            answer = post(server, "/v1/completions", OK)
            assert answer.status_code == 500 and "llm:8000" not in answer.text


def test_degraded_service_says_so():
    backend = FakeBackend(degraded=True)
    with serving(backend) as server:
        answer = post(server, "/v1/completions", OK)
        assert (answer.headers["x-routing-degraded"], answer.headers["x-routing-llm-rate"]) == ("slm-only", "0.0000")
        assert answer.json()["routing"] == {"llm_rate": 0.0, "degraded": True}
        stream = post(server, "/v1/completions", OK | {"stream": True})
        assert stream.headers["x-routing-degraded"] == "slm-only"
        last = json.loads(stream.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["routing"] == {"llm_rate": 0.0, "degraded": True}
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        assert metrics_of(server)["tokalign_routing_degraded"] == 1


def test_health_without_the_llm():
    backend = FakeBackend()
    with serving(backend, llm_required=True) as server:
        assert httpx.get(f"{server.url}/health").json() | {"status": "ok", "llm": True} == {
            **{"status": "ok", "llm": True, "degraded": False, "running": 0, "queued": 0}
        }
        backend.healthy = False
        answer = httpx.get(f"{server.url}/health")
        assert answer.status_code == 503 and answer.json()["status"] == "unavailable"


def test_what_is_not_foreseen_is_logged_and_not_shown(caplog):
    with serving(FakeBackend(fails_at=2)) as server, caplog.at_level(logging.ERROR):
        answer = post(server, "/v1/completions", OK)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text
        stream = post(server, "/v1/completions", OK | {"stream": True})
        assert stream.status_code == 200 and '"type": "server_error"' in stream.text and "secret" not in stream.text
    assert "secret detail" in caplog.text


def test_a_dead_backend_ends_the_server_with_an_error():
    backend = FakeBackend()
    server = GracefulServer(create_app(backend, ServerSettings(model="pair")), port=0)

    async def main():
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        assert (await server.shared.health())[0] == 200
        backend.dead = RuntimeError("out of memory")
        assert (await server.shared.health())[0] == 503
        await asyncio.wait_for(serving, 10)

    with pytest.raises(BackendDied, match="RuntimeError: out of memory"):
        asyncio.run(main())
    assert backend.closed


def test_sockets_that_send_no_headers_are_closed():
    with serving(FakeBackend(pause=0.05), header_timeout=0.3) as server:
        address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        silent, slow, reused = (socket.create_connection(address, timeout=5) for _ in range(3))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-")
        # A second request on a connection has as long as the first, and an answer may take longer than that.
        body = json.dumps(OK | {"max_tokens": 12}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        reused.sendall(head.encode() + b"\r\n\r\n" + body)
        assert b"200 OK" in reused.recv(1 << 16)
        reused.sendall(b"GET /hea")
        for connection in (silent, slow, reused):
            while connection.recv(1 << 16):
                pass  # until the server closes it
            connection.close()
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_sigterm_lets_running_requests_finish():
    backend = FakeBackend()
    backend.gate = threading.Event()
    with serving(backend) as server, ThreadPoolExecutor(4) as pool, httpx.Client() as held:
        assert held.get(f"{server.url}/health").json()["status"] == "ok"
        running = pool.submit(post, server, "/v1/completions", OK)
        wait_for(lambda: backend.open == 1)
        server.handle_exit(15, None)
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert held.get(f"{server.url}/health").json()["status"] == "draining"
        refused = post(server, "/v1/completions", OK)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert not backend.closed
        backend.gate.set()
        assert running.result().status_code == 200
        server.thread.join(5)
    assert backend.closed and backend.cancelled == 0


def test_what_does_not_finish_in_time_is_told_so():
    backend = FakeBackend()
    backend.gate = threading.Event()  # never opens
    with serving(backend, drain_timeout=0.1) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, server, "/v1/completions", OK)
        wait_for(lambda: backend.open == 1)
        server.handle_exit(15, None)
        answer = running.result()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
        server.thread.join(5)
    assert backend.closed and backend.cancelled == 1


# ------------------------------------------------------------------------------------------------ metrics and budget


def test_metrics():
    with serving(FakeBackend()) as server:
        post(server, "/v1/completions", OK | {"max_tokens": 8})
        post(server, "/v1/chat/completions", CHAT | {"stream": True})
        post(server, "/v1/completions", OK | {"n": 0})
        httpx.get(f"{server.url}/somewhere/else")
        seen = metrics_of(server)
    name = "tokalign_routing_"
    expected = {
        'tokens_total{source="slm"}': 9,
        'tokens_total{source="llm"}': 3,
        "handoffs_total": 3,
        "llm_rate": 0.25,
        "threshold": 0.5,
        "running": 0,
        "queued": 0,
        "degraded": 0,
        "draining": 0,
        'requests_total{endpoint="/v1/completions",status="200"}': 1,
        'requests_total{endpoint="/v1/completions",status="400"}': 1,
        'requests_total{endpoint="/v1/chat/completions",status="200"}': 1,
        'requests_total{endpoint="other",status="404"}': 1,
        "time_to_first_token_seconds_count": 2,
        "request_seconds_count": 3,
    }
    assert {key: seen[name + key] for key in expected} == expected
    assert name + "budget_target_rate" not in seen


def test_the_budget_steers_the_backend():
    backend = FakeBackend()  # writes a quarter of its tokens with the LLM, whatever the threshold
    budget = BudgetController(0.1, 0.5, window=50)
    with serving(backend, budget) as server:
        post(server, "/v1/completions", OK | {"max_tokens": 400})
        wait_for(lambda: backend.threshold == budget.threshold)
        seen = metrics_of(server)
        assert seen["tokalign_routing_threshold"] == pytest.approx(backend.threshold)
        assert seen["tokalign_routing_budget_target_rate"] == 0.1
        assert seen["tokalign_routing_budget_rate"] == pytest.approx(budget.rate)
        before = budget.rate
        backend.degraded = True  # the LLM's silence is no sign that the threshold is too high
        post(server, "/v1/completions", OK | {"max_tokens": 400})
        assert budget.rate == before
    assert backend.threshold > 0.5 and backend.thresholds == sorted(backend.thresholds)
