"""Keep what a frozen vision encoder made of an image on disk: for later epochs, later runs, and trials of a sweep.

There is a file for each image or tile, named by a hash of its pixels and of the weights that encoded it. Other weights,
another revision, another dtype or another way of cutting images find nothing here and disturb nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from orpo_ray.data.collate_images import ON_HOST, PIXELS, Collate, ImageArrays, TokenRows
from orpo_ray.errors import UserError
from orpo_ray.model.families.base import Family, ImageTensors

FIELD = "model.vision_cache"
# In `PairBatch.images`: uint8 [n, 32], the name of each image's file.
KEYS = f"{ON_HOST}image_keys"


class VisionCache:
    """Features of images, looked up by what the vision encoder was given. Several processes may share a folder."""

    def __init__(self, folder: Path, base: Any, family: Family) -> None:
        """Open the cache of a model.

        Args:
            folder: of all models' caches; made on the first write.
            base: the transformers model.
            family: the model's.

        Raises:
            UserError: features would change in training, or are more than one tensor per image.
        """
        weights = [(n, p) for n, p in base.named_parameters() if n.startswith((*family.vision, *family.connector))]
        if trained := [name for name, parameter in weights if parameter.requires_grad]:
            raise UserError(
                f"cached features are outdated as soon as these weights change, and {trained[0]} is trained",
                field=FIELD,
                value=str(folder),
                fix="add model.freeze: [vision, connector], or leave model.vision_cache out",
            )
        if not family.can_cache_images(base.config):
            raise UserError(
                f"the vision encoder of {base.config.model_type} gives more than features of single images",
                field=FIELD,
                value=str(folder),
                fix="leave model.vision_cache out",
            )
        self.config, self.family = base.config, family
        digest = hashlib.sha256(f"{base.config.model_type} {base.dtype}".encode())
        for name, parameter in weights:
            digest.update(name.encode())
            digest.update(_bytes(parameter))
        self.folder = folder / digest.hexdigest()[:24]
        self.hits = self.misses = 0

    def with_keys(self, collate: Collate) -> Collate:
        """Let a family's `collate` also name the images' files, while pixels are in main memory."""

        def collate_with_keys(inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
            arrays = collate(inputs, rows)
            tensors = {name.removeprefix(ON_HOST): torch.from_numpy(array) for name, array in arrays.items()}
            images = {name: tensors[name] for name in self.family.image_inputs if name in tensors}
            keys = [bytes.fromhex(_key(image)) for image in self._split(images)]
            return arrays | {KEYS: np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1).copy()}

        return collate_with_keys

    @torch.no_grad()
    def features(
        self,
        raw: ImageTensors,
        inputs: ImageTensors,
        encode: Callable[[ImageTensors], Sequence[torch.Tensor]],
        names: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Look up the features of each image or tile, in order; encode and keep those that are missing.

        Args:
            raw: the vision input with pixels as uint8, which the files are named by.
            inputs: the same input, normalized.
            encode: computes the features of each image of such inputs.
            names: what `with_keys` added to the batch. Without it, pixels are copied back from the device.
        """
        keys = [_key(image) for image in self._split(raw)] if names is None else [row.hex() for row in _rows(names)]
        cached = {key: self._read(key, inputs[PIXELS].device) for key in dict.fromkeys(keys)}
        found = {key: value for key, value in cached.items() if value is not None}
        missing = [key for key in cached if key not in found]
        if missing:
            images = self._split(inputs)
            wanted = [images[keys.index(key)] for key in missing]
            together = {name: torch.cat([image[name] for image in wanted]) for name in wanted[0]}
            for key, value in zip(missing, encode(together), strict=True):
                found[key] = value
                self._write(key, value)
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        return [found[key] for key in keys]

    def _split(self, inputs: Mapping[str, torch.Tensor]) -> list[ImageTensors]:
        """The vision input of each image, or of each tile where tiles are encoded independently."""
        rows = self.family.rows_per_image(self.config, inputs)
        split = {name: value.split(1) for name, value in inputs.items()}
        split[PIXELS] = inputs[PIXELS].split(rows)
        return [{name: values[index] for name, values in split.items()} for index in range(len(rows))]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str, device: torch.device) -> torch.Tensor | None:
        try:
            return load_file(self._path(key), device=str(device))["features"]
        except (FileNotFoundError, SafetensorError):  # not there, or cut off by a full disk
            return None

    def _write(self, key: str, features: torch.Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        save_file({"features": features.detach().cpu().contiguous().clone()}, scratch)
        os.replace(scratch, path)


def _rows(names: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in names.numpy()]


def _key(image: ImageTensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(image):
        digest.update(f"{name} {image[name].dtype} {tuple(image[name].shape)}".encode())
        digest.update(_bytes(image[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
