"""What a newcomer waits for: `orpo-ray --help`, and the quickstart from command to final model.

    python benchmarks/first_run.py [--json] [--quickstart]

Prints one row: medians in seconds with commit, command, hardware and date. `help_to_python_ratio` is against starting a
bare Python on the same machine in the same minutes, since seconds differ from machine to machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, provenance


def seconds(command: list[str], **options: object) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    return time.perf_counter() - started


def quickstart() -> dict[str, float]:
    """The quickstart in an empty folder: seconds from command to final model, and what it reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orpo_ray", "train", str(ROOT / "recipes/quickstart.yaml")]
        wall = seconds(command, cwd=folder)
        lines = [json.loads(line) for line in (Path(folder) / "runs/quickstart/metrics.jsonl").open()]
    training = sum(32 / line["train/pairs_per_second"] for line in lines if "train/loss" in line)
    kept = ("eval/rewards/accuracies", "eval/rewards/accuracies_exchanged", "eval/grounding_gap")
    return {"quickstart_s": wall, "quickstart_steps_s": training} | {name: lines[-1][name] for name in kept}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quickstart", action="store_true", help="also run the quickstart (about 3 minutes)")
    arguments = parser.parse_args()
    bare, helps = [], []
    for _ in range(7):  # in turn, so that a drift of the machine's speed meets both
        bare.append(seconds([sys.executable, "-c", "pass"]))
        helps.append(seconds([sys.executable, "-m", "orpo_ray", "--help"]))
    row: dict[str, object] = {
        **provenance(),
        "help_s": round(statistics.median(helps), 3),
        "help_to_python_ratio": round(statistics.median(h / b for h, b in zip(helps, bare, strict=True)), 2),
    }
    if arguments.quickstart:
        row |= {name: round(value, 4) for name, value in quickstart().items()}
    print(json.dumps(row) if arguments.json else "\n".join(f"{name:36} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
