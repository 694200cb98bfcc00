"""The rows that pairs are made of, in parts: each part has the same rows however often and wherever it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.from_recipe import check_grouping, check_image_root, rows_of_window
from orpo_ray.data.groups import KINDS, Grouping, column_value
from orpo_ray.data.images import read_image_bytes
from orpo_ray.data.json_rows import Row
from orpo_ray.data.order import Order
from orpo_ray.data.prompt_rows import PromptRow, detect_prompt_format, to_prompt_row
from orpo_ray.data.reading import convert_rows
from orpo_ray.data.shards import Shard, ShardReader
from orpo_ray.data.sources import list_sources, read_first_rows
from orpo_ray.storage.files import image_folder


@dataclass(frozen=True)
class SourceRows:
    """Rows in an order that a seed decides, divided into parts."""

    shards: tuple[Shard, ...]
    format_names: tuple[str, ...]
    """The format of each shard."""
    order: Order
    num_rows: int
    rows_per_part: int
    columns: Mapping[str, str]
    image_root: str | None
    """Folder that image paths are relative to; None for the folder of each file."""
    allow_http: bool
    grouping: Grouping
    """What names the language and the domain of a row."""

    @property
    def num_parts(self) -> int:
        """Number of parts; the last one may be smaller."""
        return -(-self.num_rows // self.rows_per_part)

    @property
    def digest(self) -> str:
        """Hash of the data files' names and sizes: equal for the same files in another folder."""
        facts = [(PurePosixPath(each.path).name, each.num_rows, each.num_bytes) for each in self.shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def how_read(self) -> dict[str, Any]:
        """What decides how a row is read."""
        return {
            "formats": self.formats, "columns": dict(self.columns), "image_root": self.image_root,
            "allow_http": self.allow_http,
        }  # fmt: skip

    @property
    def formats(self) -> list[str]:
        """Names of the formats."""
        return sorted({name.removeprefix("pair:") for name in self.format_names})

    def read(self, part: int, reader: ShardReader) -> list[PromptRow | BadRow]:
        """Read the rows of a part, with the bytes of their images.

        Raises:
            UserError: a file is damaged or no longer there.
        """
        first, end = part * self.rows_per_part, min((part + 1) * self.rows_per_part, self.num_rows)
        windows = [self.order.window(*window) for window in self.order.windows(first, end)]
        samples = np.concatenate([window.first_sample + np.arange(len(window.rows)) for window in windows])
        rows = np.concatenate([window.rows for window in windows])[(samples >= first) & (samples < end)]
        found: dict[int, PromptRow | BadRow] = {}
        for shard in np.unique(rows[:, 0]).tolist():
            places = np.flatnonzero(rows[:, 0] == shard)
            found |= zip(places.tolist(), self._read_shard(shard, rows[places, 1], reader), strict=True)
        return [found[place] for place in range(len(rows))]

    def _read_shard(self, index: int, rows: np.ndarray, reader: ShardReader) -> list[PromptRow | BadRow]:
        shard, format_name = self.shards[index], self.format_names[index]
        root, columns = image_folder(self.image_root or shard.image_root), self.grouping.columns

        def convert(raw: Row, where: str) -> PromptRow:
            row = to_prompt_row(raw, format_name, self.columns, where)
            language, domain = (column_value(raw, columns.get(kind)) for kind in KINDS)
            row = replace(row, source=where, language=language, domain=domain)
            images = [{"bytes": read_image_bytes(image, root, self.allow_http), "path": None} for image in row.images]
            return replace(row, images=images)

        return convert_rows(shard, rows, convert, self.columns, reader)


def source_rows(recipe: Recipe) -> SourceRows:
    """List the rows that a recipe makes pairs of. Raises UserError if a source cannot be read."""
    config, data = recipe.synthesize, recipe.data
    own = bool(config.source)
    field = "synthesize.source" if own else "data.train"
    format_name, columns, root = (
        (config.format, config.columns, config.image_root) if own else (data.format, data.columns, data.image_root)
    )
    check_image_root(root, "synthesize.image_root" if own else "data.image_root")
    uris = config.source if own else data.train
    shards = tuple(shard for source in list_sources(dict.fromkeys(uris, 1.0), field) for shard in source.shards)
    formats: dict[str, str] = {}
    present: dict[str, None] = {}
    for shard in shards:
        if shard.path not in formats:
            names, rows = read_first_rows(shard)
            formats[shard.path] = detect_prompt_format(names, rows, columns, format_name, shard.path)
            present |= dict.fromkeys(names)
    grouping = Grouping(data.language, data.domain)
    if not own:  # rows of another source may lack what groups the held-out pairs
        check_grouping(grouping, present)
    order = Order(tuple(shard.num_rows for shard in shards), config.seed, rows_of_window(shards))
    return SourceRows(
        shards=shards,
        format_names=tuple(formats[shard.path] for shard in shards),
        order=order,
        num_rows=min(order.num_rows, config.max_rows or order.num_rows),
        rows_per_part=config.rows_per_part,
        columns=columns,
        image_root=root,
        allow_http=data.allow_http,
        grouping=grouping,
    )


def content_keys(row: PromptRow) -> list[str]:
    """Return hashes of the content of a row's images; of its prompt, if it has none."""
    if row.images:
        return [hashlib.sha256(image["bytes"]).hexdigest() for image in row.images]
    return [hashlib.sha256(json.dumps(row.prompt).encode()).hexdigest()]
