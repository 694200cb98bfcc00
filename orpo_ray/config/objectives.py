"""The objectives that a recipe can name: their options, and the class that implements each. Imports no torch.

To add one, write its options here, add the class to `ObjectiveConfig`, and write the loss that `implementation` names.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from orpo_ray.config.field_types import NUMBER, Float, OtherImage
from orpo_ray.config.schema import Config
from orpo_ray.config.tune_schema import GROUNDING_GAP, SearchRange, TuneConfig
from orpo_ray.errors import UserError


class ObjectiveOptions(Config):
    """The options of one objective. Each field but `name` is a field of the class that implements the loss."""

    title: ClassVar[str]
    """Name as people write it."""
    paper: ClassVar[str]
    """Address of the paper."""
    implementation: ClassVar[str]
    """`module:class` of the loss, an `orpo_ray.objective.base.Objective`."""
    section: ClassVar[str] = "objective"
    """Recipe section with the options."""
    beta_range: ClassVar[tuple[float, float]]
    """Range of beta in a search that gives none."""
    search_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics of this loss that can rank trials, in addition to those of every loss."""

    @classmethod
    def options(cls) -> type[Config]:
        """The class whose fields are the options."""
        return cls


class OrpoConfig(Config):
    """Odds-ratio loss: loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))."""

    beta: Float = Field(0.1, ge=0)
    """Weight of the odds-ratio term."""
    nll: Literal["response", "prompt+response"] = "response"
    """Tokens under the NLL term. response: the chosen answer, averaged per pair (LLaMA-Factory, ms-swift).
    prompt+response: the prompt's text too, averaged over the step's tokens (TRL). Image placeholders never count."""
    image_beta: Float = Field(0.0, ge=0)
    """Weight of the image preference: -log sigmoid(log odds(chosen | image) - log odds(chosen | other image)). 0 leaves
    the term out; a step then costs nothing more."""
    other_image: OtherImage = "exchange"
    """Image that the chosen answer must be less likely under, with `image_beta`. `exchange`: that of another pair.
    `exchange_other_answer`: that of another pair with the same prompt text and another chosen answer. `crop`: a part of
    the pair's own image, enlarged. `noise`: the own image under heavy noise. `blank`: a gray one. `column`: the row's
    `rejected_images`. A pair without such an image trains without the term."""
    anchor: Annotated[float, NUMBER] | None = None
    """With `image_beta`, also hold the chosen answer's own log odds above this number, by the term
    -log sigmoid(log odds(chosen | image) - anchor) with the same weight. At 0, this is the NLL of the response. By
    default, the term is left out."""


class OrpoObjective(ObjectiveOptions):
    """Odds Ratio Preference Optimization, the default. Its options are in the section `orpo`."""

    title = "ORPO"
    paper = "https://arxiv.org/abs/2403.07691"
    implementation = "orpo_ray.objective.orpo:ORPO"
    section = "orpo"
    beta_range = (0.05, 0.5)
    search_metrics = ("eval/nll_loss", "eval/log_odds_ratio")

    name: Literal["orpo"] = "orpo"
    """Name of the objective."""

    @model_validator(mode="before")
    @classmethod
    def _options_are_elsewhere(cls, value: Any) -> Any:
        if isinstance(value, dict) and (misplaced := sorted(set(map(str, value)) - {"name"})):
            raise ValueError(f"options of ORPO belong in the section orpo: write orpo.{misplaced[0]}")
        return value

    @classmethod
    def options(cls) -> type[Config]:
        """The section `orpo`."""
        return OrpoConfig


class CpoObjective(ObjectiveOptions):
    """Contrastive Preference Optimization:
    loss = -log sigmoid(beta * (logp(chosen) - logp(rejected))) + cpo_alpha * NLL(chosen)."""

    title = "CPO"
    paper = "https://arxiv.org/abs/2401.08417"
    implementation = "orpo_ray.objective.cpo:CPO"
    beta_range = (0.05, 0.5)
    search_metrics = ("eval/nll_loss",)

    name: Literal["cpo"]
    """Name of the objective."""
    beta: Float = Field(0.1, ge=0)
    """Scale of the difference between the answers' log-probs, each summed over an answer's tokens."""
    cpo_alpha: Float = Field(1.0, ge=0)
    """Weight of the NLL of the chosen answer, averaged over the step's response tokens; 0 leaves the NLL out."""
    label_smoothing: Float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair's answers are labeled the wrong way round."""


