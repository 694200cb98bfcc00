"""What a worker holds while and after it loads a model for ZeRO-3."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.model.loading import load_model
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.planning.dry_run import Live
from orpo_ray.planning.work import tensors_of
from orpo_ray.tiny_models.families import TINY_FAMILIES
from orpo_ray.training.sharded_loading import load_for_training
from support.pairs_by_hand import NORM

CPU = torch.device("cpu")
MAPPED_BYTES = 2**20
LET_GO_S = 0.03  # threads of gloo hold a tensor for a moment longer than the collective


def recipe_of(folder: str, section: dict[str, Any], stage: int = 3) -> Recipe:
    """Return a recipe that trains the model of a folder."""
    return parse_recipe(
        {
            "name": "x",
            "model": {"id": folder, **section},
            "data": {"train": "none"},
            "deepspeed": {"zero_stage": stage},
        }
    )


def write_model(folder: Path, family: str, **text: int) -> str:
    """Write a family's tiny model with other sizes of the language model; returns the folder."""
    from transformers import AutoModelForImageTextToText

    tiny = TINY_FAMILIES[family]()
    if not text:
        tiny.model().save_pretrained(folder)
        return str(folder)
    config = tiny.config()
    for name, size in text.items():
        setattr(config.text_config, name, size)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


class LiveMemory(Live):
    """Counts the bytes of tensors, those of mapped files aside: the system can drop these and read them again."""

    def add(self, tensors: Any) -> None:
        """Count the storages of these tensors that are not counted yet."""
        counted = [each for each in tensors_of(tensors) if each.device.type != "meta" and not self._is_mapped(each)]
        new = {each.untyped_storage() for each in counted} - set(self._known)
        deadline = time.monotonic() + LET_GO_S
        while self.now + sum(each.nbytes() for each in new) > self.peak and time.monotonic() < deadline:
            time.sleep(0.001)
        super().add(counted)

    def _is_mapped(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        # Looking takes time, and a small tensor of a file would be a small error only.
        if storage in self._known or storage.nbytes() < MAPPED_BYTES:
            return False
        return any(start <= storage.data_ptr() < end for start, end in _mapped_files())


def _mapped_files() -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = line.split()[0].split("-")
            yield int(start, 16), int(end, 16)


def memory_of_loading(_rank: int, _workers: int, folder: str, section: dict[str, Any]) -> dict[str, int]:
    """Return in bytes: `peak` while loading, `held` of base weights after it, and of the model `whole`, `largest`, and
    `scales` of 4-bit weights.
    """
    gc.collect()  # otherwise what an earlier test left decides when the collector frees a weight of this one
    with LiveMemory() as memory:
        model = load_for_training(recipe_of(folder, section), CPU)
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in base]
    held = sum(p.untyped_storage().nbytes() for p in base) + sum(p.ds_tensor.nbytes for p in base if _is_divided(p))
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    states = [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    states += [state.state2 for state in states if state.nested]
    scales = sum(state.absmax.nbytes + state.code.nbytes for state in states)
    figures = {"whole": sum(sizes), "largest": max(sizes), "scales": scales}
    return {"peak": memory.peak - adapters, "held": held} | figures


def reservations(_rank: int, _workers: int, folder: str, section: dict[str, Any], stage: int) -> int:
    """Return how often transformers reserves memory for a whole model while one is loaded."""
    from transformers import modeling_utils

    calls, original = [], modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: calls.append(1)
    try:
        load_for_training(recipe_of(folder, section, stage), CPU)
    finally:
        modeling_utils.caching_allocator_warmup = original
    return len(calls)


def _is_divided(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def differences(_rank: int, _workers: int, folder: str, sections: list[dict[str, Any]]) -> list[str]:
    """Load a model divided and whole, and return the names of weights, buffers and the like that are not the same."""
    found = []
    for section in sections:
        recipe = recipe_of(folder, section)
        whole, divided = load_model(recipe.model, CPU, recipe.optim.seed), load_for_training(recipe, CPU)
        ours, theirs = _state(divided), _state(whole)
        if ours.keys() != theirs.keys():
            found.append(f"{section}: {sorted(ours.keys() ^ theirs.keys())}")
        for name in ours:  # in an order that all ranks have
            if name in theirs and not _is_same(ours[name], theirs[name]):
                found.append(f"{section}: {name}")
        if PairModel(whole, NORM).tokens_per_image_value != PairModel(divided, NORM).tokens_per_image_value:
            found.append(f"{section}: tokens_per_image_value")
        # Weights that come with the model are divided; adapters are small and divided by the engine.
        base = [name for name, p in divided.named_parameters() if "lora_" not in name and "modules_to_save" not in name]
        found += [f"{section}: {name} is whole" for name in base if not _is_divided(divided.get_parameter(name))]
    return found


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    import deepspeed

    with deepspeed.zero.GatheredParameters([ours] if _is_divided(ours) else []):
        return (
            ours.dtype == theirs.dtype
            and ours.requires_grad == theirs.requires_grad
            and torch.equal(ours.detach(), theirs.detach())
        )
