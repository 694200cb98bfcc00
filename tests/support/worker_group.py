"""Processes that stand for the workers of a run, kept for all tests of a process: importing torch, transformers and
DeepSpeed again takes longer than most cases.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# What the ranks need. They are forks of a process that has imported these modules, once for all groups.
IMPORTED = ("torch", "deepspeed", "peft", "orpo_ray.training.worker", "orpo_ray.training.deepspeed_engine")


class WorkerGroup:
    """Some processes in one gloo process group, which run functions together, one after another.

    A function runs on every rank as `function(rank, size, *arguments)`; it must be importable. After an error the
    ranks may wait for each other, so that all of them are ended, and the next call starts new ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="worker-group-")
        self._folder = Path(self._temporary.name)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run the function on all ranks, and return its result on each.

        Raises:
            AssertionError: a rank raised or died; with its traceback, or with the end of what it printed.
        """
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send((function, arguments))
            return self._results()
        except BaseException:  # a test that ran out of time, too, leaves ranks in the middle of something
            self.close()
            raise

    def close(self) -> None:
        """End the processes by SIGKILL.

        A rank that ends by itself may abort. Probably a thread of gloo then destroys a tensor while Python shuts down
        (https://github.com/pytorch/pytorch/pull/179291); this was not reproduced here.
        """
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _results(self) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in results]):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    error, results[rank] = self._pipes[rank].recv()
                except EOFError:
                    error = self._last_words(rank)
                if error is not None:
                    raise AssertionError(f"rank {rank} of {self.size}: {error}")
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        copies = multiprocessing.get_context("forkserver")
        copies.set_forkserver_preload(list(IMPORTED))
        (self._folder / "store").unlink(missing_ok=True)
        for rank in range(self.size):
            pipe, theirs = copies.Pipe()
            process = copies.Process(target=_serve, args=(rank, self.size, str(self._folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def _last_words(self, rank: int) -> str:
        self._processes[rank].join()
        printed = self._log(rank).read_text(errors="replace")
        return f"ended with exit code {self._processes[rank].exitcode}\n{printed[-5000:]}"

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"


@cache
def worker_group(size: int) -> WorkerGroup:
    """Return the group with this number of workers. Its processes end with this process."""
    return WorkerGroup(size)


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, stream)
    faulthandler.enable()
    import torch
    import torch.distributed as dist

    gc.freeze()  # DeepSpeed collects garbage for each engine, which takes a second with all that was imported
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    # A file instead of a port: two tests cannot take the same, and no rank loses it when another one ends first.
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            answer = (None, function(rank, size, *arguments))
        except Exception:  # noqa: BLE001 - any error is reported by the test
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
