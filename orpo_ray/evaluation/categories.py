"""By what held-out pairs are grouped: values of a column of the source rows, or the script of their texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from orpo_ray.data.groups import SCRIPT, column_value, script_of_pair
from orpo_ray.data.reading import ReadSpec, read_windows
from orpo_ray.data.shards import ShardReader
from orpo_ray.errors import RowError, UserError


def groups_by(read: ReadSpec, name: str) -> dict[int, str]:
    """Group the rows by a column, or by the script of their texts if the name is `script` and no column is called so.

    Returns:
        Sample index -> group.

    Raises:
        UserError: no row has the column.
    """
    try:
        return column_values(read, name)
    except UserError:
        if name != SCRIPT:
            raise
    return script_values(read)


def script_values(read: ReadSpec) -> dict[int, str]:
    """Return sample index -> script of prompt and chosen answer together."""
    plain = replace(read, other_image=None)
    found: dict[int, str] = {}
    for table in read_windows(plain, read.order.windows(read.first_sample, read.end_sample)):
        for row in table.select(["sample_index", "prompt", "chosen"]).to_pylist():
            if row["chosen"] is not None:
                found[row["sample_index"]] = script_of_pair(row["prompt"], row["chosen"])
    return found


def column_values(read: ReadSpec, column: str) -> dict[int, str]:
    """Read a column of all rows.

    Returns:
        Sample index -> value as text. Rows without the column are left out.

    Raises:
        UserError: no row has the column.
    """
    reader, found, columns = ShardReader(), dict[int, str](), dict[str, None]()
    for epoch, number in read.order.windows(read.first_sample, read.end_sample):
        window = read.order.window(epoch, number)
        sample_indices = window.first_sample + np.arange(len(window.rows))
        for shard in np.unique(window.rows[:, 0]).tolist():
            here = (window.rows[:, 0] == shard) & (sample_indices < read.end_sample)
            rows = window.rows[here, 1]
            if shard in read.row_indices:
                rows = read.row_indices[shard][rows]
            raws = reader.open(read.shards[shard])(rows.tolist())
            for sample_index, raw in zip(sample_indices[here].tolist(), raws, strict=True):
                if isinstance(raw, RowError):
                    continue
                columns |= dict.fromkeys(map(str, raw))
                if (value := column_value(raw, column)) is not None:
                    found[sample_index] = value
    if not found:
        raise UserError(
            "no held-out row has this column",
            field="--by",
            value=column,
            fix=f"give {SCRIPT}, or one of: {', '.join(columns)}",
        )
    return found
