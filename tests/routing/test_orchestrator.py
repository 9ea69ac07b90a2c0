"""The orchestrator with both engines faked: who writes what, limits, stops, cancellation, outages, servers' answers."""

import asyncio
import json
import threading
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support import tiny_tokenizer
from tokalign.generation import SamplingParams
from tokalign.routing.decode.backend import LLMUnavailable, RowFailed
from tokalign.routing.decode.orchestrator import NEVER, Orchestrator, Piece
from tokalign.routing.decode.vllm import servers as vllm_servers
from tokalign.routing.decode.vllm.servers import ServedLLM, ServedSLM, cut_piece

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
END = TOKENIZER.eos_token_id
PROMPT = [7, 8, 9]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def following(prefix, shift, seed=None):
    """The next token of a made-up model: a function of its whole prefix (and of a seed), never an end token."""
    return 6 + (sum((i + 1) * t for i, t in enumerate(prefix)) * shift + (seed or 0)) % (VOCAB - 6)


def score(prefix):
    return (sum(prefix) % 10) / 10


class FakeSLM:
    """Scores by `score`, writes `size` tokens a piece, and counts who is in it."""

    vocab_size, max_length = VOCAB, 64
    breaks = staticmethod(lambda prefix: False)  # whether its logits are not finite there

    def __init__(self, threshold, size=1, end_at=None):
        self.threshold, self.size, self.end_at = threshold, size, end_at
        self.inside, self.calls, self.told = 0, 0, []

    def open(self, params):
        self.inside += 1
        return FakeTurns(self)

    async def set_threshold(self, value):
        self.threshold = value
        self.told.append(value)

    async def close(self):
        self.inside = -1


class FakeTurns:
    def __init__(self, slm):
        self.slm, self.open = slm, True

    async def write(self, prefix, most, seed):
        self.slm.calls += 1
        ids, out = list(prefix), []
        while True:
            await asyncio.sleep(0)
            read = 1 if out else 0
            if score(ids) >= self.slm.threshold or self.slm.breaks(ids):
                yield Piece(out, None, read, "routed")
                return
            token = END if self.slm.end_at == len(ids) else following(ids, 3, seed)
            ids.append(token)
            out.append(token)
            most -= 1
            end = "stop" if token == END else "length" if not most else None
            if end or len(out) == self.slm.size:
                yield Piece(out, [-float(t) for t in out], len(out), end)
                out = []
                if end:
                    return

    async def close(self):
        assert self.open
        self.open = False
        self.slm.inside -= 1


class FakeLLM:
    """Writes by another rule; `up` says whether it can be reached, `breaks_after` when a stream breaks."""

    max_length = 48

    def __init__(self):
        self.up, self.breaks_after, self.asked = True, None, []

    async def write(self, prefix, params, most, seed, *, place, unseen):
        self.asked.append((len(prefix), most, place, unseen))
        ids = list(prefix)
        for k in range(most):
            await asyncio.sleep(0)
            if not self.up or k == self.breaks_after:
                raise LLMUnavailable("The LLM cannot be reached (fake): check that its servers run.")
            ids.append(following(ids, 5, seed))
            yield Piece(ids[-1:], None, unseen if k == 0 else 1, "length" if k == most - 1 else None)

    async def healthy(self):
        return self.up

    async def close(self):
        self.up = False


def pair(threshold=0.7, size=1, **options):
    end_at = options.pop("end_at", None)
    slm, llm = FakeSLM(threshold, size, end_at), FakeLLM()
    return slm, llm, Orchestrator(slm, llm, TOKENIZER, threshold=threshold, shared_vocab=VOCAB, **options)


async def collect(backend, prompt=PROMPT, params=GREEDY, sample=0):
    return [token async for token in backend.generate(prompt, params, sample=sample)]


