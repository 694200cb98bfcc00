"""The typed recipe: YAML plus dotted overrides become one validated `Recipe`. Imports neither torch nor ray.

Every field is documented where it is defined; `Recipe.model_json_schema()` is the schema for editors. Names follow
TRL's `ORPOConfig` and transformers' `TrainingArguments` where those have one.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from orpo_ray.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
_AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[list[str], _AsList]


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, and a field's docstring is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSection(Section):
    """Low-rank adapters (peft). Without this section the model is fully fine-tuned."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: Names = Field(default_factory=list)
    """Names of the linear layers to adapt; empty takes every linear layer of the language model."""


class ModelSection(Section):
    """The vision-language model to train."""

    id: str = Field(min_length=1)
    """A folder, a name on the Hugging Face hub, or a small offline model (`orpo-ray/tiny-smolvlm`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin a commit for a reproducible run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; auto is bfloat16 on a GPU that has it and float32 elsewhere."""
    attention: Literal["auto", "shared_prefix", "concatenated"] = "auto"
    """shared_prefix computes prompt and image once for both answers; concatenated runs prompt + answer twice, as other
    trainers do. auto shares wherever that is proven equal for the model's family."""
    freeze: Annotated[list[Literal["vision", "connector", "language"]], _AsList] = Field(default_factory=list)
    """Parts that are not trained."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    lora: LoraSection | None = None
    """Train adapters instead of the weights."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> ModelSection:
        if self.lora is None and set(self.freeze) == {"vision", "connector", "language"}:
            raise ValueError("every part is frozen and there is no lora section: nothing would be trained")
        return self


class DataSection(Section):
    """Where the preference pairs come from, and what happens to rows that cannot be used."""

    train: Names = Field(min_length=1)
    """Files (`.parquet`, `.jsonl`), folders or globs of them, or `easy-vqa:train`; one or a list."""
    eval: Names = Field(default_factory=list)
    """Held-out pairs, likewise; empty means no evaluation."""
    format: Literal["auto", "trl"] = "auto"
    """Layout of a row; auto recognises it from the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: the format's name of a column -> its name in your data, e.g. `{chosen: good_answer}`."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the file that names them."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt + response in tokens, image tokens included; a longer pair is a bad row, never cut."""
    on_bad_row: Literal["skip", "error"] = "skip"
    """A row that can't be used is skipped and written to `bad_rows.jsonl`, or ends the run."""
    max_bad_share: Fraction = 0.05
    """A larger share of bad rows among those seen stops the run (judged once ten rows were bad, and at the end)."""
    shuffle_seed: int | None = Field(0, ge=0)
    """Seed of the order, which differs by epoch; null keeps the order of the files."""
    shuffle_window: int = Field(4096, ge=1)
    """Rows are shuffled within windows of this many, files and row groups among each other; memory of a reader."""


class OrpoSection(Section):
    """The objective: loss = NLL(chosen) + beta * -log sigmoid(log odds(chosen) - log odds(rejected))."""

    beta: float = Field(0.1, ge=0)
    """Weight of the odds-ratio term."""
    nll: Literal["response", "prompt+response"] = "response"
    """What the NLL term covers. response: the chosen answer, averaged per pair (LLaMA-Factory, ms-swift).
    prompt+response: the prompt's text too, averaged over the step's tokens (TRL). Image placeholders never count."""


class OptimSection(Section):
    """Optimizer, schedule, and the size of a step."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup: float = Field(0.03, ge=0)
    """Warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (not on biases and norms)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0 does not clip."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training pairs."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, if that is earlier."""
    pairs_per_step: int = Field(32, ge=1)
    """Pairs per optimizer step over all workers, whatever their number."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Most tokens (prompt, both answers, image tokens) that one forward holds on one worker; memory follows it. Where
    attention is concatenated, a prompt counts twice, and padding counts."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the adapters' initialisation and of dropout."""


