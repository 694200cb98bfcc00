"""`orpo-ray plan`: a recipe's memory, time and price before a GPU is rented, from the model's config alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.families.cross_attention import CrossAttentionFamily
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import pick_attention
from orpo_ray.planning.activations import Activations, batch_of, measure, unloaded_model
from orpo_ray.planning.fit import CONTEXT, FRAGMENTATION, MFU, NCCL, Fitting, Memory, Planner, Setting
from orpo_ray.planning.gpus import GIB, priced
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.states import STAGES, Weights
from orpo_ray.planning.step import Workload, pairs_at_once, workload
from orpo_ray.tiny_models.build import resolve

# Pairs of a micro-batch that are really run through; more of them only repeat these.
PAIRS_RUN = 1


@dataclass(frozen=True)
class Options:
    """What a user may say besides the recipe. prices: `TYPE=DOLLARS` each. pairs: in the training set."""

    prices: Sequence[str] = ()
    mfu: float = MFU
    pairs: int | None = None


def plan(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Everything that `orpo-ray plan` says, as plain numbers; memory in bytes. Raises UserError."""
    if not 0 < options.mfu <= 1:
        raise UserError("must be above 0 and at most 1", field="--mfu", value=options.mfu)
    if options.pairs is not None and options.pairs < 1:
        raise UserError("must be at least 1", field="--pairs", value=options.pairs)
    gpus = priced(options.prices)
    config, source = _config(recipe.model)
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    if isinstance(family_of(config), CrossAttentionFamily):
        raise UserError(
            "no plan is made yet for models whose language model looks at images by cross-attention",
            field="model.id",
            value=recipe.model.id,
        )
    attention = pick_attention(recipe.model, config)
    hidden = config.get_text_config().hidden_size
    model = unloaded_model(recipe.model, config, dtype, attention.layout)
    weights = Weights.of(model, recipe.model, dtype, hidden)
    work = workload(recipe, config, attention.layout, options.pairs)
    workers, budget = recipe.scaling.num_workers, recipe.optim.tokens_per_microbatch
    at_once = pairs_at_once(recipe, work, attention.layout, budget, workers)
    batch = batch_of(work.shape, min(at_once, PAIRS_RUN), config, recipe.orpo.nll, attention.layout)
    activations: dict[bool, Activations] = {}
    for checkpointing in (False, True):
        section = recipe.model.model_copy(update={"gradient_checkpointing": checkpointing})
        bounded = recipe.deepspeed.zero_stage < 3
        one = measure(section, config, dtype, attention.layout, batch, bounded, "cuda")
        activations[checkpointing] = one.widened(at_once, in_portions=checkpointing and bounded)
    planner = Planner(
        weights,
        recipe.optim.optimizer,
        activations,
        budget,
        work.longest,
        work.steps(recipe),
        recipe.optim.pairs_per_step,
        options.mfu,
        recipe.model.quantization is not None,
    )
    mine = Setting(workers, recipe.deepspeed.zero_stage, recipe.model.gradient_checkpointing, budget)
    types = [_on(planner, gpu, mine) for gpu in gpus]
    affordable = [each["cheapest"] for each in types if each["cheapest"]]
    return {
        "name": recipe.name,
        "model": {
            "id": recipe.model.id,
            "config": source,
            "parameters": weights.total,
            "trained": weights.trained,
            "dtype": str(dtype).removeprefix("torch."),
            "layout": attention.layout,
        },
        "setting": asdict(mine),
        "memory": {str(stage): _bytes(planner.memory(_at(mine, stage))) for stage in STAGES},
        "step": _step(recipe, work, planner, mine, at_once),
        "gpus": types,
        "cheapest": min(affordable, key=lambda found: found["cost"], default=None),
        "mfu": options.mfu,
        "assumptions": [*_notes(recipe, source, dtype), *work.assumptions, *_constants(options)],
    }


def _config(section: ModelConfig) -> tuple[Any, str]:
    """The model's config, and where it is from: the folder, the hub, or known shapes where the hub does not answer."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(section.id), revision=section.revision), "config.json"
    except (OSError, ValueError) as error:
        known = KNOWN_SHAPES.get(section.id)
        if known is None:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"the model's config cannot be read: {first}",
                field="model.id",
                value=section.id,
                fix=f"give a folder, a name on the hub (and a network), or one of {', '.join(KNOWN_SHAPES)}",
            ) from None
        return known.config(), "known shape"


def _at(setting: Setting, stage: Any) -> Setting:
    return Setting(setting.workers, stage, setting.checkpointing, setting.budget)


def _on(planner: Planner, gpu: Any, mine: Setting) -> dict[str, Any]:
    """A recipe on a type of GPU."""
    cheapest = planner.cheapest(gpu)
    return {
        "gpu": gpu.name,
        "memory_gib": gpu.memory,
        "price_per_hour": gpu.price,
        "fits": {str(stage): planner.fits(gpu, _at(mine, stage)) for stage in STAGES},
        "recipe": _flat(planner.fitting(gpu, mine)) if planner.fits(gpu, mine) else None,
        "cheapest": _flat(cheapest) if cheapest else None,
    }


def _bytes(memory: Memory) -> dict[str, int]:
    return {name: round(value) for name, value in asdict(memory).items()}


def _flat(found: Fitting) -> dict[str, Any]:
    memory: Memory = found.memory
    return {
        "gpu": found.gpu.name,
        **asdict(found.setting),
        "memory": round(memory.total),
        "hours": found.hours,
        "cost": found.cost,
    }


def _step(recipe: Recipe, work: Workload, planner: Planner, mine: Setting, at_once: int) -> dict[str, Any]:
    shape = work.shape
    full = planner.activations[mine.checkpointing]
    share = -(-recipe.optim.pairs_per_step // mine.workers)
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
        "pairs_per_microbatch": at_once,
        "microbatches_per_worker": -(-share // at_once),
        "training_pairs": work.pairs,
        "steps": planner.steps,
        "flops_per_step": full.flops / full.pairs * recipe.optim.pairs_per_step,
    }


def _notes(recipe: Recipe, source: str, dtype: torch.dtype) -> list[str]:
    notes = []
    if source == "known shape":
        why = "offline mode" if os.environ.get("HF_HUB_OFFLINE") else "the hub does not answer"
        notes.append(f"{recipe.model.id} is planned from the shape that orpo-ray knows of it ({why})")
    if recipe.model.dtype == "auto":
        notes.append("model.dtype auto is bfloat16 on these GPUs")
    if recipe.optim.optimizer == "paged_adamw_8bit":
        notes.append("paged moments are counted as the CPU's memory")
    return notes


def _constants(options: Options) -> list[str]:
    return [
        f"{CONTEXT / GIB:.1f} GiB for CUDA on each GPU, {NCCL / GIB:.1f} more for NCCL between several, and "
        f"{FRAGMENTATION:.0%} of what comes and goes for fragmentation",
        f"{options.mfu:.0%} of a GPU's peak is reached (--mfu); prices are one GPU's per hour (--price-per-hour)",
    ]
