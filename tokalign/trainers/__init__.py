"""Trainers, one file a method: a TRL configuration and a TRL trainer with as little changed as the method needs."""

from tokalign.trainers.critical_token_dpo import CriticalTokenDPOConfig, CriticalTokenDPOTrainer
from tokalign.trainers.critical_token_entropy import CriticalTokenEntropyCallback
from tokalign.trainers.structured_grpo import StructuredGRPOConfig, StructuredGRPOTrainer
from tokalign.trainers.treg import TRegConfig, TRegTrainer

__all__ = [
    "CriticalTokenDPOConfig",
    "CriticalTokenDPOTrainer",
    "CriticalTokenEntropyCallback",
    "StructuredGRPOConfig",
    "StructuredGRPOTrainer",
    "TRegConfig",
    "TRegTrainer",
]
