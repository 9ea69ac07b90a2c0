"""Token routing (R2R, arXiv 2505.21600): a small model writes, and the large one takes the tokens that matter.

Names are imported at first use, so that neither vLLM nor a web server has to be installed for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokalign.routing.backend import RoutedBackend, RoutedStats, RoutedToken
    from tokalign.routing.calibration import Calibration, calibrate, calibrate_router
    from tokalign.routing.features import RouterDataset
    from tokalign.routing.generator import RoutedGenerator
    from tokalign.routing.model import TokenRouter, TokenRouterConfig
    from tokalign.routing.policies import (
        AlwaysLLM,
        EntropyPolicy,
        NeverLLM,
        RandomPolicy,
        ReplayPolicy,
        RouterPolicy,
        RoutingPolicy,
    )

_MODULES = {
    "backend": ("RoutedBackend", "RoutedStats", "RoutedToken"),
    "calibration": ("Calibration", "calibrate", "calibrate_router"),
    "features": ("RouterDataset",),
    "generator": ("RoutedGenerator",),
    "model": ("TokenRouter", "TokenRouterConfig"),
    "policies": (
        *("AlwaysLLM", "EntropyPolicy", "NeverLLM", "RandomPolicy", "ReplayPolicy", "RouterPolicy", "RoutingPolicy"),
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AlwaysLLM",
    "Calibration",
    "EntropyPolicy",
    "NeverLLM",
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
    "calibrate",
    "calibrate_router",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"tokalign.routing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tokalign.routing' has no attribute {name!r}")
