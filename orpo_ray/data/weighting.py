"""Weights of languages and domains (`data.weights`): rows of one weighted group become a source of their own.

A shard with rows of several groups is divided into parts, one for each group, that are shards of the order. An epoch
then takes `weight * rows` rows of each group, exactly as of a source (`data/order.py`), and reads the parts of a stored
shard together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from orpo_ray.data.groups import KINDS, SCRIPT, column_value
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import ReadSpec, read_pairs
from orpo_ray.data.shards import ShardReader
from orpo_ray.errors import RowError, UserError

READER_THREADS = 4
NAMES_SHOWN = 12

Names = tuple[str | None, ...]
"""Language and domain of a row; None for one that has no weight."""


def weighted_by_group(spec: ReadSpec, weights: Mapping[str, Mapping[str, float]]) -> ReadSpec:
    """Weight the rows of a dataset by their language and domain. Reads what names these once.

    Args:
        spec: the rows, whose sources may have weights too. Its order counts each stored shard once.
        weights: kind (`language`, `domain`) -> name -> weight.

    Returns:
        The same rows in a weighted order; without weights, the spec itself.

    Raises:
        UserError: no row has a name that is given a weight.
    """
    if not any(weights.values()):
        return spec
    shards = range(len(spec.shards))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        names_by_shard = list(pool.map(lambda shard: _names_in(spec, shard, weights), shards))
    _check_names(names_by_shard, weights)
    named: list[list[Names]] = [
        [tuple(name if name in weights[kind] else None for kind, name in zip(KINDS, row, strict=True)) for row in rows]
        for rows in names_by_shard
    ]
    return _divided(spec, named, weights)


def _names_in(spec: ReadSpec, shard_index: int, weights: Mapping[str, Mapping[str, float]]) -> list[Names]:
    """Return language and domain of each row of a shard that the order counts; None for those without a use."""
    shard, grouping = spec.shards[shard_index], spec.grouping
    rows = spec.row_indices.get(shard_index, np.arange(shard.num_rows))
    if weights["language"] and grouping.language == SCRIPT:  # which the texts tell
        pairs = read_pairs(spec, shard_index, rows)
        return [(pair.language, pair.domain) if isinstance(pair, PreferencePair) else (None, None) for pair in pairs]
    columns = [getattr(grouping, kind) if weights[kind] else None for kind in KINDS]
    raws = ShardReader([name for name in columns if name is not None]).open(shard)(rows.tolist())
    return [tuple(None if isinstance(raw, RowError) else column_value(raw, name) for name in columns) for raw in raws]


def _check_names(names_by_shard: list[list[Names]], weights: Mapping[str, Mapping[str, float]]) -> None:
    for place, kind in enumerate(KINDS):
        present = Counter(row[place] for rows in names_by_shard for row in rows if row[place] is not None)
        for name in weights[kind]:
            if name not in present:
                shown = ", ".join(f"{each} ({count:,} rows)" for each, count in present.most_common(NAMES_SHOWN))
                raise UserError(
                    f"no training row has this {kind}",
                    field=f"data.weights.{kind}",
                    value=name,
                    fix=f"weight one of: {shown or 'none, as no row has one'}",
                )


def _divided(spec: ReadSpec, named: list[list[Names]], weights: Mapping[str, Mapping[str, float]]) -> ReadSpec:
    """Divide shards into the parts of each group, and make each group of each source a source of the order."""
    order = spec.order
    source_of = order.shard_source or (0,) * len(spec.shards)
    found = {(source_of[shard], row) for shard, rows in enumerate(named) for row in rows}
    # In an order of their own, so that it depends on neither the order of the rows nor hashes.
    groups = sorted(found, key=lambda group: (group[0], [name or "" for name in group[1]]))
    number_of = {group: number for number, group in enumerate(groups)}
    parts: list[tuple[int, int, np.ndarray]] = []  # stored shard, group, rows
    for shard, rows in enumerate(named):
        stored = spec.row_indices.get(shard, np.arange(len(rows)))
        numbers = np.array([number_of[source_of[shard], row] for row in rows], np.int64)
        parts += [(shard, number, stored[numbers == number]) for number in np.unique(numbers).tolist()]
    indices = {place: rows for place, (shard, _, rows) in enumerate(parts) if len(rows) < spec.shards[shard].num_rows}
    divided = replace(
        order,
        shard_rows=tuple(len(rows) for _, _, rows in parts),
        shard_source=tuple(number for _, number, _ in parts),
        weights=tuple(order.weights[source] * _product(row, weights) for source, row in groups),
        stored_in=tuple(shard for shard, _, _ in parts),
    )
    return replace(
        spec,
        shards=tuple(spec.shards[shard] for shard, _, _ in parts),
        format_names=tuple(spec.format_names[shard] for shard, _, _ in parts),
        row_indices=indices,
        order=divided,
        end_sample=divided.num_rows,
    )


def _product(row: Names, weights: Mapping[str, Mapping[str, float]]) -> float:
    product = 1.0
    for kind, name in zip(KINDS, row, strict=True):
        product *= 1.0 if name is None else weights[kind][name]
    return product
