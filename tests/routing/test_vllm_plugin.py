"""The plug-in without an engine: route tokens, overrides, versions, and what the head does to the logits."""

import asyncio
import json
import runpy
import shlex
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from tests.support import tiny_tokenizer
from tokalign.cli.main import main
from tokalign.routing.decode.orchestrator import Orchestrator
from tokalign.routing.decode.vllm import plugin as vllm_plugin
from tokalign.routing.decode.vllm.architectures import ARCHITECTURES
from tokalign.routing.decode.vllm.plugin import (
    RouterWorkerExtension,
    check_vllm_version,
    choose_route_token,
    routed_engine_options,
    routed_overrides,
    routed_server_options,
)
from tokalign.routing.decode.vllm.probe import (
    make_probe,
    probe_fields,
    probe_overrides,
    probe_sampling,
    probe_server_options,
    read_probe,
)

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)


def test_the_route_token_is_one_that_no_text_has():
    assert choose_route_token(TOKENIZER, VOCAB + 8) == VOCAB
    assert choose_route_token(TOKENIZER, VOCAB + 8, VOCAB + 5) == VOCAB + 5
    assert choose_route_token(TOKENIZER, VOCAB) == TOKENIZER.pad_token_id == choose_route_token(TOKENIZER, VOCAB, 0)


@pytest.mark.parametrize("given", [VOCAB, -1])
def test_a_route_token_outside_the_vocabulary(given):
    with pytest.raises(ValueError, match=f"route_token_id is {given} but the SLM's vocabulary has {VOCAB}"):
        choose_route_token(TOKENIZER, VOCAB, given)


def test_a_route_token_that_the_model_uses():
    with pytest.raises(ValueError, match=r"route_token_id 1 is the tokenizer's '<\|end\|>', which the SLM may write"):
        choose_route_token(TOKENIZER, VOCAB + 8, 1)
    with pytest.raises(ValueError, match=r"route_token_id 20 is the tokenizer's .*, which the SLM may write"):
        choose_route_token(TOKENIZER, VOCAB + 8, 20)
    with pytest.raises(ValueError, match=r"route_token_id 0 is the tokenizer's .*, which the SLM may write"):
        choose_route_token(TOKENIZER, VOCAB + 8, 0, ends=[0])


def test_no_id_is_left_to_mark_a_route():
    message = f"All {VOCAB} ids of the SLM have a meaning, so none is left to mark a routed token"
    with pytest.raises(ValueError, match=message):
        choose_route_token(TOKENIZER, VOCAB, ends=[TOKENIZER.pad_token_id])
    same = tiny_tokenizer()
    same.pad_token = same.eos_token
    with pytest.raises(ValueError, match=message):
        choose_route_token(same, VOCAB)


def test_overrides_say_the_same_to_an_engine_and_to_a_server():
    config = LlamaConfig(vocab_size=100, architectures=["LlamaForCausalLM"])
    overrides = routed_overrides(config, "router", 99, threshold=0.25)
    assert overrides["architectures"] == ["RoutedLlamaForCausalLM"]
    assert overrides["token_router"] == {
        "path": "router", "route_token_id": 99, "threshold": 0.25, "shared_vocab": 100,
    }  # fmt: skip
    options = routed_engine_options(overrides)
    command = routed_server_options(overrides)
    assert json.loads(command[1]) == options["hf_overrides"] == overrides
    assert command[3] == options["worker_extension_cls"] == "tokalign.routing.decode.vllm.plugin.RouterWorkerExtension"


def test_an_architecture_without_a_routed_class():
    with pytest.raises(ValueError, match="architecture is GPT2LMHeadModel but the plug-in for vLLM knows Llama"):
        routed_overrides(AutoConfig.for_model("gpt2", architectures=["GPT2LMHeadModel"]), "router", 1)


@pytest.mark.parametrize("version", ["0.29.2", "0.33.0", "1.0"])
def test_another_vllm_is_refused(version, monkeypatch):
    with pytest.raises(ImportError, match=rf"tested with vLLM 0\.30\.0 up to, not with, 0\.33, and this is {version}"):
        check_vllm_version(version)
    monkeypatch.setenv("TOKALIGN_ANY_VLLM", "1")
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.30.0", "0.30.0+cpu", "0.31.1", "0.32.0"])
def test_a_supported_vllm_passes(version):
    check_vllm_version(version)


