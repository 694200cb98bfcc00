"""What a frozen vision part made of an image, kept on disk: for further epochs, further runs, trials of a sweep.

A file for each image or tile, named by a hash of its pixels and of the weights that saw them: other weights, another
revision, another dtype or another way of cutting images find nothing here and disturb nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from orpo_ray.errors import UserError
from orpo_ray.model.families import Family

FIELD = "model.vision_cache"
Inputs = dict[str, torch.Tensor]


class VisionCache:
    """Features of images by what the vision part was given. Many processes may share a folder."""

    def __init__(self, folder: Path, base: Any, family: Family) -> None:
        """base: the transformers model. Raises UserError where its features change, or are more than a tensor."""
        seen = [(n, p) for n, p in base.named_parameters() if n.startswith((*family.vision, *family.connector))]
        if trained := [name for name, parameter in seen if parameter.requires_grad]:
            raise UserError(
                f"features change with the weights that make them, and {trained[0]} is trained",
                field=FIELD,
                value=str(folder),
                fix="add model.freeze: [vision, connector], or leave model.vision_cache out",
            )
        has_more = family.cross_attention or "batch_num_images" in family.image_inputs
        if has_more or family.is_derived or hasattr(base.config.vision_config, "deepstack_visual_indexes"):
            raise UserError(
                f"the vision part of {base.config.model_type} gives more than features of single images",
                field=FIELD,
                value=str(folder),
                fix="leave model.vision_cache out",
            )
        self.config = base.config
        digest = hashlib.sha256(f"{base.config.model_type} {base.dtype}".encode())
        for name, parameter in seen:
            digest.update(name.encode())
            digest.update(_bytes(parameter))
        self.folder = folder / digest.hexdigest()[:24]
        self.hits = self.misses = 0

    @torch.no_grad()
    def features(self, raw: Inputs, inputs: Inputs, encode: Callable[[Inputs], Sequence[torch.Tensor]]) -> list[Any]:
        """The features of each image or tile, in order.

        raw: the vision input as it came, uint8. inputs: the same, normalised. encode: such inputs -> features of each.
        """
        keys = [_key(unit) for unit in self.units(raw)]
        found = {key: self._read(key, inputs["pixel_values"].device) for key in dict.fromkeys(keys)}
        missing = [key for key, value in found.items() if value is None]
        if missing:
            units = self.units(inputs)
            wanted = [units[keys.index(key)] for key in missing]
            together = {name: torch.cat([unit[name] for unit in wanted]) for name in wanted[0]}
            for key, value in zip(missing, encode(together), strict=True):
                found[key] = value
                self._write(key, value)
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        return [found[key] for key in keys]

    def units(self, inputs: Mapping[str, torch.Tensor]) -> list[Inputs]:
        """The vision input of each image, or of each tile where tiles do not know of each other."""
        pixels = inputs["pixel_values"]
        if (grids := inputs.get("image_grid_thw")) is not None:
            counts = grids.prod(-1).tolist()
        elif "image_sizes" in inputs and hasattr(self.config, "image_grid_pinpoints"):
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            side, grids = self.config.vision_config.image_size, self.config.image_grid_pinpoints
            counts = [int(image_size_to_num_patches(size, grids, side)) for size in inputs["image_sizes"].tolist()]
        else:
            counts = [1] * len(pixels)
        split = {name: value.split(1) for name, value in inputs.items()}
        split["pixel_values"] = pixels.split(counts)
        return [{name: parts[index] for name, parts in split.items()} for index in range(len(counts))]

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


def _key(unit: Inputs) -> str:
    digest = hashlib.sha256()
    for name in sorted(unit):
        digest.update(f"{name} {unit[name].dtype} {tuple(unit[name].shape)}".encode())
        digest.update(_bytes(unit[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
