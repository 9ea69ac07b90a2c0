"""Trainers, one file a method: a TRL configuration and a TRL trainer with as little changed as the method needs."""

from tokalign.trainers.critical_token_dpo import (
    CriticalTokenDPOConfig,
    CriticalTokenDPOTrainer,
)

__all__ = ["CriticalTokenDPOConfig", "CriticalTokenDPOTrainer"]
