"""Who writes the next token: one file a policy, all behind `protocol.RoutingPolicy`.

`router` is the method (R2R, arXiv 2505.21600). `entropy` and `random` are its baselines at equal LLM rate, `alone` the
two models by themselves, `hysteresis` (R-Stitch), `value` (CITER) and `call` (RelayLLM) are other published ways to
decide, `replay` repeats given decisions to measure speed. `named` makes a policy from a command's options.
"""

from tokalign.routing.decode.policies.alone import AlwaysLLM, NeverLLM
from tokalign.routing.decode.policies.call import CallPolicy
from tokalign.routing.decode.policies.entropy import EntropyPolicy
from tokalign.routing.decode.policies.hysteresis import HysteresisPolicy
from tokalign.routing.decode.policies.named import named_policy, prompts_of_labels
from tokalign.routing.decode.policies.protocol import NextTokens, RoutingPolicy
from tokalign.routing.decode.policies.random import RandomPolicy
from tokalign.routing.decode.policies.replay import ReplayPolicy
from tokalign.routing.decode.policies.router import RouterPolicy
from tokalign.routing.decode.policies.value import ValuePolicy

__all__ = [
    "AlwaysLLM",
    "CallPolicy",
    "EntropyPolicy",
    "HysteresisPolicy",
    "NeverLLM",
    "NextTokens",
    "RandomPolicy",
    "ReplayPolicy",
    "RouterPolicy",
    "RoutingPolicy",
    "ValuePolicy",
    "named_policy",
    "prompts_of_labels",
]
