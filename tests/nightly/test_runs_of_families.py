"""Complete runs of every family with its own processor: Ray Data, training, evaluation, final model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from support.families import with_processor
from support.runs import run
from support.tiny_runs import losses, tiny_recipe


@pytest.mark.parametrize("family", with_processor())
def test_trains_is_evaluated_and_leaves_a_model(ray_cluster: None, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    summary = run(
        tiny_recipe(
            tmp_path, family, model={"id": f"orpo-ray/tiny-{family}"}, optim={"max_steps": 6},
            data={"eval": "easy-vqa:test", "max_length": 1024}, eval={"max_pairs": 8, "grounding": True},
        )
    )  # fmt: skip
    curve = losses(Path(summary.run_uri))
    assert sorted(curve) == list(range(1, 7))
    assert all(math.isfinite(loss) for loss in curve.values())
    assert curve[6] < curve[1]
    assert summary.metrics["eval/pairs"] == 8
    final = Path(summary.run_uri) / "final"
    _, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    AutoProcessor.from_pretrained(final)
