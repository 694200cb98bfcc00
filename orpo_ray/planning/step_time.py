"""Seconds of an optimizer step on a GPU type, added up from its parts. docs/plan.md gives the sources of the rates.

Each matrix product takes the longer of its FLOPs at the rate that its shape reaches and its bytes at the memory's rate,
so that few rows per micro-batch stream weights rather than compute. All other operations move memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from orpo_ray.errors import UserError
from orpo_ray.planning.gpus import GB, GBIT, Gpu
from orpo_ray.planning.states import Stage, Weights
from orpo_ray.planning.traffic import collectives
from orpo_ray.planning.work import Matmul, Work

# Output tiles of the library's kernels, [rows, columns], and the relative speed of kernels with such tiles. Where there
# are few tiles, several processors share one, each with at least this much of the inner size.
TILES = (((128, 128), 1.0), ((64, 64), 0.55), ((16, 128), 0.2))
LEAST_SPLIT = 512
# Bytes that one trained weight moves in the optimizer step: AdamW reads weight, gradient and both moments in float32
# and writes all but the gradient (28); the gradient becomes float32 and is read for its norm (10), and the weight is
# copied to bf16 (6). Moments in 8 bits save 12.
OPTIMIZER_BYTES = {"adamw": 44.0, "adamw_8bit": 32.0, "paged_adamw_8bit": 32.0}


@dataclass(frozen=True)
class Rates:
    """What a plan assumes about speed; each can be given as `--assume NAME=VALUE`."""

    matmul: float | None = None
    """Fraction of the peak that large matrix products reach; by default, each GPU type's."""
    attention: float = 0.4
    """The same for fused attention, causal masks not subtracted."""
    float32: float = 1 / 16
    """Peak of float32 products, as a fraction of the bf16 peak."""
    memory: float = 0.8
    """Fraction of the memory's bandwidth that is reached."""
    dequantization: float = 0.3
    """Fraction of the memory's bandwidth that the dequantization of 4-bit weights reaches."""
    kernel_us: float = 10.0
    """Microseconds that the CPU needs to start a kernel, autograd and Python included."""
    link: float = 0.7
    """Fraction of the bandwidth between GPUs that collectives reach."""
    link_gb: float | None = None
    """GB per second and direction between two GPUs of a node; by default, each GPU type's."""
    network_gbit: float | None = None
    """Gbit per second between two nodes; by default, each GPU type's."""
    gpus_per_node: float = 8
    """GPUs of a node."""
    overlap: float = 0.5
    """Fraction of the communication that is hidden behind computation, under ZeRO 2 and 3. ZeRO 0 and 1 hide none."""
    imbalance: float = 0.05
    """Additional time of the slowest of several workers, for which the others wait."""
    disk_gb: float = 2.0
    """GB per second that a node reads from the disk of `model.vision_cache`."""


FRACTIONS = ("matmul", "attention", "float32", "memory", "dequantization", "link")


def parse_rates(given: Sequence[str]) -> Rates:
    """Parse `NAME=VALUE` options. Raises UserError."""
    rates = Rates()
    names = [each.name for each in fields(Rates)]
    for each in given:
        name, _, text = each.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        lowest, highest = 0.0, 1.0 if name in FRACTIONS or name == "overlap" else 1e6
        positive = value > 0 or (name in ("overlap", "imbalance", "kernel_us") and value == 0)
        if name not in names or not (lowest <= value <= highest and positive):
            wrong = "unknown assumption" if name not in names else f"must be above 0 and at most {highest:g}"
            fix = f"give NAME=VALUE with one of {', '.join(names)}"
            raise UserError(wrong, field="--assume", value=each, fix=fix)
        rates = replace(rates, **{name: value})
    return rates


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, on the worker that takes longest."""

    matmul: float
    attention: float
    memory: float
    """All other operations on the GPU: norms, activations, adding up gradients."""
    dequantization: float
    launch: float
    """Waiting for the CPU to start kernels."""
    optimizer: float
    communication: float
    """What is not hidden behind computation."""
    imbalance: float
    """Waiting for the slowest worker."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Load:
    """What a setting makes a worker do in a step."""

    stage: Stage
    workers: int
    pairs: int
    """Pairs of the worker, or of its group."""
    microbatch_pairs: int
    """Pairs of a full micro-batch."""
    together: int = 1
    """Workers of a group, which compute each micro-batch together."""

    @property
    def microbatches(self) -> list[int]:
        """The pairs of each micro-batch."""
        full, rest = divmod(self.pairs, self.microbatch_pairs)
        return [self.microbatch_pairs] * full + [rest] * (rest > 0)


Parts = tuple[float, float, float, float, float]
"""Seconds of a micro-batch: products, attention, other operations, dequantization, waiting for the CPU."""


