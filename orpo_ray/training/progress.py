"""Progress of a run on the console: the driver polls the run's `RunStatus`."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

POLL_SECONDS = 0.5
STARTING = "starting workers"
"""The phase before the first step."""
LINE_SECONDS = 10.0  # between lines, if the console is not a terminal


class ProgressDisplay:
    """Context manager that shows a run's status while its body runs: a bar on a terminal, lines elsewhere.

    Args:
        status: handle of the run's `RunStatus` actor.
        console: where to print.

    Attributes:
        config: reference to what the workers train with, once there is one.
    """

    def __init__(self, status: Any, console: Console) -> None:
        self._status, self._console, self._warnings_shown = status, console, 0
        self.config: ray.ObjectRef | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._state()  # the last warnings

    def _run(self) -> None:
        if self._console.is_terminal:
            self._run_bar()
        else:
            self._run_lines()

    def _run_bar(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[steps]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, *times, console=self._console, transient=True) as progress:
            task = progress.add_task(_phase({}), total=1, steps="", note="")
            while not self._stop.wait(POLL_SECONDS):
                state = self._state()
                progress.update(
                    task,
                    description=_phase(state),
                    completed=state.get("step", 0),
                    total=state.get("num_steps", 1),
                    steps=f"{state['step']:,}/{state['num_steps']:,}" if "num_steps" in state else "",
                    note=_note(state),
                )

    def _run_lines(self) -> None:
        last_line, last_time = "", 0.0
        while not self._stop.wait(POLL_SECONDS):
            state = self._state()
            line = _phase(state)
            if "num_steps" in state:
                line += f"  step {state['step']:,}/{state['num_steps']:,}"
            if line != last_line and time.monotonic() - last_time >= LINE_SECONDS:
                self._console.print(f"{line}  {_note(state)}".rstrip(), highlight=False, soft_wrap=True)
                last_line, last_time = line, time.monotonic()

    def _state(self) -> dict[str, Any]:
        """Fetch the state, and print warnings that were not printed yet."""
        try:
            state: dict[str, Any] = ray.get(self._status.state.remote(), timeout=5)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return {}
        if self.config is not None and not state["has_config"]:
            self._status.begin.remote([self.config])  # the actor was started again
        for text in state["warnings"][self._warnings_shown :]:
            self._console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)
        self._warnings_shown = len(state["warnings"])
        return state


def _phase(state: dict[str, Any]) -> str:
    phase: str = state.get("phase", "checking the model")
    return f"{phase}: {waits_for()}" if phase == STARTING else phase


def waits_for() -> str:
    """Say what workers that are not there yet wait for: resources of the cluster, or their own start."""
    groups: list[dict[str, Any]] = list(ray.util.placement_group_table().values())
    pending = [group["bundles"] for group in groups if group["state"] == "PENDING"]
    if not pending:
        return "their processes import the libraries"
    needs: dict[str, float] = {}
    for bundle in pending[0].values():
        for name, amount in bundle.items():
            needs[name] = needs.get(name, 0.0) + amount
    names, free = [name for name in ("CPU", "GPU") if name in needs], ray.available_resources()
    wanted = ", ".join(f"{needs[name]:g} {name}" for name in names)
    return f"waiting for {wanted}; free now: {', '.join(f'{free.get(name, 0.0):g} {name}' for name in names)}"


def _note(state: dict[str, Any]) -> str:
    shown = (
        ("loss", "loss", ".3f"),
        ("rewards/accuracies", "accuracy", ".2f"),
        ("pairs_per_second", "pairs/s", ".1f"),
        ("num_workers", "workers", "d"),
    )
    return "  ".join(f"{label} {state[name]:{spec}}" for name, label, spec in shown if name in state)