def test_the_worker_extension_sets_the_threshold():
    class Model:
        router_threshold = 0.5

    class Worker(RouterWorkerExtension):
        model = Model()

        def get_model(self):
            return self.model

    assert Worker().set_router_threshold(0.25) == 0.25 == Worker.model.router_threshold
    with pytest.raises(ValueError, match="The threshold is not a number"):
        Worker().set_router_threshold(float("nan"))


# What a backend refuses before it starts an engine


@pytest.fixture
def router_path(tiny_path, tmp_path):
    from tokalign.routing.router.model import TokenRouter, TokenRouterConfig

    config = TokenRouterConfig(hidden_size=32, embedding_size=32, shared_vocab=VOCAB, top_k=5, width=8, num_blocks=1)
    TokenRouter(config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("urls", "options", "error", "message"),
    [
        ([], {}, ValueError, "llm_urls is empty: give at least one server of the LLM"),
        (["http://127.0.0.1:9/v1"], {}, ValueError, "The router has no threshold: calibrate it"),
        (["http://127.0.0.1:9/v1"], {"threshold": 0.5}, ConnectionError, "No server of the LLM answers"),
        (["http://127.0.0.1:9/v1"], {"threshold": float("nan")}, ValueError, "The threshold is not a number"),
        (["http://127.0.0.1:9/v1"], {"threshold": 0.5, "route_token_id": 9}, ValueError, "route_token_id 9 is the"),
    ],
)
def test_a_backend_that_cannot_be(tiny_path, router_path, urls, options, error, message):
    from tokalign.routing.decode.vllm.backend import VLLMBackend

    with pytest.raises(error, match=message):
        VLLMBackend(tiny_path, router_path, urls, **options)


