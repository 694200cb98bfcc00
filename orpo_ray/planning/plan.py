"""`orpo-ray plan`: estimate memory, time and cost of a recipe from the model's config, without weights or GPUs."""

from __future__ import annotations

import os
import socket
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.planning.cached_features import cached_features
from orpo_ray.planning.fit import CONTEXT, FRAGMENTATION, NCCL, Estimate, Memory, Planner, Setting
from orpo_ray.planning.gpus import GIB, Gpu, gpus_with_prices
from orpo_ray.planning.imports import import_transformers
from orpo_ray.planning.inputs import plan_inputs
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.states import STAGES
from orpo_ray.planning.step_time import parse_rates
from orpo_ray.planning.workload import Workload
from orpo_ray.tiny_models.build import resolve

# Seconds that the hub has to answer.
HUB_TIMEOUT = 3.0


@dataclass(frozen=True)
class Options:
    """Options of `orpo-ray plan`."""

    prices: Sequence[str] = ()
    """Prices per GPU and hour, each as `TYPE=DOLLARS`."""
    mfu: float | None = None
    """Model FLOPs of the recipe as a fraction of the GPU's peak; by default, estimated for each GPU type."""
    assume: Sequence[str] = ()
    """Rates of the estimate of time, each as `NAME=VALUE`."""
    pairs: int | None = None
    """Training pairs; by default, the number in the data check, or an assumption."""
    can_fork: bool = False
    """Whether a fork of this process may do a part of the work; see `in_second_process`."""


def plan(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Estimate memory, time and cost of a recipe.

    Args:
        recipe: the recipe.
        options: prices and other assumptions.

    Returns:
        The report that `orpo-ray plan --json` prints; memory in bytes, time in seconds and hours.

    Raises:
        UserError: an option is wrong, or the model's config cannot be read.
    """
    # Imports take seconds, in which the hub may answer.
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(_hub_is_missing, recipe.model)
        with silent_libraries():
            return _plan(recipe, options, hub)


def _plan(recipe: Recipe, options: Options, hub_is_missing: Future[bool]) -> dict[str, Any]:
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(
            "must be above 0 and at most 1", field="--mfu", value=options.mfu, fix="give a fraction such as 0.3"
        )
    if options.pairs is not None and options.pairs < 1:
        raise UserError(
            "must be at least 1", field="--pairs", value=options.pairs, fix="give the number of training pairs"
        )
    gpus, rates = gpus_with_prices(options.prices), parse_rates(options.assume)
    config, source = load_config(recipe.model, hub_is_missing.result())
    inputs = plan_inputs(recipe, config, rates, options.mfu, options.pairs, options.can_fork)
    planner, work, setting = inputs.planner, inputs.work, inputs.setting
    weights, microbatch_pairs = planner.weights, inputs.microbatch_pairs
    gpu_reports = [_report_gpu(planner, gpu, planner.resolved(setting, gpu.memory)) for gpu in gpus]
    assumptions = [*_recipe_assumptions(recipe, source), *work.assumptions, *_constant_assumptions()]
    if not isinstance(recipe.scaling.num_workers, int):
        assumptions.insert(0, _with_most_workers(recipe, planner, gpus, setting))
    if setting.checkpointing == "auto":
        assumptions.insert(0, _chosen_modes(planner, gpus, setting))
        setting = replace(setting, checkpointing="full")
    cached = None
    if recipe.model.vision_cache is not None:
        vision, sizes = planner.activations["none"].vision_work, (setting.workers, microbatch_pairs)
        cached = cached_features(vision, weights, work.shape, *sizes, gpus, rates).as_json
        assumptions.append("image features are computed in every step, as in the first epoch with model.vision_cache")
    candidates = [each["cheapest"] for each in gpu_reports if each["cheapest"]]
    return {
        "name": recipe.name,
        "model": {
            "id": recipe.model.id,
            "config": source,
            "parameters": weights.total,
            "trained": weights.trained,
            "dtype": str(inputs.dtype).removeprefix("torch."),
            "layout": inputs.layout,
        },
        "setting": asdict(setting),
        "memory": {str(stage): _round_bytes(planner.memory(replace(setting, stage=stage))) for stage in STAGES},
        "step": _report_step(recipe, work, planner, setting, microbatch_pairs),
        "gpus": gpu_reports,
        "cheapest": min(candidates, key=lambda candidate: candidate["cost"], default=None),
        "vision_cache": cached,
        "mfu": options.mfu,
        "rates": asdict(rates) | {"matmul": {gpu.name: rates.matmul or gpu.matmul for gpu in gpus}},
        "assumptions": assumptions,
    }


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Keep libraries from warning about a model that is never run."""
    import_transformers()
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def load_config(model_config: ModelConfig, hub_is_missing: bool | None = None) -> tuple[Any, str]:
    """Load the model's config from its folder or the hub, or from the known shapes if the hub cannot be reached.

    Args:
        model_config: `model` section of the recipe.
        hub_is_missing: the answer of `_hub_is_missing`, if it was asked.

    Returns:
        The config, and `config.json` or `known shape`.
    """
    from transformers import AutoConfig

    path = resolve(model_config.id)
    known = KNOWN_SHAPES.get(model_config.id)
    # A library would try again for a minute and more.
    offline = _hub_is_missing(model_config) if hub_is_missing is None else hub_is_missing
    try:
        return (
            AutoConfig.from_pretrained(path, revision=model_config.revision, local_files_only=offline),
            "config.json",
        )
    except (OSError, ValueError) as error:
        if known is None:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"cannot read the model's config: {first}",
                field="model.id",
                value=model_config.id,
                fix=f"give a folder, a name on the hub (with network access), or one of {', '.join(KNOWN_SHAPES)}",
            ) from None
        return known.config(), "known shape"


