"""Recipe + model config -> everything that a plan computes with: sizes of weights, activations, and the workload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Layout
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.model.families.cross_attention import CrossAttentionFamily
from orpo_ray.model.families.derived import DerivedFamily
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.loading import check_divisible, pick_attention
from orpo_ray.objective.base import load_objective
from orpo_ray.planning.activations import Activations, batch_of, measure, more_logits, unloaded_model
from orpo_ray.planning.fit import Planner, Setting
from orpo_ray.planning.second_process import in_second_process
from orpo_ray.planning.states import Offload, Weights
from orpo_ray.planning.step_time import Rates
from orpo_ray.planning.workload import Workload, estimate_workload, pairs_per_microbatch

# Pairs in the dry run. Memory of larger micro-batches is computed from it, since more pairs only repeat the same work.
PAIRS_MEASURED = 1


@dataclass(frozen=True)
class PlanInputs:
    """What a plan computes with."""

    planner: Planner
    work: Workload
    setting: Setting
    """The recipe's, with gradient checkpointing as the recipe has it."""
    dtype: torch.dtype
    layout: Layout
    microbatch_pairs: int
    """Pairs in a full micro-batch, of a worker or of a group."""


@dataclass(frozen=True)
class StepInputs:
    """A recipe's step as it is known before a dry run, and the dry run."""

    recipe: Recipe
    config: Any
    """The model's config in transformers."""
    dtype: torch.dtype
    layout: Layout
    weights: Weights
    work: Workload
    microbatch_pairs: int
    """Pairs in a full micro-batch, of a worker or of a group."""
    batch: PairBatch
    """Of the dry run."""
    is_bounded: bool
    """Whether the vision encoder processes at most `PIXELS_AT_ONCE` pixels at a time."""

    @classmethod
    def of(cls, recipe: Recipe, config: Any, workers: int, pairs: int | None = None) -> StepInputs:
        """Size the weights and the micro-batch.

        Args:
            recipe: the recipe.
            config: the model's config in transformers.
            workers: of the run.
            pairs: training pairs; by default, the number in the data check, or an assumption.

        Raises:
            UserError: the model's rows cannot be divided among the workers of a group.
        """
        if (together := recipe.scaling.sequence_parallel) > 1:
            check_divisible(recipe.model, together, config)
        dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
        layout = pick_attention(recipe.model, config).layout
        weights = Weights.of_deep(
            lambda each: unloaded_model(recipe.model, each, dtype, layout), recipe.model, config, dtype
        )
        work = estimate_workload(recipe, config, pairs)
        microbatch_pairs = pairs_per_microbatch(recipe, work, layout, recipe.optim.tokens_per_microbatch, workers)
        nll_span = load_objective(recipe).nll_span
        batch = batch_of(work.shape, min(microbatch_pairs, PAIRS_MEASURED), config, nll_span, layout, together)
        is_bounded = recipe.deepspeed.zero_stage < 3
        return cls(recipe, config, dtype, layout, weights, work, microbatch_pairs, batch, is_bounded)

    def measure(self, mode: Checkpointing) -> Activations:
        """Run the batch without values, with this gradient checkpointing.

        Raises:
            UserError: a model of an unknown family does not take the batch.
        """
        section = self.recipe.model.model_copy(update={"gradient_checkpointing": mode})
        try:
            return measure(section, self.config, self.dtype, self.layout, self.batch, self.is_bounded, "cuda")
        except (ValueError, RuntimeError) as error:
            if not isinstance(family_of(self.config), DerivedFamily):
                raise
            # How many tokens its images have is a guess.
            raise UserError(
                f"cannot estimate a model of the family {self.config.model_type}, which is not known: {error}",
                field="model.id",
                value=self.recipe.model.id,
                fix="train without a plan, with model.gradient_checkpointing: full",
            ) from None


def can_plan(config: Any) -> bool:
    """Whether plans support the family of a model with this transformers config."""
    return not isinstance(family_of(config), CrossAttentionFamily)


def plan_inputs(
    recipe: Recipe,
    config: Any,
    rates: Rates | None = None,
    mfu: float | None = None,
    pairs: int | None = None,
    can_fork: bool = False,
) -> PlanInputs:
    """Measure the model in dry runs.

    Args:
        recipe: the recipe.
        config: the model's config in transformers.
        rates: what is assumed about speed; by default, the usual.
        mfu: model FLOPs of the recipe as a fraction of the GPU's peak; by default, estimated for each GPU type.
        pairs: training pairs; by default, the number in the data check, or an assumption.
        can_fork: whether a fork of this process may do a part; see `in_second_process`.

    Raises:
        UserError: plans do not support the model, or its rows cannot be divided among the workers of a group.
    """
    if not can_plan(config):
        raise UserError(
            "plans do not support models with cross-attention to images yet",
            field="model.id",
            value=recipe.model.id,
            fix="plan a model of another family of the same size",
        )
    # Of an elastic run, the fewest workers need the most memory each.
    workers, budget = recipe.scaling.min_workers, recipe.optim.tokens_per_microbatch
    step = StepInputs.of(recipe, config, workers, pairs)
    work, microbatch_pairs, batch = step.work, step.microbatch_pairs, step.batch
    logits = more_logits(len(batch.target_ids), microbatch_pairs / batch.num_pairs, config, step.dtype)

    def measured(*modes: Checkpointing) -> dict[Checkpointing, Activations]:
        return {
            mode: step.measure(mode).with_pairs(microbatch_pairs, mode != "none" and step.is_bounded, logits)
            for mode in modes
        }

    # `selective` runs most operations, and takes about as long as both others.
    others = partial(measured, "none", "full")
    waited = in_second_process(others) if can_fork else others
    activations = {**measured("selective"), **waited()}
    setting = Setting(workers, recipe.deepspeed.zero_stage, recipe.model.gradient_checkpointing, budget)
    planner = Planner(
        step.weights,
        recipe.optim.optimizer,
        activations,
        budget,
        work.longest,
        work.steps(recipe),
        recipe.optim.pairs_per_step,
        rates or Rates(),
        setting,
        mfu,
        recipe.model.quantization is not None,
        Offload(recipe.deepspeed.offload_optimizer != "none", recipe.deepspeed.offload_param != "none"),
        recipe.scaling.sequence_parallel,
    )
    return PlanInputs(planner, work, setting, step.dtype, step.layout, microbatch_pairs)


def choose_checkpointing(recipe: Recipe, config: Any, gib: float) -> Checkpointing:
    """Return the fastest gradient checkpointing that fits in this much GPU memory, or `full` if none does."""
    if not can_plan(config):
        return "full"
    inputs = plan_inputs(recipe, config)
    return inputs.planner.resolved(inputs.setting, gib).checkpointing
