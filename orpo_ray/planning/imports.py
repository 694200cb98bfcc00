"""Import the libraries of a plan without what a plan has no use for: most of its seconds are imports."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Packages that transformers and accelerate import where they are installed: for the losses of object detection, and for
# Amazon's SageMaker.
_UNUSED = ("scipy", "boto3")
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
    """Import what models of transformers need, unless this process has imported transformers already."""
    if "transformers" in sys.modules:
        return
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: Python takes the package for missing
    try:
        with uncollected():
            import transformers.modeling_utils  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


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
