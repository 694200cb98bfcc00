"""POPE and AMBER in their published layout, and what their answers count for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.evaluation.benchmarks import Benchmark, Question, read_benchmark, score_benchmark, summarize_answers
from orpo_ray.model.loading import load_model
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor

CPU = torch.device("cpu")


@pytest.fixture
def pope(tmp_path: Path) -> str:
    rows = [
        {
            "question_id": n,
            "image": f"COCO_val2014_{n}.png",
            "text": f"Is there a {thing} in the image?",
            "label": label,
        }
        for n, (thing, label) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes"), ("tree", "no")])
    ]
    (tmp_path / "images").mkdir()
    for row in rows[:3]:
        Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / str(row["image"]))
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return f"pope:{file}"


def write_amber(folder: Path) -> str:
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"},
        {"id": 1006, "image": "AMBER_1.jpg", "query": "Is there a cloud in this image?"},
    ]
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["bird"]},
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1006, "type": "discriminative-hallucination", "truth": "no"},
    ]
    (folder / "query_all.json").write_text(json.dumps(queries))
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return f"amber:{folder / 'query_all.json'}"


def test_files_in_their_published_layout(pope: str, tmp_path: Path) -> None:
    found = read_benchmark(pope, str(tmp_path / "images"))
    assert (found.name, found.positive, len(found.questions)) == ("pope:coco_pope_random.json", True, 4)
    assert found.questions[1] == Question("1", "COCO_val2014_1.png", "Is there a cat in the image?", False)
    amber = read_benchmark(write_amber(tmp_path), None)
    assert (amber.positive, amber.images) == (False, tmp_path)
    assert [(each.answer, each.kind) for each in amber.questions] == [(True, "state"), (False, "existence")]


def test_other_files_are_one_message(pope: str, tmp_path: Path) -> None:
    for text, said in [
        ("mmbench:x", "unknown benchmark"),
        ("pope:none.json", "cannot read none.json"),
        (f"amber:{pope.removeprefix('pope:')}", "annotations.json"),
    ]:
        with pytest.raises(UserError, match=said):
            read_benchmark(text, str(tmp_path))
    file = tmp_path / "odd.json"
    file.write_text('{"question_id": 1, "image": "a", "text": "?", "label": "maybe"}\n')
    with pytest.raises(UserError, match="neither yes nor no"):
        read_benchmark(f"pope:{file}", None)
    with pytest.raises(UserError, match="no such folder"):
        read_benchmark(f"pope:{file}", str(tmp_path / "nowhere"))


def test_figures_by_hand(tmp_path: Path) -> None:
    """Truth yes yes yes no no, said yes yes no yes no: 2 of 3 found, 2 of 3 right among those said."""
    truths = (True, True, True, False, False)
    questions = [Question(str(n), "a", "?", truth, "ab"[n % 2]) for n, truth in enumerate(truths)]
    said = dict(enumerate((True, True, False, True, False)))
    about_yes = summarize_answers(Benchmark("x", questions, tmp_path, positive=True), said)
    assert {name: each.value for name, each in about_yes.figures.items()} == pytest.approx(
        {"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 0.6}
    )
    about_no = summarize_answers(Benchmark("x", questions, tmp_path, positive=False), said)
    assert {name: about_no.figures[name].value for name in ("precision", "recall", "f1")} == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    )
    assert {kind: each.value for kind, each in about_no.kinds.items()} == pytest.approx({"a": 2 / 3, "b": 0.5})
    assert all(each.low <= each.value <= each.high for each in about_yes.figures.values())
    never = summarize_answers(Benchmark("x", questions, tmp_path, positive=True), dict.fromkeys(said, False))
    assert (never.figures["precision"].value, never.figures["f1"].value) == (0.0, 0.0)


@pytest.mark.parametrize("more_likely", ["Yes", "No"])
def test_the_more_likely_answer_is_what_the_model_says(pope: str, tmp_path: Path, more_likely: str) -> None:
    encoder = PairEncoder(load_processor("orpo-ray/tiny-smolvlm", None), 512)
    model = PairModel(load_model(ModelConfig(id="orpo-ray/tiny-smolvlm"), CPU, 0), PixelNorm.of(encoder.processor))
    planner = StepPlanner.of(ORPO(0.1), 300, encoder, model.eval(), CPU)
    benchmark = read_benchmark(pope, str(tmp_path / "images"))
    own = score_benchmark(benchmark, model, encoder, planner)
    assert (own.figures["accuracy"].pairs, own.bad) == (3, 1)

    def certain(batch: PairBatch) -> PairLogps:
        logps = model(batch)
        sign = 1.0 if more_likely == "Yes" else -1.0
        return PairLogps(logps.rejected + sign, logps.rejected, *list(vars(logps).values())[2:6])

    found = score_benchmark(benchmark, certain, encoder, planner)
    assert found.figures["yes"].value == (more_likely == "Yes")
    assert found.figures["accuracy"].value == pytest.approx(2 / 3 if more_likely == "Yes" else 1 / 3)
    with pytest.raises(UserError, match="none of the 4 questions can be asked: missing_image"):
        score_benchmark(read_benchmark(pope, str(tmp_path)), model, encoder, planner)
