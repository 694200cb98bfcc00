"""`orpo-ray evaluate`: score held-out pairs with a run's final model, or with any model or adapters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.errors import UserError
from orpo_ray.evaluation.benchmarks import BenchmarkScores, read_benchmark
from orpo_ray.evaluation.categories import groups_by
from orpo_ray.evaluation.evaluator import with_prefix
from orpo_ray.evaluation.judge import MODEL_OPTION, Judge, Judged, judge_answers
from orpo_ray.evaluation.measuring import Measure, Work, measure
from orpo_ray.evaluation.pair_scores import write_pair_scores
from orpo_ray.evaluation.summary import Summary, summarize
from orpo_ray.evaluation.targets import Target, find_base, find_target
from orpo_ray.evaluation.token_scores import write_tokens
from orpo_ray.model.memory import free_memory
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, RECIPE_FILE, RunFolder
from orpo_ray.tracking.generations import Generation


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `orpo-ray evaluate`."""

    base: str | None = None
    """A run, a model folder or a hub model to compare with, on the same pairs."""
    by: Sequence[str] = ()
    """Columns of the data by whose values the pairs are grouped."""
    generate: int = 0
    """Number of held-out pairs whose prompts the models answer."""
    benchmarks: Sequence[str] = ()
    """Yes/no benchmarks: `pope:FILE` or `amber:FILE`."""
    images: str | None = None
    """Folder of the benchmarks' images; by default that of each file."""
    judge: Judge | None = None
    """Compares the answers with those of the base, or with the chosen ones of the data."""

    def check(self) -> None:
        """Check what can be checked before a model is loaded. Raises UserError."""
        if self.judge is not None:
            self.judge.check()
            if not self.generate:
                raise UserError("there are no answers to judge", field=MODEL_OPTION, fix="add --generate N")
        if self.images is not None and not self.benchmarks:
            raise UserError("there is no benchmark", field="--images", value=self.images,
                            fix="add --benchmark pope:FILE")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The result of `orpo-ray evaluate`."""

    metrics: dict[str, float]
    """The objective's metrics as `eval/...`, and those of grounding unless the recipe leaves it out."""
    summary: Summary | None
    """None without held-out pairs."""
    answers: list[Generation] = field(default_factory=list)
    """The model's own answers to held-out prompts."""
    base_answers: list[Generation] = field(default_factory=list)
    """Those of the model that it was compared with."""
    judged: Judged | None = None
    benchmarks: list[BenchmarkScores] = field(default_factory=list)
    base_benchmarks: list[BenchmarkScores] = field(default_factory=list)
    """Those of the model that it was compared with."""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        found: dict[str, Any] = dict(self.metrics)
        if self.summary is not None:
            found |= self.summary.as_json()
        if self.benchmarks:
            base: list[BenchmarkScores | None] = [*self.base_benchmarks] or [None] * len(self.benchmarks)
            found["benchmarks"] = [
                own.as_json() | {"base": other and other.as_json()}
                for own, other in zip(self.benchmarks, base, strict=True)
            ]
        if self.judged is not None:
            found["judged"] = self.judged.as_json()
        if self.answers:
            others = {each.sample_index: each for each in self.base_answers}
            found["answers"] = [
                each.as_line() | {"base": both_answers(others.get(each.sample_index))} for each in self.answers
            ]
        return found


def both_answers(generation: Generation | None) -> dict[str, str] | None:
    """Return the two answers alone."""
    return None if generation is None else {"greedy": generation.greedy, "sampled": generation.sampled}


def evaluate_run(
    uri: str,
    overrides: Sequence[str],
    console: Console,
    options: EvaluateOptions = EvaluateOptions(),
    measuring: Measure = measure,
) -> Evaluation:
    """Score the held-out pairs of a run, a model or adapters.

    Each pair's scores are kept in the folder of a run that is evaluated on its own pairs.

    Args:
        uri: A run's folder, whose recipe and `final/` are used; or a folder of a model or of peft adapters, with
            `data.eval=...` among the overrides. Adapters are applied to the base model as the recipe loads it, in 4
            bits if the recipe says so.
        overrides: `FIELD=VALUE` for the recipe. With `data.eval`, a fraction that the run held out does not count.
        console: Gets one line about what is scored.
        options: What else to do.
        measuring: Where to do it: in this process, or on workers of the cluster.

    Raises:
        UserError: The folder or the recipe cannot be used, or there are no held-out pairs.
    """
    with contextlib.redirect_stdout(sys.stderr):
        options.check()
        folder = RunFolder(uri.rstrip("/"))  # the local copy of a remote run is deleted with this object
        target = find_target(folder, overrides)
        recipe, held_out = target.recipe, held_out_data(target.recipe)
        benchmarks = [read_benchmark(each, options.images) for each in options.benchmarks]
        if held_out is None and (not benchmarks or options.generate or options.by):
            raise UserError("there are no held-out pairs", field="data.eval", fix="add data.eval=FILE to the command")
        categories = {} if held_out is None else {name: groups_by(held_out, name) for name in options.by}
        base_folder = None if options.base is None else RunFolder(options.base.rstrip("/"))
        base = None if base_folder is None or options.base is None else find_base(options.base, base_folder)
        if held_out is not None:
            start_ray()
        kept = folder.has(RECIPE_FILE) and not any(each.startswith(("data.", "eval.")) for each in overrides)
        work = Work(recipe, held_out, benchmarks, options.generate)
        own = measuring(target, work, console, recipe.eval.grounding, folder if kept else None)
        other = None if base is None else measuring(base, work, console, False, None)
        if kept and held_out is not None and own.scores is not None:
            write_pair_scores(folder, EVAL_PAIRS_FILE, own.scores.pairs, data=held_out.digest)
            write_tokens(folder, own.tokens, held_out.digest)
        judged = None
        if options.judge is not None and own.answers:
            free_memory()  # of the judged models
            judged = _judge(options.judge, own.answers, None if other is None else other.answers, base)
        compared = None if base is None or other is None or other.scores is None else (base.name, other.scores.pairs)
        return Evaluation(
            {} if own.scores is None else with_prefix(own.scores.metrics, "eval"),
            None if own.scores is None else summarize(own.scores.pairs, categories, compared),
            own.answers,
            [] if other is None else other.answers,
            judged,
            own.benchmarks,
            [] if other is None else other.benchmarks,
        )


def _judge(
    judge: Judge, answers: Sequence[Generation], base_answers: Sequence[Generation] | None, base: Target | None
) -> Judged:
    """Compare the answers with the base's, or with the chosen ones of the data."""
    if base_answers is None or base is None:
        return judge_answers(judge, answers, [each.chosen for each in answers], "the chosen answers of the data")
    others = {each.sample_index: each.greedy for each in base_answers}
    both = [each for each in answers if each.sample_index in others]
    return judge_answers(judge, both, [others[each.sample_index] for each in both], base.name)
