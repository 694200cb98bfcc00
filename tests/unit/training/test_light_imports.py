"""What every run imports before its workers do anything: no library that takes seconds."""

from __future__ import annotations

import subprocess
import sys

# The driver, what Ray Train's controller gets from it, and what reading tasks run.
LIGHT = (
    "orpo_ray.training.launch",
    "orpo_ray.training.worker_start",
    "orpo_ray.training.process_group",
    "orpo_ray.streaming.steps",
)
HEAVY = ("torch", "transformers", "deepspeed", "peft", "sklearn")


def test_driver_controller_and_reading_tasks_start_without_heavy_libraries() -> None:
    program = f"import sys, {', '.join(LIGHT)}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