def by_hand(prompt, threshold, most, span=1):
    """The definition, one token at a time: (id, by_llm)."""
    ids, out, left = list(prompt), [], 0
    for _ in range(most):
        if not left and score(ids) >= threshold:
            left = span
        ids.append(following(ids, 5 if left else 3))
        out.append((ids[-1], left > 0))
        left = max(0, left - 1)
    return out


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.1])
def test_tokens_equal_the_definition(threshold, span, size):
    prompts = [[6 + k, 9, 11 * (k % 5) + 6] for k in range(20)]
    slm, llm, backend = pair(threshold, size, llm_span=span)

    async def run():
        return await asyncio.gather(*[collect(backend, prompt) for prompt in prompts])

    results = asyncio.run(run())
    for prompt, tokens in zip(prompts, results, strict=True):
        assert [(t.id, t.by_llm) for t in tokens] == by_hand(prompt, threshold, 12, span)
        assert [t.finish_reason for t in tokens] == [None] * 11 + ["length"]
    written = [t for tokens in results for t in tokens]
    assert backend.stats.llm_tokens == sum(t.by_llm for t in written)
    assert backend.stats.slm_tokens == sum(not t.by_llm for t in written)
    assert slm.inside == 0
    if threshold == 0:
        assert slm.calls == 0 and len(llm.asked) == len(prompts)  # the SLM does not run; one request each
    if threshold > 1:
        assert not llm.asked
    if threshold == 0.3 and span == 1:
        assert backend.stats.handoffs == backend.stats.llm_tokens == len(llm.asked)
    assert len({place for *_, place, _ in llm.asked}) in (0, len(prompts))


def test_the_llm_is_told_what_it_has_not_read():
    _, llm, backend = pair(0.3)
    tokens = asyncio.run(collect(backend))
    unseen, read = [], 0
    for k, token in enumerate(tokens):
        if token.by_llm:
            unseen.append(len(PROMPT) + k - read)
            read = len(PROMPT) + k
    assert [each[3] for each in llm.asked] == unseen and len(unseen) > 2
    assert backend.stats.llm_positions == sum(unseen)


def test_a_seed_fixes_a_completion_and_samples_differ():
    _, _, backend = pair(0.5)
    params = SamplingParams(seed=5, max_tokens=12)
    first, again, other = ([t.id for t in asyncio.run(collect(backend, params=params, sample=k))] for k in (0, 0, 1))
    assert first == again != other
    fresh = [[t.id for t in asyncio.run(collect(backend, params=SamplingParams(max_tokens=12)))] for _ in range(2)]
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("threshold", [0.3, 1.1, 0.0])
@pytest.mark.parametrize("size", [1, 4])
def test_stops_cut_the_completion_at_the_token_that_completes_them(size, threshold):
    full = [token for token, _ in by_hand(PROMPT, threshold, 12)]
    _, _, backend = pair(threshold, size)
    text = TOKENIZER.decode(full[3:6])
    k = next(k for k in range(12) if text in TOKENIZER.decode(full[: k + 1]))
    tokens = asyncio.run(collect(backend, params=SamplingParams(temperature=0, max_tokens=12, stop=(text,))))
    assert [t.id for t in tokens] == full[: k + 1] and tokens[-1].finish_reason == "stop"
    tokens = asyncio.run(
        collect(backend, params=SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(full[4],)))
    )
    assert [t.id for t in tokens] == full[: full.index(full[4]) + 1] and tokens[-1].finish_reason == "stop"


def test_a_stop_string_in_the_prompt_does_not_count():
    _, _, backend = pair(1.1)
    prompt = TOKENIZER.encode("abc")
    tokens = asyncio.run(collect(backend, prompt, SamplingParams(temperature=0, max_tokens=3, stop=("abc",))))
    assert len(tokens) == 3 and tokens[-1].finish_reason == "length"


def test_an_end_token_ends_the_completion():
    _, _, backend = pair(1.1, end_at=6)
    tokens = asyncio.run(collect(backend))
    assert [t.finish_reason for t in tokens] == [None, None, None, "stop"] and tokens[-1].id == END
    assert tokens[0].logprob == -float(tokens[0].id)


