"""Read back what W&B wrote to disk: its `.wandb` file is a LevelDB log of protocol buffers."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.runs import wait_until

_BLOCK, _FILE_HEADER = 32768, 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a run that has ended. W&B may write them after its `finish` has returned."""
    found: list[Any] = []

    def has_end() -> bool:
        found[:] = _records(file)
        return any(record.HasField("exit") for record in found)

    wait_until(has_end, "the end of W&B's file", 30)
    return found


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), _FILE_HEADER, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # the end of a block that no header fits in
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return  # still being written
        parts = (b"" if kind in (_WHOLE, _FIRST) else parts) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