def step_time(
    work: Work,
    weights: Weights,
    optimizer: str,
    load: Load,
    gpu: Gpu,
    rates: Rates,
    known: dict[tuple[Gpu, int], Parts] | None = None,
) -> StepTime:
    """Return the seconds of an optimizer step.

    Args:
        work: the work of one pair.
        weights: sizes of the parameters.
        optimizer: the recipe's `optim.optimizer`.
        load: what the setting makes a worker do.
        gpu: the GPU type.
        rates: what is assumed.
        known: micro-batches of this work by GPU type and number of pairs, computed before; new ones are added.
    """
    known = {} if known is None else known
    for pairs in set(load.microbatches):
        if (gpu, pairs) not in known:
            known[gpu, pairs] = microbatch_seconds(work, weights, gpu, rates, pairs)
    parts = (sum(known[gpu, pairs][part] for pairs in load.microbatches) for part in range(5))
    products, attention, memory, dequantization, launch = parts
    computing = products + attention + memory + dequantization + launch
    shard = weights.trained / (load.workers if load.stage else 1)
    update = shard * OPTIMIZER_BYTES[optimizer] / (gpu.bandwidth * rates.memory)
    exposed = 0.0
    if load.workers > 1:
        traffic = collectives(weights, load.stage, len(load.microbatches))
        sending = sum(each.wire_bytes(load.workers) for each in traffic) / _link(gpu, rates, load.workers)
        hidden = min(sending * rates.overlap, computing) if load.stage >= 2 else 0.0
        exposed = sending - hidden
    if load.together > 1:  # attention waits for its all-to-alls
        sent = load.pairs * work.exchanged * (load.together - 1) / load.together
        exposed += sent / _link(gpu, rates, load.together)
    waiting = computing * rates.imbalance if load.workers > 1 else 0.0
    return StepTime(products, attention, memory, dequantization, launch, update, exposed, waiting)


def _link(gpu: Gpu, rates: Rates, workers: int) -> float:
    """Bytes per second and GPU: a ring over several nodes is as fast as the slower of the two links."""
    inside = gpu.link if rates.link_gb is None else rates.link_gb * GB
    between = gpu.network if rates.network_gbit is None else rates.network_gbit * GBIT
    return rates.link * (inside if workers <= rates.gpus_per_node else min(inside, between))


def microbatch_seconds(work: Work, weights: Weights, gpu: Gpu, rates: Rates, pairs: int) -> Parts:
    """Return the seconds of a micro-batch by their parts, given the work of one of its pairs."""
    peak = gpu.flops * (rates.float32 if weights.element == 4 else 1.0)
    bandwidth = gpu.bandwidth * rates.memory
    products = sum(
        count * _product_seconds(matmul.with_pairs(pairs), weights.element, gpu, peak, rates)
        for matmul, count in work.matmuls.items()
    )
    attention = work.attention_flops * pairs / (peak * rates.attention)
    memory = (work.moved * pairs + work.moved_once) / bandwidth
    # Each use of a 4-bit weight reads half a byte and writes a whole one of the dtype.
    packed = {weight.elements for weight in weights.each if weight.quantized}
    used = {matmul.weight: 0 for matmul in work.matmuls if matmul.weight in packed}
    for matmul, count in work.matmuls.items():
        if matmul.weight in packed:
            used[matmul.weight] += count
    unpacked = sum(elements * count for elements, count in used.items()) * (0.5 + weights.element)
    dequantization = unpacked / (gpu.bandwidth * rates.dequantization)
    kernels = work.kernels + sum(used.values())
    computing = products + attention + memory + dequantization
    # Kernels queue up while the GPU is busy, so it waits only where starting them takes longer than running them.
    return products, attention, memory, dequantization, max(0.0, kernels * rates.kernel_us * 1e-6 - computing)


def _product_seconds(matmul: Matmul, element: int, gpu: Gpu, peak: float, rates: Rates) -> float:
    """Seconds of a product with the best tile size: tiles that do not fill the processors leave some of them idle."""
    moved = element * matmul.batch * (matmul.m * matmul.k + matmul.k * matmul.n + matmul.m * matmul.n)
    fraction = 0.0
    for (rows, columns), speed in TILES:
        tiles = matmul.batch * math.ceil(matmul.m / rows) * math.ceil(matmul.n / columns)
        splits = max(1, min(matmul.k // LEAST_SPLIT, gpu.processors // tiles))
        rounds = math.ceil(tiles * splits / gpu.processors)
        used = matmul.batch * matmul.m * matmul.n * splits / (rounds * gpu.processors * rows * columns)
        fraction = max(fraction, used * speed)
    reached = peak * (gpu.matmul if rates.matmul is None else rates.matmul) * fraction
    return max(matmul.flops / reached, moved / (gpu.bandwidth * rates.memory))