def test_the_shorter_context_limits_the_completion():
    _, _, backend = pair(0.7)
    assert backend.max_length == 48
    tokens = asyncio.run(collect(backend, [7] * 45, SamplingParams(temperature=0, max_tokens=100)))
    assert len(tokens) == 3 and tokens[-1].finish_reason == "length"
    with pytest.raises(ValueError, match="Prompt 0 has 48 tokens but the model holds 48 positions"):
        asyncio.run(collect(backend, [7] * 48))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.1])
def test_closing_the_iterator_frees_both_engines(threshold):
    async def run():
        slm, _, backend = pair(threshold)
        async with aclosing(backend.generate(PROMPT, GREEDY)) as tokens:
            async for _ in tokens:
                assert slm.inside == 1
                break
        assert slm.inside == 0
        task = asyncio.create_task(collect(backend))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slm.inside == 0

    asyncio.run(run())


def test_an_outage_with_slm_goes_on_alone_and_recovers():
    async def run():
        slm, llm, backend = pair(0.3, probe_seconds=0.01)
        llm.up = False
        tokens = await collect(backend)
        assert [(t.id, t.by_llm) for t in tokens] == by_hand(PROMPT, NEVER, 12)
        assert backend.degraded and slm.told == [NEVER] and len(llm.asked) == 1
        assert backend.threshold == 0.3 and not await backend.llm_healthy()
        await backend.set_threshold(0.5)  # kept for afterwards
        assert slm.threshold == NEVER and backend.threshold == 0.5
        await asyncio.gather(*[collect(backend) for _ in range(5)])
        assert len(llm.asked) == 1
        llm.up = True
        while backend.degraded:
            await asyncio.sleep(0.01)
        assert slm.threshold == 0.5
        assert [(t.id, t.by_llm) for t in await collect(backend)] == by_hand(PROMPT, 0.5, 12)
        await backend.close()

    asyncio.run(run())


def test_the_probe_outlives_an_slm_that_takes_no_threshold():
    async def run():
        slm, llm, backend = pair(0.3, probe_seconds=0.01)
        llm.up = False
        await collect(backend)
        take, refused = slm.set_threshold, []

        async def refuse(value):
            refused.append(value)
            if len(refused) == 2:
                slm.set_threshold = take
            raise ConnectionError("The SLM's server is away.")

        slm.set_threshold, llm.up = refuse, True
        async with asyncio.timeout(5):
            while backend.degraded:
                await asyncio.sleep(0.01)
        assert refused == [0.3, 0.3] and slm.threshold == 0.3
        await backend.close()

    asyncio.run(run())


def test_where_the_slm_has_no_word_the_llm_writes_or_that_request_fails_alone():
    def breaks(ids):
        return ids[0] == 20 and len(ids) >= 6

    async def run(backend):
        backend.slm.breaks = breaks
        poisoned, sound = [20, 7, 8], [21, 7, 8]
        return await asyncio.gather(*[collect(backend, p) for p in (poisoned, sound)], return_exceptions=True)

    _, _, backend = pair(0.9)
    poisoned, sound = asyncio.run(run(backend))
    assert [(t.id, t.by_llm) for t in sound] == by_hand([21, 7, 8], 0.9, 12)
    assert all(t.by_llm for t in poisoned[3:]) and len(poisoned) == 12

    slm, _, backend = pair(1.5)  # the LLM is not to be asked
    failed, sound = asyncio.run(run(backend))
    assert isinstance(failed, RowFailed) and "The SLM gave logits that are not finite numbers" in str(failed)
    assert [(t.id, t.by_llm) for t in sound] == by_hand([21, 7, 8], 1.5, 12) and slm.inside == 0

    async def outage():
        _, llm, backend = pair(0.9, probe_seconds=60)
        llm.up = False
        try:
            return await run(backend)
        finally:
            await backend.close()

    failed, sound = asyncio.run(outage())
    assert isinstance(failed, RowFailed) and [t.by_llm for t in sound] == [False] * 12


