"""What routed decoding relies on in vLLM: when one fails, vLLM has changed, and the message says where."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points

import pytest

vllm = pytest.importorskip("vllm")

from vllm.engine.protocol import StreamingInput  # noqa: E402
from vllm.entrypoints.openai.completion.protocol import (  # noqa: E402
    CompletionRequest,
    CompletionResponseChoice,
    CompletionResponseStreamChoice,
)
from vllm.entrypoints.serve.dev.rpc import api_router  # noqa: E402
from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: E402
from vllm.outputs import RequestOutput  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2  # noqa: E402
from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.worker_base import WorkerBase  # noqa: E402

from tokalign.routing.decode.vllm import models as vllm_models  # noqa: E402
from tokalign.routing.decode.vllm.architectures import ARCHITECTURES  # noqa: E402
from tokalign.routing.decode.vllm.plugin import (  # noqa: E402
    RouterWorkerExtension,
    check_vllm_version,
    register,
)


def names(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_this_vllm_is_supported() -> None:
    check_vllm_version()


def test_the_entry_point_is_installed() -> None:
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    plugin = "tokalign.routing.decode.vllm.plugin:register"
    assert found["tokalign_routing"] == plugin, "reinstall tokalign: pip install -e ."


def test_the_architectures_are_registered_by_name() -> None:
    register()
    known = vllm.ModelRegistry.models
    for name in (f"{kind}{name}" for kind in ("Routed", "Probed") for name in ARCHITECTURES):
        entry = known[name]
        assert (entry.module_name, entry.class_name) == ("tokalign.routing.decode.vllm.models", name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_have_the_head_that_we_override(name) -> None:
    routed = getattr(vllm_models, f"Routed{name}")
    theirs = routed.__mro__[2]
    assert theirs.__name__ == name
    assert names(theirs.compute_logits) == ["self", "hidden_states"], (
        f"{name}.compute_logits changed: adapt RoutedHead."
    )
    assert names(theirs.__init__)[:3] == ["self", "vllm_config", "prefix"], f"{name} is built otherwise now."
    source = inspect.getsource(theirs.__init__)
    assert "self.config = config" in source and "self.logits_processor = LogitsProcessor(" in source
    assert "self.model" in source and "embed_tokens" in inspect.getsource(inspect.getmodule(theirs))
    assert not hasattr(routed.__new__(routed), "compute_logits_local"), (
        "batch-sharded sampling would pass the router by"
    )


def test_the_input_embedding_is_looked_up_as_it_is_stored() -> None:
    """Gemma scales outside the module, and a sharded module sums its parts over the ranks."""
    assert "self.tp_size" in inspect.getsource(VocabParallelEmbedding.__init__)
    assert "tensor_model_parallel_all_reduce(" in inspect.getsource(VocabParallelEmbedding)
    assert "self.use_all_gather" in inspect.getsource(LogitsProcessor)


@pytest.mark.parametrize("runner", [GPUModelRunner, GPUModelRunnerV2])
def test_runners_sample_from_compute_logits_outside_the_captured_forward(runner) -> None:
    source = inspect.getsource(runner)
    assert "logits = self.model.compute_logits(sample_hidden_states)" in source
    assert "compute_logits_local" not in source or 'hasattr(self.model, "compute_logits_local")' in source


def test_log_probs_of_named_ids_are_taken_before_a_request_biases_them() -> None:
    """By both runners: a probe's number is the log-prob of an id that its request bans."""
    source = inspect.getsource(Sampler.forward)
    assert source.index("self.compute_logprobs(logits)") < source.index("self.apply_logits_processors(")
    assert "self.gather_specific_token_logprobs(" in source
    source = inspect.getsource(SamplerV2)
    assert "logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)" in source, "bias is written elsewhere"
    assert "logprob_token_ids_state=self.logprob_token_ids_state" in source
    assert "logprob_token_ids" in names(vllm.SamplingParams)


def test_workers_take_our_extension() -> None:
    assert names(WorkerBase.get_model) == ["self"]
    ours = [name for name in dir(RouterWorkerExtension) if not name.startswith("__")]
    assert not [name for name in ours if hasattr(WorkerBase, name)], "vLLM refuses an extension whose names it has."
    assert names(AsyncLLM.collective_rpc)[:4] == ["self", "method", "timeout", "args"]
    assert '@router.post("/collective_rpc")' in inspect.getsource(api_router)


def test_the_asynchronous_engine_keeps_its_arguments() -> None:
    assert names(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert names(AsyncLLM.from_engine_args)[:1] == ["engine_args"]
    assert {"shutdown", "errored", "dead_error"} <= vars(AsyncLLM).keys()
    assert "num_cached_tokens" in names(RequestOutput.__init__)
    assert names(StreamingInput) == ["prompt", "sampling_params"]


def test_a_session_drops_the_token_that_stopped_it() -> None:
    source = inspect.getsource(Scheduler._update_request_as_session)
    assert "del session._all_token_ids[num_computed_tokens:]" in source, "EngineTurns counts on this."
    # With asynchronous scheduling num_computed_tokens is ahead by the step in flight, so sessions are off there.
    assert "num_output_placeholders" not in source, "Sessions may work with asynchronous scheduling now: try."
    assert "num_output_placeholders += " in inspect.getsource(AsyncScheduler._update_after_schedule)


def test_the_server_takes_and_gives_token_ids() -> None:
    for field in (
        "return_token_ids",
        "stop_token_ids",
        "skip_special_tokens",
        "logit_bias",
        "seed",
        "stream_options",
        "logprob_token_ids",
    ):
        assert field in CompletionRequest.model_fields, f"vLLM's completions no longer take {field}."
    assert "token_ids" in CompletionResponseChoice.model_fields
    assert "token_ids" in CompletionResponseStreamChoice.model_fields
