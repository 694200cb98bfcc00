"""What `orpo-ray evaluate` measures of one model: scores of held-out pairs, its own answers, yes/no benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.reading import ReadSpec
from orpo_ray.evaluation.benchmarks import Benchmark, BenchmarkScores, score_benchmark
from orpo_ray.evaluation.evaluator import Evaluator, HeldOut, Scores
from orpo_ray.evaluation.generation import Answerer, generate_held_out
from orpo_ray.evaluation.pair_scores import read_whole_pair_scores
from orpo_ray.evaluation.targets import Target
from orpo_ray.evaluation.token_scores import Tokens, pairs_to_show, score_tokens
from orpo_ray.model.loading import concatenated_because, pick_attention
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.storage.run_folder import EVAL_PAIRS_START_FILE, RunFolder
from orpo_ray.streaming.steps import from_rank_zero_of_ray_train
from orpo_ray.tracking.generations import Generation


@dataclass(frozen=True)
class Work:
    """What each model is measured by."""

    recipe: Recipe
    held_out: ReadSpec | None
    benchmarks: list[Benchmark]
    generate: int
    """Number of held-out pairs to answer."""


@dataclass
class Measured:
    """What one model was measured by."""

    scores: Scores | None = None
    """Of the held-out pairs; None without any."""
    answers: list[Generation] = field(default_factory=list)
    benchmarks: list[BenchmarkScores] = field(default_factory=list)
    tokens: dict[int, dict[str, Tokens]] = field(default_factory=dict)
    """Log-probs of single tokens, of the pairs that a report shows."""


@dataclass(frozen=True)
class Place:
    """Which of the workers that measure together this process is."""

    rank: int = 0
    num_workers: int = 1
    max_encoders: int | None = None
    """Encoding tasks at a time, for all workers together; None for as many as the cluster has room for."""
    from_rank_zero: Callable[[Any], Any] = from_rank_zero_of_ray_train
    """Gives every worker what rank 0 has. A collective."""


Measure = Callable[[Target, Work, Console, bool, RunFolder | None], Measured]
"""As `measure`."""


def measure(
    target: Target,
    work: Work,
    console: Console,
    grounding: bool,
    run: RunFolder | None = None,
    place: Place = Place(),
) -> Measured:
    """Load a model and measure it. A collective, if several workers do.

    Args:
        target: the model.
        work: by what.
        console: gets a line about each part.
        grounding: whether to score the held-out pairs with exchanged and with blank images too.
        run: folder of the run, if single tokens are to be scored for its report.
        place: which worker this is.

    Returns:
        What was measured, the same on every worker.

    Raises:
        UserError: the model cannot be loaded, or nothing can be scored.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    recipe, held_out = work.recipe, work.held_out
    if why := pick_attention(target.model).why:
        say(concatenated_because(why))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = target.encoder(recipe)
    encoder = spec.build()
    model = PairModel(target.load(device, recipe.optim.seed), PixelNorm.of(encoder.processor)).eval()
    planner = StepPlanner.of(load_objective(recipe), recipe.optim.tokens_per_microbatch, encoder, model, device)
    measured = Measured()
    if held_out is not None:
        say(f"scoring {held_out.end_sample:,} pairs with {target.title}")
        max_encoders = place.max_encoders or max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)
        pairs = HeldOut(
            held_out, spec, max_encoders, place.rank, place.num_workers, from_rank_zero=place.from_rank_zero
        )
        measured.scores = Evaluator(model, pairs, planner).evaluate(grounding, blank=grounding)
        if run is not None:
            rows = pairs_to_show(measured.scores.pairs, read_whole_pair_scores(run, EVAL_PAIRS_START_FILE))
            measured.tokens = score_tokens(
                model, model, encoder, planner, held_out, [row["sample_index"] for row in rows]
            )
    if held_out is not None and work.generate:
        say(f"answering {work.generate:,} prompts with {target.title}")
        answerer = Answerer(model.model, encoder, recipe.eval.max_new_tokens, recipe.optim.seed)
        measured.answers = generate_held_out(answerer, held_out, work.generate, place.rank, place.num_workers)
    for benchmark in work.benchmarks:
        say(f"asking {len(benchmark.questions):,} questions of {benchmark.name}")
        scores = score_benchmark(benchmark, model, encoder, planner, place.rank, place.num_workers)
        measured.benchmarks.append(scores)
    return measured
