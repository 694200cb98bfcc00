"""Derive from a recipe which rows a run reads, in which order, and how they are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.formats import detect_format, has_ratings
from orpo_ray.data.groups import KINDS, SCRIPT, Grouping
from orpo_ray.data.order import Order, total_samples
from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.shards import Shard
from orpo_ray.data.sources import list_sources, read_first_rows
from orpo_ray.data.split import split_held_out
from orpo_ray.data.weighting import weighted_by_group
from orpo_ray.errors import UserError
from orpo_ray.storage.files import is_remote

# Limits of a shuffle window. A reader holds its rows as stored, and needs the same amount again to reorder them.
WINDOW_ROWS = 4096
WINDOW_BYTES = 128 << 20
SMALLEST_WINDOW = 64
TRAIN = "data.train"

RunRows = tuple[ReadSpec, ReadSpec | None]
"""The training rows of a run, and its held-out rows if there are any."""


def run_data(recipe: Recipe) -> RunRows:
    """Return all training rows of a run, and its held-out rows if there are any.

    Raises:
        UserError: a source cannot be read, or nothing would be trained on.
    """
    train, held_out = _splits(recipe)
    train = weighted_by_group(train, {kind: getattr(recipe.data.weights, kind) for kind in KINDS})
    optim = recipe.optim
    samples = total_samples(train.order.num_rows, optim.epochs, optim.pairs_per_step, optim.max_steps)
    if not samples:
        raise UserError(
            "the run would have no training pairs",
            field="optim.epochs",
            value=optim.epochs,
            fix="increase optim.epochs",
        )
    return replace(train, end_sample=samples), None if held_out is None else _for_evaluation(recipe, held_out)


def held_out_data(recipe: Recipe) -> ReadSpec | None:
    """Return the held-out rows for evaluation; None if the recipe has none. Raises UserError."""
    held_out = _held_out(recipe)
    return None if held_out is None else _for_evaluation(recipe, held_out)


def held_out_in_order(recipe: Recipe) -> ReadSpec | None:
    """Return every held-out row once, in the order of the files; None if the recipe has none. Raises UserError."""
    held_out = _held_out(recipe)
    return None if held_out is None else _in_order(held_out)


def all_data(recipe: Recipe) -> tuple[ReadSpec, ReadSpec | None]:
    """Return every training row and every held-out row once, in the order of the files. Raises UserError."""
    train, held_out = _splits(recipe)
    return _in_order(train), None if held_out is None else _in_order(held_out)


def _held_out(recipe: Recipe) -> ReadSpec | None:
    """List the held-out rows, without the training rows unless the former are a fraction of these."""
    if recipe.data.eval:
        return _list_rows(recipe, dict.fromkeys(recipe.data.eval, 1.0), "data.eval")
    return _splits(recipe)[1] if recipe.data.eval_fraction else None


def _splits(recipe: Recipe) -> tuple[ReadSpec, ReadSpec | None]:
    data = recipe.data
    train = _list_rows(recipe, data.train, TRAIN)
    if data.eval_fraction:
        return split_held_out(train, data.eval_fraction)
    return train, _list_rows(recipe, dict.fromkeys(data.eval, 1.0), "data.eval") if data.eval else None


def _in_order(spec: ReadSpec) -> ReadSpec:
    order = replace(spec.order, seed=None, weights=(1.0,) * len(spec.order.weights))
    return replace(_plain(spec), order=order, end_sample=order.num_rows, other_image=None)


def _for_evaluation(recipe: Recipe, spec: ReadSpec) -> ReadSpec:
    # Always shuffled, so that images are exchanged between random pairs and max_pairs takes a random sample.
    order = replace(spec.order, seed=0)
    end_sample = min(order.num_rows, recipe.eval.max_pairs or order.num_rows)
    return replace(_plain(spec), order=order, end_sample=end_sample)


def _plain(spec: ReadSpec) -> ReadSpec:
    """The rows as one pair each, in an order that does not depend on what they hold."""
    return replace(spec, group=False, pairs_from_ranking="best_worst")


def encoder_of(recipe: Recipe) -> EncoderSpec:
    """Return how the recipe's pairs are encoded."""
    data, model = recipe.data, recipe.model
    return EncoderSpec(
        model.id,
        model.revision,
        data.max_length,
        truncate=data.on_too_long == "truncate_response",
        allow_http=data.allow_http,
        trust_remote_code=model.trust_remote_code,
    )


def _list_rows(recipe: Recipe, weighted_sources: Mapping[str, float], field: str) -> ReadSpec:
    """List all rows of the sources, in the recipe's order."""
    data = recipe.data
    sources = list_sources(weighted_sources, field)
    formats: dict[str, str] = {}
    present: dict[str, None] = {}
    for shard in (shard for source in sources for shard in source.shards):
        if shard.path not in formats:
            columns, rows = read_first_rows(shard)
            formats[shard.path] = detect_format(columns, rows, data.columns, data.format, shard.path)
            present |= dict.fromkeys(columns)
    grouping = Grouping(data.language, data.domain)
    if field == TRAIN:  # a file for `orpo-ray evaluate` may lack what only groups its pairs
        check_grouping(grouping, present)
    check_image_root(data.image_root, "data.image_root")
    shards = tuple(shard for source in sources for shard in source.shards)
    if (
        field == "data.train"
        and data.pairs_from_ranking != "best_worst"
        and not any(map(has_ratings, formats.values()))
    ):
        raise UserError(
            f"no source has rows of several rated answers; the formats are {', '.join(sorted(set(formats.values())))}",
            field="data.pairs_from_ranking",
            value=data.pairs_from_ranking,
            fix="leave it out, or set data.format",
        )
    order = Order(
        shard_rows=tuple(shard.num_rows for shard in shards),
        seed=data.shuffle_seed,
        window_rows=data.shuffle_window or rows_of_window(shards),
        shard_source=tuple(number for number, source in enumerate(sources) for _ in source.shards),
        weights=tuple(source.weight for source in sources),
    )
    return ReadSpec(
        shards=shards,
        format_names=tuple(formats[shard.path] for shard in shards),
        order=order,
        pairs_per_step=recipe.optim.pairs_per_step,
        first_sample=0,
        end_sample=order.num_rows,
        columns=data.columns,
        image_root=data.image_root,
        max_frames=data.max_frames,
        other_image=recipe.other_image,
        grouping=grouping,
        group=data.group == "auto",
        pairs_from_ranking=data.pairs_from_ranking,
    )


def check_grouping(grouping: Grouping, present: Iterable[str]) -> None:
    """Raise UserError for a column that no source has."""
    for kind, column in grouping.columns.items():
        if column not in present:
            also = f"{SCRIPT}, or " if kind == "language" else ""
            raise UserError(
                "no training source has this column",
                field=f"data.{kind}",
                value=column,
                fix=f"give {also}one of: {', '.join(present)}",
            )


def check_image_root(root: str | None, field: str) -> None:
    """Raise UserError if a folder of images on this machine does not exist."""
    if root is not None and not is_remote(root) and not Path(root).is_dir():
        raise UserError("no such folder", field=field, value=root, fix="give an existing folder or a URI")


def rows_of_window(shards: tuple[Shard, ...]) -> int:
    """Return the number of rows in a window, limited by the size of the rows in the largest shard."""
    largest = max((shard.num_bytes / max(1, shard.num_rows) for shard in shards), default=0)
    fitting = int(WINDOW_BYTES / max(largest, 1))
    return max(SMALLEST_WINDOW, min(WINDOW_ROWS, fitting))
