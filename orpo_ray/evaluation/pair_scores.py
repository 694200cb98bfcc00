"""The scores of each held-out pair, as a table: gathered over workers, joined over passes, kept in the run folder.

A row is a pair, in order of sample indices. Columns: those of `KEYS`, `correct`, and the metrics of the objective for
the pair alone (`loss`, `rewards/margins`, ...). A pass with other images adds `exchanged/correct`,
`exchanged/rewards/margins` and so on, or `blank/...`; these are null for a pair that the pass could not score. So are
metrics that the objective does not have for a pair, such as those of the image preference without another image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.data.groups import KINDS
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, RunFolder

_ALWAYS = ("sample_index", "id", "prompt_tokens", "chosen_tokens", "rejected_tokens")
KEYS = (*_ALWAYS, *KINDS)
CORRECT = "correct"
"""Whether the chosen answer is the more likely one, by the objective's measure."""
EXCHANGED, BLANK = "exchanged", "blank"
"""Passes with other images: those of another pair, and uniform gray ones."""


def join_workers(parts: Sequence[Sequence[dict[str, Any]]]) -> pa.Table:
    """Make one table of the rows of all workers, in order of sample indices."""
    rows = [row for part in parts for row in part]
    # Those with the most columns come first, so that the order of columns depends neither on that of rows nor on the
    # number of workers.
    longest_first = sorted(rows, key=lambda row: (-len(row), row["sample_index"]))
    names = dict.fromkeys(name for row in longest_first for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    for kind in KINDS:  # without one value, the type is not known
        if kind in table.column_names:
            table = table.set_column(table.column_names.index(kind), kind, table[kind].cast(pa.string()))
    return table.sort_by("sample_index") if table.num_columns else table


def join_pass(pairs: pa.Table, other: pa.Table, name: str) -> pa.Table:
    """Add the columns of another pass over the same pairs, as `name/...`."""
    index = {sample_index: place for place, sample_index in enumerate(other["sample_index"].to_pylist())}
    places = pa.array([index.get(each) for each in pairs["sample_index"].to_pylist()], pa.int64())
    for column in other.column_names:
        if column not in KEYS:
            pairs = pairs.append_column(f"{name}/{column}", other[column].take(places))
    return pairs


def write_pair_scores(folder: RunFolder, name: str, pairs: pa.Table, **facts: str) -> None:
    """Write the table to a run folder.

    Args:
        folder: the run folder.
        name: of the file.
        pairs: the table.
        facts: what the scores belong to, such as the digest of the data; kept in the file.
    """
    described = pairs.replace_schema_metadata({f"orpo_ray.{key}": value for key, value in facts.items()})
    scratch = folder.path / f"{name}.tmp"
    pq.write_table(described, scratch, compression="zstd")
    scratch.replace(folder.path / name)
    folder.push(name)


def read_pair_scores(folder: RunFolder, name: str) -> pa.Table | None:
    """Read a table of a run folder; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    folder.pull(name)
    path = folder.path / name
    if not path.is_file():
        return None
    file = f"{folder.uri}/{name}"
    again = f", or write it again: orpo-ray evaluate {folder.uri}" if name == EVAL_PAIRS_FILE else ""
    fix = f"delete the file{again}"
    try:
        pairs = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise UserError(f"cannot read the file: {error}", field=file, fix="allow this user to read it") from None
        raise UserError("the file is damaged", field=file, fix=fix) from None
    if not {*_ALWAYS, CORRECT} <= set(pairs.column_names):
        raise UserError("the file holds no scores of pairs", field=file, fix=fix)
    return pairs


def read_whole_pair_scores(folder: RunFolder, name: str) -> pa.Table | None:
    """Read a table that the caller can do without; None if there is none, or if the file is damaged."""
    try:
        return read_pair_scores(folder, name)
    except UserError:
        return None


def facts_of_table(pairs: pa.Table) -> dict[str, str]:
    """Return the facts that were written with a table."""
    raw = pairs.schema.metadata or {}
    found = {key.decode(): value.decode() for key, value in raw.items()}
    return {key.removeprefix("orpo_ray."): value for key, value in found.items() if key.startswith("orpo_ray.")}
