"""Import the libraries of a plan without what a plan has no use for: most of its seconds are imports."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without the garbage collector, which would look many times at what libraries make and keep."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_transformers() -> None:
    """Import what models of transformers need."""
    with uncollected():
        import transformers.modeling_utils  # noqa: F401


def import_peft() -> None:
    """Import peft, without the compiler that bitsandbytes imports for functions that no plan calls: two seconds.

    Should they be called later in this process, on a CPU, they run as they are written.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with uncollected():
            import peft  # noqa: F401
    finally:
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before
