"""Train several runs in one process: one base model, one stream of pairs, and an adapter for each run.

Each run keeps its own loss, gradient clipping, optimizer and schedule. A step of each is that of a run of its own: the
adapters share no weight that is trained, and no token of one run's copy of a row sees another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import StepShare
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluator import Scores, score_each
from orpo_ray.model.lora import FIRST_ADAPTER, adapter_weights, add_adapter_beside
from orpo_ray.objective.base import Objective, load_objective
from orpo_ray.objective.collectives import add_sums, reduce_sums
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.multi_adapter import ALONE, MultiAdapterModel, OneAdapter
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlan, StepPlanner
from orpo_ray.training.ahead import on_device
from orpo_ray.training.divergence import DivergenceGuard, TrainingDiverged
from orpo_ray.training.replicated_engine import ReplicatedEngine

# Recipe keys in which runs may differ: what the optimizer of an adapter and its loss read. Also sections that say where
# results go.
_OWN_KEYS = {
    "name", "tracking", "tune", "checkpoint", "model.lora.r", "model.lora.alpha", "optim.learning_rate",
    "optim.schedule", "optim.warmup", "optim.weight_decay", "optim.adam_beta1", "optim.adam_beta2",
    "optim.adam_epsilon", "optim.max_grad_norm", "optim.optimizer", "optim.seed",
}  # fmt: skip

_NORM = "grad_norm"


@dataclass
class AdapterRun:
    """One of the runs, while it trains."""

    recipe: Recipe
    objective: Objective
    engine: ReplicatedEngine
    """Saves and loads the same files as the engine of a run of its own."""
    guard: DivergenceGuard = field(default_factory=DivergenceGuard)


@dataclass(frozen=True)
class StepResult:
    """What a step did to one run."""

    metrics: dict[str, float]
    """The objective's, and `grad_norm`, `learning_rate` and `skipped_updates`; without a prefix."""
    was_skipped: bool = False
    """Whether the update was skipped, because the gradient is not finite."""
    diverged: TrainingDiverged | None = None
    """Why the run cannot go on; it has left then."""


class SideBySide:
    """Runs that train on the same pairs at the same time. A run can leave at any step; the others do not notice.

    Args:
        recipes: of the runs, by name; see `why_not_side_by_side`.
        model: the `PairModel` of the first recipe, with its adapter.
        num_steps: number of steps of every run, for the schedules.

    Attributes:
        runs: those that train, by name.

    Raises:
        UserError: the recipes or the model do not allow it.
    """

    def __init__(self, recipes: Mapping[str, Recipe], model: PairModel, num_steps: int) -> None:
        if (why := why_not_side_by_side(list(recipes.values()))) is not None:
            raise UserError(f"these runs cannot train side by side: {why}", fix=ALONE)
        first, *others = recipes.values()
        self._device = next(model.parameters()).device
        self._model = MultiAdapterModel(model, first.optim.tokens_per_microbatch)
        self._adapters = {name: FIRST_ADAPTER if not place else f"run{place}" for place, name in enumerate(recipes)}
        for adapter, recipe in zip(list(self._adapters.values())[1:], others, strict=True):
            assert recipe.model.lora is not None
            add_adapter_beside(model.model, adapter, recipe.model.lora, recipe.optim.seed)
        self._model.stack()
        self._images_checked = False
        self.runs = {name: self._run(name, recipe, num_steps) for name, recipe in recipes.items()}

    def train_step(self, plan: StepPlan) -> dict[str, StepResult]:
        """Run forward and backward on every micro-batch, then one optimizer step of each run.

        Args:
            plan: the step. Its micro-batches should have `tokens_for` tokens.

        Returns:
            The result of each run that trained. A run that diverged has left.

        Raises:
            ImageNotUsed: the losses of the first step with images do not depend on them.
        """
        sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.runs}
        rates = {name: run.engine.learning_rate for name, run in self.runs.items()}
        if not plan.pairs:
            return {name: StepResult({"learning_rate": rate, "grad_norm": 0.0}) for name, rate in rates.items()}
        model = self._model.model
        for batch in on_device(plan.batches, self._device):
            model.watch_images = batch.trains_on_images and not self._images_checked
            is_watching = model.watch_images
            for group in self._groups(batch):
                losses = []
                for name, logps in group.items():
                    loss, more = self.runs[name].objective.loss(logps, batch.weights, plan.normaliser)
                    losses.append(loss)
                    sums[name] = add_sums(sums[name], more)
                torch.stack(losses).sum().backward()  # no weight of a run has a gradient from another run's loss
            if is_watching:
                model.check_images_used()
                self._images_checked = True
        return self._update(plan, sums, rates)

    def adapter_of(self, name: str) -> str:
        """peft's name of a run's adapter."""
        return self._adapters[name]

    def leave(self, name: str) -> None:
        """Let a run train no longer, and free the memory of its adapter and its optimizer."""
        del self.runs[name]
        self._model.drop(self._adapters[name])

    def evaluate(self, shares: Iterable[StepShare], planner: StepPlanner) -> dict[str, Scores]:
        """Score held-out pairs for every run, in one pass over them."""
        model = self._model.model
        was_training = model.training
        model.eval()
        try:
            objectives = {name: run.objective for name, run in self.runs.items()}
            return score_each(self._all_logps, objectives, shares, planner)
        finally:
            model.train(was_training)

    def _run(self, name: str, recipe: Recipe, num_steps: int) -> AdapterRun:
        alone = OneAdapter(self._model, self._adapters[name])
        weights = adapter_weights(alone, self._adapters[name])
        return AdapterRun(recipe, load_objective(recipe), ReplicatedEngine(alone, recipe, num_steps, 1, weights))

    def _groups(self, batch: PairBatch) -> Iterator[dict[str, PairLogps]]:
        names = {self._adapters[name]: name for name in self.runs}
        for group in self._model.groups(batch, list(names)):
            yield {names[adapter]: logps for adapter, logps in group.items()}

    def _all_logps(self, batch: PairBatch) -> dict[str, PairLogps]:
        return {name: logps for group in self._groups(batch) for name, logps in group.items()}

    def _update(
        self, plan: StepPlan, sums: Mapping[str, Mapping[str, torch.Tensor]], rates: Mapping[str, float]
    ) -> dict[str, StepResult]:
        """Update every run. What they log is read from the device at once."""
        measured = {(name, key): value for name, own in sums.items() for key, value in own.items()}
        norms = {(name, _NORM): run.engine.reduce_gradient() for name, run in self.runs.items()}
        read = reduce_sums(measured | norms, self._device)
        results = {}
        for name in list(self.runs):
            own = {key: read[name, key] for key in sums[name]}
            results[name] = self._update_one(name, plan, own, read[name, _NORM], rates[name])
        return results

    def _update_one(
        self, name: str, plan: StepPlan, sums: dict[str, float], grad_norm: float, rate: float
    ) -> StepResult:
        run = self.runs[name]
        metrics = run.objective.metrics(sums)
        run.engine.update_weights(grad_norm)
        diverged, was_skipped = None, False
        try:
            was_skipped = run.guard.observe(plan.step + 1, metrics["loss"], grad_norm)
        except TrainingDiverged as error:
            diverged = error
            self.leave(name)
        state = {"grad_norm": grad_norm, "learning_rate": rate, "skipped_updates": run.guard.skipped}
        return StepResult(metrics | state, was_skipped, diverged)


