"""The training program of one worker, from top to bottom: set up, resume, loop, evaluate, save."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.balance import StepShare
from orpo_ray.data.reading import ReadSpec
from orpo_ray.evaluation.evaluator import Evaluator, HeldOut, Scores, with_prefix
from orpo_ray.evaluation.generation import Answerer, generate_held_out
from orpo_ray.evaluation.pair_scores import read_whole_pair_scores, write_pair_scores
from orpo_ray.evaluation.token_scores import pairs_to_show, score_tokens, write_tokens
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.collectives import add_sums, gather_objects, gather_step
from orpo_ray.objective.step_planner import StepPlan, StepPlanner
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, EVAL_PAIRS_START_FILE, RunFolder
from orpo_ray.streaming.steps import Take, iter_shares, open_feed
from orpo_ray.tracking.trackers import MultiLogger
from orpo_ray.training.ahead import on_device, one_ahead, pinned
from orpo_ray.training.checkpoint import Position, load_checkpoint, save_final
from orpo_ray.training.deepspeed_config import without_effect
from orpo_ray.training.divergence import skipped_message
from orpo_ray.training.engine import Engine, ReducesApart, SavesAlone, make_engine
from orpo_ray.training.preemption import PreemptionNotice
from orpo_ray.training.resources import threads_of_worker
from orpo_ray.training.run_books import RunBooks
from orpo_ray.training.saving import SaveFailed, Saver
from orpo_ray.training.sharded_loading import load_pair_model
from orpo_ray.training.step_times import OwnTime, SlowWorkers, by_worker, memory_gb
from orpo_ray.training.teardown import Held
from orpo_ray.training.unlogged import log_missing
from orpo_ray.training.vision_cache_check import slow_cache
from orpo_ray.training.worker_context import WorkerContext
from orpo_ray.training.worker_start import WorkerConfig

# Names of requests that one worker makes and all workers follow, beside the figures of each worker.
_STOP, _TEARDOWN, _PREEMPTION = "stop", "teardown", "preemption"
_UPLOADING = "uploading"  # whether a worker's part of the last checkpoint is not in the store yet
_NORM = "grad_norm"  # of the whole gradient
SETTLE_SECONDS = 10.0  # that a step has to end after its update


class Worker:
    """One training process."""

    def __init__(self, config: WorkerConfig, checkpoint: str | None, feed: Take | None, context: WorkerContext) -> None:
        """Set up the model, the engine and the position.

        Args:
            config: what the driver decided.
            checkpoint: name of the checkpoint to resume from; None for a run that begins.
            feed: for a run without a checkpoint, the source of its steps, whose data is already being read.
            context: the worker's surroundings.
        """
        self.config, self.recipe, self.context = config, parse_recipe(config.recipe), context
        self.feed = feed
        self.rank, self.num_workers, self.device = context.rank, context.num_workers, context.device
        if self.device.type == "cpu":
            torch.set_num_threads(threads_of_worker(self.recipe.scaling, config.cpu_threads // self.num_workers))
        self.encoder = encoder = config.encoder.build()
        self.model = load_pair_model(self.recipe, encoder.processor, self.device, context.bases)
        self.objective = load_objective(self.recipe)
        self.together = self.recipe.scaling.sequence_parallel
        if self.together > 1:
            self.model.group = SequenceGroup.join(self.together, self.recipe.scaling.timeout_s)
        budget = self.recipe.optim.tokens_per_microbatch * self.together
        self.planner = StepPlanner.of(self.objective, budget, encoder, self.model, self.device)
        self.engine: Engine = make_engine(self.model, self.recipe, config.num_steps, self.num_workers)
        # What the engine can do, found once: looking takes longer than the rest of a step's bookkeeping.
        self.reducing = self.engine if isinstance(self.engine, ReducesApart) else None
        self.whole = self.engine if isinstance(self.engine, SavesAlone) else None
        self.saver = Saver(self.recipe, self.engine, self.rank, self.num_workers, context.workers_of_node)
        position, unlogged = load_checkpoint(checkpoint, self.engine, self.recipe, config.train, context.node)
        is_first = self.rank == 0
        self.tracker = MultiLogger.open(self.recipe, position.step, self._warn) if is_first else MultiLogger()
        if is_first:
            log_missing(unlogged, self.tracker)
        self.books = RunBooks(self.recipe, config.train, config.num_steps, position, self.tracker, self._tell)
        self.guard = self.books.guard
        self.is_stopping = self.is_torn_down = self.wants_teardown = False
        self.is_training = True
        self.saved_step = position.step
        # Updates of the engine that belong to the position. Written last in a step, and read by another thread.
        self.updates = 0
        self.preemption = PreemptionNotice(self.rank, context.watches_nodes)
        self.slow_workers = SlowWorkers(gather_objects(socket.gethostname()))
        self.worker_figures: dict[str, float] = {}
        """Of the latest step, of all workers."""
        self.checkpoint_seconds = 0.0
        """Of the checkpoint since the latest step; 0 if there was none."""
        if is_first and (text := without_effect(self.recipe, self.device)) is not None:
            self._warn(text)
        # Not once more in a run that goes on: the estimate takes seconds, in which the other workers wait.
        if is_first and not position.step and (text := slow_cache(self.recipe, context)) is not None:
            self._warn(text)
        self.images_checked = False

    @property
    def position(self) -> Position:
        """Where the run is."""
        return self.books.position

    def run(self) -> None:
        """Train from the position to the end, then evaluate and write `final/`."""
        try:
            self._run()
        finally:
            self.saver.end_upload()

    def _run(self) -> None:
        recipe = self.recipe
        if recipe.eval.on_start and self.config.held_out is not None and not self.position.step:
            self._evaluate(grounding=False, keep_as=EVAL_PAIRS_START_FILE)
        elif not self.position.step:
            self._generate()
        self.model.train()
        with contextlib.closing(self._steps()) as steps:
            self._train(steps)
        if self.is_stopping and self.position.step < self.config.num_steps:
            self.tracker.close()
            return
        self.books.judge_bad_rows(at_end=True)
        final = self._evaluate(recipe.eval.grounding, EVAL_PAIRS_FILE) if self.config.held_out is not None else {}
        self._tell(phase="saving")
        save_final(self.engine, self.model, recipe)
        self._save(with_prefix(final, "eval") | {"step": self.position.step, "final": True}, is_awaited=True)
        self.tracker.close()

    def _train(self, steps: Iterator[StepPlan]) -> None:
        recipe, num_steps = self.recipe, self.config.num_steps
        started = time.perf_counter()
        for plan in steps:
            waited = time.perf_counter() - started
            metrics = self._train_step(plan, waited)
            seconds = time.perf_counter() - started
            metrics |= {"pairs_per_second": plan.pairs / seconds, "data_wait_fraction": waited / seconds}
            metrics |= {"step_seconds": seconds}
            self._advance(plan, metrics)
            step = self.position.step
            if recipe.eval.every_steps and step % recipe.eval.every_steps == 0 and step < num_steps:
                self._report(self._evaluate(grounding=False))
            is_due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
            is_urgent = self.preemption.is_new(self._warn) or self.is_stopping
            if (is_due or is_urgent) and step < num_steps and self.guard.is_healthy:
                self._save(with_prefix(metrics, "train"), is_awaited=is_urgent)
            if self.is_stopping:
                return
            started = time.perf_counter()

    def _save(self, metrics: dict[str, float], is_awaited: bool) -> None:
        """Save a checkpoint. In an object store, its upload may go on beside the next steps unless it `is_awaited`."""
        started = time.perf_counter()
        self.tracker.flush()
        self.saver.save(self.engine, self.position)
        if is_awaited:
            self.saver.finish()
        self.checkpoint_seconds = time.perf_counter() - started
        if self.saver.pending is None:
            self._saved(self.position.step)
        if not self.is_torn_down:  # the controller waits for the workers then, and takes no reports
            self.context.report(metrics)

    def _saved(self, step: int) -> None:
        """Note that the checkpoint of this step is whole."""
        self.saved_step = step
        self.books.saved(step)
        self._tell(saved_at=step)

    def held(self) -> Held:
        """Say what this worker could save. Called from another thread."""
        return Held(
            self.position.step,
            self.saved_step,
            self.whole is not None,
            self.guard.is_healthy,
            self.is_training,
            self.saver.is_uploading,
        )

    @property
    def is_worth_saving(self) -> bool:
        """Whether this worker, which trains no longer, holds a whole state that is in no checkpoint."""
        held = self.held()
        return held.is_whole and held.is_healthy and held.step > held.saved

    def save_alone(self) -> bool:
        """Save the state without the other workers, of which some are lost. Called from another thread.

        Returns:
            Whether it was saved.
        """
        assert self.whole is not None
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.updates != self.whole.updates and time.monotonic() < deadline:
            time.sleep(0.01)  # the training thread is between an update and the end of its step
        position, lines = self.position, list(self.books.unlogged)
        try:
            if not self.saver.save_alone(self.whole, position, self.updates, lines):
                return False
        except SaveFailed as error:
            self._warn(str(error))
            return False
        self.saved_step = position.step
        self.context.line.update(saved_at=position.step)
        return True

    def _steps(self) -> Generator[StepPlan]:
        """Yield each step, made ahead in a thread. The thread ends when this iterator is closed."""
        config, first = self.config, self.position.step
        if self.feed is None:
            read = replace(config.train, first_sample=first * self.recipe.optim.pairs_per_step)
            ranks = (self.rank, self.num_workers, self.together)
            self.feed = open_feed(read, config.encoder, config.max_encoders, *ranks)
        shares = iter_shares(self.feed, self.planner.packing, first, config.num_steps)
        return one_ahead(map(self._prepared, shares), self.device, waits=self.context.goes_on)

    def _prepared(self, share: StepShare) -> StepPlan:
        plan = self.planner.plan(share)
        return replace(plan, batches=pinned(plan.batches, self.device))

    def _train_step(self, plan: StepPlan, waited: float) -> dict[str, float]:
        """Run forward and backward on every micro-batch, then one optimizer step. Return its metrics.

        Args:
            plan: the step.
            waited: seconds that this worker waited for it.
        """
        # Dropout depends on the step only, so a resumed run draws the same as an uninterrupted one.
        _seed((self.recipe.optim.seed << 32) + plan.step * self.num_workers + self.rank, self.device)
        learning_rate = self.engine.learning_rate
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        if not plan.pairs:
            self.worker_figures = {}
            return {"learning_rate": learning_rate, "grad_norm": 0.0}  # every row of the step was bad
        own = OwnTime(self.device)
        # Workers wait for each other in the backward pass of a sharded model, so only its forward is a worker's own.
        backward_time = own.running if self.recipe.deepspeed.zero_stage == 0 else contextlib.nullcontext
        for batch in on_device(plan.batches, self.device):
            check = batch.trains_on_images and not self.images_checked
            self.model.watch_images = check
            with own.running():
                logps = self.engine.forward(batch)
                loss, more = self.objective.loss(logps, batch.weights, plan.normaliser)
            with backward_time():
                self.engine.backward(loss)
            losses.append(loss.detach())
            sums = add_sums(sums, more)
            if check:
                self.model.check_images_used()
                self.images_checked = True
        # Begun before the host waits for the backward pass, so that the device has work meanwhile; read with the sums.
        norm = {} if self.reducing is None else {_NORM: self.reducing.reduce_gradient()}
        wants_stop = self.rank == 0 and self.context.line.asks_to_stop()
        self.saver.check()
        asked = {_STOP: wants_stop, _TEARDOWN: self.wants_teardown, _PREEMPTION: self.preemption.is_due()}
        asked[_UPLOADING] = self.saver.is_uploading
        figures = {
            "seconds": own.seconds(),
            "data_wait_seconds": waited,
            "checkpoint_seconds": self.checkpoint_seconds,
            "memory_gb": memory_gb(self.device),
        }
        size = {"tokens": sum(batch.input_ids.numel() for batch in plan.batches)}
        # The last collective before the update, so that a worker that is lost is lost before the update or after the
        # step.
        reduced, gathered = gather_step(sums, figures | size | asked, self.device, self.planner.counts, norm)
        self.is_torn_down, self.preemption.is_looking = any(gathered.pop(_TEARDOWN)), any(gathered.pop(_PREEMPTION))
        self.is_stopping = any(gathered.pop(_STOP)) or self.is_torn_down
        if not any(gathered.pop(_UPLOADING)) and (saved := self.saver.pending) is not None:
            self.saver.settle()
            self._saved(saved)
        if self.reducing is None:
            grad_norm = self.engine.step()
        else:
            grad_norm = gathered.pop(_NORM)[0]
            self.reducing.update_weights(grad_norm)
        self.checkpoint_seconds = 0.0
        self._judge_speed(plan.step + 1, gathered)
        metrics = self.objective.metrics(reduced)
        if self.guard.observe(plan.step + 1, metrics["loss"], grad_norm):
            self._report_skipped(plan, losses)
        state = {"grad_norm": grad_norm, "learning_rate": learning_rate, "skipped_updates": self.guard.skipped}
        return metrics | state

    def _judge_speed(self, step: int, gathered: dict[str, list[float]]) -> None:
        """Keep every worker's figures of a step, and warn of a worker that is slow for long."""
        tokens = gathered.pop("tokens")
        self.worker_figures = by_worker(gathered)
        own = [sum(each) for each in zip(gathered["seconds"], gathered["data_wait_seconds"], strict=True)]
        warnings = self.slow_workers.observe(step, own, tokens)
        self.worker_figures |= self.slow_workers.figures()
        for text in warnings if self.rank == 0 else ():
            self._warn(text)

    def _report_skipped(self, plan: StepPlan, losses: list[torch.Tensor]) -> None:
        """Warn of a skipped update, with the pairs of all workers that caused it. A collective."""
        own = [ids for ids, loss in zip(plan.ids, losses, strict=True) if not loss.isfinite()]
        everyones = gather_objects((own, plan.ids))
        if self.rank == 0:
            everyones = everyones[:: self.together]  # the others have the same pairs
            caused = [name for own, _ in everyones for ids in own for name in ids]
            all_ids = [name for _, all_own in everyones for ids in all_own for name in ids]
            self._warn(skipped_message(plan.step + 1, caused or all_ids))

    def _advance(self, plan: StepPlan, metrics: dict[str, float]) -> None:
        """Finish a step: move the position, log, report the progress, and handle bad rows."""
        if not isinstance(self.recipe.scaling.num_workers, int):
            metrics |= {"num_workers": self.num_workers}
        self.books.advance(plan, metrics, self.worker_figures)
        if self.whole is not None:
            self.updates = self.whole.updates
        self.books.log_step(plan.bad)

    def _evaluate(self, grounding: bool, keep_as: str | None = None) -> dict[str, float]:
        """Score the held-out pairs on all workers and log the metrics.

        Args:
            grounding: whether to score them with exchanged images too.
            keep_as: the file of the run folder to keep each pair's scores in.
        """
        config = self.config
        assert config.held_out is not None
        ranks = (self.rank, self.num_workers, self.together)
        held_out = HeldOut(config.held_out, config.encoder, config.max_encoders, *ranks)
        evaluator = Evaluator(
            self.model, held_out, self.planner, self.engine.forward, on_pass=lambda phase: self._tell(phase=phase)
        )
        scores = evaluator.evaluate(grounding)
        self.books.log_evaluation(scores)
        if keep_as is not None and self.rank == 0:
            write_pair_scores(RunFolder(self.recipe.run_uri), keep_as, scores.pairs, data=config.held_out.digest)
        if keep_as == EVAL_PAIRS_FILE:
            self._score_tokens(scores, config.held_out)
        self._generate()
        return scores.metrics

    def _score_tokens(self, scores: Scores, held_out: ReadSpec) -> None:
        """Keep the log-probs of single tokens, for the pairs that the report shows. A collective."""
        folder = RunFolder(self.recipe.run_uri)
        wanted: list[int] = []
        if self.rank == 0:
            start = read_whole_pair_scores(folder, EVAL_PAIRS_START_FILE)
            wanted = [row["sample_index"] for row in pairs_to_show(scores.pairs, start)]
        wanted = gather_objects(wanted)[0]
        tokens = score_tokens(self.model, self.engine.forward, self.encoder, self.planner, held_out, wanted)
        if self.rank == 0:
            write_tokens(folder, tokens, held_out.digest)

    def _generate(self) -> None:
        """Let the model answer some held-out pairs and log the answers, if the recipe asks for it."""
        section, held_out = self.recipe.eval, self.config.held_out
        if not section.generate or held_out is None:
            return
        self._tell(phase="answering held-out pairs")
        answerer = Answerer(self.model.model, self.encoder, section.max_new_tokens, self.recipe.optim.seed)
        answers = generate_held_out(answerer, held_out, section.generate, self.rank, self.num_workers)
        self.tracker.log_generations(self.position.step, answers)

    def _report(self, metrics: dict[str, float]) -> None:
        """Report an evaluation before the end, for a scheduler of Ray Tune."""
        self.context.report(with_prefix(metrics, "eval") | {"step": self.position.step})

    def _warn(self, text: str) -> None:
        self.context.line.warn(text)

    def _tell(self, **state: Any) -> None:
        if self.rank == 0:
            self.context.line.update(**state)


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators of the host and of one device. `torch.manual_seed` also looks for devices of other kinds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
