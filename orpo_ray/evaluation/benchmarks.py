"""Yes/no benchmarks by log-probability, without a judge: POPE's and AMBER's questions, in their published files.

The model says yes if the answer "Yes" has the higher log-probability than "No", each with the tokens by which the chat
template ends an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orpo_ray.data.bad_rows import NO_SAMPLE, BadRow
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import RowError, UserError, preview
from orpo_ray.evaluation.answer_scores import iter_answer_logps
from orpo_ray.evaluation.statistics import CONFIDENCE, RESAMPLES, Estimate, mean_estimate
from orpo_ray.objective.collectives import gather_objects
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.step_planner import StepPlanner

OPTION = "--benchmark"
ANNOTATIONS = "annotations.json"
_AMBER_TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}


@dataclass(frozen=True)
class Question:
    """A yes/no question about an image."""

    id: str
    image: str
    """Path of the image, relative to the folder of images."""
    text: str
    answer: bool
    """Whether yes is right."""
    kind: str | None = None
    """What the question is about; None if the benchmark has no kinds."""


@dataclass(frozen=True)
class Benchmark:
    """A file of questions."""

    name: str
    """`pope:FILE` or `amber:FILE`, with the file's name alone."""
    questions: list[Question]
    images: Path
    """Folder of the images."""
    positive: bool
    """The answer that precision, recall and F1 are about: yes in POPE, no in AMBER, as in their own programs."""


@dataclass(frozen=True)
class BenchmarkScores:
    """What a model reached in a benchmark."""

    name: str
    figures: dict[str, Estimate]
    """accuracy, precision, recall, f1, yes (the share of yes)."""
    kinds: dict[str, Estimate] = field(default_factory=dict)
    """Accuracy by what the questions are about."""
    bad: int = 0
    """Questions that could not be asked."""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "name": self.name,
            "figures": {name: each.as_json() for name, each in self.figures.items()},
            "kinds": {name: each.as_json() for name, each in self.kinds.items()},
            "bad_rows": self.bad,
        }


def read_benchmark(text: str, images: str | None) -> Benchmark:
    """Read a benchmark's questions.

    Args:
        text: `pope:FILE` (a line of JSON per question: question_id, image, text, label) or `amber:FILE` (a list of id,
            image, query; the truth is in `annotations.json` beside the file).
        images: folder of the images; None for the file's own folder.

    Raises:
        UserError: the kind is unknown, or a file cannot be read as such.
    """
    kind, _, name = text.partition(":")
    if kind not in _READERS or not name:
        raise UserError("unknown benchmark", field=OPTION, value=text, fix="give pope:FILE or amber:FILE")
    path = Path(name)
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise UserError("no such folder", field="--images", value=images, fix="give the folder of the images")
    try:
        questions = list(_READERS[kind](path))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}", field=OPTION, value=text,
                        fix="give the published file") from None  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"a question is not as {kind} publishes them: {type(error).__name__}: {error}"
        raise UserError(problem, field=OPTION, value=text, fix="give the published file") from None
    if not questions:
        raise UserError("there are no yes/no questions in the file", field=OPTION, value=text,
                        fix="give the published file")  # fmt: skip
    return Benchmark(f"{kind}:{path.name}", questions, folder, positive=kind == "pope")