def tokens_for(recipe: Recipe, runs: int) -> int:
    """Most tokens of a micro-batch of several runs, so that all copies of it together fit into one run's budget."""
    return max(1, recipe.optim.tokens_per_microbatch // runs)


def why_not_side_by_side(recipes: Sequence[Recipe]) -> str | None:
    """Why runs of these recipes cannot train side by side; None if they can, as far as recipes tell."""
    first = recipes[0]
    lora = first.model.lora
    if lora is None:
        return "model.lora is not set, and only adapters can share a base model"
    for condition, why in (
        (lora.dropout > 0, "model.lora.dropout is not 0, and each run would draw other numbers than alone"),
        (lora.use_dora, "model.lora.use_dora is set"),
        (bool(lora.modules_to_save), "model.lora.modules_to_save is set, and such a module can be trained once only"),
        (first.deepspeed.zero_stage > 0, "deepspeed.zero_stage is not 0"),
        (first.scaling.num_workers != 1, "scaling.num_workers is not 1"),
    ):
        if condition:
            return why
    values = [_shared_values(recipe) for recipe in recipes]
    for key in sorted(set().union(*values)):
        if any(other.get(key) != values[0].get(key) for other in values[1:]):
            return f"they differ in {key}"
    return None


def _shared_values(recipe: Recipe) -> dict[str, Any]:
    """Everything in a recipe that must be equal, by dotted key."""
    values: dict[str, Any] = {}
    objective = load_objective(recipe)
    # Other options of the loss, such as beta, do not change which tokens and images a run reads.
    raw = recipe.model_dump(mode="json") | {
        recipe.objective.section: {
            "name": recipe.objective.name,
            "nll": [objective.nll_span, objective.nll_average],
            "other_image": recipe.other_image,
        }
    }
    for section, inner in raw.items():
        flat = (
            {f"{section}.{key}": value for key, value in inner.items()} if isinstance(inner, dict) else {section: inner}
        )
        if section == "model" and isinstance(inner.get("lora"), dict):
            flat |= {f"model.lora.{key}": value for key, value in flat.pop("model.lora").items()}
        values |= flat
    return {key: value for key, value in values.items() if not {key, key.partition(".")[0]} & _OWN_KEYS}