def test_the_command_of_a_server_is_printed(tiny_path, tmp_path, capsys, monkeypatch):
    from tests.support import tiny_model
    from tokalign.routing.router.model import TokenRouter, TokenRouterConfig
    from tokalign.stage.hashes import weights_hash

    tiny_model(VOCAB + 8).save_pretrained(tmp_path / "slm")
    TOKENIZER.save_pretrained(tmp_path / "slm")
    config = TokenRouterConfig(
        hidden_size=32, embedding_size=32, shared_vocab=VOCAB, top_k=5, width=8, num_blocks=1, threshold=0.25,
        slm={"weights_hash": weights_hash(tmp_path / "slm")},
    )  # fmt: skip
    TokenRouter(config).save_pretrained(tmp_path / "router")
    monkeypatch.chdir(tmp_path)
    words = ["--slm", "slm", "--llm", tiny_path, "--router", "router", "--port", "8123"]
    main(["slm-server", *words])
    printed = capsys.readouterr().out
    environment, *command = shlex.split(printed)
    assert environment == "VLLM_SERVER_DEV_MODE=1"  # it is told thresholds
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert command[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert (options["--model"], options["--port"], options["--host"]) == ("slm", "8123", "127.0.0.1")
    assert options["--worker-extension-cls"] == "tokalign.routing.decode.vllm.plugin.RouterWorkerExtension"
    assert json.loads(options["--hf-overrides"])["token_router"] == {
        "path": str(tmp_path / "router"), "route_token_id": VOCAB, "threshold": 0.25, "shared_vocab": VOCAB,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="route_token_id is 999"):
        main(["slm-server", "--slm", "slm", "--router", "router", "--route_token_id", "999"])

    # The module as a program prints the same, and names the class by its importable name though it is __main__ there
    monkeypatch.setattr("sys.argv", ["plugin", *words])
    runpy.run_path(vllm_plugin.__file__, run_name="__main__")
    assert capsys.readouterr().out == printed


def test_the_llm_and_the_slm_are_waited_for_differently(tiny_path, router_path, monkeypatch):
    from tokalign.routing.decode.vllm import backend as vllm_backend

    seen = {}
    monkeypatch.setattr(
        vllm_backend, "ServedLLM", lambda *a, **o: seen.setdefault("llm", o) and SimpleNamespace(max_length=9)
    )
    monkeypatch.setattr(
        vllm_backend, "ServedSLM", lambda *a, **o: seen.setdefault("slm", o) and SimpleNamespace(max_length=9)
    )
    options = {"threshold": 0.5, "slm_url": "http://y/v1", "route_token_id": 0}
    vllm_backend.VLLMBackend(tiny_path, router_path, ["http://x/v1"], timeout=600.0, **options)
    assert (seen["llm"]["timeout"], seen["slm"]["timeout"]) == (30.0, 600.0)


def test_a_session_needs_an_engine_of_this_process(tiny_path, router_path, monkeypatch):
    from tokalign.routing.decode.vllm import backend as vllm_backend

    monkeypatch.setattr(vllm_backend, "ServedLLM", lambda *args, **options: None)
    with pytest.raises(ValueError, match="handback is 'session', which only an SLM in this process has"):
        vllm_backend.VLLMBackend(
            tiny_path, router_path, ["http://x/v1"], threshold=0.5, slm_url="http://y/v1", handback="session"
        )


@pytest.mark.parametrize(
    ("handback", "message"),
    [
        ("session", "which async_scheduling breaks: leave one of them out"),
        ("both", "handback is 'both': use 'session'"),
    ],
)
def test_a_handback_that_the_engine_does_not_have(handback, message):
    pytest.importorskip("vllm")
    from tokalign.routing.decode.vllm.backend import EngineSLM

    with pytest.raises(ValueError, match=message):
        EngineSLM("model", {}, {"async_scheduling": True}, handback=handback)


@pytest.mark.parametrize("errored", [False, True])
def test_an_engine_that_has_ended_says_so(errored):
    pytest.importorskip("vllm")
    from tokalign.routing.decode.vllm.backend import EngineSLM

    slm, end = EngineSLM.__new__(EngineSLM), RuntimeError("gone")
    slm.engine, slm.max_length = SimpleNamespace(errored=errored, dead_error=end), 9
    backend = Orchestrator(slm, SimpleNamespace(max_length=9), TOKENIZER, threshold=0.5, shared_vocab=VOCAB)
    assert backend.dead is (end if errored else None)


# The head on a made-up model


class Head:
    logit = None  # of the last id in the second row, if it is to be another

    def compute_logits(self, hidden_states):
        if hidden_states is None:
            return None
        logits = hidden_states @ self.table[0]
        if self.logit is not None:
            logits[1, -1] = self.logit
        return logits


class Scores:
    """Stands for a router: a row's score is its first hidden value."""

    def __init__(self):
        self.calls = 0

    def scores(self, hidden, logits):
        self.calls += 1
        assert torch.isfinite(logits[:, :-1]).all()  # scored before anything is written into them
        return hidden[:, 0].float()


def head(threshold, dtype=torch.float32):
    pytest.importorskip("vllm")
    from tokalign.routing.decode.vllm.models import RoutedHead

    class Routed(RoutedHead, Head): ...

    model = Routed.__new__(Routed)
    model.table = (torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).to(dtype),)
    model.router_threshold, model.route_token_id, model.shared_vocab = threshold, 9, 10
    model._router, model._ready = (Scores(),), True
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routed_rows_can_only_draw_the_route_token(dtype):
    model = head(0.5, dtype)
    hidden = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[0, 0], hidden[1, 0], hidden[2, 0] = 0.5, 0.25, float("nan")  # at the threshold, below, not a number
    plain = hidden @ model.table[0]
    model._router[0].scores = lambda h, logits: h[:, 0].float()
    logits = model.compute_logits(hidden)
    assert logits.dtype == dtype
    for row in range(6):
        routed = float(hidden[row, 0]) >= 0.5 or row == 2
        for token in range(12):
            value = float(logits[row, token])
            if routed:
                assert value == (0.0 if token == 9 else -torch.inf)
            elif token >= 9:  # the route token, and ids that the pair does not share
                assert value == -torch.inf
            else:
                assert value == float(plain[row, token])
    assert float(hidden[0, 0]) == 0.5  # hidden states are what the prefix cache is made of


