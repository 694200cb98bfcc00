"""The section `synthesize` of a recipe: how `orpo-ray data synthesize` makes preference pairs of images and prompts."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from orpo_ray.config.field_types import FORMATS, NUMBER, Float, Int, PathText, Text, WeightedSources
from orpo_ray.config.schema import Config

PROMPT_FORMATS = ("prompt", "question", "messages", "conversations", "instruction")
ROUNDS = 3
Label = Literal["grounding", "reference", "judge", "corruption"]
Corruption = Literal["object", "count", "color", "place", "crop", "noise", "blank"]
_TEXT_CHANGES: list[Corruption] = ["object", "count", "color", "place"]
Temperature = Annotated[float, Field(ge=0, le=10), NUMBER]


def _check_format(value: str) -> str:
    known = (*PROMPT_FORMATS, *FORMATS)
    if value == "auto" or value in known or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return value
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"use auto, {', '.join(known)}, or module:function"
    raise ValueError(f"unknown format; {hint}")


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


PromptFormat = Annotated[str, AfterValidator(_check_format)]
Temperatures = Annotated[
    list[Temperature],
    Field(min_length=1, max_length=64),
    BeforeValidator(_as_list, json_schema_input_type=Temperature | list[Temperature]),
]
Corruptions = Annotated[
    list[Corruption],
    Field(min_length=1),
    BeforeValidator(_as_list, json_schema_input_type=Corruption | list[Corruption]),
]


class ServerConfig(Config):
    """An OpenAI-compatible server. Its key is read from `OPENAI_API_KEY`, never from a recipe."""

    url: Text | None = None
    """Address up to and including the version, such as `http://localhost:8000/v1`."""
    model: Text = ""
    """Name of the model on the server."""
    concurrency: Int = Field(8, ge=1, le=256)
    """Requests that a worker has open at a time."""


class JudgeConfig(Config):
    """The judge of `label: judge`. The key of a server is read from `OPENAI_API_KEY`, never from a recipe."""

    url: Text | None = None
    """Address of an OpenAI-compatible server. By default, each worker loads the judge itself."""
    model: PathText = ""
    """Name of the model on the server; without one, a folder of a run or a model, or a model of the hub."""


class SynthesizeConfig(Config):
    """Preference pairs made from images and prompts (`orpo-ray data synthesize`, `orpo-ray iterate`)."""

    source: WeightedSources = Field(default_factory=dict)
    """Sources of the rows, given as for `data.train`. Weights are ignored. By default, those of `data.train`, read with
    `data.format`, `data.columns` and `data.image_root`."""
    format: PromptFormat = "auto"
    """Format of the rows of `source`: `prompt`, `question`, `messages`, `conversations` or `instruction`, each with an
    image and, if there is one, an answer; or a format of pairs, whose chosen answer is then the given one. `auto`
    detects it. `module:function` names your own adapter."""
    columns: dict[str, Text] = Field(default_factory=dict)
    """Columns of `source` to rename, as in `data.columns`."""
    image_root: PathText | None = None
    """Folder or URI that image paths of `source` are relative to. By default, the folder of the file that contains the
    row."""
    max_rows: Annotated[int, Field(ge=1), NUMBER] | None = None
    """Maximum number of rows to use, from the start of the shuffled order. By default, all."""
    model: PathText | None = None
    """Model that answers the prompts and scores answers for `label: grounding`: the folder of a run or a model, or a
    name on the Hugging Face hub. By default, the recipe's own model before training."""
    engine: Literal["transformers", "server", "vllm"] = "transformers"
    """What runs the model that answers: `transformers`, on CPUs or GPUs; `vllm`, through `ray.data.llm`, where it is
    installed; `server`, an OpenAI-compatible address."""
    server: ServerConfig = Field(default_factory=ServerConfig)
    """The server of `engine: server`."""
    candidates: Int = Field(4, ge=1, le=64)
    """Answers drawn for each row. Empty, repeated and cut-off ones are left out."""
    temperatures: Temperatures = Field(default_factory=lambda: [0.7, 1.0])
    """Temperatures of the candidates, in turn. 0 takes the most likely tokens."""
    max_new_tokens: Int = Field(64, ge=1)
    """Most tokens of a candidate. A candidate that is cut off there is left out."""
    include_answer: bool = False
    """Count the row's own answer among the candidates."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of the order of the rows. Each candidate has its own seed, made of this one, the row's id and the
    candidate's number."""
    label: Label = "grounding"
    """How the candidates of a row are scored. `grounding`: by how much more likely a candidate is under its own image
    than under others. `reference`: by agreement with the row's answer. `judge`: by comparisons of a vision-language
    model, each with both orders. `corruption`: no scores; the row's answer, or else the first candidate, against a
    changed one."""
    other_images: Int = Field(4, ge=1, le=64)
    """Number of other images that `label: grounding` compares with, from other rows of the same part."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    """The judge of `label: judge`."""
    corruptions: Corruptions = Field(default_factory=lambda: list(_TEXT_CHANGES))
    """Changes that `label: corruption` may make, tried in a random order until one applies. `object`, `count`, `color`
    and `place` replace a word of the answer by rules for English. `crop`, `noise` and `blank` let the model answer
    again with a degraded image."""
    min_margin: Float = Field(0.0, ge=0)
    """Least difference between the scores of the best and the worst candidate. Rows below it are thrown away."""
    rows_per_part: Int = Field(64, ge=2, le=4096)
    """Rows of one part. A worker makes one part at a time, and a resumed command keeps the parts that exist."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=1), NUMBER] = "auto"
    """Processes that make parts, each with `scaling.gpus_per_worker` and `scaling.cpus_per_worker` (by default one GPU
    if there are GPUs, and one CPU). `auto`: as many as the cluster has room for. The result does not depend on it."""
    rounds: Int = Field(ROUNDS, ge=1, le=100)
    """Rounds of `orpo-ray iterate`."""

    @model_validator(mode="after")
    def _check_combinations(self) -> SynthesizeConfig:
        for name in ("format", "columns", "image_root"):
            if name in self.model_fields_set and getattr(self, name) not in ("auto", {}, None) and not self.source:
                raise ValueError(f"{name} describes the rows of source, which is not set; set source, or remove it")
        if self.engine == "server" and not (self.server.url and self.server.model):
            raise ValueError("engine is server; set server.url and server.model")
        if self.label == "judge" and not self.judge.model:
            raise ValueError("label is judge; set judge.model, and judge.url for a model on a server")
        if self.label != "corruption" and self.candidates + self.include_answer < 2:
            raise ValueError("a pair needs two answers; set candidates to 2 or more")
        return self
