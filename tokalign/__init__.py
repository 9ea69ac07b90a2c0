"""tokalign: token-level alignment and reasoning recipes on the Hugging Face trainer stack.

A *token signal* is one number per completion token, bound to token ids. Everything here makes signals, trains on them,
acts on them while decoding, or shows them; `tokalign.signals`, `tokalign.losses`, `tokalign.trainers`,
`tokalign.routing`, `tokalign.view` are the rooms.
"""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names
from tokalign.trainers.registry import TRAINERS

if TYPE_CHECKING:
    from tokalign.rewards.structured.reward import StructuredReward
    from tokalign.routing.decode.generator import RoutedGenerator
    from tokalign.routing.router.model import TokenRouter
    from tokalign.routing.router.trainer import RouterConfig, RouterTrainer
    from tokalign.trainers.critical_token_dpo import CriticalTokenDPOConfig, CriticalTokenDPOTrainer
    from tokalign.trainers.critical_token_entropy import CriticalTokenEntropyCallback
    from tokalign.trainers.structured_grpo import StructuredGRPOConfig, StructuredGRPOTrainer
    from tokalign.trainers.token_credit_grpo import TokenCreditGRPOConfig, TokenCreditGRPOTrainer
    from tokalign.trainers.treg import TRegConfig, TRegTrainer

__version__ = "0.2.0"
__all__ = [
    "CriticalTokenDPOConfig",
    "CriticalTokenDPOTrainer",
    "CriticalTokenEntropyCallback",
    "RoutedGenerator",
    "RouterConfig",
    "RouterTrainer",
    "StructuredGRPOConfig",
    "StructuredGRPOTrainer",
    "StructuredReward",
    "TRegConfig",
    "TRegTrainer",
    "TokenCreditGRPOConfig",
    "TokenCreditGRPOTrainer",
    "TokenRouter",
]
_HOMES = {
    "rewards.structured.reward": ("StructuredReward",),
    "routing.decode.generator": ("RoutedGenerator",),
    "routing.router.model": ("TokenRouter",),
    "routing.router.trainer": ("RouterConfig", "RouterTrainer"),
    "trainers.critical_token_entropy": ("CriticalTokenEntropyCallback",),
    **{f"trainers.{row.module}": row.classes for row in TRAINERS},
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
