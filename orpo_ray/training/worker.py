"""The training program of one worker, from top to bottom: set up, resume, loop, evaluate, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.bad_rows import BAD_ROWS_SHOWN, BadRow, check_bad_fraction, refuse_rows
from orpo_ray.data.balance import StepShare
from orpo_ray.data.order import step_samples
from orpo_ray.evaluation.evaluator import Evaluator, HeldOut, with_prefix
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.objective.step_planner import StepPlan, StepPlanner, add_sums, gather_objects, reduce_sums
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.streaming.steps import Take, iter_shares, open_feed
from orpo_ray.tracking.trackers import MultiLogger
from orpo_ray.training.ahead import on_device, one_ahead, pinned
from orpo_ray.training.auto_checkpointing import with_checkpointing
from orpo_ray.training.checkpoint import load_checkpoint, save_final
from orpo_ray.training.deepspeed_config import without_effect
from orpo_ray.training.divergence import DivergenceGuard, skipped_message
from orpo_ray.training.engine import Engine, make_engine
from orpo_ray.training.progress import StatusLine
from orpo_ray.training.saving import Saver
from orpo_ray.training.sharded_loading import load_for_training
from orpo_ray.training.worker_start import WorkerConfig

_STOP = "stop"  # name of a sum over workers, beside those of the objective


class Worker:
    """One training process."""

    def __init__(self, config: WorkerConfig, checkpoint: str | None, feed: Take | None) -> None:
        """Set up the model, the engine and the position.

        Args:
            config: what the driver decided.
            checkpoint: name of the checkpoint to go on from; None for a run that begins.
            feed: for a run without a checkpoint, the source of its steps, whose data is already being read.
        """
        context = ray.train.get_context()
        self.config, self.recipe = config, parse_recipe(config.recipe)
        self.feed = feed
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads)
        encoder = config.encoder.build()
        model_config = with_checkpointing(self.recipe, self.device)
        model = load_for_training(self.recipe.model_copy(update={"model": model_config}), self.device)
        bounded = model_config.gradient_checkpointing != "none" and self.recipe.deepspeed.zero_stage < 3
        pixels_at_once = PIXELS_AT_ONCE.get(self.device.type) if bounded else None
        cache = self.recipe.model.vision_cache
        cache_folder = Path(cache) if cache is not None else None
        self.model = PairModel(model, PixelNorm.of(encoder.processor), pixels_at_once, cache_folder)
        self.objective = load_objective(self.recipe)
        self.together = self.recipe.scaling.sequence_parallel
        if self.together > 1:
            self.model.group = SequenceGroup.join(self.together, self.recipe.scaling.timeout_s)
        budget = self.recipe.optim.tokens_per_microbatch * self.together
        self.planner = StepPlanner.of(self.objective, budget, encoder, self.model, self.device)
        self.engine: Engine = make_engine(self.model, self.recipe, config.num_steps, self.num_workers)
        self.saver = Saver(self.recipe, self.engine, self.rank, self.num_workers, context.get_local_world_size())
        self.position = load_checkpoint(checkpoint, self.engine, self.recipe, config.train)
        is_first = self.rank == 0
        self.tracker = MultiLogger.open(self.recipe, self.position.step, self._warn) if is_first else MultiLogger()
        self.guard = DivergenceGuard(self.position.first_loss, self.position.skipped)
        self.status = StatusLine(config.status) if is_first else None
        self.is_stopping = False
        if is_first and (line := without_effect(self.recipe, self.device)) is not None:
            self._warn(line)
        self.images_checked = False
        self.first_bad: list[BadRow] = []

    def run(self) -> None:
        """Train from the position to the end, then evaluate and write `final/`."""
        recipe = self.recipe
        self.model.train()
        with contextlib.closing(self._steps()) as steps:
            self._train(steps)
        if self.is_stopping and self.position.step < self.config.num_steps:
            self.tracker.close()
            return
        self._judge_bad_rows(at_end=True)
        final = self._evaluate(recipe.eval.grounding) if self.config.held_out is not None else {}
        self._tell(phase="saving")
        save_final(self.engine, self.model, recipe)
        self._save(with_prefix(final, "eval") | {"step": self.position.step, "final": True})
        self.tracker.close()

    def _train(self, steps: Iterator[StepPlan]) -> None:
        recipe, num_steps = self.recipe, self.config.num_steps
        started = time.perf_counter()
        for plan in steps:
            waited = time.perf_counter() - started
            metrics = self._train_step(plan)
            seconds = time.perf_counter() - started
            metrics |= {"pairs_per_second": plan.pairs / seconds, "data_wait_fraction": waited / seconds}
            self._advance(plan, metrics)
            step = self.position.step
            if recipe.eval.every_steps and step % recipe.eval.every_steps == 0 and step < num_steps:
                self._report(self._evaluate(grounding=False))
            is_due = recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0
            if (is_due or self.is_stopping) and step < num_steps and self.guard.is_healthy:
                self._save(with_prefix(metrics, "train"))
                self._tell(saved_at=step)
            if self.is_stopping:
                return
            started = time.perf_counter()

    def _save(self, metrics: dict[str, float]) -> None:
        self.tracker.flush()
        self.saver.save(self.engine, self.position)
        ray.train.report(metrics)

    def _steps(self) -> Generator[StepPlan]:
        """Yield each step, made ahead in a thread. The thread ends when this iterator is closed."""
        config, first = self.config, self.position.step
        if self.feed is None:
            read = replace(config.train, first_sample=first * self.recipe.optim.pairs_per_step)
            ranks = (self.rank, self.num_workers, self.together)
            self.feed = open_feed(read, config.encoder, config.max_encoders, *ranks)
        shares = iter_shares(self.feed, self.planner.packing, first, config.num_steps)
        return one_ahead(map(self._prepared, shares), self.device)

    def _prepared(self, share: StepShare) -> StepPlan:
        plan = self.planner.plan(share)
        return replace(plan, batches=pinned(plan.batches, self.device))

    def _train_step(self, plan: StepPlan) -> dict[str, float]:
        """Run forward and backward on every micro-batch, then one optimizer step. Return its metrics."""
        # Dropout depends on the step only, so a resumed run draws the same as an uninterrupted one.
        torch.manual_seed((self.recipe.optim.seed << 32) + plan.step * self.num_workers + self.rank)
        learning_rate = self.engine.learning_rate
        sums: dict[str, torch.Tensor] = {}
        losses: list[torch.Tensor] = []
        if not plan.pairs:
            return {"learning_rate": learning_rate, "grad_norm": 0.0}  # every row of the step was bad
        for batch in on_device(plan.batches, self.device):
            check = batch.trains_on_images and not self.images_checked
            self.model.watch_images = check
            logps = self.engine.forward(batch)
            loss, more = self.objective.loss(logps, batch.weights, plan.normaliser)
            self.engine.backward(loss)
            losses.append(loss.detach())
            sums = add_sums(sums, more)
            if check:
                self.model.check_images_used()
                self.images_checked = True
        grad_norm = self.engine.step()
        wants_stop = self.status is not None and self.status.asks_to_stop()
        sums |= {_STOP: torch.full((), float(wants_stop), device=self.device)}
        reduced = reduce_sums(sums, self.device, self.planner.counts)
        self.is_stopping = reduced.pop(_STOP) > 0
        metrics = self.objective.metrics(reduced)
        if self.guard.observe(plan.step + 1, metrics["loss"], grad_norm):
            self._report_skipped(plan, losses)
        state = {"grad_norm": grad_norm, "learning_rate": learning_rate, "skipped_updates": self.guard.skipped}
        return metrics | state

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
        _, end_sample = step_samples(plan.step, self.recipe.optim.pairs_per_step, self.config.train.end_sample)
        old, bad = self.position, len(plan.bad)
        self.position = replace(
            old,
            step=plan.step + 1,
            bad=old.bad + bad,
            seen=old.seen + bad + plan.pairs,
            skipped=self.guard.skipped,
            first_loss=self.guard.first_loss,
        )
        metrics |= {"epoch": end_sample / self.config.train.order.num_rows}
        if plan.bad:
            self.tracker.log_bad_rows(plan.bad)
            self.first_bad = [*self.first_bad, *plan.bad][:BAD_ROWS_SHOWN]
            refuse_rows(self.recipe, plan.bad)
        self.tracker.log(self.position.step, with_prefix(metrics, "train"))
        self._tell(phase="training", step=self.position.step, num_steps=self.config.num_steps, **metrics)
        self._judge_bad_rows(at_end=False)

    def _judge_bad_rows(self, at_end: bool) -> None:
        check_bad_fraction(self.recipe, self.position.bad, self.position.seen, self.first_bad, at_end)

    def _evaluate(self, grounding: bool) -> dict[str, float]:
        """Score the held-out pairs on all workers and log the metrics."""
        config = self.config
        assert config.held_out is not None
        ranks = (self.rank, self.num_workers, self.together)
        held_out = HeldOut(config.held_out, config.encoder, config.max_encoders, *ranks)
        evaluator = Evaluator(
            self.model, held_out, self.planner, self.engine.forward, on_pass=lambda phase: self._tell(phase=phase)
        )
        scores = evaluator.evaluate(grounding)
        self.tracker.log_bad_rows(scores.bad)
        self.tracker.log(self.position.step, with_prefix(scores.metrics, "eval"))
        return scores.metrics

    def _report(self, metrics: dict[str, float]) -> None:
        """Report an evaluation before the end to Ray Train, without a checkpoint, for a scheduler of Ray Tune."""
        ray.train.report(with_prefix(metrics, "eval") | {"step": self.position.step})

    def _warn(self, text: str) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError):
            self.config.status.warn.remote(text)

    def _tell(self, **state: Any) -> None:
        if self.status is not None:
            self.status.update(**state)
