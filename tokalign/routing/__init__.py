"""Token routing (R2R, arXiv 2505.21600): a small model writes, and the large one takes the tokens that matter.

Names are imported at first use, so that neither vLLM nor a web server has to be installed for the rest.
"""

from typing import TYPE_CHECKING

from tokalign.lazy import lazy_names

if TYPE_CHECKING:
    from tokalign.routing.decode.backend import RoutedBackend, RoutedStats, RoutedToken
    from tokalign.routing.decode.generator import RoutedGenerator
    from tokalign.routing.decode.policies import (
        AlwaysLLM,
        CallPolicy,
        EntropyPolicy,
        HysteresisPolicy,
        NeverLLM,
        NextTokens,
        RandomPolicy,
        ReplayPolicy,
        RouterPolicy,
        RoutingPolicy,
        ValuePolicy,
    )
    from tokalign.routing.router.calibration import Calibration, calibrate, calibrate_router
    from tokalign.routing.router.features import RouterDataset
    from tokalign.routing.router.model import TokenRouter, TokenRouterConfig

__all__ = [
    "AlwaysLLM",
    "Calibration",
    "CallPolicy",
    "EntropyPolicy",
    "HysteresisPolicy",
    "NeverLLM",
    "NextTokens",
    "RandomPolicy",
    "ReplayPolicy",
    "RoutedBackend",
    "RoutedGenerator",
    "RoutedStats",
    "RoutedToken",
    "RouterDataset",
    "RouterPolicy",
    "RoutingPolicy",
    "TokenRouter",
    "TokenRouterConfig",
    "ValuePolicy",
    "calibrate",
    "calibrate_router",
]
_HOMES = {
    "decode.backend": ("RoutedBackend", "RoutedStats", "RoutedToken"),
    "router.calibration": ("Calibration", "calibrate", "calibrate_router"),
    "router.features": ("RouterDataset",),
    "decode.generator": ("RoutedGenerator",),
    "router.model": ("TokenRouter", "TokenRouterConfig"),
    "decode.policies": (
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
    ),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
