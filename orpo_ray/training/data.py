"""A recipe -> what a run reads: the order of the training pairs, the held-out ones, and how they are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from orpo_ray.data.containers import Segment
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.formats import recognise
from orpo_ray.data.order import Order, total_slots
from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.sources import first_rows, list_sources
from orpo_ray.data.split import split_off
from orpo_ray.errors import UserError
from orpo_ray.model.loading import load_processor
from orpo_ray.recipe import Recipe
from orpo_ray.storage import is_remote

# What a reader holds: rows as they are stored, and as much again while they are put in order.
WINDOW_ROWS = 4096
WINDOW_BYTES = 128 << 20
SMALLEST_WINDOW = 64


def run_data(recipe: Recipe) -> tuple[ReadSpec, ReadSpec | None]:
    """What a run trains on, all of it, and what it evaluates on, if anything. Raises UserError.

    A worker takes its share by `rank` and `num_workers`.
    """
    train, held_out = _splits(recipe)
    optim = recipe.optim
    slots = total_slots(train.order.num_rows, optim.epochs, optim.pairs_per_step, optim.max_steps)
    if not slots:
        raise UserError("less than one row would be trained on", field="optim.epochs", value=optim.epochs)
    return replace(train, last_slot=slots), None if held_out is None else _to_evaluate(recipe, held_out)


def held_out_data(recipe: Recipe) -> ReadSpec | None:
    """What evaluations read, or None where the recipe has no held-out pairs. Raises UserError."""
    if recipe.data.eval:
        return _to_evaluate(recipe, _listed(recipe, dict.fromkeys(recipe.data.eval, 1.0), "data.eval"))
    return run_data(recipe)[1] if recipe.data.eval_share else None


def all_data(recipe: Recipe) -> tuple[ReadSpec, ReadSpec | None]:
    """Every row of the training set and of the held-out set once, as they lie in their files. Raises UserError."""
    train, held_out = _splits(recipe)
    return _in_order(train), None if held_out is None else _in_order(held_out)


def _splits(recipe: Recipe) -> tuple[ReadSpec, ReadSpec | None]:
    data = recipe.data
    train = _listed(recipe, data.train, "data.train")
    if data.eval_share:
        return split_off(train, data.eval_share)
    return train, _listed(recipe, dict.fromkeys(data.eval, 1.0), "data.eval") if data.eval else None


def _in_order(spec: ReadSpec) -> ReadSpec:
    order = replace(spec.order, seed=None, weights=(1.0,) * len(spec.order.weights))
    return replace(spec, order=order, last_slot=order.num_rows)


def _to_evaluate(recipe: Recipe, spec: ReadSpec) -> ReadSpec:
    # Always shuffled: exchanged images should come from anywhere, and max_pairs take a fair sample.
    order = replace(spec.order, seed=0)
    return replace(spec, order=order, last_slot=min(order.num_rows, recipe.eval.max_pairs or order.num_rows))


def encoder_of(recipe: Recipe) -> EncoderSpec:
    """How the recipe's pairs are encoded."""
    data, model = recipe.data, recipe.model
    return EncoderSpec(
        load_processor,
        model.id,
        model.revision,
        data.max_length,
        truncate=data.on_too_long == "truncate_response",
        allow_http=data.allow_http,
        trust_remote_code=model.trust_remote_code,
    )


def _listed(recipe: Recipe, mix: Mapping[str, float], field: str) -> ReadSpec:
    """Every row of a mix of sources, in the recipe's order."""
    data = recipe.data
    sources = list_sources(mix, field)
    formats: dict[str, str] = {}
    for segment in (segment for source in sources for segment in source.segments):
        if segment.path not in formats:
            columns, rows = first_rows(segment)
            formats[segment.path] = recognise(columns, rows, data.columns, data.format, segment.path)
    root = data.image_root
    if root is not None and not is_remote(root) and not Path(root).is_dir():
        raise UserError("no such folder", field="data.image_root", value=root)
    segments = tuple(segment for source in sources for segment in source.segments)
    order = Order(
        segment_rows=tuple(segment.num_rows for segment in segments),
        seed=data.shuffle_seed,
        window_rows=data.shuffle_window or _window_rows(segments),
        segment_source=tuple(number for number, source in enumerate(sources) for _ in source.segments),
        weights=tuple(source.weight for source in sources),
    )
    return ReadSpec(
        segments=segments,
        format_names=tuple(formats[segment.path] for segment in segments),
        order=order,
        pairs_per_step=recipe.optim.pairs_per_step,
        first_slot=0,
        last_slot=order.num_rows,
        columns=data.columns,
        image_root=root,
    )


def _window_rows(segments: tuple[Segment, ...]) -> int:
    """As many rows as a reader should hold, going by the heaviest source file."""
    heaviest = max((segment.num_bytes / max(1, segment.num_rows) for segment in segments), default=0)
    fitting = int(WINDOW_BYTES / max(heaviest, 1))
    return max(SMALLEST_WINDOW, min(WINDOW_ROWS, fitting))
