"""Trainers, one file a method: a TRL configuration and a TRL trainer with as little changed as the method needs."""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names
from tokalign.trainers.registry import TRAINERS

if TYPE_CHECKING:
    from tokalign.trainers.critical_token_dpo import CriticalTokenDPOConfig, CriticalTokenDPOTrainer
    from tokalign.trainers.critical_token_entropy import CriticalTokenEntropyCallback
    from tokalign.trainers.structured_grpo import StructuredGRPOConfig, StructuredGRPOTrainer
    from tokalign.trainers.token_credit_grpo import TokenCreditGRPOConfig, TokenCreditGRPOTrainer
    from tokalign.trainers.treg import TRegConfig, TRegTrainer

__all__ = [
    "CriticalTokenDPOConfig",
    "CriticalTokenDPOTrainer",
    "CriticalTokenEntropyCallback",
    "StructuredGRPOConfig",
    "StructuredGRPOTrainer",
    "TRegConfig",
    "TRegTrainer",
    "TokenCreditGRPOConfig",
    "TokenCreditGRPOTrainer",
]
_HOMES = {"critical_token_entropy": ("CriticalTokenEntropyCallback",), **{row.module: row.classes for row in TRAINERS}}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
