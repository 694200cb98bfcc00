"""Which images a pair is contrasted with: those of another pair of its window, or its own ones, changed.

The choice depends on the window's order alone, which seed and epoch decide. So it is the same for any number of
workers and after a resume, and needs no file but those of the window.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import xxhash

from orpo_ray.config.field_types import OtherImage
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.pairs import Image, OtherImages, PreferencePair
from orpo_ray.data.shards import Shard

WindowPairs = dict[int, tuple[Shard, PreferencePair | BadRow]]
"""Sample index -> shard, and pair or bad row."""
RootOf = Callable[[Shard], str | None]
# Choices that depend on the other pairs of the window, which must therefore be read whole.
FROM_THE_WINDOW = ("exchange", "exchange_other_answer")
_CHANGES = ("crop", "noise", "blank")


@dataclass(frozen=True)
class _Candidate:
    """What the choice of a partner looks at."""

    sample_index: int
    images: str
    """Fingerprints of the images."""
    chosen: str


def image_fingerprint(image: Image, root: str | None) -> str:
    """Hash an image's bytes, or its path with the folder that the path is relative to."""
    digest = hashlib.sha256()
    if image["bytes"] is not None:
        digest.update(image["bytes"])
    else:
        digest.update(f"{root}/{image['path']}".encode())
    return digest.hexdigest()


def exchange_images(pairs: WindowPairs, root_of: RootOf) -> WindowPairs:
    """Give every pair the images of the next pair with the same number of images, but not the same ones.

    A pair without such a partner becomes a BadRow. None has other images any longer.
    """
    found = _partners(pairs, root_of, lambda pair: (len(pair.images), len(pair.rejected_images or ())), False)
    out = dict(pairs)
    for sample_index, (shard, pair) in pairs.items():
        if isinstance(pair, BadRow):
            continue
        other = found.get(sample_index)
        if other is None:
            why = "no other images to exchange with" if pair.images else "the pair has no image"
            out[sample_index] = (shard, BadRow(sample_index, pair.id, pair.source, "no_image_to_exchange", why))
            continue
        other_shard, other_pair = pairs[other]
        assert isinstance(other_pair, PreferencePair)
        swapped = replace(pair, images=other_pair.images, rejected_images=other_pair.rejected_images, other=None)
        out[sample_index] = (other_shard, swapped)
    return out


def with_other_images(
    pairs: WindowPairs, kind: OtherImage, root_of: RootOf, seed: int | None, epoch: int
) -> WindowPairs:
    """Give every pair its other images. A pair that has no image, or no partner, gets none.

    Args:
        pairs: all of a window if `kind` is one of `FROM_THE_WINDOW`.
        kind: `orpo.other_image` of the recipe.
        root_of: folder that a shard's image paths are relative to.
        seed: `data.shuffle_seed` of the recipe.
        epoch: of the window.
    """
    if kind in FROM_THE_WINDOW:
        return _exchanged(pairs, kind == "exchange_other_answer", root_of)
    out = dict(pairs)
    for sample_index, (shard, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and pair.images:
            own = _changed(pair, kind, seed, epoch) if kind in _CHANGES else _from_column(pair, root_of(shard))
            out[sample_index] = (shard, own)
    return out


def _exchanged(pairs: WindowPairs, other_answer: bool, root_of: RootOf) -> WindowPairs:
    def group(pair: PreferencePair) -> Hashable:
        return len(pair.images), json.dumps(pair.prompt) if other_answer else None

    out, in_order = dict(pairs), dict(sorted(pairs.items()))  # windows come shard by shard
    for sample_index, other in _partners(in_order, root_of, group, other_answer).items():
        (shard, pair), (other_shard, other_pair) = pairs[sample_index], pairs[other]
        assert isinstance(pair, PreferencePair)
        assert isinstance(other_pair, PreferencePair)
        images = OtherImages(other_pair.images, root_of(other_shard))
        out[sample_index] = (shard, replace(pair, other=images))
    return out


def _changed(pair: PreferencePair, change: str, seed: int | None, epoch: int) -> PreferencePair:
    digest = xxhash.xxh3_64_intdigest(f"{seed} {epoch} {pair.id}".encode())
    return replace(pair, other=OtherImages(None, change=change, seed=digest >> 1))  # fits int64


def _from_column(pair: PreferencePair, root: str | None) -> PreferencePair:
    """Take the row's second images as the other ones, and let both answers be to the first.

    A row with one text for both answers keeps its meaning: its preference is one for the images already.
    """
    if pair.rejected_images is None or pair.chosen == pair.rejected:
        return pair
    return replace(pair, rejected_images=None, other=OtherImages(pair.rejected_images, root))


def _partners(
    pairs: WindowPairs, root_of: RootOf, group_of: Callable[[PreferencePair], Hashable], other_answer: bool
) -> Mapping[int, int]:
    """Find for each pair the next one of its group with other images; after the last pair comes the first.

    Args:
        pairs: of a window.
        root_of: folder that a shard's image paths are relative to.
        group_of: pairs are partners only within a group.
        other_answer: whether the chosen answers must differ too.

    Returns:
        Sample index -> sample index of the partner, for pairs that have one.
    """
    groups: dict[Hashable, list[_Candidate]] = defaultdict(list)
    for sample_index, (shard, pair) in pairs.items():
        if isinstance(pair, PreferencePair) and pair.images:
            root = root_of(shard)
            images = " ".join(image_fingerprint(image, root) for image in pair.images)
            groups[group_of(pair)].append(_Candidate(sample_index, images, pair.chosen))
    found: dict[int, int] = {}
    for group in groups.values():
        for place, own in enumerate(group):
            followers = (group[(place + step) % len(group)] for step in range(1, len(group)))
            for other in followers:
                if other.images != own.images and not (other_answer and other.chosen == own.chosen):
                    found[own.sample_index] = other.sample_index
                    break
    return found