def test_a_threshold_that_falls_meanwhile_is_no_failure():
    """The engine routes by the new one before `set_threshold` has returned."""

    async def run():
        slm, _, backend = pair(1.5)
        told = asyncio.Event()

        async def tell(value):
            slm.threshold = value
            await told.wait()

        slm.set_threshold = tell
        first = asyncio.create_task(collect(backend))
        await asyncio.sleep(0)
        move = asyncio.create_task(backend.set_threshold(0.3))
        for _ in range(30):
            await asyncio.sleep(0)
        second = await collect(backend)
        told.set()
        await move
        return await first, second

    for tokens in asyncio.run(run()):
        assert len(tokens) == 12 and any(t.by_llm for t in tokens)


def test_an_outage_in_the_middle_of_an_llm_only_completion():
    async def run():
        slm, llm, backend = pair(0.0, probe_seconds=60)
        llm.breaks_after = 4
        tokens = await collect(backend)
        assert [t.by_llm for t in tokens] == [True] * 4 + [False] * 8
        written = [t.id for t in tokens]
        assert written[4] == following([*PROMPT, *written[:4]], 3)
        await backend.close()
        assert slm.inside == -1 and backend._probe.cancelled()

    asyncio.run(run())


def test_an_outage_with_error_raises():
    slm, llm, backend = pair(0.3, on_llm_outage="error")
    llm.up = False
    with pytest.raises(LLMUnavailable, match="check that its servers run"):
        asyncio.run(collect(backend))
    assert slm.inside == 0 and not backend.degraded and slm.told == []


def test_a_threshold_raised_from_zero_lets_the_slm_in():
    async def run():
        _, _, backend = pair(0.0)
        tokens = []
        async for token in backend.generate(PROMPT, GREEDY):
            tokens.append(token)
            if len(tokens) == 5:
                await backend.set_threshold(1.5)
        assert [t.by_llm for t in tokens] == [True] * 5 + [False] * 7

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_span": 0}, "llm_span is 0: let the LLM write at least"),
        ({"on_llm_outage": "wait"}, "on_llm_outage is 'wait': use 'slm' or 'error'"),
        ({"threshold": float("nan")}, "The threshold is not a number"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)


def test_bad_requests_are_refused():
    _, llm, backend = pair(0.3)
    with pytest.raises(ValueError, match="The threshold is not a number"):
        asyncio.run(backend.set_threshold(float("nan")))
    for params in (SamplingParams(banned_token_ids=(7,)), SamplingParams(json_schema='{"type": "object"}')):
        with pytest.raises(ValueError, match="takes no banned_token_ids and no json_schema: leave them out"):
            asyncio.run(collect(backend, params=params))
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        with pytest.raises(ValueError, match="each of two engines would take what the other has written"):
            asyncio.run(collect(backend, params=SamplingParams(**{penalty: 1.5})))
    with pytest.raises(ValueError, match=f"Prompt 0 has token id {VOCAB} but the model's vocabulary has {VOCAB}"):
        asyncio.run(collect(backend, [VOCAB]))

    async def foreign(*args, **options):
        yield Piece([VOCAB], None, 1, "length")

    llm.write = foreign
    with pytest.raises(ValueError, match=f"The LLM wrote token id {VOCAB} but the pair shares {VOCAB} ids"):
        asyncio.run(collect(backend))


def test_a_piece_leaves_out_the_token_that_marks_a_routed_position():
    assert cut_piece([5, 9], [-1.0, 0.0], "stop", 4, 9) == Piece([5], [-1.0], 5, "routed")
    assert cut_piece([9], None, "stop", 4, 9) == Piece([], None, 4, "routed")
    assert cut_piece([5, 9], None, "stop", 4, None) == Piece([5, 9], None, 5, "stop")
    assert cut_piece([5], None, None, 1, 9) == Piece([5], None, 1, None)
    assert cut_piece([], None, None, 7, 9) == Piece([], None, 0, None)