def _hub_is_missing(model_config: ModelConfig) -> bool:
    """Whether the hub cannot be reached. Not asked where it makes no difference."""
    is_known = model_config.id in KNOWN_SHAPES and not Path(model_config.id).is_dir()
    return is_known and not _hub_answers()


def _hub_answers() -> bool:
    """Whether the hub's address takes connections. Behind a proxy, only the proxy could tell: assume that it does."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=HUB_TIMEOUT).close()
    except OSError:
        return False
    return True


def _report_gpu(planner: Planner, gpu: Gpu, setting: Setting) -> dict[str, Any]:
    """Report how the recipe runs on a GPU type, and the cheapest setting for that type."""
    cheapest = planner.cheapest(gpu)
    return {
        "gpu": gpu.name,
        "memory_gib": gpu.memory,
        "price_per_hour": gpu.price,
        "fits": {str(stage): planner.fits(gpu, replace(setting, stage=stage)) for stage in STAGES},
        "recipe": _report_estimate(planner.estimate(gpu, setting)) if planner.fits(gpu, setting) else None,
        "cheapest": _report_estimate(cheapest) if cheapest else None,
        "mfu": planner.estimate(gpu, setting).mfu,
        "step_seconds": asdict(planner.step_time(gpu, setting)),
    }


def _round_bytes(memory: Memory) -> dict[str, int]:
    return {name: round(value) for name, value in asdict(memory).items()}


def _report_estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "gpu": estimate.gpu.name,
        **asdict(estimate.setting),
        "memory": round(estimate.memory.total),
        "hours": estimate.hours,
        "cost": estimate.cost,
        "mfu": estimate.mfu,
    }


def _report_step(
    recipe: Recipe, work: Workload, planner: Planner, setting: Setting, microbatch_pairs: int
) -> dict[str, Any]:
    shape = work.shape
    full = planner.activations[setting.checkpointing]
    step_shard = -(-recipe.optim.pairs_per_step // (setting.workers // planner.together))
    return {
        "pair": {
            "prompt": shape.prompt,
            "image": shape.images * shape.image_tokens,
            "chosen": shape.chosen,
            "rejected": shape.rejected,
            "tokens": full.tokens // full.pairs,
        },
        "source": work.source,
        "pairs": recipe.optim.pairs_per_step,
        "tokens": recipe.optim.pairs_per_step * full.tokens // full.pairs,
        "pairs_per_microbatch": microbatch_pairs,
        "microbatches_per_worker": -(-step_shard // microbatch_pairs),
        "workers_per_microbatch": planner.together,
        "training_pairs": work.pairs,
        "steps": planner.steps,
        "flops_per_step": planner.pair_flops * recipe.optim.pairs_per_step,
        "recomputed_flops_per_step": (planner.flops(setting.checkpointing) - planner.pair_flops)
        * recipe.optim.pairs_per_step,
    }


def _chosen_modes(planner: Planner, gpus: Sequence[Gpu], setting: Setting) -> str:
    """Say which gradient checkpointing `auto` means on each GPU type."""
    chosen: dict[str, list[str]] = {}
    for gpu in gpus:
        chosen.setdefault(planner.resolved(setting, gpu.memory).checkpointing, []).append(gpu.name)
    modes = "; ".join(f"{mode} on {', '.join(names)}" for mode, names in chosen.items())
    return f"model.gradient_checkpointing auto is {modes}; the memory table is for full"


def _with_most_workers(recipe: Recipe, planner: Planner, gpus: Sequence[Gpu], setting: Setting) -> str:
    """Say which of its numbers of workers a recipe is planned for, and what the most would take."""
    most = replace(setting, workers=recipe.scaling.max_workers)
    hours = {gpu.name: planner.estimate(gpu, planner.resolved(most, gpu.memory)).hours for gpu in gpus}
    times = ", ".join(f"{name} {each:.1f} h" for name, each in hours.items())
    return (
        f"scaling.num_workers is {most.workers} at most; the tables are for {setting.workers}, which needs the most "
        f"memory and time. With {most.workers} all the time: {times}"
    )


def _recipe_assumptions(recipe: Recipe, source: str) -> list[str]:
    assumptions = []
    if source == "known shape":
        reason = "offline mode" if os.environ.get("HF_HUB_OFFLINE") else "cannot reach the hub"
        assumptions.append(f"{recipe.model.id} has the config that is built into orpo-ray ({reason})")
    if recipe.scaling.sequence_parallel > 1:
        assumptions.append(
            f"scaling.sequence_parallel: {recipe.scaling.sequence_parallel} workers compute each micro-batch together, "
            "and nothing hides their all-to-alls. No group was run on GPUs"
        )
    if recipe.model.dtype == "auto":
        assumptions.append("model.dtype auto is bfloat16 on these GPUs")
    if recipe.optim.optimizer == "paged_adamw_8bit":
        assumptions.append("paged optimizer states are in CPU memory")
    if "cpu" in (recipe.deepspeed.offload_optimizer, recipe.deepspeed.offload_param):
        assumptions.append("offloading takes no time: the copies, and AdamW on the CPU, come on top of the step's time")
    return assumptions


def _constant_assumptions() -> list[str]:
    return [
        f"per GPU {CONTEXT / GIB:.1f} GiB for CUDA, {NCCL / GIB:.1f} GiB for NCCL if there are several GPUs, and "
        f"{FRAGMENTATION:.0%} of temporary memory for fragmentation",
        "prices per GPU and hour as shown (change with --price-per-hour)",
    ]