class SimpoObjective(ObjectiveOptions):
    """Simple Preference Optimization:
    loss = -log sigmoid(beta * (mean_logp(chosen) - mean_logp(rejected)) - gamma)."""

    title = "SimPO"
    paper = "https://arxiv.org/abs/2405.14734"
    implementation = "orpo_ray.objective.simpo:SimPO"
    beta_range = (1.0, 10.0)

    name: Literal["simpo"]
    """Name of the objective."""
    beta: Float = Field(2.0, ge=0)
    """Scale of the difference between the answers' mean log-probs per token."""
    gamma: Float = Field(1.0, ge=0)
    """Target margin: by how much beta times the difference should exceed 0. The paper uses 0.3 to 1.6."""
    label_smoothing: Float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair's answers are labeled the wrong way round."""


ObjectiveConfig = OrpoObjective | CpoObjective | SimpoObjective

OBJECTIVES: dict[str, type[ObjectiveOptions]] = {
    get_args(each.model_fields["name"].annotation)[0]: each for each in get_args(ObjectiveConfig)
}


def _as_mapping(value: Any) -> Any:
    """Turn `cpo` into `{name: cpo}`. A mapping without a name is ORPO's. Raises ValueError for unknown names."""
    raw = {"name": value} if isinstance(value, str) else value
    if not isinstance(raw, dict):
        return value
    raw = {"name": "orpo"} | raw
    name = str(raw["name"])
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name.lower(), OBJECTIVES, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(OBJECTIVES)}"
        named = "" if isinstance(value, str) else f" '{name}'"
        raise ValueError(f"unknown objective{named}; {hint}")
    return raw


Objective = Annotated[
    Annotated[ObjectiveConfig, Field(discriminator="name")],
    BeforeValidator(_as_mapping, json_schema_input_type=ObjectiveConfig | Literal[tuple(OBJECTIVES)]),
]


# What a search may not change, with the reason.
NOT_SEARCHED = {
    "name": "it names the run",
    "tune": "it is the search itself",
    "checkpoint": "it does not change what a run learns",
    "tracking": "it does not change what a run learns",
    "scaling": "it does not change what a run learns",
    "synthesize": "it makes pairs, and trials only read them",
    "eval": "trials that are measured in different ways cannot be compared",
    "data.eval": "trials that are measured on different pairs cannot be compared",
    "data.eval_fraction": "trials that are measured on different pairs cannot be compared",
    "objective.name": "trials with different losses cannot be compared",
}


def check_search(tune: TuneConfig, objective: ObjectiveOptions) -> None:
    """Raise UserError if a search names a field that it cannot change, or a metric that the objective does not have."""
    metrics = ["eval/rewards/accuracies", "eval/rewards/margins", "eval/loss", GROUNDING_GAP, *objective.search_metrics]
    for field, metric in (("metric", tune.metric), ("second_metric", tune.second_metric)):
        if metric is not None and metric not in metrics:
            problem = f"'{metric}' does not exist with the objective {objective.title}"
            raise UserError(problem, field=f"tune.{field}", fix=_nearest(metric, metrics))
    for key in tune.search:
        section, _, option = key.partition(".")
        for forbidden, reason in NOT_SEARCHED.items():
            if key == forbidden or key.startswith(f"{forbidden}."):
                raise UserError(f"'{key}' cannot be searched: {reason}", field="tune.search", fix="remove it")
        if section in ("orpo", "objective") and (
            section != objective.section or option not in objective.options().model_fields
        ):
            known = [f"{objective.section}.{name}" for name in objective.options().model_fields if name != "name"]
            raise UserError(
                f"'{key}' does not exist with the objective {objective.title}",
                field="tune.search",
                fix=f"{_nearest(key, known)}; tune.search={{}} searches beta and the learning rate",
            )


def _nearest(value: str, known: list[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.8)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"


def default_search(objective: ObjectiveOptions) -> dict[str, SearchRange]:
    """Return the default ranges of a search: beta and the learning rate."""
    low, high = objective.beta_range
    return {
        f"{objective.section}.beta": SearchRange(low=low, high=high),
        "optim.learning_rate": SearchRange(low=1e-6, high=1e-4),
    }