# What servers may answer, by a server that says what it is told to.


class Said:
    def __init__(self):
        self.answers, self.seen = [], []
        self.end, self.hung_health = threading.Event(), False


@pytest.fixture
def server():
    said = Said()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, status, body, kind="application/json"):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            stalls = kind == "stall"
            self.send_response(status)
            self.send_header("content-type", "text/event-stream" if stalls else kind)
            self.send_header("content-length", str(len(data) + stalls))
            self.end_headers()
            self.wfile.write(data)
            if stalls:
                said.end.wait(10)

        def do_GET(self):
            if self.path == "/v1/models":
                self.reply(200, {"object": "list", "data": [{"id": "served", "max_model_len": 64}]})
            elif self.path == "/health" and said.hung_health:
                said.end.wait(10)
            else:
                self.reply(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            said.seen.append((self.path, body))
            answer = said.answers.pop(0)
            if answer == "hang":
                said.end.wait(10)
            else:
                self.reply(*answer)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    said.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield said
    said.end.set()
    http.shutdown()


second_server = server


def choice(ids, finish, **more):
    return {"index": 0, "text": "", "token_ids": ids, "finish_reason": finish, "logprobs": None, **more}


def large(url, **options):
    options = {"api_key": "none", "timeout": 10, "max_retries": 0, "logprobs": False, **options}
    urls = url if isinstance(url, list) else [url]
    return ServedLLM(urls, None, **options)


async def pieces(llm, most=1, prefix=(7, 8, 9), unseen=3):
    params = SamplingParams(temperature=0.5, top_p=0.9, stop_token_ids=(11,))
    try:
        return [piece async for piece in llm.write(list(prefix), params, most, 42, place=0, unseen=unseen)]
    finally:
        await llm.close()


def test_the_llm_is_asked_in_ids(server):
    answer = {"choices": [choice([12], "length")], "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}
    server.answers = [(200, answer)]
    llm = large(server.url, banned=range(90, 92))
    assert (llm.model, llm.max_length) == ("served", 64)
    assert asyncio.run(pieces(llm, unseen=1)) == [Piece([12], None, 3, "length")]
    ((path, body),) = server.seen
    assert path == "/v1/completions" and body["prompt"] == [7, 8, 9] and body["return_token_ids"] is True
    assert (body["max_tokens"], body["seed"], body["temperature"], body["top_p"]) == (1, 42, 0.5, 0.9)
    assert body["stop_token_ids"] == [11] and body["logit_bias"] == {"90": -100, "91": -100}
    # What a request leaves out, vLLM takes from the model's generation_config.json.
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: body.get(name) for name in neutral} == neutral


def test_a_broken_stream_is_taken_up_behind_what_has_come(server):
    chunks = b"".join(
        b"data: " + json.dumps({"choices": [choice(ids, None)]}).encode() + b"\n\n" for ids in ([12], [13, 14])
    )
    rest = b"data: " + json.dumps({"choices": [choice([15], "stop")]}).encode() + b"\n\ndata: [DONE]\n\n"
    server.answers = [(200, chunks, "text/event-stream"), (200, rest, "text/event-stream")]
    got = asyncio.run(pieces(large([server.url, server.url]), most=40))
    assert [piece.ids for piece in got] == [[12], [13, 14], [15]] and got[-1].end == "stop"
    assert [(body["prompt"], body["max_tokens"]) for _, body in server.seen] == [
        ([7, 8, 9], 40),
        ([7, 8, 9, 12, 13, 14], 37),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((500, {"error": "full"}), LLMUnavailable, "The LLM cannot be reached .*: check that its servers run"),
        ((200, b"{oops"), LLMUnavailable, "the answer is not JSON"),
        ((200, {"choices": []}), LLMUnavailable, "the answer holds no choice"),
        ((200, {"choices": [choice([12], "length", logprobs={"token_logprobs": []})]}), LLMUnavailable, "one log-prob"),
        ((400, {"error": {"message": "too long"}}), ValueError, "refused a request: .*too long.* longest context"),
        ((200, {"choices": [choice(None, "length")]}), ValueError, "answered without token ids: serve both models"),
    ],
)
def test_bad_answers_of_the_llm(server, answer, error, message):
    server.answers = [answer]
    with pytest.raises(error, match=message):
        asyncio.run(pieces(large(server.url)))


