"""Rollouts: one protocol (token ids in; token ids and log-probs out) and three engines behind it."""

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