class DeepspeedSection(Section):
    """How training state is spread over the workers."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""


class ScalingSection(Section):
    """Workers and what each of them holds."""

    num_workers: int = Field(1, ge=1)
    """Training processes, one GPU each where GPUs are used."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """1, 0, or auto: 1 if the cluster has GPUs."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs reserved per worker; by default 1, or less where that would leave none for the data."""
    max_failures: int = Field(3, ge=0)
    """Worker failures after which a run gives up; each one before resumes from the latest checkpoint."""


class CheckpointSection(Section):
    """What is kept of a run, and where."""

    storage: str = Field("runs", min_length=1)
    """Folder of all runs; the run's own is `<storage>/<name>`. Every node must see it."""
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default about ten in a run."""
    keep: int = Field(2, ge=1)
    """How many checkpoints are kept."""

    @field_validator("storage")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("must be a folder that every node sees; object stores are not supported here")
        return value


class EvalSection(Section):
    """Evaluation on the held-out pairs."""

    every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations during training; by default only at the end."""
    max_pairs: int | None = Field(None, ge=2)
    """Evaluate this many pairs, the first of the (shuffled) held-out set; by default all."""
    grounding: bool = True
    """At the end also score the pairs with exchanged images, which proves that the images are used."""


class WandbSection(Section):
    """Weights & Biases. The key is read from WANDB_API_KEY or `wandb login`, never from a recipe."""

    enabled: bool | Literal["auto"] = "auto"
    """auto: on if WANDB_API_KEY is set."""
    mode: Literal["online", "offline"] = "online"
    """offline writes below the run folder; upload later with `wandb sync`."""
    project: str = "orpo-ray"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class TrackingSection(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: WandbSection = Field(default_factory=WandbSection)
    """Weights & Biases."""


class SearchRange(Section):
    """One searched parameter: either `choices`, or a range from `low` to `high`."""

    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = True
    """Sample the range uniformly in the logarithm."""
    choices: list[float] | None = None
    """Sample from this list instead."""

    @model_validator(mode="after")
    def _range_or_choices(self) -> SearchRange:
        if self.choices:
            if self.low is not None or self.high is not None:
                raise ValueError("give either choices or low and high, not both")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        elif self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 on a logarithmic scale; or set log: false")
        return self


class TuneSection(Section):
    """A search with Ray Tune around the very same training (`orpo-ray tune`)."""

    search: dict[Literal["orpo.beta", "optim.learning_rate"], SearchRange] = Field(
        default={
            "orpo.beta": SearchRange(low=0.05, high=0.5),
            "optim.learning_rate": SearchRange(low=1e-6, high=1e-4),
        },
        min_length=1,
    )
    """What is searched: a recipe key -> its range."""
    metric: Literal[
        "eval/rewards/accuracies", "eval/rewards/margins", "eval/loss", "eval/nll_loss", "eval/log_odds_ratio"
    ] = "eval/rewards/accuracies"
    """The metric that ranks the trials; for the losses set `mode: min`."""
    mode: Literal["max", "min"] = "max"
    """Whether more of the metric is better."""
    num_trials: int = Field(8, ge=1)
    """Trials in all."""
    max_concurrent: int = Field(1, ge=1)
    """Trials at a time; each takes `scaling.num_workers` workers."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the weak trials early, at evaluations; none runs all to the end."""
    grace_evals: int = Field(1, ge=1)
    """Evaluations that every trial is given before asha may stop it."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""


class Recipe(Section):
    """Everything that a run is, in one file."""

    name: str = Field(min_length=1)
    """Name of the run and of its folder."""
    model: ModelSection
    data: DataSection
    orpo: OrpoSection = Field(default_factory=OrpoSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    deepspeed: DeepspeedSection = Field(default_factory=DeepspeedSection)
    scaling: ScalingSection = Field(default_factory=ScalingSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)
    tune: TuneSection = Field(default_factory=TuneSection)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", value):
            raise ValueError("must be made of letters, digits, '.', '_' and '-' (it names the run's folder)")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> Recipe:
        if self.scaling.num_workers > self.optim.pairs_per_step:
            raise ValueError(
                f"scaling.num_workers ({self.scaling.num_workers}) exceeds optim.pairs_per_step "
                f"({self.optim.pairs_per_step}): a worker would have nothing to do in a step"
            )
        if self.eval.every_steps and not self.data.eval:
            raise ValueError("eval.every_steps is set but data.eval is empty: give held-out pairs, or leave it out")
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder, `<checkpoint.storage>/<name>`, absolute."""
        return (_lasting_folder() / Path(self.checkpoint.storage).expanduser()).resolve() / self.name

    def anchored(self) -> Recipe:
        """The same recipe with every local path absolute: workers and trials run in folders of their own."""
        raw = self.model_dump(mode="json")
        raw["checkpoint"]["storage"] = str((_lasting_folder() / Path(self.checkpoint.storage).expanduser()).resolve())
        if self.data.image_root is not None:
            raw["data"]["image_root"] = str(self.data.image_root.expanduser().resolve())
        for split in ("train", "eval"):
            raw["data"][split] = [_absolute(source) for source in raw["data"][split]]
        if Path(self.model.id).expanduser().is_dir():
            raw["model"]["id"] = str(Path(self.model.id).expanduser().resolve())
        return Recipe.model_validate(raw)

    def to_yaml(self) -> str:
        """The resolved recipe; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides (values are YAML). Raises UserError."""
    raw = read_mapping(Path(path))
    apply_overrides(raw, overrides)
    return parse_recipe(raw, source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A recipe file's raw mapping. Raises UserError if it is not one."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such recipe", field=str(path), fix="give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", field=str(path)) from None
    except yaml.YAMLError as error:
        raise UserError(f"is not valid YAML: {error}", field=str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("a recipe is a mapping of sections", field=str(path), value=type(raw).__name__)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put `section.key=value` overrides into a recipe's mapping. Raises UserError."""
    for override in overrides:
        _apply_override(raw, override)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping. Raises one UserError that names every wrong field."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        body = lines[0] if len(lines) == 1 else f"{len(lines)} problems\n" + "\n".join(f"  - {line}" for line in lines)
        raise UserError(body, field=source) from None


def _lasting_folder() -> Path:
    """What a relative storage is relative to: this folder, but not a submitted job's, which Ray deletes."""
    return Path.home() if "working_dir_files" in Path.cwd().parts else Path.cwd()


def _absolute(source: str) -> str:
    """A source that is a path made absolute; `scheme:...` stays."""
    if re.match(r"[a-z0-9+-]{2,}:", source):
        return source
    return os.path.abspath(Path(source).expanduser())


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise UserError("an override is section.key=value", field="command line", value=override)
    try:
        value = _number_like(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UserError(f"the value is not valid YAML: {error}", field=key, value=text) from None
    *parents, last = key.split(".")
    here = raw
    for parent in parents:
        child = here.get(parent)
        if child is None:
            child = here[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"'{parent}' is a value, not a section", field=key, value=child)
        here = child
    here[last] = value


def _number_like(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; users mean the number."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _explain(item: dict[str, Any]) -> str:
    """One line for one of pydantic's findings: field, what is wrong, the value, the nearest known key."""
    location = [str(part) for part in item["loc"] if part != "[key]"]
    field, kind, context = ".".join(location) or "recipe", item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if kind == "missing":
        return f"{field}: is required"
    message = context["error"] if kind == "value_error" else item["msg"]
    value = item["input"]
    shown = f" (found {value!r})" if not isinstance(value, dict | BaseModel) else ""
    return f"{field}: {message}{shown}"


def _known_keys(location: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields.get(part)
        if field is None:
            break
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return list(section.model_fields)