@pytest.mark.parametrize("failure", [(500, {}), (200, {"choices": []})])
def test_a_text_that_the_llm_fails_at_is_no_outage(server, failure):
    """The server answers others: this request fails, and nobody else loses the LLM."""
    server.answers = [failure, failure, WELL]

    async def run():
        slm = FakeSLM(0.0)
        backend = Orchestrator(slm, large(server.url, max_retries=1), TOKENIZER, threshold=0.5, shared_vocab=VOCAB)
        try:
            await collect(backend, [10, 10, 10])
        finally:
            assert not backend.degraded and slm.inside == 0
            await backend.close()

    with pytest.raises(ConnectionError, match="fail at this request and answer others") as error:
        asyncio.run(run())
    assert not isinstance(error.value, LLMUnavailable)
    assert not server.answers and server.seen[-1][1]["max_tokens"] == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_llm_is_out_of_reach(server, status):
    server.answers = [(status, {})]
    with pytest.raises(LLMUnavailable):
        asyncio.run(pieces(large(server.url)))
    assert len(server.seen) == 1


def test_a_failed_request_is_repeated(server):
    good = (200, {"choices": [choice([12], "length")]})
    server.answers = [(503, {}), (429, {}), good]
    assert asyncio.run(pieces(large([server.url, server.url], max_retries=1)))[0].ids == [12]
    assert len(server.seen) == 3


WELL = (200, {"choices": [choice([12], "length")]})


def test_an_llm_that_hangs_is_out_of_reach_until_it_writes(server, monkeypatch):
    monkeypatch.setattr(vllm_servers, "PROBE_SECONDS", 0.2)
    server.answers = ["hang", "hang", WELL]

    async def run():
        llm = large(server.url, timeout=0.2, max_retries=5)
        assert await llm.healthy() and not server.seen  # at first by /health alone
        with pytest.raises(LLMUnavailable, match="The LLM cannot be reached"):
            async for _ in llm.write([7], GREEDY, 1, None, place=0, unseen=1):
                pass
        assert len(server.seen) == 1  # no second wait for the same server
        assert not await llm.healthy()
        assert await llm.healthy() and await llm.healthy()
        assert len(server.seen) == 3
        await llm.close()

    asyncio.run(run())


def test_a_stream_that_falls_silent_is_not_waited_for_again(server):
    server.answers = [(200, b"data: " + json.dumps({"choices": [choice([12], None)]}).encode() + b"\n\n", "stall")]
    got = []

    async def run():
        llm = large(server.url, timeout=0.2, max_retries=5)
        async for piece in llm.write([7], GREEDY, 40, None, place=0, unseen=1):
            got.extend(piece.ids)

    with pytest.raises(LLMUnavailable, match="timed out"):
        asyncio.run(run())
    assert got == [12] and len(server.seen) == 1


def test_the_next_server_stands_in_for_one_that_hangs(server, second_server):
    server.answers, second_server.answers = ["hang"], [WELL]
    (piece,) = asyncio.run(pieces(large([server.url, second_server.url], timeout=0.2)))
    assert piece.ids == [12] and len(server.seen) == len(second_server.seen) == 1


def test_one_server_that_hangs_does_not_hide_another(server, second_server, monkeypatch):
    monkeypatch.setattr(vllm_servers, "PROBE_SECONDS", 8.0)
    server.hung_health = True

    async def run():
        llm = large([server.url, second_server.url])
        async with asyncio.timeout(4):
            assert await llm.healthy()
        await llm.close()

    asyncio.run(run())


