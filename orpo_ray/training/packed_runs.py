"""Train several runs side by side, each into its own run folder, which is that of a run of `train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.evaluation.evaluator import with_pass, with_prefix
from orpo_ray.evaluation.pair_scores import EXCHANGED, write_pair_scores
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.multi_adapter import ALONE
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlan, StepPlanner
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, EVAL_PAIRS_START_FILE, RunFolder
from orpo_ray.tracking.trackers import MultiLogger
from orpo_ray.training.ahead import one_ahead, pinned
from orpo_ray.training.checkpoint import load_checkpoint, save_final
from orpo_ray.training.divergence import skipped_message
from orpo_ray.training.run_books import RunBooks
from orpo_ray.training.saving import Saver
from orpo_ray.training.side_by_side import SideBySide, StepResult, tokens_for
from orpo_ray.training.step_times import by_worker, memory_gb
from orpo_ray.training.unlogged import log_missing


class Listener(Protocol):
    """Hears of every run. Called from the thread that trains, and from those that open run folders."""

    def tell(self, name: str, **state: object) -> None:
        """Take what should be shown of a run: `step, num_steps, phase` and metrics."""

    def warn(self, name: str, text: str) -> None:
        """Take a warning of a run."""

    def report(self, name: str, metrics: dict[str, float]) -> None:
        """Take an evaluation of a run, or the metrics of a checkpoint, with prefixes and `step`."""

    def ended(self, name: str, error: Exception | None) -> None:
        """Hear that a run has ended: at its end, or since it was asked to, or by an error of its own."""

    def asks_to_stop(self, name: str) -> bool:
        """Whether a run should leave, without another checkpoint."""


@dataclass(frozen=True)
class PackedData:
    """What all runs of a pack read."""

    train: ReadSpec
    """Training rows."""
    shares: Callable[[int, Packing], Iterator[StepShare]]
    """First step, and how to pack -> all steps from there."""
    held_out: Callable[[bool, Packing], Iterable[StepShare]] | None
    """Whether images are exchanged, and how to pack -> the held-out pairs; None if there are none."""
    held_out_digest: str
    encoder: PairEncoder
    num_steps: int
    """Of the whole run of each."""


@dataclass
class _Run:
    recipe: Recipe
    books: RunBooks
    saver: Saver


class PackedRuns:
    """The training program of a pack, in one process. A run that fails or leaves disturbs no other.

    Args:
        recipes: of the runs by name, resolved; their run folders exist.
        checkpoints: the names of the checkpoints to resume from, by run; None for a run that begins.
        model: the `PairModel` of the first recipe, with its adapter.
        data: what the runs read.
        listener: hears of every run.
        node: identifies this node.

    Raises:
        UserError: the runs cannot share a process, or their checkpoints are of different steps.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        checkpoints: Mapping[str, str | None],
        model: PairModel,
        data: PackedData,
        listener: Listener,
        node: str,
    ) -> None:
        self._data, self._listener, self._model = data, listener, model
        self._device = next(model.parameters()).device
        self._together = SideBySide(recipes, model, data.num_steps)
        first = next(iter(recipes.values()))
        tokens = tokens_for(first, len(recipes))
        self._planner = StepPlanner.of(load_objective(first), tokens, data.encoder, model, self._device)
        self._every = (first.eval, first.checkpoint.every_steps)
        self._runs: dict[str, _Run] = {}
        for name, recipe in recipes.items():
            try:
                self._runs[name] = self._opened(name, recipe, checkpoints[name], node, len(recipes))
            except (OrpoRayError, OSError) as error:
                self._together.leave(name)
                listener.ended(name, error)
        steps = {run.books.position.step for run in self._runs.values()}
        if len(steps) > 1:
            raise UserError(
                f"these runs cannot go on side by side: their checkpoints are of steps {sorted(steps)}",
                fix=ALONE,
            )
        self._step = steps.pop() if steps else 0

    def run(self) -> None:
        """Train all runs to their ends."""
        try:
            if self._runs:
                self._run()
        finally:  # after an error that ends them all, nothing else may write to their folders
            for run in self._runs.values():
                with suppress(OrpoRayError, OSError):
                    run.saver.end_upload()
                    run.books.tracker.close()

    def _run(self) -> None:
        evaluation, save_every = self._every
        if evaluation.on_start and not self._step:
            self._evaluate(grounding=False, keep_as=EVAL_PAIRS_START_FILE)
        self._model.train()
        started = time.perf_counter()
        for plan in one_ahead(map(self._planned, self._shares()), self._device, waits=True):
            waited = time.perf_counter() - started
            results = self._together.train_step(plan)
            for name, result in results.items():
                with self._alone(name):
                    self._finish_step(name, plan, result, started, waited)
            self._step = plan.step + 1
            if self._step < self._data.num_steps:
                if evaluation.every_steps and self._step % evaluation.every_steps == 0:
                    for name, metrics in self._evaluate(grounding=False).items():
                        self._listener.report(name, with_prefix(metrics, "eval") | {"step": self._step})
                if save_every and self._step % save_every == 0:
                    self._save({name: with_prefix(result.metrics, "train") for name, result in results.items()})
            self._let_go()
            if not self._runs:
                return
            started = time.perf_counter()
        self._finish()

    def _opened(self, name: str, recipe: Recipe, checkpoint: str | None, node: str, count: int) -> _Run:
        engine = self._together.runs[name].engine
        saver = Saver(recipe, engine, 0, 1, count)
        position, unlogged = load_checkpoint(checkpoint, engine, recipe, self._data.train, node)

        def warn(text: str) -> None:
            self._listener.warn(name, text)

        def tell(**state: object) -> None:
            self._listener.tell(name, **state)

        tracker = MultiLogger.open(recipe, position.step, warn)
        log_missing(unlogged, tracker)
        books = RunBooks(recipe, self._data.train, self._data.num_steps, position, tracker, tell)
        self._together.runs[name].guard = books.guard
        return _Run(recipe, books, saver)

    def _shares(self) -> Iterator[StepShare]:
        return self._data.shares(self._step, self._planner.packing)

    def _planned(self, share: StepShare) -> StepPlan:
        plan = self._planner.plan(share)
        return replace(plan, batches=pinned(plan.batches, self._device))

    def _finish_step(self, name: str, plan: StepPlan, result: StepResult, started: float, waited: float) -> None:
        books = self._runs[name].books
        seconds = time.perf_counter() - started
        if result.was_skipped:
            self._listener.warn(name, skipped_message(plan.step + 1, [each for ids in plan.ids for each in ids]))
        if result.diverged is not None:
            raise result.diverged
        speed = {"pairs_per_second": plan.pairs / seconds, "data_wait_fraction": waited / seconds}
        own = {"seconds": [seconds - waited], "data_wait_seconds": [waited], "memory_gb": [memory_gb(self._device)]}
        books.advance(plan, result.metrics | speed | {"step_seconds": seconds}, by_worker(own))
        books.log_step(plan.bad)

    def _evaluate(self, grounding: bool, keep_as: str | None = None) -> dict[str, dict[str, float]]:
        """Score the held-out pairs for all runs, log the metrics, and return them by run."""
        data, packing = self._data, self._planner.packing
        assert data.held_out is not None
        scores = self._together.evaluate(data.held_out(False, packing), self._planner)
        if grounding:
            exchanged = self._together.evaluate(data.held_out(True, packing), self._planner)
            scores = {name: with_pass(own, exchanged[name], EXCHANGED) for name, own in scores.items()}
        for name, own in scores.items():
            with self._alone(name):
                run = self._runs[name]
                run.books.log_evaluation(own)
                if keep_as is not None:
                    write_pair_scores(RunFolder(run.recipe.run_uri), keep_as, own.pairs, data=data.held_out_digest)
        return {name: own.metrics for name, own in scores.items() if name in self._runs}

    def _save(self, metrics: Mapping[str, dict[str, float]], is_last: bool = False) -> None:
        """Save a checkpoint of every run."""
        for name in list(self._runs):
            with self._alone(name):
                run, engine = self._runs[name], self._together.runs[name].engine
                if not (is_last or run.books.guard.is_healthy):
                    continue
                run.books.tracker.flush()
                run.saver.save(engine, run.books.position)
                run.saver.finish()
                run.books.saved(run.books.position.step)
                self._listener.tell(name, saved_at=run.books.position.step)
                own = metrics[name] | ({"step": run.books.position.step} if is_last else {})
                self._listener.report(name, own)

    def _finish(self) -> None:
        """Evaluate every run and write its `final/`."""
        for name in list(self._runs):
            with self._alone(name):
                self._runs[name].books.judge_bad_rows(at_end=True)
        final: dict[str, dict[str, float]] = {name: {} for name in self._runs}
        if self._data.held_out is not None:
            final = self._evaluate(self._every[0].grounding, EVAL_PAIRS_FILE)
        for name in list(self._runs):
            with self._alone(name):
                run = self._runs[name]
                self._listener.tell(name, phase="saving")
                save_final(self._together.runs[name].engine, self._model, run.recipe, self._together.adapter_of(name))
        self._save({name: with_prefix(own, "eval") | {"final": True} for name, own in final.items()}, is_last=True)
        for name in list(self._runs):
            self._end(name, None)

    def _let_go(self) -> None:
        for name in list(self._runs):
            if self._listener.asks_to_stop(name):
                self._end(name, None)

    def _end(self, name: str, error: Exception | None) -> None:
        run = self._runs.pop(name)
        if name in self._together.runs:  # it has left already if it diverged
            self._together.leave(name)
        try:
            run.saver.end_upload()
            run.books.tracker.close()
        except (OrpoRayError, OSError) as late:
            error = error or late
        self._listener.ended(name, error)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Let an error of one run, or of its folder, end that run only."""
        try:
            yield
        except (OrpoRayError, OSError) as error:
            self._end(name, error)
