"""Whether reading the features of `model.vision_cache` takes longer than computing them, by GPU type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.planning.activations import PairShape
from orpo_ray.planning.gpus import GB, Gpu
from orpo_ray.planning.inputs import StepInputs
from orpo_ray.planning.states import Weights
from orpo_ray.planning.step_time import Rates, microbatch_seconds
from orpo_ray.planning.work import Work


@dataclass(frozen=True)
class CachedFeatures:
    """What the features of a pair's images cost."""

    bytes_per_pair: int
    read_seconds: float
    """To read those of a pair from the disk, which the GPUs of a node share."""
    compute_seconds: dict[str, float]
    """To compute those of a pair, by GPU type."""
    slower_on: tuple[str, ...]
    """GPU types that compute them faster than they are read."""
    break_even_gb: dict[str, float]
    """GB per second of a node's disk at which reading is as fast as computing, by GPU type."""

    @property
    def as_json(self) -> dict[str, Any]:
        """For the report of a plan."""
        return asdict(self) | {"slower_on": list(self.slower_on)}


def cached_features(
    vision: Work,
    weights: Weights,
    shape: PairShape,
    workers: int,
    pairs: int,
    gpus: Sequence[Gpu],
    rates: Rates,
) -> CachedFeatures:
    """Compare reading with computing.

    Args:
        vision: the work of the vision encoder for one pair.
        weights: sizes of the model's parameters.
        shape: of a pair. The connector gives as many numbers for each image token as the language model is wide.
        workers: of the run.
        pairs: of a micro-batch, which are encoded together.
        gpus: the GPU types.
        rates: what is assumed about speed.
    """
    size = shape.images * shape.image_tokens * weights.hidden * weights.element
    readers = min(workers, rates.gpus_per_node)
    read = size * readers / (rates.disk_gb * GB)
    computed = {gpu.name: sum(microbatch_seconds(vision, weights, gpu, rates, pairs)) / pairs for gpu in gpus}
    slower = tuple(name for name, seconds in computed.items() if seconds < read)
    even = {name: size * readers / GB / seconds if seconds else 0.0 for name, seconds in computed.items()}
    return CachedFeatures(size, read, computed, slower, even)


def cached_features_of_run(recipe: Recipe, config: Any, gpu: Gpu, workers: int, workers_of_node: int) -> CachedFeatures:
    """Compare reading with computing for a run as it is, by the figures of its plan.

    Args:
        recipe: of the run.
        config: the model's config in transformers.
        gpu: what it runs on.
        workers: of the run.
        workers_of_node: those that share a disk.
    """
    step = StepInputs.of(recipe, config, workers)
    rates = Rates(gpus_per_node=workers_of_node)
    vision = step.measure("none").vision_work
    return cached_features(vision, step.weights, step.work.shape, workers, step.microbatch_pairs, [gpu], rates)


def warning_of_run(found: CachedFeatures, workers_of_node: int) -> str | None:
    """Return a warning for a run whose GPU computes the features in less time than a usual disk needs, or None."""
    if not found.slower_on:
        return None
    (gpu,) = found.slower_on
    readers = f"the {workers_of_node} workers of a node" if workers_of_node > 1 else "a worker"
    return (
        f"model.vision_cache: by the estimate of `orpo-ray plan`, {gpu} computes the features of a pair "
        f"({found.bytes_per_pair / 1e6:,.1f} MB) in {1000 * found.compute_seconds[gpu]:.3g} ms; if the disk reads less "
        f"than {found.break_even_gb[gpu]:.3g} GB/s for {readers}, remove the cache"
    )