def _read_pope(path: Path) -> Iterator[Question]:
    for line in path.read_text("utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            yield Question(str(row["question_id"]), row["image"], row["text"], _is_yes(row["label"]))


def _read_amber(path: Path) -> Iterator[Question]:
    annotations = json.loads((path.parent / ANNOTATIONS).read_text("utf-8"))
    truths = {row["id"]: row for row in annotations}
    for row in json.loads(path.read_text("utf-8")):
        truth = truths[row["id"]]
        if isinstance(truth["truth"], str):  # the generative part has lists of objects
            kind = _AMBER_TYPES.get(truth["type"], truth["type"])
            yield Question(str(row["id"]), row["image"], row["query"], _is_yes(truth["truth"]), kind)


_READERS: dict[str, Callable[[Path], Iterator[Question]]] = {"pope": _read_pope, "amber": _read_amber}


def _is_yes(label: str) -> bool:
    found = {"yes": True, "no": False}.get(label.strip().lower())
    if found is None:
        raise ValueError(f"neither yes nor no: {preview(label)}")
    return found


def score_benchmark(
    benchmark: Benchmark,
    forward: Callable[[PairBatch], PairLogps],
    encoder: PairEncoder,
    planner: StepPlanner,
    rank: int = 0,
    num_workers: int = 1,
) -> BenchmarkScores:
    """Ask a model all questions of a benchmark, divided among the workers. A collective.

    Args:
        benchmark: the questions.
        forward: runs the model on a batch.
        encoder: encodes questions for it.
        planner: divides them into batches.
        rank: of this worker.
        num_workers: how many workers call this.

    Raises:
        UserError: no question can be asked.
    """
    said: dict[int, bool] = {}
    bad: list[BadRow] = []
    own = range(rank, len(benchmark.questions), num_workers)
    pairs = [_as_pair(benchmark.questions[place]) for place in own]
    logps = iter_answer_logps(pairs, [benchmark.images] * len(pairs), forward, encoder, planner)
    for place, pair, found in zip(own, pairs, logps, strict=True):
        if isinstance(found, RowError):
            bad.append(BadRow.of(found, NO_SAMPLE, pair.id, benchmark.name))
        else:
            said[place] = found.chosen > found.rejected
    parts = gather_objects((said, bad))
    said = dict(sorted(item for each, _ in parts for item in each.items()))
    bad = [row for _, each in parts for row in each]
    if not said:
        raise UserError(f"none of the {len(bad)} questions can be asked: {bad[0].reason}: {bad[0].detail}",
                        field=OPTION, value=benchmark.name, fix="give the folder of the images: --images")  # fmt: skip
    return summarize_answers(benchmark, said, len(bad))


def summarize_answers(benchmark: Benchmark, said: Mapping[int, bool], bad: int = 0) -> BenchmarkScores:
    """Count what the answers say.

    Args:
        benchmark: the questions.
        said: place of a question -> whether the model said yes.
        bad: questions that could not be asked.
    """
    asked = [benchmark.questions[place] for place in said]
    yes = np.array(list(said.values()), bool)
    truth = np.array([question.answer for question in asked], bool)
    right = yes == truth
    figures = {"accuracy": mean_estimate(right), **_rates(yes == benchmark.positive, truth == benchmark.positive)}
    figures["yes"] = mean_estimate(yes)
    kinds = sorted({question.kind for question in asked if question.kind is not None})
    of = np.array([question.kind or "" for question in asked])
    by_kind = {kind: mean_estimate(right[of == kind]) for kind in kinds} if len(kinds) > 1 else {}
    return BenchmarkScores(benchmark.name, figures, by_kind, bad)


def _rates(found: np.ndarray, wanted: np.ndarray) -> dict[str, Estimate]:
    """Estimate precision, recall and F1 by a bootstrap over questions, of which only the counts matter."""
    n = len(found)
    counts = np.array([(found & wanted).sum(), (found & ~wanted).sum(), (~found & wanted).sum()])
    probabilities = np.append(counts, n - counts.sum()) / n
    drawn = np.random.default_rng(0).multinomial(n, probabilities, RESAMPLES)[:, :3]
    edges = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    estimates = {}
    for name, rate in (("precision", _precision), ("recall", _recall), ("f1", _f1)):
        low, high = np.percentile(rate(drawn), edges).tolist()
        estimates[name] = Estimate(float(rate(counts[None])[0]), low, high, n)
    return estimates


def _precision(counts: np.ndarray) -> np.ndarray:
    return _ratio(counts[:, 0], counts[:, 0] + counts[:, 1])


def _recall(counts: np.ndarray) -> np.ndarray:
    return _ratio(counts[:, 0], counts[:, 0] + counts[:, 2])


def _f1(counts: np.ndarray) -> np.ndarray:
    return _ratio(2 * counts[:, 0], 2 * counts[:, 0] + counts[:, 1] + counts[:, 2])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; 0 where there is nothing to divide by, as scikit-learn does."""
    ratio: np.ndarray = part / np.maximum(whole, 1)
    return ratio


def _as_pair(question: Question) -> PreferencePair:
    content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question.text}]
    image = {"bytes": None, "path": question.image}
    return PreferencePair(question.id, [image], [{"role": "user", "content": content}], "Yes", "No")
