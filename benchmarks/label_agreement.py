"""How often do the labels of synthetic pairs agree with answers that are known to be right?

    python benchmarks/label_agreement.py RUN [--min-margin SCORE] [--json]

RUN is the run folder of `orpo-ray data synthesize`, whose rows gave answers that the label did not use. Right is a
candidate with the same words as the row's answer. Of a pair with one right answer, chance labels it right half of the
time. With --min-margin, the pairs are those that `synthesize.min_margin` would have kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import provenance

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.shards import ShardReader
from orpo_ray.evaluation.statistics import mean_estimate
from orpo_ray.synthesis.labels.reference import agreement
from orpo_ray.synthesis.source import source_rows


def right_answers(folder: Path) -> dict[str, str]:
    """Read the answers of the rows of a set by their ids, as its `synthesis.json` says."""
    identity: dict[str, Any] = json.loads((folder / "data" / "synthesis.json").read_text())
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    fields = ("source", "format", "columns", "image_root", "max_rows", "seed", "rows_per_part")
    raw = {"name": "x", "model": {"id": manifest["model"]}, "data": manifest["data"]}
    recipe = parse_recipe(raw | {"synthesize": {name: identity[f"synthesize.{name}"] for name in fields}})
    source, reader = source_rows(recipe), ShardReader()
    rows = [row for part in range(source.num_parts) for row in source.read(part, reader)]
    return {row.id: row.answer for row in rows if not isinstance(row, BadRow) and row.answer is not None}


def measure(folder: Path, min_margin: float = 0.0) -> dict[str, Any]:
    """Count right candidates, and pairs with one right answer whose chosen one it is.

    Args:
        folder: of the set.
        min_margin: least difference between the scores of a pair's answers.
    """
    answers = right_answers(folder)
    lines = [
        json.loads(line)
        for file in sorted((folder / "data" / "candidates").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    candidates, sides = list[bool](), list[tuple[bool, bool]]()
    for line in lines:
        scored = [each for each in line["candidates"] if "score" in each]
        is_right = [agreement(each["text"], answers[line["id"]]) == 1 for each in scored]
        candidates += is_right
        if line["outcome"] == "pair":
            scores = [each["score"] for each in scored]
            if max(scores) - min(scores) >= min_margin:
                sides.append((is_right[int(np.argmax(scores))], is_right[int(np.argmin(scores))]))
    if not sides:
        sys.exit(f"no pair of {folder} has a margin of {min_margin:g} or more")
    chosen, rejected = (np.array(side) for side in zip(*sides, strict=True))
    decided = chosen != rejected
    return {
        "min_margin": min_margin,
        "pairs": len(sides),
        "pairs_with_one_right": int(decided.sum()),
        "agreement_ratio": mean_estimate(chosen[decided]).as_json() if decided.any() else None,
        "right_candidates": mean_estimate(np.array(candidates)).as_json(),
        "right_chosen": mean_estimate(chosen).as_json(),
        "right_rejected": mean_estimate(rejected).as_json(),
    }


def main() -> None:
    """Measure a set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--min-margin", type=float, default=0.0, metavar="SCORE", help="leave out pairs below it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = measure(options.run, options.min_margin) | provenance()
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        shown = (
            f"{value['value']:.4f}  ({value['low']:.4f} to {value['high']:.4f})" if isinstance(value, dict) else value
        )
        print(f"{name:22}{shown}")


if __name__ == "__main__":
    main()