def test_servers_that_do_not_answer_at_the_start():
    with pytest.raises(ConnectionError, match=r"No server of the LLM answers .*: start it, or correct its address"):
        large("http://127.0.0.1:9/v1")


def test_a_name_that_is_not_served(server):
    with pytest.raises(ValueError, match="serves served, not other: correct llm_name"):
        ServedLLM([server.url], "other", api_key="none", timeout=5, max_retries=0)


def small(url):
    return ServedSLM(url, 3, VOCAB, 0.4, api_key="none", timeout=10, logprobs=False)


AGREES = [(200, {}), (200, {"choices": [choice([3], "stop")]}), (200, {})]


def test_a_served_slm_is_told_the_threshold_once_and_stops_at_routed_positions(server):
    def stream(*choices):
        lines = [b"data: " + json.dumps({"choices": [each]}).encode() + b"\n\n" for each in choices]
        return 200, b"".join(lines) + b"data: [DONE]\n\n", "text/event-stream"

    server.answers = [
        *AGREES,
        stream(choice([12], None), choice([13, 3], "stop")),
        stream(choice([14], "length")),
    ]

    async def run():
        slm = small(server.url)
        turns = slm.open(GREEDY)
        first = [piece async for piece in turns.write([7, 8], 5, None)]
        second = [piece async for piece in turns.write([7, 8, 12, 13, 20], 2, None)]
        await slm.close()
        return first, second

    first, second = asyncio.run(run())
    assert [(p.ids, p.read, p.end) for p in first] == [([12], 2, None), ([13], 2, "routed")]
    assert [(p.ids, p.read, p.end) for p in second] == [([14], 1, "length")]
    told = [body["args"] for path, body in server.seen if path == "/collective_rpc"]
    assert told == [[0.0], [0.4]] and server.seen[2][0] == "/collective_rpc"
    asked = [body for path, body in server.seen if path == "/v1/completions"]
    assert [body["stop_token_ids"] for body in asked] == [[3]] * 3 and asked[0]["max_tokens"] == 1


@pytest.mark.parametrize(
    "answer", [choice([4], "stop"), choice([9], "length"), {"index": 0, "text": "a", "finish_reason": "length"}]
)
def test_a_served_slm_that_routes_by_another_token(server, answer):
    server.answers = [(200, {}), (200, {"choices": [answer]}), (200, {})]
    with pytest.raises(ValueError, match="not the route token 3: start it with the command that `tokalign slm-server`"):
        small(server.url)
    assert server.seen[-1][1]["args"] == [0.4]  # the check leaves nothing behind


def test_a_served_slm_that_fails(server):
    async def write():
        slm = small(server.url)
        try:
            return [piece async for piece in slm.open(GREEDY).write([7], 5, None)]
        finally:
            await slm.close()

    for _ in range(2):  # a server that takes no threshold is refused every time, before it writes
        server.answers = [(404, {})]
        with pytest.raises(ValueError, match="takes no new threshold: start it with VLLM_SERVER_DEV_MODE=1"):
            asyncio.run(write())
    failures = [[(500, {})], [(200, {}), (500, {}), (200, {})], [*AGREES[:2], (500, {})], [*AGREES, (500, {})]]
    for server.answers in failures:
        with pytest.raises(ConnectionError, match=r"The SLM's server .* failed .*: check that it runs"):
            asyncio.run(write())
    assert not server.answers


def test_a_threshold_that_a_served_slm_does_not_take(server):
    async def move():
        slm = small(server.url)
        try:
            await slm.set_threshold(0.9)
        finally:
            await slm.close()

    server.answers = [*AGREES, (404, {})]
    with pytest.raises(ValueError, match="takes no new threshold: start it with VLLM_SERVER_DEV_MODE=1"):
        asyncio.run(move())
    server.answers = [*AGREES, (200, {})]
    asyncio.run(move())
    assert server.seen[-1] == ("/collective_rpc", {"method": "set_router_threshold", "args": [0.9]})
