"""The held-out pairs: what they show, so that no pair is made of it, and a copy of them where the set needs one.

What a pair shows are hashes of its images, or of its prompt without images.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import encoder_of, held_out_data, held_out_in_order
from orpo_ray.data.images import read_image_bytes
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data.reading import ReadSpec, read_pairs
from orpo_ray.data_report.prepare import PREPARED, Prepared, write_split
from orpo_ray.errors import RowError
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.files import image_folder
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.source import content_keys

READER_THREADS = 4
EVAL = f"{PREPARED}/eval"


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


def write_held_out(recipe: Recipe, folder: RunFolder, console: Console) -> Prepared | None:
    """Write the held-out pairs beside the synthetic ones, if a run that trains on these cannot read them otherwise.

    A run reads both with one `data.format` and `data.columns`, and a fraction held out of the synthetic pairs would be
    another one than that which was kept out of them.

    Args:
        recipe: the recipe.
        folder: its run folder.
        console: for progress.

    Raises:
        UserError: a source cannot be read.
    """
    data = recipe.data
    if not data.eval_fraction and not (data.eval and (data.format != "auto" or data.columns)):
        return None
    held_out = held_out_in_order(recipe)
    if held_out is None:
        return None
    start_ray()
    return write_split(f"{folder.uri}/{EVAL}", held_out, encoder_of(recipe), console)


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
