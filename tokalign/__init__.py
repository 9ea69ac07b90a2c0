"""tokalign: token-level alignment and reasoning recipes on the Hugging Face trainer stack.

A *token signal* is one number per completion token, bound to token ids. Everything here makes signals, trains on them,
acts on them while decoding, or shows them; `tokalign.signals`, `tokalign.losses`, `tokalign.trainers`,
`tokalign.routing`, `tokalign.view` are the rooms.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokalign.rewards import StructuredReward
    from tokalign.routing import RoutedGenerator, TokenRouter
    from tokalign.routing.router.trainer import RouterConfig, RouterTrainer
    from tokalign.trainers import (
        CriticalTokenDPOConfig,
        CriticalTokenDPOTrainer,
        CriticalTokenEntropyCallback,
        StructuredGRPOConfig,
        StructuredGRPOTrainer,
        TRegConfig,
        TRegTrainer,
    )

__version__ = "0.1.0"
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
    "TokenRouter",
]


def __getattr__(name: str) -> Any:
    """Trainers are imported at first use: TRL takes seconds, and most of the package does not need it."""
    if name == "StructuredReward":
        from tokalign.rewards import StructuredReward

        return StructuredReward
    if name in ("RoutedGenerator", "TokenRouter"):
        from tokalign import routing

        return getattr(routing, name)
    if name in ("RouterConfig", "RouterTrainer"):
        from tokalign.routing.router import trainer

        return getattr(trainer, name)
    if name in __all__:
        from tokalign import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module 'tokalign' has no attribute {name!r}")
