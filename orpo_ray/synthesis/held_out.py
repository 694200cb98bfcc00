"""What the held-out pairs show, so that no pair is made of it: hashes of their images, or of prompts without images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.images import read_image_bytes
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data.reading import ReadSpec, read_pairs
from orpo_ray.errors import RowError
from orpo_ray.storage.files import image_folder
from orpo_ray.synthesis.source import content_keys

READER_THREADS = 4


def held_out_keys(recipe: Recipe) -> frozenset[str]:
    """Return the keys of all held-out pairs of a recipe; none if it has no such pairs. Reads them once.

    Held-out pairs that cannot be read have no keys, since no model is evaluated on them.

    Raises:
        UserError: a source cannot be read.
    """
    held_out = held_out_data(recipe)
    if held_out is None:
        return frozenset()
    with ThreadPoolExecutor(READER_THREADS) as pool:
        found = pool.map(lambda shard: _keys_of(held_out, shard, recipe.data.allow_http), range(len(held_out.shards)))
        return frozenset(key for keys in found for key in keys)


def _keys_of(spec: ReadSpec, index: int, allow_http: bool) -> list[str]:
    shard, keys = spec.shards[index], list[str]()
    rows = spec.row_indices.get(index, np.arange(shard.num_rows))
    root = image_folder(spec.root_of(shard))
    for pair in read_pairs(spec, index, rows):
        if isinstance(pair, PreferencePair):
            try:
                images = [*pair.images, *(pair.rejected_images or ())]
                loaded = [{"bytes": read_image_bytes(each, root, allow_http), "path": None} for each in images]
            except RowError:
                continue
            keys += content_keys(PromptRow(pair.id, loaded, pair.prompt, None, pair.source))
    return keys
