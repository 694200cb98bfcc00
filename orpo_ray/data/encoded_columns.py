"""`EncodedPair`s as an Arrow array and back, for the object store.

A pair's tensors lie in Arrow's own buffers. Reading returns views of them: pixels stay in shared memory until they
are packed into a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.processing.prompts import EncodedPrompt

_TENSOR = pa.struct(
    [
        ("name", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("back", pa.int64()),  # how many tensors before this one its data is: 0 if it is here
        ("data", pa.large_binary()),
    ]
)
ENCODED_TYPE = pa.struct(
    [
        ("sample_index", pa.int64()),
        ("id", pa.string()),
        ("truncated", pa.int64()),
        ("language", pa.string()),
        ("domain", pa.string()),
        ("tensors", pa.list_(_TENSOR)),
    ]
)
_FACTS = ("id", "truncated", "language", "domain")
# Every tensor starts at a multiple of this many bytes, so that views of any dtype are aligned.
_ALIGNMENT = 8
_REJECTED, _OTHER = "rejected_prompt.", "other_prompt."
_IMAGES = "images."


def num_bytes(pair: EncodedPair, stored: Collection[int] = ()) -> int:
    """Return the bytes of a pair's tensors, without those that are `stored` already (`tensor_ids`)."""
    return sum(value.nbytes for value in _tensors_of(pair).values() if id(value) not in stored)


def tensor_ids(pair: EncodedPair) -> set[int]:
    """Identify a pair's tensors. Pairs of one row share those of its prompt and images."""
    return {id(value) for value in _tensors_of(pair).values()}


def to_arrow(sample_indices: Sequence[int], pairs: Sequence[EncodedPair]) -> pa.StructArray:
    """Write pairs, each with its sample index, as an array of `ENCODED_TYPE`.

    Copies each tensor once, and stores a tensor that several pairs share once.
    """
    tensors = [_tensors_of(pair) for pair in pairs]
    flat = [item for each in tensors for item in each.items()]
    first: dict[int, int] = {}
    back = [place - first.setdefault(id(value), place) for place, (_, value) in enumerate(flat)]
    nothing = np.empty(0, np.uint8)
    data = [nothing if distance else value for distance, (_, value) in zip(back, flat, strict=True)]
    tensor_array = pa.StructArray.from_arrays(
        [
            pa.array([name for name, _ in flat], pa.string()),
            pa.array([value.dtype.str for _, value in flat], pa.string()),
            pa.array([value.shape for _, value in flat], pa.list_(pa.int64())),
            pa.array(back, pa.int64()),
            _aligned_binary([np.ascontiguousarray(value) for value in data]),
        ],
        fields=list(_TENSOR),
    )
    ends = np.cumsum([0, *map(len, tensors)], dtype=np.int32)
    return pa.StructArray.from_arrays(
        [
            pa.array(sample_indices, pa.int64()),
            *(pa.array([getattr(pair, name) for pair in pairs], ENCODED_TYPE.field(name).type) for name in _FACTS),
            pa.ListArray.from_arrays(pa.array(ends), tensor_array),
        ],
        fields=list(ENCODED_TYPE),
    )


def from_arrow(array: pa.StructArray) -> list[EncodedPair]:
    """Read what `to_arrow` wrote. The pairs' arrays are views of the Arrow buffers."""
    sample_indices = array.field("sample_index").to_pylist()
    facts = {name: array.field(name).to_pylist() for name in _FACTS}
    lists = array.field("tensors")
    # All tensors, even if `array` is a slice: the data of a tensor may be before the slice.
    values, names = _views(lists.values), lists.values.field("name").to_pylist()
    ends = lists.offsets.to_numpy().tolist()
    return [
        _pair_of(
            dict(zip(names[start:end], values[start:end], strict=True)),
            sample_index,
            {name: column[place] for name, column in facts.items()},
        )
        for place, (start, end, sample_index) in enumerate(zip(ends[:-1], ends[1:], sample_indices, strict=True))
    ]


def _tensors_of(pair: EncodedPair) -> dict[str, np.ndarray]:
    """All arrays of a pair by name, in one mapping."""
    tensors = {
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "prompt_is_text": pair.prompt_is_text,
    }
    tensors |= {_IMAGES + name: value for name, value in pair.images.items()}
    for prefix, prompt in ((_REJECTED, pair.rejected_prompt), (_OTHER, pair.other_prompt)):
        if prompt is not None:
            tensors |= {f"{prefix}ids": prompt.ids, f"{prefix}is_text": prompt.is_text}
            tensors |= {f"{prefix}{_IMAGES}{name}": value for name, value in prompt.images.items()}
    return tensors


def _pair_of(tensors: dict[str, np.ndarray], sample_index: int, facts: dict[str, Any]) -> EncodedPair:
    rejected_prompt, other_prompt = _pop_prompt(tensors, _REJECTED), _pop_prompt(tensors, _OTHER)
    images = _pop_prefixed(tensors, _IMAGES)
    prompts = {"rejected_prompt": rejected_prompt, "other_prompt": other_prompt}
    return EncodedPair(images=images, sample_index=sample_index, **prompts, **facts, **tensors)  # type: ignore[arg-type]


def _pop_prompt(tensors: dict[str, np.ndarray], prefix: str) -> EncodedPrompt | None:
    """Remove the tensors of a further prompt, and return it; None if there is none."""
    if f"{prefix}ids" not in tensors:
        return None
    ids, is_text = tensors.pop(f"{prefix}ids"), tensors.pop(f"{prefix}is_text")
    return EncodedPrompt(ids, is_text, _pop_prefixed(tensors, prefix + _IMAGES))


def _pop_prefixed(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove the tensors whose names start with `prefix`, and return them under names without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _aligned_binary(values: list[np.ndarray]) -> pa.LargeBinaryArray:
    """The bytes of contiguous arrays, one value each, every one padded to `_ALIGNMENT`."""
    offsets = np.cumsum([0, *(-(-value.nbytes // _ALIGNMENT) * _ALIGNMENT for value in values)], dtype=np.int64)
    data = np.zeros(offsets[-1], np.uint8)
    for start, value in zip(offsets[:-1].tolist(), values, strict=True):
        data[start : start + value.nbytes] = value.reshape(-1).view(np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)


def _views(tensors: pa.StructArray) -> list[np.ndarray]:
    """The arrays of a `_TENSOR` column where they lie."""
    data = tensors.field("data")
    if not len(data):
        return []
    _, offsets, buffer = data.buffers()
    starts = np.frombuffer(offsets, np.int64)[data.offset : data.offset + len(data)]
    places = np.arange(len(data)) - tensors.field("back").to_numpy()
    dtypes, shapes = tensors.field("dtype").to_pylist(), tensors.field("shape").to_pylist()
    return [
        np.frombuffer(buffer, np.dtype(dtype), int(np.prod(shape, dtype=np.int64)), start).reshape(shape)
        for start, dtype, shape in zip(starts[places].tolist(), dtypes, shapes, strict=True)
    ]
