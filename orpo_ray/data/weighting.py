"""Weights of languages and domains (`data.weights`): rows of one weighted group become a source of their own.

A shard with rows of several groups is divided into parts, one for each group, that are shards of the order. An epoch
then takes `weight * rows` rows of each group, exactly as of a source (`data/order.py`), and reads the parts of a stored
shard together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
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
        found = list(pool.map(lambda shard: _groups_in(spec, shard, weights), shards))
    _check_names([present for present, _ in found], weights)
    return _divided(spec, [rows for _, rows in found], weights)


def _groups_in(
    spec: ReadSpec, shard_index: int, weights: Mapping[str, Mapping[str, float]]
) -> tuple[list[Counter[str]], dict[Names, np.ndarray]]:
    """Return how often each name occurs in a shard, by kind, and the rows of each weighted group."""
    rows = spec.row_indices.get(shard_index, np.arange(spec.shards[shard_index].num_rows))
    present: list[Counter[str]] = [Counter() for _ in KINDS]
    places: dict[Names, list[int]] = defaultdict(list)
    for place, names in enumerate(_names_of(spec, shard_index, rows, weights)):
        for counts, name in zip(present, names, strict=True):
            counts.update([name] if name is not None else [])
        group = tuple(name if name in weights[kind] else None for kind, name in zip(KINDS, names, strict=True))
        places[group].append(place)
    return present, {group: rows[found] for group, found in places.items()}


def _names_of(
    spec: ReadSpec, shard_index: int, rows: np.ndarray, weights: Mapping[str, Mapping[str, float]]
) -> Iterator[Names]:
    """Yield language and domain of rows of a shard; None for those without a use."""
    if weights["language"] and spec.grouping.language == SCRIPT:  # which the texts tell
        for pair in read_pairs(spec, shard_index, rows):
            yield (pair.language, pair.domain) if isinstance(pair, PreferencePair) else (None, None)
        return
    columns = [spec.grouping.columns.get(kind) if weights[kind] else None for kind in KINDS]
    reader = ShardReader([name for name in columns if name is not None])
    for raw in reader.open(spec.shards[shard_index])(rows.tolist()):
        yield tuple(None if isinstance(raw, RowError) else column_value(raw, name) for name in columns)


def _check_names(counts_by_shard: list[list[Counter[str]]], weights: Mapping[str, Mapping[str, float]]) -> None:
    for place, kind in enumerate(KINDS):
        present: Counter[str] = Counter()
        for counts in counts_by_shard:
            present.update(counts[place])
        for name in weights[kind]:
            if name not in present:
                shown = ", ".join(f"{each} ({count:,} rows)" for each, count in present.most_common(NAMES_SHOWN))
                raise UserError(
                    f"no training row has this {kind}",
                    field=f"data.weights.{kind}",
                    value=name,
                    fix=f"weight one of: {shown or 'none, as no row has one'}",
                )


def _divided(
    spec: ReadSpec, rows_by_shard: list[dict[Names, np.ndarray]], weights: Mapping[str, Mapping[str, float]]
) -> ReadSpec:
    """Divide shards into the parts of each group, and make each group of each source a source of the order."""
    order = spec.order
    source_of = order.shard_source or (0,) * len(spec.shards)
    found = {(source_of[shard], group) for shard, groups in enumerate(rows_by_shard) for group in groups}
    # In an order of their own, so that it depends on neither the order of the rows nor hashes.
    groups = sorted(found, key=lambda group: (group[0], [name or "" for name in group[1]]))
    number_of = {group: number for number, group in enumerate(groups)}
    parts: list[tuple[int, int, np.ndarray]] = []  # stored shard, group, rows
    for shard, by_group in enumerate(rows_by_shard):
        numbered = [(number_of[source_of[shard], group], rows) for group, rows in by_group.items()]
        parts += [(shard, number, rows) for number, rows in sorted(numbered, key=lambda part: part[0])]
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
