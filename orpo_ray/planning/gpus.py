"""GPU types: memory, arithmetic, and what an hour of one costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orpo_ray.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """memory: GiB that nvidia-smi shows. flops: peak of bf16 matrix products a second, dense. price: US$ an hour."""

    name: str
    memory: float
    flops: float
    price: float


# Memory and peak by NVIDIA's data sheets (bf16, dense, without sparsity). Prices are assumed, round figures for one GPU
# on demand: clouds differ by more than twice, so give your own.
GPUS = (
    Gpu("L4", 22.5, 121e12, 0.80),
    Gpu("A10G", 22.5, 70e12, 1.20),
    Gpu("RTX-4090", 24.0, 165e12, 0.60),
    Gpu("A100-40GB", 39.6, 312e12, 1.60),
    Gpu("L40S", 45.0, 362e12, 1.80),
    Gpu("A100-80GB", 79.3, 312e12, 2.20),
    Gpu("H100-80GB", 79.6, 989e12, 3.20),
    Gpu("H200-141GB", 140.4, 989e12, 4.00),
)


def priced(prices: Sequence[str]) -> tuple[Gpu, ...]:
    """The types with the user's prices, each `TYPE=DOLLARS`. Raises UserError."""
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    for given in prices:
        name, _, amount = given.partition("=")
        found = [key for key in known if key.startswith(name.lower())] if name else []
        if len(found) != 1 and name.lower() not in known:
            names = ", ".join(gpu.name for gpu in GPUS)
            raise UserError(
                "no GPU type of this name, or several", field="--price-per-hour", value=given, fix=f"use one of {names}"
            )
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if not 0 <= price < 1e6:
            raise UserError("is not TYPE=DOLLARS", field="--price-per-hour", value=given, fix="for example H100=2.50")
        key = name.lower() if name.lower() in known else found[0]
        known[key] = replace(known[key], price=price)
    return tuple(known.values())
