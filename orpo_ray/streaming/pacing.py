"""Ray Data's scheduling loop at a bounded rate.

The loop waits for output of its tasks. While the output queue is full, it leaves available output where it is, so that
the wait ends at once and the loop spins: a whole core, and the interpreter lock of the process that trains.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data._internal.execution.execution_callback import ExecutionCallback

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

# Each turn of the loop handles all tasks that have output, so a longer turn costs latency and no throughput.
SECONDS_PER_TURN = 0.02


class PacedLoop(ExecutionCallback):
    """Makes each turn of a scheduling loop take `SECONDS_PER_TURN` or more. Ray Data makes one for each execution."""

    def __init__(self) -> None:
        self._ended = time.monotonic()

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Sleep for the rest of a turn."""
        time.sleep(max(0.0, self._ended + SECONDS_PER_TURN - time.monotonic()))
        self._ended = time.monotonic()
