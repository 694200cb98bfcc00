"""Whether reading the features of `model.vision_cache` takes longer than computing them, by GPU type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.model.loading import pick_attention
from orpo_ray.objective.base import load_objective
from orpo_ray.planning.activations import PairShape, batch_of, measure, unloaded_model
from orpo_ray.planning.gpus import GB, Gpu
from orpo_ray.planning.states import Weights
from orpo_ray.planning.step_time import Rates, microbatch_seconds
from orpo_ray.planning.work import Work
from orpo_ray.planning.workload import estimate_workload


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
    return CachedFeatures(size, read, computed, tuple(name for name, seconds in computed.items() if seconds < read))


def warning_of_run(recipe: Recipe, config: Any, gpu: Gpu) -> str | None:
    """Return a warning for a run on a GPU type where the cache is slower than the vision encoder; None elsewhere.

    Args:
        recipe: of the run, with `model.vision_cache`.
        config: the model's config in transformers.
        gpu: what it runs on.
    """
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    layout = pick_attention(recipe.model, config).layout
    shape = estimate_workload(recipe, config, None).shape
    batch = batch_of(shape, 1, config, load_objective(recipe).nll_span, layout)
    section = recipe.model.model_copy(update={"gradient_checkpointing": "none"})
    model = unloaded_model(section, config, dtype, layout)
    weights = Weights.of(model, section, dtype, config.get_text_config().hidden_size)
    vision = measure(section, config, dtype, layout, batch, True, "cuda").vision_work
    pairs = max(1, recipe.optim.tokens_per_microbatch // shape.tokens(layout))
    found = cached_features(vision, weights, shape, recipe.scaling.min_workers, pairs, [gpu], Rates())
    return f"model.vision_cache: {slower_than_computing(found)}; remove it" if found.slower_on else None


def slower_than_computing(found: CachedFeatures) -> str:
    """Say where reading is slower, and by how much."""
    times = ", ".join(f"{name} {1000 * found.compute_seconds[name]:.3g} ms" for name in found.slower_on)
    return (
        f"by the estimate of `orpo-ray plan`, reading the features of a pair ({found.bytes_per_pair / 1e6:,.1f} MB) "
        f"takes {1000 * found.read_seconds:.3g} ms and is slower than computing them: {times}"
    )
