"""The section `tune` of a recipe: what `orpo-ray tune` searches, how, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orpo_ray.config.field_types import NUMBER, Float, Int, Text, as_choice
from orpo_ray.config.schema import Config

GROUNDING_GAP = "eval/grounding_gap"
LEAST_POPULATION = 4
"""Trials that population-based training needs: a best and a worst quarter."""
Choice = Annotated[Any, BeforeValidator(as_choice)]


def _off(value: Any) -> Any:
    """Take YAML's `off`, which is `false`, as the word."""
    return "off" if value is False else value


_Size = Literal["auto", "off"] | Annotated[int, Field(ge=1, le=64), NUMBER]
Pack = Annotated[_Size, BeforeValidator(_off, json_schema_input_type=_Size)]


class SearchRange(Config):
    """Values to search for one field: either `choices`, or a range from `low` to `high`."""

    low: Float | None = None
    """Lower bound of the range."""
    high: Float | None = None
    """Upper bound of the range."""
    log: bool = True
    """Sample the range uniformly on a logarithmic scale. `false` samples it uniformly."""
    points: Int = Field(3, ge=2, le=100)
    """Number of values of the range that a grid has (`tune.searcher: grid`), both bounds included."""
    choices: Annotated[list[Choice], Field(max_length=100)] | None = None
    """Values to choose from instead of a range, of the type of the field."""

    @model_validator(mode="after")
    def _check_range_or_choices(self) -> SearchRange:
        if self.choices:
            if self.low is not None or self.high is not None:
                raise ValueError("choices and a range (low, high) are both given; give one of them")
        elif self.low is None or self.high is None:
            raise ValueError("the range is incomplete; give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        elif self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 on a logarithmic scale; raise it or set log: false")
        return self


class TuneConfig(Config):
    """Hyperparameter search with Ray Tune (`orpo-ray tune`). Each trial is a normal training run."""

    search: dict[Text, SearchRange] = Field(default_factory=dict)
    """Fields to search, as a mapping from recipe key to values: `optim.learning_rate`, `orpo.beta`, `model.lora.r`,
    `data.train` and so on. Fields that do not change what a run learns (`name`, `tune`, `checkpoint`, `tracking`,
    `scaling`) and those that decide what is measured (`eval`, `data.eval`, `data.eval_fraction`) cannot be searched. By
    default the learning rate and beta."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """How values are chosen. `random`: at random. `grid`: every combination, whatever `num_trials` is. `tpe`: near
    those of good trials (tree-structured Parzen estimator of Optuna; needs the extra `sweep`)."""
    metric: Text = "eval/rewards/accuracies"
    """Metric that ranks the trials: `eval/rewards/accuracies`, `eval/rewards/margins`, `eval/loss`, or where the
    objective has them `eval/nll_loss` or `eval/log_odds_ratio`. Margins and the loss have beta as a factor, so they
    cannot compare trials of different betas. `eval/grounding_gap` is measured at the end only, so
    it needs `scheduler: none`."""
    second_metric: Text | None = None
    """Search for this metric at the same time, with `searcher: tpe` and `scheduler: none`: for the trials that no other
    trial beats in both, such as in accuracy and `eval/grounding_gap`. `metric` still ranks the trials."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether a higher (`max`) or a lower (`min`) value of `metric` is better. `auto` knows: a loss should be low, all
    others high."""
    num_trials: Int = Field(8, ge=1, le=10_000)
    """Number of trials; with `scheduler: pbt`, of trials that train at a time."""
    max_concurrent: Literal["auto"] | Annotated[int, Field(ge=1), NUMBER] = "auto"
    """Number of trials to run at the same time, each with `scaling.num_workers` workers. `auto`: as many as the cluster
    has GPUs for, or without GPUs, CPUs."""
    pack: Pack = "auto"
    """Number of trials that train side by side: on one base model, with an adapter each, on pairs that are read once.
    They must train adapters, and differ in the objective's options, the learning rate and other options of the
    optimizer, or the rank and scale of the adapters only. `auto`: up to 8 where that is possible. `off`: none."""
    max_hours: Annotated[float, Field(gt=0), NUMBER] | None = None
    """Hours after which the search ends, with the trials that it has. The same command with a higher number goes on."""
    max_cost: Annotated[float, Field(gt=0), NUMBER] | None = None
    """US$ for GPUs after which the search ends, with the prices of `orpo-ray plan` (`--price-per-hour`). The same
    command with a higher number goes on."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """Which trials end early, at an evaluation. `asha`: those outside the best third of what others had by then.
    `median`: those worse than the median of the others. `pbt` (population-based training): the worst quarter goes on
    from checkpoints of the best quarter, with changed values. `none`: no trial does."""
    grace_evals: Int = Field(1, ge=1)
    """Number of evaluations that every trial completes before the scheduler may end it."""
    seed: Int = Field(0, ge=0)
    """Seed of the search."""

    @property
    def direction(self) -> Literal["max", "min"]:
        """Whether a higher or a lower value of the metric is better."""
        return natural_mode(self.metric) if self.mode == "auto" else self.mode

    @model_validator(mode="after")
    def _check_pairs(self) -> TuneConfig:
        if self.second_metric is not None and self.second_metric == self.metric:
            raise ValueError(f"second_metric ({self.second_metric}) must differ from metric")
        if self.second_metric is not None and (self.searcher != "tpe" or self.scheduler != "none"):
            raise ValueError(
                f"second_metric needs searcher: tpe and scheduler: none (found {self.searcher} and {self.scheduler}), "
                "since a trial that ends early would be judged by one metric alone"
            )
        if self.metric == GROUNDING_GAP and self.scheduler != "none":
            raise ValueError(
                f"metric {GROUNDING_GAP} is measured at the end of a trial, and scheduler {self.scheduler} needs it "
                "before; set scheduler: none"
            )
        if self.scheduler == "pbt" and self.searcher != "random":
            raise ValueError(f"scheduler pbt chooses values itself; set searcher: random (found {self.searcher})")
        if self.scheduler == "pbt" and self.num_trials < LEAST_POPULATION:
            raise ValueError(
                f"scheduler pbt needs num_trials of {LEAST_POPULATION} at least (found {self.num_trials}), so that the "
                "worst can learn from the best"
            )
        return self


def natural_mode(metric: str) -> Literal["max", "min"]:
    """Return whether a higher or a lower value of a metric is better."""
    return "min" if metric.endswith("loss") else "max"
