"""Rollouts: one protocol (token ids in; token ids and log-probs out) and three engines behind it."""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names

if TYPE_CHECKING:
    from tokalign.generation.arguments import EngineArguments
    from tokalign.generation.engines import load_engine
    from tokalign.generation.protocol import Completion, Engine, SamplingParams, continue_from_prefixes

__all__ = [
    "Completion",
    "Engine",
    "EngineArguments",
    "SamplingParams",
    "continue_from_prefixes",
    "load_engine",
]
_HOMES = {
    "arguments": ("EngineArguments",),
    "engines": ("load_engine",),
    "protocol": ("Completion", "Engine", "SamplingParams", "continue_from_prefixes"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
