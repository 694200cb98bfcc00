"""The fields of a recipe about what a run shows of itself: evaluation and trackers. The others are in `schema.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orpo_ray.config.field_types import NUMBER, Int, Text
from orpo_ray.config.schema import Config


class EvalConfig(Config):
    """Evaluation on the held-out pairs."""

    every_steps: Annotated[int, Field(ge=1), NUMBER] | None = None
    """Steps between evaluations during training. By default, evaluation runs only at the end."""
    max_pairs: Annotated[int, Field(ge=2), NUMBER] | None = None
    """Maximum number of held-out pairs to evaluate, taken from the start of the shuffled set. By default, all."""
    grounding: bool = True
    """At the end of training, also score the pairs with images exchanged between pairs. The drop in accuracy
    (`eval/grounding_gap`) shows whether the model uses the images."""
    on_start: bool = False
    """Also evaluate before the first step, so that the report shows which pairs improved."""
    generate: Int = Field(0, ge=0, le=1000)
    """Number of held-out pairs whose prompts the model answers at each evaluation and before the first step, greedily
    and with a seed. The answers go to `generations.jsonl`, to the trackers and into the report. Not with
    `deepspeed.zero_stage` 3."""
    max_new_tokens: Int = Field(64, ge=1)
    """Most tokens of such an answer."""


class WandbConfig(Config):
    """Weights & Biases. The API key is read from `WANDB_API_KEY` or `wandb login`, never from a recipe."""

    enabled: bool | Literal["auto"] = "auto"
    """Whether to log to W&B. `auto` does if `WANDB_API_KEY` is set."""
    mode: Literal["online", "offline"] = "online"
    """`online` uploads during the run. `offline` writes to the run folder; upload later with `wandb sync`."""
    project: Text = "orpo-ray"
    """W&B project."""
    entity: Text | None = None
    """W&B team or user. By default, the default entity of the account."""


class TensorboardConfig(Config):
    """TensorBoard. Its event files are in `tensorboard/` in the run folder: `tensorboard --logdir RUN`."""

    enabled: bool = False
    """Whether to write event files."""


class MlflowConfig(Config):
    """MLflow. Its credentials are read from its own environment variables, never from a recipe."""

    enabled: bool = False
    """Whether to log to MLflow."""
    tracking_uri: Text | None = None
    """Address of the server. By default, `MLFLOW_TRACKING_URI`."""
    experiment: Text = Field("orpo-ray", min_length=1)
    """MLflow experiment, made if it does not exist."""


class TrackioConfig(Config):
    """Trackio, whose data is on this machine (`trackio show`) or in a Space of the Hugging Face hub."""

    enabled: bool = False
    """Whether to log to Trackio."""
    project: Text = Field("orpo-ray", min_length=1)
    """Trackio project."""
    space_id: Text | None = None
    """Space to log to, as `owner/name`; a new one is private. By default, this machine."""


class TrackingConfig(Config):
    """Trackers that receive metrics in addition to `metrics.jsonl`."""

    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""
    tensorboard: TensorboardConfig = Field(default_factory=TensorboardConfig)
    """TensorBoard."""
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    """MLflow."""
    trackio: TrackioConfig = Field(default_factory=TrackioConfig)
    """Trackio."""
