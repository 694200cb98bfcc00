"""Compute something in a copy of this process, on another core, while this process goes on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def in_second_process(compute: Callable[[], T]) -> Callable[[], T]:
    """Start to compute in a fork of this process; the function that is returned waits for the result.

    Only for a process of its own without threads of Python, such as a command's: their locks would stay locked in the
    fork. Where there is no second core or no fork, or the fork fails, this process computes.

    Args:
        compute: returns something that can be pickled.
    """
    if not hasattr(os, "fork") or len(os.sched_getaffinity(0)) < 2:
        return compute
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's other threads do not exist in a fork; it would wait for them forever
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pickle.dumps(compute()))
            status = 0
        finally:
            os._exit(status)  # nothing of what this process has to do at its end
    os.close(write)

    def result() -> T:
        with os.fdopen(read, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        return pickle.loads(data) if status == 0 else compute()

    return result
