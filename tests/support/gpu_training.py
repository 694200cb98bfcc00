"""One worker that trains a tiny model on a device, through the real engine, for the tests that need a GPU."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.training.engine import make_engine
from orpo_ray.training.sharded_loading import load_for_training
from support.engine_memory import end_engine
from support.pairs_by_hand import NORM, make_row

STEPS = 4
# (images, prompt, chosen, rejected) of the pairs of a row.
ROW = [(1, 12, 9, 7), (2, 20, 5, 11), (1, 6, 14, 4)]


def recipe_on(device: torch.device, family: str = "smolvlm", **sections: Any) -> Recipe:
    """Return a recipe for the tiny model of a family, in the type of the device."""
    raw: dict[str, Any] = {
        "name": "on-device",
        "model": {
            "id": f"orpo-ray/tiny-{family}",
            "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "fused_layers": True,  # also on a CPU
        },
        "data": {"train": "none"},
        "optim": {"learning_rate": 1e-2, "warmup": 0, "pairs_per_step": len(ROW)},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_recipe(raw)


class Training:
    """Model, batch and engine."""

    def __init__(self, recipe: Recipe, device: torch.device, family: str = "smolvlm") -> None:
        self.model = PairModel(load_for_training(recipe, device), NORM)
        self.engine: Any = make_engine(self.model, recipe, STEPS, 1)
        self.batch = row_on(device, self.model, family)

    def step(self) -> torch.Tensor:
        """Make a step, and return the loss on the device."""
        loss, _ = ORPO(0.1).loss(self.engine.forward(self.batch), self.batch.weights, Normaliser(float(len(ROW))))
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def losses(self, steps: int) -> list[float]:
        """Make steps, and return their losses."""
        return [float(self.step()) for _ in range(steps)]

    def close(self) -> None:
        """Free the engine's memory."""
        end_engine(self.engine)


def row_on(device: torch.device, model: PairModel, family: str) -> PairBatch:
    """Return a row of pairs with images, on a device."""
    return build_batch(make_row(family, ROW), "response", model.layout, collate=model.family.collate).to(device)


def resumed(recipe: Recipe, device: torch.device, folder: Path) -> tuple[list[float], list[float]]:
    """Return the losses of steps 3 and 4, and those of the same steps from a checkpoint of step 2."""
    first = Training(recipe, device)
    first.losses(2)
    first.engine.save(folder)
    tail = first.losses(2)
    first.close()
    second = Training(recipe, device)
    second.engine.load(folder)
    again = second.losses(2)
    second.close()
    return tail, again


class CountOps(TorchDispatchMode):
    """Counts operations by name, and those after which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func._opname] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        """Calls of attention kernels in forward passes."""
        return sum(n for name, n in self.ops.items() if "attention" in name or "varlen" in name if "back" not in name)


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that grows by a line for each operation after which the host waits for the device.

    CUDA reports them itself, except waits for an event and for the whole device. On a CPU, reading a number and finding
    the positions of a mask stand for them.
    """
    found: list[str] = []
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, counted_waits() as waits:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += waits
        found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
        return
    with CountOps() as counted:
        yield found
    for name in ("_local_scalar_dense", "nonzero"):
        found += [name] * counted.ops[name]


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Yield a list that grows by a line, with the place, for each `synchronize` of an event and of a device."""
    found: list[str] = []

    def counted(name: str, wait: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: Any, **kwargs: Any) -> None:
            caller = sys._getframe(1)
            found.append(f"{caller.f_code.co_filename}:{caller.f_lineno} {name}")
            wait(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch.cuda.Event, "Event.synchronize"), (torch.cuda, "cuda.synchronize")):
            patch.setattr(owner, "synchronize", counted(name, owner.synchronize))
        yield found
