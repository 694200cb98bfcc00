"""Load a sharded checkpoint that another number of workers wrote.

ZeRO keeps the float32 weights and the optimizer states of a group of weights as flat vectors, of which each worker
holds and saves a part. Where a weight is in these parts depends on the number of workers. Here each worker looks up its
own part in the files of all workers that wrote the checkpoint. The files are mapped into memory, so it reads little
more than that part, and nothing is written.

DeepSpeed's universal checkpoints are not used: for ZeRO-3, loading one gives all groups of weights the weight decay of
the first, and none can hold 8-bit states.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_WEIGHTS = "float32 weights"  # beside the names of the optimizer's moments
_QUANTIZED = "__bnb_optimizer_quant_state__"  # bitsandbytes' key of the states of one vector
_BLOCK = 256  # elements of an 8-bit moment that share a scale


class Vector(Protocol):
    """A flat vector, or what it can be computed from part by part."""

    def __getitem__(self, part: slice, /) -> torch.Tensor:
        """Return a part: float32."""


@dataclass(frozen=True)
class Piece:
    """A part of a weight in a worker's part of a flat vector."""

    name: str
    """Of the weight."""
    first: int
    """Its first element in the whole weight."""
    start: int
    """Its first element in the worker's vector."""
    length: int


@dataclass(frozen=True)
class EightBitMoment:
    """A moment of AdamW as bitsandbytes stores it."""

    codes: torch.Tensor
    """uint8 [n]."""
    scales: torch.Tensor
    """float32, one for each block."""
    values: torch.Tensor
    """float32 [256]: what each code stands for."""

    def __getitem__(self, part: slice, /) -> torch.Tensor:
        """Return a part, computed from the blocks that it touches."""
        from bitsandbytes.functional import dequantize_blockwise

        block = part.start // _BLOCK
        codes = self.codes[block * _BLOCK : part.stop].clone()
        scales = self.scales[block : block + -(-len(codes) // _BLOCK)].clone()
        values = dequantize_blockwise(codes, absmax=scales, code=self.values.clone(), blocksize=_BLOCK)
        return values[part.start - block * _BLOCK :]


def num_writers(folder: Path) -> int:
    """Return how many workers wrote the state in this folder."""
    return int(_read(_model_file(folder))["dp_world_size"])


def load_resharded(engine: Any, folder: Path) -> None:
    """Load a state into a DeepSpeed engine, whatever the number of workers that wrote it. A collective.

    Args:
        engine: DeepSpeed's engine of the ZeRO stage that wrote the state.
        folder: of the files that DeepSpeed's engines wrote.
    """
    optimizer = engine.optimizer
    model = _read(_model_file(folder))
    shards = [_read(_shard_file(folder, rank))["optimizer_state_dict"] for rank in range(model["dp_world_size"])]
    own = _own_shard(optimizer, model, shards)
    if _is_stage_3(optimizer):
        optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(model, strict=False)
    optimizer.load_state_dict(
        [own] * torch.distributed.get_world_size(), load_optimizer_states=True, load_from_fp32_weights=True
    )
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    engine.global_steps, engine.global_samples = model["global_steps"], model["global_samples"]
    engine.skipped_steps = model["skipped_steps"]
    if _is_stage_3(optimizer):
        optimizer.checkpoint_event_epilogue()


def _own_shard(optimizer: Any, model: Mapping[str, Any], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make the shard that this worker would have written, in the layout of its optimizer."""
    weights_key, states_key = _keys(shards[0])
    flats = _flat_vectors(optimizer)
    vectors = {
        kind: [_filled(len(flat), pieces, parts) for flat, pieces in zip(flats, _own_layout(optimizer), strict=True)]
        for kind, parts in _parts(shards, _layouts(model, shards)).items()
    }
    base = optimizer.optimizer
    others = next(iter(shards[0][states_key]["state"].values()))
    moments = [name for name in vectors if name != _WEIGHTS]
    states = {
        number: _scalars(others) | _stored(base, {name: vectors[name][number] for name in moments})
        for number in range(len(flats))
    }
    numbers = iter(range(len(flats)))
    groups = [
        group | {"params": [next(numbers) for _ in range(count)]}
        for group, count in zip(shards[0][states_key]["param_groups"], _vectors_by_group(optimizer), strict=True)
    ]
    own = {**shards[0], weights_key: vectors[_WEIGHTS], states_key: {"state": states, "param_groups": groups}}
    if "param_alignment_paddings" in own:
        own["param_alignment_paddings"] = optimizer.round_robin_bit16_padding
    return own


def _parts(
    shards: Sequence[dict[str, Any]], layouts: Sequence[list[list[Piece]]]
) -> dict[str, dict[str, list[tuple[Piece, Vector]]]]:
    """Return for each kind of vector, by name of a weight, its pieces in the vectors of all workers that wrote them."""
    found: dict[str, dict[str, list[tuple[Piece, Vector]]]] = defaultdict(lambda: defaultdict(list))
    for shard, layout in zip(shards, layouts, strict=True):
        weights_key, states_key = _keys(shard)
        for number, pieces in enumerate(layout):
            kinds = {_WEIGHTS: shard[weights_key][number], **_moments(shard[states_key]["state"][number])}
            for kind, vector in kinds.items():
                for piece in pieces:
                    found[kind][piece.name].append((piece, vector))
    return found


def _filled(size: int, pieces: Sequence[Piece], parts: Mapping[str, list[tuple[Piece, Vector]]]) -> torch.Tensor:
    """Fill a vector of this worker: float32 [size], zero where no weight is."""
    filled = torch.zeros(size)
    for own in pieces:
        for saved, vector in parts[own.name]:
            begin, end = max(own.first, saved.first), min(own.first + own.length, saved.first + saved.length)
            if begin < end:
                start, source = own.start + begin - own.first, saved.start + begin - saved.first
                filled[start : start + end - begin] = vector[source : source + end - begin]
    return filled


def _moments(state: Mapping[str, Any]) -> dict[str, Vector]:
    """Return the vectors among the states of one flat vector."""
    stored = state.get(_QUANTIZED, state)
    return {
        name: EightBitMoment(tensor, stored[f"absmax{name[-1]}"], stored[f"qmap{name[-1]}"])
        if tensor.dtype == torch.uint8
        else tensor
        for name, tensor in stored.items()
        if torch.is_tensor(tensor) and tensor.dim() == 1 and not name.startswith(("absmax", "qmap"))
    }


def _scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the states that are no vectors: the number of steps, which all vectors share."""
    found = {name: value for name, value in state.items() if name != _QUANTIZED and not _moments({name: value})}
    return copy.deepcopy(found)


def _stored(optimizer: Any, moments: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return moments as the optimizer's state dict holds them. 8-bit blocks have other borders than before."""
    if "state1" not in moments:
        return dict(moments)
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    stored: dict[str, torch.Tensor] = {}
    for name, moment in moments.items():
        number = name[-1]
        if len(moment) < optimizer.args.min_8bit_size:
            stored[name] = moment
            continue
        values = create_dynamic_map(signed=number == "1")
        codes, scales = quantize_blockwise(moment, code=values, blocksize=_BLOCK)
        stored |= {name: codes, f"absmax{number}": scales.absmax, f"qmap{number}": values}
    return {_QUANTIZED: stored}


def _layouts(model: Mapping[str, Any], shards: Sequence[dict[str, Any]]) -> list[list[list[Piece]]]:
    """Return for each worker that wrote the checkpoint where the weights are in each of its vectors."""
    if "param_slice_mappings" not in shards[0]:
        return [
            [_divided(shapes, rank, len(shards)) for shapes in model["param_shapes"]] for rank in range(len(shards))
        ]
    layouts: list[list[list[Piece]]] = []
    done: dict[str, int] = defaultdict(int)  # elements of a weight in the vectors of workers before
    for shard in shards:
        layouts.append([])
        for addresses in shard["param_slice_mappings"]:
            pieces = [Piece(name, done[name], at.start, at.numel) for name, at in addresses.items()]
            done.update({piece.name: piece.first + piece.length for piece in pieces})
            layouts[-1].append(pieces)
    return layouts


def _own_layout(optimizer: Any) -> list[list[Piece]]:
    """Return where the weights are in each vector of this worker."""
    names = optimizer.param_names
    if _is_stage_3(optimizer):
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        groups = [{names[weight]: weight.ds_shape for weight in group} for group in optimizer.fp16_groups]
        return [_divided(shapes, rank, world) for shapes in groups]
    groups = getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups
    return [
        [_piece(names[weight], weight._hp_mapping) for weight in group if weight._hp_mapping is not None]
        for group in groups
    ]


def _piece(name: str, mapping: Any) -> Piece:
    """Translate DeepSpeed's record of where a weight is in a vector."""
    inside = mapping.hp_fragment_address
    return Piece(name, mapping.lp_fragment_address.start, inside.start, inside.numel)


def _divided(shapes: Mapping[str, torch.Size], rank: int, world: int) -> list[Piece]:
    """Return a worker's pieces under ZeRO-3, which divides each weight evenly and pads the last part."""
    pieces, start = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        part = -(-size // world)
        first = min(rank * part, size)
        pieces.append(Piece(name, first, start, min(part, size - first)))
        start += part
    return pieces


def _flat_vectors(optimizer: Any) -> list[torch.Tensor]:
    """Return this worker's vectors of float32 weights, with padding."""
    if _is_stage_3(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [group["params"][0] for group in optimizer.optimizer.param_groups]


def _vectors_by_group(optimizer: Any) -> list[int]:
    """Return how many vectors each group of the optimizer has. ZeRO-3 divides a large group into several."""
    count = len(optimizer.optimizer.param_groups)
    if not _is_stage_3(optimizer):
        return [1] * count
    owners = list(optimizer.sub_group_to_group_id.values())
    return [owners.count(group) for group in range(count)]


def _is_stage_3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _keys(shard: Mapping[str, Any]) -> tuple[str, str]:
    """Return DeepSpeed's names of the float32 weights and of the optimizer's state in a shard."""
    if "fp32_flat_groups" in shard:
        return "fp32_flat_groups", "optimizer_state_dict"
    return "single_partition_of_fp32_groups", "base_optimizer_state"


def _model_file(folder: Path) -> Path:
    """Return the file of rank 0 with what is not sharded."""
    (found,) = (*folder.glob("zero_pp_rank_0_mp_rank_00_model_states.pt"), *folder.glob("mp_rank_00_model_states.pt"))
    return found


def _shard_file(folder: Path, rank: int) -> Path:
    (found,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return found


def _read(path: Path) -> dict[str, Any]:
    """Read a file of DeepSpeed; tensors stay on the disk until they are used."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return state
