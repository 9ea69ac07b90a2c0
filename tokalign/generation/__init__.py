"""Rollouts: one protocol (token ids in; token ids and log-probs out) and three engines behind it."""

from tokalign.generation.protocol import (
    Completion,
    Engine,
    EngineArguments,
    SamplingParams,
    continue_from_prefixes,
    load_engine,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineArguments",
    "SamplingParams",
    "continue_from_prefixes",
    "load_engine",
]
