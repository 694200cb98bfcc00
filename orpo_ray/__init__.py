"""Align vision-language models to image-text preferences with ORPO, on Ray and DeepSpeed.

The functions below are those of the commands. They are imported when they are first used, so `import orpo_ray` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ray.api import check_data, evaluate, export, iterate, plan, synthesize, train, tune
    from orpo_ray.config.recipe import Recipe

__version__ = "0.2.0.dev0"
__all__ = [
    "Recipe",
    "__version__",
    "check_data",
    "evaluate",
    "export",
    "iterate",
    "plan",
    "synthesize",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "orpo_ray.config.recipe" if name == "Recipe" else "orpo_ray.api"
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
