"""A number of your own for every token that stock vLLM writes, in its ordinary answer (`token_probe`).

A *probe* is any small module on a token's last hidden state and logits: a value head, a detector of doubt, a router's
score. It runs in the served model's own forward pass, beside the LM head:

    class Doubt(torch.nn.Module):                      # in a module that vLLM's processes can import
        def forward(self, hidden, logits):             # (N, d) in the model's type, (N, V) in float32
            return 1 - logits.softmax(-1).amax(-1)     # (N,): one number for each row, any real type

    overrides = probe_overrides(config, "my_package.probes:Doubt", token_id)
    LLM(model, hf_overrides=overrides)                 # or a stock server, with `probe_server_options(overrides)`
    answer = client.completions.create(..., extra_body=probe_fields(token_id))
    read_probe(answer.choices[0], token_id)            # one float for each token of the answer

The number of a token comes from the hidden state and the logits from which that token was drawn, one position before.

How it gets out, since vLLM's answers have no field for it: one reserved id, which no text has, gets the logit x − 60 +
logsumexp of all others. Its log-prob is then x − 60 (it adds e^(x−60) to the sum), and vLLM returns log-probs of ids
that a request names (`logprob_token_ids`), taken before temperature, bias and top-p. So x is exact to about 1e-5 and
is cut to ±30; the other tokens' log-probs do not change. A request biases the reserved id by −100, so that no
temperature draws it.

Run with vLLM 0.30. The engine must not have `--logprobs-mode` changed.
"""

from __future__ import annotations

import importlib
import json
import math
from typing import TYPE_CHECKING, Any

from tokalign.routing.decode.vllm.architectures import check_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OFFSET, LARGEST = 60.0, 30.0


def probe_overrides(
    config: PreTrainedConfig, probe: str, token_id: int, *, arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`hf_overrides` that give a served model a probe.

    Args:
        config: the model's.
        probe: "package.module:name" of what makes the probe in each of vLLM's processes: a class or a function.
        token_id: the reserved id; `tokalign.routing.decode.vllm.plugin.choose_route_token` finds one.
        arguments: what it is called with, such as a path of its weights; kept as JSON.

    Raises:
        ValueError: an architecture without a class for it, a name that is none, or an id outside the vocabulary.
    """
    module, _, name = probe.partition(":")
    if not module or not name.isidentifier():
        raise ValueError(f'The probe is {probe!r}: name a class or function as "package.module:name".')
    if not 0 <= token_id < config.vocab_size:
        raise ValueError(
            f"token_id is {token_id} but the model's vocabulary has {config.vocab_size}: choose an id below that which "
            "no text has."
        )
    settings = {"probe": probe, "token_id": token_id, "arguments": arguments or {}}
    return {"architectures": [f"Probed{check_architecture(config)}"], "token_probe": settings}


def probe_server_options(overrides: dict[str, Any]) -> list[str]:
    """The same for the command line of vLLM's server."""
    return ["--hf-overrides", json.dumps(overrides)]


def probe_fields(token_id: int) -> dict[str, Any]:
    """Fields of a request to the completions API by which the probe's numbers come back."""
    return {
        "logprobs": 1,  # vLLM wants as many as ids are named
        "logprob_token_ids": [token_id],
        "return_tokens_as_token_ids": True,
        "logit_bias": {str(token_id): -100},
    }


def probe_sampling(token_id: int) -> dict[str, Any]:
    """The same as arguments of vLLM's `SamplingParams`."""
    return {"logprobs": 1, "logprob_token_ids": [token_id], "logit_bias": {token_id: -100.0}}


def read_probe(choice: Any, token_id: int) -> list[float | None]:
    """The probe's number for each token of a completion, None where it was not a number.

    Args:
        choice: of the completions API, as a dict or as `openai` gives it, or a `CompletionOutput` of vLLM.

    Raises:
        ValueError: the request did not ask for them, or the model has no probe.
    """
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else choice.logprobs
    listed = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else getattr(logprobs, "top_logprobs", logprobs)
    numbers = []
    for position, step in enumerate(listed or ()):
        value = (step or {}).get(f"token_id:{token_id}", (step or {}).get(token_id))
        if value is None:
            raise ValueError(
                f"Token {position} of the answer has no log-prob of id {token_id}: send the fields of probe_fields, "
                "with the id that the model's probe was given."
            )
        number = float(getattr(value, "logprob", value)) + OFFSET
        numbers.append(number if math.isfinite(number) and number >= -2 * LARGEST else None)
    if listed is None:
        raise ValueError("The answer has no log-probs: send the fields of probe_fields.")
    return numbers


def make_probe(settings: dict[str, Any]) -> Any:
    """The probe of `probe_overrides`, made here.

    Raises:
        ValueError: it cannot be imported.
    """
    module, _, name = settings["probe"].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The probe {settings['probe']} cannot be imported ({error}): install its package where vLLM runs, or add "
            "its folder to PYTHONPATH."
        ) from error
    return make(**settings["arguments"])