def test_a_threshold_above_one_does_not_run_the_router():
    model = head(1.5)
    logits = model.compute_logits(torch.rand(3, 4))
    assert model._router[0].calls == 0 and torch.isfinite(logits[:, :9]).all() and (logits[:, 9:] == -torch.inf).all()


@pytest.mark.parametrize("threshold", [0.5, 1.5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_routed_whatever_the_threshold(value, threshold):
    model = head(threshold)
    hidden = torch.rand(3, 4) * 0.4  # below both thresholds
    want = model.compute_logits(hidden)
    model._router[0].scores = lambda h, logits: torch.full((len(h),), torch.nan) if h.isnan().any() else h[:, 0]
    model.logit = value
    logits = model.compute_logits(hidden)
    assert torch.equal(logits[[0, 2]], want[[0, 2]])
    assert float(logits[1, 9]) == 0 and (logits[1, :9] == -torch.inf).all()


def test_ranks_without_logits_and_steps_without_rows():
    model = head(0.5)
    assert model.compute_logits(None) is None
    assert model.compute_logits(torch.rand(0, 4)).shape == (0, 12)
    assert model._router[0].calls == 0


def test_the_head_hides_batch_sharded_sampling():
    assert not hasattr(head(0.5), "compute_logits_local")


def test_every_architecture_has_a_class():
    pytest.importorskip("vllm")
    from tokalign.routing.decode.vllm import models as vllm_models

    for name in ARCHITECTURES:
        assert issubclass(getattr(vllm_models, f"Routed{name}"), vllm_models.RoutedHead)
        assert issubclass(getattr(vllm_models, f"Probed{name}"), vllm_models.ProbedHead)


# A session, on an engine that says what it is told to


class Said:
    """Stands for `AsyncLLM`: merges what it wrote into outputs as a busy engine does."""

    def __init__(self, outputs):
        self.outputs, self.fed, self.closed = outputs, [], 0

    async def generate(self, prompt, sampling, request_id):
        try:
            for ids, finish in self.outputs:
                if ids == "turn":
                    chunk = await anext(prompt)
                    self.fed.append((chunk.prompt["prompt_token_ids"], chunk.sampling_params.max_tokens))
                else:
                    one = SimpleNamespace(token_ids=ids, logprobs=None, finish_reason=finish)
                    yield SimpleNamespace(outputs=[one], num_cached_tokens=0)
        finally:
            self.closed += 1


def turns_over(outputs):
    pytest.importorskip("vllm")
    from tokalign.generation import SamplingParams
    from tokalign.routing.decode.vllm.backend import EngineTurns

    engine = Said(outputs)
    slm = SimpleNamespace(engine=engine, sessions=True, route_token_id=9, logprobs=None)
    return engine, EngineTurns(slm, SamplingParams(temperature=0))


async def write(turns, prefix, most):
    return [(p.ids, p.read, p.end) async for p in turns.write(prefix, most, None)]


def test_a_session_reads_only_what_is_new():
    async def run():
        engine, turns = turns_over([("turn", None), ([5], None), ([6, 9], "stop"), ("turn", None), ([7, 1], "stop")])
        assert await write(turns, [2, 3], 8) == [([5], 2, None), ([6], 2, "routed")]
        assert engine.closed == 0
        assert await write(turns, [2, 3, 5, 6, 8], 5) == [([7, 1], 2, "stop")]
        assert engine.fed == [([2, 3], 8), ([8], 5)]
        await turns.close()
        assert engine.closed == 1

    asyncio.run(run())


@pytest.mark.parametrize("last", [([5, 6, 7, 8], None), ([5, 6, 9], "stop"), ([5, 6], None)])
def test_a_session_that_ran_past_the_limit_is_cut_and_ended(last):
    async def run():
        engine, turns = turns_over([("turn", None), last, ([7], None)])
        assert await write(turns, [2, 3], 2) == [([5, 6], 3, "length")]
        assert engine.closed == 1

    asyncio.run(run())


def test_a_session_begins_anew_where_there_is_nothing_new():
    """As after an outage, when the SLM has to write the position that it had routed."""

    async def run():
        engine, turns = turns_over([("turn", None), ([5, 9], "stop")])
        assert await write(turns, [2, 3], 8) == [([5], 3, "routed")]
        engine.outputs = [("turn", None), ([6, 1], "stop")]
        assert await write(turns, [2, 3, 5], 7) == [([6, 1], 4, "stop")]
        assert engine.fed == [([2, 3], 8), ([2, 3, 5], 7)] and engine.closed == 2

    asyncio.run(run())


# A probe on a made-up model


def probed(probe, dtype=torch.float32):
    pytest.importorskip("vllm")
    from tokalign.routing.decode.vllm.models import ProbedHead

    class Probed(ProbedHead, Head): ...

    model = Probed.__new__(Probed)
    model.table = (torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).to(dtype),)
    model.probe_token_id, model._probe, model._ready = 9, (probe,), False
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_the_log_prob_of_the_reserved_id(dtype):
    seen = []

    def probe(hidden, logits):
        seen.append((hidden, logits.clone()))
        return torch.tensor([0.0, -7.123456, 29.5, 99.0, torch.nan])

    model = probed(probe, dtype)
    hidden = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = model.compute_logits(hidden)
    plain = (hidden @ model.table[0]).float()
    assert seen[0][0] is hidden and torch.equal(seen[0][1], plain)
    others = [token for token in range(12) if token != 9]
    assert logits.dtype == torch.float32 and torch.equal(logits[:, others], plain[:, others])
    logprobs = logits.log_softmax(-1)
    assert torch.allclose(logprobs[:, others], plain[:, others].log_softmax(-1), atol=1e-6)
    choice = {"logprobs": {"top_logprobs": [{"token_id:9": max(float(p), -9999.0)} for p in logprobs[:, 9]]}}
    *numbers, none = read_probe(choice, 9)
    assert numbers == pytest.approx([0.0, -7.123456, 29.5, 30.0], abs=2e-5) and none is None
    in_process = SimpleNamespace(logprobs=[{9: SimpleNamespace(logprob=float(p))} for p in logprobs[:, 9]])
    assert read_probe(in_process, 9) == read_probe(choice, 9)


def test_a_probe_gives_one_number_a_row():
    with pytest.raises(ValueError, match=r"The probe gave \(5, 1\) for 5 rows: return one number for each row"):
        probed(lambda hidden, logits: hidden[:, :1]).compute_logits(torch.rand(5, 4))
    assert probed(None).compute_logits(None) is None


def test_what_asks_for_a_probe_and_what_makes_it():
    config = LlamaConfig(vocab_size=100, architectures=["LlamaForCausalLM"])
    overrides = probe_overrides(config, "torch.nn:Linear", 99, arguments={"in_features": 3, "out_features": 2})
    assert overrides["architectures"] == ["ProbedLlamaForCausalLM"]
    assert json.loads(probe_server_options(overrides)[1]) == overrides
    assert make_probe(overrides["token_probe"]).weight.shape == (2, 3)
    assert probe_fields(99)["logprob_token_ids"] == probe_sampling(99)["logprob_token_ids"] == [99]
    for probe in ("torch.nn", "torch.nn:Linear()", ":f"):
        with pytest.raises(ValueError, match="name a class or function as"):
            probe_overrides(config, probe, 99)
    with pytest.raises(ValueError, match="token_id is 100 but the model's vocabulary has 100"):
        probe_overrides(config, "torch.nn:Linear", 100)
    for probe in ("no_such:thing", "torch:Nothing"):
        with pytest.raises(ValueError, match=rf"The probe {probe} cannot be imported .*PYTHONPATH"):
            make_probe({"probe": probe, "arguments": {}})


@pytest.mark.parametrize("choice", [{"logprobs": {"top_logprobs": [{"token_id:8": -1.0}]}}, {"logprobs": None}])
def test_an_answer_without_a_probes_numbers(choice):
    with pytest.raises(ValueError, match="send the fields of probe_fields"):
        read_probe(choice, 9)
