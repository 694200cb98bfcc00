"""GPU types: what their data sheets say, the links between them, and the price per hour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orpo_ray.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU type."""

    name: str
    memory: float
    """Memory in GiB, as nvidia-smi shows it."""
    flops: float
    """Peak FLOPs per second of dense bf16 matrix products with float32 accumulation."""
    bandwidth: float
    """Bytes per second of its memory."""
    processors: int
    """Streaming multiprocessors."""
    matmul: float
    """Fraction of the peak that large matrix products reach at the GPU's power limit. An assumption, measured on an
    H200 only (`benchmarks/gpu.py`)."""
    link: float
    """Bytes per second and direction to another GPU of its node: NVLink, or PCIe."""
    network: float
    """Bytes per second and direction between two nodes, all adapters of a node together. An assumption."""
    price: float
    """US$ per hour."""


GB, GBIT = 1e9, 1e9 / 8
# Memory, peak, bandwidth, processors and link are from NVIDIA's data sheets; docs/plan.md names them. Networks are
# those of a large cloud's nodes with eight of these GPUs. Prices are assumptions, in round figures for one GPU on
# demand; clouds differ by more than a factor of two.
GPUS = (
    #                 GiB    peak    memory      SMs  matmul  link      network       $/h
    Gpu("L4",         22.5,  121e12, 300 * GB,   58,  0.50,   32 * GB,  100 * GBIT,   0.80),
    Gpu("A10G",       22.5,  70e12,  600 * GB,   80,  0.80,   32 * GB,  100 * GBIT,   1.20),
    Gpu("RTX-4090",   24.0,  165e12, 1008 * GB,  128, 0.85,   32 * GB,  25 * GBIT,    0.60),
    Gpu("A100-40GB",  39.6,  312e12, 1555 * GB,  108, 0.80,   300 * GB, 400 * GBIT,   1.60),
    Gpu("L40S",       45.0,  362e12, 864 * GB,   142, 0.60,   32 * GB,  400 * GBIT,   1.80),
    Gpu("A100-80GB",  79.3,  312e12, 2039 * GB,  108, 0.80,   300 * GB, 800 * GBIT,   2.20),
    Gpu("H100-80GB",  79.6,  989e12, 3350 * GB,  132, 0.73,   450 * GB, 3200 * GBIT,  3.20),
    Gpu("H200-141GB", 140.4, 989e12, 4800 * GB,  132, 0.73,   450 * GB, 3200 * GBIT,  4.00),
)  # fmt: skip


def gpus_with_prices(prices: Sequence[str]) -> tuple[Gpu, ...]:
    """Return all GPU types, with the user's prices (`TYPE=DOLLARS`) where given. Raises UserError."""
    known = {gpu.name.lower(): gpu for gpu in GPUS}
    for given in prices:
        name, _, amount = given.partition("=")
        found = [key for key in known if key.startswith(name.lower())] if name else []
        if len(found) != 1 and name.lower() not in known:
            names = ", ".join(gpu.name for gpu in GPUS)
            raise UserError(
                "unknown or ambiguous GPU type", field="--price-per-hour", value=given, fix=f"use one of {names}"
            )
        try:
            price = float(amount)
        except ValueError:
            price = -1.0
        if not 0 <= price < 1e6:
            raise UserError(
                "invalid price", field="--price-per-hour", value=given, fix="give TYPE=DOLLARS, such as H100=2.50"
            )
        key = name.lower() if name.lower() in known else found[0]
        known[key] = replace(known[key], price=price)
    return tuple(known.values())


def gpu_named(name: str) -> Gpu | None:
    """Return the GPU type of a device by its name, such as `NVIDIA H100 80GB HBM3`; None if the plan has no such type.

    Of types that differ by their memory only, the one in the name, or else the largest.
    """
    words = set(name.replace(" ", "-").split("-"))
    found = [gpu for gpu in GPUS if {word for word in gpu.name.split("-") if not word.endswith("GB")} <= words]
    return max(found, key=lambda gpu: (set(gpu.name.split("-")) <= words, gpu.memory), default=None)


def is_type(name: str, accelerator: str) -> bool:
    """Whether a GPU type of the plan is one of Ray's accelerator types, such as `A100-80G` or `H100`."""
    plan, ray = (text.lower().replace("gb", "").removesuffix("g").split("-") for text in (name, accelerator))
    plan[0], ray[0] = plan[0].removesuffix("g"), ray[0].removesuffix("g")  # A10G
    return plan[0] == ray[0] and (len(ray) == 1 or len(plan) == 1 or plan[1:] == ray[1:])
